"""The loss between two reports, and how a run finds that it has diverged.

What belongs here: adding the loss up, and what counts as diverged. What does not: each sample's
loss (`objective`), the smoothed loss (`reports`), when it is read (`run`).
"""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from posterpipe.core.dreambooth.learner import Learner
from posterpipe.core.dreambooth.reports import Journal

# Under fp16 a step whose gradients overflow is left out, and the scale of the loss is halved. After
# so many in a row little is left of any scale that training can use: something else is wrong.
_SKIPPED_IN_A_ROW_AT_MOST = 20


class RunningLoss:
    """The sum of the losses since the last report, in this process.

    It stays on the device: reading a loss at every step would make it wait. journal: of the save
    from which the run goes on.
    """

    def __init__(self, accelerator: Accelerator, learner: Learner, journal: Journal) -> None:
        self._accelerator = accelerator
        self._learner = learner
        device = accelerator.device
        self._sum = torch.tensor(journal.loss_sum, device=device)
        self._steps = torch.tensor(float(journal.loss_steps), device=device)
        self._first_bad_step = torch.tensor(math.inf, device=device)

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Adds the loss of a step; a loss or gradient norm that is no number is noted, unless
        fp16's scaler has left that step out. Both float32 () on the device."""
        is_number = torch.isfinite(loss)
        if not self._learner.skips_overflows:
            good = is_number & torch.isfinite(norm)
            earlier = self._first_bad_step.clamp(max=step)
            self._first_bad_step = torch.where(good, self._first_bad_step, earlier)
        self._sum += torch.where(is_number, loss, 0.0)
        self._steps += is_number

    def read_into(self, journal: Journal) -> None:
        """Notes the mean over all processes: each goes on from it where the run is resumed."""
        journal.loss_sum = float(self._accelerator.reduce(self._sum.clone(), "mean"))
        journal.loss_steps = float(self._accelerator.reduce(self._steps.clone(), "mean"))

    def divergence(self, journal: Journal, step: int) -> str | None:
        """What shows, after `step`, that the run learns nothing any more; None while it does. To be
        called in all processes, after `read_into`."""
        bad_step = float(self._accelerator.gather(self._first_bad_step).min())
        if math.isfinite(bad_step):
            return f"the loss or its gradient is no number at step {int(bad_step)}"
        skipped, in_a_row = self._learner.skipped_steps()
        never_learnt = journal.mean_loss is None and not journal.smoothed.weight
        if (
            in_a_row >= _SKIPPED_IN_A_ROW_AT_MOST
            or self._learner.scale() < 1
            or (journal.ended_by and never_learnt)
        ):
            return (
                f"fp16 overflows: {skipped} of the first {step} steps were left out, the "
                f"last {in_a_row} in a row, and nothing is learnt any more"
            )
        return None

    def clear(self, journal: Journal) -> None:
        """Begins anew, after a report."""
        self._sum.zero_()
        self._steps.zero_()
        journal.loss_sum, journal.loss_steps = 0.0, 0.0
