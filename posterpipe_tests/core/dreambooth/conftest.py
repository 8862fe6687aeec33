"""What the trainer's tests share: a tiny base model, random pictures, and what came of a run."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.reports import Journal, StepReport, TrainResult, draw_curves
from posterpipe.settings import SamplerSettings
from posterpipe.training_settings import TrainingSettings
from posterpipe_tests.models import TINY_HEIGHT, TINY_WIDTH, build_tiny_stable_diffusion

CAPTIONS = (
    "a red rocket on a blue poster",
    "minimalist film poster of one cat",
    "a yellow spaceship in the centre",
    "animated movie poster titled 'comet'",
    "only one rocket with a red title",
)


@pytest.fixture(scope="package")
def curves_drawn_once() -> Iterator[None]:
    """The picture of a run's curves takes as long as its few steps: that of the first run is all
    others' as well. `test_pipeline.py` and `test_reports.py` look at pictures of their own."""
    pictures: list[bytes] = []

    def draw(path: Path, journal: Journal) -> None:
        if not pictures:
            draw_curves(path, journal)
            pictures.append(path.read_bytes())
        path.write_bytes(pictures[0])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("posterpipe.core.dreambooth.checkpoint.draw_curves", draw)
        yield


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_stable_diffusion(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def training_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_set(tmp_path_factory.mktemp("sets") / "five")


@pytest.fixture(scope="session")
def other_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures other than those of `training_set`: held-out posters, or class images."""
    return write_training_set(tmp_path_factory.mktemp("sets") / "other", seed=6)


def write_training_set(
    folder: Path,
    *,
    seed: int = 5,
    sizes: Sequence[tuple[int, int]] = ((TINY_WIDTH, TINY_HEIGHT),) * len(CAPTIONS),
) -> Path:
    """training.csv and pictures of random pixels, of so many pixels in width and height."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    with open(folder / "training.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "caption"])
        for number, (width, height) in enumerate(sizes):
            caption = CAPTIONS[number % len(CAPTIONS)]
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:04d}.png")
            rows.writerow([f"{number:04d}.png", caption])
    return folder


MakeConfig = Callable[..., RunConfig]


def saves_of(config: RunConfig) -> list[Path]:
    """Everything that lies beside the saves of runs in progress, by name."""
    return sorted(config.work_dir.glob("saves/*/*"), key=lambda path: path.name)


def unet_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def text_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "text_encoder" / "model.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two models are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(result: TrainResult) -> list[float]:
    found = [report.loss for report in result.reports]
    assert None not in found
    return cast(list[float], found)


def no_number_at(call: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Takes the place of `objective.squared_errors`; what it gives at that call is no number."""
    calls = 0

    def squared_errors(prediction: Tensor, wanted: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        errors = (prediction.float() - wanted).pow(2).mean(dim=(1, 2, 3))
        return errors * (float("nan") if calls == call else 1.0)

    return squared_errors


def interrupt_at(step: int) -> Callable[[StepReport], None]:
    """A report that stops the run at a step, as a user at the keyboard does."""

    def stop(report: StepReport) -> None:
        if report.step == step:
            raise KeyboardInterrupt

    return stop


@pytest.fixture
def make_config(
    tmp_path: Path, base_model: Path, training_set: Path, curves_drawn_once: None
) -> MakeConfig:
    """A RunConfig of a few fast steps; keywords change the training settings."""

    def make(
        name: str = "run", *, parts: dict[str, Any] | None = None, **training: Any
    ) -> RunConfig:
        settings: dict[str, Any] = {
            "max_train_steps": 4,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "lr_warmup_steps": 0,
            "optimizer": "adamw",
            "mixed_precision": "fp32",
            "log_every_steps": 1,
            **training,
        }
        values: dict[str, Any] = {
            "base_model": base_model,
            "training_set": training_set,
            "output_dir": tmp_path / name / "out",
            "work_dir": tmp_path / name / "work",
            "width": TINY_WIDTH,
            "height": TINY_HEIGHT,
            "training": TrainingSettings(**settings),
            "sampler": SamplerSettings(num_inference_steps=2),
            **(parts or {}),
        }
        return RunConfig(**values)

    return make
