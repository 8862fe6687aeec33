"""How benchmark figures are filed, where a GPU is lent for minutes and a run may fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import rows, train_sd21_gpu, training_runs
from benchmarks.rows import Row, merge


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
