"""The training images in the VAE's latent space, each encoded once.

What belongs here: encoding, the key of an image's latent. What does not: files and keys in general
(`cache`), the noise with which a latent is drawn (`draws`).
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers.models import AutoencoderKL
from torch import Tensor

from posterpipe.core.dreambooth.cache import Tensors, cached_tensors, key_of
from posterpipe.core.dreambooth.config import hash_files
from posterpipe.core.dreambooth.data import Example, check_size, load_pixels

_LATENTS_VERSION = 2
"""Raised when the same image would give another latent; part of every key."""

# Images at once: as many as make up so many pixels, so that large ones fit into memory.
_PIXELS_AT_ONCE = 2**20
_IMAGES_AT_ONCE = 16
_LINE_EVERY_SECONDS = 5.0

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Latents:
    """Each image's distribution in the VAE's latent space, scaled as the U-Net wants it.

    means, stds: float32 (channels, height/8, width/8) for each image; sizes may differ.
    """

    means: list[Tensor]
    stds: list[Tensor]

    @property
    def shapes(self) -> list[Shape]:
        """(channels, height/8, width/8) of each image."""
        return [(mean.shape[0], mean.shape[1], mean.shape[2]) for mean in self.means]

    def sample(self, index: int, noise: Tensor) -> Tensor:
        """float32 (channels, height/8, width/8): mean + std noise."""
        return self.means[index] + self.stds[index] * noise


def cached_latents(
    folder: Path,
    examples: Sequence[Example],
    base_model: Path,
    load_vae: Callable[[], AutoencoderKL],
    *,
    size: tuple[int, int] | None,
    log: Callable[[str], None],
) -> Latents:
    """The latents of all images: from `folder`, or encoded in fp32 and put there.

    size: width and height in pixels that every image must have; None where they may differ. The
    key holds the image's bytes (and so its size and crop), the VAE's files, the precision, and the
    versions of diffusers and of this code. fp32 whatever the run's precision: it happens once, and
    the VAE of Stable Diffusion overflows in fp16. Raises TrainingSetError for an image that cannot
    be used.
    """
    vae_key = hash_files(base_model / "vae", "*")
    keys = [
        key_of(_LATENTS_VERSION, _digest(example.image), vae_key, "fp32", diffusers.__version__)
        for example in examples
    ]

    def compute(missing: list[int]) -> Iterator[tuple[int, Tensors]]:
        vae = load_vae()
        done, spoken = 0, time.monotonic()
        for batch in _batches(examples, missing, size):
            yield from encode(vae, batch)
            done += len(batch)
            if done == len(missing) or time.monotonic() - spoken > _LINE_EVERY_SECONDS:
                log(f"encoded {done} of {len(missing)} images into latents")
                spoken = time.monotonic()

    values = cached_tensors(folder, keys, compute, log=log)
    latents = Latents([v["mean"] for v in values], [v["std"] for v in values])
    for example, (_, height, width) in zip(examples, latents.shapes, strict=True):
        if size is not None and (8 * width, 8 * height) != size:
            check_size(example.image, (8 * width, 8 * height), size)
    return latents


@torch.no_grad()
def encode(vae: AutoencoderKL, batch: Sequence[tuple[int, Tensor]]) -> list[tuple[int, Tensors]]:
    """Runs images of one size through the VAE: (index, pixels) in, (index, mean and std) out."""
    pixels = torch.stack([image for _, image in batch])
    latent = vae.encode(pixels.to(vae.device)).latent_dist
    scale = vae.config["scaling_factor"]
    means, stds = (latent.mean * scale).cpu(), (latent.std * scale).cpu()
    # Clones: a slice of a batch would be written with the whole batch behind it.
    return [
        (index, {"mean": means[row].clone(), "std": stds[row].clone()})
        for row, (index, _) in enumerate(batch)
    ]


def _batches(
    examples: Sequence[Example], wanted: Sequence[int], size: tuple[int, int] | None
) -> Iterator[list[tuple[int, Tensor]]]:
    """Images of one size in batches; those of other sizes wait until theirs is full."""
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = defaultdict(list)
    for index in wanted:
        pixels = load_pixels(examples[index].image, size)
        batch = waiting[tuple(pixels.shape)]
        batch.append((index, pixels))
        most = max(1, min(_IMAGES_AT_ONCE, _PIXELS_AT_ONCE // (pixels.shape[1] * pixels.shape[2])))
        if len(batch) == most:
            yield waiting.pop(tuple(pixels.shape))
    yield from waiting.values()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
