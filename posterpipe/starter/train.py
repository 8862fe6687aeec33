"""Training the starter models from scratch: `python -m posterpipe.starter.train`.

What belongs here: the one training loop all stages share (time-bounded, resumable, atomic saves)
and the command line. What does not: what a stage learns and from which pictures (`stages`).

Every stage has a budget in minutes. Its learning-rate schedule runs over the budget, not over a
number of steps, so that a slow machine and a fast one both end with the schedule complete. Killed
and started again, a stage goes on from its last save with the time it had left.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch

from posterpipe.starter.stages import STAGES, Stage

SAVE_EVERY_SECONDS = 120.0


def learning_rate(progress: float, peak: float, *, warmup: float = 0.02) -> float:
    """Linear warmup, then a cosine to zero; `progress` is the share of the budget used, 0..1."""
    if progress < warmup:
        return peak * max(progress, 1e-4) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min((progress - warmup) / (1 - warmup), 1.0)))


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Run:
    """One stage's training state on disk: model, optimizer, step and seconds spent."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.stage = stage
        self.path = folder / f"{stage.name}.pt"
        # The log is kept with the models: the model cards are written from it.
        self.log = stage.out / "logs" / f"{stage.name}.jsonl"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.step = 0
        self.seconds = 0.0

    def save(self, optimizers: list[torch.optim.Optimizer]) -> None:
        temporary = self.path.with_suffix(".tmp")
        torch.save(
            {
                "modules": {k: m.state_dict() for k, m in self.stage.modules.items()},
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": self.step,
                "seconds": self.seconds,
            },
            temporary,
        )
        os.replace(temporary, self.path)

    def load(self, optimizers: list[torch.optim.Optimizer]) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for key, module in self.stage.modules.items():
            module.load_state_dict(state["modules"][key])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.seconds = state["step"], state["seconds"]
        print(f"{self.stage.name}: resumed at step {self.step}, {self.seconds:.0f} s spent")


def train_stage(stage: Stage, minutes: float, folder: Path) -> None:
    """Trains one stage for what is left of its budget, then exports it into the model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    device = pick_device()
    stage.build(device)
    optimizers = stage.optimizers()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    run = Run(stage, folder)
    run.load(optimizers)
    budget = minutes * 60
    trained = [p for group in groups for p in group["params"]]
    started, before = time.monotonic(), run.seconds
    saved = logged = started
    smoothed: dict[str, float] = {}
    while run.seconds < budget:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = learning_rate(run.seconds / budget, peak)
        losses = stage.losses(run.step, run.seconds / budget)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        stage.after_step(run.step)
        run.step += 1
        now = time.monotonic()
        run.seconds = before + now - started
        for key, value in losses.items():
            v = float(value.detach())
            smoothed[key] = v if key not in smoothed else 0.98 * smoothed[key] + 0.02 * v
        if now - logged > 15 or run.seconds >= budget:
            logged = now
            row = {"step": run.step, "seconds": round(run.seconds, 1), **smoothed}
            with open(run.log, "a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            left = max(budget - run.seconds, 0)
            shown = "  ".join(f"{k} {v:.4f}" for k, v in smoothed.items())
            print(f"{stage.name}: step {run.step}  {shown}  {left:.0f} s left", flush=True)
        if now - saved > SAVE_EVERY_SECONDS:
            saved = now
            run.save(optimizers)
    run.save(optimizers)
    stage.export()
    print(f"{stage.name}: done, {run.step} steps, exported", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; all when none is named")
    parser.add_argument("--minutes", type=float, help="budget of each named stage, in minutes")
    parser.add_argument("--work", type=Path, default=Path("data/store/starter_training"))
    parser.add_argument("--out", type=Path, default=Path("data/models/starter"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or 1)
    for name in arguments.stages or STAGES:
        stage = STAGES[name](arguments.out, arguments.work)
        train_stage(stage, arguments.minutes or stage.minutes, arguments.work)


if __name__ == "__main__":
    main()
