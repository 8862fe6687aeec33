"""`train_unet_text_encoder`: as `train_unet`, with the text encoder trained as well."""

from __future__ import annotations

from benchmarks import train_unet
from benchmarks.rows import Row


def run() -> list[Row]:
    return train_unet.run("train_unet_text_encoder", train_text_encoder=True, required=1.15)
