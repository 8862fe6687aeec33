"""Estimates against values computed by hand, and by simulation against a truth that is known."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pandas as pd
import pytest

from posterpipe.core import statistics
from posterpipe.core.statistics import (
    CONTRASTS,
    bootstrap_interval,
    bootstrap_intervals,
    detectable,
    effect,
    effect_of,
    effects,
    half_of_detectable,
    hedges_g,
    logarithms,
    mean_interval,
    one_prompt,
    paired_difference,
    student_quantile,
    wilson_interval,
)
from posterpipe.core.variants import TUNED_VARIANTS, VARIANTS
from posterpipe.settings import default_root
from posterpipe_tests.reference import holm, smallest_detectable

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
    # Two prompts: Student's t with one degree of freedom reaches further than any mean of them.
    half = 12.706205 * 0.05 / 2
    assert difference.low == pytest.approx(0.075 - half)
    assert difference.high == pytest.approx(0.075 + half)
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


def study(
    rng: np.random.Generator,
    *,
    tuned: float = 0.0,
    negative: float = 0.0,
    both: float = 0.0,
    prompts: int = 24,
    seeds: int = 4,
) -> pd.DataFrame:
    """Scores as a study gives them: prompts differ, seeds differ, effects differ by prompt."""
    level = rng.normal(0.25, 0.03, prompts)
    noise = rng.normal(0, 0.01, (prompts, seeds))
    rows: list[Row] = []
    for variant in VARIANTS:
        is_tuned, is_negative = variant in TUNED_VARIANTS, "negative" in variant
        shift = tuned * is_tuned + negative * is_negative + both * (is_tuned and is_negative)
        by_prompt = level + shift + rng.normal(0, 0.008, prompts)
        values = by_prompt[:, None] + noise + rng.normal(0, 0.015, (prompts, seeds))
        rows += [
            (variant, f"p{prompt}", 10 * prompt + seed, values[prompt, seed])
            for prompt in range(prompts)
            for seed in range(seeds)
        ]
    return table(rows)


def test_intervals_cover_the_truth_in_95_of_100_studies() -> None:
    # What `study` gives once seeds are averaged, for the difference of two variants.
    spread = math.sqrt(2 * 0.008**2 + 2 * 0.015**2 / 4)
    values = np.random.default_rng(0).normal(0.02, spread, (1000, 24))
    assert 0.93 <= share_covered(0.02, values) <= 0.97


def share_covered(truth: float, samples: np.ndarray, *, resamples: int = 1000) -> float:
    """How many of the intervals of `samples` (k, n) hold the truth."""
    low, high = bootstrap_intervals(samples, resamples=resamples).T
    return float(np.mean((low <= truth) & (truth <= high)))


FORMS: dict[str, tuple[Callable[[np.random.Generator, tuple[int, int]], np.ndarray], float]] = {
    "normal": (lambda rng, size: rng.normal(0, 1, size), 0.0),
    "uniform": (lambda rng, size: rng.uniform(-1, 1, size), 0.0),
    "exponential": (lambda rng, size: rng.exponential(1, size), 1.0),
    "log-normal": (lambda rng, size: rng.lognormal(0, 1, size), math.exp(0.5)),
    "one of 24 far away": (lambda rng, size: one_far_away(rng, size), 10 / 24),
}
"""The shapes of the table in docs/scores.md, as it calls them, each with its mean."""

SHAPES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(0.04, 0.02, n),
    "skewed": lambda rng, n: rng.gamma(4, 0.01, n),
    "heavy tails": lambda rng, n: 0.04 + 0.01 * rng.standard_t(5, n),
    "few values": lambda rng, n: 0.04 + rng.integers(-1, 2, (4, n)).mean(axis=0),
}
"""Effects that differ by prompt, whose shape nobody knows, each with mean 0.04. Few values are
those of a metric that says yes or no, over four seeds."""


@pytest.mark.parametrize("prompts", [12, 24, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_intervals_of_small_suites_cover_the_truth(shape: str, prompts: int) -> None:
    rng = np.random.default_rng(prompts)
    values = np.stack([SHAPES[shape](rng, prompts) for _ in range(1000)])
    assert 0.93 <= share_covered(0.04, values) <= 0.97


def one_far_away(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Values (samples, prompts) of which one in 24 is ten deviations away, as a prompt may be that
    alone fails or succeeds. The mean is 10/24."""
    return rng.normal(0, 1, size) + 10 * (rng.random(size) < 1 / 24)


def rested(samples: np.ndarray) -> np.ndarray:
    """Of each of `samples` (k, n), whether it rests on one prompt."""
    return np.array([one_prompt(pd.Series(own)).rests_on is not None for own in samples])


def test_where_one_prompt_decides_fewer_intervals_hold_the_truth_and_it_is_named() -> None:
    rng = np.random.default_rng(33)
    values = one_far_away(rng, (1500, 24))
    low, high = bootstrap_intervals(values, resamples=1000).T
    holds = (low <= 10 / 24) & (high >= 10 / 24)
    far = (values > 5).sum(axis=1)
    assert 0.78 <= holds.mean() <= 0.86
    # Nothing in a sample tells that others have such a prompt: there it is missed.
    assert holds[far == 0].mean() < 0.6 and holds[far > 0].mean() > 0.98
    found = rested(values)
    assert found[far == 1].mean() > 0.95 and found[far == 0].mean() < 0.01
    named = one_prompt(pd.Series(values[far == 1][0]))
    assert named.rests_on == str(values[far == 1][0].argmax())


@pytest.mark.parametrize(
    ("shape", "most"), [("normal", 0.01), ("uniform", 0.01), ("exponential", 0.1)]
)
def test_few_samples_of_usual_shapes_rest_on_one_prompt(shape: str, most: float) -> None:
    rng = np.random.default_rng(34)
    assert rested(FORMS[shape][0](rng, (1000, 24))).mean() <= most


def test_what_rests_on_one_prompt_by_hand() -> None:
    # Mean 1, deviations -1 eleven times and 11: of 11 + 121 the last has 11/12.
    far = pd.Series([0.0] * 11 + [12.0], index=[f"p{n}" for n in range(12)])
    found = one_prompt(far)
    assert (found.share, found.rests_on, found.mean) == (pytest.approx(11 / 12), "p11", 0.0)
    assert math.isnan(found.low) and math.isnan(found.high), "the others are all alike"
    found = one_prompt(far + [0.1, -0.1] * 6)
    others = np.array([0.1, -0.1] * 5 + [0.1])
    assert (found.low, found.high) == bootstrap_interval(others)
    assert found.mean == pytest.approx(0.1 / 11)
    # Of eleven prompts none is named, and none whose share is no more than three fifths.
    few = one_prompt(far[1:])
    assert few.share == pytest.approx(10 / 11) and few.rests_on is None and math.isnan(few.mean)
    two = one_prompt(pd.Series([0.0] * 10 + [12.0, 12.0]))
    assert two.share == pytest.approx(5 / 12) and two.rests_on is None
    alike = one_prompt(pd.Series([0.1 + 0.2] + [0.3] * 11))
    assert math.isnan(alike.share) and alike.rests_on is None
    assert math.isnan(one_prompt(pd.Series([0.3])).share)


def diversities(
    rng: np.random.Generator, suites: int, prompts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of a base and a tuned model, (suites, prompts), as the demo has them: most prompts leave
    little open and have 0.004 to 0.05, one of 24 has 0.7 by the base model and a seventh of that by
    the tuned one."""
    size = (suites, prompts)
    is_open = rng.random(size) < 1 / 24
    base = np.where(is_open, rng.normal(math.log(0.7), 0.1, size),
                    rng.normal(math.log(0.016), 0.75, size))  # fmt: skip
    tuned = np.where(is_open, rng.normal(math.log(0.1), 0.6, size),
                     rng.normal(math.log(0.014), 0.9, size))  # fmt: skip
    return np.exp(base), np.exp(tuned)


@pytest.mark.parametrize("prompts", [24, 40])
def test_logarithms_of_a_metric_that_one_prompt_decides_cover_the_truth(prompts: int) -> None:
    rng = np.random.default_rng(prompts)

    def told(base: np.ndarray, tuned: np.ndarray) -> dict[str, np.ndarray]:
        logs = logarithms(base), logarithms(tuned)
        return {
            "ratio": logs[1] - logs[0],
            "geometric mean": logs[0],
            "difference": tuned - base,
            "mean": base,
        }

    truth = {name: values.mean() for name, values in told(*diversities(rng, 1, 1_000_000)).items()}
    covered = {}
    for name, values in told(*diversities(rng, 2000, prompts)).items():
        low, high = bootstrap_intervals(values, resamples=1000).T
        covered[name] = np.mean((low <= truth[name]) & (truth[name] <= high))
    assert 0.93 <= covered["ratio"] <= 0.97 and 0.93 <= covered["geometric mean"] <= 0.97, covered
    assert covered["difference"] < 0.85 and covered["mean"] < 0.85, covered


def test_a_ratio_by_hand() -> None:
    # a: (0.1 + 0.3) / 2 by 0.1, so 2; b: 0.4 by 0.8, so 1/2; the seed without a partner is out.
    rows: list[Row] = [
        ("sd", "a", 1, 0.1), ("sd", "a", 2, 0.1), ("sd", "b", 1, 0.8), ("sd", "b", 2, 0.1),
        ("dreambooth", "a", 1, 0.1), ("dreambooth", "a", 2, 0.3),
        ("dreambooth", "b", 1, 0.4), ("dreambooth", "b", 2, None),
    ]  # fmt: skip
    found = effect(table(rows), "tuned", {"sd": -1, "dreambooth": 1}, scale="ratio")
    assert found.estimate == pytest.approx(0) and (found.prompts, found.pairs) == (2, 3)
    assert found.win_rate == 0.5 and found.low == pytest.approx(1 / (1 + found.high) - 1)
    twice = table([(name, p, s, None if v is None else v * (1 + (name != "sd")))
                   for name, p, s, v in rows])  # fmt: skip
    assert paired_difference(twice, "dreambooth", "sd", scale="ratio").mean == pytest.approx(1)
    # Nothing of nothing is all of it, and a tenth of what is hardly anything is not.
    none = table([(name, p, s, 0.0 if name == "sd" else 1e-9) for name, p, s, _ in rows])
    assert paired_difference(none, "dreambooth", "sd", scale="ratio").mean == 0
    lost = table([(name, p, s, 0.1 if name == "sd" else 0.0) for name, p, s, _ in rows])
    assert paired_difference(lost, "dreambooth", "sd", scale="ratio").mean == pytest.approx(-0.999)


@pytest.mark.parametrize("prompts", [2, 3, 5, 8])
@pytest.mark.parametrize("shape", ["normal", "skewed", "few values"])
def test_intervals_of_a_handful_of_prompts_cover_the_truth(shape: str, prompts: int) -> None:
    rng = np.random.default_rng(prompts)
    values = np.stack([SHAPES[shape](rng, prompts) for _ in range(6000)])
    values = values[np.ptp(values, axis=1) > 0]  # else there is no interval to speak of
    assert share_covered(0.04, values, resamples=200) >= 0.93


def test_an_interval_leaves_the_range_of_few_values_and_stays_the_bootstraps_for_many() -> None:
    few, many = (np.random.default_rng(9).normal(0.3, 0.05, n) for n in (11, 12))
    for values, wider in ((few, True), (many, False)):
        low, high = bootstrap_interval(values)
        half = student_quantile(0.975, len(values) - 1) * values.std(ddof=1)
        half /= math.sqrt(len(values))
        reaches = low <= values.mean() - half and high >= values.mean() + half
        assert reaches == wider
    low, high = bootstrap_interval(np.array([0.1, 0.2]))
    assert low < 0.1 and high > 0.2


@pytest.mark.slow
def test_intervals_of_whole_studies_cover_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fewer resamples are as right on the average of a thousand studies, and take a tenth the time.
    monkeypatch.setattr(
        statistics, "bootstrap_interval", partial(bootstrap_interval, resamples=999)
    )
    rng = np.random.default_rng(2)
    # Each half of the interaction falls to one main effect; all of it to both together.
    truth = {"tuned": 0.035, "negative": 0.02, "interaction": 0.01, "both": 0.055}
    covered = dict.fromkeys(truth, 0)
    for _ in range(1000):
        found = effects(study(rng, tuned=0.03, negative=0.015, both=0.01), contrasts={
            name: CONTRASTS[name] for name in truth
        })  # fmt: skip
        for name, low, high in zip(found.contrast, found.low, found.high, strict=True):
            covered[name] += int(low <= truth[name] <= high)
    assert all(930 <= times <= 970 for times in covered.values()), covered


def test_a_planted_effect_is_found_and_told_from_the_others() -> None:
    found = effects(study(np.random.default_rng(3), tuned=0.03, negative=0.0)).set_index("contrast")
    assert list(found.index) == [name for name in CONTRASTS if not name.startswith("late")]
    tuned, negative = found.loc["tuned"], found.loc["negative"]
    assert tuned.low <= 0.03 <= tuned.high and tuned.low > 0
    assert tuned.win_rate > 0.9 and tuned.win_low > 0.5 and tuned.effect_size > 1
    assert negative.low <= 0 <= negative.high
    assert found.loc["interaction"].low <= 0 <= found.loc["interaction"].high
    assert (tuned.prompts, tuned.pairs) == (24, 96)


def test_an_interaction_is_what_the_negative_prompt_does_more_for_the_tuned_model() -> None:
    rng = np.random.default_rng(4)
    found = effects(study(rng, negative=0.01, both=0.03)).set_index("contrast")
    interaction = found.loc["interaction"]
    by_hand = found.loc["negative on tuned"].estimate - found.loc["negative on base"].estimate
    assert interaction.estimate == pytest.approx(by_hand)
    assert 0 < interaction.low <= 0.03 <= interaction.high


def test_prompts_without_a_negative_prompt_are_left_out_of_what_compares_it() -> None:
    mixed = study(np.random.default_rng(17), tuned=0.03, negative=0.02)
    half = mixed["prompt_id"].str[1:].astype(int) < 12
    negative = mixed["variant"].str.endswith("_negative")
    # Without a negative prompt its variant is the same image once more.
    same = mixed[half & ~negative].assign(variant=lambda rows: rows["variant"] + "_negative")
    mixed = pd.concat([mixed[~(half & negative)], same], ignore_index=True)
    asked = mixed["variant"].str.endswith("_negative")
    none = mixed["prompt_id"].str[1:].astype(int) < 12
    mixed["negative_prompt"] = np.where(asked & ~none, "busy", "")
    found: Any = effects(mixed).set_index("contrast")
    pooled: Any = effects(mixed.drop(columns="negative_prompt")).set_index("contrast")
    assert found.loc["tuned without negative", "prompts"] == 24
    for name in set(found.index) - {"tuned without negative"}:
        assert (found.loc[name, "prompts"], found.loc[name, "pairs"]) == (12, 48)
    only: Any = effects(mixed[~none].drop(columns="negative_prompt")).set_index("contrast")
    for name in ("negative", "negative on base", "interaction", "both"):
        assert found.loc[name, "estimate"] == pytest.approx(only.loc[name, "estimate"])
    # Pooled, half of the prompts say that it does nothing.
    assert pooled.loc["negative on base", "estimate"] == pytest.approx(
        found.loc["negative on base", "estimate"] / 2
    )
    # A suite without any negative prompt has no such comparison.
    assert effects(mixed[none]).contrast.tolist() == ["tuned without negative"]


def test_paired_differences_leave_out_what_the_effects_leave_out() -> None:
    mixed = study(np.random.default_rng(19), tuned=0.03, negative=0.02)
    asked = mixed["variant"].str.endswith("_negative") & (mixed["prompt_id"] < "p2")
    mixed["negative_prompt"] = np.where(asked, "busy", "")
    found: Any = effects(mixed).set_index("contrast")
    for variant, contrast in {
        "sd_negative": "negative on base",
        "dreambooth": "tuned without negative",
        "dreambooth_negative": "both",
    }.items():
        difference, row = paired_difference(mixed, variant, "sd"), found.loc[contrast]
        assert (difference.mean, difference.low) == (row["estimate"], row["low"])
        assert (difference.prompts, difference.images) == (row["prompts"], row["pairs"])
    assert found.loc["both", "prompts"] < found.loc["tuned without negative", "prompts"] == 24


def test_a_prompt_is_won_where_the_metric_calls_the_difference_better() -> None:
    cells = pd.DataFrame({"prompt_id": list("abcd"), "difference": [0.1, 0.2, 0.0, -0.1]})
    higher, lower = effect_of("x", cells), effect_of("x", cells, better="lower")
    assert (higher.win_rate, lower.win_rate) == (0.625, 0.375)
    assert lower.win_low == pytest.approx(1 - higher.win_high)
    for word in ("neither", "nearer 0"):
        neither = effect_of("x", cells, better=word)
        assert math.isnan(neither.win_rate) and math.isnan(neither.win_low)
        assert neither.estimate == higher.estimate


def test_seeds_that_prompts_share_make_intervals_too_narrow() -> None:
    # What docs/prompts.md warns of: the same four noises under all prompts.
    rng = np.random.default_rng(18)
    covered = {}
    for kind, prompts in {"own": 24, "shared": 1}.items():
        noise = rng.normal(0, 0.02, (500, prompts, 4)) + rng.normal(0, 0.02, (500, 24, 4))
        covered[kind] = share_covered(0.02, 0.02 + noise.mean(axis=2), resamples=500)
    assert covered["own"] >= 0.92 and covered["shared"] < 0.75


def test_a_late_negative_prompt_is_compared_with_the_full_one_where_it_was_drawn() -> None:
    rows: list[Row] = [
        ("sd_negative", "a", 1, 0.30), ("sd_negative", "b", 1, 0.25), ("sd_negative", "c", 1, 0.90),
        ("sd_negative_delayed", "a", 1, 0.20), ("sd_negative_delayed", "b", 1, 0.20),
    ]  # fmt: skip
    (found,) = effects(table(rows)).itertuples()
    assert (found.contrast, found.prompts) == ("late negative on base", 2)
    assert found.estimate == pytest.approx(-0.075)


def test_what_a_suite_says_it_detects_is_found_by_the_next_one_four_times_in_five() -> None:
    """As a reader uses it: the spread is estimated on one set of prompts, the effect looked for on
    another. What the report tells is that number: defs/test_reports.py."""
    rng = np.random.default_rng(16)
    needed = [smallest_detectable(values) for values in rng.normal(0.01, 0.02, (1000, 24))]
    values = np.array(needed)[:, np.newaxis] + rng.normal(0, 0.02, (1000, 24))
    low, _ = bootstrap_intervals(values, resamples=500).T
    assert 0.75 <= np.mean(low > 0) <= 0.84


@pytest.mark.parametrize("prompts", [2, 8, 24])
def test_what_is_detectable_is_known_from_the_interval_alone(prompts: int) -> None:
    values = np.random.default_rng(prompts).normal(0.3, 0.02, prompts)
    half = student_quantile(0.975, prompts - 1) * values.std(ddof=1) / math.sqrt(prompts)
    expected = smallest_detectable(values)
    assert detectable(0.3 - half, 0.3 + half, prompts) == pytest.approx(expected)
    assert half_of_detectable(prompts) == pytest.approx(half / expected)
    assert math.isnan(detectable(math.nan, math.nan, prompts))
    assert math.isnan(detectable(0.1, 0.2, 1))


@pytest.mark.parametrize("tests", [8, 15, 112])
def test_what_is_detectable_counts_the_correction_and_is_found_four_times_in_five(
    tests: int,
) -> None:
    """One effect among metrics and comparisons without any has to pass Holm's correction. Both
    numbers are what the report tells: defs/test_reports.py."""
    rng = np.random.default_rng(tests)
    n, spread, studies = 24, 0.02, 1000
    exact = np.tile([-spread, spread], n // 2) * math.sqrt((n - 1) / n)
    needed = smallest_detectable(exact, tests=tests)
    assert needed > smallest_detectable(exact)
    values = rng.normal(0, spread, (studies, tests, n))
    values[:, 0] += needed
    found = [holm(student_p(study))[0] < 0.05 for study in values]
    assert 0.76 <= np.mean(found) <= 0.85


def student_p(values: np.ndarray) -> np.ndarray:
    """Two-sided p-values (k,) of no mean in each row of (k, n), by Student's t."""
    n = values.shape[-1]
    t = np.abs(values.mean(axis=-1)) / values.std(axis=-1, ddof=1) * math.sqrt(n)
    return np.interp(t, *_tails(n - 1))


@lru_cache
def _tails(degrees: int) -> tuple[np.ndarray, np.ndarray]:
    grid = np.linspace(0, 40, 4001)
    tails = [2 * (1 - statistics._student_cdf(float(at), degrees)) for at in grid]
    return grid, np.array(tails)


def test_where_nothing_differs_a_family_of_questions_is_seldom_fooled() -> None:
    """The whole 2 x 2 design without any effect, by metrics that agree as CLIP's do (0.7). The
    report corrects in this way: defs/test_reports.py."""
    rng = np.random.default_rng(21)
    names = list(VARIANTS)
    weights = np.array(
        [[own.get(name, 0.0) for name in names] for own in list(CONTRASTS.values())[:8]]
    )
    studies, metrics, prompts = 400, 14, 24
    fooled: Counter[str] = Counter()
    for _ in range(studies):
        shared = rng.normal(0, 1, (1, 4, prompts))
        own = rng.normal(0, 1, (metrics, 4, prompts))
        values = math.sqrt(0.7) * shared + math.sqrt(0.3) * own
        p = student_p(np.einsum("cv,mvp->mcp", weights, values).reshape(-1, prompts))
        p = p.reshape(metrics, 8)
        fooled["within a comparison"] += any((holm(column) < 0.05).any() for column in p.T)
        fooled["all"] += int((holm(p.ravel()) < 0.05).any())
    assert fooled["all"] / studies <= 0.05, fooled
    assert fooled["within a comparison"] / studies > 0.05, "what is counted makes the difference"


def test_the_smallest_detectable_difference_is_found_four_times_in_five() -> None:
    """Which the report tells: defs/test_reports.py."""
    rng = np.random.default_rng(6)
    n, spread = 24, 0.02
    needed = smallest_detectable(np.tile([-spread, spread], n // 2) * math.sqrt((n - 1) / n))
    assert needed == pytest.approx((2.069 + 0.858) * spread / math.sqrt(n), rel=1e-3)
    low, _ = bootstrap_intervals(needed + rng.normal(0, spread, (1000, n)), resamples=500).T
    assert 0.76 <= np.mean(low > 0) <= 0.85


def test_the_guide_tells_how_often_chance_is_taken_for_an_effect() -> None:
    """docs/scores.md, of the headline's eight comparisons: 23 of 100 uncorrected, 3 corrected, or 7
    with the question that was named beforehand."""
    rng = np.random.default_rng(22)
    studies, prompts, named = 4000, 24, list(CONTRASTS).index("tuned without negative")
    weights = np.array(
        [[own.get(name, 0.0) for name in VARIANTS] for own in list(CONTRASTS.values())[:8]]
    )
    values = np.einsum("cv,svp->scp", weights, rng.normal(0, 1, (studies, 4, prompts)))
    p = student_p(values)
    others = np.array([(holm(own) < 0.05).any() for own in np.delete(p, named, axis=1)])
    told = [(p < 0.05).any(axis=1), others, others | (p[:, named] < 0.05)]
    assert [np.mean(own) for own in told] == pytest.approx([0.23, 0.034, 0.074], abs=0.015)


@pytest.mark.parametrize("prompts", [3, 5])
def test_the_guide_tells_that_few_prompts_find_what_is_detectable_less_often(prompts: int) -> None:
    """docs/scores.md: seven times of ten. One of eight comparisons, the true spread known."""
    rng = np.random.default_rng(23)
    exact = np.linspace(-1, 1, prompts)
    needed = smallest_detectable(exact / exact.std(ddof=1), tests=8)
    p = student_p(rng.normal(needed, 1, (20_000, prompts)))
    assert 0.66 <= np.mean(p < 0.05 / 8) <= 0.76


def test_the_guide_tells_how_often_intervals_hold_the_truth() -> None:
    """The table of docs/scores.md: of 100, by shape and number of prompts, and how many of 100
    samples of 24 rest on one prompt."""
    page = (default_root() / "docs" / "scores.md").read_text("utf-8")
    table = page[page.index("| how prompts differ |") :].partition("\n\n")[0]
    head, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    sizes = [int(n) for n in head[1:-1]]
    assert [name.partition(":")[0] for name, *_ in rows] == list(FORMS)
    rng = np.random.default_rng(24)
    for (name, *told, named), (draw, truth) in zip(rows, FORMS.values(), strict=True):
        for n, number in zip(sizes, told, strict=True):
            covered = share_covered(truth, draw(rng, (4000, n)))
            assert covered == pytest.approx(int(number) / 100, abs=0.025), (name, n)
        assert rested(draw(rng, (1000, 24))).mean() == pytest.approx(int(named) / 100, abs=0.04)


def test_an_effect_by_hand() -> None:
    # Cells a1 +0.20, a2 0, b1 +0.05; b2 has no pair. Prompts: a +0.10, b +0.05.
    found = effect(SMALL, "tuned", {"sd": -1, "dreambooth": 1})
    assert (found.estimate, found.prompts, found.pairs) == (pytest.approx(0.075), 2, 3)
    assert found.win_rate == 1.0
    assert effects(SMALL).contrast.tolist() == ["tuned without negative"]


def test_effect_sizes_and_shares_by_hand() -> None:
    # Mean 2, deviation 1, correction 1 - 3/7.
    assert hedges_g(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 * (1 - 3 / 7))
    assert hedges_g(np.zeros(4)) == 0
    # Values that are the same but for their last digits have no deviation to speak of.
    assert math.isnan(hedges_g(np.ones(4))) and math.isnan(
        hedges_g(np.array([0.1 + 0.2, 0.3, 0.3]))
    )
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert all(math.isnan(bound) for bound in wilson_interval(0, 0))


def test_what_differs_by_rounding_alone_is_won_by_neither_side() -> None:
    # The fine-tuning changes nothing, and the negative prompt much: -a/2 - b/2 + a/2 + b/2.
    rng = np.random.default_rng(0)
    images: list[tuple[str, str, int, float | None]] = []
    for prompt in range(24):
        without, with_negative = rng.normal(0.25, 0.03), rng.normal(0.35, 0.03)
        for variant in VARIANTS:
            value = with_negative if variant.endswith("negative") else without
            images.append((variant, f"p{prompt}", 1, value))
    found = effects(table(images)).set_index("contrast")
    for contrast in ("tuned", "interaction", "tuned without negative"):
        assert found["win_rate"][contrast] == 0.5 and found["effect_size"][contrast] == 0
        assert abs(found["estimate"][contrast]) < 1e-15
    assert found["win_rate"]["negative"] > 0.9


def test_too_little_gives_no_interval() -> None:
    assert all(math.isnan(bound) for bound in bootstrap_interval(np.array([0.3])))
    nothing = mean_interval(table([("sd", "a", 1, None)]))
    assert math.isnan(nothing.mean) and nothing.prompts == nothing.images == 0


def test_values_that_are_all_the_same_have_no_interval() -> None:
    for values in ([0.25, 0.25, 0.25], [0.1 + 0.2, 0.3, 0.3], [0.0] * 24):
        assert all(math.isnan(bound) for bound in bootstrap_interval(np.array(values)))
    # Beside others that differ, which keep theirs.
    samples = np.array([[0.25, 0.25, 0.25], [0.1, 0.2, 0.3]])
    alike, spread = bootstrap_intervals(samples)
    assert np.isnan(alike).all() and spread.tolist() == list(bootstrap_interval(samples[1]))
    alone = mean_interval(table([("sd", "a", 1, 0.2), ("sd", "b", 1, 0.2)]))
    assert alone.mean == 0.2 and math.isnan(alone.low) and math.isnan(alone.high)


def test_an_image_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="sd has more than one score for the prompt a and seed 1"):
        paired_difference(pd.concat([SMALL, SMALL[:1]]), "dreambooth", "sd")
