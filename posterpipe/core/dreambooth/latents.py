"""The training images in the VAE's latent space, each encoded once.

What belongs here: encoding, the key of an image's latent. What does not: files and keys in general
(`cache`), the noise with which a latent is drawn (`draws`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers.models import AutoencoderKL
from torch import Tensor

from posterpipe.core.devices import whole_fp32
from posterpipe.core.dreambooth.cache import Tensors, cached_tensors, key_of
from posterpipe.core.dreambooth.config import hash_files
from posterpipe.core.dreambooth.data import Example, check_size, load_pixels
from posterpipe.core.files import sha256_of

_LATENTS_VERSION = 3
"""Raised when the same image would give another latent; part of every key."""

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
    device: torch.device,
    size: tuple[int, int] | None,
    log: Callable[[str], None],
) -> Latents:
    """The latents of all images: from `folder`, or encoded in fp32 and put there.

    load_vae: gives it on `device`, in fp32. size: width and height in pixels that every image must
    have; None where they may differ. The key holds the image's bytes (and so its size and crop),
    the VAE's files, the precision, the kind of device, and the versions of torch, diffusers and
    this code. fp32 whatever the run's precision: it happens once, and the VAE of Stable Diffusion
    overflows in fp16. Raises TrainingSetError for an image that cannot be used.
    """
    vae_key = hash_files(base_model / "vae", "*")
    how = (vae_key, "fp32", device.type, torch.__version__, diffusers.__version__)
    keys = [key_of(_LATENTS_VERSION, sha256_of(example.image), *how) for example in examples]

    def compute(missing: list[int]) -> Iterator[tuple[int, Tensors]]:
        vae = load_vae()
        spoken = time.monotonic()
        for done, index in enumerate(missing, start=1):
            yield index, encode(vae, load_pixels(examples[index].image, size))
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
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensors:
    """Runs one image, float32 (3, height, width) in -1..1, through the VAE: its mean and std.

    One alone: how a batch is made up shows in the last digits, and a run that was killed here goes
    on with the images that are left. On one core, batches of 16 small posters take a fifth less.
    """
    with whole_fp32():
        latent = vae.encode(pixels[None].to(vae.device)).latent_dist
    scale = vae.config["scaling_factor"]
    return {"mean": (latent.mean * scale)[0].cpu(), "std": (latent.std * scale)[0].cpu()}
