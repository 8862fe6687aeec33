"""What all metrics share: the description of one, long rows of scores, and writing them.

What belongs here: `Metric`, the form of a table of scores, what a family of metrics gives, and the
one way scores reach the warehouse. What does not: any number (each family has its module) and
encoders (`encoders`).

A table of scores is long: one row a generation and metric, with the columns generation_key,
metric_id, value (float64, NaN unless ok), status (ok, blocked or failed), reason. A metric whose
value depends on more than image and prompt (the holdout posters, say) carries a digest of that in
its id, so that rows of one id are always comparable and never have to change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from posterpipe.core.images import UNREADABLE
from posterpipe.core.models import revision_of
from posterpipe.core.store import Store, content_key
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.core.warehouse.rows import (
    HELD_COLUMNS,
    insert,
    read_scores,
    record_generations,
    replace_current,
    replace_metrics,
    utc_now,
)
from posterpipe.settings import ScorerSettings

SCORE_COLUMNS = ("generation_key", "metric_id", "value", "status", "reason")

DIGEST_LENGTH = 8


@dataclass(frozen=True)
class Metric:
    """What a metric_id means: one row of `dim_metric`."""

    metric_id: str
    name: str
    """What it is called whatever its encoder: `CLIP-T`, `CLIP-I holdout`, `title exact`."""
    encoder: str
    """Id of the model, or "" where there is none."""
    revision: str
    """The commit of a hub model, the fingerprint of a directory, or ""."""
    preprocessing: str
    version: int
    description: str
    """In words, with unit and range."""


@dataclass(frozen=True)
class Measurement:
    """What a family of metrics gave for a table of generations."""

    metrics: list[Metric]
    scores: pd.DataFrame
    """SCORE_COLUMNS, of each of the metrics."""
    roles: dict[str, str] = field(default_factory=dict)
    """What is read of them by the gate and the charts, by metric_id: see
    `evidence.EVIDENCE_COLUMNS`."""


def encoder_metric(
    metric_id: str, name: str, settings: ScorerSettings, root: Path, version: int, description: str
) -> Metric:
    """A metric that stands on one encoder."""
    return Metric(
        metric_id=metric_id,
        name=name,
        encoder=settings.model.id,
        revision=revision_of(settings.model, root),
        preprocessing=settings.preprocessing,
        version=version,
        description=description,
    )


def digest(values: Iterable[object]) -> str:
    """8 hex digits of what a metric is measured against, whatever the order."""
    return content_key(sorted(map(str, values)))[:DIGEST_LENGTH]


def image_files(store: Store, drawn: pd.DataFrame) -> dict[str, Path]:
    """Where the images of generations lie, by content hash."""
    return {str(r.image): store.root / str(r.image_path) for r in drawn.itertuples(index=False)}


def encoding_failures(drawn: pd.DataFrame, unreadable: Mapping[str, str]) -> dict[str, str]:
    """Why generations have no embedding, by generation_key; `unreadable`: by content hash."""
    return {
        str(row.generation_key): unreadable.get(str(row.image), "not encoded")
        for row in drawn.itertuples(index=False)
    }


def score_rows(
    generations: pd.DataFrame,
    metric_id: str,
    values: Mapping[str, float],
    failures: Mapping[str, str],
) -> pd.DataFrame:
    """The scores (SCORE_COLUMNS) of a table of generations, in its order.

    `values` and `failures` (reasons) go by generation_key. A generation that is not ok keeps its
    own status and reason and has no value; one that is ok and has no finite value has failed.
    """
    rows: list[tuple[str, str, float, str, str]] = []
    for row in generations.itertuples(index=False):
        key = str(row.generation_key)
        value = float(values.get(key, np.nan))
        if row.status != "ok":
            rows.append((key, metric_id, np.nan, str(row.status), str(row.reason)))
        elif np.isfinite(value):
            rows.append((key, metric_id, value, "ok", ""))
        else:
            reason = failures.get(key, "the metric gave no finite number")
            rows.append((key, metric_id, np.nan, "failed", reason))
    return pd.DataFrame(rows, columns=list(SCORE_COLUMNS)).astype({"value": "float64"})


def summary(scores: pd.DataFrame, value: str, *by: str) -> pd.DataFrame:
    """How many images there are for each value of the columns `by`, in the order of the table, with
    mean and standard deviation of the column `value`: images, mean, deviation."""
    values = scores.groupby(list(by), sort=False)[value]
    return values.agg(images="size", mean="mean", deviation="std").reset_index()


def unread_count(images: pd.DataFrame, rows: pd.DataFrame) -> int:
    """How many images have no result since their file could not be read, which may pass by itself.

    `images`: generation_key and status; `rows`: what was made of them, with generation_key, status
    and reason. An image that was not drawn does not count: it comes when it is drawn.
    """
    drawn = images.loc[images["status"] == "ok", "generation_key"]
    unread = rows["reason"].astype(str).str.contains(UNREADABLE, regex=False)
    unread &= (rows["status"] == "failed") & rows["generation_key"].isin(drawn)
    return int(rows.loc[unread, "generation_key"].nunique())


def record_scores(
    warehouse: Warehouse,
    generations: pd.DataFrame,
    metrics: Sequence[Metric],
    scores: pd.DataFrame,
    *,
    run_id: str,
    step: str,
    others: Sequence[Metric] = (),
    make_current: bool = False,
) -> pd.DataFrame:
    """Adds scores (SCORE_COLUMNS) with their images, prompts, checkpoints and metrics, at once.

    Rows that are there stay as they are, but a success replaces a failure. `step` names who scores:
    these metrics are the ones that it uses from now on, and reports leave out its previous ones.
    `others`: metrics of scores that reports about the images of now leave out as well.
    `make_current` makes `generations` the images that reports are about. Returns what the warehouse
    holds of the first metric now (see `Warehouse.scores`), failed ones included: a score that
    another run wrote first is the one that counts. Raises WarehouseBusy.
    """
    now = utc_now()
    described = pd.DataFrame([asdict(metric) for metric in [*metrics, *others]])
    with warehouse.write() as connection:
        record_generations(connection, generations, run_id=run_id, recorded_at=now)
        insert(connection, "dim_metric", described.assign(first_seen_at=now))
        written = insert(connection, "fct_score", scores.assign(scored_at=now, run_id=run_id))
        replace_metrics(connection, step, [metric.metric_id for metric in metrics])
        if make_current:
            replace_current(connection, generations["generation_key"])
        keys, first = generations["generation_key"], metrics[0].metric_id
        own = scores[(scores["metric_id"] == first) & scores["generation_key"].isin(keys)]
        if written == len(scores) and keys.isin(own["generation_key"]).all():
            # The table has all of them as they are here, which saves looking through millions.
            return own[list(HELD_COLUMNS)].reset_index(drop=True)
        return read_scores(connection, first, keys, with_failed=True)
