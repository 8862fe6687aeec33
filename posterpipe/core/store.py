"""The store: bytes under their hash, results under their key, tables under their content.

What belongs here: content-addressed blobs, the index of computed results, small versioned tables,
the one mechanism for per-item work (`compute_missing`), and what users of the store do so that
nothing is taken away under their hands. What does not: what is computed (the modules that own an
asset), what may be taken away (`garbage`) and the score warehouse (`warehouse`).

Layout below the root:

    blobs/ab/<sha256><suffix>       bytes, never changed once written
    index.sqlite                    results: (kind, key) -> JSON row
    tables/<name>/<version>.parquet and tables/<name>/current.json
    leases/<name>.lease             one a process that works, locked while it does

Every write is atomic: a temporary name in the same folder, fsync, rename. Several processes may use
one store at the same time. Whoever counts on something that is there already says so with `keep`
(as `has`, `put`, `read_table` and `compute_missing` do), and works inside a `lease`: `garbage`
tells why that is enough.

Blobs are sealed (`files`), so that one that somebody saved over, perhaps through its link in a
training set, is told without reading it.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import hashlib
import io
import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import BaseModel

from posterpipe.core.files import SECOND, mark_used, unchanged, write_atomic
from posterpipe.core.leases import Leases, open_lock

# Folders below the root that `training_set` and trainings fill.
TRAINING_SETS, CHECKPOINTS = "training_sets", "checkpoints"

# How long a process waits for another one's transaction on the index, in seconds.
BUSY_SECONDS = 60.0
# Work in progress is saved at least this often, however slow one item is, in seconds.
SAVE_SECONDS = 10.0
# SQLite's oldest supported limit of variables in one statement is 999.
KEYS_A_QUERY = 900
# What was used less long ago than this is not marked as used again, in seconds: a store of 100,000
# blobs is then touched a few times an hour at most, and `garbage` allows for it.
REFRESH_SECONDS = 600.0

# What reading a Parquet file raises whose bytes are not those that were written; for want of memory
# Arrow raises something else.
DAMAGED = (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError)

# `used_at`: seconds since 1970, of the last use.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS results (
    kind TEXT NOT NULL,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    used_at INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (kind, key)
) WITHOUT ROWID
"""


class _Inside(threading.local):
    """Stores whose turn this thread has."""

    def __init__(self) -> None:
        self.roots: dict[Path, bool] = {}


_inside = _Inside()


class StoreError(Exception):
    """The store cannot be used. The message names the path and says what to do."""


class TableMissing(StoreError):
    """A table has not been written yet, or is damaged. The message names the asset to
    materialize."""


class Store:
    """Content-addressed files, computed results and small tables below one folder.

    An instance holds no open file or connection, so it may be used from several threads, survives
    a fork, and can be pickled. Raises StoreError when the folder cannot be created.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{self.root}: the store folder cannot be created ({error.strerror}); "
                "choose another one with POSTERPIPE_STORE"
            ) from error

    # -- blobs ------------------------------------------------------------------------------------

    def put(self, data: bytes, suffix: str = "", *, blob: str | None = None) -> str:
        """Keep bytes; the sha256 (hex) under which they lie. Nothing is written when present.

        `blob`: that hash, where it was computed before.
        """
        blob = blob or hashlib.sha256(data).hexdigest()
        target = self.path(blob, suffix)
        if not self.keep(target):
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(target, data, sealed=True)
        return blob

    def path(self, blob: str, suffix: str = "") -> Path:
        """Where the bytes of that sha256 lie, present or not."""
        return Path(self._path(blob, suffix))

    def relative(self, blob: str, suffix: str = "") -> str:
        """That place below the root, as tables name it."""
        return self.path(blob, suffix).relative_to(self.root).as_posix()

    def has(self, blob: str, suffix: str = "") -> bool:
        """Whether the bytes of that sha256 are kept; whoever asks counts as a user of them."""
        return self.keep(self._path(blob, suffix))

    def intact(self, blob: str, suffix: str = "") -> bool:
        """As `has`, and whether they are still those bytes; others are removed, so that `put`
        writes the right ones again."""
        path = self._path(blob, suffix)
        if not self.keep(path):
            return False
        if unchanged(path, blob):
            return True
        with suppress(OSError):
            os.unlink(path)
        return False

    def _path(self, blob: str, suffix: str) -> str:
        # Text: joining paths part by part was a fifth of a run over 10,000 known posters.
        return f"{self.root}/blobs/{blob[:2]}/{blob}{suffix}"

    # -- use --------------------------------------------------------------------------------------

    def keep(self, path: Path | str) -> bool:
        """Whether a file or folder of the store is there, marked as used now so that it stays.

        Ask this, and not `path.exists()`, before counting on something that was made before.
        """
        try:
            changed_at = os.stat(path).st_mtime_ns
        except OSError:
            return False
        if time.time() - changed_at / SECOND < REFRESH_SECONDS:
            return True
        with self.turn():
            try:
                mark_used(path, changed_at % SECOND)
            except FileNotFoundError:
                return False
            except OSError:
                pass  # a store that is not writable is not cleared either
        return True

    @contextmanager
    def turn(self, *, alone: bool = False) -> Iterator[None]:
        """While inside, nobody removes anything; with `alone`, nobody else is inside either.

        For moments: every process that marks something as used waits for one that is alone. A
        thread that is inside may enter again, not alone, for nothing.
        """
        if _inside.roots.get(self.root):
            yield
            return
        handle = open_lock(self.root / "garbage.lock")
        if handle is None:
            yield
            return
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            except OSError as error:
                raise StoreError(
                    f"{self.root}: files cannot be locked there ({error.strerror}); choose a "
                    "folder on another file system with POSTERPIPE_STORE"
                ) from error
            _inside.roots[self.root] = True
            yield
        finally:
            _inside.roots.pop(self.root, None)
            os.close(handle)

    @contextmanager
    def lease(self) -> Iterator[None]:
        """While inside, what this process uses of the store from now on is no garbage."""
        taken = self._leases.take()
        try:
            yield
        finally:
            if taken is not None:
                taken.give_back()

    def live_leases(self) -> list[float]:
        """When the leases began that processes hold now, in seconds since 1970.

        Those of processes that ended without giving theirs back are removed.
        """
        return self._leases.live()

    @property
    def _leases(self) -> Leases:
        return Leases(self.root / "leases")

    # -- results ----------------------------------------------------------------------------------

    def results(self, kind: str, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The rows kept for `keys`, in the order of `keys`; keys without a row are left out.

        They are marked as used now.
        """
        wanted = list(dict.fromkeys(keys))
        in_order = sorted(wanted)  # as they lie in the index: each of its pages is read once
        found: dict[str, dict[str, Any]] = {}
        now = int(time.time())
        unmarked: list[str] = []
        with self._index() as index:
            for start in range(0, len(in_order), KEYS_A_QUERY):
                part = in_order[start : start + KEYS_A_QUERY]
                marks = ",".join("?" * len(part))
                query = (
                    f"SELECT key, value, used_at FROM results WHERE kind = ? AND key IN ({marks})"
                )
                rows = index.execute(query, [kind, *part]).fetchall()
                # One text for all, since each call of the parser costs more than a row.
                values = json.loads(f"[{','.join(value for _, value, _ in rows)}]")
                for (key, _, used_at), value in zip(rows, values, strict=True):
                    found[key] = value
                    if now - used_at >= REFRESH_SECONDS:
                        unmarked.append(key)
            for key in self._mark_used(index, kind, unmarked, now):
                del found[key]
        return {key: found[key] for key in wanted if key in found}

    @staticmethod
    def _mark_used(index: sqlite3.Connection, kind: str, keys: list[str], now: int) -> set[str]:
        """Marks rows as used; those of `keys` that were removed since they were read."""
        gone: set[str] = set()
        try:
            with index:
                for start in range(0, len(keys), KEYS_A_QUERY):
                    part = keys[start : start + KEYS_A_QUERY]
                    which = f"kind = ? AND key IN ({','.join('?' * len(part))})"
                    # Which rows are gone is asked only where some are, which is nearly never;
                    # RETURNING would build every key of every call.
                    update = f"UPDATE results SET used_at = ? WHERE {which}"
                    if index.execute(update, [now, kind, *part]).rowcount < len(part):
                        left = index.execute(
                            f"SELECT key FROM results WHERE {which}", [kind, *part]
                        )
                        gone.update(set(part).difference(key for (key,) in left))
        except sqlite3.OperationalError as error:
            # A store that is not writable is not cleared either.
            if "readonly" not in str(error):
                raise
            return set()
        return gone

    def add_results(self, kind: str, rows: Mapping[str, dict[str, Any]]) -> None:
        """Keep rows in one transaction; a key that has a row already keeps the row it has."""
        if not rows:
            return
        now = int(time.time())
        values = [(kind, key, _canonical(row), now) for key, row in rows.items()]
        with self._index() as index, index:
            index.executemany(
                "INSERT INTO results (kind, key, value, used_at) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET used_at = excluded.used_at",
                values,
            )

    def all_results(self, kinds: Sequence[str] = ()) -> Iterator[tuple[str, str, str, int]]:
        """Every row, of some kinds or of all: kind, key, JSON text, time of its last use (seconds
        since 1970)."""
        where = f"WHERE kind IN ({','.join('?' * len(kinds))})" if kinds else ""
        with self._index() as index:
            yield from index.execute(
                f"SELECT kind, key, value, used_at FROM results {where}", kinds
            )

    def forget_unused(self, rows: Iterable[tuple[str, str]], since: float) -> set[tuple[str, str]]:
        """Remove rows (kind, key) that nobody has used since that time; those that went."""
        delete = "DELETE FROM results WHERE kind = ? AND key = ? AND used_at < ?"
        with self._index() as index, index:
            return {
                (kind, key)
                for kind, key in rows
                if index.execute(delete, [kind, key, since]).rowcount
            }

    def forget_results(
        self,
        kind: str,
        rows: Mapping[str, dict[str, Any]],
        *,
        note: tuple[str, dict[str, Any]] | None = None,
    ) -> None:
        """Remove rows, by their keys, so that these are computed again.

        Only those that are still as given: what another process computed meanwhile stays. `note`: a
        kind, and a row that is kept under the same word as its key, in place of the one before, in
        the same transaction.
        """
        if not rows:
            return
        with self._index() as index:
            index.execute("BEGIN IMMEDIATE")
            with index:
                _forget(index, kind, rows)
                if note is not None:
                    values = [note[0], note[0], _canonical(note[1]), int(time.time())]
                    index.execute("REPLACE INTO results VALUES (?, ?, ?, ?)", values)

    # -- tables -----------------------------------------------------------------------------------

    def write_table(self, name: str, frame: pd.DataFrame, *, version: str | None = None) -> str:
        """Keep a table and make it the current one; its version.

        The index of the frame is not kept. Columns hold text, numbers, booleans, times or nothing.
        `version`: its `table_version`, where that was computed before. A file of that version that
        is damaged is written anew.
        """
        version = version or table_version(frame)
        with writing(self.root / "tables" / name):
            folder = self.folder("tables", name)
        file = folder / f"{version}.parquet"
        if not (self.keep(file) and _is_whole(file)):
            buffer = io.BytesIO()
            frame.reset_index(drop=True).to_parquet(buffer, index=False)
            with writing(file):
                write_atomic(file, buffer.getvalue())
        before = self.table_version(name)
        if before is not None:
            # Whoever reads it now has asked for the current table a moment ago.
            self.keep(folder / f"{before}.parquet")
        current = {"version": version, "rows": len(frame), "columns": list(map(str, frame.columns))}
        # Last, since it is what makes the new table visible.
        pointer = folder / "current.json"
        with writing(pointer):
            write_atomic(pointer, (json.dumps(current, indent=1) + "\n").encode())
        return version

    def read_table(self, name: str, version: str | None = None) -> pd.DataFrame:
        """The current table, or that version of it. Raises TableMissing."""
        version = version or self.table_version(name)
        file = self.root / "tables" / name / f"{version}.parquet"
        if version is None or not self.keep(file):
            which = f"version {version} of the table {name}" if version else f"the table {name}"
            raise TableMissing(
                f"{self.root / 'tables' / name}: {which} is not there; "
                f"materialize the asset `{name}` first"
            )
        try:
            return pd.read_parquet(file)
        except DAMAGED as error:
            raise TableMissing(
                f"{file}: cannot be read ({error}); materialize the asset `{name}`, which writes "
                "it anew"
            ) from error

    def table_version(self, name: str) -> str | None:
        """The version of the current table, or None before the first one is written, and where the
        file that names it is damaged."""
        pointer = self.root / "tables" / name / "current.json"
        try:
            return str(json.loads(pointer.read_text("utf-8"))["version"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None  # writing the table names it again

    def folder(self, *parts: str) -> Path:
        """A folder below the root, created."""
        path = self.root.joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True)
        return path

    # -- the index --------------------------------------------------------------------------------

    @contextmanager
    def _index(self) -> Iterator[sqlite3.Connection]:
        path = self.root / "index.sqlite"
        writable = os.access(self.root, os.W_OK)
        try:
            if writable:
                connection = sqlite3.connect(path, timeout=BUSY_SECONDS)
            else:
                # SQLite wants to write beside the file even to read it, unless it is told that
                # nobody changes it.
                connection = sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)
        except sqlite3.OperationalError as error:
            raise StoreError(
                f"{path}: cannot be opened ({error}); make the folder writable or choose another "
                "one with POSTERPIPE_STORE"
            ) from error
        with closing(connection):
            if writable:
                _prepare_index(connection, path)
            try:
                yield connection
            except sqlite3.OperationalError as error:
                raise StoreError(f"{path}: {_cannot_be_written(error)}") from error
            except sqlite3.DatabaseError as error:
                raise _no_database(path, error) from error


def _no_database(path: Path, error: sqlite3.DatabaseError) -> StoreError:
    return StoreError(
        f"{path}: is not a database ({error}); move it away, and the results that it held are "
        "computed again"
    )


def _forget(index: sqlite3.Connection, kind: str, rows: Mapping[str, dict[str, Any]]) -> None:
    which = "WHERE kind = ? AND key = ?"
    for key, row in rows.items():
        found = index.execute(f"SELECT value FROM results {which}", [kind, key]).fetchone()
        if found is not None and json.loads(found[0]) == json.loads(_canonical(row)):
            index.execute(f"DELETE FROM results {which}", [kind, key])


def _prepare_index(connection: sqlite3.Connection, path: Path) -> None:
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            # A killed process loses nothing under NORMAL; a power cut may lose the last results,
            # which are then computed again.
            connection.execute("PRAGMA synchronous = NORMAL")
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(_SCHEMA)
            _add_used_at(connection)
            connection.commit()
            return
        except sqlite3.OperationalError as error:
            # Changing the journal mode does not wait for other processes as transactions do.
            if "locked" not in str(error):
                raise StoreError(f"{path}: {_cannot_be_written(error)}") from error
            if time.monotonic() > deadline:
                raise StoreError(
                    f"{path}: cannot be used ({error}); make it writable, or end the process that "
                    "holds it"
                ) from error
            time.sleep(0.02)
        except sqlite3.DatabaseError as error:
            raise _no_database(path, error) from error


def _add_used_at(connection: sqlite3.Connection) -> None:
    """Brings an index of the first form, which had no `used_at`, to the present one."""
    columns = "SELECT count(*) FROM pragma_table_info('results') WHERE name = 'used_at'"
    if connection.execute(columns).fetchone()[0]:
        return
    connection.execute("BEGIN IMMEDIATE")
    if not connection.execute(columns).fetchone()[0]:
        connection.execute("ALTER TABLE results ADD COLUMN used_at INTEGER NOT NULL DEFAULT 0")


def compute_missing(
    store: Store,
    kind: str,
    keys: Sequence[str],
    compute: Callable[[list[str]], Iterator[tuple[str, dict[str, Any]]]],
    *,
    save_every: int = 16,
    usable: Callable[[dict[str, Any]], bool] | None = None,
) -> dict[str, dict[str, Any]]:
    """Rows for `keys`: those the store has, and the missing ones computed now.

    `compute` gets the missing keys, in order, and yields (key, row) as rows come; it is not called
    when nothing is missing. Rows are saved every `save_every` items and every few seconds, also
    when `compute` fails or is stopped, so that what is done is never done again. `usable` tells
    whether a kept row still holds (its blob exists, say); those that do not are computed again.
    The rows come in the order of `keys`; a key that `compute` did not yield is left out.

    A row about a blob names it: as `poster_id`, `image` or `blob`, or as its key. Then it goes with
    the blob when nobody needs that any more (see `garbage`); a row that names none stays for ever.
    """
    with store.lease():
        return _compute_missing(store, kind, keys, compute, save_every, usable)


def _compute_missing(
    store: Store,
    kind: str,
    keys: Sequence[str],
    compute: Callable[[list[str]], Iterator[tuple[str, dict[str, Any]]]],
    save_every: int,
    usable: Callable[[dict[str, Any]], bool] | None,
) -> dict[str, dict[str, Any]]:
    wanted = list(dict.fromkeys(keys))
    present = store.results(kind, wanted)
    if usable is not None:
        # One turn for all: each row's blob is marked as used in it.
        with store.turn():
            unusable = {key: row for key, row in present.items() if not usable(row)}
        store.forget_results(kind, unusable)
        for key in unusable:
            del present[key]
    missing = [key for key in wanted if key not in present]
    if not missing:
        return present

    computed: dict[str, dict[str, Any]] = {}
    pending: dict[str, dict[str, Any]] = {}
    saved_at = time.monotonic()
    try:
        for key, row in compute(missing):
            computed[key] = pending[key] = row
            if len(pending) >= save_every or time.monotonic() - saved_at >= SAVE_SECONDS:
                store.add_results(kind, pending)
                pending = {}
                saved_at = time.monotonic()
    finally:
        store.add_results(kind, pending)
    # Read back: where another process was first, its row counts, for every reader alike. Where one
    # has found a row unusable and taken it away, ours counts all the same.
    rows = {**present, **computed, **store.results(kind, wanted)}
    return {key: rows[key] for key in wanted if key in rows}


def content_key(*parts: object) -> str:
    """sha256 (hex) of the canonical JSON of the parts: equal parts, equal key, on every machine.

    Parts are JSON values, settings (pydantic models), paths (as posix text), times, or numpy
    scalars, nested in lists, tuples and dictionaries. Raises TypeError for anything else.
    """
    return hashlib.sha256(_canonical(list(parts)).encode()).hexdigest()


def table_version(frame: pd.DataFrame) -> str:
    """sha256 (hex) of a table's column names and values, in their order.

    It does not depend on the versions of pandas and parquet, nor on how a missing value is
    spelled: None, NaN, NaT and NA are alike, and 1.0 is 1, since one missing value turns a whole
    column of integers into floats.
    """
    digest = hashlib.sha256(_canonical([str(name) for name in frame.columns]).encode())
    # By column, since going through texts value by value takes pandas seven times as long.
    columns = [frame.iloc[:, place].to_numpy(dtype=object) for place in range(frame.shape[1])]
    for row in zip(*columns, strict=True):
        digest.update(b"\n")
        digest.update(_canonical([_cell(value) for value in row]).encode())
    return digest.hexdigest()


def cells(table: pd.DataFrame, *columns: str) -> Iterator[tuple[Any, ...]]:
    """The rows of some columns of a table, as tuples.

    Going through the columns themselves takes ten times as long where they hold texts.
    """
    return zip(*(table[name].tolist() for name in columns), strict=True)


_PLAIN = (str, int, bool)


def _cell(value: Any) -> Any:
    if value is None or type(value) in _PLAIN:  # nearly all: tables of 100,000 rows come by here
        return value
    if isinstance(value, np.ndarray):
        return [_cell(item) for item in value.tolist()]
    if isinstance(value, list | tuple):
        return [_cell(item) for item in value]
    if isinstance(value, dict):
        return {key: _cell(item) for key, item in value.items()}
    if value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if value.is_integer():
            return int(value)
    return value


def _canonical(value: object) -> str:
    return _ENCODER.encode(value)


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, dt.datetime | dt.date):
        return value.isoformat()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} has no canonical form; give text or numbers")


# Made once: `json.dumps` with these arguments makes one a call, which costs more than encoding.
_ENCODER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain
)


def _is_whole(table: Path) -> bool:
    """Whether a file holds a table that can be read."""
    try:
        pd.read_parquet(table)
    except DAMAGED:
        return False
    return True


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While inside, errors of the system name what could not be written and say what to do.

    Raises StoreError for them. For what lies in the store.
    """
    try:
        yield
    except FileNotFoundError:
        raise  # something to be read is gone
    except OSError as error:
        raise StoreError(f"{path}: {_cannot_be_written(error.strerror or error)}") from error


def _cannot_be_written(why: object) -> str:
    return (
        f"cannot be written ({why}); make room on the disk, make the store's folder writable, or "
        "choose another one with POSTERPIPE_STORE. What was done is kept: run it again"
    )
