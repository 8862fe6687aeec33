"""What can go wrong in a training run.

What belongs here: one exception class a kind of trouble that a caller may want to tell apart. What
does not: the sentences themselves, which name the file or setting where the trouble is found.
"""

from __future__ import annotations


class TrainingError(Exception):
    """A training run cannot go on. The message names the file or setting and says what to do."""


class TrainingSetError(TrainingError):
    """The training set cannot be read: its folder, its CSV, or one of its images."""


class BaseModelError(TrainingError):
    """The base model is missing, broken, or of a kind that cannot be trained here."""


class TrainingDiverged(TrainingError):
    """The loss is no longer a number, or its gradients always overflow. The message names the step
    and the last good save."""


class TrainingStopped(TrainingError):
    """The run was asked to stop and has saved; started again, it goes on where it stopped."""
