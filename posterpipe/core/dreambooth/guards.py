"""What surrounds a run: its locks, the signal to stop, a disk that is full.

What belongs here: dealings with the operating system. What does not: training (`train`), saves,
memory (`memory`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO

from safetensors import SafetensorError

from posterpipe.core.dreambooth.errors import TrainingError

_WAITING_LINE_EVERY_SECONDS = 60.0

# One Ctrl-C comes twice under torch's launcher: from the terminal, and passed on by the launcher.
_ECHO_SECONDS = 1.0

_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def only_run_in(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of a work folder. The system lets go of it when the process dies.

    Waits for another process rather than failing: it may be the same training, orphaned by a
    killed parent, and then its result is used. Raises TrainingError for a folder that cannot be
    used.
    """
    with contextlib.ExitStack() as stack:
        with writing("the lock of runs in progress", folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / "lock", "a+", encoding="utf-8"))
            _take(lock, lambda holder: log(f"{folder}: waiting for {holder}, which trains here"))
        yield


@contextlib.contextmanager
def only_writer_of(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of a folder that is to appear; it lies beside it and goes in the end.

    Runs with several work folders may have one `path`. Waits as `only_run_in` does. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_name(f".{path.name}.lock.tmp")
    while True:
        with open(place, "a+", encoding="utf-8") as lock:
            _take(lock, lambda holder: log(f"{path}: waiting for {holder}, which writes it"))
            if not _is_at(place, lock):  # the one before has removed it
                continue
            try:
                yield
            finally:
                place.unlink(missing_ok=True)
            return


def _take(lock: IO[str], waits: Callable[[str], None]) -> None:
    """Locks a file and writes this process into it; `waits` gets its holder, once a minute."""
    spoken = -math.inf
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() - spoken > _WAITING_LINE_EVERY_SECONDS:
                lock.seek(0)
                waits(f"process {lock.read().strip()}")
                spoken = time.monotonic()
            time.sleep(0.5)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def trains_in(folder: Path) -> str | None:
    """The id of the process that holds the lock of a work folder; None where none does."""
    path = folder / "lock"
    if not path.exists():
        return None
    with open(path, encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read().strip()
    return None


def wait_until_none_trains(folder: Path, seconds: float, *, besides: str | None) -> None:
    """Returns when no process holds the lock of a work folder, or after so many seconds; one whose
    id is `besides` is not waited for."""
    end = time.monotonic() + seconds
    while trains_in(folder) not in (None, besides) and time.monotonic() < end:
        time.sleep(0.5)


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """SIGTERM, Ctrl-C and the end of the terminal become a question the loop can ask between steps.
    A further Ctrl-C is a KeyboardInterrupt as ever."""
    # No threading.Event: a second signal (a service's and the dying launcher's come together) may
    # be handled while the first is, and would wait for ever for the lock that `set` holds.
    asked = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: asked  # Python delivers signals to the main thread only
        return
    first = math.inf

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked, first
        now = time.monotonic()
        if number == signal.SIGINT and now - first > _ECHO_SECONDS:
            raise KeyboardInterrupt
        first = min(first, now)
        asked = True

    asking = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        asking.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in asking}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_with_parent() -> None:
    """Asks the system for SIGTERM, on which a run saves and ends, when the launcher dies: without
    it, a cancelled run would leave its training behind. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def launched() -> bool:
    """Whether a launcher, torch's or accelerate's, is the parent of this process."""
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


@contextlib.contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """While inside, a file that cannot be written is a TrainingError that names `what` and `path`.

    Everything is written under a temporary name first, so what was there before is as it was.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system said
        reason = getattr(error, "strerror", None) or str(error)
        raise TrainingError(
            f"{path}: {what} could not be written ({reason}); what was written before is as it "
            "was: make room, or the folder writable, or change it, and start the same run again"
        ) from error
