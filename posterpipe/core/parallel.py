"""Several items at once, on threads.

What belongs here: the one way in which core works on many small items at the same time. What does
not: batches for a model (the workers make their own) and processes (Dagster's executor).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


def cores() -> int:
    """CPU cores that this process may use; `os.cpu_count` counts those of the host."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parallel_map(
    function: Callable[[Item], Value],
    items: Iterable[Item],
    threads: int | None = None,
    *,
    ahead: int | None = None,
    prepare_thread: Callable[[], None] | None = None,
) -> Iterator[Value]:
    """`function` of each item, in the order of the items, on `threads` threads (default: cores).

    Only a few items are under way at a time, so neither items nor values pile up in memory: `ahead`
    of those that were taken (default: two a thread), such as a batch while one is worked on. Each
    thread calls `prepare_thread` first. Pillow, hashlib and torch let go of the interpreter while
    they work, so threads are enough.
    """
    threads = threads or cores()
    ahead = ahead or 2 * threads
    with ThreadPoolExecutor(threads, "posterpipe", prepare_thread) as pool:
        waiting: deque[Future[Value]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
