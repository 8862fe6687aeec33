"""What the report says first, and whether the prompts are what a higher score is about.

What belongs here: the headline, and the section that holds CLIP-T against its negative control.
What does not: the rest of the first page (`results`), measuring (`core.metrics.specificity`).

A model that has learnt the look that all prompts of a suite ask for scores higher on every text of
it. So "follows the prompts" is said only where an image's own text gains on the others, and that
they are followed less where it loses. That question was named beforehand like the first one, and is
corrected for its own comparisons only: the finding of `paired_effects` counts. Where a difference
rests on one prompt, that is said too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from posterpipe.core.score_report import charts
from posterpipe.core.score_report.data import BASELINE, TUNED, Published, Row, number, text
from posterpipe.core.score_report.words import (
    ALIKE,
    DASH,
    count,
    plural,
    resting,
    rounded,
    verdict,
)

SPECIFIC, CONTROL, RANK = "clip_specific", "clip_control", "clip_rank"
"""How the ids of the metrics begin that `core.metrics.specificity` measures."""

Board = Mapping[str, Row]
"""The rows of one metric of the leaderboard by variant."""


@dataclass(frozen=True)
class Change:
    """What fine-tuning changed, without negative prompt: a mean with its 95 % interval."""

    mean: float
    low: float | None
    high: float | None
    """None of one prompt, and where all prompts differ by the same: the change was measured, but
    says nothing about other prompts."""
    prompts: int
    finding: str
    """That of `paired_effects`; "" where it was not computed."""
    rests: str = ""
    """On which prompt it rests, in words; "" where on none."""

    @property
    def direction(self) -> str:
        """higher or lower where the interval holds no zero; without one, and where it rests on one
        prompt, as it was found; else ""."""
        if not self.rests and self.low is not None and self.high is not None:
            return "higher" if self.low > 0 else "lower" if self.high < 0 else ""
        return self.finding if self.finding in ("higher", "lower") else ""

    @property
    def holds_zero(self) -> bool:
        """Whether there is an interval, and zero in it."""
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high

    @property
    def told(self) -> str:
        """The mean with its interval, in words."""
        rests = f"; {self.rests}" if self.rests else ""
        return f"{charts.signed(self.mean)} ({self.span}{rests})"

    @property
    def span(self) -> str:
        """The interval in words, or why there is none."""
        if self.low is None or self.high is None:
            return ALIKE if self.prompts > 1 else "one prompt"
        return f"{charts.signed(self.low)} to {charts.signed(self.high)}"


def board_of(published: Published, kind: str) -> Board:
    """The rows of a metric whose id begins with `kind` and that looks at images as the headline's
    metric does, by the same model; none where it was not measured."""
    seen = {
        text(row["metric_id"]): (text(row["encoder"]), text(row["preprocessing"]))
        for row in published.rows("dim_metric")
    }
    wanted = seen.get(published.headline_metric or "")
    return {
        text(row["variant"]): row
        for row in published.rows("leaderboard")
        if text(row["metric_id"]).startswith(f"{kind}.")
        and seen.get(text(row["metric_id"])) == wanted
    }


def change_of(published: Published, board: Board) -> Change | None:
    """None without a pair of scores of both models."""
    row = board.get(TUNED)
    if row is None or BASELINE not in board:
        return None
    values = [number(row[name]) for name in ("diff_to_sd", "diff_low_95", "diff_high_95")]
    mean, low, high = values
    if mean is None:
        return None
    effect = _effect(published, board)
    finding = text(effect["finding"]) if effect else ""
    return Change(mean, low, high, count(row, "diff_prompts"), finding, resting(effect))


def _effect(published: Published, board: Board) -> Row | None:
    """The row of `paired_effects` about `change_of`; None where it was not computed."""
    return published.to_baseline(text(board[TUNED]["metric_id"])).get(TUNED)


def headline(published: Published, board: Board) -> tuple[str, str]:
    """What the numbers allow to say, and no more: a title, and sentences with the numbers.

    `board`: that of the metric that variants are ranked by.
    """
    if not published.shots:
        return (
            "No scores yet",
            "The pipeline has not published any scored image. This page fills by itself as soon as "
            "it has.",
        )
    own = change_of(published, board)
    if own is None:
        return (
            "Scores without a comparison",
            f"There are {len(published.shots)} images, but not of both the base and the fine-tuned "
            "model with scores for the same prompt and seed, so that nothing can be said about "
            f"fine-tuning yet.{_blocked_told(published)}",
        )
    prompts = own.prompts
    if prompts < 2:
        return (
            "Too few prompts to tell",
            f"Fine-tuning was compared on {plural(prompts, 'prompt')}. That says nothing about "
            "others: an interval needs two or more.",
        )
    specific = change_of(published, board_of(published, SPECIFIC))
    control = change_of(published, board_of(published, CONTROL))
    if own.low is None and own.mean == 0:
        said = f"On none of {prompts} prompts does fine-tuning change the CLIP cosine."
    elif own.low is None:
        said = (
            f"On each of {prompts} prompts fine-tuning changes the CLIP cosine by "
            f"{charts.signed(own.mean)}. How other prompts would vary is not seen by such a suite: "
            "there is no interval."
        )
    elif not own.direction and not own.holds_zero:
        said = (
            f"Fine-tuning changes the CLIP cosine by {own.told}, a 95 % interval over {prompts} "
            "prompts: so it is not told apart from zero."
        )
    elif not own.direction:
        said = (
            f"Fine-tuning changes the CLIP cosine by {charts.signed(own.mean)}, but the 95 % "
            f"interval, {own.span} over {prompts} prompts, holds zero."
        )
        said += f" It {own.rests}." if own.rests else ""
    else:
        said = (
            "Compared image by image with the base model, on the same prompts, seeds and noise, "
            f"fine-tuning {'raises' if own.direction == 'higher' else 'changes'} the CLIP cosine "
            f"by {own.told}, a 95 % interval over {prompts} prompts."
        )
    title, rest = _judged(own, specific, control)
    return title, f"{said} {rest}".strip()


def _blocked_told(published: Published) -> str:
    """How many images of the two that are compared are blocked, and have no score therefore; ""
    of none."""
    told = []
    for variant, name in ((BASELINE, "the base"), (TUNED, "the fine-tuned model")):
        own = [shot for _, shot in published.shots if shot.variant == variant]
        blocked = sum(shot.status == "blocked" for shot in own)
        if blocked:
            told.append(f"{blocked} of {plural(len(own), 'image')} of {name}")
    return f" Blocked: {' and '.join(told)}." if told else ""


def _judged(own: Change, specific: Change | None, control: Change | None) -> tuple[str, str]:
    """The title, and what the negative control says."""
    direction = own.direction
    if specific is None or control is None:
        title = f"Fine-tuning scores {direction} with CLIP"
        rest = (
            "Whether that is about the prompts, or about a look that all of them share, was not "
            "measured."
        )
        return (title, rest) if direction else ("No difference that this suite can show", "")
    others = f"With the texts of the other prompts it changes by {control.told}"
    apart = f"{others}, so that an image's own text stands out from them {{}}: {specific.told}."
    if specific.finding == "higher":
        title = {
            "higher": "Fine-tuning follows the prompts better",
            "lower": "Fine-tuning scores lower, but tells the prompts apart better",
            "": "No difference in the score, but the prompts are told apart better",
        }[direction]
        return title, apart.format("more")
    if specific.finding == "lower":
        title = {
            "higher": "Fine-tuning scores higher, but follows its own prompts less",
            "lower": "Fine-tuning follows the prompts worse",
            "": "No difference in the score, but the prompts are told apart less",
        }[direction]
        rest = apart.format("less")
        if direction == "higher":
            rest += (
                " What was gained is what the prompts have in common, such as a look; what sets a "
                "prompt apart is followed less than before."
            )
        return title, rest
    title = {
        "higher": "Fine-tuning scores higher; whether for the prompts is open",
        "lower": "Fine-tuning scores lower; whether for the prompts is open",
        "": "No difference that this suite can show",
    }[direction]
    left = {
        "": "whether that is more than chance was not computed",
        "all alike": "no prompt differs in it",
    }.get(specific.finding, "that is not told apart from zero, all its comparisons counted")
    return title, f"{others}. What is left is {specific.told}; {left}."


def control_context(published: Published, board: Board) -> dict[str, Any]:
    """Rows of CLIP-T beside its control, and the sentence for the growth chart."""
    boards = [
        ("Its own prompt's text", board),
        ("The texts of the other prompts", board_of(published, CONTROL)),
        ("Own less others", board_of(published, SPECIFIC)),
        ("Share of others that fit less (chance: 0.5)", board_of(published, RANK)),
    ]
    shown = [
        (name, own, change_of(published, own))
        for name, own in boards
        if BASELINE in own and TUNED in own
    ]
    # Beside nothing to hold it against, the score alone is no control.
    if len(shown) < 2:
        return {"control": [], "control_told": ""}
    scale = charts.row_scale(
        (n for _, _, change in shown if change for n in (change.low, change.mean, change.high)),
        include=(0.0,),
    )
    rows = [
        {
            "name": name,
            "base": rounded(own[BASELINE]["mean"]),
            "tuned": rounded(own[TUNED]["mean"]),
            "difference": charts.signed(change.mean) if change else DASH,
            "interval": change.span if change else DASH,
            "rests": change.rests if change else "",
            "plot": _plot(change, scale),
            "css": verdict(_effect(published, own)),
        }
        for name, own, change in shown
    ]
    own, others = change_of(published, board), change_of(published, board_of(published, CONTROL))
    told = (
        f"From base to fine-tuned, the raw cosine with the own prompt changes by {own.told}, and "
        f"that with the other prompts of the suite by {others.told}."
        if own and others
        else ""
    )
    return {
        "control": rows,
        "control_axis": charts.axis_row(scale, sign=True),
        "control_told": told,
    }


def _plot(change: Change | None, scale: charts.Scale) -> Markup:
    if change is None:
        return charts.interval_row(None, None, None, scale, zero=0.0)
    return charts.interval_row(change.mean, change.low, change.high, scale, variant=TUNED, zero=0.0)
