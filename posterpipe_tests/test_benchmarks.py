"""What is required of benchmarks, without running any: that takes idle cores."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import load_code_location, rows
from benchmarks.rows import RESULTS, Row, is_met


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (Row("a", "s", 2.0, 3.0, "peer", 1.5, "at least 1.5 times as fast"), True),
        (Row("a", "s", 2.0, 2.9, "peer", 1.45, "at least 1.5 times as fast"), False),
        (Row("a", "s", 2.5, 2.0, "peer", 1.25, "ours / peer at most 1.2"), False),
        (Row("a", "dB", 39.9, required="at least 40 dB against the loop's images"), False),
        (Row("a", "of 20 losses", 1.2e-7, required="at most 1e-5"), True),
        (Row("a", "of 20 losses", 2e-5, required="at most 1e-5"), False),
        (Row("a", "items", 4.0, 30_016.0, "cold", required="at most 3: one each"), False),
        (Row("a", "s", 6.6, required="seconds"), None),
        (Row("a", "s", 6.6), None),
    ],
)
def test_a_figure_is_held_against_what_is_required_of_it(row: Row, met: bool | None) -> None:
    assert is_met(row) is met


def test_the_results_that_are_filed_meet_what_is_required() -> None:
    texts = [path.read_text(encoding="utf-8") for path in RESULTS.glob("*.json")]
    filed = [Row(**row) for text in texts for row in json.loads(text)]
    assert sum(is_met(row) is not None for row in filed) >= 15
    assert [row.name for row in filed if is_met(row) is False] == []


def test_a_missed_figure_is_told_and_fails_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missed = [Row("load_code_location", "s", 3.0, 2.0, "peer", 1.5, "ours / peer at most 1.2")]
    monkeypatch.setattr(load_code_location, "run", lambda: missed)
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "update_readme", lambda: None)
    for option, code in ((), 0), (("--strict",), 1):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "load_code_location", *option])
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == code
        assert "missed what is required: load_code_location" in capsys.readouterr().out
