"""The painter in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from posterpipe.core.provenance.checkpoints import CheckpointMismatch
from posterpipe.settings import Settings
from posterpipe.studio import engine as engines
from posterpipe.studio.engine import Cancelled, Engine, Order, take_order
from posterpipe.studio.painter import Painter, Poster
from posterpipe.studio.served import Choice, Models
from posterpipe.studio.worker import PainterDied, RemotePainter

OnStep = Callable[[int, int], None]


@pytest.fixture
def remote(deployment: Settings) -> Iterator[RemotePainter]:
    remote = RemotePainter(deployment)
    yield remote
    remote.close()


def order(settings: Settings) -> Order:
    base = Models(settings).served().base
    return take_order(description="a red rocket", choices=[base], seed=7, title="Red One")


def paint(painter: RemotePainter | Painter, asked: Order, on_step: OnStep | None = None) -> Poster:
    (choice,), (seed,) = asked.choices, asked.seeds
    return painter.paint(asked, choice, seed, on_step or (lambda step, steps: None))


def test_the_process_paints_as_this_one_does_and_can_be_stopped(
    deployment: Settings, remote: RemotePainter, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One test for all, since each process loads torch anew.
    asked = order(deployment)
    (base,) = asked.choices
    assert not remote.ready(base)
    steps: list[tuple[int, int]] = []
    poster = paint(remote, asked, lambda step, of: steps.append((step, of)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert remote.ready(base)
    here = paint(Painter(deployment), asked)
    pixels = [np.asarray(one.image, dtype=int) for one in (poster, here)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1
    assert poster.score == pytest.approx(here.score, abs=1e-3)

    def cancel(step: int, of: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        paint(remote, asked, cancel)
    assert paint(remote, asked).png == poster.png

    gone = Choice("feedfacefeed", "tuned", deployment.root / "nowhere")
    with pytest.raises(CheckpointMismatch, match="no finished checkpoint"):
        remote.prepare(gone)

    monkeypatch.setattr(engines, "IDLE_SECONDS", 0.1)
    engine = Engine(remote)
    engine.warm(base)
    deadline = time.monotonic() + 30
    while remote.pid is not None:
        assert time.monotonic() < deadline, "the process of an idle studio does not end"
        time.sleep(0.05)
    engine.close()


@pytest.mark.slow
def test_a_killed_process_costs_one_request(deployment: Settings, remote: RemotePainter) -> None:
    asked = order(deployment)

    def kill(step: int, of: int) -> None:
        assert remote.pid is not None
        os.kill(remote.pid, signal.SIGKILL)

    with pytest.raises(PainterDied, match="memory ran out"):
        paint(remote, asked, kill)
    engine = Engine(remote)
    assert engine.wait(engine.submit(asked, "ann"), 120).state == "done"
    engine.close()
    assert remote.pid is None


def test_the_process_ends_with_the_studio() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "posterpipe.studio.worker"], stdin=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) is not None
