"""A copy of everything that cannot be made again at once, taken while the pipeline works.

What belongs here: what is copied, and how each part is copied so that it is sound. What does not:
which places those are (`commands.backup`), and putting a copy back, for which `cp` does.

Files of the store never change once they have their name, and what names others is written after
them. So what names others is copied first, Dagster's history before the store: all that it names
is there when its turn comes. SQLite's files change all the time and are copied with SQLite's own
`backup`. The warehouse belongs to one process; its published copy, which holds every table of it
and is replaced as a whole, takes its place.

In the copy, a place below `root` lies where it lies below `root`, others below `elsewhere`. The
last file that is written is `backup.json`: without it a copy is not whole.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from posterpipe.core.files import link_or_copy, write_atomic
from posterpipe.core.progress import NO_PROGRESS, Progress
from posterpipe.core.store import BUSY_SECONDS
from posterpipe.settings import PUBLIC

ELSEWHERE, WHOLE = "elsewhere", "backup.json"

_SQLITE = b"SQLite format 3\0"
_BESIDE_SQLITE = ("-wal", "-shm", "-journal")
_WAREHOUSE, _PUBLISHED = "warehouse.duckdb", Path(PUBLIC, "scores.duckdb")
_NOT_OF_THE_STORE = {PUBLIC, "leases", "garbage.lock", _WAREHOUSE, f"{_WAREHOUSE}.wal"}
_NAMING_OTHERS = ("index.sqlite", "tables", "lineages")
"""Of the store, copied before all else of it."""


class BackupError(Exception):
    """A copy cannot be made. The message says why and what to do."""


@dataclass(frozen=True)
class Backup:
    """What was copied."""

    folder: Path
    files: int
    size: int
    """In bytes."""
    missing: list[Path]
    """Places that are not there; the published scores among them before the first publication."""


def back_up(
    folder: Path,
    *,
    root: Path,
    store: Path,
    places: Sequence[Path],
    progress: Progress = NO_PROGRESS,
) -> Backup:
    """Copies the store and other files and folders into a new or empty folder.

    `places`: Dagster's home and what people put in, absolute. A file that goes away meanwhile is
    left out, as it would be a moment later. Raises BackupError where the folder holds something or
    lies in what is copied, and where something cannot be read or written.
    """
    folder = Path(os.path.abspath(folder))
    for place in (store, *places):
        if folder.is_relative_to(place):
            raise BackupError(f"{folder} lies in {place}, which is copied: choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise BackupError(f"{folder} is not empty: choose a new folder for each backup")
    except OSError as error:
        raise BackupError(
            f"{folder}: cannot be used ({error.strerror}); choose another folder"
        ) from error
    copy = _Copy(folder, root)
    published = store / _PUBLISHED
    missing = []
    for place in (store, *places, published):
        with copy.telling(place):
            if not place.exists():
                missing.append(place)
    copy.all((file for place in places for file in _files(place)), "inputs and history", progress)
    copy.all(_naming_others(store), "index and tables", progress)
    copy.all(_of_the_store(store), "store", progress)
    if published not in missing:
        copy.warehouse(published, store / _WAREHOUSE)
    copy.end(missing)
    return Backup(folder, copy.files, copy.size, missing)


class _Copy:
    """A copy in the making."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.files = self.size = 0
        self._folder, self._root = folder, root
        self._copied: dict[tuple[int, int], Path] = {}
        """By device and inode, files with several names: training sets have links to blobs."""

    def all(self, found: Iterator[Path], part: str, progress: Progress) -> None:
        """Copies files. Raises BackupError."""
        with self.telling(part):
            files = list(found)
        with progress.task(f"copy {part}", len(files), "files") as tick:
            for file in files:
                with self.telling(file):
                    self._file(file, self._place_of(file))
                tick()

    def warehouse(self, published: Path, private: Path) -> None:
        """Copies the published database as what the pipeline writes into. Raises BackupError."""
        target = self._place_of(private)
        with self.telling(published):
            self._file(published, target)
            target.chmod(0o644)

    def end(self, missing: Sequence[Path]) -> None:
        """Says that the copy is whole. Raises BackupError."""
        told = {
            "made_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "files": self.files,
            "missing": [str(place) for place in missing],
        }
        with self.telling(WHOLE):
            os.sync()
            write_atomic(self._folder / WHOLE, json.dumps(told, indent=1).encode())

    def _place_of(self, file: Path) -> Path:
        if file.is_relative_to(self._root):
            return self._folder / file.relative_to(self._root)
        return self._folder / ELSEWHERE / file.relative_to(file.anchor)

    def _file(self, file: Path, target: Path) -> None:
        """Copies one file with its date and permissions, unless it is gone or copied already."""
        if target.exists() or file.name.endswith(_BESIDE_SQLITE):
            return
        try:
            stats = file.stat()
            if not stat.S_ISREG(stats.st_mode):
                return  # a socket or a pipe
            target.parent.mkdir(parents=True, exist_ok=True)
            twin = self._copied.get((stats.st_dev, stats.st_ino))
            if twin is not None:
                link_or_copy(twin, target)
            elif _is_sqlite(file):
                _copy_sqlite(file, target)
            else:
                shutil.copy2(file, target)
        except FileNotFoundError:
            if file.exists():
                raise
            target.unlink(missing_ok=True)
            return
        if stats.st_nlink > 1:
            self._copied.setdefault((stats.st_dev, stats.st_ino), target)
        self.files += 1
        self.size += 0 if twin else target.stat().st_size

    @contextmanager
    def telling(self, what: Path | str) -> Iterator[None]:
        """While inside, errors say that something could not be copied. Raises BackupError."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            named, reason = what, str(error)
            if isinstance(error, OSError):
                named, reason = error.filename or what, error.strerror or reason
            raise BackupError(
                f"{named}: cannot be copied ({reason}); what is in {self._folder} is not whole: "
                "remove it, and try again"
            ) from error


def _is_sqlite(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(len(_SQLITE)) == _SQLITE


def _copy_sqlite(file: Path, target: Path) -> None:
    try:
        _through_sqlite(file, target, "mode=ro")
    except sqlite3.OperationalError:
        # Where it cannot write beside the file, SQLite reads it only if it is told that nobody
        # changes it; then it does not look into the log, where a killed process may have left some.
        logs = [file.with_name(f"{file.name}{end}") for end in ("-wal", "-journal")]
        left = any(log.exists() and log.stat().st_size for log in logs)
        if left or os.access(file.parent, os.W_OK):
            raise
        _through_sqlite(file, target, "immutable=1")
    shutil.copystat(file, target)


def _through_sqlite(file: Path, target: Path, how: str) -> None:
    address = f"{file.absolute().as_uri()}?{how}"
    with (
        closing(sqlite3.connect(address, timeout=BUSY_SECONDS, uri=True)) as source,
        closing(sqlite3.connect(target)) as copy,
    ):
        source.backup(copy)


def _naming_others(store: Path) -> Iterator[Path]:
    for name in _NAMING_OTHERS:
        yield from _files(store / name)


def _of_the_store(store: Path) -> Iterator[Path]:
    """All else of the store."""
    for path in sorted(store.glob("*")):
        if path.name not in {*_NOT_OF_THE_STORE, *_NAMING_OTHERS}:
            yield from _files(path)


def _files(place: Path) -> Iterator[Path]:
    """A file, or the files in a folder at any depth, in a form that can be copied.

    Links to folders are not followed, as the pipeline does not follow them. What killed processes
    left, hidden names that end in .tmp, is left out.
    """
    if place.is_file():
        yield place
    for parent, folders, names in os.walk(place, onerror=_raise_unless_gone):
        folders[:] = [name for name in folders if not _is_left_over(name)]
        yield from (Path(parent, name) for name in sorted(names) if not _is_left_over(name))


def _is_left_over(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
