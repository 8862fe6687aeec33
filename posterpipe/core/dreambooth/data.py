"""The training set as tensors, and every random number of a run.

What belongs here: reading training.csv, latents cached once an image, captions as token ids, which
sample comes when, its noise and timestep. What does not: how the set was made (`training_set`),
what is computed from the noise (`objective`).

Samples form one endless stream: position p belongs to epoch p // n, and each epoch is a permutation
of its own. Whatever is random about a sample is a function of the run's seed and its position. So a
resumed run needs no generator states, several processes share the stream by position, and a batch
of 8 sees what 8 batches of one see.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers.models import AutoencoderKL
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from posterpipe.core.dreambooth.config import CSV_NAME, hash_files
from posterpipe.core.dreambooth.errors import TrainingSetError
from posterpipe.core.dreambooth.saves import sync_path

# Part of the name of cached latents; raised when the same image would give others.
_LATENTS_VERSION = "1"
_ENCODED_AT_ONCE = 8
_NAMED_AT_MOST = 5
_LINE_EVERY_SECONDS = 5.0

# Streams of random numbers drawn from one seed.
_ORDER, _SAMPLE, _STEP = 0, 1, 2


@dataclass(frozen=True)
class Example:
    """One row of training.csv."""

    image: Path
    caption: str


def read_training_set(folder: Path) -> list[Example]:
    """The rows of `folder`/training.csv (file_name, caption; further columns are ignored).

    Raises TrainingSetError with file and line for anything that cannot be trained on, and names
    the images that are missing.
    """
    path = folder / CSV_NAME
    remedy = "materialize training_csv again"
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            absent = {"file_name", "caption"} - set(reader.fieldnames or ())
            if absent:
                raise TrainingSetError(
                    f"{path}:1: the column {' and '.join(sorted(absent))} is missing; {remedy}"
                )
            examples = []
            for row in reader:
                name, caption = row["file_name"], row["caption"]
                if row.get(None) or name is None or caption is None:
                    raise TrainingSetError(
                        f"{path}:{reader.line_num}: not as many cells as the heading; {remedy}"
                    )
                if not name.strip() or not caption.strip():
                    empty = "caption" if name.strip() else "file_name"
                    raise TrainingSetError(f"{path}:{reader.line_num}: no {empty}; {remedy}")
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise TrainingSetError(
                        f"{path}:{reader.line_num}: {name!r} lies outside the folder; images lie "
                        "beside training.csv"
                    )
                examples.append(Example(folder / name, caption))
    except OSError as error:
        raise TrainingSetError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise TrainingSetError(f"{path}: not a CSV in UTF-8 ({error}); {remedy}") from error
    if not examples:
        raise TrainingSetError(f"{path}: no rows; {remedy} from at least one usable poster")
    missing = [example.image.name for example in examples if not example.image.is_file()]
    if missing:
        more = f" and {len(missing) - _NAMED_AT_MOST} more" if len(missing) > _NAMED_AT_MOST else ""
        raise TrainingSetError(
            f"{path}: {', '.join(missing[:_NAMED_AT_MOST])}{more} missing in {folder}; {remedy}"
        )
    return examples


def load_pixels(path: Path, width: int, height: int) -> Tensor:
    """One image: float32 (3, height, width) in -1..1.

    Raises TrainingSetError when it cannot be read or has another size.
    """
    try:
        with Image.open(path) as image:
            rgb = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TrainingSetError(
            f"{path}: not a readable image ({error}); materialize training_csv again"
        ) from error
    if rgb.shape[:2] != (height, width):
        raise TrainingSetError(
            f"{path}: {rgb.shape[1]}x{rgb.shape[0]} pixels, but the run trains at "
            f"{width}x{height}; materialize training_csv again with the same image settings"
        )
    return torch.from_numpy(rgb.copy()).permute(2, 0, 1).float() / 127.5 - 1


@dataclass(frozen=True)
class Latents:
    """Each image's distribution in the VAE's latent space, scaled as the U-Net wants it.

    mean, std: float32 (images, channels, height/8, width/8).
    """

    mean: Tensor
    std: Tensor

    def sample(self, index: Sequence[int], noise: Tensor) -> Tensor:
        """float32 (batch, channels, height/8, width/8): mean + std noise."""
        rows = list(index)
        return self.mean[rows] + self.std[rows] * noise


def latents_key(examples: Sequence[Example], base_model: Path, width: int, height: int) -> str:
    """The name of cached latents: a hash of the images' bytes in order, the VAE and the size."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(hashlib.sha256(example.image.read_bytes()).digest())
    parts = [_LATENTS_VERSION, digest.hexdigest(), hash_files(base_model / "vae", "*")]
    return hashlib.sha256(json.dumps([*parts, width, height]).encode()).hexdigest()[:32]


def cached_latents(
    folder: Path,
    examples: Sequence[Example],
    base_model: Path,
    load_vae: Callable[[], AutoencoderKL],
    *,
    width: int,
    height: int,
    log: Callable[[str], None],
) -> Latents:
    """The latents of all images: from `folder`, or encoded in fp32 and put there.

    fp32 whatever the run's precision: it happens once, and the VAE of Stable Diffusion overflows
    in fp16.
    """
    path = folder / f"{latents_key(examples, base_model, width, height)}.safetensors"
    if path.exists():
        try:
            values = load_file(path)
            return Latents(values["mean"], values["std"])
        except (SafetensorError, KeyError, OSError) as error:
            log(f"{path} is damaged ({error}) and made again")
    latents = encode(load_vae(), examples, width=width, height=height, log=log)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({"mean": latents.mean, "std": latents.std}, temporary)
    sync_path(temporary)
    os.replace(temporary, path)
    return latents


@torch.no_grad()
def encode(
    vae: AutoencoderKL,
    examples: Sequence[Example],
    *,
    width: int,
    height: int,
    log: Callable[[str], None],
) -> Latents:
    """Runs every image through the VAE once."""
    means, stds = [], []
    spoken = time.monotonic()
    for start in range(0, len(examples), _ENCODED_AT_ONCE):
        batch = examples[start : start + _ENCODED_AT_ONCE]
        pixels = torch.stack([load_pixels(e.image, width, height) for e in batch])
        latent = vae.encode(pixels.to(vae.device)).latent_dist
        means.append(latent.mean.cpu() * vae.config["scaling_factor"])
        stds.append(latent.std.cpu() * vae.config["scaling_factor"])
        done = start + len(batch)
        if done == len(examples) or time.monotonic() - spoken > _LINE_EVERY_SECONDS:
            log(f"encoded {done} of {len(examples)} images into latents")
            spoken = time.monotonic()
    return Latents(torch.cat(means), torch.cat(stds))


def tokenize(tokenizer: CLIPTokenizer, examples: Sequence[Example], tokens: int) -> Tensor:
    """Token ids of all captions: int64 (images, tokens), cut and padded to `tokens`."""
    encoded = tokenizer(
        [example.caption for example in examples],
        padding="max_length",
        truncation=True,
        max_length=tokens,
        return_tensors="pt",
    )
    return encoded.input_ids


@dataclass(frozen=True)
class Draw:
    """What is random about one sample: which image, which timestep, which noise.

    noise, latent_noise: float32 (channels, height/8, width/8), the noise that is added and the
    noise with which the latent is drawn from its distribution.
    """

    index: int
    timestep: int
    noise: Tensor
    latent_noise: Tensor


def draw(seed: int, position: int, *, images: int, timesteps: int, shape: Sequence[int]) -> Draw:
    """The sample at `position` of the endless stream. shape: (channels, height/8, width/8)."""
    epoch, place = divmod(position, images)
    generator = _generator(seed, _SAMPLE, position)
    return Draw(
        index=_order(seed, epoch, images)[place],
        timestep=int(torch.randint(timesteps, (), generator=generator)),
        noise=torch.randn(*shape, generator=generator),
        latent_noise=torch.randn(*shape, generator=generator),
    )


@lru_cache(maxsize=2)  # a batch may reach over the end of an epoch
def _order(seed: int, epoch: int, images: int) -> list[int]:
    return torch.randperm(images, generator=_generator(seed, _ORDER, epoch)).tolist()


def positions(
    step: int, *, micro_step: int, micro_steps: int, process: int, processes: int, batch: int
) -> range:
    """The positions of one micro-batch. Over all micro-steps and processes of a step they are
    `micro_steps * processes * batch` successive ones."""
    start = ((step * micro_steps + micro_step) * processes + process) * batch
    return range(start, start + batch)


def step_seed(seed: int, step: int, process: int) -> int:
    """Seeds torch's global generator in one step, for models with dropout."""
    return _seed(seed, _STEP, step, process)


def _seed(seed: int, *parts: int) -> int:
    # SeedSequence takes no negative numbers; its output is the same in all versions of numpy.
    sequence = np.random.SeedSequence([seed % 2**64, *parts])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _generator(seed: int, *parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(seed, *parts))
