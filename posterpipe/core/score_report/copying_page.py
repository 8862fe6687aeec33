"""How near images come to training posters, and which count as copies.

What belongs here: what stands on the page. What does not: markup and style (`copying.html.j2`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from posterpipe.core.champion.gate import copy_verdict, unsure_told
from posterpipe.core.score_report import charts
from posterpipe.core.score_report.data import (
    Nearest,
    Prompt,
    Published,
    Row,
    Shot,
    number,
    text,
    variant_name,
    variant_order,
)
from posterpipe.core.score_report.gallery_pages import (
    alt_text,
    gallery_files,
    picture_of,
    shot_address,
)
from posterpipe.core.score_report.pictures import Pictures
from posterpipe.core.score_report.standing import Standing, standing_of
from posterpipe.core.score_report.words import DASH, count, interval, plural, rounded, share, short
from posterpipe.core.variants import OF_BASE

COPIES_SHOWN = 60


def copying_context(published: Published, pictures: Pictures) -> dict[str, Any]:
    """For `copying.html.j2`: how near images come to training posters; which count as copies.

    Copies are those of the fine-tuned model. Images of the base are flagged by chance, since it saw
    none of the posters: they are counted apart, as the yardstick.
    """
    files = gallery_files(published)
    compared = [(prompt, shot, shot.nearest) for prompt, shot in published.shots if shot.nearest]
    flagged = [one for one in compared if one[2].copied]
    flagged.sort(key=lambda one: -one[2].similarity)
    cards = [
        {
            "image": picture_of(pictures, shot.image),
            "alt": alt_text(prompt, shot.variant, shot.seed),
            "poster": picture_of(pictures, nearest.poster),
            "poster_name": nearest.name,
            "href": shot_address(files, prompt, shot.seed),
            "variant": shot.variant,
            "name": variant_name(shot.variant),
            "seed": shot.seed,
            "cosine": nearest.cosine,
            "bits": nearest.hash_distance,
            "prompt_id": prompt.prompt_id,
        }
        for prompt, shot, nearest in flagged[:COPIES_SHOWN]
    ]
    tuned = [one for one in compared if one[1].variant not in OF_BASE]
    copies = [one for one in tuned if one[2].copied]
    found = _would_find(published, tuned)
    standing = standing_of(published)
    decision = standing.decision if standing else None
    # What the gate knew, and the images do not say: without it the page would pass what it holds.
    lost, unsure = count(decision, "lost_posters"), count(decision, "unsure_images")
    verdict = copy_verdict(
        len(copies), len(tuned), 0.0, sensitivity=found, lost=lost, unsure=unsure,
        has_threshold=any(nearest.threshold is not None for _, _, nearest in tuned),
    )  # fmt: skip
    if not compared:
        headline = "Images have not been compared with posters yet"
    elif not tuned:
        headline = "No image of a fine-tuned model has been compared with posters yet"
    elif verdict.unknown:
        headline = "No image equals a training poster; too few holdout posters tell what is a copy"
    elif verdict.blind:
        headline = f"No copy was found, but only {share(found)} of them would be"
    elif not copies and lost:
        headline = f"No copy was found, but {_unread(lost)} cannot be read"
    elif verdict.unsure and not copies:
        headline = f"No copy was found, but of {plural(unsure, 'image')} that is not sure"
    elif verdict.outcome == "pass":
        headline = "No image of the fine-tuned model counts as a copy"
    else:
        of = f"{plural(len(tuned), 'image')} of the fine-tuned model"
        headline = (
            f"One of {of} counts as a copy"
            if len(copies) == 1
            else f"{len(copies)} of {of} count as copies"
        )
    told = []
    if tuned and not copies:
        told.append(
            f"None of {plural(len(tuned), 'image')} of the fine-tuned model counts as a copy of a "
            "training poster."
        )
    if lost:
        told.append(f"{_unread(lost)} cannot be read any more: copies of such go unseen.")
    if unsure:
        told.append(f"{unsure_told(unsure)}.")
    if cards:
        told.append("The nearest first.")
    if len(flagged) > COPIES_SHOWN:
        told.append(f"{COPIES_SHOWN} of {len(flagged)} are shown.")
    if by_base := len(compared) - len(tuned):
        told.append(
            f"Of the base model, which saw none of these posters, {len(flagged) - len(copies)} of "
            f"{plural(by_base, 'image')} would count: so many do without any copying."
        )
    return {
        "headline": headline,
        "boards": _nearness_tables(published),
        "histogram": _nearness(compared),
        "copies": cards,
        "copies_told": " ".join(told),
        "gate": _gate_check(published, standing),
    }


def _unread(lost: int) -> str:
    return plural(lost, "poster") + " trained on"


def _gate_check(published: Published, standing: Standing | None) -> dict[str, str] | None:
    """The gate's check of copies on this checkpoint, as it was decided last."""
    if standing is None or standing.decision is None:
        return None
    for check in published.rows("gate_checks"):
        same = check["decision_id"] == standing.decision["decision_id"]
        if same and check["check_name"] == "copies":
            outcome, reason = text(check["outcome"]), text(check["reason"])
            return {"outcome": outcome, "reason": reason, "href": standing.href}
    return None


def _would_find(published: Published, compared: Sequence[tuple[Prompt, Shot, Nearest]]) -> float:
    """Which share of altered training posters would count as copies, by the threshold of these
    images; NaN where it was not measured."""
    limits = {nearest.threshold for _, _, nearest in compared}
    known = [
        number(row["copy_sensitivity"])
        for row in published.rows("overfit_and_copy")
        if row["is_current"] and number(row["copy_threshold"]) in limits
    ]
    return min((found for found in known if found is not None), default=math.nan)


def _nearness_tables(published: Published) -> list[dict[str, Any]]:
    """One table an encoder: the current images, then those of earlier checkpoints."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in published.rows("overfit_and_copy"):
        groups.setdefault((text(row["encoder"]), text(row["preprocessing"])), []).append(row)
    tables = []
    for (encoder, preprocessing), rows in groups.items():
        gaps = [
            number(row[n])
            for row in rows
            for n in ("gap_diff_to_sd", "gap_diff_low_95", "gap_diff_high_95")
        ]
        scale = charts.row_scale(gaps, include=(0.0,))
        tables.append(
            {
                "caption": f"Encoder {encoder}, {preprocessing}",
                "rows": [
                    {
                        "variant": text(row["variant"]),
                        "name": variant_name(text(row["variant"])),
                        "checkpoint": short(row["checkpoint_id"], 7),
                        "current": bool(row["is_current"]),
                        "holdout": rounded(row["holdout_similarity"]),
                        "training": rounded(row["training_similarity"]),
                        "gap": rounded(row["overfit_gap"]),
                        "change": (
                            charts.signed(difference)
                            if (difference := number(row["gap_diff_to_sd"])) is not None
                            else DASH
                        ),
                        "interval": interval(
                            row, "gap_diff_low_95", "gap_diff_high_95", sign=True
                        ),
                        "plot": charts.interval_row(
                            number(row["gap_diff_to_sd"]), number(row["gap_diff_low_95"]),
                            number(row["gap_diff_high_95"]), scale, variant=text(row["variant"]),
                            zero=0.0,
                        ),
                        "nearest": rounded(row["nearest_highest"]),
                        "threshold": rounded(row["copy_threshold"]),
                        "sensitivity": share(row["copy_sensitivity"]),
                        "copies": f"{count(row, 'copies')} of {count(row, 'compared')}",
                        "copied": count(row, "copies") > 0,
                    }
                    for row in rows
                ],
                "axis": charts.axis_row(scale, sign=True),
            }
        )  # fmt: skip
    return tables


def _nearness(compared: Sequence[tuple[Prompt, Shot, Nearest]]) -> Markup | None:
    """How near the images of each variant come to their nearest training poster."""
    groups: dict[str, list[float]] = {}
    for _, shot, nearest in compared:
        groups.setdefault(shot.variant, []).append(nearest.similarity)
    if not groups:
        return None
    limits = [n.threshold for _, _, n in compared if n.threshold is not None]
    return charts.histogram(
        "nearness", "Cosine of each image with its nearest training poster, by variant",
        [
            (variant_name(variant), groups[variant], charts.variant_class(variant))
            for variant in sorted(groups, key=variant_order)
        ],
        limit=limits[0] if limits else None,
        limit_label="a copy from here on",
    )  # fmt: skip
