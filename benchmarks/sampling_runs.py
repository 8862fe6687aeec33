"""Drawing a suite, ours and as a user writes it, on the same prompts, seeds and settings.

What belongs here: both sides and how far their images are apart. What does not: which model is
drawn with, and what is required (`sample_suite`, `sample_sd21_gpu`).

The peer is `StableDiffusionPipeline`, one call an image, each image saved as a PNG, with our
scheduler and a generator of its own on the CPU for each image, as everyone does who wants to see
the same image again. It gets the same precision and memory layout as ours.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from posterpipe.core.devices import best_device, memory_layout, torch_dtype, usable_precision
from posterpipe.core.generations import generate
from posterpipe.core.parallel import cores
from posterpipe.core.progress import NoProgress
from posterpipe.core.prompts import Prompt
from posterpipe.core.sampler import ImageRequest, Sampler, make_scheduler
from posterpipe.core.store import Store
from posterpipe.settings import SamplerSettings

VARIANT = "sd_negative"
"""Of the thesis's variants the one with a negative prompt: every image is asked for in full."""


class Loop:
    """The loop a user writes. Loading the model is not counted."""

    def __init__(self, model: Path, settings: SamplerSettings) -> None:
        from diffusers import StableDiffusionPipeline

        self.settings = settings
        self.device = best_device()
        dtype = torch_dtype(usable_precision(settings.precision))
        pipeline: Any = StableDiffusionPipeline.from_pretrained(
            model, torch_dtype=dtype, use_safetensors=True
        )
        pipeline.scheduler = make_scheduler(model, settings.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline.to(self.device)
        layout = memory_layout(settings.channels_last, self.device, compiled=False)
        for part in (pipeline.unet, pipeline.vae):
            part.to(memory_format=layout)

    def __call__(self, prompts: Sequence[Prompt], folder: Path) -> list[Path]:
        """The images' files, by prompt and seed."""
        import torch

        shrink = self.pipeline.vae_scale_factor
        height, width = self.settings.height // shrink, self.settings.width // shrink
        shape = (1, self.pipeline.unet.config.in_channels, height, width)
        paths = []
        for prompt in prompts:
            for seed in prompt.seeds:
                # Left to itself the pipeline draws noise in its own precision, and in a short one
                # torch makes other numbers of a seed: then no image could be compared.
                noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
                image = self.pipeline(
                    prompt.prompt,
                    negative_prompt=prompt.negative,
                    num_inference_steps=self.settings.num_inference_steps,
                    guidance_scale=self.settings.guidance_scale,
                    width=self.settings.width,
                    height=self.settings.height,
                    latents=noise.to(self.pipeline.device, self.pipeline.dtype),
                ).images[0]
                paths.append(folder / f"{prompt.prompt_id}-{seed}.png")
                image.save(paths[-1])
        return paths


class Asset:
    """What the asset runs: keys, model loaded, drawn in batches, kept in the store with the rows
    of results."""

    def __init__(self, model: Path, settings: SamplerSettings) -> None:
        self.model, self.settings = model, settings

    def __call__(self, prompts: Sequence[Prompt], folder: Path) -> list[Path]:
        """The images' files, by prompt and seed."""
        store = Store(folder)
        table = generate(
            store, prompts, (VARIANT,), self.model, "benchmark", self.settings, NoProgress(),
            run_id="benchmark",
        )  # fmt: skip
        return [store.root / path for path in table["image_path"]]


class Batches:
    """Our sampler made once, so that neither loading nor compiling is counted."""

    def __init__(self, model: Path, settings: SamplerSettings) -> None:
        self.settings = settings
        self.sampler = Sampler(model, settings, model_id="benchmark")

    def __call__(self, prompts: Sequence[Prompt], folder: Path) -> list[Path]:
        """The images' files, by prompt and seed; written while the next batch is drawn."""
        requests = {
            folder / f"{prompt.prompt_id}-{seed}.png": ImageRequest(
                prompt.prompt, prompt.negative, seed
            )
            for prompt in prompts
            for seed in prompt.seeds
        }
        paths = list(requests)
        self.sampler.settle_batch_size(len(paths))
        size = self.sampler.batch_size
        written = []
        with ThreadPoolExecutor(min(4, cores())) as pool:
            for start in range(0, len(paths), size):
                part = paths[start : start + size]
                images = self.sampler([requests[path] for path in part])
                for path, image in zip(part, images, strict=True):
                    written.append(pool.submit(image.save, path))
        for file in written:
            file.result()
        return paths


Side = Callable[[Sequence[Prompt], Path], list[Path]]


def in_turns(
    prompts: Sequence[Prompt], ours: Side, loop: Side
) -> tuple[float, float, list[np.ndarray]]:
    """Seconds of ours and of the loop for all images, and by how much each image differs (uint8,
    absolute).

    The loop draws one half, then we all, then the loop the other half, so that noise meets both
    alike.
    """
    half = len(prompts) // 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, one = timed(loop, prompts[:half], folder / "loop")
        drawn, own = timed(ours, prompts, folder / "ours")
        second, other = timed(loop, prompts[half:], folder / "loop")
        pairs = zip(drawn, first + second, strict=True)
        return own, one + other, [apart(ours, theirs) for ours, theirs in pairs]


def timed(side: Side, prompts: Sequence[Prompt], folder: Path) -> tuple[list[Path], float]:
    """The files that a side leaves in a folder, made where it is not there, and seconds."""
    folder.mkdir(exist_ok=True)
    started = time.perf_counter()
    paths = side(prompts, folder)
    return paths, time.perf_counter() - started


def apart(one: Path, other: Path) -> np.ndarray:
    """By how much two images differ: uint8, absolute."""
    a, b = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (one, other))
    return np.abs(a - b).astype(np.uint8)
