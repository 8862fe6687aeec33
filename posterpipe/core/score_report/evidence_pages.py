"""Copies, legibility, the gate's log, data quality, glossary.

What belongs here: what stands on these pages. What does not: markup and style (the templates).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from posterpipe.core.gate import LEAST_SENSITIVITY, RULE, copy_verdict
from posterpipe.core.score_report import charts
from posterpipe.core.score_report.data import (
    BASELINE,
    TUNED,
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
from posterpipe.core.score_report.words import (
    DASH,
    DECIDED,
    ROWS_SHOWN,
    code,
    count,
    cut,
    first_of,
    heads,
    interval,
    moment,
    plural,
    rounded,
    share,
    shares,
    short,
)
from posterpipe.core.variants import OF_BASE

# --- overfitting and copies -----------------------------------------------------------------------


def copying_context(published: Published, pictures: Pictures) -> dict[str, Any]:
    """For `copying.html.j2`: how near images come to training posters; which count as copies.

    Copies are those of the fine-tuned model. Images of the base are flagged by chance, since it saw
    none of the posters: they are told apart, as the yardstick.
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
            "cosine": nearest.similarity,
            "bits": nearest.hash_distance,
            "prompt_id": prompt.prompt_id,
        }
        for prompt, shot, nearest in flagged[:COPIES_SHOWN]
    ]
    tuned = [one for one in compared if one[1].variant not in OF_BASE]
    copies = [one for one in tuned if one[2].copied]
    found = _would_find(published, tuned)
    verdict = copy_verdict(
        len(copies), len(tuned), 0.0, sensitivity=found,
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
    }


COPIES_SHOWN = 60


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


# --- legibility -----------------------------------------------------------------------------------


def legibility_context(published: Published, pictures: Pictures) -> dict[str, Any]:
    """For `legibility.html.j2`: how many titles can be read, drawn or set in type, and examples."""
    table = published.rows("legibility")
    lettering = {"set": "set in type", "drawn": "as drawn"}
    rows = [
        {
            "variant": text(row["variant"]),
            "name": variant_name(text(row["variant"])),
            "lettering": lettering.get(text(row["lettering"]), text(row["lettering"])),
            "exact": f"{count(row, 'exact')} of {count(row, 'images')}",
            "share": share(row["exact_share"]),
            "interval": shares(row, "exact_low_95", "exact_high_95"),
            "bar": charts.share_bar(
                number(row["exact_share"]), css=charts.variant_class(text(row["variant"]))
            ),
            "distance": rounded(row["mean_distance"]),
            "distance_interval": interval(
                row, "distance_low_95", "distance_high_95", of="mean_distance"
            ),
            "prompts": count(row, "prompts"),
        }
        for row in sorted(
            table,
            key=lambda row: (row["lettering"] != "drawn", variant_order(text(row["variant"]))),
        )
    ]
    found, asked = (
        sum(count(row, name) for row in table if row["lettering"] == "set")
        for name in ("exact", "images")
    )
    drawn, drawn_asked = (
        sum(count(row, name) for row in table if row["lettering"] == "drawn")
        for name in ("exact", "images")
    )
    headline = "Titles have not been read yet"
    if asked:
        headline = f"{share(found / asked)} of the set titles are read exactly"
        if drawn_asked:
            headline += f", {share(drawn / drawn_asked)} of the drawn ones"
    elif drawn_asked:
        headline = f"{share(drawn / drawn_asked)} of the drawn titles are read exactly"
    misread = [
        [prompt.prompt_id, variant_name(shot.variant), shot.seed, prompt.title,
         shot.read.get("set") or "nothing", charts.plain(shot.distance["set"], 2)]
        for prompt, shot in published.shots
        if shot.distance.get("set", 0.0) > 0
    ]  # fmt: skip
    readers = sorted({text(row["reader"]) for row in table})
    return {
        "headline": headline,
        "rows": rows,
        "caption": f"Reader: {', '.join(readers)}" if readers else "",
        "examples": _title_examples(published, pictures),
        "misread": misread[:ROWS_SHOWN],
        "misread_columns": heads("Prompt", "Variant", "#Seed", "Title", "Read", "#Distance"),
        "misread_told": first_of(misread),
    }


TITLES_SHOWN = 24


def _title_examples(published: Published, pictures: Pictures) -> list[dict[str, Any]]:
    """The first seed of every prompt, of the fine-tuned model where there is one."""
    files = gallery_files(published)
    cards = []
    for prompt in published.prompts:
        seed = prompt.seeds[0]
        shot = prompt.shots.get((seed, TUNED)) or prompt.shots.get((seed, BASELINE))
        if shot is None:
            continue
        drawn, titled = picture_of(pictures, shot.image), picture_of(pictures, shot.titled)
        if drawn is None or titled is None:
            continue
        cards.append(
            {
                "title": prompt.title,
                "href": shot_address(files, prompt, seed),
                "drawn": drawn,
                "drawn_alt": f"As drawn: {alt_text(prompt, shot.variant, seed)}",
                "set": titled,
                "set_alt": f"With the title {prompt.title} set in type",
                "read_drawn": shot.read.get("drawn"),
                "read_set": shot.read.get("set"),
            }
        )
    return cards[:TITLES_SHOWN]


# --- gate -----------------------------------------------------------------------------------------


def gate_context(published: Published) -> dict[str, Any]:
    """For `gate.html.j2`: the gate's rule, and every decision with its checks, the latest first."""
    checks: dict[str, list[Row]] = {}
    for row in published.rows("gate_checks"):
        checks.setdefault(text(row["decision_id"]), []).append(row)
    rows = published.rows("gate_decisions")
    decisions = [_decision(row, checks.get(text(row["decision_id"]), [])) for row in rows][::-1]
    headline = "No checkpoint has been judged yet"
    if decisions:
        latest = decisions[0]
        headline = f"The latest decision: {latest['checkpoint']} was {latest['decision']}"
        if latest["by_person"]:
            headline = f"The latest decision is a person's: {latest['after']} is served"
    return {"headline": headline, "rule": RULE, "decisions": decisions}


def _decision(row: Row, checks: Sequence[Row]) -> dict[str, Any]:
    decision = text(row["decision"])
    return {
        "anchor": f"d-{short(row['decision_id'])}",
        "decision": DECIDED.get(decision, decision) if not row["by_person"] else "by a person",
        "css": "person" if row["by_person"] else decision if decision in DECIDED else "",
        "by_person": bool(row["by_person"]),
        "checkpoint": short(row["checkpoint_id"]),
        "before": short(row["champion_before"]),
        "after": short(row["champion_after"]),
        "when": moment(row["decided_at"]),
        "who": text(row["decided_by"]) if row["by_person"] else "the gate",
        "reason": text(row["reason"]),
        "checks": [
            {
                "name": text(check["check_name"]),
                "outcome": text(check["outcome"]),
                "css": check["outcome"] if check["outcome"] in ("pass", "fail") else "open",
                "value": rounded(check["value"]),
                "interval": interval(check, "low_95", "high_95"),
                "limit": rounded(check["limit_value"]),
                "reason": text(check["reason"]),
            }
            for check in checks
        ],
        "beside": _beside_checks(row),
    }


def _beside_checks(row: Row) -> list[dict[str, Any]]:
    """What checks read beside their own number, where it was measured."""
    found = []
    if number(row["copy_sensitivity"]) is not None:
        found.append(
            {
                "name": "altered posters found",
                "value": rounded(row["copy_sensitivity"]),
                "interval": DASH,
                "limit": rounded(LEAST_SENSITIVITY),
                "reason": "copies: share of training posters, cut and compressed a bit, that would "
                "count as copies",
            }
        )
    if number(row["specific_difference"]) is not None:
        found.append(
            {
                "name": "CLIP-T specific",
                "value": charts.signed(row["specific_difference"]),
                "interval": interval(row, "specific_low_95", "specific_high_95", sign=True),
                "limit": DASH,
                "reason": "CLIP-T: own text less those of other prompts, challenger less champion, "
                f"{count(row, 'specific_prompts')} prompts",
            }
        )
    if number(row["preference_win_rate"]) is not None:
        found.append(
            {
                "name": "preferred by PickScore",
                "value": rounded(row["preference_win_rate"]),
                "interval": interval(row, "preference_win_low_95", "preference_win_high_95"),
                "limit": rounded(0.5),
                "reason": f"fidelity: share of {count(row, 'preference_prompts')} prompts; the "
                f"difference of PickScore is {charts.signed(row['preference_difference'])} "
                f"({interval(row, 'preference_low_95', 'preference_high_95', sign=True)})",
            }
        )
    return found


# --- data quality ---------------------------------------------------------------------------------


def data_context(published: Published) -> dict[str, Any]:
    """For `data.html.j2`: what is wrong with the data, how fresh it is, and unscored images."""
    unscored = [
        [prompt.prompt_id, shot.seed, variant_name(shot.variant), shot.status,
         cut(shot.reason, 200) or "not scored"]
        for prompt, shot in published.shots
        if shot.cosine is None
    ]  # fmt: skip
    images = len(published.shots)
    if not images:
        headline = "Nothing to check yet"
    elif not unscored:
        headline = f"All {images} images have a score"
    else:
        have = "has" if len(unscored) == 1 else "have"
        headline = f"{len(unscored)} of {images} images {have} no score"
    return {
        "headline": headline,
        "quality": _quality(published),
        "sections": [
            _freshness_section(published),
            _metrics_section(published),
            _checkpoints_section(published),
            _publication_section(published),
        ],
        "unscored": unscored[:ROWS_SHOWN],
        "unscored_columns": heads("Prompt", "#Seed", "Variant", "Status", "Reason"),
        "unscored_told": first_of(unscored),
    }


_STATE_CSS = {False: "seg fine", True: "seg problem"}


def _quality(published: Published) -> list[dict[str, Any]]:
    """The states of each section, with their shares."""
    groups: dict[str, list[Row]] = {}
    for row in published.rows("data_quality"):
        groups.setdefault(text(row["section"]), []).append(row)
    return [
        {
            "section": section,
            "explanation": text(rows[0]["explanation"]),
            "total": count(rows[0], "total"),
            "bar": charts.stacked_bar(
                [(number(row["share"]) or 0.0, _STATE_CSS[bool(row["is_problem"])]) for row in rows]
            ),
            "states": [
                {
                    "item": text(row["item"]),
                    "count": count(row, "items"),
                    "problem": bool(row["is_problem"]),
                }
                for row in rows
            ],
        }
        for section, rows in groups.items()
    ]


def _freshness_section(published: Published) -> dict[str, Any]:
    return {
        "title": "Freshness",
        "told": "When something last happened at each stage.",
        "columns": heads("Stage", "Latest", "#Items", "What happened", "Run"),
        "rows": [
            [
                text(row["subject"]), moment(row["latest_at"]) or "never", count(row, "items"),
                text(row["explanation"]), code(short(row["run_id"], 8) or DASH),
            ]
            for row in published.rows("freshness")
        ],
        "absent": "The freshness of the stages is not known.",
        "assets": ["freshness"],
    }  # fmt: skip


def _metrics_section(published: Published) -> dict[str, Any]:
    return {
        "title": "Metrics",
        "told": "Numbers of two metric ids are never mixed.",
        "columns": heads("Name", "What it is", "Preprocessing", "Metric id"),
        "rows": [
            [
                text(row["name"]), text(row["description"]), text(row["preprocessing"]),
                code(row["metric_id"]),
            ]
            for row in sorted(
                published.rows("dim_metric"),
                key=lambda row: (text(row["name"]), text(row["preprocessing"])),
            )
        ],
        "absent": "No metric has been used yet.",
        "assets": ["clip_scores"],
    }  # fmt: skip


def _publication_section(published: Published) -> dict[str, Any]:
    return {
        "title": "This publication",
        "told": "Which snapshot of the database the report was written from, and by what.",
        "columns": heads("Snapshot", "Published", "Run", "posterpipe", "Schema", "dbt", "DuckDB"),
        "rows": [
            [
                code(row["publication_id"]), moment(row["published_at"]),
                code(short(row["run_id"], 8)), text(row["posterpipe"]),
                text(row["schema_version"]), text(row["dbt"]), text(row["duckdb"]),
            ]
            for row in published.rows("publication")
        ],
        "absent": "The database does not tell when it was published.",
        "assets": [],
    }  # fmt: skip


def _checkpoints_section(published: Published) -> dict[str, Any]:
    return {
        "title": "Models",
        "told": "What images were drawn with.",
        "columns": heads("Checkpoint", "Kind", "Training set", "Trained", "First seen"),
        "rows": [
            [
                code(short(row["checkpoint_id"])), text(row["kind"]),
                code(short(row["training_set_version"]) or DASH),
                moment(row["trained_at"]) or DASH, moment(row["first_seen_at"]),
            ]
            for row in published.rows("dim_checkpoint")
        ],
        "absent": "No model has drawn anything yet.",
        "assets": ["base_generations"],
    }  # fmt: skip


# --- glossary -------------------------------------------------------------------------------------


def glossary_context(published: Published) -> dict[str, Any]:
    """For `glossary.html.j2`: the scorer, and between which cosines the images lie."""
    encoder = next(
        (
            text(row["encoder"])
            for row in published.rows("dim_metric")
            if row["metric_id"] == published.headline_metric
        ),
        "",
    )
    values = [shot.cosine for _, shot in published.shots if shot.cosine is not None]
    span = f"{charts.plain(min(values), 2)} to {charts.plain(max(values), 2)}" if values else ""
    return {"encoder": encoder, "span": span, "starter": "starter" in encoder}
