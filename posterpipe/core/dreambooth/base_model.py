"""The base model: checking its directory and loading its parts.

What belongs here: everything that is read from the base model. What does not: where models come
from (`core.models`), the finished model (`checkpoint`).
"""

from __future__ import annotations

import json
import math
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

Part = TypeVar("Part")


def check_base_model(folder: Path) -> None:
    """Raises BaseModelError unless `folder` looks like a Stable Diffusion 1.x or 2.x."""
    remedy = "name the directory of a Stable Diffusion 1.x or 2.x in diffusers' layout"
    if not folder.is_dir():
        raise BaseModelError(f"{folder}: there is no such directory; {remedy} as base_model")
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(f"{folder}: it has no model_index.json; {remedy} as base_model")
    absent = [part for part in MODEL_PARTS if not (folder / part).is_dir()]
    if absent:
        raise BaseModelError(f"{folder}: it has no {', '.join(absent)}; {remedy} as base_model")
    unet, vae = (_config(folder / part) for part in ("unet", "vae"))
    if (folder / "text_encoder_2").is_dir() or unet.get("addition_embed_type") is not None:
        raise BaseModelError(
            f"{folder}: it is a Stable Diffusion XL, or another model that is told more than a "
            f"text and a time (addition_embed_type is {unet.get('addition_embed_type')} in "
            f"unet/config.json); {remedy} as base_model"
        )
    reads, has = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if reads != has:
        raise BaseModelError(
            f"{folder}: its U-Net reads {reads} channels and its VAE makes {has}, so it is a model "
            f"for inpainting, depth or editing, and those cannot be trained here; {remedy} as "
            "base_model"
        )


def _config(part: Path) -> dict[str, Any]:
    """A model's config.json; empty where it cannot be read, which loading the model tells."""
    try:
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


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
    return _load(cls, folder, dtype=torch.float32, use_safetensors=True, variant=_variant(folder))


def _load(cls: type[Part], folder: Path, **options: Any) -> Part:
    try:
        return cast(Any, cls).from_pretrained(folder, **options)
    except Exception as error:  # diffusers and transformers raise whatever their readers raise
        raise BaseModelError(
            f"{folder}: cannot be loaded ({first_line(error)}); safetensors and their config.json "
            "are needed, get the model again"
        ) from error


def _variant(folder: Path) -> str | None:
    """None for plain weights, "fp16" where only those are there."""
    plain = list(folder.glob("*model.safetensors")) + list(folder.glob("*model.safetensors.index*"))
    half = list(folder.glob("*.fp16*.safetensors"))
    return "fp16" if half and not plain else None


def _weights(folder: Path) -> list[Path]:
    """The files that loading the model reads, of one that may be there in two precisions."""
    half = _variant(folder) == "fp16"
    return [
        path
        for path in sorted(folder.glob("*.safetensors"))
        if (".fp16" in path.name) == half and "non_ema" not in path.name
    ]


def count_parameters(folder: Path) -> dict[str, int]:
    """How many numbers the U-Net and the text encoder are made of, from the heads of their files.

    Weights that are there in two precisions count once.
    """
    counts = {}
    for part in ("unet", "text_encoder"):
        counts[part] = 0
        for path in _weights(folder / part):
            with safe_open(path, framework="pt") as weights:
                shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
            counts[part] += sum(math.prod(shape) for shape in shapes)
    return counts


def disk_dtype(folder: Path) -> torch.dtype:
    """fp16 when the U-Net that is loaded is in fp16 on disk, else fp32: the finished model is as
    its base."""
    for path in _weights(folder / "unet"):
        with safe_open(path, framework="pt") as weights:
            first = next(iter(weights.keys()), None)
            if first is not None and weights.get_slice(first).get_dtype() == "F16":
                return torch.float16
            return torch.float32
    return torch.float32
