"""`train_sd21_gpu`: Stable Diffusion 2.1 size at 512 px on a GPU, against diffusers' script.

Both sides: random weights of the real size, bf16, 8-bit Adam, batch 1 and 4, the U-Net alone and
with the text encoder. Then what each measure contributes: each is left out, or added, alone. No
rows without a GPU.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.rows import Row
from benchmarks.training_runs import Measured, peer_script, run_ours, run_peer, training_set

SIDE = 512
WARM, STEPS = 10, 50
THESIS_STEPS = 1000
BF16_PEAK_TFLOPS = {"h100": 989, "h200": 989, "a100": 312, "l4": 121, "4090": 165, "3090": 71}
"""Dense bf16, from the makers' data sheets; by a part of the device's name."""

SETTINGS: dict[str, Any] = {
    "max_train_steps": STEPS,
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


def run() -> list[Row]:
    import torch

    if not torch.cuda.is_available():
        return []
    from posterpipe_tests.real_size import build_stable_diffusion

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = build_stable_diffusion(folder / "base", base=True, precision="fp32")
        data = training_set(folder / "data", images=16, side=SIDE)
        return list(_rows(folder, base, data))


def _rows(folder: Path, base: Path, data: Path) -> Iterator[Row]:
    script = peer_script()
    for batch in (1, 4):
        for text_encoder in (False, True):
            parts = "unet_text_encoder" if text_encoder else "unet"
            name = f"train_sd21_gpu.{parts}.batch{batch}"
            training = {
                **SETTINGS,
                "train_batch_size": batch,
                "train_text_encoder": text_encoder,
            }
            ours = _ours(folder, base, data, training)
            speed = ours.steps_per_second(WARM)
            peer = None
            if script is not None:
                work = folder / f"peer-{time.monotonic_ns()}"
                peer = run_peer(script, work, base, data, SIDE, **training)
            yield from _compared(name, ours, peer)
            yield Row(f"{name}.images", "images/s", round(speed * batch, 2))
            yield Row(f"{name}.thesis_run", "s for 1,000 steps", round(THESIS_STEPS / speed))
            peak = _peak_tflops()
            flops = _step_flops(base, batch, text_encoder)
            if peak:
                share = flops * speed / (peak * 1e12)
                yield Row(f"{name}.of_bf16_peak", "%", round(100 * share, 1))
            if text_encoder:
                continue
            for measure, changed in MEASURES.items():
                other = _ours(folder, base, data, {**training, **changed})
                words = re.sub(r"[^a-z0-9]+", "_", measure.lower())
                yield Row(
                    f"{name}.{words}",
                    "steps/s",
                    round(other.steps_per_second(WARM), 3),
                    round(speed, 3),
                    "as above",
                    round(other.steps_per_second(WARM) / speed, 2),
                )
            encoding = _vae_seconds(base, batch)
            yield Row(f"{name}.vae_at_each_step", "ms saved a step", round(1000 * encoding, 1))


def _ours(folder: Path, base: Path, data: Path, training: dict[str, Any]) -> Measured:
    work = folder / f"ours-{time.monotonic_ns()}"
    return run_ours(work, base, data, SIDE, **{"log_every_steps": WARM, **training})


def _compared(name: str, ours: Measured, peer: Measured | None) -> Iterator[Row]:
    speed = ours.steps_per_second(WARM)
    if peer is None:
        yield Row(name, "steps/s", round(speed, 3), required="needs --peer-script")
        yield Row(f"{name}.memory", "GiB", round(ours.peak_gib, 2))
        return
    theirs = peer.steps_per_second(WARM)
    title = "diffusers train_dreambooth.py"
    yield Row(
        name, "steps/s", round(speed, 3), round(theirs, 3), title, round(speed / theirs, 2),
        "ours / peer at least 1.5",
    )  # fmt: skip
    yield Row(
        f"{name}.memory", "GiB", round(ours.peak_gib, 2), round(peer.peak_gib, 2), title,
        round(peer.peak_gib / ours.peak_gib, 2), "peer / ours at least 1",
    )  # fmt: skip


def _peak_tflops() -> int | None:
    import torch

    name = torch.cuda.get_device_name().lower()
    return next((peak for part, peak in BF16_PEAK_TFLOPS.items() if part in name), None)


def _step_flops(base: Path, batch: int, text_encoder: bool) -> float:
    """Floating-point operations of one step: three times those forward, since the backward pass
    computes two products for each of the forward's."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from posterpipe.core.dreambooth.base_model import load_text_encoder, load_unet

    unet: Any = load_unet(base).to("cuda", torch.bfloat16)
    encoder: Any = load_text_encoder(base).to("cuda", torch.bfloat16)
    latents = torch.randn(batch, 4, SIDE // 8, SIDE // 8, device="cuda", dtype=torch.bfloat16)
    tokens = torch.zeros(batch, 77, dtype=torch.long, device="cuda")
    timesteps = torch.zeros(batch, dtype=torch.long, device="cuda")
    with torch.no_grad():
        embeds = encoder(tokens)[0]
        with FlopCounterMode(display=False) as counted:
            if text_encoder:
                encoder(tokens)
            unet(latents, timesteps, embeds)
    flops = 3.0 * counted.get_total_flops()
    del unet, encoder
    torch.cuda.empty_cache()
    return flops


def _vae_seconds(base: Path, batch: int) -> float:
    """What encoding a batch in bf16 takes, as a trainer does that caches no latents."""
    import torch

    from posterpipe.core.dreambooth.base_model import load_vae

    vae: Any = load_vae(base).to("cuda", torch.bfloat16)
    pixels = torch.randn(batch, 3, SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for measured in (False, True):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(20 if measured else 3):
                vae.encode(pixels)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
    del vae
    torch.cuda.empty_cache()
    return seconds / 20
