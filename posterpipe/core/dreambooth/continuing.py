"""Going on from the save of another run, with other settings.

What belongs here: reading such a save and saying why it does not fit. What does not: a run that
goes on from its own saves, which needs nothing of this (`saves`, `Run`), and taking up what is in
one (`Learner.restore`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from posterpipe.core.dreambooth.config import RunConfig, Versions
from posterpipe.core.dreambooth.effects import with_defaults
from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.core.dreambooth.guards import writing
from posterpipe.core.dreambooth.saves import Save, read_save, save_fingerprint
from posterpipe.core.files import write_atomic

_SAME = (
    "method",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "lora_text_encoder_targets",
    "train_text_encoder",
)
"""Settings that decide which weights are trained, and so what lies in a save. Beside them the
optimizer: 8-bit AdamW keeps another state than the other two."""

_NOTES = "continued.json"
"""In work_dir: the fingerprints of the saves that runs went on from, by path."""


def with_continued(versions: Versions, config: RunConfig) -> Versions:
    """The versions of a run's inputs, of which the save that it goes on from is one.

    That is needed no more when this run has a save of its own or has finished, so its fingerprint
    is noted in work_dir. Raises TrainingError where it is neither there nor noted.
    """
    if config.continue_from is None:
        return versions
    path = Path(os.path.abspath(config.continue_from))
    notes = _notes(config.work_dir)
    try:
        found = save_fingerprint(path)
    except TrainingError:
        if str(path) not in notes:
            raise
        found = notes[str(path)]
    if notes.get(str(path)) != found:
        with writing("what it goes on from", config.work_dir):
            config.work_dir.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**notes, str(path): found}, indent=1)
            write_atomic(config.work_dir / _NOTES, text.encode())
    return versions.model_copy(update={"continued": found})


def name_of(continued: str) -> str:
    """A save in words, `run, step N`, from its fingerprint; "" for none."""
    if not continued:
        return ""
    run, step, _ = continued.split("/")
    return f"{run}, step {step}"


def _notes(work_dir: Path) -> dict[str, str]:
    try:
        notes = json.loads((work_dir / _NOTES).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


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
    now = describe(config, versions)
    # Fingerprints of two kinds, as the asset gives them and as they are measured by hand, tell
    # nothing of each other.
    bases = before["base_model"], now["base_model"]
    if bases[0] != bases[1] and len(bases[0]) == len(bases[1]):
        raise TrainingError(
            f"continue_from: {saved.folder} was trained from another base model; name that one as "
            "base_model"
        )
    for name, value in now["settings"].items():
        if before["settings"].get(name) != value:
            raise TrainingError(
                f"continue_from: {saved.folder} was trained with training.{name} = "
                f"{before['settings'].get(name)}, now it is {value}; give it the same, since what "
                "is saved is of other weights, or in another form"
            )
    if saved.step >= config.training.max_train_steps:
        raise TrainingError(
            f"continue_from: {saved.folder} has made {saved.step} steps already; "
            "training.max_train_steps counts these too, so raise it"
        )
    return saved


def describe(config: RunConfig, versions: Versions) -> dict[str, Any]:
    """What a save tells of its run, for runs that go on from it with other settings."""
    training = config.training
    alpha = training.lora_alpha or training.lora_rank
    in_use = with_defaults(training.model_copy(update={"lora_alpha": float(alpha)}))
    settings = in_use.model_dump(mode="json", include=set(_SAME))
    settings["optimizer"] = "adamw_8bit" if in_use.optimizer == "adamw_8bit" else "adamw"
    return {"base_model": versions.base_model, "settings": settings}
