from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from posterpipe.core.dreambooth.checkpoint import load_tokenizer, load_vae
from posterpipe.core.dreambooth.data import (
    Draw,
    Latents,
    cached_latents,
    draw,
    load_pixels,
    positions,
    read_training_set,
    tokenize,
)
from posterpipe.core.dreambooth.errors import TrainingSetError


@pytest.fixture
def copied(training_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(training_set, tmp_path / "set"))


def test_rows_come_in_the_order_of_the_csv(training_set: Path) -> None:
    examples = read_training_set(training_set)
    assert [e.image.name for e in examples] == [f"{n:04d}.png" for n in range(5)]
    assert examples[0].caption == "a red rocket on a blue poster"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "training.csv:1"),
        ("file_name,text\n0000.png,a cat\n", "column caption is missing"),
        ("file_name,caption\n", "no rows"),
        ("file_name,caption\n0000.png\n", "training.csv:2"),
        ("file_name,caption\n0000.png,a,cat\n", "training.csv:2"),
        ("file_name,caption\n0000.png,a cat\n0001.png, \n", "training.csv:3: no caption"),
        ("file_name,caption\n../0000.png,a cat\n", "outside the folder"),
        ("file_name,caption\n0000.png,a cat\nnone.png,a dog\n", "none.png missing"),
        ('file_name,caption\n0000.png,"a cat\n', "not a CSV"),
    ],
)
def test_a_broken_csv_is_named_with_its_line(copied: Path, text: str, words: str) -> None:
    (copied / "training.csv").write_text(text, encoding="utf-8")
    with pytest.raises(TrainingSetError) as caught:
        read_training_set(copied)
    assert words in str(caught.value) and "training.csv" in str(caught.value)


def test_a_csv_in_another_encoding_is_named(copied: Path) -> None:
    (copied / "training.csv").write_bytes(
        "file_name,caption\n0000.png,caf\u00e9\n".encode("latin-1")
    )
    with pytest.raises(TrainingSetError, match="UTF-8"):
        read_training_set(copied)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingSetError, match=r"nowhere.*No such file"):
        read_training_set(tmp_path / "nowhere")


def test_pixels_lie_between_minus_one_and_one(copied: Path) -> None:
    Image.new("RGB", (32, 48), (255, 0, 51)).save(copied / "flat.png")
    pixels = load_pixels(copied / "flat.png", 32, 48)
    assert pixels.shape == (3, 48, 32)
    assert pixels[:, 0, 0].tolist() == pytest.approx([1, -1, -0.6])


def test_an_unreadable_image_and_one_of_another_size_are_named(copied: Path) -> None:
    (copied / "text.png").write_text("not a picture")
    with pytest.raises(TrainingSetError, match=r"text\.png: not a readable image"):
        load_pixels(copied / "text.png", 32, 48)
    with pytest.raises(TrainingSetError, match=r"0000\.png: 32x48 pixels.*64x96"):
        load_pixels(copied / "0000.png", 64, 96)


def latents_of(folder: Path, cache: Path, base: Path, log: Callable[[str], None]) -> Latents:
    return cached_latents(
        cache,
        read_training_set(folder),
        base,
        lambda: load_vae(base),
        width=32,
        height=48,
        log=log,
    )


def test_latents_are_the_scaled_ones_of_the_vae_and_made_once(
    copied: Path, base_model: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    first = latents_of(copied, tmp_path / "cache", base_model, said.append)
    assert len(said) == 1
    again = latents_of(copied, tmp_path / "cache", base_model, said.append)
    assert len(said) == 1 and torch.equal(first.mean, again.mean)

    vae = load_vae(base_model)
    with torch.no_grad():
        pixels = load_pixels(copied / "0003.png", 32, 48)[None]
        posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(first.mean[:1].shape, generator=torch.Generator().manual_seed(3))
    wanted = (posterior.mean + posterior.std * noise) * vae.config["scaling_factor"]
    torch.testing.assert_close(first.sample([3], noise), wanted, rtol=1e-5, atol=1e-6)


def test_a_changed_image_and_a_damaged_cache_are_encoded_anew(
    copied: Path, base_model: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    first = latents_of(copied, tmp_path / "cache", base_model, said.append)
    Image.new("RGB", (32, 48), "red").save(copied / "0001.png")
    second = latents_of(copied, tmp_path / "cache", base_model, said.append)
    assert torch.equal(first.mean[0], second.mean[0])
    assert not torch.equal(first.mean[1], second.mean[1])
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    third = latents_of(copied, tmp_path / "cache", base_model, said.append)
    assert torch.equal(second.mean, third.mean)
    assert any("damaged" in line for line in said)


def test_captions_are_cut_so_that_the_end_token_stays(base_model: Path, training_set: Path) -> None:
    tokenizer = load_tokenizer(base_model)
    ids = tokenize(tokenizer, read_training_set(training_set), 6)
    assert ids.shape == (5, 6)
    assert (ids[:, -1] == tokenizer.eos_token_id).all()


def sample(position: int, seed: int = 7) -> Draw:
    return draw(seed, position, images=5, timesteps=1000, shape=(2, 3, 2))


def test_each_epoch_shows_each_image_once_in_an_order_of_its_own() -> None:
    epochs = [[sample(p).index for p in range(e * 5, e * 5 + 5)] for e in range(8)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4


def test_a_sample_is_a_function_of_seed_and_position_alone() -> None:
    before = sample(12)
    torch.manual_seed(99)
    sample(3)
    after = sample(12)
    assert (before.index, before.timestep) == (after.index, after.timestep)
    assert torch.equal(before.noise, after.noise)
    assert not torch.equal(before.noise, sample(12, seed=8).noise)
    assert not torch.equal(before.noise, before.latent_noise)
    assert torch.equal(sample(1, seed=-1).noise, sample(1, seed=-1).noise)


def test_timesteps_and_noise_follow_their_distributions() -> None:
    draws = [sample(p) for p in range(2000)]
    timesteps = torch.tensor([d.timestep for d in draws], dtype=torch.float64)
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    # Uniform on 0..999: mean 499.5, standard error 289 / sqrt(2000) = 6.5.
    assert abs(timesteps.mean().item() - 499.5) < 4 * 6.5
    noise = torch.stack([d.noise for d in draws])
    assert abs(noise.mean().item()) < 4 / noise.numel() ** 0.5
    assert noise.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("micro_steps", "processes"), [(1, 1), (4, 1), (1, 2), (2, 3)])
def test_micro_steps_and_processes_share_one_stream(micro_steps: int, processes: int) -> None:
    seen = Counter(
        position
        for step in range(5)
        for micro_step in range(micro_steps)
        for process in range(processes)
        for position in positions(
            step,
            micro_step=micro_step,
            micro_steps=micro_steps,
            process=process,
            processes=processes,
            batch=3,
        )
    )
    assert seen == Counter(range(5 * micro_steps * processes * 3))
