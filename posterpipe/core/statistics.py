"""What scores add up to: means, paired differences, and how sure one can be of them.

What belongs here: estimates with intervals, and the thesis's 2x2 design. What does not: computing
scores (`metrics`), keeping them (`warehouse`), drawing them, what follows from them for a
checkpoint (`gate`), and p-values: whether a difference is more than chance depends on all
questions, which the report `paired_effects` knows.

All variants answer the same prompts with the same seeds, so differences are taken image by image.
Seeds of one prompt are not independent answers, therefore they are averaged, and the prompts are
what the bootstrap draws: an interval says how the number would vary with other prompts of this
kind. Some metrics differ between prompts by orders of magnitude, so that one prompt decides their
mean and a bootstrap of a few dozen misses the truth four times of ten: these are averaged as
logarithms, which makes means geometric and differences ratios (`Scale`).

Of differences that rest on one prompt, no interval says much (`one_prompt`).

That prompts are independent takes seeds of their own: noise that several prompts share is a
second random effect, which a bootstrap over prompts leaves out (Owen 2007, Annals of Applied
Statistics 1:386).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd

CONFIDENCE = 0.95
RESAMPLES = 10_000
BOOTSTRAP_SEED = 20250

CONTRASTS: Mapping[str, Mapping[str, float]] = {
    "tuned": {"sd": -0.5, "sd_negative": -0.5, "dreambooth": 0.5, "dreambooth_negative": 0.5},
    "negative": {"sd": -0.5, "sd_negative": 0.5, "dreambooth": -0.5, "dreambooth_negative": 0.5},
    "tuned without negative": {"sd": -1, "dreambooth": 1},
    "tuned with negative": {"sd_negative": -1, "dreambooth_negative": 1},
    "negative on base": {"sd": -1, "sd_negative": 1},
    "negative on tuned": {"dreambooth": -1, "dreambooth_negative": 1},
    "both": {"sd": -1, "dreambooth_negative": 1},
    "interaction": {"sd": 1, "sd_negative": -1, "dreambooth": -1, "dreambooth_negative": 1},
    "late negative on base": {"sd_negative": -1, "sd_negative_delayed": 1},
    "late negative on tuned": {"dreambooth_negative": -1, "dreambooth_negative_delayed": 1},
}
"""The contrasts of the thesis's 2x2 design, tuned or not and with the negative prompt or without:
weights of the variants' values. The two main effects, the simple effects, the sum of both, and by
how much the negative prompt does more for the tuned model; and, where the suite holds it, what
delaying the negative prompt changes."""

Scale = Literal["difference", "ratio"]
"""How values of a metric are compared. `difference`: one less the other, means are arithmetic.
`ratio`: by logarithms of each prompt's mean over seeds, so that means are geometric. A ratio is
reported less 1, since then 0 is no difference here as well: -0.2 is a fifth less."""

RATIO_FLOOR = 1e-4
"""Lower means count as this one: 0 has no logarithm, below it a metric is no other than 0. The
macros have it too."""

QUESTION = "question"
"""Column by which images are kept apart that cannot be compared, since what was requested of the
models differs."""

_CELL = ["prompt_id", "seed"]
_FEW_PROMPTS = 12
"""Below it an interval is the wider of Student's t and the bootstrap."""
ONE_PROMPT_SHARE = 0.6
"""A mean of which one prompt has more than this share of the spread rests on that prompt. Simulated
over 24 prompts: hardly any sample of normal or uniform values has such a prompt, and 7 of 100 of
exponential ones, whose intervals hold the truth 93 times of 100. Where one prompt of 24 is ten
deviations away, so that 82 of 100 hold it, nearly every sample that has just one such prompt rests
on it. The macros have this limit too."""
ONE_PROMPT_AMONG = 12
"""Of fewer prompts one has such a share often by chance: of 8 normal values 9 times of 100, of 12
twice. The macros have it too."""
NO_SPREAD = 1e-9
"""A deviation of values that are the same but for their last digits; the macros have it too."""
_CHUNK = 1_000_000
"""Random numbers held at once."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its interval (`bootstrap_interval`)."""

    mean: float
    """NaN without any prompt."""
    low: float
    high: float
    """Bounds of the interval; NaN with fewer than two prompts, or where all have the same value:
    such prompts are no sample of others."""
    prompts: int
    images: int
    """Images, or pairs of images, behind the mean."""


def mean_interval(
    frame: pd.DataFrame, value: str = "clip_cosine", *, scale: Scale = "difference"
) -> Estimate:
    """Mean of `value`: seeds averaged within each prompt_id, then prompts, geometrically by
    `ratio`. Missing ones are left out."""
    present = frame.dropna(subset=[value])
    by_prompt = present.groupby("prompt_id", sort=True)[value].mean().to_numpy(dtype=float)
    if scale == "ratio":
        by_prompt = logarithms(by_prompt)
    low, high = bootstrap_interval(by_prompt)
    mean = float(by_prompt.mean()) if len(by_prompt) else math.nan
    if scale == "ratio":
        mean, low, high = math.exp(mean), math.exp(low), math.exp(high)
    return Estimate(mean, low, high, prompts=len(by_prompt), images=len(present))


def paired_difference(
    frame: pd.DataFrame,
    variant: str,
    baseline: str,
    value: str = "clip_cosine",
    *,
    scale: Scale = "difference",
) -> Estimate:
    """`variant` minus `baseline`, paired by (prompt_id, seed), seeds averaged, prompts drawn.

    `frame` has the columns of `effects`. A pair of which one is missing (a blocked image) is left
    out; so are negative variants without a negative prompt (`answers`). Raises ValueError where a
    (variant, prompt, seed) is there twice.
    """
    weights = {variant: 1.0, baseline: -1.0}
    found = effect(answers(frame), variant, weights, value=value, scale=scale)
    return Estimate(found.estimate, found.low, found.high, found.prompts, images=found.pairs)


@dataclass(frozen=True)
class Effect:
    """One contrast of variants: in the unit of the metric, or a ratio less 1 (`Scale`)."""

    contrast: str
    estimate: float
    """Mean over prompts of the mean over seeds."""
    low: float
    high: float
    """Interval over prompts (`bootstrap_interval`); NaN with fewer than two, or where all differ by
    the same."""
    effect_size: float
    """Cohen's d of the prompts' differences, of logarithms where ratios are reported, with Hedges'
    correction for few (`hedges_g`)."""
    win_rate: float
    """Share of prompts on the better side, ties half, those by rounding too; 0.5 is no preference.
    NaN where neither side is the better one."""
    win_low: float
    win_high: float
    """Wilson interval of the win rate."""
    prompts: int
    pairs: int
    """Cells (prompt, seed) in which every variant of the contrast has a value."""


def effects(
    frame: pd.DataFrame,
    *,
    value: str = "clip_cosine",
    contrasts: Mapping[str, Mapping[str, float]] = CONTRASTS,
    better: str = "higher",
    scale: Scale = "difference",
) -> pd.DataFrame:
    """One row a contrast whose variants `frame` has, with the fields of `Effect` as columns.

    `frame` has the columns variant, prompt_id, seed and `value`, of one metric, of which `better`
    says which values are better: higher, lower, or another word where neither side is. Cells are
    compared within prompt and seed, and within `question` where there is that column; one that
    lacks a variant of the contrast is left out, and so are negative variants without a negative
    prompt (`answers`). Raises ValueError where an image is there twice.
    """
    frame = answers(frame)
    present = set(frame["variant"].unique())
    rows = [
        asdict(effect(frame, name, weights, value=value, better=better, scale=scale))
        for name, weights in contrasts.items()
        if set(weights) <= present
    ]
    return pd.DataFrame(rows, columns=list(Effect.__dataclass_fields__))


def answers(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that differences are between: with a column negative_prompt, all but those of
    `without_negative`."""
    return frame[~without_negative(frame)] if "negative_prompt" in frame else frame


def without_negative(frame: pd.DataFrame) -> pd.Series:
    """Whether a row (variant, negative_prompt) is of a negative variant without a negative prompt:
    the same image as that of the variant without one."""
    return frame["variant"].str.contains("_negative") & (frame["negative_prompt"] == "")


def effect(
    frame: pd.DataFrame,
    contrast: str,
    weights: Mapping[str, float],
    *,
    value: str = "clip_cosine",
    better: str = "higher",
    scale: Scale = "difference",
) -> Effect:
    """One contrast: `weights` by variant, adding up to 0. See `effects`."""
    cells = pd.DataFrame({variant: _values(frame, variant, value) for variant in weights})
    return effect_between(contrast, cells, weights, better=better, scale=scale)


def effect_between(
    contrast: str,
    cells: pd.DataFrame,
    weights: Mapping[str, float],
    *,
    better: str = "higher",
    scale: Scale = "difference",
) -> Effect:
    """One contrast of the columns of `cells`, which is indexed by prompt_id and seed, and whatever
    else tells two answers to a prompt apart. Cells that lack a value are left out."""
    complete = cells.dropna()
    compared = complete
    if scale == "ratio":
        answer = [name for name in cells.index.names if name != "seed"]
        compared = logarithms(complete.groupby(level=answer, sort=True).mean())
    differences = (compared * pd.Series(weights)).sum(axis=1).rename("difference")
    found = effect_of(contrast, differences.reset_index(), better=better)
    if scale == "difference":
        return found
    return replace(
        found,
        estimate=math.expm1(found.estimate),
        low=math.expm1(found.low),
        high=math.expm1(found.high),
        pairs=len(complete),
    )


_Means = TypeVar("_Means", np.ndarray, pd.DataFrame)


def logarithms(means: _Means) -> _Means:
    """Of means over seeds, none of them below `RATIO_FLOOR`; NaN stay."""
    with_floor: Any = np.maximum(means, RATIO_FLOOR)
    return np.log(with_floor)


def effect_of(contrast: str, cells: pd.DataFrame, *, better: str = "higher") -> Effect:
    """The effect behind differences that are taken already: prompt_id and difference, one a cell.

    Seeds are averaged within prompts first, whatever their number. `better`: see `effects`.
    """
    by_prompt = cells.groupby("prompt_id", sort=True)["difference"].mean().to_numpy(dtype=float)
    low, high = bootstrap_interval(by_prompt)
    side = {"higher": 1.0, "lower": -1.0}.get(better, math.nan)
    signs = np.where(np.abs(by_prompt) > NO_SPREAD, np.sign(by_prompt), 0.0)
    wins = float((side * signs).sum() + len(by_prompt)) / 2
    win_low, win_high = wilson_interval(wins, len(by_prompt))
    return Effect(
        contrast=contrast,
        estimate=float(by_prompt.mean()) if len(by_prompt) else math.nan,
        low=low,
        high=high,
        effect_size=hedges_g(by_prompt),
        win_rate=wins / len(by_prompt) if len(by_prompt) else math.nan,
        win_low=win_low,
        win_high=win_high,
        prompts=len(by_prompt),
        pairs=len(cells),
    )


@dataclass(frozen=True)
class OnePrompt:
    """How much of the spread of differences is one prompt's, and what they are without it."""

    share: float
    """That of the most deviating prompt in the sum of squared deviations from the mean, 0 to 1; NaN
    where all differ by the same."""
    rests_on: str | None
    """The prompt, where its share is above ONE_PROMPT_SHARE, of at least ONE_PROMPT_AMONG."""
    mean: float
    low: float
    high: float
    """Without it; NaN where they rest on none, and the ends where all others differ by the same."""


def one_prompt(differences: pd.Series) -> OnePrompt:
    """Whether the mean of `differences`, one a prompt_id of its index, rests on one of them.

    Such an interval says little: in another suite there may be no such prompt, or two. The suites
    that lack it have intervals that are too narrow and look like any others, which is why so few
    hold the truth; so it is told where it is seen.
    """
    values = differences.to_numpy(dtype=float)
    if not has_spread(values):
        return OnePrompt(math.nan, None, math.nan, math.nan, math.nan)
    squares = (values - values.mean()) ** 2
    place = int(squares.argmax())
    share = float(squares[place] / squares.sum())
    if share <= ONE_PROMPT_SHARE or len(values) < ONE_PROMPT_AMONG:
        return OnePrompt(share, None, math.nan, math.nan, math.nan)
    others = np.delete(values, place)
    low, high = bootstrap_interval(others)
    return OnePrompt(share, str(differences.index[place]), float(others.mean()), low, high)


def hedges_g(differences: np.ndarray) -> float:
    """Standardised mean of paired differences (n,): mean over deviation, times Hedges' correction
    1 - 3 / (4 (n - 1) - 1). 0 where all are 0; NaN with fewer than three values, and where all are
    the same otherwise (`has_spread`)."""
    n = len(differences)
    if n < 3:
        return math.nan
    mean = float(np.mean(differences))
    if not has_spread(differences):
        return 0.0 if abs(mean) <= NO_SPREAD else math.nan
    return mean / float(np.std(differences, ddof=1)) * (1 - 3 / (4 * (n - 1) - 1))


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Interval of a share, Wilson (1927): `successes` of `n`, halves allowed. NaN without any, or
    where they are NaN."""
    if n == 0 or math.isnan(successes):
        return math.nan, math.nan
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _values(frame: pd.DataFrame, variant: str, value: str) -> pd.Series:
    """The values of a variant by (prompt_id, seed), and question where there are any."""
    cell = [*_CELL, *([QUESTION] if QUESTION in frame else [])]
    own = frame[frame["variant"] == variant].set_index(cell)[value].astype(float)
    if own.index.has_duplicates:
        prompt, seed = own.index[own.index.duplicated()][0][:2]
        raise ValueError(
            f"the variant {variant} has more than one score for the prompt {prompt} and seed "
            f"{seed}; keep one metric and the rows with is_current"
        )
    return own


def bootstrap_interval(values: np.ndarray, *, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Interval of the mean of `values` (n,): expanded percentile bootstrap, deterministic.

    The plain percentile interval is too narrow for few values: it uses the spread with n in the
    denominator, and normal instead of Student quantiles. Hesterberg (2015, The American
    Statistician 69:371) moves the percentiles outwards by just that. But means of values drawn
    again never leave the values' range: so widened, the interval of two values still holds the
    truth only half the time, that of four 86 times of 100. Below 12 values it therefore reaches as
    far as Student's t does, where that is further. NaN with fewer than two values, and where all
    are the same (`has_spread`): they do not say how others would vary.
    """
    samples = np.asarray(values, dtype=float)[np.newaxis]
    ((low, high),) = bootstrap_intervals(samples, resamples=resamples)
    return float(low), float(high)


def bootstrap_intervals(samples: np.ndarray, *, resamples: int = RESAMPLES) -> np.ndarray:
    """`bootstrap_interval` of each of `samples` (k, n), which share their draws: (k, 2), low and
    high. Simulations take fewer `resamples`."""
    k, n = samples.shape
    if n < 2:
        return np.full((k, 2), math.nan)
    quantile = student_quantile((1 - CONFIDENCE) / 2, n - 1)
    level = NormalDist().cdf(math.sqrt(n / (n - 1)) * quantile)
    means = [shares @ samples.T for shares in _patterns(n, resamples)]
    low, high = np.quantile(np.concatenate(means), [level, 1 - level], axis=0)
    if n < _FEW_PROMPTS:
        middle = samples.mean(axis=1)
        half = -quantile * samples.std(axis=1, ddof=1) / math.sqrt(n)
        low, high = np.minimum(low, middle - half), np.maximum(high, middle + half)
    ends = np.column_stack([low, high])
    ends[samples.std(axis=1, ddof=1) <= NO_SPREAD] = math.nan
    return ends


def has_spread(values: np.ndarray) -> bool:
    """Whether `values` (n,) differ by more than sums in another order do."""
    return len(values) > 1 and float(np.std(values, ddof=1)) > NO_SPREAD


def detectable(low: float, high: float, prompts: int, *, power: float = 0.8) -> float:
    """The true difference that a study with such an interval finds with probability `power`.

    `low` to `high`: the interval of a mean over so many prompts, on the scale on which it is one
    (logarithms of a ratio). Half of it is t(0.975) standard errors; it takes (t(0.975) + t(power))
    of them (Bloom 1995). So it is also the margin with which a model as good is found no worse that
    often. NaN without an interval.
    """
    if prompts < 2 or math.isnan(low) or math.isnan(high):
        return math.nan
    return (high - low) / 2 / half_of_detectable(prompts, power=power)


def half_of_detectable(prompts: int, *, power: float = 0.8) -> float:
    """Half an interval over so many prompts, two or more, as a share of `detectable`."""
    half, reach = (student_quantile(p, prompts - 1) for p in ((1 + CONFIDENCE) / 2, power))
    return half / (half + reach)


def _patterns(n: int, resamples: int) -> Iterator[np.ndarray]:
    """How much each of n values weighs in the means of n drawn with replacement: float64 (some, n)
    a time, `resamples` in all.

    A report asks for the same ones for every metric and comparison: small ones are kept.
    """
    if n * resamples <= _CHUNK:
        yield _kept_patterns(n, resamples)
        return
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    at_once = max(1, _CHUNK // n)
    for start in range(0, resamples, at_once):
        yield _shares(rng, min(at_once, resamples - start), n)


@lru_cache(maxsize=4)
def _kept_patterns(n: int, resamples: int) -> np.ndarray:
    return _shares(np.random.default_rng(BOOTSTRAP_SEED), resamples, n)


def _shares(rng: np.random.Generator, count: int, n: int) -> np.ndarray:
    return rng.multinomial(n, np.full(n, 1 / n), count) / n


@lru_cache(maxsize=1024)
def student_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t, found by halving: its distribution has a closed form for whole
    degrees of freedom. `probability` within 1e-7..1 - 1e-7."""
    if probability > 0.5:
        return -student_quantile(1 - probability, degrees)
    low, high = -1e7, 0.0
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
