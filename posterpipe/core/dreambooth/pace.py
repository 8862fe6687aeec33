"""How often a run saves.

What belongs here: what a save costs, and when the next one may come. What does not: which steps ask
for one (`train`), what is written (`saves`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from posterpipe.core.progress import duration

WAIT_TIMES_COST = 20
"""A save waits so many times as long as the last one took: saving takes at most 5 % of the time."""

NEVER_WAITS_BELOW_SECONDS = 2.0
"""Saves that take less are made whenever they are due, so that small models save at steps
that do not depend on how busy the disk is."""


class SavePace:
    """Puts off saves that would take too large a share of the run.

    log: called for the first that is put off.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._cost = 0.0
        self._ended = 0.0
        self._logged = False

    def allows_save(self) -> bool:
        """Whether the last save is long enough ago, for what it took."""
        if self._cost < NEVER_WAITS_BELOW_SECONDS:
            return True
        wait = WAIT_TIMES_COST * self._cost
        if time.perf_counter() - self._ended >= wait:
            return True
        if not self._logged:
            self._log(
                f"a save takes {duration(self._cost)}: the next one comes {duration(wait)} after "
                "it, however few steps training.save_every_steps says"
            )
            self._logged = True
        return False

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Measures the save that is made inside."""
        started = time.perf_counter()
        yield
        self._ended = time.perf_counter()
        self._cost = self._ended - started
