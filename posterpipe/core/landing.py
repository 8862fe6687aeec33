"""A folder of posters into rows.

What belongs here: which files are posters, which of them are usable, and why the others are not.
What does not: changing pixels (`images`) and noticing that the folder changed (`defs`).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from posterpipe.core.images import (
    ImageRejected,
    TooManyPixels,
    decode,
    format_name,
    open_image,
)
from posterpipe.core.parallel import parallel_map
from posterpipe.core.progress import NoProgress, Progress
from posterpipe.core.store import Store, compute_missing, content_key
from posterpipe.settings import ImageSettings

INSPECT_VERSION = 1
"""Raise it when `_inspect` judges otherwise: every file is then read again."""

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif")
"""The thesis's five and four more. They choose files; the format comes from the content."""

NOT_POSTERS = (".txt", ".csv", ".json", ".md", ".toml", ".yaml", ".yml", ".tmp", ".part")
"""Captions, notes and unfinished copies that may lie beside posters: no rows."""

MAX_BYTES = 512 * 1024 * 1024
"""Larger files are not read into memory but refused."""

COLUMNS = [
    "poster_id",
    "source_name",
    "size_bytes",
    "format",
    "width",
    "height",
    "status",
    "reason",
]


class LandingEmpty(Exception):
    """There is nothing to train on. The message names the folder and says what to do."""


def scan(
    folder: Path,
    limits: ImageSettings,
    store: Store | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """One row for each poster file below `folder`, sorted by source_name.

    Columns: poster_id (sha256 of the bytes, "" where they cannot be read), source_name (path
    relative to the folder, posix), size_bytes, format (Pillow's name, by content), width and height
    (pixels as stored, 0 when unknown), status (`ok`, `rejected`, `duplicate`), reason ("" for ok).

    With a `store`, the bytes of usable posters are copied into it, so that later steps do not
    depend on the folder, and a file whose path, size, modification time and inode are unchanged is
    not read again. Raises LandingEmpty when the folder is missing or holds no poster.
    """
    progress = progress or NoProgress()
    files = list(_files(folder))
    if not files:
        raise LandingEmpty(
            f"{folder}: no posters there; put some in ({', '.join(EXTENSIONS)}) "
            "or set POSTERPIPE_LANDING to another folder"
        )
    by_key = {_file_key(path, stats): path for path, stats in files}

    def inspect(keys: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        with progress.task("read posters", len(keys), "files") as tick:
            found = parallel_map(lambda key: _inspect(by_key[key], limits, store), keys)
            for key, row in zip(keys, found, strict=True):
                yield key, row
                tick()

    def usable(row: dict[str, Any]) -> bool:
        if row["transient"]:
            return False
        if not row["decoded"]:
            # Refused by its header: looked at again only when the limit has been raised.
            return row["width"] * row["height"] > limits.max_pixels or not row["width"]
        return bool(row["problem"]) or store is None or store.has(row["poster_id"])

    if store is None:
        facts = dict(inspect(list(by_key)))
    else:
        facts = compute_missing(store, "landing_file", list(by_key), inspect, usable=usable)

    rows = [_row(_source_name(path, folder), facts[key], limits) for key, path in by_key.items()]
    rows.sort(key=lambda row: row["source_name"])
    first: dict[str, str] = {}
    for row in rows:
        if row["status"] != "ok":
            continue
        original = first.setdefault(row["poster_id"], row["source_name"])
        if original != row["source_name"]:
            row["status"] = "duplicate"
            row["reason"] = f"same bytes as {original}"
    return pd.DataFrame(rows, columns=COLUMNS)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    if not folder.is_dir():
        raise LandingEmpty(
            f"{folder}: this folder of posters is not there; create it and put posters in, "
            "or set POSTERPIPE_LANDING to another folder"
        )

    def unreadable(error: OSError) -> None:
        raise LandingEmpty(
            f"{error.filename}: cannot be listed ({error.strerror}); make it readable"
        ) from error

    # os.walk does not follow links to folders, which may run in circles.
    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith(".") or path.suffix.lower() in NOT_POSTERS:
                continue
            try:
                stats = path.stat()
            except FileNotFoundError:
                if not path.is_symlink():
                    continue  # taken away since it was listed
                stats = path.lstat()
            except OSError:
                stats = path.lstat()
            if stat.S_ISREG(stats.st_mode) or stat.S_ISLNK(stats.st_mode):
                yield path, stats


def _source_name(path: Path, folder: Path) -> str:
    name = path.relative_to(folder).as_posix()
    # Names that are no valid UTF-8 could be kept in no table.
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _file_key(path: Path, stats: os.stat_result) -> str:
    where = os.fsencode(os.path.abspath(path)).hex()
    identity = (stats.st_size, stats.st_mtime_ns, stats.st_ino)
    return content_key("landing_file", INSPECT_VERSION, where, identity)


def _inspect(path: Path, limits: ImageSettings, store: Store | None) -> dict[str, Any]:
    """What is true of a file whatever the limits on size are.

    `decoded`: False where `max_pixels` forbade it; `problem`: why the file can be no poster;
    `transient`: whether that may pass by itself, so that the file is looked at again.
    """
    facts: dict[str, Any] = {
        "poster_id": "",
        "size_bytes": 0,
        "format": "",
        "width": 0,
        "height": 0,
        "decoded": True,
        "problem": "",
        "transient": False,
    }
    if path.suffix.lower() not in EXTENSIONS:
        facts["problem"] = (
            f"{path.suffix or 'no extension'}: not one of {', '.join(EXTENSIONS)}; "
            "export it as PNG or remove it"
        )
    try:
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            facts["size_bytes"] = before.st_size
            if before.st_size > MAX_BYTES:
                facts["poster_id"] = hashlib.file_digest(file, "sha256").hexdigest()
                facts["problem"] = (
                    f"{before.st_size} bytes are more than {MAX_BYTES}; export it smaller"
                )
                return facts
            data = file.read()
            after = os.fstat(file.fileno())
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); make it readable or remove it"
        return {**facts, "problem": problem, "transient": True}
    facts["poster_id"] = hashlib.sha256(data).hexdigest()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        problem = "changed while it was read; materialize raw_posters again"
        return {**facts, "problem": problem, "transient": True}
    facts["size_bytes"] = len(data)
    if facts["problem"]:
        return facts
    try:
        image = open_image(data, limits.max_pixels)
        facts.update(format=format_name(image), width=image.width, height=image.height)
        decode(image)
    except TooManyPixels as error:
        width, height = error.size
        facts.update(format=error.format, width=width, height=height, decoded=False)
    except ImageRejected as error:
        facts["problem"] = str(error)
    else:
        if store is not None:
            store.put(data)
    return facts


def _row(source_name: str, facts: dict[str, Any], limits: ImageSettings) -> dict[str, Any]:
    row = {"source_name": source_name, **{name: facts[name] for name in COLUMNS if name in facts}}
    reason = facts["problem"]
    size = (facts["width"], facts["height"])
    if not reason and size[0] * size[1] > limits.max_pixels:
        reason = str(TooManyPixels(size, facts["format"], limits.max_pixels))
    elif not reason and min(size) < limits.min_side:
        reason = (
            f"{size[0]}x{size[1]} pixels: a side is below images.min_side = {limits.min_side}; "
            "use a larger picture"
        )
    return {**row, "status": "rejected" if reason else "ok", "reason": reason}
