"""What all tests share: how long a session may take, and in which order.

What belongs here: what holds for every test, and what tests of several folders share. What does
not: other fixtures, which lie beside their tests.
"""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_STARTED = time.monotonic()

_HERE = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def _no_file_outlives_a_power_failure() -> Iterator[None]:
    """What tests write need not, and waiting for the disk takes milliseconds for each file. Other
    processes wait as always."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def _what_was_imported_stays() -> None:
    """The collector need not look through it each time, which takes half a second once all models'
    libraries are there: a third of a small training's time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Lets all go as usual: DuckDB's bindings tell of what is left, on the screen."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def published_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `report_world`: read it only. dbt takes long to make it, so it is one for all
    processes that share the tests."""
    from posterpipe_tests.report_world import publish_world

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    world, done = shared / "published-world", shared / "published-world.done"
    with open(shared / "published-world.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(world, ignore_errors=True)
            world.mkdir()
            publish_world(world)
            done.touch()
    return world


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--budget SECONDS`, for slow tests where time is short."""
    parser.addoption(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="begin no test when so many seconds are over; those left out are named at the end",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves a test out when time is over."""
    budget = item.config.getoption("--budget")
    if budget is not None and time.monotonic() - _STARTED > budget:
        pytest.skip(f"left out, {budget:g} s are over: {item.nodeid}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the whole come first, those of parts later: a worker that begins the longest file
    last would work on it alone while the others are done.

    Slow ones that say how long they take (`slow(minutes=60)`) come after the rest: within a
    `--budget` one of them would leave out many.
    """
    items.sort(key=lambda item: (_minutes(item), item.path.parent != _HERE))


def _minutes(item: pytest.Item) -> float:
    slow = item.get_closest_marker("slow")
    return float(slow.kwargs.get("minutes", 0)) if slow else 0
