"""LoRA: small matrices trained beside frozen weights (Hu et al. 2021, arXiv:2106.09685), by peft.

What belongs here: putting them into a model, merging them into its weights, the files that others
read. What does not: training them (`learner`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor, nn

from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.core.sampler import LORA_WEIGHTS, ZERO_TERMINAL_SNR
from posterpipe.training_settings import TrainingSettings

if TYPE_CHECKING:
    from peft import LoraConfig

_ADAPTER = "default"
_LAYERS = (nn.Linear, nn.Conv2d)
TARGETS = {"unet": "lora_targets", "text_encoder": "lora_text_encoder_targets"}
"""The setting that names the layers, by model."""

_DIFFUSERS_MATRICES = {
    "unet": {"lora_A": "lora.down", "lora_B": "lora.up"},
    "text_encoder": {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up"},
}

KOHYA_NAME = "kohya_lora.safetensors"
_KOHYA_MODELS = {"unet": "lora_unet", "text_encoder": "lora_te"}
_KOHYA_MATRICES = {"lora_A": "lora_down", "lora_B": "lora_up"}


def add_lora(
    models: Mapping[str, nn.Module], settings: TrainingSettings, dtype: torch.dtype
) -> None:
    """Freezes the models' weights and puts LoRA beside the layers that the settings name.

    The frozen weights take `dtype`, the matrices are fp32. A starts normally distributed and B at
    zero, so that the model is at first the base model. Raises TrainingError where no layer has one
    of the names, or one of another kind has it.
    """
    for name, model in models.items():
        _check_targets(name, model, getattr(settings, TARGETS[name]))
        model.requires_grad_(False).to(dtype)
        cast(Any, model).add_adapter(_config(name, settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def _check_targets(name: str, model: nn.Module, targets: Sequence[str]) -> None:
    """peft leaves out a name that no layer has as long as another one is found, and puts LoRA on
    embeddings as well, of which the files that others read have none."""
    unknown, others = [], []
    for target in targets:
        named = {
            path: module
            for path, module in model.named_modules()
            if path == target or path.endswith(f".{target}")
        }
        wrong = {path: one for path, one in named.items() if not isinstance(one, _LAYERS)}
        if len(wrong) == len(named):
            unknown.append(target)
        else:
            others += [f"{path} is a {type(one).__name__}" for path, one in wrong.items()]
    setting = f"training.{TARGETS[name]}"
    if unknown:
        raise TrainingError(
            f"{setting}: the {name} has no linear or convolution layer named "
            f"{', '.join(unknown)}; name layers that it has"
        )
    if others:
        raise TrainingError(
            f"{setting}: these names mean layers of the {name} that are no linear or convolution "
            f"layers as well ({others[0]}); write more of them, such as to_out.0 for 0"
        )


def lora_deltas(model: nn.Module) -> dict[str, Tensor]:
    """What LoRA adds to the base model: name of a weight there -> float32 on the CPU, of its
    shape."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        f"{name}.weight": cast(Any, module).get_delta_weight(_ADAPTER).detach().float().cpu()
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


@torch.no_grad()
def merge_lora(base: nn.Module, trained: nn.Module) -> nn.Module:
    """Adds to the base model's own weights, in fp32 on the CPU, what LoRA adds to them in
    `trained`; returns it."""
    for name, delta in lora_deltas(trained).items():
        base.get_parameter(name).add_(delta)
    return base


def write_lora(folder: Path, models: Mapping[str, nn.Module], settings: TrainingSettings) -> None:
    """Writes pytorch_lora_weights.safetensors, which `pipeline.load_lora_weights(folder)` reads,
    and `KOHYA_NAME`, the same for kohya's scripts and the interfaces that follow them.

    Rank and alpha are in both, for each model; in the header of the first, for whoever draws, that
    it was trained with `zero_terminal_snr`.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    arguments: dict[str, Any] = {}
    for_kohya: dict[str, Tensor] = {}
    for name, model in models.items():
        state = _state(name, model)
        arguments[f"{name}_lora_layers"] = _as_diffusers(name, state)
        arguments[f"{name}_lora_adapter_metadata"] = _config(name, settings).to_dict()
        for_kohya |= _as_kohya(name, state, _alpha(settings))
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        str(folder), safe_serialization=True, **arguments
    )
    if settings.zero_terminal_snr:
        _add_to_header(folder / LORA_WEIGHTS, {ZERO_TERMINAL_SNR: "true"})
    # Without metadata: AUTOMATIC1111's interface takes a file that has any, but not kohya's, for
    # one of Stable Diffusion 1.
    save_file(for_kohya, folder / KOHYA_NAME)


def _add_to_header(path: Path, words: Mapping[str, str]) -> None:
    """diffusers writes no words of others there, and passes over them where it reads."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file(load(path.read_bytes()), path, {**header, **words})


def _state(name: str, model: nn.Module) -> dict[str, Tensor]:
    """The matrices on the CPU, by peft's names.

    The text encoder's layers have the names that they had before transformers 5 took `text_model`
    out of them: diffusers of before reads no other ones, and today's reads both.
    """
    from peft.utils import get_peft_model_state_dict

    without = name == "text_encoder" and not hasattr(model, "text_model")
    inside = "text_model." if without else ""
    state = get_peft_model_state_dict(model)
    return {f"{inside}{key}": value.cpu().contiguous() for key, value in state.items()}


def _as_diffusers(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices by diffusers' names.

    diffusers' `convert_state_dict_to_diffusers` would give them to the attention's layers only, and
    of a file with two kinds of names diffusers reads those of the kind that the first one is.
    """
    named = {}
    for key, value in state.items():
        layer, which = key.removesuffix(".weight").rsplit(".", 1)
        named[f"{layer}.{_DIFFUSERS_MATRICES[name][which]}.weight"] = value
    return named


def _as_kohya(name: str, state: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The matrices by kohya's names.

    diffusers' `convert_state_dict_to_kohya` would give the text encoder the name that it has in
    SDXL, and alpha the value of the rank.
    """
    named = {}
    for key, value in state.items():
        layer, which = key.removesuffix(".weight").rsplit(".", 1)
        kohya = f"{_KOHYA_MODELS[name]}_{layer.replace('.', '_')}"
        named[f"{kohya}.{_KOHYA_MATRICES[which]}.weight"] = value
        named[f"{kohya}.alpha"] = torch.tensor(float(alpha))
    return named


def _alpha(settings: TrainingSettings) -> float:
    return settings.lora_alpha or settings.lora_rank


def _config(name: str, settings: TrainingSettings) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=_alpha(settings),  # type: ignore[arg-type]
        target_modules=list(getattr(settings, TARGETS[name])),
        init_lora_weights="gaussian",
    )
