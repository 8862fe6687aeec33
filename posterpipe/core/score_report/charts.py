"""Charts as inline SVG.

What belongs here: scales, and functions from numbers to markup. What does not: where the numbers
come from (`data`) and their explanation in words (the templates).

Places along x are percentages and along y pixels: a chart takes the width it is given while its
letters keep their size, so that the same markup serves a phone, a screen and paper. Colours are CSS
classes (`report.css`), so that it serves light and dark as well. Whole charts have a title and a
description for screen readers; marks inside table rows have none, since the numbers stand beside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from markupsafe import Markup

from posterpipe.core.variants import LABELS

ROW_HEIGHT = 30
AXIS_HEIGHT = 22
PLOT_HEIGHT = 280
"""Pixels."""
_TOP, _BOTTOM = 18, 44

_CROWD = 8
"""Points of a chart, beyond which there is no room for each one's number and label."""


def variant_class(variant: str) -> str:
    """The CSS class that gives a variant its colour and mark."""
    return f"v-{variant}" if variant in LABELS else "v-other"


def is_known(value: float | None) -> TypeGuard[float]:
    """Whether there is a finite number."""
    return value is not None and math.isfinite(value)


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, with a true minus."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("+-")


def plain(value: float, digits: int = 3) -> str:
    """A number, with a true minus."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "−" if float(text) else "")


@dataclass(frozen=True)
class Scale:
    """Numbers from `low` to `high` on a line from `start` to `end`, and where its ticks are."""

    low: float
    high: float
    ticks: tuple[float, ...]
    start: float = 0.0
    end: float = 100.0

    def at(self, value: float) -> float:
        """The place of a number; outside the scale it is the nearest end."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * min(1.0, max(0.0, share))

    def label(self, value: float, *, sign: bool = False) -> str:
        """A tick in words, with as many digits as the ticks need."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        # 0.25 needs one digit more than its order says.
        if not math.isclose(round(step, digits), step):
            digits += 1
        return signed(value, digits) if sign else plain(value, digits)


def nice_scale(
    values: Iterable[float | None],
    *,
    include: Sequence[float] = (),
    within: tuple[float, float] = (-math.inf, math.inf),
    ticks: int = 5,
    start: float = 0.0,
    end: float = 100.0,
) -> Scale:
    """A scale that holds all numbers and ends on round ones. Missing numbers do not count.

    `within`: the range of the quantity, which the scale does not leave, say (0, 1) of a share.
    """
    known = [float(value) for value in [*values, *include] if is_known(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    if high - low < 1e-9:
        pad = abs(high) * 0.1 or 0.1
        low, high = max(low - pad, within[0]), min(high + pad, within[1])
    rough = (high - low) / max(1, ticks - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= rough - 1e-12)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = tuple(round(n * step, 12) for n in range(first, last + 1))
    return Scale(marks[0], marks[-1], marks, start, end)


def row_scale(
    values: Iterable[float | None],
    *,
    include: Sequence[float] = (),
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Scale:
    """A scale for marks in table rows, with room for the marks at both ends."""
    return nice_scale(values, include=include, within=within, ticks=4, start=6.0, end=94.0)


def _svg(height: int, css: str, *parts: str | Markup, hidden: bool = True) -> Markup:
    inside = Markup("").join(Markup(part) for part in parts)
    return Markup('<svg class="{}" width="100%" height="{}"{}>{}</svg>').format(
        css, height, Markup(' aria-hidden="true" focusable="false"') if hidden else "", inside
    )


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return Markup('<line class="{}" x1="{}%" y1="{}" x2="{}%" y2="{}"/>').format(
        css, _n(x1), _n(y1), _n(x2), _n(y2)
    )


def _mark(x: float, y: float, variant: str, *, size: float = 5.5) -> Markup:
    """Filled for a plain variant, hollow with the negative prompt: not by colour alone."""
    return Markup('<circle class="mark {}" cx="{}%" cy="{}" r="{}"/>').format(
        variant_class(variant), _n(x), _n(y), _n(size)
    )


def _text(x: float, y: float, text: str, css: str, anchor: str = "middle") -> Markup:
    return Markup('<text class="{}" x="{}%" y="{}" text-anchor="{}">{}</text>').format(
        css, _n(x), _n(y), anchor, text
    )


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def interval_row(
    estimate: float | None,
    low: float | None,
    high: float | None,
    scale: Scale,
    *,
    variant: str = "",
    zero: float | None = None,
) -> Markup:
    """A dot with its interval, as a cell of a table row; empty without an estimate."""
    middle = ROW_HEIGHT / 2
    parts = [_line(scale.at(t), 0, scale.at(t), ROW_HEIGHT, "grid") for t in scale.ticks]
    if zero is not None:
        parts.append(_line(scale.at(zero), 0, scale.at(zero), ROW_HEIGHT, "zero"))
    if is_known(estimate):
        if is_known(low) and is_known(high):
            css = f"whisker {variant_class(variant)}"
            ends = scale.at(low), scale.at(high)
            parts.append(_line(ends[0], middle, ends[1], middle, css))
            parts += [_line(end, middle - 4, end, middle + 4, css) for end in ends]
        parts.append(_mark(scale.at(estimate), middle, variant))
    return _svg(ROW_HEIGHT, "row-plot", *parts)


def dots_row(
    values: Sequence[float], mean: float | None, scale: Scale, *, variant: str = ""
) -> Markup:
    """One dot a value and a bar from zero to their mean, as a cell of a table row. Without the
    colour of a gain or a loss: these are not found by a few values."""
    middle = ROW_HEIGHT / 2
    parts = [_line(scale.at(t), 0, scale.at(t), ROW_HEIGHT, "grid") for t in scale.ticks]
    parts.append(_line(scale.at(0), 0, scale.at(0), ROW_HEIGHT, "zero"))
    if is_known(mean):
        parts.append(_line(scale.at(0), middle, scale.at(mean), middle, "effect"))
    parts += [
        Markup('<circle class="dot {}" cx="{}%" cy="{}" r="3"/>').format(
            variant_class(variant), _n(scale.at(value)), _n(middle)
        )
        for value in values
        if is_known(value)
    ]
    return _svg(ROW_HEIGHT, "row-plot", *parts)


def axis_row(scale: Scale, *, sign: bool = False) -> Markup:
    """The ticks below (or above) a column of `interval_row`s."""
    return _svg(
        AXIS_HEIGHT,
        "row-axis",
        *(_text(scale.at(t), 14, scale.label(t, sign=sign), "tick") for t in scale.ticks),
    )


def share_bar(share: float | None, *, css: str = "") -> Markup:
    """A bar from 0 to 1, as a cell of a table row."""
    return stacked_bar([(share, f"fill {css}")] if is_known(share) else [])


def stacked_bar(shares: Sequence[tuple[float, str]]) -> Markup:
    """Shares of 1 with their CSS classes, one after the other, as a cell of a table row."""
    parts = [Markup('<rect class="track" x="0" y="11" width="100%" height="8"/>')]
    start = 0.0
    for share, css in shares:
        end = min(1.0, start + share)
        parts.append(
            Markup('<rect class="{}" x="{}%" y="11" width="{}%" height="8"/>').format(
                css, _n(100 * start), _n(100 * (end - start))
            )
        )
        start = end
    return _svg(ROW_HEIGHT, "row-plot", *parts)


@dataclass(frozen=True)
class Point:
    """A measured number of a chart, with its interval where it has one."""

    label: str
    """Along x; a | breaks the line."""
    value: float | None
    low: float | None = None
    high: float | None = None
    variant: str = ""
    note: str = ""
    """What stands above the mark beside the number: a decision, say."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its ends; None where one is not known."""
        return (self.low, self.high) if is_known(self.low) and is_known(self.high) else None


def _frame(
    name: str, title: str, description: str, scale: Scale, area: Markup, unit: str
) -> Markup:
    """A plot with its scale at the left, outside the part that stretches."""
    ticks = Markup("").join(
        Markup('<text class="tick" x="38" y="{}" text-anchor="end">{}</text>').format(
            _n(scale.at(t) + 4), scale.label(t)
        )
        for t in scale.ticks
    )
    return Markup(
        '<div class="plot"><svg class="plot-axis" width="44" height="{height}" aria-hidden="true" '
        'focusable="false">{ticks}<text class="unit" x="0" y="10">{unit}</text></svg>'
        '<svg class="plot-area" width="100%" height="{height}" role="img" '
        'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{title}</title>'
        '<desc id="{name}-desc">{description}</desc>{area}</svg></div>'
    ).format(
        name=name, title=title, description=description, area=area, ticks=ticks, unit=unit,
        height=PLOT_HEIGHT,
    )  # fmt: skip


def _columns(count: int) -> list[float]:
    return [100 * (index + 0.5) / count for index in range(count)]


def points_chart(
    name: str,
    title: str,
    points: Sequence[Point],
    *,
    beside: Sequence[Point] = (),
    reference: Point | None = None,
    unit: str = "",
    include: Sequence[float] = (),
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Markup:
    """Points with intervals from left to right, joined by a line: growth, or a trend.

    `name`: unique on the page. `beside`: a second series on the same places, drawn as squares and
    without intervals (the thesis's). `reference`: a level across the chart, with its interval as
    a band. `within`: as of `nice_scale`.
    """
    everything = [*points, *beside, *([reference] if reference else [])]
    numbers = [n for p in everything for n in (p.value, p.low, p.high)]
    scale = nice_scale(
        numbers, include=include, within=within, start=PLOT_HEIGHT - _BOTTOM, end=_TOP
    )
    parts = [_line(0, scale.at(t), 100, scale.at(t), "grid") for t in scale.ticks]
    if reference is not None:
        parts += _reference_band(reference, scale)
    places = _columns(max(1, len(points)))
    parts += _joined(places, points, scale, "join")
    parts += _joined(places, beside, scale, "join beside")
    parts += _beside_marks(places, beside, scale)
    parts += _point_marks(places, points, scale)
    described = "; ".join(_tooltip(point) for point in [*points, *beside])
    if reference is not None:
        described += f". Level: {_tooltip(reference)}"
    return _frame(name, title, described + ".", scale, Markup("").join(parts), unit)


def _reference_band(reference: Point, scale: Scale) -> list[Markup]:
    if not is_known(reference.value):
        return []
    parts = []
    if reference.interval is not None:
        bottom, top = (scale.at(end) for end in reference.interval)
        parts.append(
            Markup('<rect class="band" x="0" y="{}" width="100%" height="{}"/>').format(
                _n(top), _n(bottom - top)
            )
        )
    level = scale.at(reference.value)
    parts.append(_line(0, level, 100, level, f"level {variant_class(reference.variant)}"))
    parts.append(_text(99.5, level - 6, reference.label, "value quiet", "end"))
    return parts


def _beside_marks(places: Sequence[float], beside: Sequence[Point], scale: Scale) -> list[Markup]:
    parts = []
    for x, point in zip(places, beside, strict=False):
        if not is_known(point.value):
            continue
        y = scale.at(point.value)
        # A percentage cannot be moved by half a square; an inner svg has its own origin.
        parts.append(
            Markup(
                '<svg x="{}%" y="{}" overflow="visible"><rect class="square" x="-5" y="-5" '
                'width="10" height="10"/></svg>'
            ).format(_n(x), _n(y))
        )
        parts.append(_text(x, y + 20, plain(point.value, 2), "value quiet"))
    return parts


def _point_marks(places: Sequence[float], points: Sequence[Point], scale: Scale) -> list[Markup]:
    """With their intervals, numbers, notes and labels. Of a crowd, no numbers and few labels: they
    would run into each other."""
    crowded = len(points) > _CROWD
    bottom = scale.at(scale.low)
    following = [*(point.value for point in points[1:]), None]
    parts = []
    for index, (x, point, after) in enumerate(zip(places, points, following, strict=True)):
        if is_known(point.value):
            y = scale.at(point.value)
            if point.interval is not None:
                low, high = (scale.at(end) for end in point.interval)
                parts.append(_line(x, low, x, high, f"whisker {variant_class(point.variant)}"))
            parts.append(_mark(x, y, point.variant, size=4 if crowded else 6))
            if not crowded:
                # On the side where the line is not, so that the number stays clear of it.
                rises = is_known(after) and after > point.value
                side, anchor = (-1.6, "end") if rises else (1.6, "start")
                parts.append(_text(x + side, y - 9, plain(point.value, 2), "value", anchor))
            if point.note:
                parts.append(_text(x, _TOP - 6, point.note, "note"))
        if not crowded or index % math.ceil(len(points) / _CROWD) == 0:
            for line, text in enumerate(point.label.split("|")):
                parts.append(_text(x, bottom + 20 + 16 * line, text, "label"))
    return parts


def _joined(
    places: Sequence[float], points: Sequence[Point], scale: Scale, css: str
) -> list[Markup]:
    known = [
        (x, scale.at(point.value))
        for x, point in zip(places, points, strict=False)
        if is_known(point.value)
    ]
    return [_line(*one, *two, css) for one, two in itertools.pairwise(known)]


def _tooltip(point: Point) -> str:
    label = point.label.replace("|", " ")
    if not is_known(point.value):
        return f"{label}: no score"
    text = f"{label}: {plain(point.value)}"
    if point.interval is not None:
        low, high = point.interval
        text += f" ({plain(low)} to {plain(high)})"
    return text + (f", {point.note}" if point.note else "")


_BINS = 32
"""Bars of a strip."""


def histogram(
    name: str,
    title: str,
    groups: Sequence[tuple[str, Sequence[float], str]],
    *,
    limit: float | None = None,
    limit_label: str = "",
) -> Markup:
    """How numbers of several groups spread, one strip a group on a common scale.

    `groups`: label, numbers, CSS class. `limit`: a line through all strips.
    """
    numbers = [value for _, values, _ in groups for value in values]
    scale = nice_scale([*numbers, limit], start=2, end=98)
    strip, head = 66, 18
    height = head + strip * len(groups) + AXIS_HEIGHT
    floor = height - AXIS_HEIGHT
    parts = [_line(scale.at(t), head, scale.at(t), floor, "grid") for t in scale.ticks]
    width = (scale.high - scale.low) / _BINS
    told = []
    for index, (label, values, css) in enumerate(groups):
        known = [value for value in values if is_known(value)]
        counts = [0] * _BINS
        for value in known:
            counts[min(_BINS - 1, int((value - scale.low) / width))] += 1
        base = head + strip * (index + 1) - 6
        most = max([1, *counts])
        for place, count in enumerate(counts):
            if count:
                tall = max(2.0, 30 * count / most)
                parts.append(
                    Markup(
                        '<rect class="bin {}" x="{}%" y="{}" width="{}%" height="{}"/>'
                    ).format(
                        css, _n(scale.at(scale.low + place * width) + 0.15), _n(base - tall),
                        _n((scale.end - scale.start) / _BINS - 0.3), _n(tall),
                    )
                )  # fmt: skip
        parts.append(_line(scale.start, base, scale.end, base, "ground"))
        parts.append(_text(scale.start, base - 42, f"{label} · {len(known)}", "label", "start"))
        if known:
            middle = sorted(known)[len(known) // 2]
            told.append(
                f"{label}: {len(known)} values from {plain(min(known))} to {plain(max(known))}, "
                f"median {plain(middle)}"
            )
    if is_known(limit):
        x = scale.at(limit)
        parts.append(_line(x, head - 4, x, floor, "limit"))
        parts.append(_text(x, head - 7, limit_label, "note", "end" if x > 60 else "start"))
        told.append(f"{limit_label}: {plain(limit)}")
    parts += [_text(scale.at(t), height - 6, scale.label(t), "tick") for t in scale.ticks]
    return Markup(
        '<svg class="strips" width="100%" height="{height}" role="img" '
        'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{title}</title>'
        '<desc id="{name}-desc">{told}.</desc>{parts}</svg>'
    ).format(name=name, title=title, told="; ".join(told), parts=Markup("").join(parts),
             height=height)  # fmt: skip
