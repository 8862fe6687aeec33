"""Latents: right, computed once, and found again only where everything that decides them is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from posterpipe.core.dreambooth.base_model import load_vae
from posterpipe.core.dreambooth.data import load_pixels, read_training_set
from posterpipe.core.dreambooth.errors import TrainingSetError
from posterpipe.core.dreambooth.latents import Latents, cached_latents, encode


@pytest.fixture
def copied(training_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(training_set, tmp_path / "set"))


def latents_of(
    folder: Path,
    cache: Path,
    base: Path,
    said: list[str] | None = None,
    size: tuple[int, int] | None = (32, 48),
    device: str = "cpu",
) -> Latents:
    return cached_latents(
        cache,
        read_training_set(folder),
        base,
        lambda: load_vae(base),
        device=torch.device(device),
        size=size,
        log=(said if said is not None else []).append,
    )


def test_latents_are_the_scaled_ones_of_the_vae_and_made_once(
    copied: Path, base_model: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    first = latents_of(copied, tmp_path / "cache", base_model, said)
    assert len(said) == 1
    again = latents_of(copied, tmp_path / "cache", base_model, said)
    assert len(said) == 1
    assert all(map(torch.equal, first.means, again.means))

    vae = load_vae(base_model)
    with torch.no_grad():
        pixels = load_pixels(copied / "0003.png", (32, 48))[None]
        posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(first.shapes[3], generator=torch.Generator().manual_seed(3))
    wanted = (posterior.mean + posterior.std * noise) * vae.config["scaling_factor"]
    torch.testing.assert_close(first.sample(3, noise), wanted[0], rtol=1e-5, atol=1e-5)


def test_one_more_image_is_one_more_latent(copied: Path, base_model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    latents_of(copied, cache, base_model)
    before = {path.name for path in cache.iterdir()}
    Image.new("RGB", (32, 48), "red").save(copied / "0009.png")
    with open(copied / "training.csv", "a") as file:
        file.write("0009.png,a red poster\n")
    said: list[str] = []
    latents = latents_of(copied, cache, base_model, said)
    assert said == ["encoded 1 of 1 images into latents"]
    assert len(latents.means) == 6
    assert len({path.name for path in cache.iterdir()} - before) == 1


def test_a_changed_image_and_a_damaged_cache_are_encoded_anew(
    copied: Path, base_model: Path, tmp_path: Path
) -> None:
    cache, said = tmp_path / "cache", list[str]()
    first = latents_of(copied, cache, base_model, said)
    Image.new("RGB", (32, 48), "red").save(copied / "0001.png")
    second = latents_of(copied, cache, base_model, said)
    assert torch.equal(first.means[0], second.means[0])
    assert not torch.equal(first.means[1], second.means[1])
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    third = latents_of(copied, cache, base_model, said)
    assert torch.allclose(second.means[1], third.means[1], atol=1e-5)
    assert any("damaged" in line for line in said)


def test_a_run_killed_while_encoding_finds_the_same_latents(
    copied: Path, base_model: Path, tmp_path: Path
) -> None:
    whole = latents_of(copied, tmp_path / "whole", base_model)
    table = copied / "training.csv"
    lines = table.read_text().splitlines(keepends=True)
    for rows in (3, 4, 6):  # the heading and 2, 3, 5 images
        table.write_text("".join(lines[:rows]))
        pieces = latents_of(copied, tmp_path / "pieces", base_model)
    assert all(map(torch.equal, whole.means, pieces.means))
    assert all(map(torch.equal, whole.stds, pieces.stds))


def test_latents_of_another_kind_of_device_or_torch_are_not_taken(
    copied: Path, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    latents_of(copied, tmp_path / "cache", base_model, said)
    latents_of(copied, tmp_path / "cache", base_model, said, device="cuda")
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    latents_of(copied, tmp_path / "cache", base_model, said)
    assert said == ["encoded 5 of 5 images into latents"] * 3


def test_encoding_is_whole_fp32_and_repeatable_and_training_as_it_was(base_model: Path) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def flags() -> tuple[bool, bool, bool]:
        return cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic

    inside = []
    vae = load_vae(base_model)
    vae.encoder.conv_in.register_forward_hook(lambda *_: inside.append(flags()))
    matmul.allow_tf32 = True
    try:
        encode(vae, torch.zeros(3, 48, 32))
        assert inside == [(False, False, True)]
        assert flags() == (True, True, False)
    finally:
        matmul.allow_tf32 = False


def test_another_vae_has_other_latents(copied: Path, base_model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base_model, tmp_path / "other"))
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.5 for name, value in load_file(weights).items()}, weights)
    first = latents_of(copied, tmp_path / "cache", base_model)
    second = latents_of(copied, tmp_path / "cache", other)
    assert not torch.equal(first.means[0], second.means[0])


def test_known_latents_do_not_hide_a_wrong_size(
    copied: Path, base_model: Path, tmp_path: Path
) -> None:
    latents_of(copied, tmp_path / "cache", base_model)
    with pytest.raises(TrainingSetError, match=r"0000\.png: 32x48 pixels.*64x96"):
        latents_of(copied, tmp_path / "cache", base_model, size=(64, 96))


def test_images_of_several_sizes_keep_their_places(
    copied: Path, base_model: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (48, 32), "blue").save(copied / "0002.png")
    latents = latents_of(copied, tmp_path / "cache", base_model, size=None)
    assert latents.shapes == [(12, 6, 4), (12, 6, 4), (12, 4, 6), (12, 6, 4), (12, 6, 4)]
