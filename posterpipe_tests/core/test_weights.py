"""The weights of a model directory: which files count, and that nothing is made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from posterpipe.core.models import ModelMissing
from posterpipe.core.sampler import Sampler
from posterpipe.core.weights import (
    WeightsUnusable,
    keep_weights_read,
    load_weights,
    variant,
    weight_files,
)
from posterpipe.settings import SamplerSettings
from posterpipe_tests.models import build_tiny_stable_diffusion

UNET, TEXT = "diffusion_pytorch_model.safetensors", "model.safetensors"
PARTS = [("unet", UNET, UNet2DConditionModel), ("text_encoder", TEXT, CLIPTextModel)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_tiny_stable_diffusion(tmp_path / "model", precision="fp32")


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(("part", "name", "cls"), PARTS)
def test_weights_that_the_files_lack_are_not_made_up(
    model: Path, part: str, name: str, cls: Any
) -> None:
    lost = sorted(load_file(model / part / name))[0]
    rewrite(model / part / name, lambda weights: {k: v for k, v in weights.items() if k != lost})
    with pytest.raises(WeightsUnusable, match="weights are missing: "):
        load_weights(cls, model / part, dtype=torch.float32)
    load_weights(cls, model / part, dispensable=(lost,), dtype=torch.float32)


def test_the_weights_of_another_class_are_named_three_at_most(model: Path) -> None:
    path = model / "text_encoder" / TEXT
    rewrite(path, lambda weights: {f"roberta.{k}": v for k, v in weights.items()})
    with pytest.raises(WeightsUnusable, match=r"missing: (\S+, ){2}\S+ and \d+ more"):
        load_weights(CLIPTextModel, model / "text_encoder", dtype=torch.float32)


@pytest.mark.parametrize(("part", "name", "cls"), PARTS)
def test_an_index_that_names_a_pickle_is_refused_unread(
    model: Path, part: str, name: str, cls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model / part
    weights = load_file(folder / name)
    (folder / name).unlink()
    torch.save(weights, folder / "weights.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "weights.bin")}
    (folder / f"{name}.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsUnusable, match=r"'weights\.bin', which is no safetensors file"):
        load_weights(cls, folder, dtype=torch.float32)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": [1]}', "{"])
def test_an_index_that_is_none_is_named(model: Path, text: str) -> None:
    (model / "unet" / f"{UNET}.index.json").write_text(text)
    with pytest.raises(WeightsUnusable, match=r"index\.json is no index of weights"):
        load_weights(UNet2DConditionModel, model / "unet", dtype=torch.float32)


def test_a_damaged_part_of_a_model_is_a_sentence_of_whoever_loads_it(model: Path) -> None:
    config = model / "text_encoder" / "config.json"
    whole = json.loads(config.read_text())
    damaged: list[Any] = [{**whole, "hidden_size": 64}, []]
    for values in damaged:
        config.write_text(json.dumps(values))
        with pytest.raises(ModelMissing, match="the model cannot be loaded"):
            Sampler(model, SamplerSettings(height=48, width=32), model_id="damaged")


def halves(model: Path, shards: bool) -> Path:
    """As plain diffusers writes a model in the variant fp16, in one file each or in several."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float16)
    folder = model.with_name("half")
    more = {"max_shard_size": "200KB"} if shards else {}
    pipeline.save_pretrained(folder, variant="fp16", safe_serialization=True, **more)
    return folder


@pytest.mark.parametrize("shards", [False, True])
def test_a_model_that_is_there_in_half_precision_alone_is_read_and_made_plain(
    model: Path, shards: bool
) -> None:
    half = halves(model, shards)
    assert (len(weight_files(half / "unet")) > 1) == shards
    seen: dict[str, Tensor] = load_weights(
        UNet2DConditionModel, half / "unet", dtype=torch.float32
    ).state_dict()
    Sampler(half, SamplerSettings(height=48, width=32), model_id="half")  # draws with it as well
    for part in ("unet", "vae", "text_encoder"):
        assert variant(half / part) == "fp16"
        keep_weights_read(half / part)
        assert variant(half / part) is None and not list((half / part).glob("*fp16*"))
    # As people load it, who are told of no variant.
    plain = StableDiffusionPipeline.from_pretrained(half, dtype=torch.float32)
    for name, weight in plain.unet.state_dict().items():
        assert torch.equal(weight, seen[name])


def test_of_two_precisions_the_one_that_is_not_read_is_not_kept(model: Path) -> None:
    unet = model / "unet"
    for name in (UNET.replace(".", ".fp16.", 1), UNET.replace(".", ".non_ema.", 1)):
        shutil.copyfile(unet / UNET, unet / name)
    keep_weights_read(unet)
    assert [path.name for path in unet.glob("*.safetensors")] == [UNET]
