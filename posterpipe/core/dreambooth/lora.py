"""LoRA: small matrices trained beside frozen weights (Hu et al. 2021, arXiv:2106.09685), by peft.

What belongs here: putting them into a model, merging them into its weights, the file that
`load_lora_weights` of diffusers reads. What does not: training them (`learner`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.core.errors import first_line
from posterpipe.settings import TrainingSettings

if TYPE_CHECKING:
    from peft import LoraConfig

_ADAPTER = "default"
TARGETS = {"unet": "lora_targets", "text_encoder": "lora_text_encoder_targets"}
"""The setting that names the layers, by model."""


def add_lora(
    models: Mapping[str, nn.Module], settings: TrainingSettings, dtype: torch.dtype
) -> None:
    """Freezes the models' weights and puts LoRA beside the layers that the settings name.

    The frozen weights take `dtype`, the matrices are fp32. A starts normally distributed and B at
    zero, so that the model is at first the base model. Raises TrainingError where no layer has one
    of the names.
    """
    for name, model in models.items():
        model.requires_grad_(False).to(dtype)
        try:
            cast(Any, model).add_adapter(_config(name, settings))
        except ValueError as error:
            wanted = getattr(settings, TARGETS[name])
            raise TrainingError(
                f"training.{TARGETS[name]}: the {name} has no layer named {', '.join(wanted)} "
                f"({first_line(error)}); name layers that it has"
            ) from error
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def lora_deltas(model: nn.Module) -> dict[str, Tensor]:
    """What LoRA adds to the base model: name of a weight there -> float32 on the CPU, of its
    shape."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        f"{name}.weight": cast(Any, module).get_delta_weight(_ADAPTER).detach().float().cpu()
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def write_lora(folder: Path, models: Mapping[str, nn.Module], settings: TrainingSettings) -> None:
    """Writes pytorch_lora_weights.safetensors, which `pipeline.load_lora_weights(folder)` reads.

    Rank and alpha are in the file, for each model. The text encoder's layers have the names that
    they had before transformers 5 took `text_model` out of them: diffusers of before reads no other
    ones, nor do kohya's scripts and the interfaces that follow them, and today's diffusers reads
    both.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    arguments: dict[str, Any] = {}
    for name, model in models.items():
        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
        without = name == "text_encoder" and not hasattr(model, "text_model")
        inside = "text_model." if without else ""
        layers = {f"{inside}{key}": value.cpu() for key, value in state.items()}
        arguments[f"{name}_lora_layers"] = layers
        arguments[f"{name}_lora_adapter_metadata"] = _config(name, settings).to_dict()
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        str(folder), safe_serialization=True, **arguments
    )


def _config(name: str, settings: TrainingSettings) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or settings.lora_rank,  # type: ignore[arg-type]
        target_modules=list(getattr(settings, TARGETS[name])),
        init_lora_weights="gaussian",
    )
