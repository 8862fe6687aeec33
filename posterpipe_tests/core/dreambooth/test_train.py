"""The trainer on tiny models: right, complete, and clear about what it cannot do."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from posterpipe.core.dreambooth import train as train_module
from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.data import draw
from posterpipe.core.dreambooth.errors import (
    BaseModelError,
    TrainingDiverged,
    TrainingError,
    TrainingSetError,
)
from posterpipe.core.dreambooth.reports import StepReport
from posterpipe.core.dreambooth.train import train
from posterpipe_tests.core.dreambooth.conftest import MakeConfig
from posterpipe_tests.models import build_tiny_stable_diffusion


def unet_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def text_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "text_encoder" / "model.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def reference_run(config: RunConfig) -> tuple[list[float], list[Any]]:
    """Losses and models of a plain loop: the published equations, one line after the other.

    Only the positions' random numbers are shared with the trainer. AdamW after Loshchilov & Hutter
    2019, algorithm 2; clipping to a total norm; cosine betas after Nichol & Dhariwal 2021, eq. 17.
    """
    settings = config.training
    base = str(config.base_model)
    vae: Any = AutoencoderKL.from_pretrained(base, subfolder="vae", dtype=torch.float32)
    unet: Any = UNet2DConditionModel.from_pretrained(base, subfolder="unet", dtype=torch.float32)
    encoder: Any = CLIPTextModel.from_pretrained(base + "/text_encoder", dtype=torch.float32)
    tokenizer: Any = CLIPTokenizer.from_pretrained(base + "/tokenizer")
    schedule = json.loads((config.base_model / "scheduler" / "scheduler_config.json").read_text())

    def signal(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_bar, alphas_bar = 1.0, []
    for t in range(1000):
        alpha_bar *= 1 - min(1 - signal((t + 1) / 1000) / signal(t / 1000), 0.999)
        alphas_bar.append(alpha_bar)

    with open(config.training_set / "training.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    pixels = [
        torch.tensor(np.asarray(Image.open(config.training_set / row["file_name"])))
        .permute(2, 0, 1)
        .div(127.5)
        .sub(1)
        for row in rows
    ]
    parameters = [*unet.parameters(), *encoder.parameters()]
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    b1, b2 = settings.adam_beta1, settings.adam_beta2
    losses = []
    for step in range(settings.max_train_steps):
        total: Any = 0.0
        for i in range(settings.train_batch_size):
            position = step * settings.train_batch_size + i
            shape = (12, config.height // 8, config.width // 8)
            d = draw(settings.seed, position, images=len(rows), timesteps=1000, shape=shape)
            with torch.no_grad():
                posterior = vae.encode(pixels[d.index][None]).latent_dist
            x = (posterior.mean + posterior.std * d.latent_noise) * vae.config.scaling_factor
            signal_share = math.sqrt(alphas_bar[d.timestep])
            noise_share = math.sqrt(1 - alphas_bar[d.timestep])
            noised = signal_share * x + noise_share * d.noise
            wanted = d.noise[None]
            if schedule["prediction_type"] == "v_prediction":
                wanted = signal_share * d.noise - noise_share * x
            ids = tokenizer(
                rows[d.index]["caption"],
                padding="max_length",
                max_length=48,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            embeds = encoder(ids).last_hidden_state
            predicted = unet(noised, torch.tensor([d.timestep]), embeds).sample
            total = total + ((predicted - wanted) ** 2).mean() / settings.train_batch_size
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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_losses_and_weights_are_those_of_a_plain_loop(
    make_config: MakeConfig, tmp_path: Path, prediction_type: Any
) -> None:
    base = build_tiny_stable_diffusion(
        tmp_path / "base", prediction_type=prediction_type, precision="fp32"
    )
    config = make_config(
        parts={"base_model": base}, max_train_steps=8, lr_warmup_steps=3, max_grad_norm=0.5
    )
    wanted_losses, (unet, encoder) = reference_run(config)
    result = train(config)
    assert [r.loss for r in result.reports] == pytest.approx(wanted_losses, abs=1e-5)
    got = unet_weights(config.output_dir)
    assert got["conv_in.weight"].dtype == torch.float32
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=2e-5)
    got = text_weights(config.output_dir)
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=2e-5)


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
    with open(result.metrics_csv, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 3, 6, 7]
    assert {"step", "loss", "lr", "steps_per_second"} <= rows[0].keys()
    assert result.loss_picture.read_bytes().startswith(b"\x89PNG")
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

    def stop(report: StepReport) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cut, stop)
    assert not cut.output_dir.exists()
    said: list[str] = []
    assert train(cut, log=said.append).resumed_from == 4
    assert any("goes on from step 4 of 6" in line for line in said)
    assert equal(unet_weights(whole.output_dir), unet_weights(cut.output_dir))


def test_a_finished_run_is_not_done_again(make_config: MakeConfig) -> None:
    config = make_config()
    first = train(config)
    seen: list[StepReport] = []
    again = train(config, seen.append)
    assert not seen and again == first
    with pytest.raises(TrainingError, match="holds the checkpoint"):
        train(make_config(seed=3))


def test_a_loss_that_is_no_number_names_the_last_good_save(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(max_train_steps=6, save_every_steps=2, log_every_steps=10)
    calls = 0

    def poisoned(prediction: Tensor, wanted: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        errors = (prediction.float() - wanted).pow(2).mean(dim=(1, 2, 3))
        return errors * (float("nan") if calls == 3 else 1.0)

    monkeypatch.setattr(train_module.objective, "squared_errors", poisoned)
    with pytest.raises(TrainingDiverged, match=r"nan at step 4; .*step-00000002.*learning_rate"):
        train(config)
    assert not config.output_dir.exists()
    assert [p.name for p in (config.work_dir / "saves").iterdir()] == ["step-00000002"]


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on a GPU")
def test_fp16_without_a_gpu_says_what_to_set(make_config: MakeConfig) -> None:
    with pytest.raises(TrainingError, match=r"fp16 needs a GPU.*MIXED_PRECISION=bf16"):
        train(make_config(mixed_precision="fp16"))


def test_pickled_weights_are_never_read(
    make_config: MakeConfig, base_model: Path, tmp_path: Path
) -> None:
    planted = Path(shutil.copytree(base_model, tmp_path / "planted"))
    (planted / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    proof = tmp_path / "executed"

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (proof,)

    torch.save(Malicious(), planted / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(BaseModelError, match="safetensors"):
        train(make_config(parts={"base_model": planted}))
    assert not proof.exists()


def test_out_of_memory_names_settings_that_need_less(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(train_module.objective, "squared_errors", full)
    with pytest.raises(TrainingError) as caught:
        train(make_config())
    assert "train_batch_size = 1 with gradient_accumulation_steps = 2" in str(caught.value)
    assert "gradient_checkpointing" in str(caught.value)
