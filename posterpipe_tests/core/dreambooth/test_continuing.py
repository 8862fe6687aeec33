"""Going on from the save of another run."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posterpipe.core.dreambooth import objective
from posterpipe.core.dreambooth.config import RunConfig, Versions
from posterpipe.core.dreambooth.errors import TrainingDiverged, TrainingError
from posterpipe.core.dreambooth.train import train
from posterpipe_tests.core.dreambooth.conftest import (
    MakeConfig,
    equal,
    interrupt_at,
    no_number_at,
    saves_of,
    text_weights,
    unet_weights,
    write_training_set,
)


def shorter(make_config: MakeConfig, **settings: Any) -> tuple[RunConfig, Path]:
    """A finished run of 4 steps, and its last save."""
    config = make_config("shorter", parts={"keep_last_save": True}, max_train_steps=4, **settings)
    train(config)
    (save,) = saves_of(config)
    assert save.name == "step-00000004"
    return config, save


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adamw_8bit", "mixed_precision": "bf16"},
        {"method": "lora", "ema_decay": 0.9, "train_text_encoder": True},
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3, "snr_gamma": 5.0},
    ],
    ids=["plain", "8 bit", "LoRA and EMA", "warmup"],
)
def test_a_run_made_longer_ends_with_the_bits_of_one_that_was_long_from_the_start(
    make_config: MakeConfig, settings: dict[str, Any]
) -> None:
    _, save = shorter(make_config, **settings)
    longer = make_config("longer", parts={"continue_from": save}, max_train_steps=7, **settings)
    said: list[str] = []
    result = train(longer, log=said.append)
    assert result.steps == 7 and result.resumed_from == 4
    assert any(f"goes on from step 4 of 7, saved in {save}" in line for line in said)
    whole = make_config("whole", max_train_steps=7, **settings)
    straight = train(whole)
    assert equal(unet_weights(longer.output_dir), unet_weights(whole.output_dir))
    assert equal(text_weights(longer.output_dir), text_weights(whole.output_dir))
    # By its history another checkpoint, though the bits are the same; its curves are whole.
    assert result.checkpoint_id != straight.checkpoint_id
    losses = [(report.step, report.loss) for report in straight.reports]
    assert [(report.step, report.loss) for report in result.reports] == losses
    record = json.loads((longer.output_dir / "posterpipe.json").read_text())
    assert record["continued"] == f"{save.parent.name}, step 4"
    assert record["continued"] in (longer.output_dir / "README.md").read_text()


def test_what_the_new_settings_say_counts_from_then_on(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    _, save = shorter(make_config, learning_rate=1e-3)
    changes: dict[str, Any] = {
        "learning_rate": 1e-5,
        "train_batch_size": 1,
        "mixed_precision": "bf16",
        "adam_beta2": 0.9,
        "adam_weight_decay": 0.5,
        "ema_decay": 0.9,
    }
    parts = {"continue_from": save, "training_set": write_training_set(tmp_path / "other", seed=3)}
    result = train(make_config("changed", parts=parts, max_train_steps=6, **changes))
    assert [report.lr for report in result.reports] == [1e-3] * 4 + [1e-5] * 2
    other = {**changes, "adam_weight_decay": 0.0}
    train(make_config("other", parts=parts, max_train_steps=6, **other))
    weights = [unet_weights(make_config(name).output_dir) for name in ("changed", "other")]
    assert not equal(*weights), "of the weight decay that was set anew"


def test_a_continued_run_that_was_killed_goes_on_from_its_own_saves(
    make_config: MakeConfig,
) -> None:
    """Also where the save that it began with is gone by then, as when its run prunes its saves."""
    _, save = shorter(make_config)
    parts = {"continue_from": save}
    whole = make_config("whole", parts=parts, max_train_steps=8, save_every_steps=1)
    train(whole)
    killed = make_config("killed", parts=parts, max_train_steps=8, save_every_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(killed, interrupt_at(7))
    shutil.rmtree(save)
    result = train(killed)
    assert result.resumed_from == 6
    assert equal(unet_weights(killed.output_dir), unet_weights(whole.output_dir))
    assert saves_of(killed) == []
    assert train(killed).checkpoint_id == result.checkpoint_id  # it has finished


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw_fused", "adamw_8bit"])
def test_the_memory_layout_may_change_where_the_state_of_the_optimizer_can_follow(
    make_config: MakeConfig, before: bool, optimizer: str
) -> None:
    _, save = shorter(make_config, channels_last=before, optimizer=optimizer)
    parts = {"continue_from": save}
    settings: dict[str, Any] = {"max_train_steps": 6, "optimizer": optimizer}
    other = make_config("other", parts=parts, channels_last=not before, **settings)
    same = make_config("same", parts=parts, channels_last=before, **settings)
    train(same)
    if optimizer == "adamw_8bit":  # its blocks of bytes cannot be turned around
        with pytest.raises(TrainingError, match=f"channels_last = {str(before).lower()}"):
            train(other)
        return
    train(other)
    expected = unet_weights(same.output_dir)
    for name, weight in unet_weights(other.output_dir).items():
        torch.testing.assert_close(weight, expected[name], rtol=0.02, atol=2e-4)


def test_a_layout_that_is_left_to_the_device_is_that_of_the_save(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a run moves from a CPU to a GPU, which prefer different ones."""
    settings: dict[str, Any] = {"optimizer": "adamw_8bit", "max_train_steps": 6}
    settings |= {"save_every_steps": 2}
    whole = make_config("whole", **settings)
    train(whole)
    moved = make_config("moved", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(moved, interrupt_at(5))
    monkeypatch.setattr(
        "posterpipe.core.dreambooth.learner.memory_layout",
        lambda *_, **__: torch.contiguous_format,
    )
    assert train(moved).resumed_from == 4
    assert equal(unet_weights(moved.output_dir), unet_weights(whole.output_dir))


def test_with_early_stopping_the_weights_that_it_begins_with_may_stay_the_best(
    make_config: MakeConfig, other_set: Path
) -> None:
    _, save = shorter(make_config)
    parts = {"continue_from": save, "holdout_set": other_set}
    config = make_config(
        "spoilt",
        parts=parts,
        max_train_steps=20,
        learning_rate=1.0,
        holdout_every_steps=1,
        early_stop_patience=2,
    )
    result = train(config)
    assert result.holdout[0].step == 4
    assert result.steps == 4 and result.ended_by == "early_stop"
    first = load_file(save / "unet.safetensors")
    found = unet_weights(config.output_dir)
    assert all(torch.equal(found[name], first[name].to(found[name].dtype)) for name in first)


def test_a_limit_on_time_is_that_of_the_run_that_goes_on(make_config: MakeConfig) -> None:
    _, save = shorter(make_config)
    state = json.loads((save / "state.json").read_text())
    state["journal"]["seconds"] = 10_000.0
    rewritten(save, state)
    parts = {"continue_from": save}
    result = train(make_config("on", parts=parts, max_train_steps=6, time_limit_minutes=60))
    assert result.steps == 6 and result.ended_by == "max_train_steps" and result.seconds < 5_000


def test_settings_without_an_effect_may_differ(make_config: MakeConfig) -> None:
    _, save = shorter(make_config)
    parts = {"continue_from": save}
    assert train(make_config("on", parts=parts, max_train_steps=5, lora_rank=3)).steps == 5
    _, save = shorter_lora(make_config)
    parts = {"continue_from": save}
    settings: dict[str, Any] = {"method": "lora", "lora_rank": 4, "lora_alpha": 4}
    assert train(make_config("lora", parts=parts, max_train_steps=5, **settings)).steps == 5


def shorter_lora(make_config: MakeConfig) -> tuple[RunConfig, Path]:
    parts = {"keep_last_save": True}
    config = make_config("shorter-lora", parts=parts, method="lora", lora_rank=4)
    train(config)
    (save,) = saves_of(config)
    return config, save


def test_a_save_of_the_asset_is_taken_up_by_hand(make_config: MakeConfig) -> None:
    """The asset names the base model by a fingerprint of its own kind."""
    versions = Versions(training_set="set", base_model="af11e5d7f47b")
    parts = {"keep_last_save": True, "versions": versions}
    config = make_config("asset", parts=parts, max_train_steps=4)
    train(config)
    (save,) = saves_of(config)
    longer = make_config("longer", parts={"continue_from": save}, max_train_steps=6)
    assert train(longer).resumed_from == 4


def rewritten(save: Path, state: dict[str, Any]) -> None:
    """Gives a save another state, as if it had been written so."""
    text = json.dumps(state)
    (save / "state.json").write_text(text)
    manifest = json.loads((save / "manifest.json").read_text())
    manifest["files"]["state.json"] = {
        "bytes": len(text.encode()),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    (save / "manifest.json").write_text(json.dumps(manifest))


def test_after_a_loss_that_is_no_number_the_save_that_was_named_is_taken_up_with_a_lower_rate(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: dict[str, Any] = {"max_train_steps": 6, "save_every_steps": 2}
    config = make_config("diverges", **steps)
    with monkeypatch.context() as patched:
        patched.setattr(objective, "squared_errors", no_number_at(4))
        with pytest.raises(TrainingDiverged, match=r"step-00000002.* `continue_from`"):
            train(config)
    (save,) = saves_of(config)
    lower = make_config("lower", parts={"continue_from": save}, learning_rate=1e-5, **steps)
    result = train(lower)
    assert result.resumed_from == 2 and result.steps == 6
    assert [report.lr for report in result.reports] == [1e-3] * 2 + [1e-5] * 4


def test_a_save_that_does_not_fit_is_refused_with_what_differs(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    from posterpipe_tests.models import build_tiny_stable_diffusion

    config, save = shorter(make_config)

    def refusal(save: Path, parts: dict[str, Any] | None = None, **settings: Any) -> str:
        longer = {"max_train_steps": 6, **settings}
        run = make_config("refused", parts={"continue_from": save, **(parts or {})}, **longer)
        with pytest.raises(TrainingError) as caught:
            train(run)
        assert not run.output_dir.exists()
        return str(caught.value)

    assert "no save is there" in refusal(tmp_path / "nowhere")
    assert "training.method = full, now it is lora" in refusal(save, method="lora")
    assert "training.train_text_encoder" in refusal(save, train_text_encoder=False)
    assert "training.optimizer = adamw" in refusal(save, optimizer="adamw_8bit")
    assert "max_train_steps counts these too" in refusal(save, max_train_steps=4)
    other = build_tiny_stable_diffusion(tmp_path / "base", seed=1)
    assert "another base model" in refusal(save, {"base_model": other})
    damaged = Path(shutil.copytree(save, tmp_path / "run" / save.name))
    (damaged / "unet.safetensors").write_bytes(b"short")
    assert "unet.safetensors is not as it was written" in refusal(damaged)
    older = Path(shutil.copytree(save, tmp_path / "older" / save.name))
    state = json.loads((older / "state.json").read_text())
    del state["run"]
    rewritten(older, state)
    assert "earlier version" in refusal(older)
    assert config.output_dir.exists()
