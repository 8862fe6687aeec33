"""Memory: how much a run holds, and what to say when it runs out.

What belongs here: the settings with which a run should fit, and going through a model in parts that
do. What does not: recognising that memory ran out (`core.memory`), halving what is trained on
(`train`), everything else a run meets outside itself (`guards`).
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from posterpipe.core.devices import give_memory_back
from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.effects import freezes_short_lora
from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.core.memory import doubt, is_out_of_memory
from posterpipe.training_settings import TrainingSettings

_FOR_IMAGES = 0.25
"""Share of the memory that a fitting run leaves to what images need on their way through a model,
and to what torch and the driver hold beside: 2 to 3 GiB for one of 512 px, see `IMAGE_GIB`."""
IMAGE_GIB = 1.1
"""An image of 512 px on its way through Stable Diffusion 2.1 without gradient checkpointing, which
makes it less: measured on an H200 in bf16 without CUDA graphs, by the difference of what torch
reserved for batch 4 and batch 1, which was 1.0, and rounded up."""
BESIDE_GIB = 1.0
"""What torch reserves beyond what is in use, likewise measured, and the driver's context."""


class InParts:
    """Goes through a model with a batch at once, or with parts of it where memory runs out.

    For what is only looked at, held-out posters and samples: dividing it changes the last digits of
    what is seen, and nothing that is learnt, so no setting has to allow it. Parts that fitted are
    not exceeded again. make_room: is asked first to give back memory, and answers whether it did.
    """

    def __init__(
        self, log: Callable[[str], None], what: str, make_room: Callable[[], bool] = lambda: False
    ) -> None:
        self._log = log
        self._what = what
        self._make_room = make_room
        self._at_most = sys.maxsize

    def __call__(self, size: int, answers_to: Callable[[slice], Tensor]) -> Tensor:
        """The answers to all of a batch of `size`, in its order: (size, ...).

        answers_to: part of the batch -> its answers (part, ...). Raises what it raises where that
        has another cause than that memory ran out, or where a part is one already.
        """
        while True:
            at_once = min(size, self._at_most)
            parts = [slice(start, start + at_once) for start in range(0, size, at_once)]
            try:
                return torch.cat([answers_to(part) for part in parts])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                roomier = self._make_room()
                if at_once == 1 and not roomier:
                    raise
                if not roomier:
                    self._at_most = at_once // 2
            # Outside the handler, where nothing holds the memory of the failed try any more.
            give_memory_back()
            if not roomier:
                self._log(f"out of memory: goes on with {self._at_most} {self._what} at once")


@contextlib.contextmanager
def memory_hint(config: RunConfig, device: torch.device, processes: int) -> Iterator[None]:
    """Out of memory becomes a sentence with settings that should fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # Here, since it brings diffusers along, which `posterpipe doctor` does without.
        from posterpipe.core.dreambooth.base_model import count_parameters

        parameters = count_parameters(config.base_model)
        words = advice(config.training, parameters, device_gib(device), processes)
        raise TrainingError(words + doubt(error)) from error


def advice(
    settings: TrainingSettings, parameters: Mapping[str, int], gib: float, processes: int = 1
) -> str:
    """What to change when a run does not fit into `gib`, which each of its processes has.

    parameters: how many each model has, by its folder. Takes one measure after the other, those
    that cost the least first, until the models leave enough room for images.
    """
    if settings.halve_batch_on_out_of_memory and processes == 1:  # divided by itself, down to 1
        settings = settings.model_copy(update={"train_batch_size": 1})
    fitting, words = settings, list[str]()
    for change, in_words in _measures(settings, processes):
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
    Adam. Short copies of the weights, which autocast makes, do not count: they go while the larger
    gradients come (measured: 8.5 GiB with an image of 512 px, of which this is 8.1). A text encoder
    that is not trained, or beside LoRA in a short precision no longer is, goes once it has read all
    captions; shuffled ones never end, so it stays then, in fp32. LoRA's own matrices are left out:
    hundredths.
    """
    names = ["unet", "text_encoder"] if settings.train_text_encoder else ["unet"]
    if settings.method == "lora":
        each = 4 if settings.mixed_precision == "fp32" else 2
    else:
        states = 2 if settings.optimizer == "adamw_8bit" else 8
        each = 4 + 4 + states + (4 if settings.ema_decay is not None else 0)
    trained = each * sum(parameters[name] for name in names)
    frozen_beside = freezes_short_lora(settings) or not settings.train_text_encoder
    stays = settings.caption_shuffling and frozen_beside
    frozen = 4 * parameters["text_encoder"] if stays else 0
    return (trained + frozen) / 2**30


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


def _measures(settings: TrainingSettings, processes: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes that need less memory, and their words; those that cost the least first: the same
    steps, then slower ones, then another model."""
    images = settings.train_batch_size * settings.gradient_accumulation_steps
    if settings.train_batch_size > 1:
        words = f"training.train_batch_size = 1 with gradient_accumulation_steps = {images}"
        if processes == 1:
            words += (
                " (or halve_batch_on_out_of_memory = true, which divides a batch when it has to)"
            )
        yield {"train_batch_size": 1, "gradient_accumulation_steps": images}, words
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
