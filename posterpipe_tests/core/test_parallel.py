"""Several items at once, in order."""

from __future__ import annotations

import threading
import time

import pytest

from posterpipe.core.parallel import cores, parallel_map


def test_values_come_in_the_order_of_the_items() -> None:
    def slow_first(n: int) -> int:
        time.sleep(0.02 if n == 0 else 0)
        return n * n

    assert list(parallel_map(slow_first, range(50), threads=4)) == [n * n for n in range(50)]


def test_few_items_are_under_way_at_a_time() -> None:
    lock, started = threading.Lock(), 0

    def count(n: int) -> int:
        nonlocal started
        with lock:
            started += 1
        return n

    values = parallel_map(count, range(1000), threads=2)
    next(values)
    assert started <= 6
    values.close()  # type: ignore[attr-defined]


def test_an_error_comes_to_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(parallel_map(lambda n: 1 // n, [1, 0, 1]))


def test_there_is_at_least_one_core() -> None:
    assert cores() >= 1
