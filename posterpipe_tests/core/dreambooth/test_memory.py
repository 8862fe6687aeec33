"""What a run is told when memory runs out: settings that should fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel

from posterpipe.core.dreambooth.base_model import count_parameters, load_unet
from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.core.dreambooth.memory import (
    BESIDE_GIB,
    IMAGE_GIB,
    InParts,
    advice,
    memory_hint,
    models_gib,
)
from posterpipe.settings import default_root
from posterpipe.training_settings import TrainingSettings
from posterpipe_tests.core.dreambooth.conftest import MakeConfig

SD21 = {"unet": 865_910_724, "text_encoder": 340_387_840}


def test_parameters_are_counted_without_loading_them(base_model: Path) -> None:
    encoder = CLIPTextModel.from_pretrained(base_model / "text_encoder")
    assert count_parameters(base_model) == {
        "unet": sum(p.numel() for p in load_unet(base_model).parameters()),
        "text_encoder": sum(p.numel() for p in encoder.parameters()),
    }


def test_what_the_models_take_by_hand() -> None:
    # Bytes a parameter: 4 weights + 4 gradients + 2 of 8-bit Adam.
    thesis = TrainingSettings()
    assert models_gib(thesis, SD21) == pytest.approx(10 * 1.2063 / 1.0737, rel=1e-3)
    exact = TrainingSettings(optimizer="adamw", mixed_precision="fp32", train_text_encoder=False)
    assert models_gib(exact, SD21) == pytest.approx(16 * 0.86591 / 1.07374, rel=1e-3)
    averaged = exact.model_copy(update={"ema_decay": 0.999})
    assert models_gib(averaged, SD21) == pytest.approx(20 * 0.86591 / 1.07374, rel=1e-3)
    lora = thesis.model_copy(update={"method": "lora"})
    assert models_gib(lora, SD21) == pytest.approx(2 * 1.2063 / 1.0737, rel=1e-3)
    # A frozen text encoder goes when it has read all captions; shuffled ones are ever new.
    shuffled = exact.model_copy(update={"caption_shuffling": True})
    both = 16 * 0.86591 + 4 * 0.34039
    assert models_gib(shuffled, SD21) == pytest.approx(both / 1.07374, rel=1e-3)
    trained = thesis.model_copy(update={"caption_shuffling": True})
    assert models_gib(trained, SD21) == models_gib(thesis, SD21)
    # Beside LoRA in bf16 a text encoder that has stopped reads them in fp32.
    stops = lora.model_copy(update={"caption_shuffling": True, "text_encoder_stop_step": 9})
    both = 2 * 1.2063 + 4 * 0.34039
    assert models_gib(stops, SD21) == pytest.approx(both / 1.07374, rel=1e-3)


def test_what_the_models_take_is_just_below_what_was_measured_on_a_gpu() -> None:
    rows = json.loads((default_root() / "benchmarks/results/nvidia-h200.json").read_text("utf-8"))
    measured = {row["name"]: row["ours"] for row in rows}
    unet = TrainingSettings(mixed_precision="bf16", train_text_encoder=False)
    models = models_gib(unet, SD21)
    for batch in (1, 4):
        # A small GPU trains without CUDA graphs.
        name = f"train_sd21_gpu.unet.batch{batch}.without_cuda_graphs"
        assert models < measured[f"{name}.memory"]
        room = models + batch * IMAGE_GIB + BESIDE_GIB - measured[f"{name}.memory_reserved"]
        assert 0.5 < room < 1.5, "the driver's context, which torch does not see, is about 0.5 GiB"


def test_on_a_small_gpu_what_costs_least_comes_first_until_it_fits() -> None:
    wide = TrainingSettings(train_batch_size=4, optimizer="adamw")
    words = advice(wide, SD21, gib=12.0)
    assert words.index("train_batch_size = 1 with gradient_accumulation_steps = 4") < words.index(
        'optimizer = "adamw_8bit"'
    )
    # 11.2 of 12 GiB with the text encoder leave no room for images, 8.1 do.
    assert "they take 8.1" in words and "train_text_encoder = false" in words
    assert "lora" not in words
    assert 'method = "lora"' in advice(wide, SD21, gib=8.0)
    assert "adamw_8bit" not in advice(wide, SD21, gib=80.0)


def test_several_processes_are_not_told_to_halve_a_batch() -> None:
    wide = TrainingSettings(train_batch_size=4)
    assert "halve_batch_on_out_of_memory" in advice(wide, SD21, gib=15.0)
    several = advice(wide, SD21, gib=15.0, processes=2)
    assert "train_batch_size = 1" in several and "halve_batch_on_out_of_memory" not in several


def test_a_batch_that_was_halved_down_to_one_is_not_advised_again() -> None:
    halving = TrainingSettings(
        train_batch_size=4, optimizer="adamw", halve_batch_on_out_of_memory=True
    )
    words = advice(halving, SD21, gib=80.0)
    assert "batch" not in words and "gradient_checkpointing = true" in words
    fitting = halving.model_copy(update={"gradient_checkpointing": True})
    assert 'optimizer = "adamw_8bit"' in advice(fitting, SD21, gib=80.0)
    least = fitting.model_copy(update={"method": "lora", "train_text_encoder": False})
    assert "train on smaller images, or on a larger device" in advice(least, SD21, gib=80.0)
    # Of several processes none halves its batch.
    assert "train_batch_size = 1" in advice(halving, SD21, gib=80.0, processes=2)


def test_where_the_words_can_mean_something_else_they_are_told(make_config: MakeConfig) -> None:
    words = "GET was unable to find an engine to execute this computation"
    with (
        pytest.raises(TrainingError, match=f'out of memory.*train_batch_size = 1.*"{words}"'),
        memory_hint(make_config(), torch.device("cpu"), 1),
    ):
        raise RuntimeError(words)


def test_a_batch_is_looked_at_in_parts_that_fit_and_a_second_one_at_once_in_those() -> None:
    said: list[str] = []
    sizes: list[int] = []
    look = InParts(said.append, "images")

    def squares(part: slice) -> Tensor:
        values = torch.arange(7.0)[part]
        sizes.append(len(values))
        if len(values) > 2:
            raise RuntimeError("CUDA error: out of memory")
        return values**2

    assert look(7, squares).tolist() == [0, 1, 4, 9, 16, 25, 36]
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert said == [
        "out of memory: goes on with 3 images at once",
        "out of memory: goes on with 1 images at once",
    ]
    sizes.clear()
    look(3, squares)
    assert sizes == [1, 1, 1]

    def broken(part: slice) -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        InParts(said.append, "images")(7, broken)


def test_where_nothing_is_left_to_change_it_says_so() -> None:
    least = TrainingSettings(method="lora", gradient_checkpointing=True, train_text_encoder=False)
    assert "train on smaller images, or on a larger device" in advice(least, SD21, gib=2.0)
