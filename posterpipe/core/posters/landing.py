"""A folder or bucket of posters into rows.

What belongs here: which files are posters, which of them are usable, why the others are not, and
which resemble another. What does not: listing and reading (`listing`), files that changed behind
their date (`rereading`), changing pixels (`images`) and noticing that something arrived
(`arrivals`).

A file is read once: as long as its path, size, modification time and inode (or ETag) stay, the
hash of its bytes is known. An image is decoded once: what is true of some bytes is kept under
their hash, under whatever name and date they come again.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd

from posterpipe.core.images import (
    UNREADABLE,
    ImageRejected,
    TooManyPixels,
    decode_for_looks,
    format_name,
    open_image,
    perceptual_hash,
)
from posterpipe.core.memory import TOO_LITTLE_MEMORY
from posterpipe.core.parallel import cores, parallel_map
from posterpipe.core.posters.listing import (
    Entry,
    Place,
    PlaceMissing,
    SourceChanged,
    listing_digest,
    source_name,
    suffix,
)
from posterpipe.core.posters.near_duplicates import earliest_near_duplicates
from posterpipe.core.posters.rereading import (
    CHANGED,
    Rehash,
    forget_changed,
    reason_of,
    rehashed,
    reread,
)
from posterpipe.core.progress import NO_PROGRESS, Progress
from posterpipe.core.store import Store, compute_missing, content_key
from posterpipe.settings import ImageSettings

INSPECT_VERSION = 4
"""Raise it when `_judge` or `_inspect` judges differently: every file is then judged again."""

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
    "perceptual_hash",
    "status",
    "reason",
    "near_duplicate_of",
]

_FILES, _CONTENTS, REHASHED = "landing_file", "poster_content", "landing_rehashed"
_SAVE_EVERY = 16

_PASSING = (CHANGED, UNREADABLE, TOO_LITTLE_MEMORY)
"""How reasons begin that may pass by themselves."""

MEMORY_BYTES = 2**30
"""Of posters that are in memory, undecoded, at one moment. A larger one is there alone."""


class _Allowance:
    """So many bytes for all threads together."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._changed = threading.Condition()

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Waits until `size` bytes, or all of them, are free."""
        size = min(size, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


# A bucket is read by many threads, and a decoded poster may take half a gigabyte.
_reading = _Allowance(MEMORY_BYTES)
_decoding = threading.BoundedSemaphore(cores())


class LandingEmpty(Exception):
    """There is nothing to train on, or to hold out. The message names the folder and says what to
    do."""


def scan(
    place: Place,
    limits: ImageSettings,
    store: Store,
    progress: Progress = NO_PROGRESS,
    *,
    entries: Sequence[Entry] | None = None,
) -> pd.DataFrame:
    """One row for each poster file of a folder or bucket, sorted by source_name.

    Columns: poster_id (sha256 of the bytes, "" where they cannot be read), source_name (path
    relative to the folder, posix), size_bytes, format (Pillow's name, by content), width and height
    (pixels as stored, 0 when unknown), perceptual_hash (16 hex digits; "" unless ok), status (`ok`,
    `rejected`, `duplicate`), reason ("" for ok), near_duplicate_of (the first ok poster before it
    whose hash differs in at most `limits.near_duplicate_distance` bits, or ""; its status stays).

    The bytes of usable posters are copied into the `store`, so that later steps do not depend on
    the folder, and nothing is read or decoded twice. `entries` is the listing of the place, where
    it was taken before. Raises LandingEmpty when the folder is missing or holds no poster.
    """
    files = poster_entries(list_place(place) if entries is None else entries)
    if not files:
        raise _no_posters(place)
    readable = {_file_key(place, entry): entry for entry in files if not entry.problem}
    facts = _known_facts(readable, limits.max_pixels, store)
    unread = {key: entry for key, entry in readable.items() if key not in facts}
    facts |= _read_facts(place, unread, limits, store, progress)
    rows = [_row(source_name(entry), facts[key], limits) for key, entry in readable.items()]
    rows += [
        _row(
            source_name(entry),
            {**_NOTHING_KNOWN, "size_bytes": entry.size, "problem": entry.problem},
            limits,
        )
        for entry in files
        if entry.problem
    ]
    rows.sort(key=lambda row: row["source_name"])
    _flag_duplicates(rows, limits.near_duplicate_distance)
    return pd.DataFrame(rows, columns=COLUMNS)


def scan_holdout(
    place: Place,
    limits: ImageSettings,
    store: Store,
    progress: Progress = NO_PROGRESS,
    *,
    entries: Sequence[Entry],
) -> pd.DataFrame:
    """The table of `scan` for the holdout folder, which may hold none; `entries` is its listing."""
    if not poster_entries(entries):
        return pd.DataFrame(columns=COLUMNS, dtype="object")
    return scan(place, limits, store, progress, entries=entries)


def list_place(place: Place) -> list[Entry]:
    """Everything that lies in a place, perhaps nothing. Raises LandingEmpty where it is missing or
    cannot be listed."""
    try:
        return place.entries()
    except PlaceMissing as error:
        raise LandingEmpty(str(error)) from error


def list_posters(place: Place) -> list[Entry]:
    """The listing of a place of posters, sidecars included. Raises LandingEmpty where it holds no
    poster: nothing mounted there looks like that, and is not taken for posters and captions that
    people removed."""
    entries = list_place(place)
    if not poster_entries(entries):
        raise _no_posters(place)
    return entries


def _no_posters(place: Place) -> LandingEmpty:
    return LandingEmpty(
        f"{place.location}: no posters there; put some in ({', '.join(EXTENSIONS)}) "
        f"or set {place.role.setting} to another folder"
    )


def poster_entries(entries: Iterable[Entry]) -> list[Entry]:
    """The entries that have rows: not captions, notes and unfinished copies."""
    return [e for e in entries if e.problem or suffix(e.name).lower() not in NOT_POSTERS]


def landing_digest(entries: Iterable[Entry], store: Store, *, portable: bool = False) -> str:
    """sha256 (hex) of what a scan of this listing would read.

    It changes with the listing, and with what `rehash` found to have changed unnoticed. `portable`
    as of `listing_digest`.
    """
    listed = listing_digest(poster_entries(entries), portable=portable)
    found = rehashed(store, REHASHED)
    return content_key(listed, found) if found else listed


def unread_count(posters: pd.DataFrame) -> int:
    """How many files of the table of `scan` could not be read, which may pass by itself.

    Folders that were not entered do not count: the listing changes when they can be.
    """
    unread = posters["reason"].astype(str).str.startswith(_PASSING)
    return int((unread & (posters["poster_id"] == "")).sum())


def rehash(place: Place, store: Store, progress: Progress = NO_PROGRESS) -> Rehash:
    """Read every poster file of a place again and compare its hash with the known one.

    Files that changed unnoticed are forgotten, and `landing_digest` changes, so that the sensor and
    the next scan take them up. Raises LandingEmpty when the place cannot be listed.
    """
    files = [entry for entry in poster_entries(list_place(place)) if not entry.problem]
    by_key = {_file_key(place, entry): entry for entry in files}
    known = store.results(_FILES, by_key)
    hashes = {key: row["poster_id"] for key, row in known.items()}
    with progress.task("read posters again", len(by_key), "files") as tick:
        found, changed = reread(by_key, hashes, place.sha256, place.threads, tick)
    forget_changed(store, _FILES, known, changed, REHASHED)
    return found


def _file_key(place: Place, entry: Entry) -> str:
    return content_key(_FILES, place.key(entry), entry.size, entry.mtime_ns, entry.identity)


def _refusals() -> str:
    """Digest of what decides which files are refused by name and size. It is no part of the key of
    a file: one whose bytes are known need not be read again when it changes."""
    return content_key(INSPECT_VERSION, EXTENSIONS, MAX_BYTES)


def _content_key(poster_id: str) -> str:
    return content_key(_CONTENTS, INSPECT_VERSION, poster_id)


_NOTHING_KNOWN: Mapping[str, Any] = {
    "poster_id": "",
    "size_bytes": 0,
    "problem": "",
    "transient": False,
    "format": "",
    "width": 0,
    "height": 0,
    "decoded": True,
    "perceptual_hash": "",
}
"""Facts of a file (the first four) and of its content. A file that was refused by its name or size
has `refusals` besides: by which rules.

`problem`: why it can be no poster, whatever the limits on size are. `transient`: whether that may
pass by itself, so that the file is looked at again. `decoded`: False where `max_pixels` forbade it.
"""


def _known_facts(
    files: Mapping[str, Entry], max_pixels: int, store: Store
) -> dict[str, dict[str, Any]]:
    """Facts, by their keys, of the files that need not be read again; of the others is forgotten
    what is known."""
    rows = store.results(_FILES, files)
    contents = _contents(store, rows.values())
    with store.turn():  # one for all: each poster's bytes are marked as used in it
        held = {k: row for k, row in rows.items() if _holds(row, contents, max_pixels, store)}
    store.forget_results(_FILES, {key: row for key, row in rows.items() if key not in held})
    return _with_contents(held, contents)


def _read_facts(
    place: Place,
    files: Mapping[str, Entry],
    limits: ImageSettings,
    store: Store,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Facts of files, by their keys, read now and kept in the store."""

    def look(key: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
        with _reading.of(files[key].size):
            return _inspect(place, files[key], limits, store)

    def inspect(keys: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        unsaved: dict[str, dict[str, Any]] = {}
        with progress.task("read posters", len(keys), "files") as tick:
            found = parallel_map(look, keys, place.threads)
            try:
                for key, (file, content) in zip(keys, found, strict=True):
                    if content:
                        unsaved[_content_key(file["poster_id"])] = content
                    if len(unsaved) >= _SAVE_EVERY:
                        store.add_results(_CONTENTS, unsaved)
                        unsaved = {}
                    yield key, file
                    tick()
            finally:
                store.add_results(_CONTENTS, unsaved)

    rows = compute_missing(store, _FILES, list(files), inspect)
    return _with_contents(rows, _contents(store, rows.values()))


def _contents(store: Store, files: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    keys = [_content_key(file["poster_id"]) for file in files if not file["problem"]]
    return store.results(_CONTENTS, keys)


def _with_contents(
    files: Mapping[str, Mapping[str, Any]], contents: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    return {
        key: {
            **_NOTHING_KNOWN,
            **file,
            **({} if file["problem"] else contents.get(_content_key(file["poster_id"]), {})),
        }
        for key, file in files.items()
    }


def _holds(
    file: dict[str, Any],
    contents: Mapping[str, dict[str, Any]],
    max_pixels: int,
    store: Store,
) -> bool:
    """Whether what is known of a file is enough, so that it need not be read again."""
    if file["transient"]:
        return False
    if file["problem"]:
        return bool(file.get("refusals") == _refusals())
    content = contents.get(_content_key(file["poster_id"]))
    if content is None:
        return False
    if not content["decoded"]:
        # Refused by its header: looked at again only when the limit has been raised.
        return bool(content["width"] * content["height"] > max_pixels)
    return bool(content["problem"]) or store.has(file["poster_id"])


def _inspect(
    place: Place, entry: Entry, limits: ImageSettings, store: Store
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What is true of a file, and of its content where it was looked at (see _NOTHING_KNOWN)."""
    file = {"poster_id": "", "size_bytes": entry.size, "problem": "", "transient": False}
    extension = suffix(entry.name)
    if extension.lower() not in EXTENSIONS:
        file["problem"] = (
            f"{extension or 'no extension'}: not one of {', '.join(EXTENSIONS)}; "
            "export it as PNG or remove it"
        )
    elif entry.size > MAX_BYTES:
        file["problem"] = f"{entry.size} bytes are more than {MAX_BYTES}; export it smaller"
    try:
        if file["problem"]:
            return {**file, "poster_id": place.sha256(entry), "refusals": _refusals()}, None
        data = place.read(entry)
    except SourceChanged:
        problem = f"{CHANGED}; materialize {place.role.asset} again"
        return {**file, "problem": problem, "transient": True}, None
    except OSError as error:
        problem = f"{UNREADABLE} ({reason_of(error)}); make it readable or remove it"
        return {**file, "problem": problem, "transient": True}, None
    except MemoryError:
        return {**file, "problem": TOO_LITTLE_MEMORY, "transient": True}, None
    poster_id = hashlib.sha256(data).hexdigest()
    try:
        return {**file, "poster_id": poster_id}, _content(data, poster_id, limits, store)
    except MemoryError:  # which says nothing about the poster
        return {**file, "problem": TOO_LITTLE_MEMORY, "transient": True}, None


def _content(data: bytes, poster_id: str, limits: ImageSettings, store: Store) -> dict[str, Any]:
    """What is true of some bytes, known or judged now; usable ones are kept in the store. Raises
    MemoryError."""
    key = _content_key(poster_id)
    content = store.results(_CONTENTS, [key]).get(key)
    if content is None or not content["decoded"]:
        store.forget_results(_CONTENTS, {key: content} if content else {})
        content = {"poster_id": poster_id, **_judge(data, limits)}
    if content["decoded"] and not content["problem"]:
        store.put(data, blob=poster_id)
    return content


def _judge(data: bytes, limits: ImageSettings) -> dict[str, Any]:
    content: dict[str, Any] = {
        "format": "",
        "width": 0,
        "height": 0,
        "decoded": True,
        "perceptual_hash": "",
        "problem": "",
    }
    try:
        with _decoding:
            image = open_image(data, limits.max_pixels)
            content.update(format=format_name(image), width=image.width, height=image.height)
            decode_for_looks(image)
            content["perceptual_hash"] = perceptual_hash(image)
    except TooManyPixels as error:
        width, height = error.size
        content.update(format=error.format, width=width, height=height, decoded=False)
    except ImageRejected as error:
        content["problem"] = str(error)
    except MemoryError:
        raise
    except Exception as error:  # hostile pixels make Pillow raise nearly anything
        content["problem"] = f"cannot be converted ({error}); export it again as PNG"
    return content


def _row(name: str, facts: Mapping[str, Any], limits: ImageSettings) -> dict[str, Any]:
    reason = facts["problem"]
    size = (facts["width"], facts["height"])
    if not reason and size[0] * size[1] > limits.max_pixels:
        reason = str(TooManyPixels(size, facts["format"], limits.max_pixels))
    elif not reason and min(size) < limits.min_side:
        reason = (
            f"{size[0]}x{size[1]} pixels: a side is below images.min_side = {limits.min_side}; "
            "use a larger picture"
        )
    return {
        **{column: facts[column] for column in COLUMNS if column in facts},
        "source_name": name,
        "status": "rejected" if reason else "ok",
        "reason": reason,
        "perceptual_hash": "" if reason else facts["perceptual_hash"],
        "near_duplicate_of": "",
    }


def _flag_duplicates(rows: list[dict[str, Any]], distance: int) -> None:
    """Of equal bytes only the first row stays ok; what resembles an earlier one tells so."""
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["status"] == "ok":
            original = first.setdefault(row["poster_id"], row)
            if original is not row:  # two names that are no UTF-8 may look the same in a table
                row["status"] = "duplicate"
                row["reason"] = f"same bytes as {original['source_name']}"
                row["perceptual_hash"] = ""
    usable = [row for row in rows if row["status"] == "ok"]
    earlier = earliest_near_duplicates([row["perceptual_hash"] for row in usable], distance)
    for row, index in zip(usable, earlier, strict=True):
        if index >= 0:
            row["near_duplicate_of"] = usable[index]["source_name"]
