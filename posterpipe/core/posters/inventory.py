"""What the dataset holds now, one row a file of the landing folder, for the reports.

What belongs here: putting the tables of ingest and dataset beside each other. What does not:
judging posters (`landing`), captions (`captions`, `captioner`), and counting (the dbt project).
"""

from __future__ import annotations

import pandas as pd

from posterpipe.core.store import Store
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.core.warehouse.rows import replace_posters, utc_now

INVENTORY_COLUMNS = (
    "poster_id", "source_name", "status", "reason", "format", "width", "height", "size_bytes",
    "near_duplicate_of", "image", "image_path", "caption", "caption_source", "caption_status",
    "caption_reason", "in_training_set",
)  # fmt: skip
"""Columns of current_poster but for when and who; only usable posters have image and caption."""


def take_inventory(
    store: Store,
    raw: pd.DataFrame,
    resized: pd.DataFrame,
    captions: pd.DataFrame,
    training_set: pd.DataFrame,
) -> pd.DataFrame:
    """The inventory (INVENTORY_COLUMNS) of the tables raw_posters, resized_posters,
    poster_captions and training_csv."""
    images = resized.loc[resized["status"] == "ok", ["poster_id", "image"]]
    words = captions[["poster_id", "caption", "source", "status", "reason"]]
    words = words.rename(columns={name: f"caption_{name}" for name in words.columns[2:]})
    usable = raw["status"] == "ok"
    rows = raw[usable].merge(images, on="poster_id", how="left")
    rows = rows.merge(words, on="poster_id", how="left")
    # Other files have no image of their own: a duplicate is used under the name that came first.
    rows = pd.concat([rows, raw[~usable]], ignore_index=True)
    drawn = rows["image"].notna()
    rows["image_path"] = [
        store.relative(str(image), ".png") if there else None
        for image, there in zip(rows["image"], drawn, strict=True)
    ]
    rows["in_training_set"] = drawn & rows["image"].isin(training_set["image"])
    rows = rows.sort_values(["source_name", "poster_id"], kind="stable", ignore_index=True)
    return rows[list(INVENTORY_COLUMNS)]


def record_inventory(warehouse: Warehouse, inventory: pd.DataFrame, *, run_id: str) -> None:
    """Makes these posters the ones that reports are about. Raises WarehouseBusy."""
    now = utc_now()
    with warehouse.write() as connection:
        replace_posters(connection, inventory.assign(recorded_at=now, run_id=run_id))
