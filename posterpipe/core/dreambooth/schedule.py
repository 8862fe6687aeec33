"""The learning rate as a pure function of the step.

What belongs here: the schedules. What does not: who applies them (`train`).
"""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]


def learning_rate(
    step: int, *, peak: float, schedule: Schedule, warmup_steps: int, total_steps: int
) -> float:
    """The rate of optimizer step `step`, counted from 0; in 0..`peak`.

    The formulas of `diffusers.optimization.get_scheduler`, so that curves can be compared: warmup
    rises linearly from 0, `constant` ignores it, `linear` falls to 0 and `cosine` follows half a
    cosine to 0 (Loshchilov & Hutter 2017, arXiv:1608.03983).
    """
    if schedule == "constant":
        return peak
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps)
    if schedule == "constant_with_warmup":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, 1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
