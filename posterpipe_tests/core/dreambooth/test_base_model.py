"""The base model on disk: which of its files count."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from posterpipe.core.dreambooth.base_model import count_parameters, disk_dtype
from posterpipe_tests.models import build_tiny_stable_diffusion


@pytest.mark.parametrize("beside", ["fp16", "non_ema"])
def test_a_model_is_as_precise_as_the_weights_that_are_loaded(tmp_path: Path, beside: str) -> None:
    full = build_tiny_stable_diffusion(tmp_path / "full", precision="fp32")
    half = build_tiny_stable_diffusion(tmp_path / "half", precision="fp16")
    before = count_parameters(full)
    name = "diffusion_pytorch_model{}.safetensors"
    weights = half / "unet" / name.format("")
    shutil.copyfile(weights, full / "unet" / name.format(f".{beside}"))
    assert disk_dtype(full) == torch.float32
    assert count_parameters(full) == before
    # Where nothing else is there, the variant is what is loaded.
    weights.rename(half / "unet" / name.format(".fp16"))
    assert disk_dtype(half) == torch.float16
