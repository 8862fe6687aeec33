"""What of the store nobody needs any more, and taking it away while others work.

What belongs here: finding and removing garbage. What does not: marking things as used (`store`,
which every user of it does), the warehouse and the published files (they are never garbage), and
the folder in which the starter models are trained.

Kept is what the last `keep_versions` versions of each table name, current ones included, and what
was used or made lately. Everything else goes:

    blobs            whose sha256 stands in no kept table, and on which no checkpoint that stays was
                     trained: its images are held against them
    results          rows of the index about such blobs (see ITEM_FIELDS); rows that name none stay
    tables           versions before the last ones
    training sets    whose version stands in no kept table
    checkpoints      whose id stands in no kept table, and that were not champion lately
    trainings        saves of runs whose checkpoint is finished, or whose training set is gone
    caches           tensors that trainings computed once and have not read for CACHE_SECONDS
    lineages         of training sets that are gone and that no checkpoint was trained on
    leftovers        temporary files of processes that were killed

"Stands in a table" is meant literally: any hexadecimal name inside any text of it counts, so an
asset of tomorrow need not be announced here.

**Why nothing goes that a running step needs.** Each file and each row of the index carries the time
of its last use: the modification time, or `used_at`. Nothing goes that was used since

    cutoff = min(now - grace, begin of the oldest lease that a living process holds) - REFRESH

1. A step holds a lease (`Store.lease`) before it reads its first table. The lease is a file lock,
   so it ends with its process, also after a kill, and not before, however long the step works.
2. What the step makes is new, and so younger than its lease. What it takes over, it marks as used
   first (`Store.keep`, and `Store.results` for rows), so that it is younger as well. Marks are left
   out where the last one is younger than REFRESH, which is why the cutoff lies that much earlier.
3. Marking and removing never happen at the same moment: `Store.turn`. Right before an item is
   removed, and in the same turn, its time is read again. So either the mark comes first, and the
   item stays; or the removal comes first, and the step is told that the item is not there
   (`keep` is False, `results` leaves the row out) and makes it again.
4. The tables that a step reads keep all that they name, as long as it works: the current version is
   kept; one that is replaced is marked in that moment (`Store.write_table`); one that is read is
   marked as well (`Store.read_table`), and versions used since the cutoff count as kept.
5. Only names are judged that have the form of ours: whatever else lies in these folders stays.
6. A training is a step. One that was started by hand, outside of any step, is known by the time of
   its last save: its folder and the training set that it names stay for the grace time.

The grace time is for those who hold no lease: a notebook, a machine whose clock or file locks
differ.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import time
import tomllib
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from posterpipe.core.progress import NO_PROGRESS, Progress
from posterpipe.core.provenance.checkpoints import CHECKPOINT, RECORD_NAME, images_trained_on
from posterpipe.core.provenance.lineages import LINEAGES, TRAINING_SET
from posterpipe.core.provenance.records import LASTING_KINDS, TABLE
from posterpipe.core.store import (
    CHECKPOINTS,
    DAMAGED,
    REFRESH_SECONDS,
    TRAINING_SETS,
    Store,
    StoreError,
)
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.settings import PUBLIC

KEEP_VERSIONS = 3
"""Of each table: the current one and those before it, so that going back stays cheap."""

GRACE_SECONDS = 86_400.0
"""What was used less long ago than this stays, in seconds."""

CACHE_SECONDS = 30 * 86_400.0
"""Cached tensors that nobody reads for so long belong to posters or settings of the past."""

KINDS = (
    "blobs",
    "results",
    "tables",
    "training sets",
    "checkpoints",
    "trainings",
    "caches",
    "lineages",
    "leftovers",
)

ITEM_FIELDS = ("poster_id", "image", "blob")
"""Where a row of the index names the blobs that it is about; or its key is the blob's sha256."""

# Names of blobs, versions and ids; shorter runs of hex digits occur in ordinary words.
_NAME = re.compile(r"[0-9a-f]{12,}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOB = re.compile(r"([0-9a-f]{64})(\.\w+)?")
_RUN_ID = re.compile(r"[0-9a-f]{16}")

# Removed in one turn, during which no step can mark anything: some milliseconds.
_A_TURN = 200


@dataclass(frozen=True)
class Item:
    """One thing that nobody needs.

    `path` is its file or folder; a row of the index has none, but `row`, its kind and key. `size`:
    bytes that its removal gives back, links to files that stay not counted.
    """

    kind: str
    name: str
    size: int
    path: Path | None = None
    row: tuple[str, str] | None = None


@dataclass(frozen=True)
class Garbage:
    """What was found. `cutoff`: nothing goes that was used since (seconds since 1970);
    `busy_since`: since when a step has been working, or None."""

    cutoff: float
    busy_since: float | None
    items: list[Item] = field(default_factory=list)

    def of(self, kind: str) -> list[Item]:
        """The items of one of KINDS."""
        return [item for item in self.items if item.kind == kind]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(item.size for item in self.items)


def find_garbage(
    store: Store,
    *,
    keep_versions: int = KEEP_VERSIONS,
    grace_seconds: float = GRACE_SECONDS,
    needed: Collection[str] = (),
) -> Garbage:
    """What may go, without touching anything.

    `keep_versions`: versions of each table that stay, the current one counted, at least 1;
    `needed`: names of blobs, training sets and checkpoints that stay whatever the tables say.
    """
    if keep_versions < 1 or grace_seconds < 0:
        raise ValueError(
            f"keep_versions = {keep_versions}, grace_seconds = {grace_seconds}: the first must be "
            "1 or more, the second not negative"
        )
    # In this order: a lease that is taken after they were listed begins after `now`.
    now = time.time()
    leases = store.live_leases()
    busy_since = min(leases, default=None)
    cutoff = min(now - grace_seconds, busy_since or now) - REFRESH_SECONDS
    kept, old_tables = _tables(store, keep_versions, cutoff)
    named = _named(kept) | set(needed)
    search = _Search(store, named, cutoff)
    # Trainings first, since they keep training sets, and blobs before the rows about them.
    items = [*old_tables, *search.trainings(), *search.training_sets(), *search.checkpoints()]
    items += [*search.caches(), *search.lineages(), *search.blobs()]
    items += [*search.results(), *search.leftovers()]
    items.sort(key=lambda item: KINDS.index(item.kind))
    return Garbage(cutoff, busy_since, _with_freed_sizes(items))


@dataclass(frozen=True)
class Removal:
    """What came of it."""

    removed: list[Item] = field(default_factory=list)
    in_use: list[Item] = field(default_factory=list)
    """Used since they were found."""
    problems: list[str] = field(default_factory=list)
    """What could not be removed, and why."""


def remove_garbage(store: Store, garbage: Garbage, progress: Progress = NO_PROGRESS) -> Removal:
    """Removes what was found, but for what has been used since."""
    removal = Removal()
    # Rows before blobs: a row without its blob would only be found unusable later.
    rows = [item for item in garbage.items if item.row]
    files = [item for item in garbage.items if item.path]
    with progress.task("remove", len(garbage.items), "items") as tick:
        for batch in _batches(rows):
            _remove_rows(store, batch, garbage.cutoff, removal)
            tick(len(batch))
        for batch in _batches(files):
            _remove_files(store, batch, garbage.cutoff, removal)
            tick(len(batch))
    return removal


def _batches(items: list[Item]) -> Iterator[list[Item]]:
    for start in range(0, len(items), _A_TURN):
        yield items[start : start + _A_TURN]


def _remove_rows(store: Store, items: list[Item], cutoff: float, removal: Removal) -> None:
    gone = store.forget_unused([item.row for item in items if item.row], cutoff)
    for item in items:
        (removal.removed if item.row in gone else removal.in_use).append(item)


def _remove_files(store: Store, items: list[Item], cutoff: float, removal: Removal) -> None:
    folders: list[Path] = []
    with store.turn(alone=True):
        for item in items:
            path = item.path
            if path is None or last_use(path, item.kind) >= cutoff:
                removal.in_use.append(item)
                continue
            try:
                if path.is_dir() and not path.is_symlink():
                    # Folders are big: gone at once under their name, emptied after the turn.
                    away = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:12]}.tmp")
                    path.rename(away)
                    folders.append(away)
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                remedy = "make the store writable for this user, or remove it by hand"
                removal.problems.append(f"{path}: cannot be removed ({error.strerror}); {remedy}")
            else:
                removal.removed.append(item)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def last_use(path: Path, kind: str) -> float:
    """When a file or folder was used last (seconds since 1970); infinity when it is gone.

    Folders in which somebody may be writing, trainings and leftovers, are as young as the youngest
    thing in them.
    """
    try:
        youngest = path.lstat().st_mtime
    except OSError:
        return float("inf")
    if kind in ("trainings", "leftovers") and path.is_dir():
        for inner in path.rglob("*"):
            with suppress(OSError):
                youngest = max(youngest, inner.lstat().st_mtime)
    return youngest


def champions(warehouse: Warehouse, keep: int) -> set[str]:
    """Checkpoints that are served or pinned, and the last `keep` that were: people go back to them.
    Of every base model, since profiles may share the store.

    Raises WarehouseBusy.
    """
    from posterpipe.core.champion.decisions import champion_of, of_base, read_decisions

    decisions = read_decisions(warehouse)
    needed: set[str] = set()
    for base in {"", *decisions["base_model"].dropna()}:
        own = of_base(decisions, base)
        promoted = own[own["decision"] == "promote"]["checkpoint_id"].astype(str)
        last = list(dict.fromkeys(reversed(promoted.tolist())))[:keep]
        needed |= {*last, champion_of(own, base)} - {""}
    return needed


# -- what is kept --------------------------------------------------------------------------------


def _tables(store: Store, keep_versions: int, cutoff: float) -> tuple[list[Path], list[Item]]:
    """The versions that are kept, and the items of the others."""
    kept, old = [], []
    for folder in _folders(store.root / "tables"):
        # Before its versions: one that is replaced meanwhile is then listed as just used.
        current = store.table_version(folder.name)
        files = {}
        for file in folder.glob("*.parquet"):
            with suppress(OSError):
                files[file] = file.stat().st_mtime
        ranked = sorted(files, key=lambda file: (file.stem == current, files[file]), reverse=True)
        for place, file in enumerate(ranked):
            # Where the pointer is damaged, any of them may be the current one.
            if place < keep_versions or files[file] >= cutoff or current is None:
                kept.append(file)
            else:
                old.append(_item("tables", file, f"{folder.name}/{file.stem}"))
    return kept, old


def _named(tables: Iterable[Path]) -> set[str]:
    """Every hexadecimal name in the texts of some tables, and their own versions."""
    named: set[str] = set()
    for file in tables:
        named.add(file.stem)
        try:
            table = pq.read_table(file)
        except FileNotFoundError:
            continue  # removed meanwhile by another process that tidies
        except DAMAGED as error:
            raise StoreError(
                f"{file}: cannot be read ({error}), so nobody knows what it needs; materialize the "
                f"asset `{file.parent.name}`, or remove the file where it is an older version"
            ) from error
        for column in table.columns:
            for text in _texts(column):
                named.update(_NAME.findall(text))
    return named


def _texts(column: pa.ChunkedArray) -> list[str]:
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _texts(pa.chunked_array([pc.list_flatten(column)]) if len(column) else column)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        return [text for text in pc.unique(column).to_pylist() if isinstance(text, str)]
    return []


# -- what may go ---------------------------------------------------------------------------------


class _Search:
    """Items that no kept table names and that were not used since the cutoff."""

    def __init__(self, store: Store, named: set[str], cutoff: float) -> None:
        self._store = store
        self._named = named
        self._cutoff = cutoff
        self._unnamed_blobs: set[str] = set()
        # Scores may tell of these for ever.
        self._trained: set[str] = set()
        for _, checkpoint_id, value, _ in store.all_results([CHECKPOINT]):
            facts = json.loads(value)
            self._trained.add(str(facts.get("training_set", "")))
            if checkpoint_id in named:
                self._named |= set(images_trained_on(store, facts))

    def trainings(self) -> Iterator[Item]:
        """Work folders; unfinished ones that stay keep the image sets that they name."""
        checkpoints = self._store.root / CHECKPOINTS
        for folder in _folders(self._store.root / "training"):
            if not _RUN_ID.fullmatch(folder.name):
                continue
            finished = (checkpoints / folder.name / RECORD_NAME).exists()
            training_set, others = _sets_of(folder)
            wanted = not finished and (training_set is None or training_set in self._named)
            if not wanted and last_use(folder, "trainings") < self._cutoff:
                yield _item("trainings", folder)
            elif not finished:
                self._named |= others

    def training_sets(self) -> Iterator[Item]:
        return self._unnamed_folders("training sets", TRAINING_SETS, _SHA256)

    def checkpoints(self) -> Iterator[Item]:
        return self._unnamed_folders("checkpoints", CHECKPOINTS, _RUN_ID)

    def _unnamed_folders(self, kind: str, place: str, pattern: re.Pattern[str]) -> Iterator[Item]:
        for folder in _folders(self._store.root / place):
            unnamed = pattern.fullmatch(folder.name) and folder.name not in self._named
            if unnamed and last_use(folder, kind) < self._cutoff:
                yield _item(kind, folder)

    def caches(self) -> Iterator[Item]:
        unread_since = min(self._cutoff, time.time() - CACHE_SECONDS)
        for file in (self._store.root / "training" / "cache").rglob("*.safetensors"):
            if last_use(file, "caches") < unread_since:
                yield _item("caches", file)

    def lineages(self) -> Iterator[Item]:
        for file in (self._store.root / LINEAGES).glob("[!.]*"):
            if file.suffix not in (".parquet", ".json"):
                continue
            if (
                not self._wanted(file.name.partition(".")[0])
                and last_use(file, "lineages") < self._cutoff
            ):
                yield _item("lineages", file)

    def _wanted(self, training_set: str) -> bool:
        return training_set in self._named or training_set in self._trained

    def blobs(self) -> Iterator[Item]:
        for folder in _folders(self._store.root / "blobs"):
            for file in folder.iterdir():
                found = _BLOB.fullmatch(file.name)
                if found is None or found[1] in self._named:
                    continue
                if last_use(file, "blobs") < self._cutoff:
                    self._unnamed_blobs.add(found[1])
                    yield _item("blobs", file)

    def results(self) -> Iterator[Item]:
        for kind, key, value, used_at in self._store.all_results():
            if used_at < self._cutoff and self._unneeded(kind, key, value):
                size = len(kind) + len(key) + len(value)
                yield Item("results", f"{kind} {key}", size, row=(kind, key))

    def _unneeded(self, kind: str, key: str, value: str) -> bool:
        if kind in LASTING_KINDS:
            return False
        if kind == TABLE:
            return key.rpartition("/")[2] not in self._named
        if kind == TRAINING_SET:
            return not self._wanted(key.partition("/")[0])
        row = json.loads(value)
        blobs = {str(row[name]) for name in ITEM_FIELDS if row.get(name)}
        return self._named.isdisjoint(blobs) if blobs else key in self._unnamed_blobs

    def leftovers(self) -> Iterator[Item]:
        root = self._store.root
        places = [root, root / PUBLIC, root / TRAINING_SETS, root / CHECKPOINTS]
        places += [root / LINEAGES, *_folders(root / "blobs"), *_folders(root / "tables")]
        found = [path for place in places for path in place.glob(".*.tmp")]
        found += (root / "training").rglob(".*.tmp")
        for path in found:
            if last_use(path, "leftovers") < self._cutoff:
                yield _item("leftovers", path, path.relative_to(root).as_posix())


def _sets_of(work: Path) -> tuple[str | None, set[str]]:
    """The training set that a training's config names (None where none is to be had), and all sets
    of images that it names, held-out ones and such."""
    try:
        text = (work / "run.toml").read_text(encoding="utf-8")
        return str(tomllib.loads(text)["versions"]["training_set"]), set(_SHA256.findall(text))
    except (OSError, ValueError, KeyError, TypeError):
        return None, set()


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if path.is_dir() and path.name[0] != ".")
    except OSError:
        return []


def _item(kind: str, path: Path, name: str = "") -> Item:
    return Item(kind, name or path.name, 0, path=path)


def _files(path: Path) -> Iterator[os.stat_result]:
    """The regular files at or below a path."""
    for inner in [path, *path.rglob("*")] if path.is_dir() else [path]:
        with suppress(OSError):
            stats = inner.lstat()
            if stat.S_ISREG(stats.st_mode):
                yield stats


def _with_freed_sizes(items: list[Item]) -> list[Item]:
    """Sizes as the disk gives them back: a training set's images are links to blobs, which go
    only with the last of them."""
    links: dict[tuple[int, int], int] = {}
    sized = []
    for item in items:
        freed = item.size
        for stats in _files(item.path) if item.path else ():
            inode = (stats.st_dev, stats.st_ino)
            links[inode] = links.get(inode, stats.st_nlink) - 1
            if links[inode] == 0:
                freed += stats.st_size
        sized.append(replace(item, size=freed))
    return sized
