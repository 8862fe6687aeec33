"""Real processes, really killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from posterpipe.core.dreambooth import saves
from posterpipe.core.dreambooth.config import RunConfig, measure_versions
from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.core.dreambooth.launch import launch_command, launch_environment
from posterpipe.core.dreambooth.reports import StepReport
from posterpipe.core.dreambooth.train import train
from posterpipe.core.provenance.checkpoints import RECORD_NAME
from posterpipe_tests.core.conftest import disk_is_full
from posterpipe_tests.core.dreambooth.conftest import (
    MakeConfig,
    equal,
    saves_of,
    text_weights,
    unet_weights,
)

STEPS = 24

SHORT: dict[str, Any] = {
    "max_train_steps": 6,
    "save_every_steps": 2,
    "keep_saves": 2,
    "train_batch_size": 1,
    "ema_decay": 0.9,
    "caption_dropout": 0.3,
    "optimizer": "adamw_8bit",
}


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    # The same number of threads as this process: sums are added up in another order otherwise.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[3],
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def by_hand(config: RunConfig) -> list[str]:
    file = config.to_toml(config.work_dir / "run.toml")
    return [sys.executable, "-m", "posterpipe.core.dreambooth", "--config", str(file)]


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if words in line:
            return
    pytest.fail(f"never said {words!r}:\n{''.join(said)}")


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    text = {f"text.{name}": value for name, value in text_weights(config.output_dir).items()}
    return {**unet_weights(config.output_dir), **text}


# -- processes that a server forks after it has imported everything: quick to start ---------------


def in_process(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=target, args=(torch.get_num_threads(), *arguments))
    process.start()
    return process


def run_to_the_end(threads: int, config: RunConfig) -> None:
    torch.set_num_threads(threads)
    train(config)


def die_after_step(threads: int, config: RunConfig, step: int) -> None:
    torch.set_num_threads(threads)

    def report(row: StepReport) -> None:
        if row.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    train(config, report)


def die_in_line_of_a_save(threads: int, config: RunConfig, save: int, line: int) -> None:
    """Dies before the `line`-th line that is run while the `save`-th save is written."""
    torch.set_num_threads(threads)
    written = 0

    def write_save(*arguments: Any, **keywords: Any) -> Path:
        nonlocal written
        written += 1
        if written < save:
            return original(*arguments, **keywords)
        left = line

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename != saves.__file__:
                return None
            left -= event == "line"
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        try:
            return original(*arguments, **keywords)
        finally:
            sys.settrace(None)

    from posterpipe.core.dreambooth import run as module

    original, module.write_save = module.write_save, write_save
    train(config)


def finished(process: BaseProcess) -> int | None:
    process.join(timeout=300)
    return process.exitcode


@pytest.fixture
def uninterrupted(make_config: MakeConfig) -> RunConfig:
    config = make_config("whole", **SHORT)
    assert finished(in_process(run_to_the_end, config)) == 0
    return config


def assert_ends_like(config: RunConfig, whole: RunConfig) -> None:
    assert finished(in_process(run_to_the_end, config)) == 0
    assert equal(weights(config), weights(whole))
    assert not (config.work_dir / "saves").exists()
    assert [path.name for path in config.output_dir.parent.glob(".*.tmp")] == []


@pytest.mark.slow
def test_killed_after_any_step_a_run_ends_with_the_same_bits(
    make_config: MakeConfig, uninterrupted: RunConfig
) -> None:
    for step in range(1, 7):
        config = make_config(f"killed-{step}", **SHORT)
        assert finished(in_process(die_after_step, config, step)) == -signal.SIGKILL
        assert not config.output_dir.exists()
        assert_ends_like(config, uninterrupted)


@pytest.mark.slow(minutes=15)
def test_killed_in_any_line_of_a_save_a_run_ends_with_the_same_bits(
    make_config: MakeConfig, uninterrupted: RunConfig
) -> None:
    # The second save has one before it to fall back to; the third also removes the first. Every
    # 11th line, until one is reached that no save has: then the run goes through.
    for save in (2, 3):
        line, code = 1, None
        while code != 0:
            config = make_config(f"save-{save}-line-{line}", **SHORT)
            code = finished(in_process(die_in_line_of_a_save, config, save, line))
            assert code in (0, -signal.SIGKILL)
            assert_ends_like(config, uninterrupted)
            line += 11
        assert line > 30


@pytest.mark.slow
def test_killed_while_saving_a_run_ends_with_the_same_bits(
    make_config: MakeConfig, uninterrupted: RunConfig
) -> None:
    config = make_config("killed", **SHORT)
    assert finished(in_process(die_in_line_of_a_save, config, 2, 12)) == -signal.SIGKILL
    names = [path.name for path in saves_of(config)]
    assert names[-1] == "step-00000002" and names[0].startswith(".step-00000004")
    assert_ends_like(config, uninterrupted)


def test_a_killed_run_goes_on_to_the_same_bits(make_config: MakeConfig) -> None:
    settings = {"max_train_steps": STEPS, "save_every_steps": 3, "mixed_precision": "bf16"}
    whole = make_config("whole", **settings)
    killed = make_config("killed", **settings)
    uninterrupted = train(whole)

    with started(by_hand(killed)) as process:
        wait_for(process, f"step 8 of {STEPS}")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not killed.output_dir.exists()

    resumed = train(killed)
    assert 6 <= resumed.resumed_from < STEPS
    assert equal(weights(whole), weights(killed))
    assert [r.loss for r in resumed.reports] == [r.loss for r in uninterrupted.reports]
    assert [r.smoothed_loss for r in resumed.reports] == [
        r.smoothed_loss for r in uninterrupted.reports
    ]


def test_a_run_killed_before_its_model_was_written_only_writes_it(
    make_config: MakeConfig, other_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"holdout_set": other_set}
    settings: dict[str, Any] = {
        "max_train_steps": 40,
        "learning_rate": 0.05,
        "holdout_every_steps": 1,
        "early_stop_patience": 2,
    }
    whole = train(make_config("whole", parts=parts, **settings))

    config = make_config("cut", parts=parts, **settings)
    monkeypatch.setattr("posterpipe.core.dreambooth.checkpoint.write_card", disk_is_full)
    with pytest.raises(TrainingError, match=r"finished model could not be written \(No space"):
        train(config)
    monkeypatch.undo()
    assert not config.output_dir.exists()
    steps: list[int] = []
    result = train(config, lambda report: steps.append(report.step))
    assert steps == []
    assert (result.steps, result.ended_by) == (whole.steps, "early_stop")
    assert [m.loss for m in result.holdout] == [m.loss for m in whole.holdout]


def test_a_save_without_room_is_named_and_the_run_goes_on_from_the_one_before(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(max_train_steps=3, save_every_steps=1)

    def fill_the_disk(report: StepReport) -> None:
        if report.step == 2:
            monkeypatch.setattr(saves, "save_file", disk_is_full)

    with pytest.raises(TrainingError, match=r"save of step 2 could not be written \(No.*make room"):
        train(config, fill_the_disk)
    monkeypatch.undo()
    assert not config.output_dir.exists()
    assert train(config).resumed_from == 1


@pytest.mark.parametrize(
    ("stop", "launcher"),
    [
        pytest.param(signal.SIGINT, False, id="Ctrl-C", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, id="SIGTERM to the launcher"),  # ends in a SIGTERM too
        pytest.param(signal.SIGTERM, False, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_asked_to_stop_a_run_saves_and_ends_with_a_sentence(
    make_config: MakeConfig, stop: signal.Signals, launcher: bool
) -> None:
    config = make_config(max_train_steps=5000, save_every_steps=5000)
    command = by_hand(config)
    if launcher:
        command = launch_command(Path(command[-1]), cpu=True)
    with started(command) as process:
        wait_for(process, "step 3 of 5000")
        process.send_signal(stop)
        rest = process.communicate(timeout=240)[0]  # until the training has ended as well
    assert process.returncode == (-stop if launcher else 1), rest
    assert "training: asked to stop: saved at step" in rest and "Traceback" not in rest
    kept = saves_of(config)
    assert len(kept) == 1 and (kept[0] / "manifest.json").exists()


def with_files_up_to(
    threads: int, config: RunConfig, size: int, from_step: int, said: Connection
) -> None:
    """Trains where the system refuses larger files than `size` bytes, and tells what was said."""
    torch.set_num_threads(threads)

    def limit(step: int) -> None:
        if step >= from_step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    limit(0)
    try:
        train(config, lambda report: limit(report.step))
    except TrainingError as error:
        said.send(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "from_step", "settings", "words", "resumed_from"),
    [
        (2_000, 0, {}, "a latent or text embedding could not be written", 0),
        (200_000, 2, {}, "the save of step 2 could not be written", 1),
        (200_000, 0, {"method": "lora", "lora_rank": 1}, "the finished model could not", 3),
    ],
)
def test_where_the_system_refuses_a_file_a_sentence_says_so_and_the_run_can_go_on(
    make_config: MakeConfig,
    size: int,
    from_step: int,
    settings: dict[str, Any],
    words: str,
    resumed_from: int,
) -> None:
    config = make_config(max_train_steps=3, save_every_steps=1, **settings)
    hears, says = multiprocessing.Pipe(duplex=False)
    process = in_process(with_files_up_to, config, size, from_step, says)
    assert finished(process) == 0
    assert hears.poll()
    said = hears.recv()
    assert words in said and "File too large" in said and "make room" in said
    assert not config.output_dir.exists()
    assert train(config).resumed_from == resumed_from
    assert (config.output_dir / RECORD_NAME).exists()


def of_record(config: RunConfig) -> tuple[list[float], list[float], dict[str, Any]]:
    """Losses, held-out losses, and everything that the record of a finished run tells."""
    told = json.loads((config.output_dir / RECORD_NAME).read_text())
    return [row["loss"] for row in told["reports"]], [row["loss"] for row in told["holdout"]], told


@pytest.mark.slow
def test_two_processes_share_the_work_of_one(
    make_config: MakeConfig, other_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "max_train_steps": 3,
        "train_text_encoder": True,
        "text_encoder_stop_step": 1,
        "gradient_accumulation_steps": 2,
        "holdout_every_steps": 3,
    }
    parts = {"holdout_set": other_set}
    one = make_config("one", parts=parts, train_batch_size=4, **settings)
    two = make_config("two", parts=parts, train_batch_size=2, **settings)
    alone = train(one)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with started([*launcher, *by_hand(two)[1:]]) as process:
        output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert output.count("finished: 3 steps") == 1, output
    reports, holdout, told = of_record(two)
    assert reports == pytest.approx([r.loss for r in alone.reports], abs=1e-5)
    assert holdout == pytest.approx([m.loss for m in alone.holdout], abs=1e-5)
    # Their steps are those of twice the batch, and so the result has another name.
    assert told["processes"] == 2
    versions = measure_versions(two)
    assert told["checkpoint_id"] == two.checkpoint_id(versions, processes=2)
    assert told["checkpoint_id"] != two.checkpoint_id(versions)
    card = (two.output_dir / "README.md").read_text()
    assert "3 optimizer steps of 8 images (in 2 processes)" in card
    with pytest.raises(TrainingError, match="holds the checkpoint"):
        train(two)


def test_processes_wait_for_days_for_the_first_one(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One process as a launcher starts it: its group is made as that of several.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    for name, value in {**several, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    waits: list[timedelta] = []

    def look(report: StepReport) -> None:
        group: Any = dist.group.WORLD
        waits.append(group._get_backend(torch.device("cpu")).options._timeout)

    try:
        train(make_config(max_train_steps=1), look)
    finally:
        dist.destroy_process_group()
    assert waits == [timedelta(days=7)]


STOPPING = """
import sys
from pathlib import Path
from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.train import train

def stop(report):
    if str(report.step) == sys.argv[2]:
        raise KeyboardInterrupt

train(RunConfig.from_toml(Path(sys.argv[1])), stop)
"""


@pytest.mark.slow
def test_two_processes_that_go_on_report_the_losses_of_both(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The save of step 4 lies between two reports: it holds the loss of one step.
    settings = {"max_train_steps": 7, "log_every_steps": 3, "save_every_steps": 4}
    one = train(make_config("one", train_batch_size=4, **settings))
    two = make_config("two", train_batch_size=2, **settings)
    script, config = tmp_path / "stopping.py", two.to_toml(tmp_path / "two.toml")
    script.write_text(STOPPING)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    for stop_at in ("6", "never"):
        with started([*launcher, str(script), str(config), stop_at]) as process:
            output = process.communicate(timeout=300)[0]
        assert (process.returncode == 0) == (stop_at == "never"), output
    reports, _, told = of_record(two)
    assert [row["step"] for row in told["reports"]] == [1, 3, 6, 7]
    assert reports == pytest.approx([r.loss for r in one.reports], abs=1e-5)


SLOW_TO_SAVE = """
import sys, time
from pathlib import Path
from posterpipe.core.dreambooth import run as module
from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.train import train

def write_save(*arguments, **keywords):
    time.sleep(40)
    return original(*arguments, **keywords)

original, module.write_save = module.write_save, write_save
config = RunConfig.from_toml(Path(sys.argv[1]))
train(config, lambda report: print(report, flush=True))
"""


@pytest.mark.slow
def test_two_processes_that_are_asked_to_stop_have_the_time_to_save(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(max_train_steps=5000, save_every_steps=5000)
    script, file = tmp_path / "slow.py", config.to_toml(tmp_path / "run.toml")
    script.write_text(SLOW_TO_SAVE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    for name, value in launch_environment().items():
        monkeypatch.setenv(name, value)
    with started([*launcher, str(script), str(file)]) as process:
        wait_for(process, "step 3 of 5000")
        process.send_signal(signal.SIGINT)  # as Dagster does
        process.communicate(timeout=300)
    (kept,) = saves_of(config)
    assert (kept / "manifest.json").exists()


def test_an_error_of_all_processes_is_told_once(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    by_hand = ["-m", "posterpipe.core.dreambooth", "--config", str(tmp_path / "none.toml")]
    with started([*launcher, *by_hand]) as process:
        output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert output.count("none.toml: the run config cannot be read") == 1, output
