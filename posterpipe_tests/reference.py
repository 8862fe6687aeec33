"""The reports `leaderboard` and `paired_effects` in Python, against which those of dbt are held."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from posterpipe.core.statistics import (
    CONFIDENCE,
    Estimate,
    Scale,
    has_spread,
    mean_interval,
    paired_difference,
    student_quantile,
)
from posterpipe.core.variants import VARIANTS


def leaderboard(
    frame: pd.DataFrame,
    *,
    baseline: str = "sd",
    value: str = "clip_cosine",
    order: Sequence[str] = VARIANTS,
    scale: Scale = "difference",
) -> pd.DataFrame:
    """One row a variant: how it did, and its difference to `baseline`.

    `frame` holds one row an image (the current rows of the view clip_scores, of one metric), with
    its negative_prompt where some prompts have none. Columns: variant, prompts, images, missing
    (images without a value), mean, low, high, pairs, difference, difference_low, difference_high;
    the difference of the baseline itself is NaN. Variants come in `order`, others after them.
    """
    names = [str(name) for name in frame["variant"].unique()]
    ranked = sorted(names, key=lambda name: (order.index(name) if name in order else 99, name))
    rows = []
    for name in ranked:
        own = frame[frame["variant"] == name]
        mean = mean_interval(own, value, scale=scale)
        difference = Estimate(math.nan, math.nan, math.nan, 0, 0)
        if name != baseline and baseline in names:
            difference = paired_difference(frame, name, baseline, value, scale=scale)
        rows.append(
            {
                "variant": name,
                "prompts": mean.prompts,
                "images": len(own),
                "missing": len(own) - mean.images,
                "mean": mean.mean,
                "low": mean.low,
                "high": mean.high,
                "pairs": difference.images,
                "difference": difference.mean,
                "difference_low": difference.low,
                "difference_high": difference.high,
            }
        )
    columns = ["variant", "prompts", "images", "missing", "mean", "low", "high", "pairs",
               "difference", "difference_low", "difference_high"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values (k,) of one family corrected for their number (Holm 1979, Scandinavian Journal of
    Statistics 6:65): the smallest counts k times, the next k - 1 times, and so on, none below one
    before it. Calling those below 0.05 calls none wrongly in 95 of 100 families, however they hang
    together. NaN are no tests.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")  # NaN come last
    known = int(np.isfinite(p).sum())
    counted = p[order[:known]] * np.arange(known, 0, -1)
    adjusted = np.full(len(p), math.nan)
    adjusted[order[:known]] = np.minimum(1, np.maximum.accumulate(counted))
    return adjusted


def smallest_detectable(
    differences: np.ndarray,
    *,
    power: float = 0.8,
    confidence: float = CONFIDENCE,
    tests: int = 1,
) -> float:
    """The true difference that a study of this many prompts finds with probability `power`.

    `differences` (n,) of prompts, seeds averaged: their deviation holds what both prompts and seeds
    contribute, where prompts have seeds of their own. (t(1 - alpha/(2 tests)) + t(power)) *
    deviation / sqrt(n) (Bloom 1995): `tests` is how often the p-value of the finding counts, 1 for
    one that is not corrected. Of `holm`, all tests of the family: what the smallest p-value has to
    pass, so that the power is no less than told whatever the others show. NaN with fewer than two,
    and where all are the same: the deviation of other prompts is then unknown, not 0.
    """
    n = len(differences)
    if n < 2 or not has_spread(differences):
        return math.nan
    level = 1 - (1 - confidence) / 2 / tests
    quantiles = student_quantile(level, n - 1) + student_quantile(power, n - 1)
    return quantiles * float(np.std(differences, ddof=1)) / math.sqrt(n)
