"""Going on from the save of another run, with other settings.

What belongs here: reading such a save and saying why it does not fit. What does not: a run that
goes on from its own saves, which needs nothing of this (`saves`, `Run`), and taking up what is in
one (`Learner.restore`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posterpipe.core.dreambooth.config import RunConfig, Versions
from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.core.dreambooth.saves import Save, read_save, save_fingerprint

_SAME = (
    "method",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "lora_text_encoder_targets",
    "train_text_encoder",
)
"""Settings that decide which weights are trained, and so what lies in a save."""


def with_continued(versions: Versions, config: RunConfig) -> Versions:
    """The versions of a run's inputs, of which the save that it goes on from is one."""
    if config.continue_from is None:
        return versions
    return versions.model_copy(update={"continued": save_fingerprint(config.continue_from)})


def save_to_continue(config: RunConfig, versions: Versions) -> Save | None:
    """The save that `config.continue_from` names; None where it names none.

    Raises TrainingError where it is not whole, or is of other weights than this run trains.
    """
    if config.continue_from is None:
        return None
    saved = read_save(config.continue_from)
    before = saved.state.get("run")
    if before is None:
        raise TrainingError(
            f"continue_from: {saved.folder} was written by an earlier version, and does not tell "
            "its settings; only its own run can go on from it"
        )
    if before["base_model"] != versions.base_model:
        raise TrainingError(
            f"continue_from: {saved.folder} was trained from another base model; name that one as "
            "base_model"
        )
    now = config.training.model_dump(mode="json")
    for name in _SAME:
        if before["settings"][name] != now[name]:
            raise TrainingError(
                f"continue_from: {saved.folder} was trained with training.{name} = "
                f"{before['settings'][name]}, now it is {now[name]}; give it the same, since other "
                "weights are trained otherwise"
            )
    if _in_8_bit(before["settings"]) != _in_8_bit(now):
        raise TrainingError(
            f"continue_from: {saved.folder} was trained with training.optimizer = "
            f"{before['settings']['optimizer']}, whose state {now['optimizer']} cannot take up"
        )
    if saved.step >= config.training.max_train_steps:
        raise TrainingError(
            f"continue_from: {saved.folder} has made {saved.step} steps already; "
            "training.max_train_steps counts these too, so raise it"
        )
    return saved


def describe(config: RunConfig, versions: Versions) -> dict[str, Any]:
    """What a save tells of its run, for runs that go on from it with other settings."""
    values = config.training.model_dump(mode="json")
    settings = {name: values[name] for name in (*_SAME, "optimizer")}
    return {"base_model": versions.base_model, "settings": settings}


def step_folder(path: Path) -> str:
    """A save in two words: its run and its step."""
    return f"{path.parent.name}/{path.name}"


def _in_8_bit(settings: dict[str, Any]) -> bool:
    return bool(settings["optimizer"] == "adamw_8bit")
