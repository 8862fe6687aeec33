"""The trainer on tiny models: right, complete, and clear about what it cannot do."""

from __future__ import annotations

import csv
import gc
import json
import math
import os
import re
import shutil
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from posterpipe.core.dreambooth import objective
from posterpipe.core.dreambooth.base_model import load_text_encoder, load_vae
from posterpipe.core.dreambooth.batches import Batch
from posterpipe.core.dreambooth.checkpoint import try_output
from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.draws import Draw, Stream
from posterpipe.core.dreambooth.errors import (
    BaseModelError,
    TrainingDiverged,
    TrainingError,
    TrainingSetError,
    TrainingStopped,
)
from posterpipe.core.dreambooth.guards import only_writer_of
from posterpipe.core.dreambooth.holdout import holdout_loss
from posterpipe.core.dreambooth.learner import Learner, precision_remarks
from posterpipe.core.dreambooth.reports import StepReport
from posterpipe.core.dreambooth.train import train
from posterpipe.core.generations import blocked_reason
from posterpipe.core.models import directory_fingerprint
from posterpipe.core.sampler import Sampler
from posterpipe.settings import SamplerSettings, default_root
from posterpipe_tests.core.dreambooth.conftest import (
    MakeConfig,
    equal,
    interrupt_at,
    losses,
    no_number_at,
    saves_of,
    text_weights,
    unet_weights,
    write_training_set,
)
from posterpipe_tests.models import build_tiny_stable_diffusion


def reference_run(config: RunConfig) -> tuple[list[float], list[Any]]:
    """Losses and models of a plain loop: the published equations, one line after the other.

    Only the positions' random numbers are shared with the trainer. AdamW after Loshchilov & Hutter
    2019, algorithm 2; clipping to a total norm; cosine betas after Nichol & Dhariwal 2021, eq. 17;
    prior preservation after Ruiz et al. 2023, eq. 2; min-SNR after Hang et al. 2023, section 3.4.
    """
    settings = config.training
    base = str(config.base_model)
    vae: Any = AutoencoderKL.from_pretrained(base, subfolder="vae", dtype=torch.float32)
    unet: Any = UNet2DConditionModel.from_pretrained(base, subfolder="unet", dtype=torch.float32)
    encoder: Any = CLIPTextModel.from_pretrained(base + "/text_encoder", dtype=torch.float32)
    tokenizer: Any = CLIPTokenizer.from_pretrained(base + "/tokenizer")
    schedule = json.loads((config.base_model / "scheduler" / "scheduler_config.json").read_text())
    predicts_v = schedule["prediction_type"] == "v_prediction"

    def signal(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_bar, alphas_bar = 1.0, []
    for t in range(1000):
        alpha_bar *= 1 - min(1 - signal((t + 1) / 1000) / signal(t / 1000), 0.999)
        alphas_bar.append(alpha_bar)

    def error(pixels: Tensor, caption: str, d: Draw) -> Tensor:
        with torch.no_grad():
            posterior = vae.encode(pixels[None]).latent_dist
        x = (posterior.mean + posterior.std * d.latent_noise) * vae.config.scaling_factor
        signal_share = math.sqrt(alphas_bar[d.timestep])
        noise_share = math.sqrt(1 - alphas_bar[d.timestep])
        noised = signal_share * x + noise_share * d.noise
        wanted = signal_share * d.noise - noise_share * x if predicts_v else d.noise[None]
        ids = tokenizer(
            caption,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        embeds = encoder(ids).last_hidden_state
        predicted = unet(noised, torch.tensor([d.timestep]), embeds).sample
        weight = 1.0
        if settings.snr_gamma is not None:
            snr = alphas_bar[d.timestep] / (1 - alphas_bar[d.timestep])
            weight = min(snr, settings.snr_gamma) / (snr + 1 if predicts_v else snr)
        return weight * ((predicted - wanted) ** 2).mean()

    def read(folder: Path | None) -> list[tuple[Tensor, str]]:
        if folder is None:
            return []
        with open(folder / "training.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        return [(as_pixels(folder / row["file_name"]), row["caption"]) for row in rows]

    def as_pixels(path: Path) -> Tensor:
        return torch.tensor(np.asarray(Image.open(path))).permute(2, 0, 1).div(127.5).sub(1)

    shape = (unet.config.in_channels, config.height // 8, config.width // 8)
    posters, prior = read(config.training_set), read(config.class_set)
    random = Stream(settings.seed, "posters", (shape,) * len(posters), timesteps=1000)
    prior_random = Stream(settings.seed, "class_images", (shape,) * len(prior), timesteps=1000)

    parameters = [*unet.parameters(), *encoder.parameters()]
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    b1, b2 = settings.adam_beta1, settings.adam_beta2
    losses = []
    for step in range(settings.max_train_steps):
        total: Any = 0.0
        for i in range(settings.train_batch_size):
            position = step * settings.train_batch_size + i
            d = random.draw(position)
            total = total + error(*posters[d.index], d) / settings.train_batch_size
            if prior:
                d = prior_random.draw(position)
                part = error(*prior[d.index], d) / settings.train_batch_size
                total = total + settings.prior_loss_weight * part
        losses.append(total.item())
        gradients = torch.autograd.grad(total, parameters)
        norm = math.sqrt(sum(g.double().pow(2).sum().item() for g in gradients))
        factor = min(1.0, settings.max_grad_norm / (norm + 1e-6))
        rate = settings.learning_rate * min(1.0, step / max(1, settings.lr_warmup_steps))
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                p.mul_(1 - rate * settings.adam_weight_decay)
                m.mul_(b1).add_(g * factor, alpha=1 - b1)
                v.mul_(b2).add_((g * factor) ** 2, alpha=1 - b2)
                m_hat, v_hat = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
                p.sub_(rate * m_hat / (v_hat.sqrt() + settings.adam_epsilon))
    return losses, [unet, encoder]


def assert_like_the_reference(config: RunConfig) -> None:
    wanted_losses, (unet, encoder) = reference_run(config)
    result = train(config)
    assert [r.loss for r in result.reports] == pytest.approx(wanted_losses, abs=1e-5)
    for got, model in (
        (unet_weights(config.output_dir), unet),
        (text_weights(config.output_dir), encoder),
    ):
        assert got.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert got[name].dtype == torch.float32
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5, msg=name)


def in_fp32(base: Path, folder: Path) -> Path:
    """A copy of a model whose files hold fp32, so that nothing is rounded at the end."""
    shutil.copytree(base, folder)
    for part in ("unet", "text_encoder", "vae"):
        for path in (folder / part).glob("*.safetensors"):
            state = {name: value.float() for name, value in load_file(path).items()}
            save_file(state, path, metadata={"format": "pt"})
    return folder


def test_on_the_starter_model_twenty_steps_are_those_of_a_plain_loop(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    root = default_root() / "data" / "models" / "starter" / "base"
    base = in_fp32(root, tmp_path / "starter")
    assert_like_the_reference(
        make_config(
            parts={"base_model": base},
            max_train_steps=20,
            learning_rate=1e-4,
            lr_warmup_steps=3,
            # Some gradients are zero but for rounding (a bias before a softmax, say). Adam makes
            # steps of full length of them, unless this is larger than the rounding.
            adam_epsilon=1e-5,
        )
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_losses_and_weights_are_those_of_a_plain_loop(
    make_config: MakeConfig, tmp_path: Path, other_set: Path, prediction_type: Any
) -> None:
    base = build_tiny_stable_diffusion(
        tmp_path / "base", prediction_type=prediction_type, precision="fp32"
    )
    assert_like_the_reference(
        make_config(
            parts={"base_model": base, "class_set": other_set},
            max_train_steps=8,
            learning_rate=1e-4,
            lr_warmup_steps=3,
            max_grad_norm=0.5,
            prior_preservation=True,
            prior_loss_weight=0.7,
            snr_gamma=5.0,
        )
    )


def test_warmup_is_applied_to_the_weights(make_config: MakeConfig, base_model: Path) -> None:
    still = make_config("still", max_train_steps=1, lr_warmup_steps=10)
    train(still)
    assert equal(unet_weights(still.output_dir), unet_weights(base_model))
    moved = make_config("moved", max_train_steps=1)
    train(moved)
    assert not equal(unet_weights(moved.output_dir), unet_weights(base_model))


def test_the_finished_directory_draws_and_tells_where_it_comes_from(
    make_config: MakeConfig, base_model: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    seen: list[StepReport] = []
    config = make_config(max_train_steps=7, log_every_steps=3, mixed_precision="bf16")
    result = train(config, seen.append)
    assert [r.step for r in seen] == [1, 3, 6, 7]
    assert tuple(seen) == result.reports
    assert all(r.total == 7 and r.steps_per_second > 0 and r.memory_gib > 0 for r in seen)

    pipeline: Any = StableDiffusionPipeline.from_pretrained(config.output_dir, dtype=torch.float32)
    image = pipeline("a red rocket", width=32, height=48, num_inference_steps=2).images[0]
    assert image.size == (32, 48)
    assert unet_weights(config.output_dir)["conv_in.weight"].dtype == torch.float16
    assert not equal(text_weights(config.output_dir), text_weights(base_model))
    assert not [p for p in config.output_dir.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    assert not [
        p for p in config.output_dir.rglob("*.json") if str(tmp_path.parent) in p.read_text()
    ]

    record = json.loads((config.output_dir / "posterpipe.json").read_text())
    assert record["checkpoint_id"] == result.checkpoint_id
    assert record["settings"]["learning_rate"] == 1e-3 and record["steps"] == 7
    rows = pyarrow.parquet.read_table(result.metrics).to_pylist()
    assert [row["step"] for row in rows] == [1, 3, 6, 7]
    assert all(row["loss"] > 0 and row["lr"] == 1e-3 for row in rows)
    assert all(row["text_encoder_lr"] == 1e-3 and row["grad_norm"] > 0 for row in rows)
    assert (config.output_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (config.work_dir / "saves").exists()


def test_a_frozen_text_encoder_stays_as_it_was(make_config: MakeConfig, base_model: Path) -> None:
    config = make_config(train_text_encoder=False, max_train_steps=2)
    train(config)
    assert equal(text_weights(config.output_dir), text_weights(base_model))
    assert not equal(unet_weights(config.output_dir), unet_weights(base_model))


def test_cached_embeddings_give_the_loss_of_the_encoder(make_config: MakeConfig) -> None:
    frozen = train(make_config("frozen", train_text_encoder=False, max_train_steps=1))
    trained = train(make_config("trained", max_train_steps=1))
    assert frozen.final_loss == pytest.approx(trained.final_loss, abs=1e-6)


def test_accumulation_gives_the_step_of_the_larger_batch(make_config: MakeConfig) -> None:
    large = make_config("large", train_batch_size=4, max_train_steps=3)
    small = make_config(
        "small", train_batch_size=1, gradient_accumulation_steps=4, max_train_steps=3
    )
    a, b = train(large), train(small)
    assert [r.loss for r in a.reports] == pytest.approx([r.loss for r in b.reports], abs=1e-5)


def test_gradient_checkpointing_changes_no_loss(make_config: MakeConfig) -> None:
    plain = train(make_config("plain", max_train_steps=3))
    saving = train(make_config("saving", max_train_steps=3, gradient_checkpointing=True))
    assert [r.loss for r in plain.reports] == pytest.approx([r.loss for r in saving.reports])


def test_eight_bit_adam_trains_on_cpu_and_resumes(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_config("whole", optimizer="adamw_8bit", max_train_steps=6, save_every_steps=2)
    train(whole)
    cut = make_config("cut", optimizer="adamw_8bit", max_train_steps=6, save_every_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(cut, interrupt_at(5))
    assert not cut.output_dir.exists()
    said: list[str] = []
    assert train(cut, log=said.append).resumed_from == 4
    assert any("goes on from step 4 of 6" in line for line in said)
    assert equal(unet_weights(whole.output_dir), unet_weights(cut.output_dir))


def test_a_run_with_all_that_can_be_combined_goes_on_to_the_same_bits(
    make_config: MakeConfig, other_set: Path, tmp_path: Path
) -> None:
    mixed = write_training_set(tmp_path / "mixed", sizes=[(32, 48), (48, 32), (32, 48), (48, 32)])
    held_out = write_training_set(tmp_path / "held out", seed=9, sizes=[(48, 32)])
    parts = {
        "training_set": mixed,
        "class_set": other_set,
        "holdout_set": held_out,
        "buckets": True,
    }
    settings = {
        "max_train_steps": 7,
        "save_every_steps": 2,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "prior_preservation": True,
        "text_encoder_stop_step": 3,
        "method": "lora",
        "lora_rank": 2,
        "ema_decay": 0.9,
        "caption_dropout": 0.3,
        "caption_shuffling": True,
        "snr_gamma": 5.0,
        "offset_noise": 0.1,
        "mixed_precision": "bf16",
        "optimizer": "adamw_8bit",
        "holdout_every_steps": 3,
        "early_stop_patience": 9,
    }
    whole = make_config("whole", parts=parts, **settings)
    cut = make_config("cut", parts=parts, **settings)
    uninterrupted = train(whole)
    for step in (3, 6):  # before and after the text encoder's last step
        with pytest.raises(KeyboardInterrupt):
            train(cut, interrupt_at(step))
    resumed = train(cut)
    assert resumed.resumed_from == 4
    assert losses(resumed) == losses(uninterrupted)
    assert [r.grad_norm for r in resumed.reports] == [r.grad_norm for r in uninterrupted.reports]
    assert resumed.holdout == uninterrupted.holdout and resumed.steps == uninterrupted.steps
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model", "pytorch_lora_weights"):
        files = [c.output_dir / f"{name}.safetensors" for c in (whole, cut)]
        assert equal(load_file(files[0]), load_file(files[1])), name


def test_the_scaler_of_fp16_and_losses_not_yet_told_are_saved_and_taken_up_again(
    make_config: MakeConfig,
) -> None:
    settings = {"mixed_precision": "fp16", "max_train_steps": 6, "save_every_steps": 2}
    settings |= {"log_every_steps": 5}
    whole, cut = make_config("whole", **settings), make_config("cut", **settings)
    uninterrupted = train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(cut, interrupt_at(5))
    state = json.loads((saves_of(cut)[-1] / "state.json").read_text())
    assert state["scaler"]["scale"] > 0 and state["scaler"]["_growth_tracker"] >= 0
    resumed = train(cut)
    assert resumed.resumed_from == 4 and losses(resumed) == losses(uninterrupted)
    assert [r.step for r in resumed.reports] == [1, 5, 6]  # the second is of steps 2 to 5
    assert equal(unet_weights(whole.output_dir), unet_weights(cut.output_dir))
    assert equal(text_weights(whole.output_dir), text_weights(cut.output_dir))


def test_a_finished_run_is_not_done_again(make_config: MakeConfig) -> None:
    config = make_config()
    config.output_dir.mkdir(parents=True)  # an empty folder, as some make one first
    first = train(config)
    seen: list[StepReport] = []
    again = train(config, seen.append)
    assert not seen and again == first
    with pytest.raises(TrainingError, match="holds the checkpoint"):
        train(make_config(seed=3))


def test_saves_that_a_finished_run_left_are_removed_when_it_is_asked_for_again(
    make_config: MakeConfig, other_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(parts={"holdout_set": other_set}, early_stop_patience=9)

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dies, pytest.raises(KeyboardInterrupt):
        dies.setattr("posterpipe.core.dreambooth.run.remove_saves", killed)
        train(config)
    other = config.work_dir / "saves" / "another-run"
    other.mkdir()
    left = {path.parent.name for path in config.work_dir.glob("*/*/step-*")}
    assert left == {train(config).checkpoint_id}
    assert list(config.work_dir.glob("*/*/step-*")) == []
    assert not (config.work_dir / "lowest").exists() and other.exists()


def test_a_loss_that_is_no_number_names_the_last_good_save(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(max_train_steps=6, save_every_steps=2, log_every_steps=10)
    monkeypatch.setattr(objective, "squared_errors", no_number_at(3))
    with pytest.raises(
        TrainingDiverged, match=r"no number at step 3; .*step-00000002.*learning_rate"
    ):
        train(config)
    assert not config.output_dir.exists()
    assert [p.name for p in saves_of(config)] == ["step-00000002"]


def test_no_model_is_shown_or_kept_whose_loss_is_no_number(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reports and saves look at the loss themselves; models from the middle come between them."""
    rare: dict[str, Any] = {"log_every_steps": 100, "save_every_steps": 100, "max_train_steps": 9}
    config = make_config(**rare, export_every_steps=2, sample_every_steps=5)
    monkeypatch.setattr(objective, "squared_errors", no_number_at(3))
    with pytest.raises(TrainingDiverged, match="no number at step 3"):
        train(config)
    kept = sorted(path.name for path in config.work_dir.glob("exports/*/*"))
    assert kept == ["step-00000002"]


def test_a_run_that_works_within_its_training_set_goes_on_and_ends(
    make_config: MakeConfig, training_set: Path, tmp_path: Path
) -> None:
    """What a run writes there is no part of the set, which names it."""
    folder = Path(shutil.copytree(training_set, tmp_path / "set"))
    places = {"training_set": folder, "work_dir": folder / "work", "output_dir": folder / "model"}
    config = make_config(parts={**places, "versions": None}, max_train_steps=5, save_every_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt_at(5))
    result = train(config)
    assert result.resumed_from == 4 and result.steps == 5
    assert train(config).checkpoint_id == result.checkpoint_id


@pytest.mark.parametrize("method", ["full", "lora"])
def test_from_a_base_in_half_precision_alone_comes_a_model_that_anyone_can_load(
    make_config: MakeConfig, base_model: Path, tmp_path: Path, method: str
) -> None:
    plain = StableDiffusionPipeline.from_pretrained(base_model, dtype=torch.float16)
    half = tmp_path / "half"
    plain.save_pretrained(half, variant="fp16", safe_serialization=True)
    config = make_config(
        parts={"base_model": half},
        method=method,
        max_train_steps=2,
        export_every_steps=1,
        train_text_encoder=False,
    )
    train(config)
    StableDiffusionPipeline.from_pretrained(config.output_dir, dtype=torch.float32)
    Sampler(config.output_dir, SamplerSettings(width=32, height=48), model_id="m")
    if method == "full":
        exports = list((config.output_dir / "exports").iterdir())
        StableDiffusionPipeline.from_pretrained(exports[0], dtype=torch.float32)


def test_a_run_with_other_settings_leaves_the_saves_of_the_first_which_goes_on(
    make_config: MakeConfig,
) -> None:
    first = make_config(max_train_steps=6, save_every_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(first, interrupt_at(5))
    kept = saves_of(first)
    other = make_config(max_train_steps=6, save_every_steps=2, seed=3)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(other, interrupt_at(5), log=said.append)
    (line,) = [line for line in said if "saves of other runs" in line]
    assert kept[0].parent.name in line and str(other.work_dir / "saves") in line
    assert set(kept) < set(saves_of(first))
    assert train(first).resumed_from == 4
    assert set(saves_of(first)).isdisjoint(kept)
    done = first.output_dir.rename(first.output_dir.with_name("first"))
    assert train(other).resumed_from == 4
    assert not (first.work_dir / "saves").exists()
    whole = make_config("whole", max_train_steps=6)
    train(whole)
    assert equal(unet_weights(done), unet_weights(whole.output_dir))


def test_samples_of_another_run_in_the_same_folder_are_not_shown(make_config: MakeConfig) -> None:
    settings: dict[str, Any] = {"sample_every_steps": 2, "sample_prompts": ("a cat", "a car")}
    with pytest.raises(KeyboardInterrupt):
        train(make_config(**settings, seed=3), interrupt_at(3))
    with pytest.raises(KeyboardInterrupt):  # the same run, with other samples and no save
        train(make_config(**settings), interrupt_at(3))
    config = make_config(sample_every_steps=3, sample_prompts=("a cat",), max_train_steps=4)
    train(config)
    names = sorted(path.name for path in (config.output_dir / "samples").glob("*.png"))
    assert names == [f"step-{step:08d}-0.png" for step in (0, 3, 4)]


def test_a_run_that_goes_on_shows_no_samples_of_other_prompts_noise_or_sampling(
    make_config: MakeConfig,
) -> None:
    settings: dict[str, Any] = {"save_every_steps": 1, "sample_every_steps": 1}
    a_cat = settings | {"sample_prompts": ("a cat",), "sample_seed": 3}
    quick = {"parts": {"sampler": SamplerSettings(num_inference_steps=1)}}
    said: list[str] = []
    shown: list[list[int]] = []

    def go_on_to(step: int, **changed: Any) -> None:
        config = make_config(**changed, max_train_steps=5)
        with pytest.raises(KeyboardInterrupt):
            train(config, interrupt_at(step), log=said.append)
        (folder,) = config.work_dir.glob("samples/*")
        shown.append(sorted({int(path.name.split("-")[1]) for path in folder.glob("*.png")}))

    go_on_to(2, **settings, sample_prompts=("a cat",))
    go_on_to(3, **settings, sample_prompts=("a cat",))
    assert shown[-1] == [0, 1, 2, 3] and not any("samples" in line for line in said)
    go_on_to(3, **settings, sample_prompts=("a car",))
    go_on_to(4, **a_cat)
    go_on_to(5, **a_cat, **quick)
    assert shown[2:] == [[3], [3, 4], [4, 5]]
    assert len([line for line in said if "samples" in line and "removed" in line]) == 3


def test_what_is_missing_is_named_in_one_sentence(
    make_config: MakeConfig, base_model: Path, training_set: Path, tmp_path: Path
) -> None:
    with pytest.raises(BaseModelError, match=r"nowhere: there is no such directory"):
        train(make_config(parts={"base_model": tmp_path / "nowhere"}))
    with pytest.raises(BaseModelError, match=r"no model_index\.json"):
        train(make_config(parts={"base_model": training_set}))
    with pytest.raises(TrainingSetError, match=r"training\.csv: cannot be read"):
        train(make_config(parts={"training_set": base_model}))

    damaged = Path(shutil.copytree(base_model, tmp_path / "damaged"))
    weights = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BaseModelError, match=r"damaged.unet: cannot be loaded"):
        train(make_config(parts={"base_model": damaged}))

    unreadable = Path(shutil.copytree(training_set, tmp_path / "unreadable"))
    (unreadable / "0002.png").write_bytes(b"no picture")
    with pytest.raises(TrainingSetError, match=r"0002\.png: not a readable image"):
        train(make_config(parts={"training_set": unreadable}))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"output_dir": "file/out"}, "file/out: the finished model could not be written (File ex"),
        ({"output_dir": "o" * 250}, "o: the finished model could not be written (File name too lo"),
        ({"output_dir": "link"}, "link: it holds something that is no checkpoint of posterpipe"),
        ({"output_dir": "file"}, "file: it holds something that is no checkpoint of posterpipe"),
        ({"work_dir": "file"}, "file: the lock of runs in progress could not be written (File ex"),
        ({"work_dir": "file/in/it"}, "in/it: the lock of runs in progress could not be written"),
        ({"cache_dir": "file"}, "file: latents and text embeddings could not be written (File ex"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_before_the_first_step(
    make_config: MakeConfig, tmp_path: Path, parts: dict[str, str], words: str
) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    seen: list[StepReport] = []
    with pytest.raises(TrainingError) as caught:
        train(make_config(parts={name: tmp_path / at for name, at in parts.items()}), seen.append)
    assert words in str(caught.value) and not seen
    assert not [path for path in tmp_path.rglob(".*")]


def test_of_two_runs_with_one_output_the_later_one_takes_the_result_or_says_whose_it_is(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    first = train(make_config("first"))
    out = {"output_dir": tmp_path / "out"}

    def is_overtaken(report: StepReport) -> None:
        if report.step == report.total:
            shutil.copytree(first.output_dir, tmp_path / "out")

    same = train(make_config("same", parts=out), is_overtaken)
    assert same.reports == first.reports and same.output_dir == tmp_path / "out"

    shutil.rmtree(tmp_path / "out")
    other = make_config("other", parts=out, seed=3)
    with pytest.raises(
        TrainingError, match=rf"out: it holds the checkpoint {first.checkpoint_id}, and this run m"
    ):
        train(other, is_overtaken)
    shutil.rmtree(tmp_path / "out")
    assert train(other).resumed_from == 4
    assert not [path for path in tmp_path.glob(".*")]


def test_what_a_killed_process_left_of_a_model_is_removed_and_nothing_of_another_one(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(parts={"output_dir": tmp_path / "out"})
    left, of_another = tmp_path / ".out.123.tmp", tmp_path / ".out.b.123.tmp"
    left.mkdir()
    of_another.mkdir()
    with only_writer_of(config.output_dir, print):
        try_output(config)
    assert not config.output_dir.exists()
    assert [path.name for path in tmp_path.glob(".*")] == [of_another.name]


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_models_of_other_kinds_are_told_before_they_are_loaded(
    make_config: MakeConfig, base_model: Path, tmp_path: Path
) -> None:
    larger = Path(shutil.copytree(base_model, tmp_path / "larger"))
    changed(larger / "unet" / "config.json", addition_embed_type="text_time")
    with pytest.raises(BaseModelError, match="larger: it is a Stable Diffusion XL"):
        train(make_config(parts={"base_model": larger}))
    two_texts = Path(shutil.copytree(base_model, tmp_path / "two_texts"))
    (two_texts / "text_encoder_2").mkdir()
    with pytest.raises(BaseModelError, match="two_texts: it is a Stable Diffusion XL"):
        train(make_config(parts={"base_model": two_texts}))
    inpainting = Path(shutil.copytree(base_model, tmp_path / "inpainting"))
    changed(inpainting / "unet" / "config.json", in_channels=25)
    with pytest.raises(BaseModelError, match="U-Net reads 25 channels and its VAE makes 12"):
        train(make_config(parts={"base_model": inpainting}))
    unclip = Path(shutil.copytree(base_model, tmp_path / "unclip"))
    changed(unclip / "unet" / "config.json", class_embed_type="projection")
    with pytest.raises(BaseModelError, match=r"told more .* class_embed_type is projection"):
        train(make_config(parts={"base_model": unclip}))
    flow = Path(shutil.copytree(base_model, tmp_path / "flow"))
    (flow / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}'
    )
    with pytest.raises(BaseModelError, match=r"its scheduler, FlowMatch.*another rule"):
        train(make_config(parts={"base_model": flow}))


def test_a_base_model_whose_files_were_damaged_is_told_before_the_first_step(
    make_config: MakeConfig, base_model: Path, tmp_path: Path
) -> None:
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        broken = Path(shutil.copytree(base_model, tmp_path / name.replace("/", "-")))
        (broken / name).write_text("{")
        with pytest.raises(BaseModelError, match=rf"{name}: not JSON .* get the model again"):
            train(make_config(parts={"base_model": broken}))
        (broken / name).write_text("[]")
        with pytest.raises(BaseModelError, match=rf"{name}: no JSON object"):
            train(make_config(parts={"base_model": broken}))
        (broken / name).unlink()
        with pytest.raises(BaseModelError, match=re.escape(name)):
            train(make_config(parts={"base_model": broken}))


@pytest.mark.slow
def test_a_model_that_cannot_be_compiled_names_the_setting(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config, cpp_builder

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    cpp_builder.cpp_compiler_search.cache_clear()  # the compiler that another test found
    try:
        with (
            config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}),
            pytest.raises(TrainingError, match=r"training\.compile: the models cannot be compiled"),
        ):
            train(make_config(compile=True, train_text_encoder=False, max_train_steps=1))
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()
        torch._dynamo.reset()


def test_asked_to_stop_while_the_models_are_compiled_a_run_names_its_last_save(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Learner.add_gradients

    def interrupted(learner: Learner, step: int, batches: Any) -> Tensor:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            raise TrainingError("training.compile: the models cannot be compiled")
        return real(learner, step, batches)

    monkeypatch.setattr(Learner, "add_gradients", interrupted)
    with pytest.raises(TrainingStopped, match=r"for step 4: the last good save is \S*00000002;"):
        train(make_config(save_every_steps=2))


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


def test_pickled_weights_are_never_read(
    make_config: MakeConfig, base_model: Path, tmp_path: Path
) -> None:
    planted = Path(shutil.copytree(base_model, tmp_path / "planted"))
    (planted / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    proof = tmp_path / "executed"
    torch.save(Malicious(proof), planted / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(BaseModelError, match="safetensors"):
        train(make_config(parts={"base_model": planted}))
    assert not proof.exists()


def test_pickles_planted_among_saves_and_cached_tensors_are_never_read(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(max_train_steps=4, save_every_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt_at(3))
    proof = tmp_path / "executed"
    pickled = tmp_path / "pickle"
    torch.save(Malicious(proof), pickled)
    (save,) = saves_of(config)
    shutil.copyfile(pickled, save / "optimizer.pt")
    for path in [save / "unet.safetensors", *(config.work_dir / "cache").iterdir()]:
        shutil.copyfile(pickled, path)
    said: list[str] = []
    result = train(config, log=said.append)
    assert result.resumed_from == 0 and result.steps == 4
    assert any("unet.safetensors is not as it was written" in line for line in said)
    assert any("damaged" in line for line in said)
    assert not proof.exists()


def out_of_memory_above(
    batch: int, monkeypatch: pytest.MonkeyPatch, real: Any = objective.squared_errors
) -> None:
    """Lets memory run out for batches larger than `batch`."""

    def squared_errors(prediction: Tensor, wanted: Tensor) -> Tensor:
        if len(prediction) > batch:
            raise torch.OutOfMemoryError("out of memory")
        return real(prediction, wanted)

    monkeypatch.setattr(objective, "squared_errors", squared_errors)


def test_out_of_memory_names_settings_that_need_less(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(TrainingError) as caught:
        train(make_config())
    assert "train_batch_size = 1 with gradient_accumulation_steps = 2" in str(caught.value)
    assert "gradient_checkpointing" in str(caught.value)


def test_where_allowed_the_batch_is_halved_and_the_losses_stay(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"train_batch_size": 6, "max_train_steps": 3}
    whole = train(make_config("whole", **settings))
    out_of_memory_above(1, monkeypatch)
    said: list[str] = []
    config = make_config("halved", halve_batch_on_out_of_memory=True, **settings)
    halved = train(config, log=said.append)
    tried = [line for line in said if "out of memory" in line]
    assert len(tried) == 2
    assert "3 images at once, accumulated 2 times" in tried[0]
    assert "1 images at once, accumulated 6 times" in tried[1]
    assert losses(halved) == pytest.approx(losses(whole), abs=1e-5)


def test_held_out_posters_and_samples_that_do_not_fit_at_once_are_divided(
    make_config: MakeConfig, other_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"train_batch_size": 1, "max_train_steps": 1}
    settings |= {"holdout_every_steps": 1, "sample_every_steps": 1, "sample_prompts": ("a cat",)}
    parts = {"holdout_set": other_set}
    whole = train(make_config("whole", parts=parts, **settings))
    out_of_memory_above(2, monkeypatch)
    real = Learner.predict

    def predict(learner: Learner, latents: Tensor, timestep: Tensor, texts: Any) -> Tensor:
        if len(latents) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return real(learner, latents, timestep, texts)

    monkeypatch.setattr(Learner, "predict", predict)
    said: list[str] = []
    divided = train(make_config("divided", parts=parts, **settings), log=said.append)
    tried = [line for line in said if "out of memory" in line]
    assert [line.split("with ")[1] for line in tried] == [
        "4 held-out posters at once",
        "2 held-out posters at once",
        "1 samples at once",
    ]
    assert [m.loss for m in divided.holdout] == pytest.approx([m.loss for m in whole.holdout])
    for name in ("step-00000000-0.png", "step-00000001-0.png"):
        one, other = (
            np.asarray(Image.open(run.output_dir / "samples" / name), int)
            for run in (whole, divided)
        )
        assert abs(one - other).max() <= 1


def test_samples_that_do_not_fit_into_memory_are_left_out_and_training_goes_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"sample_every_steps": 1, "sample_prompts": ("a cat", "a car")}
    settings |= {"max_train_steps": 2, "ema_decay": 0.9}
    plain = train(make_config("plain", **settings))
    real, decoded = AutoencoderKL.decode, 0

    def decode(*arguments: Any, **keywords: Any) -> Any:
        nonlocal decoded
        decoded += 1
        if decoded == 4:  # the second image of step 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments, **keywords)

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    said: list[str] = []
    config = make_config("short", **settings)
    result = train(config, log=said.append)
    assert [line for line in said if "memory" in line] == [
        "the samples of step 1 are left out: out of memory"
    ]
    assert losses(result) == losses(plain)
    assert equal(unet_weights(config.output_dir), unet_weights(plain.output_dir))
    drawn = sorted(path.name for path in (config.output_dir / "samples").glob("*.png"))
    assert drawn == [f"step-{step:08d}-{n}.png" for step in (0, 2) for n in (0, 1)]

    def never(*arguments: Any, **keywords: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoencoderKL, "decode", never)
    train(make_config("none", **settings))


def test_a_look_at_the_models_that_fails_leaves_them_in_training(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[bool] = []

    def look(learner: Learner, *arguments: Any) -> Tensor:
        with pytest.raises(MemoryError), learner.as_finished():
            raise MemoryError
        modes.extend(model.training for model in learner.models.values())
        return real(learner, *arguments)

    real = Learner.add_gradients
    monkeypatch.setattr(Learner, "add_gradients", look)
    train(make_config(max_train_steps=1))
    assert modes == [True, True]


def test_a_batch_of_one_that_does_not_fit_is_an_error(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(TrainingError, match="out of memory"):
        train(make_config(halve_batch_on_out_of_memory=True))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_short_precision_neither_overflows_nor_draws_black(
    make_config: MakeConfig, precision: str
) -> None:
    base = default_root() / "data" / "models" / "starter" / "base"
    config = make_config(
        parts={"base_model": base},
        mixed_precision=precision,
        max_train_steps=6,
        learning_rate=2e-4,
        sample_every_steps=6,
        sample_prompts=("a minimalist film poster of a red rocket",),
    )
    result = train(config)
    assert all(math.isfinite(loss) for loss in losses(result))
    for weights in (unet_weights(config.output_dir), text_weights(config.output_dir)):
        assert all(torch.isfinite(value).all() for value in weights.values())
    assert not equal(unet_weights(config.output_dir), unet_weights(base))
    for step in (0, 6):
        with Image.open(config.output_dir / "samples" / f"step-{step:08d}-0.png") as image:
            assert blocked_reason(image) == ""


def too_large(prediction: Tensor, wanted: Tensor) -> Tensor:
    """Errors whose gradient, times the scaler's first scales, is more than fp16 holds; they
    themselves are not."""
    return 1e3 * (prediction.float() - wanted).pow(2).mean(dim=(1, 2, 3))


def test_an_overflow_under_fp16_leaves_the_step_out_and_training_goes_on(
    make_config: MakeConfig, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "squared_errors", too_large)
    still = make_config("still", mixed_precision="fp16", max_train_steps=3)
    result = train(still)
    assert [r.grad_norm for r in result.reports] == [None] * 3
    assert all(math.isfinite(loss) for loss in losses(result))
    assert equal(unet_weights(still.output_dir), unet_weights(base_model))
    assert equal(text_weights(still.output_dir), text_weights(base_model))
    assert pyarrow.parquet.read_table(result.metrics)["grad_norm"].to_pylist() == [None] * 3

    # Each time the scaler halves its factor; then steps are made again, also after a resume.
    settings: dict[str, Any] = {"mixed_precision": "fp16", "max_train_steps": 9}
    config = make_config("goes on", **settings, save_every_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt_at(5))
    for path in saves_of(config)[-1].glob("*.json"):
        strictly_read(path)
    result = train(config)
    assert result.resumed_from == 4
    norms = [r.grad_norm for r in result.reports]
    assert norms[:4] == [None] * 4 and any(norm is not None for norm in norms[5:])
    assert not equal(unet_weights(config.output_dir), unet_weights(base_model))
    record = strictly_read(config.output_dir / "posterpipe.json")
    assert [row["grad_norm"] for row in record["reports"]] == norms
    assert train(config).reports == result.reports


def strictly_read(path: Path) -> Any:
    """JSON as its standard has it, which knows neither NaN nor Infinity."""

    def refuse(constant: str) -> None:
        pytest.fail(f"{path.name} holds {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_limit_without_end_among_the_settings_is_null_in_the_record(
    make_config: MakeConfig,
) -> None:
    config = make_config(max_train_steps=1, max_grad_norm=math.inf)
    train(config)
    record = strictly_read(config.output_dir / "posterpipe.json")
    assert record["settings"]["max_grad_norm"] is None


def test_steps_that_fp16_leaves_out_are_counted_over_a_resume_and_told(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "squared_errors", too_large)
    settings = {"mixed_precision": "fp16", "max_train_steps": 12, "save_every_steps": 2}
    whole = train(make_config("whole", **settings))
    assert all(math.isfinite(loss) for loss in losses(whole))
    counted = [report.skipped_steps for report in whole.reports]
    assert counted[:2] == [1, 2] and 2 < counted[-1] < 12
    card = (whole.output_dir / "README.md").read_text()
    assert f"Of 12 steps, {counted[-1]} changed nothing: their gradients overflowed" in card
    assert f", {counted[-1]} steps left out" in str(whole.reports[-1])
    rows = pyarrow.parquet.read_table(whole.metrics).to_pylist()
    assert [row["skipped_steps"] for row in rows] == counted

    cut = make_config("cut", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(cut, interrupt_at(5))
    resumed = train(cut)
    assert resumed.resumed_from == 4
    assert [report.skipped_steps for report in resumed.reports] == counted


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient is no number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float("nan")


def test_fp16_whose_gradients_always_overflow_ends_the_run_and_names_a_precision(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = objective.squared_errors
    monkeypatch.setattr(
        objective,
        "squared_errors",
        lambda prediction, wanted: real(NoGradient.apply(prediction.float()), wanted),
    )
    config = make_config(
        mixed_precision="fp16",
        max_train_steps=100,
        log_every_steps=10,
        save_every_steps=8,
        train_text_encoder=False,
    )
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt_at(10))
    # 65,536, halved at every step, is less than 1 after 17; the next report is that of step 20.
    # It goes on from step 8, and counts those before.
    with pytest.raises(
        TrainingDiverged,
        match=r"fp16 overflows: 20 of the first 20 steps .* 20 in a row.*mixed_precision, now fp16",
    ):
        train(config)
    assert not config.output_dir.exists()


def test_fp16_leaves_out_a_step_whose_loss_overflows_and_goes_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        mixed_precision="fp16", max_train_steps=4, log_every_steps=1, train_text_encoder=False
    )
    real = objective.squared_errors
    calls = 0

    def overflowing(prediction: Tensor, wanted: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return real(prediction, wanted) * (math.inf if calls == 3 else 1.0)

    monkeypatch.setattr(objective, "squared_errors", overflowing)
    result = train(config)
    # Gradients are clipped, and told, as they are without the scaler's factor.
    plain = train(make_config("fp32", max_train_steps=1, train_text_encoder=False))
    assert result.reports[0].grad_norm == pytest.approx(plain.reports[0].grad_norm, rel=0.05)
    assert [report.loss is None for report in result.reports] == [False, False, True, False]
    assert [report.grad_norm is None for report in result.reports] == [False, False, True, False]
    assert [report.skipped_steps for report in result.reports] == [0, 0, 1, 1]
    assert result.reports[2].smoothed_loss == result.reports[1].smoothed_loss
    assert "loss no number" in str(result.reports[2])
    table = pyarrow.parquet.read_table(result.metrics).to_pylist()
    assert [row["loss"] is None for row in table] == [False, False, True, False]
    assert math.isfinite(result.final_loss)


def test_the_moving_average_is_that_of_the_weights_after_each_step(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    base = build_tiny_stable_diffusion(tmp_path / "base", precision="fp32")
    after = [unet_weights(base)]
    for steps in (1, 2, 3):
        config = make_config(f"{steps}", parts={"base_model": base}, max_train_steps=steps)
        train(config)
        after.append(unet_weights(config.output_dir))
    averaged = make_config("ema", parts={"base_model": base}, max_train_steps=3, ema_decay=0.24)
    train(averaged)
    name = "conv_in.weight"
    wanted = after[0][name]
    for number, weights in enumerate(after[1:]):
        kept = min(0.24, (1 + number) / (10 + number))  # less in the first two steps
        wanted = kept * wanted + (1 - kept) * weights[name]
    # A weight moves by 1e-3 in a step.
    torch.testing.assert_close(unet_weights(averaged.output_dir)[name], wanted, rtol=0, atol=1e-6)


def test_the_text_encoder_stops_where_it_should(make_config: MakeConfig) -> None:
    stopped = make_config("stopped", max_train_steps=4, text_encoder_stop_step=2)
    short = make_config("short", max_train_steps=2)
    result = train(stopped)
    train(short)
    assert equal(text_weights(stopped.output_dir), text_weights(short.output_dir))
    assert not equal(unet_weights(stopped.output_dir), unet_weights(short.output_dir))
    assert [r.text_encoder_lr for r in result.reports] == [1e-3, 1e-3, None, None]


def test_the_text_encoder_has_a_rate_of_its_own(make_config: MakeConfig, tmp_path: Path) -> None:
    base = build_tiny_stable_diffusion(tmp_path / "base", precision="fp32")
    parts = {"base_model": base}
    config = make_config(parts=parts, text_encoder_learning_rate=1e-6, max_train_steps=2)
    result = train(config)
    assert result.reports[-1].text_encoder_lr == 1e-6 and result.reports[-1].lr == 1e-3

    def way(after: dict[str, Tensor], before: dict[str, Tensor]) -> float:
        return max((after[name] - value).abs().max().item() for name, value in before.items())

    # Each of Adam's first steps is as long as the rate.
    assert way(text_weights(config.output_dir), text_weights(base)) == pytest.approx(2e-6, rel=0.1)
    assert way(unet_weights(config.output_dir), unet_weights(base)) == pytest.approx(2e-3, rel=0.1)


def test_zero_terminal_snr_goes_into_the_finished_schedule(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(zero_terminal_snr=True, max_train_steps=1)
    train(config)
    path = config.output_dir / "scheduler" / "scheduler_config.json"
    schedule = json.loads(path.read_text())
    assert schedule["rescale_betas_zero_snr"] is True
    assert schedule["timestep_spacing"] == "trailing"

    # A scheduler that cannot end in pure noise gives way to one that can.
    pndm = Path(shutil.copytree(config.base_model, tmp_path / "pndm"))
    changed(pndm / "scheduler" / "scheduler_config.json", _class_name="PNDMScheduler")
    changed(pndm / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])
    config = make_config(
        "pndm", parts={"base_model": pndm}, zero_terminal_snr=True, max_train_steps=1
    )
    train(config)
    pipeline = StableDiffusionPipeline.from_pretrained(config.output_dir, dtype=torch.float32)
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
    assert not pipeline.scheduler.config.clip_sample

    epsilon = build_tiny_stable_diffusion(tmp_path / "base", prediction_type="epsilon")
    with pytest.raises(BaseModelError, match="zero_terminal_snr needs a model that predicts v"):
        train(make_config("epsilon", parts={"base_model": epsilon}, zero_terminal_snr=True))


@pytest.mark.parametrize("buckets", [False, True], ids=["one size", "several sizes"])
def test_the_held_out_loss_is_measured_at_fixed_questions(
    make_config: MakeConfig, other_set: Path, tmp_path: Path, buckets: bool
) -> None:
    settings: dict[str, Any] = {"max_train_steps": 4, "holdout_every_steps": 3}
    settings |= {"log_every_steps": 10}
    parts: dict[str, Any] = {"holdout_set": other_set}
    if buckets:
        sizes = [(32, 48), (48, 32), (32, 48), (48, 48), (48, 32)]
        mixed = write_training_set(tmp_path / "mixed", seed=6, sizes=sizes)
        parts = {"holdout_set": mixed, "buckets": True}
    result = train(make_config("one", parts=parts, **settings))
    # Before the first step, when it is due, and of the weights that are left in the end.
    assert [measured.step for measured in result.holdout] == [0, 3, 4]
    again = train(make_config("other", parts=parts, **settings, seed=3, train_batch_size=1))
    # Before anything is learnt, the seed and the batch make no difference.
    assert again.holdout[0].loss == pytest.approx(result.holdout[0].loss, abs=1e-6)
    assert again.holdout[1].loss != result.holdout[1].loss
    rows = pyarrow.parquet.read_table(result.metrics).to_pylist()
    measured = {row["step"]: row["holdout_loss"] for row in rows}
    assert measured[0] == result.holdout[0].loss and measured[1] is None
    assert [r.holdout_loss for r in result.reports] == [m.loss for m in result.holdout]


def test_a_run_that_goes_on_with_other_questions_drops_what_was_measured_before(
    make_config: MakeConfig, other_set: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"save_every_steps": 1, "holdout_every_steps": 1}
    more = write_training_set(tmp_path / "more", seed=9)
    first = make_config(parts={"holdout_set": other_set}, **settings)
    shorter = make_config(parts={"holdout_set": other_set}, **settings, holdout_timesteps=2)
    others = make_config(parts={"holdout_set": more}, **settings, holdout_timesteps=2)
    said: list[str] = []
    for config, stops_at in ((first, 2), (shorter, 3), (others, 4)):
        with pytest.raises(KeyboardInterrupt):
            train(config, interrupt_at(stops_at), log=said.append)
    dropped = [line for line in said if "held-out" in line]
    assert len(dropped) == 2 and all("measured before" in line for line in dropped)
    result = train(others, log=said.append)
    assert result.resumed_from == 3
    assert [line for line in said if "held-out" in line] == dropped
    assert [measured.step for measured in result.holdout] == [3, 4]
    assert [report.holdout_loss for report in result.reports[:2]] == [None] * 2
    assert losses(result) == losses(train(make_config("whole")))


def test_watching_changes_no_weight(make_config: MakeConfig, other_set: Path) -> None:
    plain = make_config("plain", max_train_steps=4)
    watched = make_config(
        "watched",
        parts={"holdout_set": other_set},
        max_train_steps=4,
        holdout_every_steps=1,
        sample_every_steps=2,
    )
    train(plain)
    train(watched)
    assert equal(unet_weights(plain.output_dir), unet_weights(watched.output_dir))
    assert equal(text_weights(plain.output_dir), text_weights(watched.output_dir))


def test_a_run_ends_early_with_the_weights_of_the_lowest_held_out_loss(
    make_config: MakeConfig, other_set: Path
) -> None:
    settings = {"learning_rate": 0.05, "holdout_every_steps": 1}  # so high that it gets worse
    parts = {"holdout_set": other_set}
    config = make_config(
        "early", parts=parts, max_train_steps=50, early_stop_patience=3, **settings
    )
    result = train(config)
    measured = [m.loss for m in result.holdout]
    best = measured.index(min(measured))
    assert result.ended_by == "early_stop"
    assert len(measured) == best + 4 < 50
    assert result.steps == best
    if best:
        same = make_config("same", parts=parts, max_train_steps=best, **settings)
        train(same)
        assert equal(unet_weights(config.output_dir), unet_weights(same.output_dir))
    else:
        assert equal(unet_weights(config.output_dir), unet_weights(config.base_model))


def measures(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Lets the held-out loss be as planned, one measurement after the other."""
    planned = iter(losses)
    monkeypatch.setattr(
        "posterpipe.core.dreambooth.run.holdout_loss",
        lambda *_, **__: torch.tensor(next(planned), dtype=torch.float64),
    )


def test_too_small_a_gain_ends_a_run_and_does_not_cost_it_what_was_gained(
    make_config: MakeConfig, other_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measures(monkeypatch, 0.200, 0.198, 0.196, 0.194, 0.192)
    config = make_config(
        parts={"holdout_set": other_set},
        max_train_steps=50,
        holdout_every_steps=1,
        early_stop_patience=4,
        early_stop_min_gain=0.05,
    )
    result = train(config)
    assert (result.ended_by, result.steps) == ("early_stop", 4)
    assert not equal(unet_weights(config.output_dir), unet_weights(config.base_model))


def watched(make_config: MakeConfig, holdout_set: Path, *, steps: int) -> RunConfig:
    """A run that measures the held-out loss each step and does not end early."""
    return make_config(
        parts={"holdout_set": holdout_set},
        max_train_steps=steps,
        holdout_every_steps=1,
        save_every_steps=2,
        early_stop_patience=50,
    )


def assert_weights_of_step(step: int, config: RunConfig, make_config: MakeConfig) -> None:
    same = make_config("same", max_train_steps=step)
    train(same)
    assert equal(unet_weights(config.output_dir), unet_weights(same.output_dir))


@pytest.mark.parametrize("damaged", [False, True], ids=["killed", "and its newest save damaged"])
def test_weights_of_steps_that_a_killed_run_made_again_are_not_taken(
    make_config: MakeConfig, other_set: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    # On a GPU the steps made again are not those of before, and the loss need not get as low.
    config = watched(make_config, other_set, steps=8)
    measures(monkeypatch, 0.5, 0.4, 0.45, 0.3, 0.45, 0.1, 0.2)
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt_at(5))
    # Those that the saves of steps 2 and 4 ask for.
    assert [path.name[-1] for path in sorted(config.work_dir.glob("lowest/*/*"))] == list("13")
    if damaged:
        (saves_of(config)[-1] / "unet.safetensors").unlink()
    measures(monkeypatch, *[0.6] * 8)
    result = train(config)
    assert (result.resumed_from, result.steps) == ((2, 1) if damaged else (4, 3))
    assert_weights_of_step(result.steps, config, make_config)


@pytest.mark.parametrize(
    ("damaged", "at_the_end", "taken"),
    [({5}, 0.45, 1), ({1, 5}, 0.45, 6), ({5}, 0.35, 6)],
    ids=["the next lowest", "none is left", "those of the last step are better"],
)
def test_where_the_best_weights_are_lost_the_next_ones_are_taken_and_the_card_says_so(
    make_config: MakeConfig,
    other_set: Path,
    monkeypatch: pytest.MonkeyPatch,
    damaged: set[int],
    at_the_end: float,
    taken: int,
) -> None:
    config = watched(make_config, other_set, steps=6)
    measures(monkeypatch, 0.5, 0.4, 0.45, 0.45, 0.45, 0.3, at_the_end)

    finish = Learner.finish

    def damage(learner: Learner) -> None:
        for step in damaged:
            (save,) = config.work_dir.glob(f"lowest/*/step-0000000{step}")
            (save / "unet.safetensors").unlink()
        finish(learner)

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "finish", damage)
        result = train(config, log=said.append)
    assert result.steps == taken
    assert_weights_of_step(taken, config, make_config)
    assert strictly_read(config.output_dir / "posterpipe.json")["lost_lowest_step"] == 5
    card = (config.output_dir / "README.md").read_text()
    assert "lowest at step 5, but the weights of that step were lost" in card
    assert f"these are those of step {taken} of 6" in card
    assert any(f"are lost; the finished model has those of step {taken}" in line for line in said)


def test_a_held_out_loss_that_is_no_number_counts_nowhere(
    make_config: MakeConfig, other_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, real = 0, Learner.errors_of

    def overflows_at_first(learner: Learner, batch: Batch) -> Tensor:
        nonlocal measured
        measured += 1
        return real(learner, batch) * (math.nan if measured <= questions else 1.0)

    monkeypatch.setattr(Learner, "errors_of", overflows_at_first)
    questions = 3  # 5 posters at 4 timesteps in batches of 8
    config = make_config(
        parts={"holdout_set": other_set},
        max_train_steps=4,
        holdout_every_steps=1,
        early_stop_patience=3,
        learning_rate=1e-5,
    )
    said: list[str] = []
    result = train(config, log=said.append)
    assert [line for line in said if "no number" in line] == [
        "the held-out loss at step 0 is no number, and is left out"
    ]
    assert [m.step for m in result.holdout] == [1, 2, 3, 4]
    lowest = min(result.holdout, key=lambda m: m.loss)
    assert result.steps == lowest.step > 0
    assert strictly_read(config.output_dir / "posterpipe.json")["steps"] == result.steps


def test_where_all_steps_were_made_the_card_tells_of_which_the_weights_are(
    make_config: MakeConfig, other_set: Path
) -> None:
    config = make_config(
        parts={"holdout_set": other_set},
        learning_rate=0.05,  # so high that it gets worse
        holdout_every_steps=1,
        early_stop_patience=50,
    )
    result = train(config)
    assert result.ended_by == "max_train_steps" and result.steps < 4
    card = (config.output_dir / "README.md").read_text()
    assert "4 optimizer steps of 2 images in" in card and "all steps were made. The" in card
    assert f"The weights are those of step {result.steps} of 4" in card


def test_the_time_left_is_that_of_steps_after_the_first_in_which_models_are_compiled(
    make_config: MakeConfig, other_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    add_gradients, loss = Learner.add_gradients, holdout_loss

    def add(learner: Learner, step: int, batches: Any) -> Tensor:
        nonlocal now
        now += 2.0 if step else 600.0
        return add_gradients(learner, step, batches)

    def measure(*arguments: Any, **keywords: Any) -> Tensor:
        nonlocal now
        now += 10.0
        return loss(*arguments, **keywords)

    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr("posterpipe.core.dreambooth.run.time", clock)
    monkeypatch.setattr("posterpipe.core.dreambooth.run.holdout_loss", measure)
    monkeypatch.setattr(Learner, "add_gradients", add)
    result = train(make_config(parts={"holdout_set": other_set}, holdout_every_steps=2))
    assert [report.seconds_left for report in result.reports] == [None, 24.0, 7.0, 0.0]
    assert "left" not in str(result.reports[0]) and "about 24" in str(result.reports[1])


def test_what_encoded_images_and_captions_is_gone_before_the_first_step(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders: list[weakref.ref[Any]] = []

    def watched(load: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def load_watched(base_model: Path) -> Any:
            model = load(base_model)
            model.in_a_cycle = [model]  # as some versions of its library leave it
            encoders.append(weakref.ref(model))
            return model

        return load_watched

    there: list[Any] = []
    trainer = "posterpipe.core.dreambooth"
    monkeypatch.setattr(f"{trainer}.inputs.load_vae", watched(load_vae))
    monkeypatch.setattr(f"{trainer}.learner.load_text_encoder", watched(load_text_encoder))
    gc.disable()
    try:
        config = make_config(train_text_encoder=False, max_train_steps=1)
        train(config, lambda report: there.extend(ref() for ref in encoders))
    finally:
        gc.enable()
    assert there == [None, None]


def test_a_run_names_captions_that_the_text_encoder_does_not_read_to_their_end(
    make_config: MakeConfig, training_set: Path, tmp_path: Path
) -> None:
    long = Path(shutil.copytree(training_set, tmp_path / "long"))
    table = (long / "training.csv").read_text()
    (long / "training.csv").write_text(table.replace("a red rocket", "a red rocket " * 30))
    said: list[str] = []
    train(make_config("long", parts={"training_set": long}, max_train_steps=1), log=said.append)
    (line,) = [line for line in said if "captions" in line]
    assert line.startswith("1 of 5 captions have more tokens than the 48 that")
    assert "a red rocket a red rocket" in line and len(line) < 200
    said.clear()
    train(make_config("short", max_train_steps=1), log=said.append)
    assert not [line for line in said if "captions" in line]


def test_bf16_that_a_gpu_only_emulates_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def has_native(including_emulation: bool = True) -> bool:
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", has_native)
    gpu = torch.device("cuda")
    native = False
    (said,) = precision_remarks(torch.bfloat16, gpu)
    assert "emulates bf16" in said and "mixed_precision = fp16" in said
    assert list(precision_remarks(torch.float16, gpu)) == []
    native = True
    assert list(precision_remarks(torch.bfloat16, gpu)) == []
    assert list(precision_remarks(torch.bfloat16, torch.device("cpu"))) == []


def test_models_from_the_middle_of_a_run_are_those_of_shorter_runs(
    make_config: MakeConfig,
) -> None:
    settings = {"ema_decay": 0.9, "max_train_steps": 5, "save_every_steps": 2}
    plain = make_config("plain", **settings)
    config = make_config("exports", **settings, export_every_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt_at(3))
    (early,) = config.work_dir.glob("exports/*/*")
    later = shutil.copytree(early, early.with_name("step-00000009"))  # of steps not made again
    assert train(config).checkpoint_id == train(plain).checkpoint_id
    exports = config.output_dir / "exports"
    assert [path.name for path in sorted(exports.iterdir())] == ["step-00000002", "step-00000004"]
    assert not later.exists() and not (config.work_dir / "exports").exists()
    short = make_config("short", **{**settings, "max_train_steps": 2})
    train(short)
    half = exports / "step-00000002"
    assert equal(unet_weights(half), unet_weights(short.output_dir))
    assert equal(text_weights(half), text_weights(short.output_dir))
    assert StableDiffusionPipeline.from_pretrained(half)
    # They change no weight of the run, and are no part of what the checkpoint is.
    assert equal(unet_weights(config.output_dir), unet_weights(plain.output_dir))
    fingerprint = directory_fingerprint(config.output_dir)
    shutil.rmtree(exports)
    assert directory_fingerprint(config.output_dir) == fingerprint


def test_early_stopping_without_held_out_posters_says_so(make_config: MakeConfig) -> None:
    with pytest.raises(TrainingError, match="early_stop_patience: there are no held-out posters"):
        train(make_config(early_stop_patience=2))
    with pytest.raises(ValidationError, match="early_stop_patience needs holdout_every_steps"):
        make_config(early_stop_patience=2, holdout_every_steps=None)


def test_a_time_limit_ends_the_run_with_a_finished_model(make_config: MakeConfig) -> None:
    result = train(make_config(max_train_steps=100_000, time_limit_minutes=0.005))
    assert result.ended_by == "time_limit"
    assert 1 <= result.steps < 100_000
    assert result.reports[-1].step == result.steps
    assert (result.output_dir / "model_index.json").exists()


def test_samples_are_drawn_from_the_same_noise_and_shown_over_the_steps(
    make_config: MakeConfig,
) -> None:
    settings = {"sample_every_steps": 2, "max_train_steps": 4, "sample_prompts": ("a cat", "a car")}
    config = make_config("one", **settings, learning_rate=1e-12)
    train(config)
    names = sorted(path.name for path in (config.output_dir / "samples").glob("*.png"))
    assert names == [f"step-{step:08d}-{n}.png" for step in (0, 2, 4) for n in (0, 1)]
    drawn = {
        name: np.asarray(Image.open(config.output_dir / "samples" / name), int) for name in names
    }
    assert abs(drawn["step-00000000-0.png"] - drawn["step-00000004-0.png"]).max() <= 1
    assert abs(drawn["step-00000000-0.png"] - drawn["step-00000000-1.png"]).max() > 1
    with Image.open(config.output_dir / "samples.png") as grid:
        assert grid.width > 3 * 128 and grid.height > 2 * 192


def test_the_card_tells_data_settings_versions_curves_and_licence(
    make_config: MakeConfig, base_model: Path, other_set: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(base_model, tmp_path / "licensed"))
    (base / "README.md").write_text("---\nlicense: openrail++\n---\n# A model\n")
    config = make_config(
        parts={"base_model": base, "base_model_name": "someone/model", "holdout_set": other_set},
        sample_every_steps=2,
        holdout_every_steps=2,
    )
    result = train(config)
    card = (config.output_dir / "README.md").read_text()
    record = json.loads((config.output_dir / "posterpipe.json").read_text())
    front, body = card.split("---\n", 2)[1:]
    values = yaml.safe_load(front)
    assert values["base_model"] == "someone/model" and values["license"] == "openrail++"
    for words in (
        result.checkpoint_id,
        record["training_set"],
        record["holdout_set"],
        "| learning_rate | 0.001 |",
        f"| torch | {record['packages']['torch']} |",
        f"{result.holdout[0].loss:.4f} at step 0",
    ):
        assert words in body
    pictures = re.findall(r"\]\((.*?)\)", body)
    assert pictures == ["loss.png", "samples.png"]
    assert all((config.output_dir / name).exists() for name in pictures)
    assert str(tmp_path) not in card


def test_prior_preservation_needs_class_images(make_config: MakeConfig) -> None:
    with pytest.raises(TrainingError, match="prior_preservation: there are no class images"):
        train(make_config(prior_preservation=True))


def test_a_prior_without_weight_changes_no_loss(make_config: MakeConfig, other_set: Path) -> None:
    plain = train(make_config("plain", max_train_steps=2))
    parts = {"class_set": other_set}
    weightless = train(
        make_config(
            "weightless",
            parts=parts,
            max_train_steps=2,
            prior_preservation=True,
            prior_loss_weight=0.0,
        )
    )
    assert losses(weightless) == pytest.approx(losses(plain), abs=1e-5)


def test_images_of_several_sizes_are_trained_on_together(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    sizes = [(32, 48), (48, 32), (32, 48), (48, 48), (48, 32)]
    mixed = write_training_set(tmp_path / "mixed", sizes=sizes)
    parts = {"training_set": mixed, "buckets": True}
    settings = {"max_train_steps": 3, "sample_every_steps": 3}
    large = train(make_config("large", parts=parts, train_batch_size=4, **settings))
    small = train(
        make_config(
            "small", parts=parts, train_batch_size=1, gradient_accumulation_steps=4, **settings
        )
    )
    assert losses(large) == pytest.approx(losses(small), abs=1e-5)
    # Each new shape would be measured again, in memory of its own.
    assert not torch.backends.cudnn.benchmark
    with pytest.raises(TrainingSetError, match=r"0001\.png: 48x32 pixels.*32x48"):
        train(make_config("strict", parts={"training_set": mixed}))


@pytest.mark.parametrize(
    "option",
    [{"caption_dropout": 0.5}, {"caption_shuffling": True, "caption_separator": " "}],
    ids=["dropped", "shuffled"],
)
def test_dropped_and_shuffled_captions_are_trained_on(
    make_config: MakeConfig, option: dict[str, Any]
) -> None:
    plain = train(make_config("plain", train_text_encoder=False, max_train_steps=2))
    varied = train(make_config("varied", train_text_encoder=False, max_train_steps=2, **option))
    assert losses(varied) != losses(plain)


def test_the_three_optimizers_agree_to_their_precision(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    base = build_tiny_stable_diffusion(tmp_path / "base", precision="fp32")
    after = {}
    for name in ("adamw", "adamw_fused", "adamw_8bit"):
        config = make_config(
            name, parts={"base_model": base}, optimizer=name, max_train_steps=3, learning_rate=1e-4
        )
        train(config)
        after[name] = unet_weights(config.output_dir)
    for key, value in after["adamw"].items():
        torch.testing.assert_close(after["adamw_fused"][key], value, atol=2e-5, rtol=0)
        torch.testing.assert_close(after["adamw_8bit"][key], value, atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_gives_the_losses_of_the_plain_one(make_config: MakeConfig) -> None:
    plain = train(make_config("plain", max_train_steps=3))
    quick = train(make_config("compiled", max_train_steps=3, compile=True))
    assert losses(quick) == pytest.approx(losses(plain), abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_with_buckets_goes_on_to_the_same_bits(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    mixed = write_training_set(tmp_path / "mixed", sizes=[(32, 48), (48, 32)])
    settings: dict[str, Any] = {"max_train_steps": 4, "save_every_steps": 2, "compile": True}
    # With this seed the shape that comes first after the save is not the one that came first.
    settings |= {"train_text_encoder": False, "train_batch_size": 1, "seed": 1}
    parts = {"training_set": mixed, "buckets": True}
    whole = make_config("whole", parts=parts, **settings)
    cut = make_config("cut", parts=parts, **settings)
    torch._dynamo.reset()
    uninterrupted = train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(cut, interrupt_at(3))
    torch._dynamo.reset()  # as in a process of its own, which has seen no other shapes
    resumed = train(cut)
    assert resumed.resumed_from == 2
    assert losses(resumed) == losses(uninterrupted)
    assert equal(unet_weights(whole.output_dir), unet_weights(cut.output_dir))
