from __future__ import annotations

import itertools

import pytest
import torch
from diffusers.optimization import get_scheduler
from hypothesis import given
from hypothesis import strategies as st

from posterpipe.core.dreambooth.schedule import Schedule, learning_rate

SCHEDULES: tuple[Schedule, ...] = ("constant", "constant_with_warmup", "linear", "cosine")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 12), (5, 12), (12, 12)])
def test_rates_are_those_of_diffusers(schedule: Schedule, warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    peer = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        ours = learning_rate(
            step, peak=3e-4, schedule=schedule, warmup_steps=warmup, total_steps=total
        )
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-20)
        optimizer.step()
        peer.step()


@given(st.sampled_from(SCHEDULES), st.integers(0, 3000), st.integers(0, 400), st.integers(1, 2000))
def test_the_rate_never_leaves_zero_to_peak(
    schedule: Schedule, step: int, warmup: int, total: int
) -> None:
    rate = learning_rate(step, peak=1.0, schedule=schedule, warmup_steps=warmup, total_steps=total)
    assert 0 <= rate <= 1


@given(st.integers(1, 400))
def test_warmup_rises_at_every_step_and_ends_at_the_peak(warmup: int) -> None:
    rates = [
        learning_rate(
            step, peak=1.0, schedule="constant_with_warmup", warmup_steps=warmup, total_steps=1000
        )
        for step in range(warmup + 1)
    ]
    assert rates[0] == 0 and rates[-1] == 1
    assert all(a < b for a, b in itertools.pairwise(rates))
