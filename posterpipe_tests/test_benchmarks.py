"""What is required of benchmarks and how figures are filed, without running any: that takes idle
cores, or a GPU that is lent for minutes and on which a run may fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import load_code_location, rows, train_sd21_gpu, training_runs
from benchmarks.rows import RESULTS, Row, is_met, merge


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


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    return tmp_path / f"{rows.machine()}.json"


def names(path: Path) -> list[str]:
    return [row["name"] for row in json.loads(path.read_text())]


def test_rows_of_other_benchmarks_stay_and_in_parts_those_of_other_names_too(results: Path) -> None:
    merge([Row("a.one", "s", 1.0), Row("b.one", "s", 1.0), Row("a.two", "s", 1.0)])
    merge([Row("a.one", "s", 2.0)], in_parts=True)
    assert names(results) == ["b.one", "a.two", "a.one"]
    assert json.loads(results.read_text())[-1]["ours"] == 2.0
    merge([Row("a.three", "s", 1.0)])
    assert names(results) == ["b.one", "a.three"]
    merge([])
    assert names(results) == ["b.one", "a.three"]


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Quadro P4000", None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_whole_name(device: str, peak: int | None) -> None:
    assert train_sd21_gpu.peak_tflops(device) == peak


def test_a_run_that_fails_is_a_row_and_the_next_ones_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measured(work: Path, *_: object, **training: object) -> training_runs.Measured:
        work.mkdir()
        if training.get("compile"):
            raise training_runs.RunFailed("TrainingError: training.compile: no compiler")
        return training_runs.Measured([1, 3], [0.0, 4.0], [0.1, 0.1], 0.0)

    monkeypatch.setattr(train_sd21_gpu, "run_ours", measured)
    monkeypatch.setattr(train_sd21_gpu, "_step_flops", lambda *_: 1e12)
    found = {row.name: row for row in train_sd21_gpu.run(rehearse=True, part="unet.batch2")}
    failed = found["train_sd21_gpu.unet.batch2.with_compile"]
    assert failed.ours == 0.0 and "training.compile: no compiler" in failed.required
    assert found["train_sd21_gpu.unet.batch2"].ours == 0.5
    assert found["train_sd21_gpu.unet.batch2.with_lora"].ratio == 1.0
    assert not any("text_encoder" in name for name in found)

    alone = list(train_sd21_gpu.run(rehearse=True, part="with_lora"))
    assert "measure its part plain first" in alone[0].required
