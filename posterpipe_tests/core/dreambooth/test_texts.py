"""Captions as tokens and hidden states."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from posterpipe.core.dreambooth.base_model import load_text_encoder, load_tokenizer
from posterpipe.core.dreambooth.texts import FrozenTexts, Tokens, TrainedTexts, encoder_key
from posterpipe.core.dreambooth.train import train
from posterpipe_tests.core.dreambooth.conftest import MakeConfig

CPU = torch.device("cpu")


class Counted:
    """Loads the encoder, and knows how often."""

    def __init__(self, base_model: Path) -> None:
        self.base_model = base_model
        self.times = 0

    def __call__(self) -> nn.Module:
        self.times += 1
        return load_text_encoder(self.base_model)


def frozen(base_model: Path, load: Counted, dtype: torch.dtype = torch.float32) -> FrozenTexts:
    return FrozenTexts(load, Tokens(base_model), CPU, dtype)


def learn(texts: FrozenTexts, words: list[str], cache: Path, base_model: Path) -> list[str]:
    said: list[str] = []
    texts.learn(words, cache, encoder_key(base_model), log=said.append)
    return said


def test_captions_are_cut_so_that_the_end_token_stays(base_model: Path) -> None:
    tokens = Tokens(base_model)
    ids = tokens(["a red rocket " * 40, "a cat"])
    assert ids.shape == (2, tokens.length) == (2, 48)
    assert (ids[:, -1] == load_tokenizer(base_model).eos_token_id).all()


def test_captions_that_are_cut_are_named(base_model: Path) -> None:
    tokens = Tokens(base_model)
    room = tokens.length - 2  # without start and end
    texts = ["z" + " rocket" * room, "a cat", " ".join(["cat"] * room)]
    counts = [len(load_tokenizer(base_model)(text).input_ids) for text in texts]
    assert counts[0] > tokens.length == counts[2]
    assert tokens.too_long(texts) == [texts[0]]


def test_what_is_kept_is_what_the_encoder_says(base_model: Path, tmp_path: Path) -> None:
    texts = frozen(base_model, Counted(base_model))
    learn(texts, ["a red rocket", "", "a red rocket"], tmp_path, base_model)
    encoder = load_text_encoder(base_model).eval()
    with torch.no_grad():
        wanted = TrainedTexts(encoder, Tokens(base_model), CPU)(["a red rocket", ""])
    torch.testing.assert_close(texts(["a red rocket", ""]), wanted)


def test_known_texts_need_no_encoder(base_model: Path, tmp_path: Path) -> None:
    words = ["a red rocket", "a cat", ""]
    learn(frozen(base_model, Counted(base_model)), words, tmp_path, base_model)
    load = Counted(base_model)
    texts = frozen(base_model, load)
    assert learn(texts, words, tmp_path, base_model) == []
    assert texts(["a cat"]).shape == (1, 48, 32)
    assert load.times == 0
    assert learn(texts, [*words, "a new one"], tmp_path, base_model) == ["encoded 1 captions"]


def test_another_precision_or_encoder_has_answers_of_its_own(
    base_model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    learn(frozen(base_model, Counted(base_model)), ["a cat"], cache, base_model)
    short = frozen(base_model, Counted(base_model), torch.bfloat16)
    assert learn(short, ["a cat"], cache, base_model) == ["encoded 1 captions"]
    assert short(["a cat"]).dtype == torch.bfloat16

    other = Path(shutil.copytree(base_model, tmp_path / "other"))
    weights = other / "text_encoder" / "model.safetensors"
    save_file(
        {k: v * 1.5 for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"}
    )
    changed = frozen(other, Counted(other))
    assert learn(changed, ["a cat"], cache, other) == ["encoded 1 captions"]


def test_answers_of_another_torch_are_not_taken(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn(frozen(base_model, Counted(base_model)), ["a cat"], tmp_path, base_model)
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    said = learn(frozen(base_model, Counted(base_model)), ["a cat"], tmp_path, base_model)
    assert said == ["encoded 1 captions"]


def test_a_text_says_the_same_whatever_comes_with_it(base_model: Path) -> None:
    together = frozen(base_model, Counted(base_model))(["a cat", "a red rocket", "a poster"])
    alone = frozen(base_model, Counted(base_model))(["a red rocket"])
    assert torch.equal(together[1], alone[0])


def test_a_frozen_encoder_answers_in_fp32_also_where_autocast_is_on(base_model: Path) -> None:
    outside = frozen(base_model, Counted(base_model))(["a red rocket"])
    with torch.autocast("cpu", torch.bfloat16):
        inside = frozen(base_model, Counted(base_model))(["a red rocket"])
    assert torch.equal(inside, outside)


def test_a_text_encoder_without_its_last_layer_says_what_clip_skip_says(
    base_model: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    from diffusers import StableDiffusionPipeline

    skipping = Path(shutil.copytree(base_model, tmp_path / "skipping"))
    file = skipping / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] - 1}))
    # As kohya's scripts do it: the last layer but one, normed.
    encoder: Any = load_text_encoder(base_model).eval()
    with torch.no_grad():
        layers = encoder(Tokens(base_model)(["a red rocket"]), output_hidden_states=True)
        wanted = encoder.final_layer_norm(layers.hidden_states[-2])
    plain = frozen(base_model, Counted(base_model))(["a red rocket"])
    assert not torch.allclose(plain, wanted)
    torch.testing.assert_close(frozen(skipping, Counted(skipping))(["a red rocket"]), wanted)
    # So the finished model is sampled as it was trained, whoever draws with it.
    run = make_config(parts={"base_model": skipping}, max_train_steps=1, train_text_encoder=False)
    train(run)
    finished: Any = StableDiffusionPipeline.from_pretrained(run.output_dir, dtype=torch.float32)
    said = finished.encode_prompt("a red rocket", CPU, 1, False)[0]
    torch.testing.assert_close(said, wanted)
