"""The gate: whether a new checkpoint takes the place of the one that is served.

What belongs here: the decision as a pure function of the evidence. What does not: the evidence as
one of tables (`gate_evidence`), measuring (`metrics`), estimating (`statistics`), and the log of
decisions, with who is champion by it (`decisions`).

A challenger is promoted when every check passes, rejected when one fails, and otherwise held: the
evidence is too thin, or not complete. A check that compares passes only when its whole interval is
on the good side of its limit, and fails only when the whole interval is worse than a margin allows:
what is rejected cannot be pinned, so chance alone should not do it. Intervals of two equal models
leave 0 out one time of twenty. Where the challenger seems better, it is promoted over one that is
as good; where it seems lower, that is by less than the margin, and it is held. How often depends on
how much prompts differ beside the margin, so every check that compares says what it can tell apart
(`Check.detectable`; docs/champion.md has simulated rates). With few prompts an interval says too
little about itself for that, so then it decides nothing.

Margins against the champion alone would add up: each of eight champions may have less diversity
than the one before. So what may be lost is counted from the base model as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from posterpipe.core.metrics.fidelity import HASH_POSTERS
from posterpipe.core.statistics import NO_SPREAD, Effect, detectable, half_of_detectable
from posterpipe.settings import GateSettings

Verdict = Literal["promote", "hold", "reject"]
Outcome = Literal["pass", "fail", "open"]

RULE = (
    "A new checkpoint is promoted when the whole suite is drawn and scored, few of its images are "
    "black or of one colour, few count as copies of training posters, CLIP scores it no lower than "
    "the champion and the base model, it is nearer to film posters that it never saw than the "
    "champion or preferred by PickScore, and the images of a prompt still differ beside those of "
    "both. Where gate.specific_margin is set, one that surely tells the prompts apart less, beyond "
    "that margin, is held."
)
"""What `decide` requires, for people; how few and how near is set in `gate`."""

_MOST_PROMPTS_TOLD = 100
"""Where a margin is finer than that part of what a suite resolves, no suite would do."""

LEAST_SENSITIVITY = 0.5
"""Share of altered training posters that have to count as copies, before few copies among the
images say that few are there."""


@dataclass(frozen=True)
class Check:
    """One condition of promotion."""

    name: str
    outcome: Outcome
    """`open`: the evidence does not decide it."""
    value: float
    """The measured number; NaN where nothing could be measured."""
    low: float
    high: float
    """Its interval; NaN where it has none."""
    limit: float
    """What it is held against."""
    reason: str
    """In words, with the numbers."""
    detectable: float = math.nan
    """The least difference that these prompts find four times of five, in the unit of `value`; of
    diversity the ratio, below 1. A model that is as good passes that often with a margin as large.
    NaN where nothing was compared, and without an interval."""


@dataclass(frozen=True)
class Evidence:
    """What is known about a challenger, beside the champion it would replace.

    Differences are challenger minus champion, on the same prompts and seeds. Diversity is compared
    by its ratio: prompts that leave much open have a hundred times as much of it as others, and
    would decide a difference alone.
    """

    challenger: str
    """checkpoint_id."""
    champion: str
    expected: int
    """Cells that either model had to draw: (arm, prompt, seed, question), see `_cells`. A prompt
    without a negative prompt has one arm. What was requested in other words, or with other
    settings of the sampler, is a cell of each.

    For example, 24 prompts with a negative prompt each and 4 seeds are 192 cells. Where the
    challenger answers them with another guidance_scale than the champion, they are 384, of which
    each lacks the 192 of the other."""
    missing: int
    """Of these, cells that the challenger has no image of, or one that lacks a score it could have.
    Blocked images are not missing, nor are numbers that no image of any model has (`unmeasured`).
    """
    missing_of_champion: int
    """The same of the champion: what it lacks cannot be compared either."""
    blocked: int
    """Of these, images that are black or of one colour."""
    blocked_of_champion: int
    alone: int
    """Images, of both, that are the only one of their prompt and variant that shows something, so
    that they can have no diversity."""
    copies: int
    """Images that count as copies of a training poster."""
    compared: int
    """Images that were compared with the training posters."""
    sensitivity: float
    """Share of slightly altered training posters that similarity recognises as copies. NaN where
    holdout posters are too few to know from which similarity on an image is one; then only those
    that equal a training poster, or have its perceptual hash, are known."""
    clip: Effect
    """Difference of CLIP-T."""
    fidelity: Effect
    """Difference of the similarity to the holdout posters."""
    diversity: Effect
    """Ratio of the challenger's diversity to the champion's, geometric means, less 1."""
    preference: Effect | None = None
    """Difference of PickScore, where it is measured."""
    specific: Effect | None = None
    """Difference of what of CLIP-T is the own prompt's alone, where the suite has others."""
    missing_of_base: int = 0
    """As `missing_of_champion`, of the base model where it is not the champion."""
    clip_to_base: Effect | None = None
    """Difference of CLIP-T to the base model; None where that is the champion."""
    diversity_to_base: Effect | None = None
    """Ratio of its diversity to the base model's, less 1; None as well."""
    lost: int = 0
    """Posters that the challenger was trained on and that cannot be read: copies of them are not
    seen."""
    unsure: int = 0
    """Images beside `copies` that may be copies by their perceptual hash: holdout posters are too
    few to say (`fidelity.HASH_POSTERS`)."""
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    """What no image of any model has a number of, though some show something (`clip`, `fidelity`,
    `diversity`, `preference`), or none of the challenger's (`copies`), and why."""
    dark: tuple[str, ...] = ()
    """Of champion and base model, those whose images are all black or of one colour."""
    apart: tuple[str, ...] = ()
    """In what the requests to the models differ, since their images are of different suites or
    settings: prompt, score_text, negative_prompt, and each setting (`sampler.guidance_scale`)."""


@dataclass(frozen=True)
class GateDecision:
    """The verdict, with every number and reason."""

    verdict: Verdict
    reason: str
    """What decided, in one line."""
    checks: tuple[Check, ...]
    evidence: Evidence


def decide(evidence: Evidence, settings: GateSettings) -> GateDecision:
    """Whether the challenger is promoted. A pure function: same evidence, same decision."""
    checks = (
        _complete(evidence),
        _blocked(evidence, settings),
        _copying(evidence, settings),
        *(
            _if_measured(check, evidence)
            for check in (
                _not_inferior(evidence, settings),
                _faithful(evidence, settings),
                _diverse(evidence, settings),
                *_since_base(evidence, settings),
            )
        ),
    )
    failed = [check for check in checks if check.outcome == "fail"]
    undecided = [check for check in checks if check.outcome == "open"]
    if failed:
        return GateDecision("reject", _reason_text(failed), checks, evidence)
    if undecided:
        return GateDecision("hold", _reason_text(undecided), checks, evidence)
    return GateDecision("promote", "every check passed", checks, evidence)


def _reason_text(checks: Sequence[Check]) -> str:
    return "; ".join(f"{check.name}: {check.reason}" for check in checks)


def _complete(evidence: Evidence) -> Check:
    expected = evidence.expected
    lacking = max(evidence.missing, evidence.missing_of_champion, evidence.missing_of_base)
    outcome: Outcome = "pass" if expected and not lacking and not evidence.dark else "open"
    reason = (
        f"{expected - evidence.missing} of {expected} cells are drawn and scored, and "
        f"{expected - evidence.missing_of_champion} of the champion's"
    )
    if evidence.clip_to_base is not None:
        reason += f", {expected - evidence.missing_of_base} of the base model's"
    if evidence.blocked_of_champion:
        reason += f" ({evidence.blocked_of_champion} of these are blocked, so not compared)"
    if evidence.apart:
        reason += f"; the models were not asked the same ({', '.join(evidence.apart)})"
    if lacking or not expected:
        of_champion = evidence.missing_of_champion
        is_base = evidence.clip_to_base is None
        owners = {
            "base_generations": of_champion if is_base else evidence.missing_of_base,
            "tuned_generations": evidence.missing or not expected,
            "champion_generations": of_champion,
        }
        again = [f"`{name}`" for name, lacks in owners.items() if lacks]
        reason += f"; materialize {', '.join(again)} and `fidelity_scores` again"
    if evidence.dark:
        reason += (
            f"; every image of the {' and of the '.join(evidence.dark)} is black or of one colour, "
            "so that nothing can be compared with it: look at the pictures of "
            "`champion_generations` and `base_generations`; the model's files may be damaged, or "
            "sampler.precision too short for it"
        )
    share = lacking / expected if expected else math.nan
    return Check("complete", outcome, share, math.nan, math.nan, 0.0, reason)


def _blocked(evidence: Evidence, settings: GateSettings) -> Check:
    limit = settings.blocked_limit
    share = evidence.blocked / evidence.expected if evidence.expected else math.nan
    outcome: Outcome = "open" if math.isnan(share) else "pass" if share <= limit else "fail"
    reason = (
        f"{evidence.blocked} of {evidence.expected} images are black or of one colour, "
        f"at most {limit:.0%} may be"
    )
    return Check("blocked images", outcome, share, math.nan, math.nan, limit, reason)


@dataclass(frozen=True)
class CopyVerdict:
    """Whether there are too many copies of training posters among images."""

    outcome: Outcome
    """`open`: nothing was compared, or copies may be there unseen."""
    sentence: str
    """How many there are."""
    unknown: bool
    """No more than the limit, but only images that equal a training poster are known."""
    blind: bool
    """No more than the limit, but most copies would not be found."""
    unsure: bool
    """No more than the limit, but more with those that may be copies by their perceptual hash."""


def copy_verdict(
    copies: int,
    compared: int,
    limit: float,
    *,
    has_threshold: bool,
    sensitivity: float,
    lost: int = 0,
    unsure: int = 0,
    images: str = "images",
) -> CopyVerdict:
    """The verdict on `copies` among so many images that were compared; a share of `limit` may be.

    `has_threshold`: whether it is known from which similarity on an image is a copy; `sensitivity`,
    `lost` and `unsure` as of `Evidence`; `images`: what they are called in the sentence.
    """
    few = not compared or copies / compared <= limit
    unknown = few and not has_threshold
    blind = few and sensitivity < LEAST_SENSITIVITY
    doubtful = few and bool(compared) and (copies + unsure) / compared > limit
    sure = compared and not (unknown or blind or lost or doubtful)
    sentence = f"{copies} of {compared} {images} "
    # No holdout posters, no word on how near new ones come.
    sentence += (
        "are nearer to a training poster than nearly all new posters are"
        if has_threshold
        else "equal a training poster"
    )
    if unknown:
        sentence += "; how near is too near is not known"
    return CopyVerdict(
        outcome="fail" if not few else "pass" if sure else "open",
        sentence=sentence,
        unknown=unknown,
        blind=blind,
        unsure=doubtful,
    )


def unsure_told(unsure: int) -> str:
    """Of so many images, why it is not known whether they are copies."""
    return (
        f"{unsure} more may be copies by their perceptual hash, or only have the layout of a "
        f"training poster: it takes {HASH_POSTERS} holdout posters to tell"
    )


def _copying(evidence: Evidence, settings: GateSettings) -> Check:
    limit = settings.copy_limit
    if not evidence.compared:
        reason = "no image could be compared with the posters that the checkpoint was trained on"
        if why := evidence.unmeasured.get("copies"):
            reason += f": {why}"
        return Check("copies", "open", math.nan, math.nan, math.nan, limit, reason)
    verdict = copy_verdict(
        evidence.copies, evidence.compared, limit, sensitivity=evidence.sensitivity,
        has_threshold=not math.isnan(evidence.sensitivity), lost=evidence.lost,
        unsure=evidence.unsure,
    )  # fmt: skip
    reason = verdict.sentence
    if verdict.unknown:
        reason += (
            ", since it takes three holdout posters or more that are no copies of training posters "
            "themselves: add some to the folder `holdout`"
        )
    else:
        reason += f", at most {limit:.0%} may be"
    found = f"{evidence.sensitivity:.0%} of training posters that were cut and compressed a bit"
    if verdict.blind:
        reason += (
            f"; but only {found} would be found, too few to rule copies out: add posters to "
            "the folder `holdout`, so that they tell better how near new ones come"
        )
    elif verdict.outcome != "fail" and not verdict.unknown:
        reason += f"; {found} would be found"
    if verdict.unsure:
        reason += f"; {unsure_told(evidence.unsure)}"
        reason += "" if verdict.unknown else ", so add some to the folder `holdout`"
    if verdict.outcome != "fail" and evidence.lost:
        reason += (
            f"; {evidence.lost} of the posters that the checkpoint was trained on cannot be read "
            "any more, so that copies of them are not seen: put them back, or leave them out for "
            "good, and run the job `retrain`"
        )
    share = evidence.copies / evidence.compared
    # No interval here: handing out people's posters is worse than keeping the older model.
    return Check("copies", verdict.outcome, share, math.nan, math.nan, limit, reason)


_MEASURED_BY = {
    "CLIP-T": {"clip": "CLIP-T"},
    "CLIP-T since base": {"clip": "CLIP-T"},
    "fidelity": {"fidelity": "similarity to holdout posters", "preference": "PickScore"},
    "diversity": {"diversity": "diversity"},
    "diversity since base": {"diversity": "diversity"},
}
"""What checks read, by role, in words."""


def _if_measured(check: Check, evidence: Evidence) -> Check:
    """The check; open, with the reason, where no image has what it reads."""
    lacking = [
        f"no image has a number for {name}: {evidence.unmeasured[role]}"
        for role, name in _MEASURED_BY[check.name].items()
        if role in evidence.unmeasured
    ]
    if not lacking or check.outcome == "fail":
        return check
    return replace(check, outcome="open", reason="; ".join(lacking))


def _not_inferior(evidence: Evidence, settings: GateSettings) -> Check:
    check = _clip("CLIP-T", evidence.clip, "champion", settings)
    outcome, reason = check.outcome, check.reason
    specific = evidence.specific
    if specific is not None:
        reason += f"; own text less those of other prompts {_interval(specific)}"
        margin = settings.specific_margin
        if specific.high < -(margin or 0.0) and not _few(specific, settings):
            if margin is None:
                # Nobody asked beforehand: one of many questions, which the score report counts.
                reason += (
                    ", an interval below zero when taken alone; the score report says whether it "
                    "is told apart from zero with its other comparisons counted"
                )
            else:
                reason += ": its images tell the prompts apart less"
                # Not rejected: how much of that a style may cost is for people to say.
                outcome = "open" if outcome == "pass" else outcome
    return replace(check, outcome=outcome, reason=reason)


def _clip(name: str, effect: Effect, other: str, settings: GateSettings) -> Check:
    limit = -settings.clip_margin
    outcome = _against(effect, limit, settings)
    how = {
        "pass": "not lower than",
        "fail": f"lower than the {other}'s by more than",
        "open": f"may be lower than the {other}'s by more than",
    }[outcome]
    tail = f"the {other}'s less the margin of" if outcome == "pass" else "the margin of"
    reason = f"difference {_interval(effect)}: {how} {tail} {settings.clip_margin:g}"
    found = detectable(effect.low, effect.high, effect.prompts)
    reason += _few(effect, settings) or _resolution(
        outcome, found, settings.clip_margin, effect.prompts,
        told=f"differences from {found:.2g} on", remedy="a larger gate.clip_margin",
    )  # fmt: skip
    return Check(name, outcome, effect.estimate, effect.low, effect.high, limit, reason, found)


def _faithful(evidence: Evidence, settings: GateSettings) -> Check:
    fidelity, preference = evidence.fidelity, evidence.preference
    limit = -settings.fidelity_margin
    outcome = _against(fidelity, limit, settings)
    how = "lower than the champion's by more than the margin of" if outcome == "fail" else ""
    if outcome == "pass" and not fidelity.low > 0:
        outcome = "open"  # as good is not better
    if outcome == "open":
        lower = fidelity.high < 0 and not _few(fidelity, settings)
        how = (
            "lower than the champion's, not clearly by more than the margin of"
            if lower
            else "not clearly higher than the champion's; the margin is"
        )
    how = f"{how} {settings.fidelity_margin:g}" if how else "higher than the champion's"
    reason = f"similarity to holdout posters {_interval(fidelity)}: {how}"
    found = detectable(fidelity.low, fidelity.high, fidelity.prompts)
    # The margin is none that has to be reached: better is above 0.
    reason += _few(fidelity, settings) or _resolution(
        outcome, found, math.inf, fidelity.prompts, told=f"differences from {found:.2g} on"
    )
    if preference is not None:
        preferred = preference.win_low > 0.5
        if preferred and not _few(preference, settings):
            outcome = "pass"
        reason += (
            f"; preferred for {preference.win_rate:.0%} of the prompts "
            f"({preference.win_low:.0%} to {preference.win_high:.0%})"
        )
    return Check(
        "fidelity", outcome, fidelity.estimate, fidelity.low, fidelity.high, limit, reason, found
    )


def _diverse(evidence: Evidence, settings: GateSettings) -> Check:
    check = _diversity("diversity", evidence.diversity, "champion", settings)
    reason = check.reason
    if evidence.alone:
        reason += (
            f"; {evidence.alone} images are the only one of their prompt and are left out: give "
            "every prompt two seeds or more"
        )
    return replace(check, reason=reason)


def _diversity(name: str, kept: Effect, other: str, settings: GateSettings) -> Check:
    limit = settings.diversity_kept
    outcome = _against(kept, limit - 1, settings)
    said = {
        "pass": f"at least {limit:.0%} of it are kept",
        "fail": f"less than {limit:.0%} of it are left, the images of a prompt are too much alike",
        "open": f"not sure that {limit:.0%} of it are kept",
    }[outcome]
    # By logarithms, as ratios are estimated. Nothing is told where the interval has no lower end:
    # a prompt whose images are all alike has none.
    bounded = kept.low > -1
    found = (
        detectable(math.log1p(kept.low), math.log1p(kept.high), kept.prompts)
        if bounded
        else math.nan
    )
    least = math.exp(-found)
    reason = f"{_ratio(kept, other)}: {said}"
    reason += _few(kept, settings) or _resolution(
        outcome, found, -math.log(limit) if limit else math.inf, kept.prompts,
        told=f"a loss to {least:.0%}", remedy="a lower gate.diversity_kept",
    )  # fmt: skip
    ends = (1 + kept.estimate, 1 + kept.low, 1 + kept.high)
    return Check(name, outcome, *ends, limit, reason, least)


def _since_base(evidence: Evidence, settings: GateSettings) -> list[Check]:
    """What may be lost, counted from the base model: none where that is the champion."""
    if evidence.clip_to_base is None or evidence.diversity_to_base is None:
        return []
    return [
        _clip("CLIP-T since base", evidence.clip_to_base, "base model", settings),
        _diversity("diversity since base", evidence.diversity_to_base, "base model", settings),
    ]


def _against(effect: Effect, limit: float, settings: GateSettings) -> Outcome:
    if _few(effect, settings):
        return "open"
    if _equal(effect):  # there is no interval, and none is needed
        return "pass" if limit <= 0 else "fail"
    if math.isnan(effect.low) or math.isnan(effect.high):
        return "open"
    if effect.low >= limit:
        return "pass"
    return "fail" if effect.high < limit else "open"


def _equal(effect: Effect) -> bool:
    """Whether no prompt differs at all: the same images, say."""
    return effect.prompts > 1 and math.isnan(effect.low) and abs(effect.estimate) <= NO_SPREAD


def _few(effect: Effect, settings: GateSettings) -> str:
    """The sentence where an effect stands on too few prompts to decide; "" where it does not."""
    if effect.prompts >= settings.min_prompts:
        return ""
    return f"; {effect.prompts} prompts decide nothing, it takes {settings.min_prompts}"


def _resolution(
    outcome: Outcome, found: float, margin: float, prompts: int, *, told: str, remedy: str = ""
) -> str:
    """The sentence on what so many prompts can tell apart, where the margin is smaller than half
    the interval, or the check is open; "" where neither.

    `found`: see `statistics.detectable`, and `margin` on the same scale; `told`: `found` in words;
    `remedy`: which setting would do.
    """
    if math.isnan(found):
        return ""
    if margin >= found * half_of_detectable(prompts):
        return f"; these prompts find {told}, four times of five" if outcome == "open" else ""
    # How near a mean is known grows with the root of the number of prompts.
    times = found / margin if margin else math.inf
    enough = ""
    if times < _MOST_PROMPTS_TOLD:
        enough = f", or some {float(f'{prompts * times**2:.2g}'):,.0f} prompts"
    return (
        f"; the margin is finer than these prompts resolve, which find {told} four times of five: "
        f"choose {remedy}{enough}"
    )


def _interval(effect: Effect) -> str:
    if math.isnan(effect.estimate):
        return "unknown"
    if _equal(effect):
        return f"none on any of {effect.prompts} prompts"
    if math.isnan(effect.low):
        return f"{effect.estimate:+.4f} (no interval, {effect.prompts} prompts)"
    return (
        f"{effect.estimate:+.4f} ({effect.low:+.4f} to {effect.high:+.4f}, "
        f"{effect.prompts} prompts)"
    )


def _ratio(effect: Effect, other: str) -> str:
    if math.isnan(effect.estimate):
        return f"ratio to the {other}'s unknown"
    if _equal(effect):
        return f"the {other}'s on each of {effect.prompts} prompts"
    means = f"{1 + effect.estimate:.2f} of the {other}'s, by geometric means"
    if math.isnan(effect.low):
        return f"{means} (no interval, {effect.prompts} prompts)"
    return f"{means} ({1 + effect.low:.2f} to {1 + effect.high:.2f}, {effect.prompts} prompts)"
