"""The score warehouse: one DuckDB file that the pipeline writes.

What belongs here: opening and closing the file, its lock, and what tells that it is another one.
What does not: its tables (`schema`), their rows (`rows`), computing scores
(`metrics`), reports over them (the dbt project), and the copy that analysts read (`publication`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import duckdb
import pandas as pd

from posterpipe.core.errors import first_line
from posterpipe.core.files import fsync, write_atomic
from posterpipe.core.store import content_key, writing
from posterpipe.core.warehouse.rows import NO_SCORES, read_scores
from posterpipe.core.warehouse.schema import SCHEMA_VERSION, create_schema, schema_version

BUSY_SECONDS = 120.0
"""How long to wait for another process that has the file open."""

_BLOCK = 4096
"""Bytes of each of the three blocks that a DuckDB file begins with. The first one is written once,
with a random identifier by which DuckDB knows the log that belongs to the file. The two others are
headers that take turns: each checkpoint, the one at closing as well, counts on in the older one."""

_COUNT = slice(8, 16)
"""Where a header has that count, an unsigned number of 8 bytes, the lowest first."""

_opening = threading.Lock()

_writing: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

T = TypeVar("T")


class WarehouseError(Exception):
    """The warehouse cannot be used. The message names the file and says what to do."""


class WarehouseMissing(WarehouseError):
    """Nothing has been written yet."""


class WarehouseBusy(WarehouseError):
    """Another process has the file open. The message says which, where DuckDB tells."""


@dataclass(frozen=True)
class _State:
    """How far a file has got. The latest one that is known is noted beside it."""

    file: str
    """Digest of its first block."""
    checkpoints: int
    identity: str


class Warehouse:
    """The private file. `path` is the DuckDB file; its folder is created by the first write.

    DuckDB lets one process open a file for writing, and then no other, readers included: so it is
    opened for as short as possible, and whoever finds it locked waits up to `busy_seconds`.
    """

    def __init__(self, path: Path, *, busy_seconds: float = BUSY_SECONDS) -> None:
        self.path = Path(path)
        self.busy_seconds = busy_seconds

    def identity(self) -> str:
        """Of the file, "" where there is none: another one after it was lost and made again, or
        after a copy was put in its place that lacks what was written later; and the same whatever
        is written. Opens no database, so it can be asked while a step writes.

        Whoever fills the warehouse keeps it, to know that what it wrote is there no more. How far
        the file had got is noted beside it (`warehouse.json` for `warehouse.duckdb`) by `write` and
        `prepare`: a file that is behind that is an earlier copy.
        """
        now = self._state(self._noted())
        return now.identity if now else ""

    def prepare(self) -> str:
        """Creates the file where there is none, and notes how far it has got. Its `identity`.
        Raises WarehouseError and StoreError."""
        if not self.exists():
            self._create()
        self._note()
        return self.identity()

    def exists(self) -> bool:
        """Whether there is a file. Raises WarehouseError where that cannot be told."""
        try:
            return self.path.exists()
        except OSError as error:  # the folder may not be entered, say
            raise WarehouseError(
                f"{self.path}: cannot be looked at ({error.strerror}); make the store's folder "
                "readable, or choose another one with POSTERPIPE_STORE"
            ) from error

    @contextmanager
    def write(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection inside one transaction: committed at the end, rolled back on an error.

        Creates file and schema. Always closes. Raises WarehouseBusy, WarehouseError and StoreError.
        """
        if not self.exists():
            self._create()
        with self._turn():
            self._note()  # before: what is written now must not hide that the file is behind
            with self._connection(read_only=False) as connection:
                connection.begin()
                try:
                    self._prepare(connection)
                    yield connection
                    connection.commit()
                except BaseException as error:
                    # An error may have ended the transaction already.
                    with contextlib.suppress(duckdb.Error):
                        connection.rollback()
                    if _of_the_disk(error):
                        raise WarehouseError(
                            f"{self.path}: could not be written ({first_line(error)}); make room "
                            "on the disk and the folder writable, and do it again: nothing of it "
                            "was written"
                        ) from error
                    raise
            self._note()

    @contextmanager
    def read(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A read-only connection. Always closes. Raises WarehouseMissing and WarehouseBusy."""
        if not self.exists():
            raise WarehouseMissing(
                f"{self.path}: no scores have been written yet; materialize the asset "
                "`clip_scores` first"
            )
        with self._connection(read_only=True) as connection:
            yield connection

    def scores(
        self, metric_id: str, generation_keys: Iterable[str], *, with_failed: bool = False
    ) -> pd.DataFrame:
        """generation_key, value, status, reason of those images that have a score of that metric.

        Failed ones, which are to be tried again, only on request. Empty before the first write.
        """
        if not self.exists():
            return NO_SCORES.copy()
        with self.read() as connection:
            return read_scores(connection, metric_id, generation_keys, with_failed=with_failed)

    def _create(self) -> None:
        """Makes the file with its tables under another name, and links it into place whole.

        Between DuckDB's creating a file and its first lock on it, others would find a file of no
        bytes, which is no database; and then one without tables.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            with contextlib.closing(_open(new, read_only=False)) as connection:
                connection.begin()
                self._prepare(connection)
                connection.commit()
            with contextlib.suppress(FileExistsError):  # another process was first
                _link(new, self.path)
        except (duckdb.Error, OSError) as error:
            raise WarehouseError(
                f"{self.path}: cannot be created ({first_line(error)}); make room on the disk and "
                "the folder writable, and materialize the asset again"
            ) from error
        finally:
            for left in (new, new.with_name(f"{new.name}.wal")):
                with contextlib.suppress(OSError):
                    left.unlink()
        fsync(self.path.parent)

    def _state(self, noted: _State | None) -> _State | None:
        """How far the file has got; None where there is none.

        `noted`, how far it had got, is read before, so that a file which somebody is writing is
        never behind it. Two who find it behind give it the same new identity.
        """
        try:
            with open(self.path, "rb") as opened:
                first, *headers = (opened.read(_BLOCK) for _ in range(3))
        except FileNotFoundError:
            return None
        file = hashlib.sha256(first).hexdigest()[:16]
        checkpoints = max(int.from_bytes(header[_COUNT], "little") for header in headers)
        if noted is None:
            identity = file
        elif noted.file == file and noted.checkpoints <= checkpoints:
            identity = noted.identity
        else:
            identity = content_key(noted.identity, file)[:16]
        return _State(file, checkpoints, identity)

    def _noted(self) -> _State | None:
        """What was noted last; None before the first time, and where it cannot be read."""
        try:
            return _State(**json.loads(self._note_path.read_text("utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _note(self) -> None:
        """Notes how far the file has got. A crash that comes before leaves the note behind the
        file, which is taken for the same then."""
        noted = self._noted()
        now = self._state(noted)
        if now is not None and now != noted:
            with writing(self._note_path):
                write_atomic(self._note_path, (json.dumps(asdict(now)) + "\n").encode())

    @property
    def _note_path(self) -> Path:
        return self.path.with_suffix(".json")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """DuckDB's lock is one of processes; threads of one process would write at once, and the
        transactions of all but one would fail."""
        lock = _writing[str(self.path.resolve())]
        if not lock.acquire(timeout=self.busy_seconds):
            raise WarehouseBusy(_who_is_busy(self.path, "", self.busy_seconds))
        try:
            yield
        finally:
            lock.release()

    def _prepare(self, connection: duckdb.DuckDBPyConnection) -> None:
        version = schema_version(connection)
        if version == SCHEMA_VERSION:
            return
        if version is not None and version > SCHEMA_VERSION:
            raise WarehouseError(
                f"{self.path}: written by a newer posterpipe (schema {version}, this one knows "
                f"{SCHEMA_VERSION}); upgrade posterpipe or move the file away"
            )
        create_schema(connection)

    @contextmanager
    def _connection(self, *, read_only: bool) -> Iterator[duckdb.DuckDBPyConnection]:
        try:
            connection = retry_while_busy(
                lambda: _open(self.path, read_only=read_only),
                self.path,
                self.busy_seconds,
            )
        except duckdb.Error as error:
            log = f"take {self.path.name}.wal away if it is of a file that lay here before; else "
            raise WarehouseError(
                f"{self.path}: cannot be opened ({first_line(error)}); "
                f"{log if 'WAL' in str(error) else ''}make it readable and writable, or, if it is "
                "damaged, move it away and materialize `clip_scores` again"
            ) from error
        try:
            yield connection
        finally:
            connection.close()


def _open(path: Path, *, read_only: bool) -> duckdb.DuckDBPyConnection:
    # Threads that open one file share its instance, and one that comes at the wrong moment would
    # find it without the function that reads DataFrames, which DuckDB adds when it is there.
    with _opening:
        return duckdb.connect(str(path), read_only=read_only)


def _of_the_disk(error: BaseException) -> bool:
    """Whether it is the disk's fault; at a commit, DuckDB tells that as one of the transaction."""
    at_commit = isinstance(error, duckdb.TransactionException) and any(
        why in str(error) for why in ("Could not write", "Cannot open file")
    )
    return at_commit or isinstance(error, duckdb.IOException | duckdb.FatalException)


def _link(file: Path, place: Path) -> None:
    """Raises FileExistsError where something is at that place."""
    try:
        os.link(file, place)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if place.exists():
            raise FileExistsError(place) from None
        os.rename(file, place)


def retry_while_busy(open_it: Callable[[], T], path: Path, seconds: float) -> T:
    """What `open_it` returns, tried again while another connection has the file. Raises
    WarehouseBusy after `seconds`; other errors of DuckDB pass."""
    deadline = time.monotonic() + seconds
    pause = 0.02
    while True:
        try:
            return open_it()
        except duckdb.Error as error:
            text = str(error)
            if not _busy(text):
                raise
            if time.monotonic() + pause > deadline:
                raise WarehouseBusy(_who_is_busy(path, text, seconds)) from error
        # Jitter, so that two who wait do not keep in step.
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(pause * 2, 1.0)


def _busy(text: str) -> bool:
    return (
        "Could not set lock" in text
        or "different configuration than existing connections" in text
        or "being used by another process" in text
        or "already attached" in text
    )


def _who_is_busy(path: Path, text: str, seconds: float) -> str:
    found = re.search(r"held in (.+?) \(PID (\d+)\)(?: by user (\S+))?", text)
    if found:
        user = f" of {found[3].rstrip('.')}" if found[3] else ""
        who = f"process {found[2]}{user} ({found[1]}) has it open; end that, or wait for it"
    elif "lock" in text:
        who = "another process has it open; end that, or wait for it"
    else:
        who = "this process has it open elsewhere; close that connection first"
    return (
        f"{path}: still locked after {seconds:g} s: {who}. "
        "Analysts should query the published copy, which nobody locks"
    )
