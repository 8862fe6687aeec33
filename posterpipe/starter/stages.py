"""What each starter model learns, and from which pictures.

What belongs here: a class a stage (its batches, its loss, its export). What does not: sizes of the
models (`architectures`), the loop around a step (`train`), the pictures themselves (`world`,
`render`, `captions`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from posterpipe.starter import architectures
from posterpipe.starter.captions import caption
from posterpipe.starter.render import render
from posterpipe.starter.world import Scene, sample_scene


def draw_scenes(rng: np.random.Generator, count: int, shares: dict[str, float]) -> list[Scene]:
    """Random scenes; `shares` gives each style's probability."""
    styles = rng.choice(list(shares), size=count, p=list(shares.values()))
    return [sample_scene(rng, style=str(style)) for style in styles]


def to_pixels(scenes: list[Scene], width: int, height: int) -> Tensor:
    """float32 (batch, 3, height, width) in -1..1."""
    stack = np.stack([np.asarray(render(scene, width, height)) for scene in scenes])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


class Stage(ABC):
    """One model's training. `modules` are saved and resumed by the loop."""

    name: str
    minutes: float
    peak_lr: float
    weight_decay: float = 0.01
    seed: int

    def __init__(self, out: Path, work: Path) -> None:
        self.out = out
        self.work = work
        self.modules: dict[str, nn.Module] = {}
        self.device = torch.device("cpu")

    @abstractmethod
    def build(self, device: torch.device) -> None: ...

    @abstractmethod
    def losses(self, step: int, progress: float) -> dict[str, Tensor]:
        """Named losses of one batch; "loss" is the one that is minimised. Batches depend on the
        stage's seed and the step alone, so that a resumed run sees what it would have seen."""

    @abstractmethod
    def export(self) -> None:
        """Writes the model in the layout that `from_pretrained` reads, fp16."""

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(m.parameters()), "lr": self.peak_lr} for m in self.modules.values()]

    def after_step(self, step: int) -> None:
        """Hook for weight averages."""

    def rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, step])

    def autocast(self) -> torch.autocast:
        """bf16 where it is fast: on recent CPUs a tenth of the time of fp32 for these models."""
        return torch.autocast(self.device.type, torch.bfloat16)


class VaeStage(Stage):
    """Images to latents and back: squared error, which is what PSNR measures, plus a little KL so
    that the latents stay smooth enough for diffusion."""

    name = "vae"
    minutes = 35
    peak_lr = 2e-3
    seed = 101
    batch = 8
    kl_weight = 2e-4
    shares = {"plain": 0.2, "busy": 0.35, "poster": 0.45}

    def build(self, device: torch.device) -> None:
        torch.manual_seed(self.seed)
        self.device = device
        self.vae = architectures.build_vae().to(device)
        self.modules = {"vae": self.vae}

    def losses(self, step: int, progress: float) -> dict[str, Tensor]:
        scenes = draw_scenes(self.rng(step), self.batch, self.shares)
        pixels = to_pixels(scenes, architectures.WIDTH, architectures.HEIGHT).to(self.device)
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + step)
        with self.autocast():
            posterior = self.vae.encode(pixels).latent_dist
            decoded = self.vae.decode(posterior.sample(generator)).sample
        error = (decoded.float() - pixels).pow(2).mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        psnr = 10 * torch.log10(4 / error.detach())
        return {"loss": error + self.kl_weight * kl, "mse": error, "kl": kl, "psnr": psnr}

    def export(self) -> None:
        self.vae.half().save_pretrained(self.out / "vae_only")


STAGES: dict[str, type[Stage]] = {"vae": VaeStage}
