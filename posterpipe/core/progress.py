"""How long work tells how far it is.

What belongs here: the protocol that long steps report to, and its forms: silent, log lines, a bar
in a terminal. What does not: the work, and Dagster's log (give `LogProgress` its `info`).
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text


class Progress(Protocol):
    """Where long work reports."""

    def task(
        self, description: str, total: int, unit: str = "items", *, already: int = 0
    ) -> AbstractContextManager[Callable[..., None]]:
        """One piece of work of `total` items, of which `already` were done before.

        The yielded `tick(n=1, **numbers)` advances by n items; numbers such as `loss=0.12` are
        shown beside. It may be called from several threads.
        """
        ...


class NoProgress:
    """Says nothing."""

    @contextmanager
    def task(
        self, description: str, total: int, unit: str = "items", *, already: int = 0
    ) -> Iterator[Callable[..., None]]:
        """See `Progress.task`."""
        yield lambda n=1, **numbers: None


NO_PROGRESS = NoProgress()


class LogProgress:
    """One line every few seconds: how many, how fast, how long still.

    `log` gets the lines; `every_seconds` is the least time between two of one task; `clock` gives
    seconds.
    """

    def __init__(
        self,
        log: Callable[[str], None],
        every_seconds: float = 5.0,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._every_seconds = every_seconds
        self._clock = clock

    @contextmanager
    def task(
        self, description: str, total: int, unit: str = "items", *, already: int = 0
    ) -> Iterator[Callable[..., None]]:
        """See `Progress.task`."""
        lock = threading.Lock()
        started = spoken = self._clock()
        done = already
        shown: dict[str, Any] = {}

        def tick(n: int = 1, **numbers: Any) -> None:
            nonlocal done, spoken
            with lock:
                done += n
                shown.update(numbers)
                now = self._clock()
                if done >= total or now - spoken < self._every_seconds:
                    return
                spoken = now
                line = (
                    f"{description}: {done} of {total} {unit} ({100 * done // total} %)"
                    f"{_rate(done - already, now - started, unit)}"
                    f"{_left(done - already, total - already, now - started)}"
                    f"{_numbers(shown)}"
                )
            self._log(line)

        finished = False
        try:
            yield tick
            finished = True
        finally:
            took = self._clock() - started
            self._end(description, already, done, total, unit, took, finished, shown)

    def _end(
        self,
        description: str,
        already: int,
        done: int,
        total: int,
        unit: str,
        took: float,
        finished: bool,
        shown: dict[str, Any],
    ) -> None:
        if total > 0 or done > 0:  # no work is no news
            verb = "" if finished else "stopped after "
            of = "" if done == total else f" of {total}"
            self._log(
                f"{description}: {verb}{done}{of} {unit} in {duration(took)}"
                f"{_rate(done - already, took, unit)}{_numbers(shown)}"
            )


class BarProgress:
    """A bar in a terminal; lines as of `LogProgress` where the output is no terminal.

    `console` is where it appears: the standard output, unless that is being captured.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._lines = LogProgress(self._print)
        self._lock = threading.Lock()
        self._display: RichProgress | None = None
        self._open = 0

    @contextmanager
    def task(
        self, description: str, total: int, unit: str = "items", *, already: int = 0
    ) -> Iterator[Callable[..., None]]:
        """See `Progress.task`."""
        if total <= 0 or not self._in_terminal():
            with self._lines.task(description, total, unit, already=already) as lines:
                yield lines
            return
        display = self._enter()
        bar = display.add_task(description, total=total, completed=already, unit=unit, shown="")
        shown: dict[str, Any] = {}

        def tick(n: int = 1, **numbers: Any) -> None:
            shown.update(numbers)
            display.update(bar, advance=n, shown=_numbers(shown).removeprefix(", "))

        try:
            yield tick
        finally:
            display.stop_task(bar)
            self._leave()

    def _in_terminal(self) -> bool:
        return self._console.is_terminal if self._console else sys.stdout.isatty()

    def _print(self, line: str) -> None:
        if self._console:
            self._console.print(line, markup=False, soft_wrap=True)
        else:
            print(line, flush=True)

    # Tasks that overlap share one display: a terminal has room for one.
    def _enter(self) -> RichProgress:
        with self._lock:
            self._open += 1
            if self._display is None:
                self._display = RichProgress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[unit]}"),
                    _RateColumn(),
                    TimeRemainingColumn(elapsed_when_finished=True),
                    TextColumn("{task.fields[shown]}"),
                    console=self._console,
                )
                self._display.start()
            return self._display

    def _leave(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0 and self._display is not None:
                self._display.stop()
                self._display = None


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g}/s" if speed else "", style="progress.data.speed")


def duration(seconds: float) -> str:
    """Seconds in words: `8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = math.ceil(seconds) if seconds > 0 else 0
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _rate(done: int, seconds: float, unit: str) -> str:
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    return f", {rate:.3g} {unit}/s" if rate >= 0.1 else f", {duration(1 / rate)} each"


def _left(done: int, total: int, seconds: float) -> str:
    if done <= 0:
        return ""
    return f", about {duration(seconds / done * (total - done))} left"


def _numbers(shown: dict[str, Any]) -> str:
    return "".join(
        f", {name} {value:.4g}" if isinstance(value, float) else f", {name} {value}"
        for name, value in shown.items()
    )
