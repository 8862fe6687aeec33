"""Whether a training is due.

What belongs here: what differs between two training sets, and the decision to train or not, with
its reason in words. What does not: training (`dreambooth`), building the set (`training_set`), and
where the facts come from and how a run is requested (`defs.retraining`).
"""

from __future__ import annotations

import csv
import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posterpipe.core.retries import ATTEMPTS
from posterpipe.core.training.training_set import CSV_NAME
from posterpipe.settings import AutomationSettings

DAY = dt.timedelta(days=1)


@dataclass(frozen=True)
class Changes:
    """How a training set differs from another one, in images."""

    new: int
    removed: int
    recaptioned: int

    @property
    def total(self) -> int:
        """Images that came, went or got another caption."""
        return self.new + self.removed + self.recaptioned

    def __str__(self) -> str:
        parts = [
            f"{count} {word}"
            for count, word in (
                (self.new, "new"),
                (self.removed, "removed"),
                (self.recaptioned, "with another caption"),
            )
            if count
        ]
        return ", ".join(parts) or "nothing but the order"


@dataclass(frozen=True)
class Situation:
    """Everything that the decision rests on."""

    current: str
    """Version of the training set as it is; "" before the first one."""
    trained: str
    """Version that the latest checkpoint was trained on; "" without a checkpoint."""
    other_reason: str = ""
    """Why the checkpoint does not hold whatever its training set (it is missing, its code, settings
    or base model changed); "" when it does."""
    changes: Changes | None = None
    """Between the two versions; None where one of them cannot be read any more."""
    changed_at: dt.datetime | None = None
    """Since when the training set differs from the one that was trained on."""
    failed_checks: Sequence[str] = ()
    """Blocking checks of the training set, and of what it is made from, that did not pass."""
    unreadable: str = ""
    """Why posters or captions cannot be read now, or not all, and what to do; "" when they can."""
    running: str = ""
    """The run that is training; "" for none."""
    failed_runs: Sequence[str] = ()
    """Runs that the schedule started for this very training, and that failed."""
    canceled_run: str = ""
    """One that somebody canceled."""


@dataclass(frozen=True)
class Decision:
    """Whether to train now, and why (not)."""

    train: bool
    reason: str


def decide(situation: Situation, settings: AutomationSettings, now: dt.datetime) -> Decision:
    """Whether to train: when there is a reason, it is worth it, and nothing stands in the way.

    A checkpoint that is missing or was made by other code, settings or base model is always worth
    it; other posters and captions are when `min_new_posters` of them changed, or when the oldest
    change waits for `max_age_days`.
    """
    if not situation.current:
        return Decision(False, "there is no training set yet")
    worth, reason = _worth(situation, settings, now)
    if not worth:
        return Decision(False, reason)
    obstacle = _obstacle(situation)
    return Decision(False, f"{reason}, but {obstacle}") if obstacle else Decision(True, reason)


def _worth(
    situation: Situation, settings: AutomationSettings, now: dt.datetime
) -> tuple[bool, str]:
    if situation.other_reason:
        return True, situation.other_reason
    if situation.current == situation.trained:
        return False, f"the checkpoint was trained on this training set ({situation.current[:8]})"
    least = settings.min_new_posters
    changes = situation.changes
    if changes is None:
        return True, "the training set changed, and the one that was trained on is gone"
    if changes.total >= least:
        return True, f"the training set changed: {changes} (at least {least} are worth a training)"
    age = now - situation.changed_at if situation.changed_at else dt.timedelta()
    days = f"{age / DAY:.1f}"
    what = f"the training set changed: {changes}, the first {days} days ago"
    if situation.changed_at and age >= settings.max_age_days * DAY:
        return True, f"{what} (after {settings.max_age_days:g} days even few are enough)"
    return False, f"{what}; waiting for {least} changes or {settings.max_age_days:g} days"


def _obstacle(situation: Situation) -> str:
    if situation.running:
        return f"the run {situation.running[:8]} is training"
    if situation.unreadable:
        return situation.unreadable
    if situation.failed_checks:
        return f"a blocking check has not passed: {', '.join(situation.failed_checks)}"
    by_hand = "start the job `retrain` by hand"
    if situation.canceled_run:
        run = situation.canceled_run[:8]
        return f"its run {run} was canceled: {by_hand}, or change something"
    if len(situation.failed_runs) >= ATTEMPTS:
        runs = ", ".join(run[:8] for run in situation.failed_runs)
        return f"it failed {len(situation.failed_runs)} times (runs {runs}): mend it and {by_hand}"
    return ""


def differing_since(
    versions: Sequence[tuple[str, dt.datetime]], trained: str
) -> dt.datetime | None:
    """Since when a training set differs from the version `trained`; None when it does not.

    `versions`: each time that it was made, with its version, the latest first. A change that was
    taken back in between starts anew.
    """
    since = None
    for version, made_at in versions:
        if version == trained:
            break
        since = made_at
    return since


def compare(trained: Path, current: Path) -> Changes | None:
    """What differs between the training sets in two folders; None where one cannot be read."""
    before, after = captions_in(trained), captions_in(current)
    if before is None or after is None:
        return None
    shared = before.keys() & after.keys()
    return Changes(
        new=len(after.keys() - shared),
        removed=len(before.keys() - shared),
        recaptioned=sum(before[name] != after[name] for name in shared),
    )


def captions_in(training_set: Path) -> dict[str, str] | None:
    """Captions by file name, which holds the hash of the image; None where they cannot be read."""
    try:
        with open(training_set / CSV_NAME, encoding="utf-8", newline="") as file:
            return {row["file_name"]: row["caption"] for row in csv.DictReader(file)}
    except (OSError, KeyError, UnicodeDecodeError, csv.Error):
        return None
