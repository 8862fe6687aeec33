"""The training process as Dagster starts it, and that it is the one that starts by hand."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
import torch
from dagster._core.errors import DagsterExecutionInterruptedError  # not exported
from safetensors.torch import load_file

from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.guards import trains_in
from posterpipe.core.dreambooth.launch import launch_command
from posterpipe.defs import training
from posterpipe.defs.training import WORKER, _Reports
from posterpipe.training_settings import TrainingSettings
from posterpipe_tests.core.dreambooth.conftest import write_training_set
from posterpipe_tests.models import TINY_HEIGHT, TINY_WIDTH, build_tiny_stable_diffusion


def run_in(folder: Path, **training: Any) -> RunConfig:
    """Of a tiny model."""
    return RunConfig(
        base_model=build_tiny_stable_diffusion(folder / "base"),
        training_set=write_training_set(folder / "set"),
        output_dir=folder / "out",
        work_dir=folder / "work",
        width=TINY_WIDTH,
        height=TINY_HEIGHT,
        training=TrainingSettings(**training),
    )


def test_reports_and_errors_reach_dagster_and_the_result_is_shown(tmp_path: Path) -> None:
    config = run_in(tmp_path, max_train_steps=2, train_batch_size=2, log_every_steps=1)
    steps: list[Any] = []

    @dg.asset
    def checkpoint(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        client = dg.PipesSubprocessClient(cwd=str(Path(__file__).parents[2]))
        file = config.to_toml(tmp_path / "work" / "run.toml")
        command = launch_command(file, module="posterpipe.defs.training_worker", cpu=True)
        steps.extend(client.run(command=command, context=context).get_custom_messages())
        return dg.MaterializeResult()

    @dg.asset
    def failing(context: dg.AssetExecutionContext) -> None:
        client = dg.PipesSubprocessClient(cwd=str(Path(__file__).parents[2]))
        # Without the launcher: the module works by itself, too.
        file = str(tmp_path / "none.toml")
        by_hand = [sys.executable, "-m", "posterpipe.defs.training_worker", "--config", file]
        client.run(command=by_hand, context=context)

    with dg.DagsterInstance.ephemeral() as instance:
        assert dg.materialize([checkpoint], instance=instance).success
        failed = dg.materialize([failing], instance=instance, raise_on_error=False)
        said = "\n".join(entry.user_message for entry in instance.all_logs(failed.run_id))

    assert [message["step"] for message in steps] == [1, 2]
    assert {"total", "loss", "smoothed_loss", "lr", "seconds_left"} <= steps[0].keys()
    record = json.loads((tmp_path / "out" / "posterpipe.json").read_text())
    shown = training._metadata(tmp_path / "out", record)
    assert shown["steps"] == 2
    assert Path(shown["metrics"].value).exists()
    # Where the weights are those of an earlier step, the speed counts all of them.
    earlier = training._metadata(tmp_path / "out", record | {"steps": 0})
    assert earlier["steps_per_second"] == shown["steps_per_second"] > 0
    assert not failed.success
    assert "none.toml: the run config cannot be read" in said


SLOW_TO_SAVE = """
import time
from posterpipe.core.dreambooth import run as module
from posterpipe.defs import training_worker

def write_save(*arguments, **keywords):
    time.sleep(3)
    return original(*arguments, **keywords)

original, module.write_save = module.write_save, write_save
training_worker.main()
"""


class CancelledAtTheFirstReport:
    """A progress during which the step is interrupted, as Dagster does it."""

    @contextmanager
    def task(self, *_: object, **__: object) -> Iterator[Callable[..., None]]:
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        signal.pthread_kill(main_thread, signal.SIGINT)
        yield lambda *_, **__: None


@pytest.mark.slow
def test_a_cancelled_step_ends_when_its_training_has_saved_and_let_go_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_in(tmp_path, max_train_steps=5000, train_batch_size=1, save_every_steps=5000)
    (tmp_path / "slow_worker.py").write_text(SLOW_TO_SAVE)
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(root))))
    deployment: Any = SimpleNamespace(
        progress=lambda context: CancelledAtTheFirstReport(), settings=SimpleNamespace(root=root)
    )
    file = config.to_toml(config.work_dir / "run.toml")

    @dg.asset
    def checkpoint(context: dg.AssetExecutionContext) -> None:
        command = launch_command(file, module="slow_worker", cpu=True)
        training._train(context, deployment, command, config.work_dir)

    with dg.DagsterInstance.ephemeral() as instance:
        with pytest.raises(DagsterExecutionInterruptedError):
            dg.materialize([checkpoint], instance=instance)
        assert trains_in(config.work_dir) is None
        (run,) = instance.get_runs()
        said = "\n".join(entry.user_message for entry in instance.all_logs(run.run_id))
    assert "asked to stop: saved at step" in said
    assert len(list(config.work_dir.glob("saves/*/step-*/manifest.json"))) == 1


def test_an_error_of_another_process_than_the_first_reaches_dagster(tmp_path: Path) -> None:
    reader = _Reports(tmp_path)

    @dg.asset
    def failing(context: dg.AssetExecutionContext) -> None:
        client = dg.PipesSubprocessClient(
            cwd=str(Path(__file__).parents[2]), message_reader=reader, env={"RANK": "1"}
        )
        command = [sys.executable, "-m", WORKER, "--config", str(tmp_path / "none.toml")]
        client.run(command=command, context=context)

    with dg.DagsterInstance.ephemeral() as instance:
        failed = dg.materialize([failing], instance=instance, raise_on_error=False)
        said = "\n".join(entry.user_message for entry in instance.all_logs(failed.run_id))
    assert not failed.success
    assert "training, process 1: " in said
    assert "none.toml: the run config cannot be read" in reader.last_words
    # The first process then only misses the one that failed.
    missed = {"exception": {"message": "Connection closed by peer"}}
    reader._read({"method": "closed", "params": missed})
    assert "none.toml" in reader.last_words


def in_a_terminal(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and output of a command that believes it speaks to a person."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command, stdout=theirs, stderr=theirs, env=environment, cwd=Path(__file__).parents[2]
    ) as process:
        os.close(theirs)
        said = b""
        try:
            while part := os.read(ours, 4096):
                said += part
        except OSError:  # what Linux says at the end of a terminal
            pass
        os.close(ours)
    return process.returncode, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())


@pytest.mark.slow
def test_by_hand_under_accelerate_and_from_dagster_the_same_bits_come_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other numbers add up in another order
    base = build_tiny_stable_diffusion(tmp_path / "base")
    posters = write_training_set(tmp_path / "set")
    held_out = write_training_set(tmp_path / "held out", seed=6)

    def config(name: str) -> Path:
        return RunConfig(
            base_model=base,
            training_set=posters,
            holdout_set=held_out,
            output_dir=tmp_path / name / "out",
            work_dir=tmp_path / name / "work",
            width=TINY_WIDTH,
            height=TINY_HEIGHT,
            training=TrainingSettings(
                max_train_steps=4,
                train_batch_size=2,
                learning_rate=1e-3,
                lr_warmup_steps=0,
                holdout_every_steps=2,
                log_every_steps=1,
            ),
        ).to_toml(tmp_path / name / "run.toml")

    by_hand = [sys.executable, "-m", "posterpipe.core.dreambooth", "--config"]
    environment = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
    status, screen = in_a_terminal([*by_hand, str(config("hand"))], environment)
    assert status == 0, screen
    last = screen.split("finished:")[0].rstrip().splitlines()[-1]
    counted = (r"4/4\s+steps", r"/s\b", r"\d:\d\d:\d\d")
    shown = (r"loss \d", r"held-out \d", r"\blr 0\.001", r"text lr 0\.001", r"GiB \d")
    for part in (*counted, *shown):
        assert re.search(part, last), (part, last)

    launched = launch_command(config("accelerate"), cpu=True)
    assert launched[1:3] == ["-m", "accelerate.commands.launch"]
    done = subprocess.run(launched, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "held-out" in done.stdout and "finished: 4 steps" in done.stdout

    @dg.asset
    def checkpoint(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        client = dg.PipesSubprocessClient(cwd=str(Path(__file__).parents[2]))
        command = launch_command(config("dagster"), module=WORKER, cpu=True)
        client.run(command=command, context=context)
        return dg.MaterializeResult()

    with dg.DagsterInstance.ephemeral() as instance:
        assert dg.materialize([checkpoint], instance=instance).success

    def weights(name: str) -> dict[str, torch.Tensor]:
        folder = tmp_path / name / "out"
        unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        return unet | load_file(folder / "text_encoder" / "model.safetensors")

    wanted = weights("hand")
    for name in ("accelerate", "dagster"):
        assert all(torch.equal(value, wanted[key]) for key, value in weights(name).items()), name
