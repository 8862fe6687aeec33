"""Estimates against values computed by hand and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from posterpipe.core.statistics import (
    bootstrap_interval,
    leaderboard,
    mean_interval,
    paired_difference,
    student_quantile,
)

Row = tuple[str, str, int, float | None]


def table(rows: list[Row]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["variant", "prompt_id", "seed", "clip_cosine"])


SMALL = table(
    [
        ("sd", "a", 1, 0.10), ("sd", "a", 2, 0.20), ("sd", "b", 1, 0.30), ("sd", "b", 2, 0.40),
        ("dreambooth", "a", 1, 0.30), ("dreambooth", "a", 2, 0.20),
        ("dreambooth", "b", 1, 0.35), ("dreambooth", "b", 2, None),
    ]
)  # fmt: skip


def test_student_quantiles_are_those_of_the_tables() -> None:
    # Two-sided 95 %, as printed in any book.
    for degrees, quantile in [(1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (23, 2.069)]:
        assert student_quantile(0.025, degrees) == pytest.approx(-quantile, abs=5e-4)
    assert student_quantile(0.975, 10) == pytest.approx(2.228, abs=5e-4)
    assert student_quantile(0.5, 7) == pytest.approx(0, abs=1e-9)


def test_the_mean_averages_seeds_within_prompts_first() -> None:
    sd = mean_interval(SMALL[SMALL.variant == "sd"])
    assert (sd.mean, sd.prompts, sd.images) == (pytest.approx(0.25), 2, 4)
    # a: (0.30 + 0.20) / 2 = 0.25; b: 0.35 alone; not the 0.2833 of all three together.
    tuned = mean_interval(SMALL[SMALL.variant == "dreambooth"])
    assert (tuned.mean, tuned.prompts, tuned.images) == (pytest.approx(0.30), 2, 3)


def test_differences_are_paired_and_a_missing_one_takes_its_partner_out() -> None:
    # a: ((0.30 - 0.10) + (0.20 - 0.20)) / 2 = 0.10; b: 0.35 - 0.30 = 0.05.
    difference = paired_difference(SMALL, "dreambooth", "sd")
    assert difference.mean == pytest.approx(0.075)
    assert (difference.prompts, difference.images) == (2, 3)
    # Two prompts: the widened percentiles reach the smallest and the largest.
    assert difference.low == pytest.approx(0.05)
    assert difference.high == pytest.approx(0.10)
    assert paired_difference(SMALL, "sd", "dreambooth").mean == pytest.approx(-0.075)


def test_the_order_of_rows_does_not_matter() -> None:
    shuffled = SMALL.sample(frac=1, random_state=3)
    assert paired_difference(shuffled, "dreambooth", "sd") == paired_difference(
        SMALL, "dreambooth", "sd"
    )


def test_the_interval_is_students_where_values_are_normal() -> None:
    values = np.random.default_rng(5).normal(0.3, 0.05, 40)
    low, high = bootstrap_interval(values)
    half = student_quantile(0.975, 39) * values.std(ddof=1) / math.sqrt(40)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap_interval(values) == (low, high)


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        low, high = bootstrap_interval(rng.normal(0, 1, 24), resamples=1000)
        covered += low <= 0 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_too_little_gives_no_interval() -> None:
    assert all(math.isnan(bound) for bound in bootstrap_interval(np.array([0.3])))
    nothing = mean_interval(table([("sd", "a", 1, None)]))
    assert math.isnan(nothing.mean) and nothing.prompts == nothing.images == 0
    assert bootstrap_interval(np.array([0.25, 0.25, 0.25])) == (0.25, 0.25)


def test_the_leaderboard_by_hand() -> None:
    board = leaderboard(SMALL)
    assert list(board.variant) == ["sd", "dreambooth"]
    sd, tuned = board.iloc[0], board.iloc[1]
    assert (sd.prompts, sd.images, sd.missing, sd["mean"]) == (2, 4, 0, pytest.approx(0.25))
    assert math.isnan(sd.difference)
    assert (tuned.images, tuned.missing, tuned.pairs) == (4, 1, 3)
    assert tuned.difference == pytest.approx(0.075)
    assert (tuned.difference_low, tuned.difference_high) == (
        pytest.approx(0.05),
        pytest.approx(0.10),
    )


def test_a_leaderboard_without_the_baseline_or_without_rows() -> None:
    board = leaderboard(SMALL[SMALL.variant == "dreambooth"])
    assert math.isnan(board.difference[0]) and board["mean"][0] == pytest.approx(0.30)
    assert leaderboard(SMALL[:0]).empty


def test_an_image_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="sd has more than one score for the prompt a and seed 1"):
        leaderboard(pd.concat([SMALL, SMALL[:1]]))
