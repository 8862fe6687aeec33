"""`train_sd21_gpu`: Stable Diffusion 2.1 size at 512 px on a GPU, against diffusers' script.

Both sides: random weights of the real size, bf16, 8-bit Adam, batch 1 and 4, the U-Net alone and
with the text encoder. Then what each measure contributes: each is left out, or added, alone. No
rows without a GPU.

`--rehearse` runs every line of it on a tiny model and whatever device there is, so that the command
is known to work before a GPU is paid for; its figures mean nothing and are not filed.
"""

from __future__ import annotations

import itertools
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rows import Row
from benchmarks.training_runs import (
    CAPTION,
    Measured,
    peer_script,
    run_ours,
    run_peer,
    training_set,
)

if TYPE_CHECKING:
    import torch

THESIS_STEPS = 1000
BF16_PEAK_TFLOPS = {"h100": 989, "h200": 989, "a100": 312, "l4": 121, "4090": 165, "3090": 71}
"""Dense bf16, from the makers' data sheets; by a part of the device's name."""


@dataclass(frozen=True)
class Scale:
    """How large the comparison is: pixels a side, batches, steps before and in all."""

    side: int
    batches: tuple[int, ...]
    warm: int
    steps: int


FULL = Scale(side=512, batches=(1, 4), warm=10, steps=50)
REHEARSAL = Scale(side=32, batches=(2,), warm=1, steps=3)

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-6,
    "mixed_precision": "bf16",
    "optimizer": "adamw_8bit",
}
MEASURES: dict[str, dict[str, Any]] = {
    "without channels_last": {"channels_last": False},
    "with compile": {"compile": True},
    "with fused AdamW in place of 8-bit": {"optimizer": "adamw_fused"},
    "with plain AdamW in place of 8-bit": {"optimizer": "adamw"},
    "with a sync each step": {"log_every_steps": 1},
    "with gradient checkpointing": {"gradient_checkpointing": True},
    "with LoRA": {"method": "lora"},
}


def run(*, rehearse: bool = False) -> list[Row]:
    import torch

    if not rehearse and not torch.cuda.is_available():
        return []
    from posterpipe_tests.models import build_tiny_stable_diffusion
    from posterpipe_tests.real_size import build_stable_diffusion

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scale = REHEARSAL if rehearse else FULL
        if rehearse:
            base = build_tiny_stable_diffusion(folder / "base", precision="fp32")
        else:
            base = build_stable_diffusion(folder / "base", base=True, precision="fp32")
        data = training_set(folder / "data", images=16, side=scale.side)
        return list(_rows(folder, base, data, scale))


def _rows(folder: Path, base: Path, data: Path, scale: Scale) -> Iterator[Row]:
    script = peer_script()
    numbers = itertools.count()

    def ours(training: dict[str, Any]) -> Measured:
        work = folder / f"ours-{next(numbers)}"
        return run_ours(work, base, data, scale.side, **{"log_every_steps": scale.warm, **training})

    for batch in scale.batches:
        for text_encoder in (False, True):
            parts = "unet_text_encoder" if text_encoder else "unet"
            name = f"train_sd21_gpu.{parts}.batch{batch}"
            training = {
                **SETTINGS,
                "max_train_steps": scale.steps,
                "train_batch_size": batch,
                "train_text_encoder": text_encoder,
            }
            mine = ours(training)
            speed = mine.steps_per_second(scale.warm)
            peer = None
            if script is not None:
                work = folder / f"peer-{next(numbers)}"
                peer = run_peer(script, work, base, data, scale.side, **training)
            yield from _compared(name, mine, peer, scale.warm)
            yield Row(f"{name}.images", "images/s", round(speed * batch, 2))
            yield Row(f"{name}.thesis_run", "s for 1,000 steps", round(THESIS_STEPS / speed))
            flops = _step_flops(base, batch, scale.side, text_encoder)
            peak = _peak_tflops()
            if peak:
                share = flops * speed / (peak * 1e12)
                yield Row(f"{name}.of_bf16_peak", "%", round(100 * share, 1))
            else:
                yield Row(f"{name}.rate", "TFLOP/s (no peak known)", round(flops * speed / 1e12, 2))
            if text_encoder:
                continue
            for measure, changed in MEASURES.items():
                other = ours({**training, **changed}).steps_per_second(scale.warm)
                words = re.sub(r"[^a-z0-9]+", "_", measure.lower())
                yield Row(
                    f"{name}.{words}", "steps/s", round(other, 3), round(speed, 3), "as above",
                    round(other / speed, 2),
                )  # fmt: skip
            encoding = _vae_seconds(base, batch, scale.side)
            yield Row(f"{name}.vae_at_each_step", "ms saved a step", round(1000 * encoding, 1))


def _compared(name: str, ours: Measured, peer: Measured | None, warm: int) -> Iterator[Row]:
    speed = ours.steps_per_second(warm)
    if peer is None:
        yield Row(name, "steps/s", round(speed, 3), required="needs --peer-script")
        yield Row(f"{name}.memory", "GiB", round(ours.peak_gib, 2))
        return
    theirs = peer.steps_per_second(warm)
    title = "diffusers train_dreambooth.py"
    yield Row(
        name, "steps/s", round(speed, 3), round(theirs, 3), title, round(speed / theirs, 2),
        "ours / peer at least 1.5",
    )  # fmt: skip
    yield Row(
        f"{name}.memory", "GiB", round(ours.peak_gib, 2), round(peer.peak_gib, 2), title,
        round(peer.peak_gib / max(ours.peak_gib, 1e-9), 2), "peer / ours at least 1",
    )  # fmt: skip


def _peak_tflops() -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower()
    return next((peak for part, peak in BF16_PEAK_TFLOPS.items() if part in name), None)


def _step_flops(base: Path, batch: int, side: int, text_encoder: bool) -> float:
    """Floating-point operations of one step: three times those forward, since the backward pass
    computes two products for each of the forward's."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from posterpipe.core.dreambooth.base_model import load_text_encoder, load_unet
    from posterpipe.core.dreambooth.texts import Tokens
    from posterpipe.core.models import best_device

    device = best_device()
    unet: Any = load_unet(base).to(device, torch.bfloat16)
    encoder: Any = load_text_encoder(base).to(device, torch.bfloat16)
    shape = (batch, int(unet.config["in_channels"]), side // 8, side // 8)
    latents = torch.randn(shape, device=device, dtype=torch.bfloat16)
    tokens = Tokens(base)([CAPTION] * batch).to(device)
    timesteps = torch.zeros(batch, dtype=torch.long, device=device)
    with torch.no_grad():
        embeds = encoder(tokens)[0]
        with FlopCounterMode(display=False) as counted:
            if text_encoder:
                encoder(tokens)
            unet(latents, timesteps, embeds)
    flops = 3.0 * counted.get_total_flops()
    del unet, encoder
    torch.cuda.empty_cache()  # the runs are processes of their own
    return flops


def _vae_seconds(base: Path, batch: int, side: int) -> float:
    """What encoding a batch in bf16 takes, as a trainer does that caches no latents."""
    import torch

    from posterpipe.core.dreambooth.base_model import load_vae
    from posterpipe.core.models import best_device

    device = best_device()
    vae: Any = load_vae(base).to(device, torch.bfloat16)
    pixels = torch.randn(batch, 3, side, side, device=device, dtype=torch.bfloat16)
    seconds = 0.0
    with torch.no_grad():
        for times in (3, 20):  # the first ones prepare memory and kernels
            _wait(device)
            started = time.perf_counter()
            for _ in range(times):
                vae.encode(pixels)
            _wait(device)
            seconds = (time.perf_counter() - started) / times
    del vae
    torch.cuda.empty_cache()
    return seconds


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
