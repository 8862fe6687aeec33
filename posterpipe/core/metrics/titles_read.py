"""Titles as they were drawn, set and read, in the warehouse.

What belongs here: reading both letterings of each image, and recording what came of it. What does
not: reading itself (`legibility`), and setting titles in type (`typography`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from posterpipe.core.metrics.base import Metric, record_scores, unread_count
from posterpipe.core.metrics.legibility import measure_legibility, of_all_titles
from posterpipe.core.progress import Progress
from posterpipe.core.store import Store
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.core.warehouse.rows import delete_titles, insert, take_back_titles, utc_now

COLUMNS = [
    "generation_key",
    "lettering",
    "title",
    "status",
    "read",
    "distance",
    "exact",
    "measurable",
]


@dataclass(frozen=True)
class TitlesRead:
    """What was read of lettered images."""

    table: pd.DataFrame
    """COLUMNS, as of `legibility.of_all_titles`; `lettering` is drawn (by the model) or set (in
    type). Two rows an image."""
    unread: int
    """Images that could not be read now and may be the next time, see `base.unread_count`."""


def read_titles(
    store: Store,
    warehouse: Warehouse,
    generations: pd.DataFrame,
    titled: pd.DataFrame,
    progress: Progress,
    *,
    set_by: str,
    run_id: str,
) -> TitlesRead:
    """Reads each lettered image as it was drawn and as its title was set, and records both.

    `generations`: all images, `generations.COLUMNS`. `titled`: those that are lettered,
    `typography.TITLED_COLUMNS`. `set_by`: how their titles were set, `typography.lettering_id`.
    """
    record_titles(warehouse, titled, generations["generation_key"], run_id=run_id)
    lettered = generations[generations["generation_key"].isin(titled["generation_key"])]
    tables, unread = [], 0
    for lettering, images, version in (("drawn", lettered, ""), ("set", titled, set_by)):
        found = measure_legibility(store, images, lettering, progress, lettering=version)
        record_scores(
            warehouse, generations, found.metrics, found.scores,
            run_id=run_id, step=f"legibility_scores {lettering}",
        )  # fmt: skip
        record_unknown_titles(warehouse, found.metrics, found.unknown)
        record_readings(warehouse, found.read, lettering, run_id=run_id)
        tables.append(of_all_titles(images, found.read).assign(lettering=lettering))
        unread += unread_count(images, found.scores)
    return TitlesRead(pd.concat(tables, ignore_index=True)[COLUMNS], unread)


def record_titles(
    warehouse: Warehouse, titled: pd.DataFrame, generation_keys: Iterable[str], *, run_id: str
) -> None:
    """Adds the titled posters (`typography.TITLED_COLUMNS`), so that reports can show them.

    Those of `generation_keys` that are not among them are lettered no more: what is known of their
    titles goes, and reports count them no more.
    """
    names = ["generation_key", "title", "image", "image_path", "style", "cap_height", "contrast",
             "scrim", "covered", "status", "reason"]  # fmt: skip
    now = utc_now()
    without = pd.Series(list(generation_keys), dtype="str")
    without = without[~without.isin(titled["generation_key"])]
    with warehouse.write() as connection:
        insert(connection, "fct_title", titled[names].assign(set_at=now, run_id=run_id))
        delete_titles(connection, without)


def record_readings(
    warehouse: Warehouse, read: pd.DataFrame, lettering: str, *, run_id: str
) -> None:
    """Adds what `legibility.measure_legibility` read; `lettering` is drawn or set."""
    now = utc_now()
    with warehouse.write() as connection:
        insert(
            connection, "fct_reading", read.assign(lettering=lettering, read_at=now, run_id=run_id)
        )


def record_unknown_titles(
    warehouse: Warehouse, metrics: Sequence[Metric], reasons: Mapping[str, str]
) -> None:
    """Takes back what an older posterpipe measured of titles (with the reasons why it could not,
    see `Legibility.unknown`) in letters that the reader does not know."""
    if not reasons:
        return
    with warehouse.write() as connection:
        take_back_titles(
            connection,
            [metric.metric_id for metric in metrics],
            pd.DataFrame(list(reasons.items()), columns=["title", "reason"]),
        )
