"""When it is worth training again."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path

import pytest

from posterpipe.core.training.retraining import (
    Changes,
    Situation,
    compare,
    decide,
    differing_since,
)
from posterpipe.settings import AutomationSettings

SETTINGS = AutomationSettings(min_new_posters=5, max_age_days=7)
NOW = dt.datetime(2027, 1, 15, 2, 0, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
SAME = Situation(current="aaaaaaaaaaaa", trained="aaaaaaaaaaaa", changes=Changes(0, 0, 0))
FEW = Situation(
    current="bbbbbbbbbbbb",
    trained="aaaaaaaaaaaa",
    changes=Changes(new=2, removed=1, recaptioned=1),
    changed_at=NOW - 3 * DAY,
)
ENOUGH = replace(FEW, changes=Changes(new=2, removed=1, recaptioned=2))


@pytest.mark.parametrize(
    ("situation", "train", "words"),
    [
        (Situation(current="", trained=""), False, "there is no training set yet"),
        (SAME, False, "trained on this training set (aaaaaaaa)"),
        (
            FEW,
            False,
            "2 new, 1 removed, 1 with another caption, the first 3.0 days ago; waiting for 5 "
            "changes or 7 days",
        ),
        (replace(FEW, changed_at=NOW - 7 * DAY), True, "the first 7.0 days ago (after 7 days"),
        (ENOUGH, True, "2 new, 1 removed, 2 with another caption (at least 5"),
        (replace(FEW, changes=None), True, "the one that was trained on is gone"),
        (replace(SAME, other_reason="its code changed"), True, "its code changed"),
        (
            Situation("aaaaaaaaaaaa", "", other_reason="never materialized"),
            True,
            "never materialized",
        ),
        (replace(ENOUGH, running="0123456789ab"), False, "but the run 01234567 is training"),
        (
            replace(ENOUGH, failed_checks=["every_row (2 without image)"]),
            False,
            "but a blocking check has not passed: every_row (2 without image)",
        ),
        (
            replace(ENOUGH, unreadable="no posters in landing: put some in"),
            False,
            "but no posters in landing: put some in",
        ),
        (replace(ENOUGH, failed_runs=["0123456789ab"]), True, "2 new"),
        (
            replace(ENOUGH, failed_runs=["0123456789ab", "ba9876543210"]),
            False,
            "failed 2 times (runs 01234567, ba987654): mend it",
        ),
        (replace(ENOUGH, canceled_run="0123456789ab"), False, "run 01234567 was canceled"),
        (replace(SAME, running="0123456789ab"), False, "trained on this training set"),
    ],
)
def test_it_trains_when_it_is_worth_it_and_says_why(
    situation: Situation, train: bool, words: str
) -> None:
    decision = decide(situation, SETTINGS, NOW)
    assert decision.train == train
    assert words in decision.reason


def test_one_change_is_enough_where_the_setting_says_so() -> None:
    settings = SETTINGS.model_copy(update={"min_new_posters": 1})
    assert decide(replace(FEW, changes=Changes(0, 1, 0)), settings, NOW).train


def test_an_order_alone_waits_for_its_age() -> None:
    situation = replace(FEW, changes=Changes(0, 0, 0))
    assert "nothing but the order" in decide(situation, SETTINGS, NOW).reason
    assert decide(replace(situation, changed_at=NOW - 8 * DAY), SETTINGS, NOW).train


def test_a_change_that_was_taken_back_starts_anew() -> None:
    times = [NOW - day * DAY for day in range(6)]
    assert differing_since([], "a") is None
    assert differing_since(list(zip("aab", times, strict=False)), "a") is None
    assert differing_since(list(zip("bcab", times, strict=False)), "a") == times[1]
    assert differing_since(list(zip("bcb", times, strict=False)), "a") == times[2]


def test_training_sets_are_compared_by_image_and_caption(tmp_path: Path) -> None:
    def write(name: str, *rows: str) -> Path:
        (tmp_path / name).mkdir()
        text = "\n".join(["file_name,caption", *rows, ""])
        (tmp_path / name / "training.csv").write_text(text, encoding="utf-8")
        return tmp_path / name

    before = write("before", "train/1.png,a cat", 'train/2.png,"a dog, red"', "train/3.png,a")
    after = write("after", "train/2.png,a dog", "train/3.png,a", "train/4.png,b", "train/5.png,c")
    assert compare(before, after) == Changes(new=2, removed=1, recaptioned=1)
    assert compare(after, after) == Changes(0, 0, 0)
    assert compare(tmp_path / "gone", after) is None
    assert compare(before, write("broken")) == Changes(new=0, removed=3, recaptioned=0)
