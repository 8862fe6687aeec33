"""Signals, as the system delivers them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from posterpipe.core.dreambooth import guards
from posterpipe.core.dreambooth.__main__ import main
from posterpipe.settings import default_root
from posterpipe_tests.core.dreambooth.conftest import MakeConfig


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """Python's own answer to Ctrl-C, which the workers of a test run go without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


BY_HAND = """
import sys, time, types
from pathlib import Path

def train(config, report, log):
    lock = open("lock", "w")  # takes the number of a stream that is closed
    time.sleep(0.5)  # the reader of a pipe goes
    for step in range(3):
        log(f"step {step}")
        report(f"report {step}")
        print("a warning", file=sys.stderr)
    lock.close()
    assert Path("lock").read_bytes() == b""
    Path("trained").write_text("to the end")
    return types.SimpleNamespace(
        steps=1, ended_by="steps", final_loss=0.5, checkpoint_id="c0ffee", output_dir="out"
    )

sys.modules["posterpipe.core.dreambooth.train"] = types.SimpleNamespace(train=train)
from posterpipe.core.dreambooth.__main__ import main
sys.exit(main())
"""
"""A run by hand, without its minutes of training."""


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_asks_to_stop_and_later_again_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(guards, "_ECHO_SECONDS", 0.2)
    with guards.stop_signal() as asked:
        assert not asked()
        press_ctrl_c()
        press_ctrl_c()  # the same one, passed on by a launcher
        assert asked()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_end_of_the_terminal_asks_to_stop_unless_it_is_to_be_ignored() -> None:
    before = signal.signal(signal.SIGHUP, lambda *_: pytest.fail("would have been the end"))
    try:
        with guards.stop_signal() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with guards.stop_signal() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_whoever_trains_in_a_folder_is_waited_for_unless_he_did_before(tmp_path: Path) -> None:
    waits = partial(guards.wait_until_none_trains, tmp_path / "work", 60.0)
    assert guards.trains_in(tmp_path / "work") is None
    with guards.only_run_in(tmp_path / "work", print):
        holder = guards.trains_in(tmp_path / "work")
        assert holder == str(os.getpid())
        waits(besides=holder)
        guards.wait_until_none_trains(tmp_path / "work", 0.0, besides=None)
    waits(besides=None)
    assert guards.trains_in(tmp_path / "work") is None


def test_who_writes_a_folder_is_waited_for_and_leaves_no_lock(tmp_path: Path) -> None:
    said: list[str] = []
    inside: list[int] = []

    def write(number: int) -> None:
        with guards.only_writer_of(tmp_path / "new" / "out", said.append):
            inside.append(number)
            time.sleep(0.05)
            assert inside == [number]
            inside.clear()

    with ThreadPoolExecutor(3) as pool:
        with guards.only_writer_of(tmp_path / "new" / "out", said.append):
            others = [pool.submit(write, number) for number in range(3)]
            while len(said) < 3:
                time.sleep(0.01)
            assert not inside
        for other in others:
            other.result()
    assert f"out: waiting for process {os.getpid()}, which writes it" in said[0]
    assert list((tmp_path / "new").iterdir()) == []


def test_ctrl_c_while_loading_ends_with_a_sentence(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **keywords: object) -> None:
        press_ctrl_c()
        time.sleep(5)

    monkeypatch.setattr("posterpipe.core.dreambooth.train.train", interrupted)
    config = make_config()
    file = config.to_toml(config.work_dir / "run.toml")
    monkeypatch.setattr("sys.argv", ["training", "--config", str(file)])
    assert main() == 130
    assert "training: ended at once; start it again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "listens"),
    [
        ('exec "$@" >&- 2>&-', "nothing was printed"),
        ('exec "$@" <&- >/dev/full 2>&1', "nothing was printed"),
        ('"$@" 2>&1 | head -1; exit "${PIPESTATUS[0]}"', "loading the models ...\n"),
    ],
)
def test_a_training_whose_output_nobody_takes_goes_on(
    make_config: MakeConfig, tmp_path: Path, script: str, listens: str
) -> None:
    config = make_config(max_train_steps=1)
    file = config.to_toml(tmp_path / "run.toml")
    (tmp_path / "by_hand.py").write_text(BY_HAND)
    command = [sys.executable, str(tmp_path / "by_hand.py"), "--config", str(file)]
    done = subprocess.run(
        ["bash", "-c", script, "bash", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(default_root())},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (done.stdout or "nothing was printed") == listens
    assert (tmp_path / "trained").read_text() == "to the end"


def test_signals_that_come_while_one_is_handled_stop_nothing_but_the_run() -> None:
    """A service that is stopped and its dying launcher both send one, at nearly the same time."""
    receiver = """
import os, subprocess, sys
from posterpipe.core.dreambooth.guards import stop_signal
sender = f"import os\\nfor _ in range(200_000): os.kill({os.getpid()}, 15)"
with stop_signal() as asked:
    sending = subprocess.Popen([sys.executable, "-c", sender])
    while sending.poll() is None:
        asked()
    print(asked())
"""
    done = subprocess.run(
        [sys.executable, "-c", receiver], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
