"""The report `leaderboard` in pandas, against which that of dbt is held."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from posterpipe.core.statistics import Estimate, mean_interval, paired_difference
from posterpipe.core.variants import VARIANTS


def leaderboard(
    frame: pd.DataFrame,
    *,
    baseline: str = "sd",
    value: str = "clip_cosine",
    order: Sequence[str] = VARIANTS,
) -> pd.DataFrame:
    """One row a variant: how it did, and its difference to `baseline`.

    `frame` holds one row an image (the current rows of the view clip_scores, of one metric).
    Columns: variant, prompts, images, missing (images without a value), mean, low, high, pairs,
    difference, difference_low, difference_high; the difference of the baseline itself is NaN.
    Variants come in `order`, others after them.
    """
    names = [str(name) for name in frame["variant"].unique()]
    ranked = sorted(names, key=lambda name: (order.index(name) if name in order else 99, name))
    rows = []
    for name in ranked:
        own = frame[frame["variant"] == name]
        mean = mean_interval(own, value)
        difference = Estimate(math.nan, math.nan, math.nan, 0, 0)
        if name != baseline and baseline in names:
            difference = paired_difference(frame, name, baseline, value)
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
