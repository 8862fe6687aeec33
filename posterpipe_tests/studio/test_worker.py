"""The painter in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from posterpipe.settings import Settings
from posterpipe.studio.engine import Cancelled, Engine, take_order
from posterpipe.studio.painter import Painter
from posterpipe.studio.served import Models
from posterpipe.studio.worker import PainterDied, RemotePainter


@pytest.fixture
def remote(deployment: Settings) -> Iterator[RemotePainter]:
    remote = RemotePainter(deployment)
    yield remote
    remote.close()


def test_a_poster_from_the_process_is_that_of_this_one_and_a_kill_costs_one_request(
    deployment: Settings, remote: RemotePainter
) -> None:
    # One test for all, since each process loads torch anew.
    base = Models(deployment).served().base
    order = take_order(description="a red rocket", choices=[base], seed=7, title="Red One")
    assert not remote.ready(base)
    steps: list[tuple[int, int]] = []
    poster = remote.paint(order, base, 7, lambda step, of: steps.append((step, of)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert remote.ready(base)
    here = Painter(deployment).paint(order, base, 7, lambda step, of: None)
    assert poster.png == here.png and poster.score == pytest.approx(here.score)

    def cancel(step: int, of: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        remote.paint(order, base, 7, cancel)
    assert remote.paint(order, base, 7, lambda step, of: None).png == poster.png

    gone = type(base)("feedfacefeed", "tuned", deployment.root / "nowhere")
    with pytest.raises(Exception, match="no finished checkpoint"):
        remote.prepare(gone)

    killed = remote.pid
    assert killed is not None

    def kill(step: int, of: int) -> None:
        os.kill(killed, signal.SIGKILL)

    with pytest.raises(PainterDied, match="memory ran out"):
        remote.paint(order, base, 7, kill)
    engine = Engine(remote)
    view = engine.wait(engine.submit(order, "ann"), 120)
    assert view.state == "done" and view.posters[0].png == poster.png
    engine.close()
    assert remote.pid is None


def test_the_process_ends_with_the_studio() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "posterpipe.studio.worker"], stdin=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) is not None
