"""What surrounds a run: its lock, the signal to stop, and what to say when memory runs out.

What belongs here: dealings with the operating system. What does not: training (`train`), saves.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.settings import TrainingSettings

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python could not get the memory it asked for."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextlib.contextmanager
def memory_hint(settings: TrainingSettings) -> Iterator[None]:
    """Out of memory becomes a sentence with the settings that need less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        remedies = []
        if settings.train_batch_size > 1:
            half = settings.train_batch_size // 2
            remedies.append(
                f"training.train_batch_size = {half} with gradient_accumulation_steps = "
                f"{settings.gradient_accumulation_steps * 2} (or halve_batch_on_out_of_memory = "
                "true, which does it when it is needed)"
            )
        if not settings.gradient_checkpointing:
            remedies.append("training.gradient_checkpointing = true")
        if settings.mixed_precision == "fp32":
            remedies.append('training.mixed_precision = "bf16"')
        if settings.optimizer != "adamw_8bit" and settings.method == "full":
            remedies.append('training.optimizer = "adamw_8bit"')
        if settings.ema_decay is not None:
            remedies.append("training.ema_decay unset")
        if settings.train_text_encoder:
            remedies.append("training.train_text_encoder = false")
        if settings.method == "full":
            remedies.append('training.method = "lora"')
        raise TrainingError(
            f"out of memory; each of these needs less: {'; '.join(remedies) or 'smaller images'}"
        ) from error


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far: the accelerator's, on CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
