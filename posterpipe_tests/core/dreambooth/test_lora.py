"""LoRA: what is trained, what is left, and that diffusers reads it."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from posterpipe.core.dreambooth.base_model import load_text_encoder, load_unet
from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.core.dreambooth.lora import KOHYA_NAME, add_lora, lora_deltas
from posterpipe.core.dreambooth.texts import FrozenTexts, Tokens
from posterpipe.core.dreambooth.train import train
from posterpipe.core.sampler import LORA_WEIGHTS, ImageRequest, Sampler
from posterpipe.settings import SamplerSettings
from posterpipe.training_settings import TrainingSettings
from posterpipe_tests.core.dreambooth.conftest import (
    MakeConfig,
    equal,
    interrupt_at,
    losses,
    saves_of,
    text_weights,
    unet_weights,
)
from posterpipe_tests.models import build_tiny_stable_diffusion

LORA = {"method": "lora", "lora_rank": 4, "lora_alpha": 2.0, "learning_rate": 1e-2}


def image_of(folder: Path, lora: Path | None = None, name: str | None = None) -> np.ndarray:
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    if lora is not None:
        pipeline.load_lora_weights(lora, weight_name=name)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red rocket",
        width=32,
        height=48,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    return np.asarray(image, dtype=int)


def small_files_of(config: RunConfig) -> Path:
    """The folder of the LoRA files alone after the first step."""
    return config.output_dir / "exports" / "step-00000001"


def test_diffusers_loads_it_on_the_base_model_and_draws_what_the_merged_one_draws(
    make_config: MakeConfig, base_model: Path
) -> None:
    config = make_config(**LORA)
    train(config)
    alone = image_of(base_model)
    loaded = image_of(base_model, lora=config.output_dir)
    merged = image_of(config.output_dir)
    assert np.abs(loaded - alone).max() > 2
    # The merged weights are rounded to the fp16 of the base model's files.
    assert np.abs(loaded - merged).max() <= 2
    # With an alpha that is not the rank, and the text encoder's matrices.
    assert (image_of(base_model, config.output_dir, KOHYA_NAME) == loaded).all()


def test_kohyas_file_has_kohyas_names(make_config: MakeConfig) -> None:
    config = make_config(**LORA, max_train_steps=1, lora_targets=("to_v", "to_out.0", "conv1"))
    train(config)
    with safe_open(config.output_dir / KOHYA_NAME, framework="pt") as file:
        assert file.metadata() is None  # with any, some interfaces take it for one of 1.x
    tensors = load_file(config.output_dir / KOHYA_NAME)
    layers = {name.split(".")[0] for name in tensors}
    assert tensors.keys() == {
        f"{layer}.{end}"
        for layer in layers
        for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert {
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_0_self_attn_out_proj",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "lora_unet_mid_block_resnets_0_conv1",
    } <= layers
    assert all(layer.startswith(("lora_unet_", "lora_te_text_model_")) for layer in layers)
    assert {float(tensors[f"{layer}.alpha"]) for layer in layers} == {2.0}
    assert all(tensors[f"{layer}.lora_down.weight"].shape[0] == 4 for layer in layers)
    assert all(tensors[f"{layer}.lora_up.weight"].shape[1] == 4 for layer in layers)


@pytest.mark.parametrize("names", ["today's", "those of earlier files"])
def test_diffusers_and_the_sampler_load_it_into_the_text_encoder_as_well(
    make_config: MakeConfig, base_model: Path, tmp_path: Path, names: str
) -> None:
    from diffusers import StableDiffusionPipeline

    config = make_config(**LORA, max_train_steps=2)
    train(config)
    lora = tmp_path / "lora"
    lora.mkdir()
    with safe_open(config.output_dir / LORA_WEIGHTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    text_layers = [name for name in tensors if name.startswith("text_encoder.")]
    assert text_layers  # older diffusers look for them there
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in text_layers)
    if names != "today's":
        tensors = {name.replace(".text_model.", "."): tensors[name] for name in tensors}
    save_file(tensors, lora / LORA_WEIGHTS, metadata)

    def pipeline_of(folder: Path) -> Any:
        return StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)

    @torch.no_grad()
    def says(pipeline: Any) -> torch.Tensor:
        return pipeline.text_encoder(torch.arange(48)[None]).last_hidden_state

    loaded = pipeline_of(base_model)
    alone = says(loaded)
    loaded.load_lora_weights(lora)
    assert set(loaded.get_list_adapters()) == {"unet", "text_encoder"}
    way = (says(loaded) - alone).abs().max()
    # The merged weights are rounded to the fp16 of the base model's files.
    error = (says(loaded) - says(pipeline_of(config.output_dir))).abs().max()
    assert way > 0.05 and error < way / 20
    sampler = Sampler(lora, SamplerSettings(), model_id="x", base_dir=base_model)
    assert (says(loaded) - says(sampler)).abs().max() < way / 20


def test_the_small_file_alone_is_drawn_on_the_noise_schedule_that_it_was_trained_on(
    make_config: MakeConfig, base_model: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(base_model, tmp_path / "linear"))  # whose end is not pure noise
    schedule = base / "scheduler" / "scheduler_config.json"
    linear = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    schedule.write_text(json.dumps({**json.loads(schedule.read_text()), **linear}))
    parts = {"base_model": base}
    settings = {**LORA, "max_train_steps": 1, "export_every_steps": 1}
    request = [ImageRequest("a red rocket", "blue", 1)]

    def sampler_of(folder: Path) -> Sampler:
        quick = SamplerSettings(num_inference_steps=3, width=32, height=48)
        return Sampler(folder, quick, model_id="x", base_dir=base)

    ends = []
    for to_noise in (False, True):
        config = make_config(f"{to_noise}", parts=parts, **settings, zero_terminal_snr=to_noise)
        train(config)
        whole, small = sampler_of(config.output_dir), sampler_of(small_files_of(config))
        assert torch.equal(small.scheduler.alphas_cumprod, whole.scheduler.alphas_cumprod)
        ends.append(float(small.scheduler.alphas_cumprod[-1]))
        drawn = (np.asarray(sampler(request)[0], dtype=int) for sampler in (whole, small))
        # The merged weights are rounded to the fp16 of the base model's files.
        assert np.abs(next(drawn) - next(drawn)).max() <= 2
        # Others read it as before: diffusers both matrices, kohya's scripts a file without a word.
        image_of(base, small_files_of(config))
        with safe_open(small_files_of(config) / KOHYA_NAME, framework="pt") as file:
            assert file.metadata() is None
        card = (config.output_dir / "README.md").read_text()
        assert ("rescale_betas_zero_snr=True" in card) == to_noise
    assert ends[0] > 1e-3 > ends[1]


@pytest.mark.parametrize(
    ("targets", "text_targets"),
    [
        (("to_q", "to_out.0", "proj_in", "ff.net.2", "conv1", "time_emb_proj"), ("q_proj", "fc1")),
        (("to_v", "conv_shortcut"), ("fc1", "fc2")),
    ],
    ids=["of all kinds", "no attention in the text encoder"],
)
def test_what_diffusers_and_the_sampler_load_is_what_was_merged_whichever_layers_are_named(
    make_config: MakeConfig,
    base_model: Path,
    targets: tuple[str, ...],
    text_targets: tuple[str, ...],
) -> None:
    from diffusers import StableDiffusionPipeline

    config = make_config(
        **LORA,
        max_train_steps=2,
        export_every_steps=2,
        lora_targets=targets,
        lora_text_encoder_targets=text_targets,
    )
    train(config)
    exported = config.output_dir / "exports" / "step-00000002"

    def pipeline_with(lora: Path) -> Any:
        pipeline: Any = StableDiffusionPipeline.from_pretrained(base_model, dtype=torch.float32)
        pipeline.load_lora_weights(lora)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        return pipeline

    sampler = Sampler(exported, SamplerSettings(), model_id="x", base_dir=base_model)
    for model in (pipeline_with(config.output_dir), pipeline_with(exported), sampler):
        for names, weights_of, added in (
            (targets, unet_weights, model.unet.state_dict()),
            (text_targets, text_weights, model.text_encoder.state_dict()),
        ):
            before, merged = weights_of(base_model), weights_of(config.output_dir)
            changed = {name for name in before if not torch.equal(before[name], merged[name])}
            layers = {name.removesuffix(".weight") for name in changed}
            assert all(layer.endswith(names) for layer in layers)
            assert all(any(layer.endswith(name) for layer in layers) for name in names)
            # They are rounded to the fp16 of the base model's files.
            for name, value in merged.items():
                inside = name if name in added else name.removeprefix("text_model.")
                torch.testing.assert_close(added[inside].half(), value, rtol=2e-3, atol=1e-5)


def test_only_the_named_layers_change(make_config: MakeConfig, base_model: Path) -> None:
    config = make_config(**LORA, lora_targets=("to_v",), train_text_encoder=False)
    train(config)
    before, after = unet_weights(base_model), unet_weights(config.output_dir)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith("to_v.weight") for name in changed)
    assert equal(text_weights(base_model), text_weights(config.output_dir))
    small = load_file(config.output_dir / "pytorch_lora_weights.safetensors")
    assert len(small) == 2 * len(changed)
    assert all(4 in value.shape for value in small.values())


@pytest.mark.parametrize("stop", [None, 3, 5], ids=lambda stop: f"text encoder until {stop}")
def test_a_stopped_run_goes_on_to_the_same_bits(make_config: MakeConfig, stop: int | None) -> None:
    settings = {**LORA, "max_train_steps": 6, "save_every_steps": 2, "mixed_precision": "bf16"}
    settings["text_encoder_stop_step"] = stop
    whole, cut = make_config("whole", **settings), make_config("cut", **settings)
    uninterrupted = train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(cut, interrupt_at(5))
    (_, newest) = saves_of(cut)
    saved = load_file(newest / "unet.safetensors")
    assert all("lora_" in name for name in saved)
    resumed = train(cut)
    assert resumed.resumed_from == 4
    assert losses(resumed) == losses(uninterrupted)
    assert equal(unet_weights(whole.output_dir), unet_weights(cut.output_dir))
    assert equal(text_weights(whole.output_dir), text_weights(cut.output_dir))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_text_encoder_that_never_learns_speaks_as_one_that_is_not_trained(
    make_config: MakeConfig, precision: str
) -> None:
    settings = {**LORA, "mixed_precision": precision}
    never = make_config("never", **settings, text_encoder_stop_step=0)
    untrained = make_config("untrained", **settings, train_text_encoder=False)
    assert losses(train(never)) == losses(train(untrained))
    assert equal(unet_weights(never.output_dir), unet_weights(untrained.output_dir))


@pytest.mark.parametrize("shuffling", [False, True], ids=["fixed captions", "shuffled ones"])
def test_a_text_encoder_that_has_stopped_speaks_in_fp32_as_the_finished_one_does(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffling: bool
) -> None:
    base = build_tiny_stable_diffusion(tmp_path / "base", precision="fp32")
    said: dict[str, torch.Tensor] = {}
    encoders: list[weakref.ref[Any]] = []
    left: list[int] = []
    speak = FrozenTexts.__call__

    def listened_to(texts: FrozenTexts, asked: Sequence[str]) -> torch.Tensor:
        answers = speak(texts, asked)
        said.update(zip(asked, answers, strict=True))
        left.append(sum(encoder() is not None for encoder in encoders))
        return answers

    def load(folder: Path) -> Any:
        encoder = load_text_encoder(folder)
        encoders.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(FrozenTexts, "__call__", listened_to)
    monkeypatch.setattr("posterpipe.core.dreambooth.learner.load_text_encoder", load)
    settings = {**LORA, "mixed_precision": "bf16", "caption_shuffling": shuffling}
    config = make_config(parts={"base_model": base}, **settings, text_encoder_stop_step=2)
    train(config)
    finished = FrozenTexts(
        lambda: load_text_encoder(config.output_dir),
        Tokens(base),
        torch.device("cpu"),
        torch.bfloat16,
    )
    assert said and all(
        torch.equal(answer, speak(finished, [text])[0]) for text, answer in said.items()
    )
    # Beside the one in training, one that goes as soon as it has spoken all that will be asked.
    assert set(left) == ({2} if shuffling else {1}) and len(encoders) == 2


def test_models_from_the_middle_of_a_run_are_the_small_files(make_config: MakeConfig) -> None:
    config = make_config(**LORA, export_every_steps=2)
    train(config)
    short = make_config("short", **{**LORA, "max_train_steps": 2})
    train(short)
    half = config.output_dir / "exports" / "step-00000002"
    assert {path.name for path in half.iterdir()} == {LORA_WEIGHTS, KOHYA_NAME}
    for name in (LORA_WEIGHTS, KOHYA_NAME):
        assert equal(load_file(half / name), load_file(short.output_dir / name))


def test_it_learns_with_gradient_checkpointing_as_without(make_config: MakeConfig) -> None:
    # Seeds beyond those that torch takes count anew.
    plain = train(make_config("plain", **LORA, seed=777 + 2**64))
    saving = train(make_config("saving", **LORA, seed=777, gradient_checkpointing=True))
    assert losses(plain) == pytest.approx(losses(saving))
    assert losses(plain)[0] != losses(plain)[-1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"lora_targets": ("nothing",)},
            "lora_targets: the unet has no linear or convolution layer named nothing;",
        ),
        ({"lora_targets": ("to_q", "to_kk", "proj_inn")}, "layer named to_kk, proj_inn;"),
        ({"lora_targets": ("attn1",)}, "the unet has no linear or convolution layer named attn1;"),
        ({"lora_targets": ("to_out",)}, "layer named to_out;"),
        ({"lora_targets": ("norm1",)}, "layer named norm1;"),
        ({"lora_targets": ("to_q", "0")}, "(down_blocks.0 is a "),
        (
            {"lora_text_encoder_targets": ("q_proj", "position_embedding")},
            "lora_text_encoder_targets: the text_encoder has no linear or convolution layer named "
            "position_embedding;",
        ),
        ({"lora_text_encoder_targets": ("token_embedding",)}, "layer named token_embedding;"),
    ],
)
def test_each_name_must_be_that_of_layers_which_the_written_files_can_have(
    base_model: Path, settings: dict[str, Any], words: str
) -> None:
    models = {"unet": load_unet(base_model), "text_encoder": load_text_encoder(base_model)}
    with pytest.raises(TrainingError) as caught:
        add_lora(models, TrainingSettings(**LORA, **settings), torch.float32)
    assert words in str(caught.value)


def test_a_layer_can_be_named_in_full(base_model: Path) -> None:
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    unet = load_unet(base_model)
    add_lora({"unet": unet}, TrainingSettings(**LORA, lora_targets=(name,)), torch.float32)
    assert list(lora_deltas(unet)) == [f"{name}.weight"]
