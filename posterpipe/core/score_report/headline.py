"""What the report says first, and whether the prompts are what a higher score is about.

What belongs here: the headline, and the section that holds CLIP-T against its negative control.
What does not: the rest of the first page (`results`), measuring (`core.metrics.specificity`).

A model that has learnt the look that all prompts of a suite ask for scores higher on every text of
it. So "follows the prompts" is said only where an image's own text gains on the others. That is one
of many questions, some of which chance alone would answer: the finding of `paired_effects` counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posterpipe.core.score_report import charts
from posterpipe.core.score_report.data import BASELINE, TUNED, Published, Row, number, text
from posterpipe.core.score_report.words import count, interval, plural, rounded, verdict

SPECIFIC, CONTROL, RANK = "clip_specific", "clip_control", "clip_rank"
"""How the ids of the metrics begin that `core.metrics.specificity` measures."""

Board = Mapping[str, Row]
"""The rows of one metric of the leaderboard by variant."""


@dataclass(frozen=True)
class Change:
    """What fine-tuning changed, without negative prompt: a mean with its 95 % interval."""

    mean: float
    low: float
    high: float
    finding: str
    """That of `paired_effects`; "" where it was not computed."""

    @property
    def told(self) -> str:
        """The mean with its interval, in words."""
        return f"{charts.signed(self.mean)} ({self.span})"

    @property
    def span(self) -> str:
        """The interval in words."""
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
    """None where there is no interval."""
    row = board.get(TUNED)
    if row is None or BASELINE not in board:
        return None
    values = [number(row[name]) for name in ("diff_to_sd", "diff_low_95", "diff_high_95")]
    mean, low, high = values
    if mean is None or low is None or high is None:
        return None
    effect = _effect(published, board)
    return Change(mean, low, high, text(effect["finding"]) if effect else "")


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
    if BASELINE not in board or number(board.get(TUNED, {}).get("diff_to_sd")) is None:
        return (
            "Scores without a comparison",
            f"There are {len(published.shots)} images, but not of both the base and the fine-tuned "
            "model with scores for the same prompt and seed, so that nothing can be said about "
            "fine-tuning yet.",
        )
    prompts = count(board[TUNED], "diff_prompts")
    own = change_of(published, board)
    if own is None:
        return (
            "Too few prompts to tell",
            f"Fine-tuning was compared on {plural(prompts, 'prompt')}. That says nothing about "
            "others: an interval needs two or more that do not all differ by the same.",
        )
    specific = change_of(published, board_of(published, SPECIFIC))
    control = change_of(published, board_of(published, CONTROL))
    if own.low <= 0 <= own.high:
        said = (
            f"Fine-tuning changes the CLIP cosine by {charts.signed(own.mean)}, but the 95 % "
            f"interval, {own.span} over {prompts} prompts, holds zero."
        )
    else:
        said = (
            "Compared image by image with the base model, on the same prompts, seeds and noise, "
            f"fine-tuning {'raises' if own.low > 0 else 'changes'} the CLIP cosine by {own.told}, "
            f"a 95 % interval over {prompts} prompts."
        )
    title, rest = _judged(own, specific, control)
    return title, f"{said} {rest}".strip()


def _judged(own: Change, specific: Change | None, control: Change | None) -> tuple[str, str]:
    """The title, and what the negative control says."""
    direction = "higher" if own.low > 0 else "lower" if own.high < 0 else ""
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
            "higher": "Fine-tuning scores higher, but not for following the prompts",
            "lower": "Fine-tuning follows the prompts worse",
            "": "No difference in the score, but the prompts are told apart less",
        }[direction]
        rest = apart.format("less")
        if direction == "higher":
            rest += " What was gained is what the prompts have in common, such as a look."
        return title, rest
    title = {
        "higher": "Fine-tuning scores higher; whether for the prompts is open",
        "lower": "Fine-tuning scores lower; whether for the prompts is open",
        "": "No difference that this suite can show",
    }[direction]
    left = (
        "that is not told apart from zero, all questions counted"
        if specific.finding
        else "whether that is more than chance was not computed"
    )
    return title, f"{others}. What is left is {specific.told}; {left}."


def control_context(published: Published, board: Board) -> dict[str, Any]:
    """Rows of CLIP-T beside its control, and the sentence for the growth chart."""
    boards = [
        ("Its own prompt's text", board),
        ("The texts of the other prompts", board_of(published, CONTROL)),
        ("Own less others", board_of(published, SPECIFIC)),
        ("Share of others that fit less (chance: 0.5)", board_of(published, RANK)),
    ]
    changes = [change_of(published, own) for _, own in boards]
    if any(change is None for change in changes):
        return {"control": [], "control_told": ""}
    scale = charts.row_scale(
        (bound for change in changes if change for bound in (change.low, change.mean, change.high)),
        include=(0.0,),
    )
    rows = [
        {
            "name": name,
            "base": rounded(own[BASELINE]["mean"]),
            "tuned": rounded(own[TUNED]["mean"]),
            "difference": charts.signed(change.mean),
            "interval": interval(own[TUNED], "diff_low_95", "diff_high_95", sign=True),
            "plot": charts.interval_row(
                change.mean, change.low, change.high, scale, variant=TUNED, zero=0.0
            ),
            "css": verdict(_effect(published, own)),
        }
        for (name, own), change in zip(boards, changes, strict=True)
        if change
    ]
    own, others = changes[0], changes[1]
    assert own is not None and others is not None, "looked at above"
    told = (
        f"From base to fine-tuned, the raw cosine with the own prompt changes by {own.told}, and "
        f"that with the other prompts of the suite by {others.told}."
    )
    return {
        "control": rows,
        "control_axis": charts.axis_row(scale, sign=True),
        "control_told": told,
    }
