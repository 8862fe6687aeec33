"""What a materialization tells, beside its table: the entries of its metadata, and their forms.

What belongs here: the names of entries and tags that other modules read again, and how columns,
tables and images are shown in the UI. What does not: which asset tells what (each with its asset),
and pictures themselves (`core.gallery`).
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator, Sequence
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

if TYPE_CHECKING:
    from pandas import DataFrame as Table
    from PIL.Image import Image

DATA_VERSION = "dagster/data_version"
"""Tag of a materialization: its data version."""

TABLE_VERSION = "table_version"
"""Metadata entry of a materialization: under which version the store keeps its table."""

INPUTS_READ = "input_data_versions_read"
"""Metadata entry of a materialization: the data version of each table that its step has read. What
Dagster notes is the version when the step started; another run may have written since."""

MODEL_FINGERPRINT = "model_fingerprint"
"""Metadata entry of a materialization: the model that it was made with."""

WAREHOUSE = "warehouse_identity"
"""Metadata entry of what fills the warehouse: into which file it wrote."""

SOURCE_DIGEST = "source_digest"
"""Metadata entry of a root asset's materialization: digest of what it was made from (the listing of
the posters, the content of a file), by which the arrivals sensor knows what was read already."""

SOURCE_PORTABLE = "source_portable_digest"
"""The same without what another host may see otherwise of the same files: by it the sensor knows
whether a run saw what it was requested for."""

UNREAD = "unread"
"""Metadata entry of a root asset's materialization: files that could not be read this time."""

FAILED_ITEMS = "failed_items"
"""Metadata entry of a materialization: items that failed and may succeed when tried again."""

CHAMPION = "champion"
"""Metadata entry: the checkpoint that is served, or that the newest one has to beat."""

CHALLENGER = "challenger"
"""Metadata entry: the checkpoint that is judged."""

BASE_MODEL = "base_model"
"""Metadata entry: fingerprint of the base model, which is champion before any other."""

LAST_DECISION = "last_decision"
"""Metadata entry of `champion`: the latest decision that it knows of."""

HELD_OUT = "held_out_posters"
"""Metadata entry of a checkpoint whose training they could stop: version of the table of held-out
posters, "" before there was one."""

THUMBNAILS = 32
"""Images of a contact sheet in the UI."""

_CAPTIONED, _CAPTION_LINES = 16, 5
"""Images that are shown with their captions, and lines of these, of about twelve letters: more
images would have to be made smaller for the event log, and their captions illegible."""

_ROWS_SHOWN = 100
"""Rows of a table in the UI; every one lies in the event log for ever."""


def columns(**descriptions: str) -> dict[str, dg.TableSchema]:
    """Definition metadata that describes the columns of an asset's table.

    Each argument is `name="type: description"`.
    """
    described = []
    for name, text in descriptions.items():
        kind, _, description = text.partition(": ")
        described.append(dg.TableColumn(name, kind, description))
    return {"dagster/column_schema": dg.TableSchema(columns=described)}


def table_preview(table: Table, names: Sequence[str] | None = None) -> dg.TableMetadataValue:
    """The first rows of a table as the UI shows them."""
    shown = table[list(names)] if names else table
    records = [
        dg.TableRecord({str(name): _cell(value) for name, value in row.items()})
        for row in shown.head(_ROWS_SHOWN).to_dict(orient="records")
    ]
    kinds = {str(name): _kind(shown[name]) for name in shown.columns}
    schema = dg.TableSchema(columns=[dg.TableColumn(name, kind) for name, kind in kinds.items()])
    return dg.MetadataValue.table(records=records, schema=schema)


def rows(table: Table) -> Iterator[Any]:
    """The rows of a table as named tuples."""
    from posterpipe.core.store import cells

    row = namedtuple("row", map(str, table.columns), rename=True)  # type: ignore[misc]
    return starmap(row, cells(table, *table.columns))


def counts(table: Table, column: str) -> dict[str, int]:
    """How often each value of a column occurs, for the numbers that the UI plots over time."""
    return {str(value): int(count) for value, count in table[column].value_counts().items()}


def thumbnails(
    images: Sequence[tuple[Path | Image, str]],
    *,
    total: int | None = None,
    shown: int = THUMBNAILS,
    label_lines: int = 1,
) -> dg.MarkdownMetadataValue:
    """Some images with their labels as one small picture that fits into the event log.

    `total`: how many there are, where `images` are only the first ones. `label_lines`: lines that
    a label wraps to at most.
    """
    from posterpipe.core.gallery import contact_sheet, markdown_image

    if not images:
        return dg.MetadataValue.md("no images")
    sheet = contact_sheet(images[:shown], cell=(72, 108), label_lines=label_lines)
    total = total or len(images)
    alt = f"{total} images" if total <= shown else f"{shown} of {total} images"
    return dg.MetadataValue.md(markdown_image(sheet, alt))


def captioned_thumbnails(
    images: Sequence[tuple[Path | Image, str]], *, total: int
) -> dg.MarkdownMetadataValue:
    """The same of images with captions: these begin alike as a rule, and their ends differ."""
    from posterpipe.core.gallery import without_shared_ends

    images = images[:_CAPTIONED]
    captions = without_shared_ends([caption for _, caption in images])
    labelled = [(image, caption) for (image, _), caption in zip(images, captions, strict=True)]
    return thumbnails(labelled, total=total, shown=_CAPTIONED, label_lines=_CAPTION_LINES)


def _cell(value: Any) -> str | int | float | bool | None:
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return None if value != value else round(value, 6)
    return str(value)


def _kind(column: Any) -> str:
    return {"i": "int", "f": "float", "b": "bool"}.get(column.dtype.kind, "string")
