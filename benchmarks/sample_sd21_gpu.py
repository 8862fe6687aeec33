"""`sample_sd21_gpu`: Stable Diffusion 2.1 size at 512 px on a GPU, one pipeline call an image.

Random weights of the real size, bf16, 25 steps, with a negative prompt. The peer is the pipeline
called once an image; ours the sampler with the batch size that it finds by itself, without and with
torch.compile. Loading and compiling are not counted: each side draws once before. No rows without a
GPU; `--rehearse` runs every line of it on a tiny model and whatever device there is, so that the
command is known to work.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.rows import Row
from benchmarks.sampling_runs import Batches, Loop, in_turns
from posterpipe.core.prompts import Prompt, load_suite
from posterpipe.settings import SamplerSettings, load_settings

IMAGES = 96
REQUIRED = 3.0
SETTINGS = SamplerSettings(
    num_inference_steps=25, width=512, height=512, precision="bf16", batch_size=0
)
REHEARSAL = {"num_inference_steps": 2, "width": 32, "height": 48, "precision": "fp32"}


def run(*, rehearse: bool = False) -> list[Row]:
    import torch

    if not rehearse and not torch.cuda.is_available():
        return []
    profile = load_settings("starter")
    suite = load_suite(profile.path(profile.prompt_suite))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        if rehearse:
            from posterpipe_tests.models import build_tiny_stable_diffusion

            model = build_tiny_stable_diffusion(folder)
            return measure(model, SETTINGS.model_copy(update=REHEARSAL), suite[:2])
        from posterpipe_tests.real_size import build_stable_diffusion

        model = build_stable_diffusion(folder, base=True)
        return measure(model, SETTINGS, suite[: IMAGES // len(suite[0].seeds)])


def measure(model: Path, settings: SamplerSettings, suite: list[Prompt]) -> list[Row]:
    """Both sides on one suite, ours without and with compile."""
    loop = Loop(model, settings)
    few = [replace(suite[0], seeds=suite[0].seeds[:1])]
    rows: list[Row] = []
    for compiled in (False, True):
        batches = Batches(model, settings.model_copy(update={"compile": compiled}))
        with tempfile.TemporaryDirectory() as warm:
            loop(few, Path(warm))
            batches(suite, Path(warm))
        ours, peer, apart = in_turns(suite, batches, loop)
        name = "sample_sd21_gpu.compile" if compiled else "sample_sd21_gpu"
        images = len(apart)
        rows += [
            Row(
                name, "images/s", round(images / ours, 3), round(images / peer, 3),
                "one pipeline call an image", round(peer / ours, 2),
                f"ours / peer at least {REQUIRED:g}",
            ),
            Row(f"{name}.batch", "images at once", float(batches.sampler.batch_size)),
            Row(
                # bf16 keeps three digits, and every batch shape rounds in its own way.
                f"{name}.difference", "of 255 on average",
                round(float(np.mean([image.mean() for image in apart])), 2),
            ),
        ]  # fmt: skip
    return rows
