"""A folder is replaced whole, with and without the system's exchange."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from posterpipe.core.files import LEFT_SECONDS
from posterpipe.core.score_report import folder
from posterpipe.core.score_report.folder import replaced_folder
from posterpipe_tests.core.conftest import Disk


def write(target: Path, content: str) -> None:
    with replaced_folder(target) as new:
        for name in ("one", "two"):
            (new / name).write_text(content)


def read(target: Path) -> set[str]:
    return {(target / name).read_text() for name in ("one", "two")}


@pytest.mark.parametrize("exchange", [True, False])
def test_the_new_one_takes_the_place_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, disk: Disk
) -> None:
    if not exchange:  # as on systems that cannot
        monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    target = tmp_path / "report"
    for content in ("first", "second", "third"):
        write(target, content)
        assert read(target) == {content}
        assert [one.name for one in tmp_path.iterdir()] == ["report"]
        assert disk.half == [] and disk.unnamed == {}, "a power cut leaves a part of it"


def test_no_moment_is_without_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "report"
    write(target, "0")
    if not folder._exchange(target, target):
        pytest.skip("this file system cannot exchange two folders")
    stop = threading.Event()
    missing: list[int] = []

    def look() -> None:
        while not stop.is_set():
            if not target.is_dir():
                missing.append(1)

    looking = threading.Thread(target=look)
    looking.start()
    for number in range(200):
        write(target, str(number))
    stop.set()
    looking.join()
    assert missing == []


def test_an_error_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "report"
    write(target, "old")
    with pytest.raises(RuntimeError), replaced_folder(target) as new:
        (new / "one").write_text("new")
        raise RuntimeError
    assert read(target) == {"old"}
    assert [one.name for one in tmp_path.iterdir()] == ["report"]


def test_a_rename_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    target = tmp_path / "report"
    write(target, "old")
    with pytest.raises(FileNotFoundError), replaced_folder(target) as new:
        new.rmdir()
    assert read(target) == {"old"}


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, "kept")
    target = tmp_path / "report"
    target.symlink_to(elsewhere)
    write(target, "new")
    assert not target.is_symlink() and read(target) == {"new"} and read(elsewhere) == {"kept"}


def test_what_a_killed_process_left_is_swept_away_later(tmp_path: Path) -> None:
    target = tmp_path / "report"
    for name, age in ((".report.abc.tmp", 2 * LEFT_SECONDS), (".report.new.tmp", 0)):
        (tmp_path / name).mkdir()
        when = os.stat(tmp_path / name).st_mtime - age
        os.utime(tmp_path / name, (when, when))
    write(target, "now")
    assert sorted(one.name for one in tmp_path.iterdir()) == [".report.new.tmp", "report"]
