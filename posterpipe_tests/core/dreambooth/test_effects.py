"""Settings that do nothing beside the others: named, and without a say in what a checkpoint is."""

from __future__ import annotations

from typing import Any

import pytest

from posterpipe.core.dreambooth.config import Versions
from posterpipe.core.dreambooth.effects import remarks
from posterpipe.core.dreambooth.train import train
from posterpipe.training_settings import TrainingSettings
from posterpipe_tests.core.dreambooth.conftest import MakeConfig

VERSIONS = Versions(training_set="set", base_model="base")

IDLE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"lora_rank": 99}),
    ({}, {"lora_alpha": 2.0}),
    ({}, {"lora_targets": ("to_v",)}),
    ({"train_text_encoder": False}, {"text_encoder_learning_rate": 1e-9}),
    ({"train_text_encoder": False}, {"text_encoder_stop_step": 3}),
    (
        {"method": "lora", "train_text_encoder": False},
        {"lora_text_encoder_targets": ("q_proj",)},
    ),
    ({"lr_scheduler": "constant"}, {"lr_warmup_steps": 500}),
    ({"caption_dropout": 0.1}, {"caption_kept_parts": 7}),
    ({}, {"caption_separator": ";"}),
    ({}, {"prior_loss_weight": 0.5}),
    ({}, {"class_prompt": "a cat"}),
    ({}, {"early_stop_min_gain": 0.1}),
    ({}, {"sample_prompts": ("a cat",)}),
    ({"mixed_precision": "bf16"}, {"tf32": True}),
    ({}, {"compile_blocks": True}),
]

IN_USE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"method": "lora"}, {"lora_rank": 99}),
    ({"method": "lora"}, {"lora_text_encoder_targets": ("q_proj",)}),
    ({}, {"text_encoder_learning_rate": 1e-9}),
    ({}, {"text_encoder_stop_step": 3}),
    ({"lr_scheduler": "linear"}, {"lr_warmup_steps": 81}),
    ({"caption_shuffling": True}, {"caption_kept_parts": 7}),
    ({"caption_shuffling": True}, {"caption_separator": ";"}),
    ({"prior_preservation": True}, {"class_prompt": "a cat"}),
    ({"early_stop_patience": 3}, {"early_stop_min_gain": 0.1}),
    ({"mixed_precision": "fp32"}, {"tf32": True}),
    ({"compile": True}, {"compile_blocks": True}),
]


@pytest.mark.parametrize(("others", "given"), IDLE)
def test_a_setting_without_effect_is_named_and_makes_no_other_checkpoint(
    make_config: MakeConfig, others: dict[str, Any], given: dict[str, Any]
) -> None:
    (said,) = remarks(TrainingSettings(**others, **given))
    assert said.startswith(f"training.{next(iter(given))} = ") and "no effect without" in said
    without, with_it = make_config(**others), make_config(**others, **given)
    if "lr_scheduler" in others:  # the tests' own configs have a warmup too
        without = make_config(**others, lr_warmup_steps=80)
    assert with_it.checkpoint_id(VERSIONS) == without.checkpoint_id(VERSIONS)


@pytest.mark.parametrize(("others", "given"), IN_USE)
def test_a_setting_in_use_makes_another_checkpoint_and_nothing_is_said(
    make_config: MakeConfig, others: dict[str, Any], given: dict[str, Any]
) -> None:
    assert list(remarks(TrainingSettings(**others, **given))) == []
    without, with_it = make_config(**others), make_config(**{**others, **given})
    assert with_it.checkpoint_id(VERSIONS) != without.checkpoint_id(VERSIONS)


def test_a_warmup_that_the_run_does_not_reach_the_end_of_is_named() -> None:
    (said,) = remarks(TrainingSettings(max_train_steps=80))
    assert "lr_warmup_steps = 80 is not reached in 80 steps" in said
    assert list(remarks(TrainingSettings(max_train_steps=81))) == []
    assert list(remarks(TrainingSettings(max_train_steps=80, lr_scheduler="constant"))) == []


def test_weights_that_leave_out_the_timesteps_that_were_asked_for_are_named() -> None:
    (said,) = remarks(TrainingSettings(zero_terminal_snr=True, snr_gamma=5.0))
    assert "snr_gamma" in said and "zero_terminal_snr" in said
    assert list(remarks(TrainingSettings(zero_terminal_snr=True))) == []
    assert list(remarks(TrainingSettings(snr_gamma=5.0))) == []


def test_nothing_is_said_of_no_warmup_where_the_rate_is_constant_anyway() -> None:
    assert list(remarks(TrainingSettings(lr_scheduler="constant", lr_warmup_steps=0))) == []


def test_a_run_says_once_what_has_no_effect(make_config: MakeConfig) -> None:
    said: list[str] = []
    train(make_config(max_train_steps=1, lora_rank=99, lora_alpha=2.0), log=said.append)
    assert [line for line in said if "no effect" in line] == [
        "training.lora_rank = 99 has no effect without method = lora",
        "training.lora_alpha = 2.0 has no effect without method = lora",
    ]
