"""The base model: checking its directory and loading its parts.

What belongs here: everything that is read from the base model. What does not: where models come
from (`core.models`), the finished model (`checkpoint`).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from posterpipe.core.dreambooth.config import MODEL_PARTS
from posterpipe.core.dreambooth.errors import BaseModelError
from posterpipe.core.errors import first_line
from posterpipe.core.weights import load_weights, weight_files

Part = TypeVar("Part")


def check_base_model(folder: Path) -> None:
    """Raises BaseModelError unless `folder` looks like a Stable Diffusion 1.x or 2.x."""
    try:
        _check_base_model(folder)
    except FileNotFoundError as error:
        raise BaseModelError(f"{error.filename}: is not there; get the model again") from error
    except OSError as error:
        raise BaseModelError(
            f"{error.filename}: cannot be read ({error.strerror}); make it readable"
        ) from error


def _check_base_model(folder: Path) -> None:
    remedy = "name the directory of a Stable Diffusion 1.x or 2.x in diffusers' layout"
    if not folder.is_dir():
        raise BaseModelError(f"{folder}: there is no such directory; {remedy} as base_model")
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(f"{folder}: it has no model_index.json; {remedy} as base_model")
    absent = [part for part in MODEL_PARTS if not (folder / part).is_dir()]
    if absent:
        raise BaseModelError(f"{folder}: it has no {', '.join(absent)}; {remedy} as base_model")
    _json(folder / "model_index.json")
    unet, vae = (_json(folder / part / "config.json") for part in ("unet", "vae"))
    told = {name: unet.get(name) for name in ("addition_embed_type", "class_embed_type")}
    if (folder / "text_encoder_2").is_dir() or any(value is not None for value in told.values()):
        raise BaseModelError(
            f"{folder}: it is a Stable Diffusion XL, or another model that is told more than a "
            f"text and a time ({' and '.join(f'{name} is {told[name]}' for name in told)} in "
            f"unet/config.json); {remedy} as base_model"
        )
    schedule = _json(folder / "scheduler" / "scheduler_config.json")
    if not {"beta_start", "beta_schedule", "trained_betas"} & schedule.keys():
        raise BaseModelError(
            f"{folder}: its scheduler, {schedule.get('_class_name')}, adds noise by another rule "
            f"than the betas of DDPM; {remedy} as base_model"
        )
    reads, has = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if reads != has:
        raise BaseModelError(
            f"{folder}: its U-Net reads {reads} channels and its VAE makes {has}, so it is a model "
            f"for inpainting, depth or editing, and those cannot be trained here; {remedy} as "
            "base_model"
        )


def _json(path: Path) -> dict[str, Any]:
    """What a model's config says. Raises OSError, or BaseModelError where it is no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{path}: not JSON ({error}); get the model again") from error
    if not isinstance(config, dict):
        raise BaseModelError(f"{path}: no JSON object; get the model again")
    return config


def load_vae(folder: Path) -> AutoencoderKL:
    """The VAE in fp32, in evaluation mode."""
    return _load_model(AutoencoderKL, folder / "vae").eval().requires_grad_(False)


def load_unet(folder: Path) -> UNet2DConditionModel:
    """The U-Net in fp32, whatever precision is on disk."""
    return _load_model(UNet2DConditionModel, folder / "unet")


def load_text_encoder(folder: Path) -> CLIPTextModel:
    """The text encoder in fp32, whatever precision is on disk."""
    return _load_model(CLIPTextModel, folder / "text_encoder")


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer."""
    return _load(CLIPTokenizer, folder / "tokenizer")


def load_noise_schedule(folder: Path) -> DDPMScheduler:
    """The noise schedule and prediction type, from whatever scheduler the directory names."""
    return _load(DDPMScheduler, folder / "scheduler")


def _load_model(cls: type[Part], folder: Path) -> Part:
    with _failures_in_words(folder):
        return load_weights(cls, folder, dtype=torch.float32)


def _load(cls: type[Part], folder: Path) -> Part:
    with _failures_in_words(folder):
        return cast(Part, cast(Any, cls).from_pretrained(folder))


@contextlib.contextmanager
def _failures_in_words(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # diffusers and transformers raise whatever their readers raise
        raise BaseModelError(
            f"{folder}: cannot be loaded ({first_line(error)}); safetensors and their config.json "
            "are needed, get the model again"
        ) from error


def count_parameters(folder: Path) -> dict[str, int]:
    """How many numbers the U-Net and the text encoder are made of, from the heads of their files.

    Weights that are there in two precisions count once.
    """
    counts = {}
    for part in ("unet", "text_encoder"):
        counts[part] = 0
        for path in weight_files(folder / part):
            with safe_open(path, framework="pt") as weights:
                shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
            counts[part] += sum(math.prod(shape) for shape in shapes)
    return counts


def disk_dtype(folder: Path) -> torch.dtype:
    """fp16 when the U-Net that is loaded is in fp16 on disk, as the finished model is then; else
    fp32, also for bf16, whose eight bits would round away what a low learning rate has changed."""
    for path in weight_files(folder / "unet"):
        with safe_open(path, framework="pt") as weights:
            first = next(iter(weights.keys()), None)
            if first is not None and weights.get_slice(first).get_dtype() == "F16":
                return torch.float16
            return torch.float32
    return torch.float32
