"""What a check found.

What belongs here: `Finding`, and what all that make one need. What does not: anything about posters
or images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    passed: bool
    summary: str
    """One sentence: what is there and what should be."""
    remedy: str
    """What to do where it did not pass."""
    expected: int | float | str
    """The limit, e.g. `at most 0.25`."""
    actual: int | float | str
    offenders: pd.DataFrame
    """Everything that counts against it, named; also where it is within the limit."""
    numbers: Mapping[str, int | float] = field(default_factory=dict)
    """Further numbers, worth a curve over time."""

    @property
    def description(self) -> str:
        """The summary, and the remedy where one is needed."""
        return self.summary if self.passed else f"{self.summary}: {self.remedy}"


def share_of(part: int, whole: int) -> float:
    """How large a part is, 0 to 1; 0 where there is nothing."""
    return part / whole if whole else 0.0
