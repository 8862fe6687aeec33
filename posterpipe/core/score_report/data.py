"""What the score report is about, read from the published database.

What belongs here: queries, and their answers in the form in which pages show them. What does not:
markup (`charts`, the templates), image files (`pictures`), and statistics: these are the marts'
(`dbt_like_reports`).

The published database is the one source: what it does not hold is not in the report. A mart that is
not there, or lacks one of the required columns (it was built by an older project), counts as not
built, and its section says what to materialize. Columns that came later (`LATER`) are not required.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import duckdb
import pandas as pd

from posterpipe.core.store import content_key
from posterpipe.core.variants import LABELS
from posterpipe.core.warehouse.database import WarehouseMissing

BASELINE = "sd"
TUNED = "dreambooth"
"""Loss and gain of a prompt are those of fine-tuning alone: `dreambooth` less `sd`."""

TO_BASELINE: Mapping[str, str] = {
    "sd_negative": "negative on base",
    "dreambooth": "tuned without negative",
    "dreambooth_negative": "both",
}
"""The comparison of `paired_effects` that a variant's difference to the baseline is."""

MARTS: Mapping[str, tuple[str, ...]] = {
    "leaderboard": (
        "metric_id", "metric", "better", "is_headline", "variant", "checkpoint_id", "prompts",
        "images", "blocked", "failed", "mean", "low_95", "high_95", "diff_prompts", "diff_to_sd",
        "diff_low_95", "diff_high_95", "clip_score", "clip_score_low_95", "clip_score_high_95",
    ),
    "paired_effects": (
        "metric_id", "metric", "better", "scale", "is_headline", "is_primary", "family",
        "comparison", "question", "prompts", "pairs", "mean_difference", "low_95", "high_95",
        "finding", "p_value", "p_adjusted", "effect_size", "win_rate", "win_low_95",
        "win_high_95", "detectable_difference",
    ),
    "checkpoint_trend": (
        "checkpoint_id", "kind", "trained_at", "variant", "metric_id", "metric", "better",
        "scale", "is_headline", "prompts", "is_complete", "mean", "low_95", "high_95", "decision",
        "is_champion", "is_current",
    ),
    "prompt_drilldown": (
        "prompt_id", "seed", "variant", "prompt", "score_text", "title", "negative_prompt",
        "generation_key", "status", "reason", "image_path", "titled_image_path", "clip_cosine",
        "clip_diff_to_sd", "clip_specific", "nearest_similarity", "copy_threshold",
        "nearest_poster", "nearest_poster_name", "nearest_poster_path", "hash_distance",
        "hash_poster", "hash_poster_name", "hash_poster_path", "copied", "read_drawn", "read_set",
        "title_distance_drawn", "title_distance_set",
    ),
    "overfit_and_copy": (
        "checkpoint_id", "variant", "encoder", "preprocessing", "is_current", "compared",
        "holdout_similarity", "training_similarity", "overfit_gap", "gap_diff_to_sd",
        "gap_diff_low_95", "gap_diff_high_95",
        "nearest_highest", "copy_threshold", "copy_sensitivity", "copies",
    ),
    "legibility": (
        "lettering", "variant", "reader", "prompts", "images", "exact",
        "exact_share", "exact_low_95", "exact_high_95", "mean_distance", "distance_low_95",
        "distance_high_95",
    ),
    "gate_decisions": (
        "decision_id", "decided_at", "checkpoint_id", "base_model", "champion_before", "decision",
        "reason", "decided_by", "by_person", "pins", "champion_after", "copy_sensitivity",
        "lost_posters", "specific_difference",
        "specific_low_95", "specific_high_95", "specific_prompts", "preference_difference",
        "preference_low_95", "preference_high_95", "preference_prompts", "preference_win_rate",
        "preference_win_low_95", "preference_win_high_95",
    ),
    "gate_checks": (
        "decision_id", "place", "check_name", "outcome", "value", "low_95", "high_95",
        "limit_value", "reason",
    ),
    "data_quality": (
        "section", "item", "items", "total", "share", "is_problem", "explanation",
    ),
    "freshness": ("subject", "latest_at", "run_id", "items", "explanation"),
    "publication": (
        "publication_id", "published_at", "run_id", "posterpipe", "schema_version", "dbt", "duckdb",
    ),
    "dim_metric": ("metric_id", "name", "encoder", "preprocessing", "description"),
    "dim_checkpoint": (
        "checkpoint_id", "kind", "training_set_version", "trained_at", "first_seen_at",
    ),
}  # fmt: skip
"""What is read, with the columns that the pages need."""

LATER: Mapping[str, tuple[str, ...]] = {
    "paired_effects": ("rests_on", "mean_without", "low_95_without", "high_95_without"),
    "gate_decisions": ("unsure_images",),
    "gate_checks": ("detectable",),
    "legibility": ("unknown_titles",),
}
"""Columns that marts of older projects lack: then they hold nothing."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """An image in the store."""

    blob: str
    """Content hash, or that of the path where it is not named by one."""
    path: str
    """Inside the store."""


@dataclass(frozen=True)
class Nearest:
    """What comparing an image with the training posters gave."""

    similarity: float
    """The highest cosine."""
    threshold: float | None
    copied: bool
    poster: Stored | None
    """The nearest one by cosine; by perceptual hash, where that alone makes the image a copy."""
    name: str
    """Its file in the landing folder."""
    cosine: float | None
    """With this poster; None where another one is nearer by cosine."""
    hash_distance: int | None
    """Bits of 64, from this poster; None where another one is nearer by hash."""


@dataclass(frozen=True)
class Shot:
    """One generated image of the gallery."""

    key: str
    variant: str
    seed: int
    status: str
    reason: str
    image: Stored | None
    cosine: float | None
    difference: float | None
    """To the baseline's image of the same prompt and seed."""
    specific: float | None
    """The cosine less the mean of those with the texts of the other prompts."""
    titled: Stored | None
    nearest: Nearest | None
    """The training poster it is nearest to, where they were compared."""
    read: Mapping[str, str]
    """What the text recogniser read, by lettering, `drawn` or `set`, where it did."""
    distance: Mapping[str, float]
    """How far that is from the title, 0 to 1."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of the suite with all its images."""

    prompt_id: str
    prompt: str
    score_text: str
    title: str
    negative: str
    seeds: tuple[int, ...]
    shots: Mapping[tuple[int, str], Shot]
    """By seed and variant."""
    effects: tuple[float, ...]
    """`dreambooth` less `sd`, of the seeds that have both."""

    @property
    def effect(self) -> float | None:
        """Their mean."""
        return sum(self.effects) / len(self.effects) if self.effects else None

    @property
    def lowest(self) -> float | None:
        """The lowest mean cosine of a variant."""
        by_variant: dict[str, list[float]] = {}
        for shot in self.shots.values():
            if shot.cosine is not None:
                by_variant.setdefault(shot.variant, []).append(shot.cosine)
        return min((sum(v) / len(v) for v in by_variant.values()), default=None)


@dataclass(frozen=True)
class Published:
    """Everything that the pages show."""

    marts: Mapping[str, pd.DataFrame]
    """Those that are there."""
    prompts: tuple[Prompt, ...]

    def rows(self, mart: str) -> list[Row]:
        """The rows of a mart; none where it was not built."""
        table = self.marts.get(mart)
        return [] if table is None else records(table)

    def to_baseline(self, metric_id: str) -> dict[str, Row]:
        """Of `paired_effects`, by variant: its difference to the baseline by that metric."""
        rows = {
            text(row["comparison"]): row
            for row in self.rows("paired_effects")
            if row["metric_id"] == metric_id
        }
        return {
            variant: rows[comparison]
            for variant, comparison in TO_BASELINE.items()
            if comparison in rows
        }

    @property
    def shots(self) -> list[tuple[Prompt, Shot]]:
        """All images of the gallery with their prompts."""
        return [(prompt, shot) for prompt in self.prompts for shot in prompt.shots.values()]

    @property
    def variants(self) -> list[str]:
        """Those that have an image, as they stand side by side."""
        return sorted({shot.variant for _, shot in self.shots}, key=variant_order)

    @property
    def headline_metric(self) -> str | None:
        """The metric that variants are ranked by."""
        rows = self.rows("leaderboard")
        named = [text(row["metric_id"]) for row in rows if row["is_headline"]]
        return next(iter(named), None)

    @property
    def scored_at(self) -> dt.datetime | None:
        """When the latest score was written, in UTC."""
        for row in self.rows("freshness"):
            if row["subject"] == "scores" and isinstance(row["latest_at"], dt.datetime):
                return None if row["latest_at"] is pd.NaT else row["latest_at"]
        return None


def read_published(path: Path) -> Published:
    """Everything for the pages. Raises WarehouseMissing where nothing was published."""
    path = Path(path)
    if not path.exists():
        raise WarehouseMissing(
            f"{path}: no scores have been published yet; materialize the asset `published_scores`"
        )
    with duckdb.connect(str(path), read_only=True) as connection:
        marts = {}
        for name, columns in MARTS.items():
            table = _table(connection, name, columns, LATER.get(name, ()))
            if table is not None:
                marts[name] = table
    images = marts.get("prompt_drilldown")
    return Published(marts, () if images is None else _prompts(records(images)))


def _table(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    columns: tuple[str, ...],
    later: tuple[str, ...],
) -> pd.DataFrame | None:
    found = connection.execute(
        "SELECT column_name FROM duckdb_columns() WHERE table_name = ? AND NOT internal", [name]
    ).fetchall()
    there = {str(row[0]) for row in found}
    if not set(columns) <= there:
        return None
    listed = ", ".join(
        f'"{column}"' if column in there else f'NULL AS "{column}"' for column in (*columns, *later)
    )
    # The order of rows is the mart's; a table of DuckDB keeps it.
    return connection.execute(f'SELECT {listed} FROM "{name}"').df()


def _prompts(rows: list[Row]) -> tuple[Prompt, ...]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(text(row["prompt_id"]), []).append(row)
    return tuple(_prompt(prompt_id, groups[prompt_id]) for prompt_id in sorted(groups))


def _prompt(prompt_id: str, rows: list[Row]) -> Prompt:
    shots = {(shot.seed, shot.variant): shot for shot in map(_shot, rows)}
    first = rows[0]
    negatives = [text(row["negative_prompt"]) for row in rows]
    return Prompt(
        prompt_id=prompt_id,
        prompt=text(first["prompt"]),
        score_text=text(first["score_text"]),
        title=text(first["title"]),
        negative=next(filter(None, negatives), ""),
        seeds=tuple(sorted({seed for seed, _ in shots})),
        shots=shots,
        effects=tuple(
            shots[place].difference or 0.0
            for place in sorted(shots)
            if place[1] == TUNED and shots[place].difference is not None
        ),
    )


_SAME = 0.999999
"""`metrics.fidelity.SAME_COSINE`, as the published column is rounded."""


def _nearest(row: Row) -> Nearest | None:
    similarity, bits = number(row["nearest_similarity"]), number(row["hash_distance"])
    if similarity is None:
        return None
    threshold = number(row["copy_threshold"])
    copied = not missing(row["copied"]) and bool(row["copied"])
    by_hash = (
        copied
        and bits is not None
        and similarity < _SAME  # which is a copy whatever the threshold is
        and (threshold is None or similarity <= threshold)
    )
    same = text(row["nearest_poster"]) == text(row["hash_poster"])
    return Nearest(
        similarity=similarity,
        threshold=threshold,
        copied=copied,
        poster=_stored(row["hash_poster_path" if by_hash else "nearest_poster_path"]),
        name=text(row["hash_poster_name" if by_hash else "nearest_poster_name"]),
        cosine=similarity if same or not by_hash else None,
        hash_distance=int(bits) if bits is not None and (same or by_hash) else None,
    )


def _shot(row: Row) -> Shot:
    distances = {where: number(row[f"title_distance_{where}"]) for where in ("drawn", "set")}
    return Shot(
        key=text(row["generation_key"]),
        variant=text(row["variant"]),
        seed=int(row["seed"]),
        status=text(row["status"]),
        reason=text(row["reason"]),
        image=_stored(row["image_path"]),
        cosine=number(row["clip_cosine"]),
        difference=number(row["clip_diff_to_sd"]),
        specific=number(row["clip_specific"]),
        titled=_stored(row["titled_image_path"]),
        nearest=_nearest(row),
        read={
            where: text(row[f"read_{where}"])
            for where in ("drawn", "set")
            if not missing(row[f"read_{where}"])
        },
        distance={where: value for where, value in distances.items() if value is not None},
    )


def _stored(path: Any) -> Stored | None:
    """The store names files by their content hash."""
    name = text(path)
    if not name:
        return None
    place = PurePosixPath(name)
    own = place.stem if place.parts[0] == "blobs" and place.stem.isalnum() else content_key(name)
    return Stored(own, name)


def variant_order(variant: str) -> tuple[int, str]:
    """Sorts variants as they stand side by side."""
    known = list(LABELS)
    return (known.index(variant) if variant in known else len(known), variant)


def variant_name(variant: str) -> str:
    """What a variant is called on the pages."""
    return LABELS.get(variant, variant)


def records(table: pd.DataFrame) -> list[Row]:
    """The rows of a table."""
    return [{str(k): v for k, v in row.items()} for row in table.to_dict(orient="records")]


def missing(value: Any) -> bool:
    """Whether a cell holds nothing."""
    return value is None or value is pd.NA or value is pd.NaT or value != value


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if missing(value):
        return None
    found = float(value)
    return found if math.isfinite(found) else None


def text(value: Any) -> str:
    """A text; "" for a missing one."""
    return "" if missing(value) else str(value)
