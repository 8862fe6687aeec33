"""Leases: how others see that a process works.

What belongs here: taking a lease, and asking which are held. What does not: what it stands for: in
the store that nothing in use is removed (`store`), in DAGSTER_HOME that a run goes on
(`defs.launcher`).

A lease is a locked file. The system lets go of it when its process ends, however it ends. So nobody
compares process numbers, which are given out again, or names of hosts, which containers change.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Lease:
    """One that this process holds."""

    path: Path
    handle: int

    @property
    def name(self) -> str:
        """By which others ask for it."""
        return self.path.name

    def give_back(self) -> None:
        """The work is done."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
        os.close(self.handle)

    def abandon(self) -> None:
        """The work was given up: as if the process had ended."""
        os.close(self.handle)


class Leases:
    """The leases in a folder, which need not be there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take(self) -> Lease | None:
        """A new lease; None where nothing can be written or locked."""
        while True:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError:
                return None
            path = self._folder / f"{uuid.uuid4().hex}.lease"
            handle = open_lock(path)
            if handle is None:
                return None
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError:  # not every file system has locks
                os.close(handle)
                self.remove(path.name)
                return None
            # Between opening and locking it, it looked like that of a dead process.
            if path.exists():
                return Lease(path, handle)
            os.close(handle)

    def live(self) -> list[float]:
        """When the leases began that processes hold now, in seconds since 1970.

        Those of processes that ended without giving theirs back are removed.
        """
        begun: list[float] = []
        for path in self._folder.glob("*.lease"):
            with suppress(OSError), _opened(path) as handle:  # or given back meanwhile
                if _lock(handle, fcntl.LOCK_EX):
                    path.unlink(missing_ok=True)
                else:
                    begun.append(os.fstat(handle).st_mtime)
        return begun

    def abandoned(self) -> list[str]:
        """The names of those whose process ended without giving them back."""
        names = [path.name for path in self._folder.glob("*.lease")]
        return [name for name in names if self.is_abandoned(name)]

    def is_abandoned(self, name: str) -> bool:
        """Whether the process ended that took the lease, without giving it back."""
        with suppress(OSError), _opened(self._folder / name) as handle:
            return _lock(handle, fcntl.LOCK_SH)  # others may ask at the same time
        return False

    def remove(self, name: str) -> None:
        """Remove a lease that was abandoned."""
        with suppress(OSError):
            (self._folder / name).unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDWR)
    try:
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int, how: int) -> bool:
    """Lock a file, unless another process has it locked; whether it is."""
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def open_lock(path: Path) -> int | None:
    """A handle of a file to lock, created where it is not there; None where it cannot be."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        return None
