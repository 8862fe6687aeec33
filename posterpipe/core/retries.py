"""How often, and after which pauses, what failed is tried again.

What belongs here: the number of tries, the pauses between them, and a time as the reasons for them
tell it. What does not: what is tried, and whether it failed (`arrivals`, `retraining`,
`defs.retries`, `defs.sweep`).
"""

from __future__ import annotations

import datetime as dt

ATTEMPTS = 2
"""How often the same is tried: what failed is tried once more. Of an asset, the same inputs or
source; of a training, the same training set and settings."""

FIRST_PAUSE_SECONDS = 3600.0
"""What may pass by itself, such as files that could not be read, is tried again after this long,
and then after twice as long each time, up to LONGEST_PAUSE_SECONDS."""

LONGEST_PAUSE_SECONDS = 86_400.0

ROOM_PAUSE_SECONDS = 300.0
"""The first pause where a disk was full: people make room at once, and to look costs little."""


def pause_after(tried_seconds: float, first: float = FIRST_PAUSE_SECONDS) -> float:
    """Seconds to wait before something is tried once more that was tried in vain for so long."""
    return min(max(tried_seconds, first), LONGEST_PAUSE_SECONDS)


def clock(moment: float) -> str:
    """A time in seconds since 1970, for people."""
    return dt.datetime.fromtimestamp(moment, tz=dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
