"""What tests of drawing share: settings, prompts and requests of a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from posterpipe.core.prompts import Prompt
from posterpipe.core.sampler import LORA_WEIGHTS, ImageRequest
from posterpipe.settings import SamplerSettings
from posterpipe_tests.models import TINY_HEIGHT, TINY_WIDTH

Images = list[Image.Image]

SETTINGS = SamplerSettings(
    num_inference_steps=3,
    guidance_scale=4.0,
    width=TINY_WIDTH,
    height=TINY_HEIGHT,
    batch_size=3,
    scheduler="dpmsolver++",
)
SUITE = [
    Prompt("rocket", "a red rocket", "a rocket", "busy", "Orbit", (1, 2)),
    Prompt("cat", "a blue cat", "a cat", "", "", (3,)),
]
REQUESTS = [
    ImageRequest("a red rocket", "busy", 1),
    ImageRequest("a red rocket", "", 1),
    ImageRequest("a yellow cat in the centre", "the film", 2),
    ImageRequest("a blue rocket", "", 2**32 - 1),
    ImageRequest("a movie poster", "", 5),
]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def with_batch(size: int) -> SamplerSettings:
    return SETTINGS.model_copy(update={"batch_size": size})


def tf32_switches() -> tuple[bool, bool]:
    """Whether a GPU may take TF32 for the fp32 of convolutions, and of products."""
    import torch

    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def lora_and_merged(model_dir: Path, folder: Path, strength: float) -> tuple[Path, Path]:
    """A directory of random LoRA weights, and one of the whole model with them added in fp32."""
    import torch
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionPipeline.from_pretrained(
        model_dir, torch_dtype=torch.float32, safety_checker=None
    )
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "lora" in name:
                parameter.normal_(0, strength, generator=torch.Generator().manual_seed(len(name)))
    state = get_peft_model_state_dict(pipeline.unet)
    lora, merged = folder / "lora", folder / "merged"
    StableDiffusionPipeline.save_lora_weights(lora, unet_lora_layers=state)
    assert (lora / LORA_WEIGHTS).is_file()
    pipeline.unet.fuse_lora()
    pipeline.unet.unload_lora()
    pipeline.save_pretrained(merged, safe_serialization=True)
    return lora, merged
