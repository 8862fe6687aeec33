"""Tiny random encoders and generations for the tests of the metrics.

What belongs here: model directories as `from_pretrained` reads them, hand-made images, and tables
of generations over them. What does not: Stable Diffusion models (`posterpipe_tests.models`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from posterpipe.core.generations import COLUMNS, generation_key
from posterpipe.core.images import png_bytes
from posterpipe.core.metrics.fidelity import Posters
from posterpipe.core.store import Store
from posterpipe_tests.models import build_tiny_tokenizer

SIDE = 32


def build_tiny_clip(folder: Path, *, whole_processor: bool = False) -> Path:
    """Writes a random CLIP for 32x32 images; the processor in one file or in the older two."""
    import torch
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPProcessor,
    )

    tokenizer = build_tiny_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "projection_dim": 16}
    text = {
        **shape,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**shape, "image_size": SIDE, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.half().save_pretrained(folder)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    if whole_processor:
        CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    else:
        images.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def build_tiny_dino(folder: Path, *, version: int) -> Path:
    """Writes a random DINO (1) or DINOv2 (2) for 32x32 images with its image processor."""
    import torch
    from transformers import (
        BitImageProcessorPil,
        Dinov2Config,
        Dinov2Model,
        ViTConfig,
        ViTImageProcessorPil,
        ViTModel,
    )

    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"image_size": SIDE, "patch_size": 8}
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor: Any
    with torch.random.fork_rng():
        torch.manual_seed(5)
        if version == 2:
            model: Any = Dinov2Model(Dinov2Config(**shape))
            processor = BitImageProcessorPil(
                size={"shortest_edge": 40}, crop_size={"height": SIDE, "width": SIDE},
                image_mean=mean, image_std=deviation,
            )  # fmt: skip
        else:
            model = ViTModel(ViTConfig(**shape, intermediate_size=64), add_pooling_layer=False)
            processor = ViTImageProcessorPil(
                size={"height": SIDE, "width": SIDE}, image_mean=mean, image_std=deviation
            )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def some_images(count: int = 5) -> list[Image.Image]:
    """Smooth random colours in several shapes; the first ones as posters are."""
    rng = np.random.default_rng(1)
    sizes = [(64, 96), (64, 96), (90, 40), (33, 33), (512, 700)]
    small = [Image.fromarray(rng.integers(0, 256, (6, 4, 3), dtype=np.uint8)) for _ in range(count)]
    return [image.resize(sizes[number % 5]) for number, image in enumerate(small)]


def posters(store: Store, name: str, images: Sequence[Image.Image]) -> Posters:
    """A set of posters kept in the store."""
    blobs = [store.put(png_bytes(image.convert("RGB")), ".png") for image in images]
    return Posters(name, {blob: store.path(blob, ".png") for blob in blobs})


def generations(
    store: Store,
    images: Sequence[Image.Image | None],
    *,
    titles: Sequence[str] | None = None,
    seeds_a_prompt: int = 2,
    statuses: Sequence[str] | None = None,
    variant: str = "sd",
    checkpoint: str = "base",
) -> pd.DataFrame:
    """A table of generations: one row an image, `seeds_a_prompt` to a prompt; None has failed."""
    rows = []
    for number, image in enumerate(images):
        blob = store.put(png_bytes(image.convert("RGB")), ".png") if image else ""
        status = statuses[number] if statuses else ("ok" if image else "failed")
        prompt = f"p{number // seeds_a_prompt}"
        title = titles[number] if titles else ""
        text = f"a poster of {prompt}"
        key = f"{variant} {checkpoint} {number} {blob}"
        rows.append(
            {
                "generation_key": generation_key(key, variant, prompt, text, title),
                "pixel_key": key,
                "variant": variant,
                "prompt_id": prompt,
                "prompt": f"{text} now",
                "score_text": text,
                "negative_prompt": "",
                "title": title,
                "seed": number,
                "checkpoint_id": checkpoint,
                "image": blob,
                "image_path": store.path(blob, ".png").relative_to(store.root).as_posix()
                if blob
                else "",
                "status": status,
                "reason": "" if status == "ok" else f"it is {status}",
                "width": image.width if image else 0,
                "height": image.height if image else 0,
                "settings": "{}",
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))
