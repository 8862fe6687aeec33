"""What surrounds a run: its lock, the signal to stop, a disk that is full.

What belongs here: dealings with the operating system. What does not: training (`train`), saves,
memory (`memory`).
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from posterpipe.core.dreambooth.errors import TrainingError

_WAITING_LINE_EVERY_SECONDS = 60.0


@contextlib.contextmanager
def only_run_in(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of a work folder. The system lets go of it when the process dies.

    Waits for another process rather than failing: it may be the same training, orphaned by a
    killed parent, and then its result is used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spoken = -math.inf
    with open(folder / "lock", "a+", encoding="utf-8") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - spoken > _WAITING_LINE_EVERY_SECONDS:
                    lock.seek(0)
                    log(f"{folder}: waiting for process {lock.read().strip()}, which trains here")
                    spoken = time.monotonic()
                time.sleep(0.5)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """SIGTERM becomes a question the loop can ask between steps."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # Python delivers signals to the main thread only
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


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
            "was: make room, or the folder writable, and start the same run again"
        ) from error
