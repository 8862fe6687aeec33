"""A small convolutional classifier of object kinds: an independent judge of generated images.

It is trained apart from the scorer, on fresh draws, and only ever used to measure the base model.

What belongs here: the network, and reading and writing it. What does not: its training (`stages`)
and what is concluded from its answers (`evaluate`).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class KindClassifier(nn.Module):
    """Images float32 (batch, 3, 96, 64) in -1..1 to logits (batch, kinds). 0.3 M parameters."""

    def __init__(self, kinds: tuple[str, ...], widths: tuple[int, ...] = (24, 48, 96, 128)) -> None:
        super().__init__()
        self.kinds = kinds
        layers: list[nn.Module] = []
        previous = 3
        for width in widths:
            layers += [
                nn.Conv2d(previous, width, 3, stride=2, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
            previous = width
        self.features = nn.Sequential(*layers)
        # The object may lie anywhere, but what surrounds it matters: pool coarsely, not globally.
        self.pool = nn.AdaptiveMaxPool2d((2, 2))
        self.head = nn.Linear(previous * 4, len(kinds))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.pool(self.features(pixels)).flatten(1))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        config = {"kinds": list(self.kinds), "input": [3, 96, 64]}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> KindClassifier:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = cls(tuple(config["kinds"]))
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict({name: value.float() for name, value in weights.items()})
        return model.eval()

    @torch.no_grad()
    def name(self, pixels: Tensor) -> list[str]:
        """The most likely kind of each image."""
        return [self.kinds[int(i)] for i in self(pixels).argmax(1)]
