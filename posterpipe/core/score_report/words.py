"""Words and numbers as the report shows them.

What belongs here: formatting, shared by all pages. What does not: any page.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from posterpipe.core.score_report import charts
from posterpipe.core.score_report.data import Row, missing, number, text

DASH = "–"
"""Where there is nothing to show."""

ALIKE = "no spread between prompts"
"""Instead of an interval, which says nothing about other prompts then."""

ROWS_SHOWN = 200
"""Of long lists: the published database has all of them."""

BETTER = {"higher": "higher is better", "lower": "lower is better", "nearer 0": "0 is ideal"}

DECIDED = {"promote": "promoted", "hold": "held", "reject": "rejected"}


def count(row: Row | None, name: str) -> int:
    """A whole number of a row; 0 where there is none."""
    value = number(row[name]) if row else None
    return int(value) if value is not None else 0


def anchor(decision: Row) -> str:
    """Where a row of `gate_decisions` stands on the gate's page."""
    return f"d-{short(decision['decision_id'])}"


def heads(*names: str) -> list[dict[str, Any]]:
    """Column heads; # marks one of numbers."""
    return [{"head": name.lstrip("#"), "num": name.startswith("#")} for name in names]


def code(value: Any) -> Markup:
    """A name as it is written in SQL and settings."""
    return Markup("<code>{}</code>").format(text(value))


def rounded(value: Any, digits: int = 3) -> str:
    """A number in words, whole ones without digits behind the point."""
    known = number(value)
    if known is None:
        return DASH
    return charts.plain(known, 0 if known == int(known) and abs(known) < 1e6 else digits)


def change(value: Any, scale: Any) -> str:
    """A difference, or a ratio (`scale`), which marts store less 1."""
    known = number(value)
    if known is None:
        return DASH
    return f"× {charts.plain(1 + known, 2)}" if scale == "ratio" else charts.signed(known)


def interval(
    row: Row, low: str, high: str, *, sign: bool = False, of: str = "", scale: Any = "difference"
) -> str:
    """The interval in words; `of` is the mean that it belongs to, over `prompts` of the row."""
    bounds = number(row.get(low)), number(row.get(high))
    if bounds[0] is None or bounds[1] is None:
        has_mean = of != "" and number(row.get(of)) is not None
        return ALIKE if has_mean and count(row, "prompts") > 1 else DASH
    if scale == "ratio":
        return f"{change(bounds[0], scale)} to {charts.plain(1 + bounds[1], 2)}"
    show: Callable[[float], str] = charts.signed if sign else charts.plain
    return f"{show(bounds[0])} to {show(bounds[1])}"


def resting(effect: Row | None) -> str:
    """On which prompt a row of `paired_effects` rests, and what it is without that one; "" where on
    none."""
    if effect is None or not (name := text(effect["rests_on"])):
        return ""
    by = effect["scale"]
    without = change(effect["mean_without"], by)
    others = {**effect, "prompts": count(effect, "prompts") - 1}
    span = interval(
        others, "low_95_without", "high_95_without", sign=True, of="mean_without", scale=by
    )
    return f"rests on one prompt, {cut(name, 40)}; without it {without} ({span})"


def moment(value: Any) -> str:
    """Day and minute in UTC; "" for none."""
    if missing(value) or not isinstance(value, dt.datetime):
        return ""
    return f"{value.day} {value:%B %Y, %H:%M} UTC"


def verdict(effect: Row | None) -> str:
    """gain or loss of a row of `paired_effects` where one was found, and one way is better."""
    sides = ("higher", "lower")
    if effect is None or effect["finding"] not in sides or effect["better"] not in sides:
        return ""
    return "gain" if effect["finding"] == effect["better"] else "loss"


def day(value: Any) -> str:
    """The day without its year; "" for none."""
    return "" if missing(value) or not isinstance(value, dt.datetime) else f"{value.day} {value:%b}"


def short(value: Any, length: int = 12) -> str:
    """The beginning of an id."""
    return text(value)[:length]


def cut(value: str, length: int) -> str:
    """A text in one line of so many letters at most."""
    value = " ".join(value.split())
    return value if len(value) <= length else value[: length - 1].rstrip() + "…"


def plural(count: int, word: str) -> str:
    """A count and its word."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def share(value: Any) -> str:
    """A share of 1 in per cent."""
    known = number(value)
    if known is None:
        return DASH
    # Nearly all is not all, and nearly none is not none.
    digits = 1 if 0 < known < 0.005 or 0.995 <= known < 1 else 0
    return f"{100 * known:.{digits}f} %"


def shares(row: Row, low: str, high: str) -> str:
    """An interval of shares of 1 in per cent."""
    bounds = number(row[low]), number(row[high])
    if bounds[0] is None or bounds[1] is None:
        return DASH
    return f"{100 * bounds[0]:.0f} to {100 * bounds[1]:.0f} %"


def first_of(rows: Sequence[Any]) -> str:
    """How many of them a table shows."""
    more = f"The first {ROWS_SHOWN} of {len(rows)}" if len(rows) > ROWS_SHOWN else ""
    return more or f"{len(rows)} in all"
