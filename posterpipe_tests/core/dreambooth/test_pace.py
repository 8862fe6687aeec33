"""How often a run saves and when its time is over, by a clock of the tests' own."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from posterpipe.core.dreambooth.learner import Learner
from posterpipe.core.dreambooth.pace import SavePace
from posterpipe.core.dreambooth.saves import write_save
from posterpipe.core.dreambooth.train import train
from posterpipe_tests.core.dreambooth.conftest import MakeConfig, interrupt_at


class Clock:
    """Time passes where a test says so, in one of the trainer's modules."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str = "pace") -> None:
        self.now = 0.0
        time = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(f"posterpipe.core.dreambooth.{module}.time", time)


def test_a_slow_save_waits_for_twenty_times_what_the_last_one_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    said: list[str] = []
    pace = SavePace(said.append)
    assert pace.allows_save()  # the first one
    with pace.saving():
        clock.now += 15.0
    clock.now += 299.0
    assert not pace.allows_save() and not pace.allows_save()
    assert said == [
        "a save takes 15 s: the next one comes 5 min 0 s after it, however few steps "
        "training.save_every_steps says"
    ]
    clock.now += 1.0
    assert pace.allows_save()


def test_a_quick_save_is_never_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pace = SavePace(lambda line: pytest.fail(line))
    with pace.saving():
        clock.now += 1.9
    assert pace.allows_save()


def run_by_the_clock(
    config: Any, monkeypatch: pytest.MonkeyPatch, *, step_seconds: float, save_seconds: float
) -> tuple[list[int], float]:
    """After which steps a run saved, and the share of its time that this took."""
    clock = Clock(monkeypatch)
    saved: list[int] = []
    add_gradients = Learner.add_gradients

    def add(learner: Learner, step: int, batches: Any) -> Tensor:
        clock.now += step_seconds
        return add_gradients(learner, step, batches)

    def write(*arguments: Any, step: int, **keywords: Any) -> Path:
        clock.now += save_seconds
        saved.append(step)
        return write_save(*arguments, step=step, **keywords)

    monkeypatch.setattr(Learner, "add_gradients", add)
    for module in ("run", "early_stop"):
        monkeypatch.setattr(f"posterpipe.core.dreambooth.{module}.write_save", write)
    train(config)
    return saved, save_seconds * len(saved) / clock.now


def test_a_run_saves_for_at_most_a_twentieth_of_its_time_and_always_when_it_ends(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(max_train_steps=24, save_every_steps=2)
    saved, share = run_by_the_clock(config, monkeypatch, step_seconds=7.0, save_seconds=3.0)
    # 20 times 3 seconds are 9 steps: what was due at step 4 is made up for then, at whatever step.
    assert saved == [2, 11, 20, 24]
    assert share < 0.07  # with the one at the end, at once


def test_ever_lower_held_out_losses_put_no_further_files_between_the_saves(
    make_config: MakeConfig, other_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    falling = itertools.count(start=100, step=-1)
    monkeypatch.setattr(
        "posterpipe.core.dreambooth.run.holdout_loss",
        lambda *_, **__: torch.tensor(next(falling)),
    )
    config = make_config(
        parts={"holdout_set": other_set},
        max_train_steps=24,
        save_every_steps=2,
        holdout_every_steps=1,
        early_stop_patience=50,
    )
    saved, share = run_by_the_clock(config, monkeypatch, step_seconds=7.0, save_seconds=3.0)
    # Each time the weights of the lowest so far, then the save: 20 times 6 seconds are 18 steps.
    assert saved == [2, 2, 20, 20, 24, 24]
    assert share < 0.1  # with the one at the end, at once


def test_a_run_whose_saves_are_quick_saves_when_it_was_told_to(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(max_train_steps=6, save_every_steps=2)
    saved, _ = run_by_the_clock(config, monkeypatch, step_seconds=0.01, save_seconds=1.0)
    assert saved == [2, 4, 6]


def test_a_slow_save_that_comes_due_seldom_is_not_put_off(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(max_train_steps=6, save_every_steps=2)
    saved, _ = run_by_the_clock(config, monkeypatch, step_seconds=30.0, save_seconds=3.0)
    assert saved == [2, 4, 6]


def test_a_time_limit_counts_the_time_before_a_run_was_taken_up_again(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, "run")
    add_gradients = Learner.add_gradients

    def add(learner: Learner, step: int, batches: Any) -> Any:
        clock.now += 10.0
        return add_gradients(learner, step, batches)

    monkeypatch.setattr(Learner, "add_gradients", add)
    config = make_config(max_train_steps=9, save_every_steps=1, time_limit_minutes=25 / 60)
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt_at(3))
    result = train(config)
    assert result.resumed_from == 2
    assert (result.ended_by, result.steps) == ("time_limit", 3)
