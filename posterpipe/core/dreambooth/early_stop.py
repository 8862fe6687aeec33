"""Early stopping: a run ends when the held-out loss stopped falling, with its best weights.

What belongs here: that decision, and keeping the weights with the lowest loss until the run has
ended. What does not: measuring the loss (`holdout`), when it is measured (`run`), the saves from
which a run goes on (`saves`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path

from torch import Tensor

from posterpipe.core.dreambooth.guards import writing
from posterpipe.core.dreambooth.holdout import lowest, stopped_falling
from posterpipe.core.dreambooth.reports import Journal
from posterpipe.core.dreambooth.saves import Save, keep_only, save_of_step, saved_steps, write_save
from posterpipe.training_settings import TrainingSettings


def stops_early(settings: TrainingSettings, journal: Journal) -> bool:
    """Whether the held-out loss has not fallen for as long as the settings are patient."""
    losses = [measured.loss for measured in journal.holdout]
    patience, min_gain = settings.early_stop_patience, settings.early_stop_min_gain
    return patience is not None and stopped_falling(losses, patience=patience, min_gain=min_gain)


def lowest_step(journal: Journal, until: float = math.inf) -> int | None:
    """After which step the held-out loss was lowest, of those up to `until`; None before it was
    measured. What counts as too small a gain decides when a run ends, not which weights it keeps.
    """
    place = lowest([measured.loss for measured in journal.holdout if measured.step <= until], 0.0)
    return None if place < 0 else journal.holdout[place].step


class LowestWeights:
    """The trained weights at the lowest held-out loss, of which early stopping makes the model.

    folder: for those of this run. Weights stay in memory until the next save: a run that is killed
    before trains them again, and on the disk each would take as long as a save.
    """

    def __init__(self, folder: Path, checkpoint_id: str, log: Callable[[str], None]) -> None:
        self._folder = folder
        self._checkpoint_id = checkpoint_id
        self._log = log
        self._unsaved: tuple[int, dict[str, dict[str, Tensor]]] | None = None

    def keep(self, step: int, weights: Callable[[], dict[str, dict[str, Tensor]]]) -> None:
        """Keeps the weights after `step` in place of those since the last save."""
        self._unsaved = None  # gone before the others are there
        self._unsaved = step, weights()

    def write(self) -> None:
        """Writes those since the last save, if any; to be called before a save, whose journal
        names their step."""
        if self._unsaved is None:
            return
        step, weights = self._unsaved
        with writing(f"the save of step {step}", self._folder):
            write_save(
                self._folder,
                step=step,
                checkpoint_id=self._checkpoint_id,
                tensors=weights,
                state={},
                keep=None,
            )
        self._unsaved = None

    def tidy(self, journal: Journal, saves: Collection[int]) -> None:
        """Removes the weights that can no longer be the model's, neither as the run goes on nor
        where it is resumed from one of its `saves`: on a GPU the loss may then not get as low."""
        keep_only(self._folder, {lowest_step(journal, until) for until in (math.inf, *saves)})

    def best(self, journal: Journal) -> Save | None:
        """Of the weights that were written, those with the lowest held-out loss that are whole;
        None where those of the last step are better, or nothing is left."""
        kept, last = saved_steps(self._folder), journal.reports[-1].step
        for measured in sorted(journal.holdout, key=lambda one: one.loss):  # of equal ones, first
            if measured.step == last:
                return None
            if measured.step in kept:
                save = save_of_step(
                    self._folder, measured.step, checkpoint_id=self._checkpoint_id, log=self._log
                )
                if save is not None:
                    return save
        return None
