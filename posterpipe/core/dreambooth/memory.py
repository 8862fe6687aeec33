"""Memory: how much a run holds, and what to say when it runs out.

What belongs here: the settings with which a run should fit. What does not: recognising that memory
ran out (`core.memory`), halving a batch (`train`), everything else a run meets outside itself
(`guards`).
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from posterpipe.core.dreambooth.base_model import count_parameters
from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.core.memory import is_out_of_memory
from posterpipe.settings import TrainingSettings

_FOR_IMAGES = 0.25
"""Share of the memory that a fitting run leaves to what images need on their way through a model:
3 to 4 GiB for one of 512 px with gradient checkpointing, on the 16 GiB of a small GPU."""


@contextlib.contextmanager
def memory_hint(config: RunConfig, device: torch.device) -> Iterator[None]:
    """Out of memory becomes a sentence with settings that should fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        parameters = count_parameters(config.base_model)
        raise TrainingError(advice(config.training, parameters, device_gib(device))) from error


def advice(settings: TrainingSettings, parameters: Mapping[str, int], gib: float) -> str:
    """What to change when a run does not fit into `gib`.

    parameters: how many each model has, by its folder. Takes one measure after the other, those
    that cost the least first, until the models leave enough room for images.
    """
    fitting, words = settings, list[str]()
    for change, in_words in _measures(settings):
        fitting = fitting.model_copy(update=change)
        words.append(in_words)
        lean = fitting.train_batch_size == 1 and fitting.gradient_checkpointing
        if lean and models_gib(fitting, parameters) <= (1 - _FOR_IMAGES) * gib:
            break
    before, after = (models_gib(each, parameters) for each in (settings, fitting))
    there = f"out of memory: there are {gib:.1f} GiB, and the models with what trains them take"
    if not words:
        return f"{there} {before:.1f}; train on smaller images, or on a larger device"
    return (
        f"{there} {before:.1f} before any image goes through. With these settings they take "
        f"{after:.1f}: {'; '.join(words)}"
    )


def models_gib(settings: TrainingSettings, parameters: Mapping[str, int]) -> float:
    """What weights, gradients, optimizer states and average take, images not counted.

    Trained weights and their gradients are fp32, Adam's two states 4 bytes each or 1 with 8-bit
    Adam; autocast holds short copies of the weights. LoRA's own matrices are left out: hundredths.
    """
    names = ["unet", "text_encoder"] if settings.train_text_encoder else ["unet"]
    short = 0 if settings.mixed_precision == "fp32" else 2
    if settings.method == "lora":
        each = short or 4
    else:
        states = 2 if settings.optimizer == "adamw_8bit" else 8
        each = 4 + 4 + states + short + (4 if settings.ema_decay is not None else 0)
    return each * sum(parameters[name] for name in names) / 2**30


def device_gib(device: torch.device) -> float:
    """The memory that the accelerator has, on CPU the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far: the accelerator's, on CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _measures(settings: TrainingSettings) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes that need less memory, and their words; those that cost the least first: the same
    steps, then slower ones, then another model."""
    images = settings.train_batch_size * settings.gradient_accumulation_steps
    if settings.train_batch_size > 1:
        yield (
            {"train_batch_size": 1, "gradient_accumulation_steps": images},
            f"training.train_batch_size = 1 with gradient_accumulation_steps = {images} (or "
            "halve_batch_on_out_of_memory = true, which divides a batch when it has to)",
        )
    if not settings.gradient_checkpointing:
        yield {"gradient_checkpointing": True}, "training.gradient_checkpointing = true"
    if settings.mixed_precision == "fp32":
        yield {"mixed_precision": "bf16"}, 'training.mixed_precision = "bf16"'
    if settings.method == "full" and settings.optimizer != "adamw_8bit":
        yield {"optimizer": "adamw_8bit"}, 'training.optimizer = "adamw_8bit"'
    if settings.ema_decay is not None:
        yield {"ema_decay": None}, "training.ema_decay unset"
    if settings.train_text_encoder:
        yield {"train_text_encoder": False}, "training.train_text_encoder = false"
    if settings.method == "full":
        yield {"method": "lora"}, 'training.method = "lora"'
