"""What scores add up to: means, paired differences, and how sure one can be of them.

What belongs here: estimates with intervals, and the leaderboard. What does not: computing scores
(`metrics`), keeping them (`warehouse`) and drawing them.

All variants answer the same prompts with the same seeds, so differences are taken image by image.
Seeds of one prompt are not independent answers, therefore they are averaged, and the prompts are
what the bootstrap draws: an interval says how the number would vary with other prompts of this
kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import pandas as pd

CONFIDENCE = 0.95
RESAMPLES = 10_000
BOOTSTRAP_SEED = 20250

_CELL = ["prompt_id", "seed"]
_CHUNK = 1_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its bootstrap interval."""

    mean: float
    """NaN without any prompt."""
    low: float
    high: float
    """Bounds of the interval; NaN with fewer than two prompts, which say nothing about others."""
    prompts: int
    images: int
    """Images, or pairs of images, behind the mean."""


def mean_interval(frame: pd.DataFrame, value: str = "clip_cosine") -> Estimate:
    """Mean of `value`: seeds averaged within each prompt_id, then prompts. Missing ones are left
    out."""
    present = frame.dropna(subset=[value])
    by_prompt = present.groupby("prompt_id", sort=True)[value].mean().to_numpy(dtype=float)
    low, high = bootstrap_interval(by_prompt)
    mean = float(by_prompt.mean()) if len(by_prompt) else math.nan
    return Estimate(mean, low, high, prompts=len(by_prompt), images=len(present))


def paired_difference(
    frame: pd.DataFrame, variant: str, baseline: str, value: str = "clip_cosine"
) -> Estimate:
    """`variant` minus `baseline`, paired by (prompt_id, seed), seeds averaged, prompts drawn.

    `frame` has the columns variant, prompt_id, seed and `value`. A pair of which one is missing
    (a blocked image) is left out. Raises ValueError where a (variant, prompt, seed) is there
    twice.
    """
    pairs = _values(frame, variant, value) - _values(frame, baseline, value)
    return mean_interval(pairs.rename("difference").reset_index(), "difference")


def leaderboard(
    frame: pd.DataFrame,
    *,
    baseline: str = "sd",
    value: str = "clip_cosine",
    order: Sequence[str] = ("sd", "sd_negative", "dreambooth", "dreambooth_negative"),
) -> pd.DataFrame:
    """One row a variant: how it did, and its difference to `baseline`.

    `frame` holds one row an image (the current rows of the view clip_scores, of one metric).
    Columns: variant, prompts, images, missing (images without a value), mean, low, high, pairs,
    difference, difference_low, difference_high; the difference of the baseline itself is NaN.
    Variants come in `order`, others after them. Raises ValueError where an image is there twice.
    """
    names = [str(name) for name in frame["variant"].unique()]
    ranked = sorted(names, key=lambda name: (order.index(name) if name in order else 99, name))
    rows = []
    for name in ranked:
        own = frame[frame["variant"] == name]
        _values(frame, name, value)  # refuses an image that is there twice
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


def _values(frame: pd.DataFrame, variant: str, value: str) -> pd.Series:
    """The values of a variant by (prompt_id, seed)."""
    own = frame[frame["variant"] == variant].set_index(_CELL)[value].astype(float)
    if own.index.has_duplicates:
        prompt, seed = own.index[own.index.duplicated()][0]
        raise ValueError(
            f"the variant {variant} has more than one score for the prompt {prompt} and seed "
            f"{seed}; keep one metric and the rows with is_current"
        )
    return own


def bootstrap_interval(
    values: np.ndarray,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = BOOTSTRAP_SEED,
) -> tuple[float, float]:
    """Interval of the mean of `values` (n,): expanded percentile bootstrap, deterministic.

    The plain percentile interval is too narrow for few values: it uses the spread with n in the
    denominator, and normal instead of Student quantiles. Hesterberg (2015, The American
    Statistician 69:371) moves the percentiles outwards by just that. NaN with fewer than two
    values.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    widened = math.sqrt(n / (n - 1)) * student_quantile(tail, n - 1)
    level = NormalDist().cdf(widened)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, max(1, _CHUNK // n)):
        count = min(max(1, _CHUNK // n), resamples - start)
        means.append(values[rng.integers(0, n, (count, n))].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [level, 1 - level])
    return float(low), float(high)


@lru_cache(maxsize=1024)
def student_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t, found by halving: its distribution has a closed form for whole
    degrees of freedom. `probability` within 1e-4..1 - 1e-4."""
    if probability > 0.5:
        return -student_quantile(1 - probability, degrees)
    low, high = -1e5, 0.0
    for _ in range(200):
        middle = (low + high) / 2
        if _student_cdf(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _student_cdf(t: float, degrees: int) -> float:
    """Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + inside / 2
