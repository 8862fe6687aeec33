"""Progress in words and bars."""

from __future__ import annotations

import io
import sys

import pytest

from posterpipe.core.progress import BarProgress, LogProgress, NoProgress, duration


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_tell_how_many_how_fast_and_how_long_still() -> None:
    clock, lines = Clock(), list[str]()
    with LogProgress(lines.append, 5.0, clock=clock).task("draw", 40, "images") as tick:
        for _ in range(4):
            clock.now += 2.5
            tick(2, loss=0.12345)
    assert lines == [
        "draw: 4 of 40 images (10 %), 0.8 images/s, about 45 s left, loss 0.1235",
        "draw: 8 of 40 images (20 %), 0.8 images/s, about 40 s left, loss 0.1235",
        "draw: 8 of 40 images in 10 s, 0.8 images/s, loss 0.1235",
    ]


def test_what_was_done_before_counts_as_done_but_not_as_fast() -> None:
    clock, lines = Clock(), list[str]()
    with LogProgress(lines.append, 5.0, clock=clock).task("train", 100, already=60) as tick:
        for _ in range(2):
            clock.now += 10
            tick(10)
    assert lines[0] == "train: 70 of 100 items (70 %), 1 items/s, about 30 s left"
    assert lines[-1] == "train: 80 of 100 items in 20 s, 1 items/s"


def test_a_finished_task_says_so_once() -> None:
    clock, lines = Clock(), list[str]()
    with LogProgress(lines.append, 5.0, clock=clock).task("draw", 2, "images") as tick:
        for _ in range(2):
            clock.now += 60
            tick()
    assert lines[-1] == "draw: 2 images in 2 min 0 s, 1 min 0 s each"
    assert len(lines) == 2


def test_work_that_fails_says_how_far_it_came() -> None:
    lines = list[str]()
    with (
        pytest.raises(ValueError),
        LogProgress(lines.append, clock=Clock()).task("draw", 3) as tick,
    ):
        tick()
        raise ValueError
    assert lines == ["draw: stopped after 1 of 3 items in 0 s"]


def test_no_work_is_no_news() -> None:
    lines = list[str]()
    with LogProgress(lines.append).task("draw", 0):
        pass
    assert lines == []


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    with NoProgress().task("draw", 3) as tick:
        tick(2, loss=0.1)
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_the_bar_prints_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with BarProgress().task("draw", 2, "images") as tick:
        tick(2)
    assert "draw: 2 images in" in capsys.readouterr().out


def test_in_a_terminal_overlapping_tasks_share_one_display(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    progress = BarProgress()
    with progress.task("train", 2, "steps") as outer, progress.task("draw", 4, "images") as inner:
        inner(4)
        outer(2, loss=0.5)
    shown = terminal.getvalue()
    assert "train" in shown
    assert "4/4" in shown
    assert "loss 0.5" in shown


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (7.2, "8 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
