from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from posterpipe.core.dreambooth.holdout import lowest, stopped_falling

LOSSES = st.lists(st.floats(0.01, 10), max_size=12)


def test_the_lowest_so_far_counts_only_with_enough_gain() -> None:
    assert lowest([], 0) == -1
    assert lowest([3, 2, 2.5, 1.9], 0) == 3
    assert lowest([3, 2, 2.5, 1.9], 0.1) == 1
    assert lowest([1.0, 1.0, 1.0], 0) == 0


def test_the_gain_asked_for_is_a_share_of_the_loss_however_small_that_is() -> None:
    assert lowest([0.02, 0.018], 0.01) == 1
    assert lowest([20.0, 19.9], 0.01) == 0


def test_a_loss_that_is_no_number_is_never_the_lowest_nor_a_measurement() -> None:
    assert lowest([math.nan, 3, 2, math.nan], 0) == 2
    assert lowest([math.nan, -math.inf], 0) == -1
    assert not stopped_falling([math.nan] * 5, patience=2, min_gain=0)
    assert not stopped_falling([math.nan, 3.0, 4.0, math.nan], patience=2, min_gain=0)
    assert stopped_falling([3.0, math.nan, 4.0, 5.0], patience=2, min_gain=0)


def test_a_run_stops_after_so_many_measurements_without_a_new_lowest() -> None:
    falling = [5.0, 4.0, 3.0]
    assert not stopped_falling(falling, patience=1, min_gain=0)
    assert not stopped_falling([*falling, 3.5], patience=2, min_gain=0)
    assert stopped_falling([*falling, 3.5, 3.1], patience=2, min_gain=0)
    assert not stopped_falling([*falling, 3.5, 2.9], patience=2, min_gain=0)
    assert not stopped_falling([], patience=1, min_gain=0)


@given(LOSSES)
def test_without_a_gain_asked_for_the_lowest_is_the_first_minimum(losses: list[float]) -> None:
    assert lowest(losses, 0) == (losses.index(min(losses)) if losses else -1)


@given(LOSSES, st.integers(1, 5), st.floats(0, 0.5))
def test_more_patience_never_stops_sooner(
    losses: list[float], patience: int, min_gain: float
) -> None:
    if stopped_falling(losses, patience=patience + 1, min_gain=min_gain):
        assert stopped_falling(losses, patience=patience, min_gain=min_gain)
