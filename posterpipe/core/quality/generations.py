"""What is missing or impossible among generations and their CLIP scores.

What belongs here: images and scores that are not there, out of date or out of range. What does not:
images that show nothing (`images`), the other metrics (`scores`).
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pandas as pd

from posterpipe.core.prompts import shared_seeds
from posterpipe.core.quality.finding import Finding

COSINE_ROUNDING = 1e-6
"""By how much the product of two float32 vectors of length 1 may pass 1."""


def missing_images(
    generations: pd.DataFrame,
    suite: pd.DataFrame,
    variants: Sequence[str],
    delayed: Sequence[str] = (),
) -> Finding:
    """Which (variant, prompt, seed) of the suite was not drawn.

    `suite`: the table `prompt_suite`; `delayed`: variants of the prompts that hold `negative_from`
    only. A blocked image was drawn; it counts elsewhere.
    """
    expected = [
        (variant, str(row.prompt_id), int(seed))
        for row in suite.itertuples(index=False)
        for seed in json.loads(str(row.seeds))
        for variant in (*variants, *(delayed if _holds(row, "negative_from") else ()))
    ]
    columns = (generations[name] for name in ("variant", "prompt_id", "seed", "status", "reason"))
    state = {
        (str(variant), str(prompt_id), int(seed)): (str(status), str(reason))
        for variant, prompt_id, seed, status, reason in zip(*columns, strict=True)
    }
    missing = []
    for cell in expected:
        status, reason = state.get(cell, ("", "not in the table"))
        if status in ("", "failed"):
            missing.append((*cell, reason))
    present = len(expected) - len(missing)
    return Finding(
        passed=not missing,
        summary=f"{present} of {len(expected)} images are there; every variant, prompt and seed "
        "is needed for a fair comparison",
        remedy="mend what each reason names and materialize the generations again: only the "
        "missing ones are drawn",
        expected=len(expected),
        actual=present,
        offenders=pd.DataFrame(missing, columns=["variant", "prompt_id", "seed", "reason"]),
    )


def prompts_sharing_seeds(suite: pd.DataFrame) -> Finding:
    """Which prompts of the suite (the table `prompt_suite`) draw from the same noise as another."""
    seeds = {
        str(row.prompt_id): json.loads(str(row.seeds)) for row in suite.itertuples(index=False)
    }
    shared = shared_seeds(seeds)
    rows = [(name, seed) for seed, names in shared.items() for name in names]
    offenders = pd.DataFrame(rows, columns=["prompt_id", "seed"])
    several = int(offenders["prompt_id"].nunique())
    return Finding(
        passed=not several,
        summary=f"{several} of {len(suite)} prompts share a seed with another; each should have "
        "its own",
        remedy="give each prompt other seeds: intervals and tests take prompts for independent, "
        "which images from the same noise are not, and come out too sure of themselves",
        expected=0,
        actual=several,
        offenders=offenders,
        numbers={"shared_seeds": len(shared)},
    )


def impossible_cosines(scores: pd.DataFrame) -> Finding:
    """Rows of `clip_scores` whose cosine is outside -1..1, missing though the status is `ok`, or
    there though it is not."""
    cosine = scores["clip_cosine"].astype("float64")
    scored = scores["status"] == "ok"
    # Written so that NaN, which compares false with everything, is no possible value.
    possible = cosine.abs() <= 1 + COSINE_ROUNDING
    wrong = scores[(scored & ~possible) | (~scored & cosine.notna())]
    numbers = {}
    if cosine.notna().any():
        numbers = {"lowest": float(cosine.min()), "highest": float(cosine.max())}
    return Finding(
        passed=wrong.empty,
        summary=f"{len(wrong)} of {len(scores)} scores are impossible; a cosine lies within -1 "
        "and 1, and exactly the images with status ok have one",
        remedy="the scorer or its precision is at fault: set scorer.precision to fp32, and report "
        "it",
        expected=0,
        actual=len(wrong),
        offenders=wrong[["variant", "prompt_id", "seed", "clip_cosine", "status"]],
        numbers=numbers,
    )


def unscored(scores: pd.DataFrame, generations: pd.DataFrame) -> pd.DataFrame:
    """The rows of `generations` that `clip_scores` has no score of."""
    done = scores[scores["status"] != "failed"]
    return generations[~generations["generation_key"].isin(done["generation_key"])]


def score_freshness(
    scores: pd.DataFrame,
    generations: pd.DataFrame,
    *,
    drawn_at: dt.datetime,
    waiting_since: Mapping[str, dt.datetime] = MappingProxyType({}),
    scored_at: dt.datetime,
    now: dt.datetime,
    max_delay_hours: float,
    max_age_days: float | None,
    held_back: str = "",
) -> Finding:
    """Whether `clip_scores` holds the scores of the current generations, and how old they are.

    `generations`: all current tables of generations, one after the other; `drawn_at`: when the last
    of them was materialized, `scored_at`: when the scores were; `waiting_since`: since when images
    without a score are in these tables, by generation_key, where it is another time. None may wait
    longer than `max_delay_hours`; a run may be at it. With `max_age_days` the scores may not be
    older than that, even where nothing has changed. `held_back`: why nothing is to be scored now,
    so that images may wait; "" where they are to be.
    """
    waiting = unscored(scores, generations)
    gone = scores[~scores["generation_key"].isin(generations["generation_key"])]
    cell = ["variant", "prompt_id", "seed"]
    offenders = pd.concat(
        [
            waiting[cell].assign(problem="has no score"),
            gone[cell].assign(problem="the score of an image that is not current any more"),
        ],
        ignore_index=True,
    )
    age = (now - scored_at).total_seconds() / 86400
    since = [waiting_since.get(str(key), drawn_at) for key in waiting["generation_key"]]
    longest = min(since, default=drawn_at)
    delay = (now - longest).total_seconds() / 3600 if len(offenders) else 0.0
    late = delay > max_delay_hours
    old = max_age_days is not None and age > max_age_days
    current = len(generations) - len(waiting)
    return Finding(
        passed=bool(held_back) or not (late or old),
        summary=f"{current} of {len(generations)} current images have their score, {len(gone)} "
        f"scores are of former ones; last scored {_ago(now - scored_at)}"
        + (f", {delay:.1f} h behind the generations" if len(offenders) else "")
        + (f": {held_back}" if held_back else ""),
        remedy="materialize clip_scores; if a run of it failed, its log tells why. The limits are "
        "checks.max_scoring_delay_hours and checks.max_score_age_days",
        expected=f"all scored within {max_delay_hours:g} h"
        + (f", at most {max_age_days:g} days ago" if max_age_days is not None else ""),
        actual=current,
        offenders=offenders,
        numbers={"age_days": age, "behind_hours": delay},
    )


def _holds(row: Any, name: str) -> bool:
    """Whether a row has a value in a column that its table may lack."""
    return bool(pd.notna(getattr(row, name, None)))


def _ago(passed: dt.timedelta) -> str:
    hours = passed.total_seconds() / 3600
    return f"{hours:.1f} h ago" if hours < 48 else f"{hours / 24:.1f} days ago"
