"""What is wrong with scores beside CLIP-T, with the titles they are about, and with what is served.

What belongs here: titles that are not set or not read, numbers that could not be measured, copies
of posters, a champion that should not be one. What does not: CLIP-T (`generations`) and the gate's
decision (`core.champion.gate`).
"""

from __future__ import annotations

import pandas as pd

from posterpipe.core.champion.gate import LEAST_SENSITIVITY, copy_verdict, unsure_told
from posterpipe.core.metrics.fidelity import HASH_POSTERS
from posterpipe.core.quality.finding import Finding, share_of
from posterpipe.core.variants import is_tuned


def unset_titles(titled: pd.DataFrame) -> Finding:
    """Rows of `titled_posters` whose title could not be set; `titled` as of
    `typography.TITLED_COLUMNS`."""
    wanted = titled[titled["status"] != "blocked"]
    failed = wanted[wanted["status"] != "ok"]
    done = len(wanted) - len(failed)
    shortened = int(((wanted["status"] == "ok") & (wanted["reason"] != "")).sum())
    without = f", {shortened} of them without pictographs that no font has" if shortened else ""
    return Finding(
        passed=failed.empty,
        summary=f"{done} of {len(wanted)} titles are set{without}",
        remedy="each reason says what to do: another title, another lettering.style, or a font",
        expected=len(wanted),
        actual=done,
        offenders=failed[["title", "reason"]].drop_duplicates(),
    )


def unread_titles(legibility: pd.DataFrame, min_share: float) -> Finding:
    """Titles set in type that the OCR did not read exactly; the table `legibility_scores`. Of all
    titles whose letters it knows, those on blocked images included, as reports count them."""
    # A table that an older posterpipe made does not say.
    known = legibility.get("measurable", pd.Series(True, legibility.index)).astype(bool)
    beyond = int((~known & (legibility["lettering"] == "set")).sum())
    measured = legibility[known]
    typeset = measured[measured["lettering"] == "set"]
    exact = typeset["exact"].astype(bool)
    drawn = measured.loc[measured["lettering"] == "drawn", "exact"].astype(bool)
    share = share_of(int(exact.sum()), len(typeset)) if len(typeset) else 1.0
    unknown = f"; of {beyond} more it does not know the letters, and cannot say" if beyond else ""
    return Finding(
        passed=share >= min_share,
        summary=f"{share:.1%} of {len(typeset)} titles set in type are read exactly, and "
        f"{share_of(int(drawn.sum()), len(drawn)):.1%} of those that the model drew; at least "
        f"{min_share:.1%} of the first are expected{unknown}",
        remedy="look at the named posters; try another lettering.style, a larger "
        "lettering.min_width or more lettering.contrast. The limit is checks.min_titles_read",
        expected=f"at least {min_share:g}",
        actual=share,
        offenders=typeset.loc[~exact, ["generation_key", "title", "read", "distance"]],
        numbers={"drawn": share_of(int(drawn.sum()), len(drawn))},
    )


def unmeasured_images(evidence: pd.DataFrame) -> Finding:
    """Rows of `fidelity_scores` (`evidence.EVIDENCE_COLUMNS`) that have failed."""
    failed = evidence[evidence["status"] == "failed"]
    done = len(evidence) - len(failed)
    return Finding(
        passed=failed.empty,
        summary=f"{done} of {len(evidence)} numbers could be measured, or the image is blocked",
        remedy="each reason says what is missing; materialize fidelity_scores again when it is "
        "there. Until then the gate holds the new checkpoint",
        expected=len(evidence),
        actual=done,
        offenders=failed[["metric", "variant", "prompt_id", "seed", "reason"]],
    )


def copied_posters(evidence: pd.DataFrame, max_share: float) -> Finding:
    """Images of tuned models that count as copies of a training poster; as `unmeasured_images`.

    Does not pass either where the holdout posters were too few to say what a copy is, by similarity
    or by perceptual hash, where the bound that they give finds less than half of training posters
    that were altered, or where posters that a checkpoint was trained on cannot be read.
    """
    # A table that an older posterpipe made lacks them.
    later = [
        "copy_threshold", "copy_sensitivity", "lost_posters", "copied_by", "copied_poster",
        "copy_unsure",
    ]  # fmt: skip
    compared = evidence.reindex(columns=[*evidence.columns.union(later, sort=False)])
    compared = compared[(compared["role"] == "copies") & compared["copied"].notna()]
    tuned = compared[is_tuned(compared["variant"])]
    copies = tuned[tuned["copied"].astype(bool)]
    share = share_of(len(copies), len(tuned))
    found = float(tuned["copy_sensitivity"].astype(float).min())
    lost = 0 if tuned.empty else int(tuned["lost_posters"].fillna(0).max())
    unsure = int(tuned["copy_unsure"].astype("boolean").sum())
    verdict = copy_verdict(
        len(copies), len(tuned), max_share, sensitivity=found, lost=lost, unsure=unsure,
        # Each checkpoint has a threshold of its own, by what it was trained on.
        has_threshold=bool(tuned.groupby("checkpoint_id")["copy_threshold"].count().all()),
        images="images of fine-tuned models",
    )  # fmt: skip
    summary = verdict.sentence
    remedy = (
        "the gate rejects this checkpoint: train fewer steps, at a lower rate, or on more "
        "posters. The limit is gate.copy_limit"
    )
    expected: str = f"at most {max_share:g}"
    actual: float | str = share
    if verdict.unknown:
        remedy = (
            "add holdout posters, three or more that are no copies of training posters, to the "
            "folder `holdout`. Until then the gate holds the new checkpoint"
        )
        expected += ", by a threshold from the holdout posters"
        actual = f"{share:g}, without a threshold"
    else:
        summary += f" ({share:.1%}); at most {max_share:.1%} may be"
    if verdict.blind:
        summary += f"; of altered training posters only {found:.0%} would be found"
        remedy = (
            "add posters to the folder `holdout`, so that they tell better how near new ones come. "
            "Until then the gate holds the new checkpoint"
        )
        expected += f", where {LEAST_SENSITIVITY:.0%} of altered training posters are found"
    if verdict.unsure:
        summary += f"; {unsure_told(unsure)}"
        if not (verdict.unknown or verdict.blind):
            remedy = (
                f"add posters to the folder `holdout`, {HASH_POSTERS} or more in all. Until then "
                "the gate holds the new checkpoint"
            )
        expected += ", with images that may be copies by their perceptual hash"
    if verdict.outcome != "fail" and lost:
        summary += f"; {lost} posters that a checkpoint was trained on cannot be read any more"
        remedy = "put the posters back, or leave them out for good, and run the job `retrain`"
        expected += ", of all posters trained on"
    return Finding(
        passed=tuned.empty or verdict.outcome == "pass",
        summary=summary,
        remedy=remedy,
        expected=expected,
        actual=actual,
        offenders=copies[["variant", "prompt_id", "seed", "copied_poster", "copied_by"]],
        numbers={"copies": len(copies)},
    )


def rejected_champion(champion: pd.DataFrame, verdict: str, there: bool) -> Finding:
    """Whether what is served was rejected, or is gone.

    `champion`: the one row of the asset; `verdict`: the gate's latest one about that checkpoint, ""
    for none; `there`: whether its directory is.
    """
    row = champion.iloc[0]
    wrong = verdict == "reject" or not there
    problem = "the gate rejected it" if verdict == "reject" else "its files are gone"
    return Finding(
        passed=not wrong,
        summary=f"the checkpoint {row['checkpoint_id']} is served"
        + (f", and {problem}" if wrong else ""),
        remedy="materialize champion; `posterpipe champion rollback` serves the one before",
        expected="a checkpoint that is there and not rejected",
        actual=int(wrong),
        offenders=pd.DataFrame(
            [(row["checkpoint_id"], problem)] if wrong else [], columns=["checkpoint_id", "problem"]
        ),
    )
