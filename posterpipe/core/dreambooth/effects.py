"""Which settings have an effect, given the others.

What belongs here: what decides a weight and what does not, and what is logged of a setting that was
given for nothing. What does not: the settings themselves (`posterpipe.training_settings`), the id
that is made of those that decide (`config`). Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from posterpipe.training_settings import TrainingSettings

WATCHING = frozenset(
    {
        "log_every_steps",
        "save_every_steps",
        "keep_saves",
        "export_every_steps",
        "sample_every_steps",
        "sample_prompts",
        "sample_seed",
        "halve_batch_on_out_of_memory",
        "cuda_graphs",
    }
)
"""Settings that change what a run logs, keeps and needs, but no weight."""

# Younger than the first checkpoints, whose names stay as they were where these are off.
_LATER = frozenset({"tf32", "compile_blocks"})

FROZEN_LORA_VERSION = "texts in fp32"
"""Changed when a text encoder with LoRA in bf16 or fp16, once it has stopped learning, would say
something else."""


def freezes_short_lora(training: TrainingSettings) -> bool:
    """Whether a text encoder with LoRA in bf16 or fp16 stops learning before the run ends."""
    stop = training.text_encoder_stop_step if training.train_text_encoder else None
    short = training.method == "lora" and training.mixed_precision != "fp32"
    return short and stop is not None and stop < training.max_train_steps


def with_defaults(training: TrainingSettings) -> TrainingSettings:
    """The settings, with those at their default that have no effect beside the others."""
    fields = TrainingSettings.model_fields
    return training.model_copy(update={name: fields[name].default for name in idle(training)})


def deciding(training: TrainingSettings) -> dict[str, Any]:
    """The settings that may decide a weight, as JSON values.

    One that has no effect beside the others is as if nobody had given it: a LoRA's rank does not
    tell two full trainings apart. `frozen_lora` is no setting: it tells weights of before a mend
    apart, where the settings are those that it mends.
    """
    fields = TrainingSettings.model_fields
    in_use = with_defaults(training)
    off = {name for name in _LATER if getattr(in_use, name) == fields[name].default}
    values = in_use.model_dump(mode="json", exclude=set(WATCHING) | off)
    # The layout chosen for a device is no part of the id, just as the device is not.
    values["channels_last"] = in_use.channels_last is not False
    if freezes_short_lora(training):
        values["frozen_lora"] = FROZEN_LORA_VERSION
    return values


def idle(training: TrainingSettings) -> dict[str, str]:
    """The settings that have no effect beside the others, each with the setting that it needs."""
    needs = {}

    def without(setting: str, *names: str) -> None:
        needs.update(dict.fromkeys(names, setting))

    if not training.train_text_encoder:
        without(
            "train_text_encoder",
            "text_encoder_learning_rate",
            "text_encoder_stop_step",
            "lora_text_encoder_targets",
        )
    if training.method != "lora":
        without(
            "method = lora",
            "lora_rank",
            "lora_alpha",
            "lora_targets",
            "lora_text_encoder_targets",
        )
    if training.mixed_precision != "fp32":
        without("mixed_precision = fp32", "tf32")
    if not training.compile:
        without("compile", "compile_blocks")
    if training.lr_scheduler == "constant":
        without("another lr_scheduler than constant", "lr_warmup_steps")
    if not training.caption_shuffling:
        without("caption_shuffling", "caption_separator", "caption_kept_parts")
    if not training.prior_preservation:
        without("prior_preservation", "prior_loss_weight", "class_prompt", "class_image_count")
    if training.early_stop_patience is None:
        without("early_stop_patience", "early_stop_min_gain")
    if training.holdout_every_steps is None:
        without("holdout_every_steps", "holdout_timesteps")
    if training.sample_every_steps is None:
        without("sample_every_steps", "sample_prompts", "sample_seed")
    return needs


def remarks(training: TrainingSettings) -> Iterator[str]:
    """A sentence for each setting that was given and does not do what it says."""
    given = training.model_dump(mode="json")
    usual = TrainingSettings().model_dump(mode="json")
    for name, needed in idle(training).items():
        # 0 steps of warmup are none, which is what comes of it.
        if given[name] != usual[name] and (name, given[name]) != ("lr_warmup_steps", 0):
            shown = json.dumps(given[name], ensure_ascii=False)
            yield f"training.{name} = {shown} has no effect without {needed}"
    warmup, steps = training.lr_warmup_steps, training.max_train_steps
    if training.lr_scheduler != "constant" and warmup >= steps:
        yield (
            f"training.lr_warmup_steps = {warmup} is not reached in {steps} steps: the learning "
            "rate stays below its peak"
        )
    if training.zero_terminal_snr and training.snr_gamma is not None:
        yield (
            "training.snr_gamma gives the last timesteps almost no weight, and the last one none, "
            "so that what training.zero_terminal_snr adds is hardly learnt: leave one of them out"
        )
