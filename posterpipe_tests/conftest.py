"""What all tests share: how long a session may take, and in which order.

What belongs here: options of the session. What does not: fixtures, which lie beside their tests.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

_STARTED = time.monotonic()

_HERE = Path(__file__).parent


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
    last would work on it alone while the others are done."""
    items.sort(key=lambda item: item.path.parent != _HERE)
