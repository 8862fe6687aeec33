"""The loss on posters that are never trained on.

What belongs here: measuring it at fixed noise and timesteps, and judging when it stopped falling.
What does not: how its batches are made (`batches.fixed_batches`).

The training loss jumps with the random timesteps and falls also where a model only learns its
posters by heart. This one is of the same noise and timesteps each time, so its curve is smooth, and
it rises when the model overfits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from posterpipe.core.dreambooth.batches import Batch


@torch.no_grad()
def holdout_loss(
    batches: Sequence[Batch], errors_of: Callable[[Batch], Tensor], *, process: int, processes: int
) -> Tensor:
    """This process's share of the mean squared error; over all processes they add up to it.

    errors_of: a batch on the CPU -> float32 (batch,), each sample's squared error.
    """
    total = torch.zeros(())
    for batch in batches[process::processes]:
        total = total + (errors_of(batch).cpu() * batch.weights).sum()
    return total


def lowest(losses: Sequence[float], min_gain: float) -> int:
    """Index of the last loss that was lower than all before it by the share `min_gain`; -1 where
    none is a number."""
    best, index = math.inf, -1
    for place, loss in enumerate(losses):
        if math.isfinite(loss) and (index < 0 or loss < best * (1 - min_gain)):
            best, index = loss, place
    return index


def stopped_falling(losses: Sequence[float], *, patience: int, min_gain: float) -> bool:
    """Whether the last `patience` losses (at least one) brought no new lowest one; those that are
    no number count as not measured."""
    losses = [loss for loss in losses if math.isfinite(loss)]
    return len(losses) - 1 - lowest(losses, min_gain) >= patience
