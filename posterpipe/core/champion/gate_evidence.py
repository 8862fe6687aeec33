"""The gate's evidence from tables of images and scores.

What belongs here: which images of two models answer the same, their effects by each metric the gate
reads, and what is missing. What does not: the decision (`gate`) and measuring (`evidence`,
`metrics`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from posterpipe.core.champion.gate import Evidence
from posterpipe.core.statistics import Effect, Scale, effect_between, without_negative

_CELL = ["arm", "prompt_id", "seed"]

_ASKED = ["prompt", "score_text", "negative_prompt", "settings"]
"""What beside the seed decides what an image answers: only answers to the same are compared. The
title is none of it: it is set on the image afterwards."""


@dataclass(frozen=True)
class MetricIds:
    """The metrics that the gate reads, a metric_id a role; None where one was not measured."""

    clip: str
    fidelity: str
    diversity: str
    preference: str | None = None
    specific: str | None = None
    """Shown beside `clip`, and missing where that is."""
    nearest: str | None = None
    """Its reasons say why images were not compared with training posters."""

    @property
    def required(self) -> dict[str, str]:
        """Those that every image has to have, by role."""
        roles = {"clip": self.clip, "fidelity": self.fidelity, "diversity": self.diversity}
        return roles | ({"preference": self.preference} if self.preference else {})


def gather(
    generations: pd.DataFrame,
    scores: pd.DataFrame,
    copied: Mapping[str, bool],
    metrics: MetricIds,
    *,
    challenger: str,
    champion: str,
    base: str | None = None,
    sensitivity: float,
    lost: int = 0,
    unsure: int = 0,
) -> Evidence:
    """The evidence about a challenger.

    `generations`: rows of both checkpoints, and of the base model `base` where that is another, as
    of `generations.COLUMNS` (generation_key, variant, prompt_id, prompt, score_text,
    negative_prompt, seed, checkpoint_id, status, settings), each of one suite and one setting of
    the sampler. Where these differ between the models, their cells are others.
    `scores`: long, as of `metrics.base.SCORE_COLUMNS`. `copied`: whether an image counts as a
    copy, by generation_key; images that are not in it were not compared. `sensitivity`, `lost` and
    `unsure`: see `Evidence`. Raises ValueError where a cell of a checkpoint is there twice.
    """
    own = _cells(generations, challenger)
    others = {"champion": _cells(generations, champion)}
    if base not in (None, champion):
        others["base model"] = _cells(generations, str(base))
    other, first = others["champion"], others.get("base model")
    models = [own, *others.values()]
    # What one of them was asked, the others have to answer as well.
    expected = own.index
    for cells in others.values():
        expected = expected.union(cells.index)
    unmeasured = _unmeasured(scores, metrics, models)
    required = {role: name for role, name in metrics.required.items() if role not in unmeasured}
    values = {role: _values(scores, name) for role, name in required.items()}
    known = [
        copied[key] for key in own.loc[own["status"] == "ok", "generation_key"] if key in copied
    ]

    return Evidence(
        challenger=challenger,
        champion=champion,
        expected=len(expected),
        missing=_missing(own, expected, values),
        missing_of_champion=_missing(other, expected, values),
        blocked=int((own["status"] == "blocked").sum()),
        blocked_of_champion=int((other["status"] == "blocked").sum()),
        alone=sum(int(_alone(cells.reindex(expected)).sum()) for cells in (own, other)),
        copies=sum(known),
        compared=len(known),
        sensitivity=sensitivity,
        clip=_compared(scores, metrics.clip, own, other),
        fidelity=_compared(scores, metrics.fidelity, own, other),
        diversity=_compared(scores, metrics.diversity, own, other, scale="ratio"),
        preference=(
            _compared(scores, metrics.preference, own, other) if metrics.preference else None
        ),
        specific=_compared(scores, metrics.specific, own, other) if metrics.specific else None,
        missing_of_base=0 if first is None else _missing(first, expected, values),
        clip_to_base=None if first is None else _compared(scores, metrics.clip, own, first),
        diversity_to_base=(
            None
            if first is None
            else _compared(scores, metrics.diversity, own, first, scale="ratio")
        ),
        lost=lost,
        unsure=unsure,
        unmeasured=unmeasured,
        dark=tuple(
            name
            for name, cells in others.items()
            if len(cells) and (cells["status"] == "blocked").all()
        ),
        apart=_apart(models),
    )


def _values(scores: pd.DataFrame, metric_id: str) -> pd.Series:
    """The values of one metric by generation_key."""
    own = scores[scores["metric_id"] == metric_id]
    return own.set_index("generation_key")["value"].astype(float)


def _unmeasured(
    scores: pd.DataFrame, metrics: MetricIds, models: Sequence[pd.DataFrame]
) -> dict[str, str]:
    """See `Evidence.unmeasured`; `models`: the cells of each, the challenger's first."""
    # An image that is alone says itself what to do.
    several = [cells[~_alone(cells)] for cells in models]
    whys = {
        role: _why_nowhere(scores, name, several if role == "diversity" else models)
        for role, name in metrics.required.items()
    }
    whys["copies"] = _why_nowhere(scores, metrics.nearest, models[:1])
    return {role: why for role, why in whys.items() if why}


def _missing(cells: pd.DataFrame, expected: pd.Index, values: Mapping[str, pd.Series]) -> int:
    """How many of the `expected` cells a model has no image of, or one without a score; `values`:
    the scores that it has to have, by role."""
    asked = cells.reindex(expected)
    scored = pd.Series(True, index=expected)
    for role, of_images in values.items():
        has = asked["generation_key"].map(of_images).notna()
        scored &= has | _alone(asked) if role == "diversity" else has
    return int((~(scored & (asked["status"] == "ok")) & (asked["status"] != "blocked")).sum())


def _compared(
    scores: pd.DataFrame,
    metric_id: str,
    own: pd.DataFrame,
    other: pd.DataFrame,
    *,
    scale: Scale = "difference",
) -> Effect:
    """One model's cells beside another's, by one metric."""
    values = _values(scores, metric_id)
    sides = {
        "own": own["generation_key"].map(values), "other": other["generation_key"].map(values),
    }  # fmt: skip
    weights = {"own": 1.0, "other": -1.0}
    return effect_between(metric_id, pd.DataFrame(sides).astype(float), weights, scale=scale)


def _cells(generations: pd.DataFrame, checkpoint: str) -> pd.DataFrame:
    """Rows of a checkpoint by (arm, prompt_id, seed, question): the arm is the variant without the
    model, the question what of `_ASKED` the image answers.

    Where a prompt has no negative prompt, the arms with one are the same image again and no cells.
    """
    own = generations[generations["checkpoint_id"] == checkpoint]
    own = own[~without_negative(own)]
    arm = own["variant"].str.replace("^(sd|dreambooth)", "", regex=True)
    cells = own.assign(arm=arm)
    twice = cells[cells.duplicated(_CELL)]
    if len(twice):
        prompt, seed = twice[["prompt_id", "seed"]].iloc[0]
        raise ValueError(
            f"the checkpoint {checkpoint} has the prompt {prompt} with seed {seed} twice; give "
            "generations of one suite and one setting of the sampler"
        )
    asked = [json.dumps(row) for row in cells[_ASKED].astype(str).to_numpy().tolist()]
    return cells.assign(question=asked).set_index([*_CELL, "question"])


def _apart(models: Sequence[pd.DataFrame]) -> tuple[str, ...]:
    """See `Evidence.apart`."""
    cells = pd.concat(models).reset_index()
    several = cells[cells.groupby(_CELL)["question"].transform("nunique") > 1]
    differ = several.groupby(_CELL)[_ASKED].nunique().max() > 1
    told = [name for name in _ASKED[:-1] if differ[name]]
    if differ["settings"]:
        values = pd.DataFrame(
            [{**json.loads(str(row.settings)), "arm": row.arm} for row in several.itertuples()]
        ).map(str)
        changed = values.groupby("arm").nunique().max() > 1
        told += [f"sampler.{name}" for name in changed.index[changed]] or ["settings"]
    return tuple(told)


def _why_nowhere(
    scores: pd.DataFrame, metric_id: str | None, models: Sequence[pd.DataFrame]
) -> str:
    """The commonest reason why none of the models' images has a score, though some show something;
    "" where one has it."""
    cells = pd.concat(models)
    keys = cells.loc[cells["status"] == "ok", "generation_key"]
    own = scores[(scores["metric_id"] == metric_id) & scores["generation_key"].isin(keys)]
    reasons = own.loc[own["reason"] != "", "reason"]
    return "" if own["value"].notna().any() or reasons.empty else str(reasons.mode().iloc[0])


def _alone(cells: pd.DataFrame) -> pd.Series:
    """Whether an image has no second one of its prompt to differ from, and will get none: the
    others are blocked, or the suite asks for one seed. One that failed may be there next time."""
    ok, answered = cells["status"] == "ok", cells["status"].isin(["ok", "blocked"])
    prompt = ["arm", "prompt_id", "question"]
    only = ok.astype(int).groupby(level=prompt).transform("sum") == 1
    return ok & only & (answered.astype(int).groupby(level=prompt).transform("min") == 1)
