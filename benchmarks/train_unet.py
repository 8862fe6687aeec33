"""`train_unet`: steps per second of the starter model, the U-Net alone, against diffusers' script.

Both sides: 64 px, batch 8, fp32, AdamW, the same posters. They take turns, so that noise meets both
alike. A second comparison gives the script our random numbers and compares the losses.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rows import Row
from benchmarks.training_runs import in_fp32, peer_script, run_ours, run_peer, training_set
from posterpipe.settings import default_root

SIDE = 64
WARM, STEPS, ROUNDS = 10, 60, 5
COMPARED_STEPS = 20
SETTINGS: dict[str, Any] = {
    "train_batch_size": 8,
    "max_train_steps": STEPS,
    "learning_rate": 1e-5,
    "mixed_precision": "fp32",
}


def run(
    name: str = "train_unet", *, train_text_encoder: bool = False, required: float = 1.3
) -> list[Row]:
    script = peer_script()
    training = {**SETTINGS, "train_text_encoder": train_text_encoder}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = in_fp32(default_root() / "data" / "models" / "starter" / "base", folder / "base")
        data = training_set(folder / "data", images=48, side=SIDE)
        ours, peers = [], []
        for number in range(ROUNDS):
            measured = run_ours(
                folder / f"ours-{number}",
                base,
                data,
                SIDE,
                **training,
                optimizer="adamw_fused",
                log_every_steps=WARM,
            )
            ours.append(measured.steps_per_second(WARM))
            if script is not None:
                measured = run_peer(
                    script,
                    folder / f"peer-{number}",
                    base,
                    data,
                    SIDE,
                    **training,
                    optimizer="adamw",
                )
                peers.append(measured.steps_per_second(WARM))
        rows = [_row(name, ours, peers, required)]
        if script is not None:
            rows.append(_losses(name, folder, base, data, training, script))
    return rows


def _row(name: str, ours: list[float], peers: list[float], required: float) -> Row:
    mine = statistics.median(ours)
    if not peers:
        return Row(name, "steps/s", round(mine, 2), required="needs --peer-script")
    peer = statistics.median(peers)
    return Row(
        name, "steps/s", round(mine, 2), round(peer, 2), "diffusers train_dreambooth.py",
        round(mine / peer, 2), f"ours / peer at least {required}",
    )  # fmt: skip


def _losses(
    name: str, folder: Path, base: Path, data: Path, training: dict[str, Any], script: Path
) -> Row:
    short = {**training, "max_train_steps": COMPARED_STEPS, "optimizer": "adamw"}
    ours = run_ours(folder / "ours-losses", base, data, SIDE, **short, log_every_steps=1)
    peer = run_peer(script, folder / "peer-losses", base, data, SIDE, **short, same_draws=True)
    difference = max(abs(a - b) for a, b in zip(ours.losses, peer.losses, strict=True))
    return Row(
        f"{name}.loss_difference", f"of {COMPARED_STEPS} losses", float(f"{difference:.2g}"),
        required="at most 1e-5",
    )  # fmt: skip
