"""`sample_sd21_gpu`: Stable Diffusion 2.1 size at 512 px on a GPU, one pipeline call an image.

Random weights of the real size, bf16, 25 steps, with a negative prompt. The peer is the pipeline
called once an image; ours the sampler with the batch size that it finds by itself, without and with
torch.compile. Loading and compiling are not counted: each side draws once before. So that a GPU's
time suffices, the peer draws the images of some prompts only, half of them before ours and half
after, and both sides are compared by the image. No rows without a GPU.

The rows without compile come first, and with `--file` each is filed when it is there. `--keep` is
the folder of the model, as in `train_sd21_gpu`. `--rehearse` runs every line of it on a tiny model
and whatever device there is, so that the command is known to work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.real_model import stable_diffusion
from benchmarks.rows import Row
from benchmarks.sampling_runs import Batches, Loop, apart, timed
from posterpipe.core.prompts import Prompt, load_suite
from posterpipe.settings import SamplerSettings, load_settings

IMAGES = 64
ALONE = 2
"""Prompts of which the peer draws all images, half of them first and half of them last."""
REQUIRED = 3.0
SETTINGS = SamplerSettings(
    num_inference_steps=25, width=512, height=512, precision="bf16", batch_size=0
)
REHEARSAL = {"num_inference_steps": 2, "width": 32, "height": 48, "precision": "fp32"}


def run(*, rehearse: bool = False, keep: Path | None = None) -> Iterator[Row]:
    """Rows as they are measured."""
    import torch

    if not rehearse and not torch.cuda.is_available():
        return
    profile = load_settings("starter")
    suite = load_suite(profile.path(profile.prompt_suite))
    with tempfile.TemporaryDirectory() as name:
        model = stable_diffusion(keep or Path(name), rehearse=rehearse)
        if rehearse:
            yield from measure(model, SETTINGS.model_copy(update=REHEARSAL), suite[:4], 2)
        else:
            suite = suite[: IMAGES // len(suite[0].seeds)]
            yield from measure(model, SETTINGS, suite, ALONE)


def measure(
    model: Path, settings: SamplerSettings, suite: list[Prompt], alone: int
) -> Iterator[Row]:
    """Both sides on one suite, ours without and with compile."""
    loop = Loop(model, settings)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loop([replace(suite[0], seeds=suite[0].seeds[:1])], folder)
        half = alone // 2
        first, one = timed(loop, suite[:half], folder / "first")
        batches = _ready(model, settings, suite, folder / "warm")
        plain, seconds = timed(batches, suite, folder / "plain")
        last, other = timed(loop, suite[-half:], folder / "last")
        looped = first + last
        each = (one + other) / len(looped)
        yield from _rows("sample_sd21_gpu", plain, seconds, looped, each, batches)
        del batches
        compiled = settings.model_copy(update={"compile": True})
        batches = _ready(model, compiled, suite, folder / "compiling")
        drawn, seconds = timed(batches, suite, folder / "compiled")
        yield from _rows("sample_sd21_gpu.compile", drawn, seconds, looped, each, batches)


def _ready(model: Path, settings: SamplerSettings, suite: list[Prompt], folder: Path) -> Batches:
    """The sampler with its batch size found and one batch drawn, which compiles it."""
    batches = Batches(model, settings)
    images = sum(len(prompt.seeds) for prompt in suite)
    batches.sampler.settle_batch_size(images)
    needed = -(-batches.sampler.batch_size // len(suite[0].seeds))
    timed(batches, suite[:needed], folder)
    return batches


def _rows(
    name: str, ours: list[Path], seconds: float, looped: list[Path], each: float, batches: Batches
) -> Iterator[Row]:
    """ours: files of all images, drawn in `seconds`; looped: those of the peer, `each` seconds
    long."""
    drawn = {path.name: path for path in ours}
    yield Row(
        name, "images/s", round(len(ours) / seconds, 3), round(1 / each, 3),
        "one pipeline call an image", round(each * len(ours) / seconds, 2),
        f"ours / peer at least {REQUIRED:g}",
    )  # fmt: skip
    yield Row(f"{name}.batch", "images at once", float(batches.sampler.batch_size))
    yield Row(
        # bf16 keeps three digits, and every batch shape rounds in its own way.
        f"{name}.difference", "of 255 on average",
        round(float(np.mean([apart(drawn[path.name], path).mean() for path in looped])), 2),
    )  # fmt: skip
