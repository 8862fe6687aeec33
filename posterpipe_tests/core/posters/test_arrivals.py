"""When a source is read, and when it is waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from posterpipe.core.posters.arrivals import (
    LastRead,
    Memory,
    Source,
    captions_digest,
    captions_source,
    decide,
    describe_change,
    file_digest,
    file_source,
    name_some,
    posters_source,
)
from posterpipe.core.posters.listing import Entry, Folder
from posterpipe.core.retries import FIRST_PAUSE_SECONDS
from posterpipe.core.store import Store
from posterpipe.settings import AutomationSettings

SETTINGS = AutomationSettings(settle_seconds=10, patience_seconds=100)
NOW = 1_800_000_000.0
READ = LastRead(frozenset({"old"}), NOW - 60)


def test_what_was_read_is_not_read_again() -> None:
    decision = decide(Source("old", "3 posters in x"), READ, Memory("old"), SETTINGS, NOW)
    assert not decision.due
    assert decision.reason == "3 posters in x, unchanged since 2027-01-15 07:59 UTC"


def test_a_change_is_read_when_two_looks_show_the_same() -> None:
    first = decide(Source("new", "4 posters"), READ, Memory("old"), SETTINGS, NOW, "1 new: d.png")
    assert not first.due
    assert first.reason == "4 posters (1 new: d.png): waiting until the next look shows the same"
    second = decide(Source("new", "4 posters"), READ, first.memory, SETTINGS, NOW + 5)
    assert second.due
    other = decide(Source("newer", "5 posters"), READ, first.memory, SETTINGS, NOW + 5)
    assert not other.due


def test_it_does_not_rest_on_the_memory_of_earlier_looks() -> None:
    # A lost cursor delays by a look, and neither loses a change nor reads twice.
    first = decide(Source("new", ""), READ, Memory(), SETTINGS, NOW)
    assert decide(Source("new", ""), READ, first.memory, SETTINGS, NOW).due
    assert not decide(Source("old", ""), READ, Memory(), SETTINGS, NOW).due


def test_young_files_are_waited_for_by_name() -> None:
    young = Source("new", "4 posters", young=["d.png"])
    decision = decide(young, READ, Memory("new", NOW - 5), SETTINGS, NOW)
    assert not decision.due
    assert "waiting for d.png, changed less than 10 s ago" in decision.reason


def test_what_never_rests_is_read_after_a_while_and_again_later() -> None:
    memory = Memory("old")
    due = []
    for second in range(0, 400, 10):
        source = Source(f"digest at {second}", "4 posters", young=["log.png"])
        decision = decide(source, READ, memory, SETTINGS, NOW + second)
        memory = decision.memory
        if decision.due:
            assert "still changing after 100 s" in decision.reason
            due.append(second)
    assert due == [100, 210, 320]


def test_a_source_with_a_problem_is_not_read() -> None:
    decision = decide(Source("", "", problem="no posters in x"), READ, Memory(), SETTINGS, NOW)
    assert (decision.due, decision.reason) == (False, "no posters in x")


def test_files_that_could_not_be_read_are_tried_again_after_an_hour() -> None:
    for age, due in [(FIRST_PAUSE_SECONDS - 1, False), (FIRST_PAUSE_SECONDS, True)]:
        read = LastRead(frozenset({"old"}), NOW - age, unread=2)
        decision = decide(Source("old", ""), read, Memory("old"), SETTINGS, NOW)
        assert decision.due == due
    assert decision.reason.startswith("2 files could not be read at 2027-01-15 07:00 UTC")


def test_files_that_stay_unreadable_are_tried_ever_more_seldom_and_once_a_day_at_least() -> None:
    first = at = NOW
    pauses = []
    for _ in range(8):
        read = LastRead(frozenset({"old"}), at, unread=1, unread_since=first)
        pause = next(
            hours
            for hours in range(1, 100)
            if decide(Source("old", ""), read, Memory("old"), SETTINGS, at + hours * 3600).due
        )
        pauses.append(pause)
        at += pause * 3600
    assert pauses == [1, 1, 2, 4, 8, 16, 24, 24]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "landing").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "landing" / name).write_bytes(b"12")
    return Folder(tmp_path / "landing")


def test_posters_changed_lately_are_young_and_dates_in_the_future_tell_nothing(
    folder: Folder, tmp_path: Path
) -> None:
    ages = {"a.png": 11, "b.png": 9, "c.png": -500}
    for name, age in ages.items():
        (folder.path / name).write_bytes(b"12")
        os.utime(folder.path / name, (NOW - age, NOW - age))
    store = Store(tmp_path / "store")
    source = posters_source(folder.entries(), store, "there", SETTINGS, NOW)
    assert (source.seen, source.young) == ("3 posters in there", ("b.png",))
    # Objects appear as a whole.
    whole = posters_source(folder.entries(), store, "there", SETTINGS, NOW, whole=True)
    assert whole.young == ()
    assert "put some in" in posters_source([], store, "there", SETTINGS, NOW).problem


def test_captions_depend_on_the_names_of_posters_only_where_there_are_captions(
    folder: Folder, tmp_path: Path
) -> None:
    csv, store = tmp_path / "captions.csv", Store(tmp_path / "store")

    def digest() -> str:
        return captions_digest(folder.entries(), file_digest(csv), store)

    without = digest()
    (folder.path / "c.png").write_bytes(b"")
    assert digest() == without
    csv.write_text("file_name,caption\n")
    with_csv = digest()
    assert with_csv != without
    os.utime(csv, (1, 1))
    (folder.path / "c.png").write_bytes(b"other bytes")
    assert digest() == with_csv
    (folder.path / "d.png").write_bytes(b"")
    with_name = digest()
    assert with_name != with_csv
    (folder.path / "d.txt").write_text("a caption")
    with_sidecar = digest()
    assert with_sidecar != with_name
    (folder.path / "d.txt").write_text("another caption")
    assert digest() != with_sidecar
    seen = captions_source(folder.entries(), csv, store, "there", SETTINGS, NOW).seen
    assert seen == "1 sidecar and captions.csv"


def test_captions_are_not_taken_for_removed_where_no_poster_is_left(tmp_path: Path) -> None:
    csv = tmp_path / "captions.csv"
    csv.write_text("file_name,caption\n")
    for entries in ([], [Entry("a.txt", 5, 0, "")]):
        source = captions_source(entries, csv, Store(tmp_path / "store"), "there", SETTINGS, NOW)
        assert "no posters in there: put some in" in source.problem


def test_a_file_counts_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    assert "suite.yaml is not there" in file_source(path, SETTINGS, NOW).problem
    path.write_text("prompts: []")
    os.utime(path, (NOW - 5, NOW - 5))
    young = file_source(path, SETTINGS, NOW)
    os.utime(path, (NOW - 50, NOW - 50))
    old = file_source(path, SETTINGS, NOW)
    assert (young.young, old.young) == (["suite.yaml"], [])
    assert young.digest == old.digest
    path.write_text("prompts: [x]")
    assert file_source(path, SETTINGS, NOW).digest != old.digest


def test_a_change_is_told_by_name() -> None:
    entries = [Entry("a.png", 1, 0, ""), Entry("b.png", 5, 0, ""), Entry("b.txt", 5, 0, "")]
    assert (
        describe_change(entries, {"b.png": 4, "c.png": 1})
        == "1 new: a.png; 1 gone: c.png; 1 changed: b.png"
    )
    assert describe_change(entries, {"a.png": 1, "b.png": 5}) == "something about them changed"
    assert name_some(list("abcdefg")) == "a, b, c, d, e and 2 more"
