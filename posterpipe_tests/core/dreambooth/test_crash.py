"""Real processes, really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.train import train
from posterpipe_tests.core.dreambooth.conftest import MakeConfig

STEPS = 24


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
    unet = load_file(config.output_dir / "unet" / "diffusion_pytorch_model.safetensors")
    text = load_file(config.output_dir / "text_encoder" / "model.safetensors")
    return {**unet, **{f"text.{name}": value for name, value in text.items()}}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
    assert same_bits(weights(whole), weights(killed))
    assert [r.loss for r in resumed.reports] == [r.loss for r in uninterrupted.reports]
    assert [r.smoothed_loss for r in resumed.reports] == [
        r.smoothed_loss for r in uninterrupted.reports
    ]


def test_sigterm_saves_and_ends_with_a_sentence(make_config: MakeConfig) -> None:
    config = make_config(max_train_steps=5000, save_every_steps=5000)
    with started(by_hand(config)) as process:
        wait_for(process, "step 3 of 5000")
        process.terminate()
        rest = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "training: asked to stop: saved at step" in rest and "Traceback" not in rest
    saves = list((config.work_dir / "saves").iterdir())
    assert len(saves) == 1 and (saves[0] / "manifest.json").exists()


@pytest.mark.slow
def test_two_processes_share_the_work_of_one(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_train_steps": 3, "train_text_encoder": True}
    one = make_config("one", train_batch_size=4, **settings)
    two = make_config("two", train_batch_size=2, **settings)
    alone = train(one)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with started([*launcher, *by_hand(two)[1:]]) as process:
        output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert output.count("finished: 3 steps") == 1, output
    # Finished: the losses are read, not computed.
    together = train(two)
    assert [r.loss for r in together.reports] == pytest.approx(
        [r.loss for r in alone.reports], abs=1e-5
    )
