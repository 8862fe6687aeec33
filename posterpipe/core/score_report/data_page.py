"""The state of the data: what is wrong, how fresh it is, and images without a score.

What belongs here: what stands on the page. What does not: markup and style (`data.html.j2`).
"""

from __future__ import annotations

from typing import Any

from posterpipe.core.score_report import charts
from posterpipe.core.score_report.data import Published, Row, number, text, variant_name
from posterpipe.core.score_report.words import (
    DASH,
    ROWS_SHOWN,
    code,
    count,
    cut,
    first_of,
    heads,
    moment,
    short,
)


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
