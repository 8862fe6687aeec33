"""Whether the store still holds what its current tables name.

What belongs here: finding what was lost. What does not: what is made again because of it
(`defs.staleness`), what nobody needs any more (`garbage`), and damage inside files, but for tables
that cannot be read.

It is asked every minute, so nothing is opened but the table, and nothing is marked as used: of the
files that it names the folders are listed, at most 256 of blobs. 10,000 posters take about 50 ms.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from posterpipe.core.store import DAMAGED, Store
from posterpipe.core.training.training_set import CSV_NAME

_BLOBS: Mapping[str, tuple[str, str]] = {
    "raw_posters": ("poster_id", ""),
    "holdout_posters": ("poster_id", ""),
    "resized_posters": ("image", ".png"),
    "base_generations": ("image", ".png"),
    "tuned_generations": ("image", ".png"),
    "champion_generations": ("image", ".png"),
    "titled_posters": ("image", ".png"),
}
"""By table: the column that names blobs, and the suffix of their files."""

_SETS: Mapping[str, str] = {"training_csv": "training_set", "class_images": "class_set"}
"""By table: the column that names the folder in which the files of the column `file_name` lie."""

_UNKEPT = "rejected"
"""Status of rows whose blob was never kept."""


def lost_part(store: Store, name: str) -> str:
    """What of the current table `name` is gone, in words; "" where all of it is there.

    That is the table itself, which also counts as gone where it cannot be read, the blobs that it
    names, or its folder of images. Of a table that names no files only the footer is read.
    """
    version = store.table_version(name)
    path = store.root / "tables" / name / f"{version}.parquet"
    if version is None or not path.exists():
        return f"the table {name} is gone" if version is None else f"{path} is gone"
    try:
        if name not in _BLOBS and name not in _SETS:
            pq.read_metadata(path)
            return ""
        table = pq.read_table(path)
    except DAMAGED as error:
        return f"{path} cannot be read ({error})"
    files = _blobs(store, name, table) if name in _BLOBS else _images(store, name, table)
    gone = _gone(files)
    if not gone:
        return ""
    return f"{gone[0]} and {len(gone) - 1} more are gone" if len(gone) > 1 else f"{gone[0]} is gone"


def _blobs(store: Store, name: str, table: pa.Table) -> Iterator[str]:
    column, suffix = _BLOBS[name]
    for blob, status in zip(table[column].to_pylist(), table["status"].to_pylist(), strict=True):
        if blob and status != _UNKEPT:
            yield os.fspath(store.path(blob, suffix))


def _images(store: Store, name: str, table: pa.Table) -> Iterator[str]:
    versions = table[_SETS[name]].to_pylist()
    for version, file_name in zip(versions, table["file_name"].to_pylist(), strict=True):
        yield f"{store.root}/training_sets/{version}/{file_name}"
    for version in set(versions):
        yield f"{store.root}/training_sets/{version}/{CSV_NAME}"


def _gone(files: Iterable[str]) -> list[str]:
    folders: dict[str, set[str]] = defaultdict(set)
    for file in files:
        folder, _, name = file.rpartition("/")
        folders[folder].add(name)
    gone = []
    for folder, names in folders.items():
        try:
            missing = names.difference(os.listdir(folder))
        except OSError:
            missing = names
        gone += [f"{folder}/{name}" for name in missing]
    return sorted(gone)
