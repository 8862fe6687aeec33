"""Model directories: what is read at the start of a run, and what is left at its end.

What belongs here: checking and loading the parts of the base model, writing the finished diffusers
directory. What does not: where models come from (`models`), saves during a run (`saves`).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from posterpipe.core.dreambooth.config import MODEL_PARTS, TRAINER_VERSION, RunConfig, Versions
from posterpipe.core.dreambooth.errors import BaseModelError, TrainingError
from posterpipe.core.dreambooth.reports import (
    METRICS_NAME,
    PICTURE_NAME,
    StepReport,
    TrainResult,
    draw_loss,
    write_metrics,
)
from posterpipe.core.dreambooth.saves import sync_path, sync_tree

RECORD_NAME = "posterpipe.json"
_PACKAGES = ("posterpipe", "torch", "diffusers", "transformers", "accelerate", "bitsandbytes")
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.h5", "*.onnx*")

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


def load_vae(folder: Path) -> AutoencoderKL:
    """The VAE in fp32, in evaluation mode."""
    variant = _variant(folder / "vae")
    vae = _load(
        folder / "vae",
        lambda path: AutoencoderKL.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, variant=variant
        ),
    )
    return vae.eval().requires_grad_(False)


def load_unet(folder: Path) -> UNet2DConditionModel:
    """The U-Net in fp32, whatever precision is on disk."""
    variant = _variant(folder / "unet")
    return _load(
        folder / "unet",
        lambda path: UNet2DConditionModel.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, variant=variant
        ),
    )


def load_text_encoder(folder: Path) -> CLIPTextModel:
    """The text encoder in fp32, whatever precision is on disk."""
    variant = _variant(folder / "text_encoder")
    return _load(
        folder / "text_encoder",
        lambda path: CLIPTextModel.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, variant=variant
        ),
    )


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer."""
    return _load(folder / "tokenizer", CLIPTokenizer.from_pretrained)


def load_noise_schedule(folder: Path) -> DDPMScheduler:
    """The noise schedule and prediction type, from whatever scheduler the directory names."""
    return _load(folder / "scheduler", DDPMScheduler.from_pretrained)


def _load(path: Path, load: Callable[[Path], Part]) -> Part:
    try:
        return load(path)
    except Exception as error:  # diffusers and transformers raise whatever their readers raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseModelError(
            f"{path}: cannot be loaded ({first_line}); safetensors and their config.json are "
            "needed, get the model again"
        ) from error


def _variant(folder: Path) -> str | None:
    """None for plain weights, "fp16" where only those are there."""
    plain = list(folder.glob("*model.safetensors")) + list(folder.glob("*model.safetensors.index*"))
    half = list(folder.glob("*.fp16*.safetensors"))
    return "fp16" if half and not plain else None


def disk_dtype(folder: Path) -> torch.dtype:
    """fp16 when the U-Net on disk is in fp16, else fp32: the finished model is as its base."""
    for path in sorted((folder / "unet").glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            first = next(iter(weights.keys()), None)
            if first is not None and weights.get_slice(first).get_dtype() == "F16":
                return torch.float16
            return torch.float32
    return torch.float32


def write_checkpoint(
    config: RunConfig,
    versions: Versions,
    run: str,
    *,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel | None,
    reports: Sequence[StepReport],
    seconds: float,
) -> None:
    """Writes the finished directory under a temporary name and renames it to `output_dir`.

    The models are cast in place to the base's precision. `text_encoder` is None when it was not
    trained: it and all other parts are then the base's own files.
    """
    final = config.output_dir
    final.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in final.parent.glob(f".{final.name}.*.tmp"):
        shutil.rmtree(abandoned)
    temporary = final.parent / f".{final.name}.{os.getpid()}.tmp"
    dtype = disk_dtype(config.base_model)
    trained: dict[str, Any] = {"unet": unet}
    if text_encoder is not None:
        trained["text_encoder"] = text_encoder
    for part in MODEL_PARTS:
        if part in trained:
            model = trained[part].to(device="cpu", dtype=dtype)
            model.save_pretrained(temporary / part, safe_serialization=True)
            _forget_origin(temporary / part / "config.json")
        else:
            ignore = shutil.ignore_patterns(*_PICKLES)
            shutil.copytree(config.base_model / part, temporary / part, ignore=ignore)
    _write_json(temporary / "model_index.json", _model_index(config.base_model))
    write_metrics(temporary / METRICS_NAME, reports)
    draw_loss(temporary / PICTURE_NAME, reports)
    record = _record(config, versions, run, reports, seconds)
    _write_json(temporary / RECORD_NAME, record)
    _share(temporary)
    sync_tree(temporary)
    os.replace(temporary, final)
    sync_path(final.parent)


def read_result(config: RunConfig, run: str) -> TrainResult | None:
    """The result of a run that has finished before, None when there is none.

    Raises TrainingError when `output_dir` holds something else.
    """
    if not config.output_dir.exists():
        return None
    path = config.output_dir / RECORD_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["checkpoint_id"] == run:
            return TrainResult(
                output_dir=config.output_dir,
                checkpoint_id=run,
                steps=record["steps"],
                final_loss=record["final_loss"],
                seconds=record["seconds"],
                resumed_from=0,
                reports=tuple(StepReport(**report) for report in record["reports"]),
            )
        found = f"the checkpoint {record['checkpoint_id']}, and this run makes {run}"
    except (OSError, ValueError, KeyError, TypeError):
        found = f"something that is no checkpoint of posterpipe (no good {RECORD_NAME})"
    raise TrainingError(f"{config.output_dir}: it holds {found}; remove it or change output_dir")


def _record(
    config: RunConfig,
    versions: Versions,
    run: str,
    reports: Sequence[StepReport],
    seconds: float,
) -> dict[str, Any]:
    return {
        "checkpoint_id": run,
        "training_set": versions.training_set,
        "base_model": versions.base_model,
        "base_model_name": config.base_model.name,
        "trainer": TRAINER_VERSION,
        "width": config.width,
        "height": config.height,
        "settings": config.training.model_dump(mode="json"),
        "packages": {name: _package_version(name) for name in _PACKAGES},
        "steps": config.training.max_train_steps,
        "final_loss": reports[-1].smoothed_loss,
        "last_loss": reports[-1].loss,
        "seconds": seconds,
        "reports": [vars(report) for report in reports],
    }


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _forget_origin(config: Path) -> None:
    """Takes out the path of this machine from which the model was loaded."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    _write_json(config, values)


def _model_index(base_model: Path) -> dict[str, Any]:
    """The base's index without the parts that are not carried over, such as a safety checker."""
    index = json.loads((base_model / "model_index.json").read_text(encoding="utf-8"))
    for name, value in index.items():
        if isinstance(value, list) and name not in MODEL_PARTS:
            index[name] = [None, None]
    return {**index, "requires_safety_checker": False}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _share(folder: Path) -> None:
    """Ordinary permissions: safetensors writes its files for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
