"""Scales hold their numbers, marks stand where they should, charts speak to screen readers."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posterpipe.core.score_report import charts
from posterpipe.core.score_report.words import share

numbers = st.floats(-1e6, 1e6).map(lambda value: round(value, 6))


@given(st.lists(numbers, min_size=1, max_size=20))
def test_a_scale_holds_all_numbers_and_ends_on_ticks(values: list[float]) -> None:
    scale = charts.nice_scale(values)
    slack = 1e-8 * (scale.high - scale.low)  # a hair beyond a tick asks for no further one
    assert scale.low <= min(values) + slack and scale.high >= max(values) - slack
    assert scale.ticks[0] == scale.low and scale.ticks[-1] == scale.high
    assert 2 <= len(scale.ticks) <= 12
    assert all(scale.start <= scale.at(value) <= scale.end for value in values)


def test_the_scale_of_a_share_ends_at_0_and_1() -> None:
    for values in ([1.0], [1.0, 1.0], [0.0], [0.93, 1.0], [0.0, 0.02]):
        for scale in (
            charts.nice_scale(values, within=(0, 1)),
            charts.row_scale(values, within=(0, 1)),
        ):
            assert scale.low >= 0 and scale.high <= 1 and scale.low < scale.high
    points = [charts.Point("one", 1.0), charts.Point("two", 1.0)]
    assert "1.10" not in charts.points_chart("shares", "Shares", points, within=(0, 1))
    assert charts.nice_scale([1.0]).high > 1


def test_ticks_are_written_apart() -> None:
    for values in ([0.249, 0.375], [0, 1], [-0.02, 0.013], [0.7, 0.71], [-250, 990]):
        scale = charts.nice_scale(values)
        labels = [scale.label(tick) for tick in scale.ticks]
        assert len(set(labels)) == len(labels), labels
        read = [float(label.replace("−", "-")) for label in labels]
        assert read == pytest.approx(list(scale.ticks)), labels


def test_missing_numbers_make_no_scale_and_no_mark() -> None:
    scale = charts.nice_scale([None, math.nan, math.inf])
    assert (scale.low, scale.high) == (0.0, 1.0)
    assert "circle" not in charts.interval_row(None, None, None, scale)
    alone = charts.interval_row(0.5, None, math.nan, scale, variant="sd")
    assert "circle" in alone and "whisker" not in alone


def test_marks_stand_in_proportion() -> None:
    scale = charts.Scale(0, 1, (0, 0.5, 1))
    row = charts.interval_row(0.5, 0.25, 0.75, scale, variant="dreambooth", zero=0)
    assert 'cx="50%"' in row and 'class="mark v-dreambooth"' in row
    assert 'class="whisker v-dreambooth" x1="25%" y1="15" x2="75%" y2="15"' in row


def test_variants_differ_in_more_than_colour_and_unknown_ones_have_a_class() -> None:
    assert charts.variant_class("sd_negative") == "v-sd_negative"
    assert charts.variant_class('"><script>') == "v-other"


def test_a_chart_tells_its_numbers_in_words() -> None:
    chart = charts.points_chart(
        "one",
        "Growth <of> all",
        [
            charts.Point("Base", 0.5, 0.4, 0.6, "sd"),
            charts.Point("Fine-|tuned", None, variant="dreambooth"),
            charts.Point("Last", 0.7, 0.65, 0.75, "dreambooth", "promoted"),
        ],
        reference=charts.Point("Level", 0.3, 0.2, 0.4, "sd"),
    )
    assert 'role="img" aria-labelledby="one-title one-desc"' in chart
    assert "Growth &lt;of&gt; all" in chart
    (told,) = re.findall(r'<desc id="one-desc">(.*?)</desc>', chart)
    assert told == (
        "Base: 0.500 (0.400 to 0.600); Fine- tuned: no score; Last: 0.700 (0.650 to 0.750), "
        "promoted. Level: Level: 0.300 (0.200 to 0.400)."
    )


def test_many_points_leave_out_labels_that_would_collide() -> None:
    points = [charts.Point(f"point {n}", n / 40, variant="dreambooth") for n in range(40)]
    chart = charts.points_chart("many", "Many", points)
    assert chart.count("<circle") == 40
    assert 3 <= len(re.findall(r'<text class="label"', chart)) <= 8


def test_a_histogram_counts_every_number_once() -> None:
    values = [0.1, 0.2, 0.2, 0.9]
    chart = charts.histogram("h", "Nearness", [("Base", values, "v-sd")], limit=0.8)
    assert "Base · 4" in chart and "median 0.200" in chart
    heights = [float(h) for h in re.findall(r'<rect class="bin[^>]* height="([\d.]+)"', chart)]
    assert len(heights) == 3 and max(heights) == 30


def test_numbers_are_written_with_a_true_minus_and_no_minus_zero() -> None:
    assert charts.signed(-0.0421) == "−0.042" and charts.signed(0.1) == "+0.100"
    assert charts.signed(-0.0001) == "0.000" and charts.plain(-0.0001) == "0.000"
    assert charts.plain(-1.25, 1) == "−1.2"


def test_nearly_all_is_not_all() -> None:
    assert [share(value) for value in (1, 0.996, 0.5, 0.004, 0, None)] == [
        "100 %", "99.6 %", "50 %", "0.4 %", "0 %", "–",
    ]  # fmt: skip
