"""What is required of benchmarks and how figures are filed, without running any: that takes idle
cores, or a GPU that is lent for minutes and on which a run may fail."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import clip_scoring, load_code_location, rows, train_sd21_gpu, training_runs
from benchmarks.rows import RESULTS, Row, is_met, markdown, merge
from posterpipe.settings import default_root


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
        (Row("a", "failed (CUDA error)", None), False),
        (Row("a", "steps/s", 2.0, required="the script failed: no kernel"), False),
        (Row("a", "s", 6.6, required="seconds"), None),
        (Row("a", "s", 6.6), None),
        (Row("a", "not measured here", None, required="at least 1.5 times as fast"), None),
    ],
)
def test_a_figure_is_held_against_what_is_required_of_it(row: Row, met: bool | None) -> None:
    assert is_met(row) is met


def test_a_figure_that_is_filed_meets_what_is_required_or_the_page_tells_of_it_in_words() -> None:
    texts = [path.read_text(encoding="utf-8") for path in RESULTS.glob("*.json")]
    filed = [Row(**row) for text in texts for row in json.loads(text)]
    assert sum(is_met(row) is not None for row in filed) >= 15
    words, _, _ = command.PAGE.read_text(encoding="utf-8").partition(command.MARKS[0])
    missed = {row.name for row in filed if is_met(row) is False}
    assert missed == set(re.findall(r"`([\w.]+)`\s+misses", words))


def test_a_missed_figure_is_told_and_fails_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missed = [Row("load_code_location", "s", 3.0, 2.0, "peer", 1.5, "ours / peer at most 1.2")]
    monkeypatch.setattr(load_code_location, "run", lambda: missed)
    run(monkeypatch, "--only", "load_code_location")
    assert "missed what is required: load_code_location" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, "--only", "load_code_location", "--strict")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (rows, command):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    for name in ("README", "PAGE"):
        page = tmp_path / f"{name.lower()}.md"
        page.write_text("\n".join(("before", *command.MARKS, "after")), "utf-8")
        monkeypatch.setattr(command, name, page)
    return tmp_path / "results" / f"{rows.machine()}.json"


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *options])
    command.main()


def test_figures_are_only_printed_unless_they_are_to_be_filed(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = [Row("load_code_location", "s", 3.0)]
    monkeypatch.setattr(load_code_location, "run", lambda: measured)
    before = command.PAGE.read_text("utf-8")
    run(monkeypatch, "--only", "load_code_location")
    assert not results.exists() and command.PAGE.read_text("utf-8") == before
    assert "nothing is filed" in capsys.readouterr().out
    run(monkeypatch, "--only", "load_code_location", "--file")
    assert names(results) == ["load_code_location"]
    assert "`load_code_location` | 3 s |" in command.PAGE.read_text("utf-8")
    told = capsys.readouterr().out
    assert all(str(path) in told for path in (results, command.PAGE, command.README))


def test_the_readme_shows_what_has_a_requirement_and_the_page_everything(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = [
        Row("load_code_location", "s", 3.0, 2.9, "peer", 1.03, "ours / peer at most 1.2"),
        Row("load_code_location.words", "MB", 3.0, required="does not grow"),
        Row("load_code_location.failed", "failed (no memory)", None),
        Row("load_code_location.more", "s", 1.0),
    ]
    monkeypatch.setattr(load_code_location, "run", lambda: measured)
    run(monkeypatch, "--only", "load_code_location", "--file")
    for page in (command.README, command.PAGE):
        assert f"`{rows.machine()}`: {rows.describe_machine()}" in page.read_text("utf-8")
    shown = {
        page: [row.name for row in measured if f"`{row.name}`" in page.read_text("utf-8")]
        for page in (command.README, command.PAGE)
    }
    assert shown[command.PAGE] == [row.name for row in measured]
    assert shown[command.README] == [row.name for row in measured[:3]]


def test_the_pages_are_as_the_results_that_are_filed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where this fails: make docs"""
    pages = {name: getattr(command, name) for name in ("README", "PAGE")}
    for name, page in pages.items():
        monkeypatch.setattr(command, name, Path(shutil.copy(page, tmp_path / page.name)))
    command.update_pages()
    for page in pages.values():
        assert (tmp_path / page.name).read_text("utf-8") == page.read_text("utf-8")


def test_every_ratio_says_which_way_is_better() -> None:
    texts = [path.read_text(encoding="utf-8") for path in RESULTS.glob("*.json")]
    compared = [row for text in texts for row in (Row(**each) for each in json.loads(text))
                if row.ratio is not None]  # fmt: skip
    for row in compared:
        way = "lower" if row.lower_is_better else "higher"
        assert f"| {row.ratio:.2f}, {way} is better |" in markdown([row])
        if limit := re.search("at (most|least)", row.required):
            assert limit[1] == ("most" if row.lower_is_better else "least"), row.name
    assert {row.lower_is_better for row in compared} == {True, False}


def test_parts_are_filed_one_by_one_where_that_is_asked_for(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parts() -> Iterator[Row]:
        yield Row("train_sd21_gpu.one", "steps/s", 1.0)
        seen.append(names(results) if results.exists() else [])
        yield Row("train_sd21_gpu.two", "failed (no memory)", None)

    seen: list[list[str]] = []
    monkeypatch.setattr(train_sd21_gpu, "run", parts)
    run(monkeypatch, "--only", "train_sd21_gpu")
    run(monkeypatch, "--only", "train_sd21_gpu", "--file")
    assert seen == [[], ["train_sd21_gpu.one"]]
    assert names(results) == ["train_sd21_gpu.one", "train_sd21_gpu.two"]


def test_what_was_measured_without_its_other_side_is_not_filed(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(training_runs.PEER_SCRIPT, raising=False)
    for options in ((), ("--only", "train_unet")):
        with pytest.raises(SystemExit):
            run(monkeypatch, "--file", *options)
        assert "--peer-script" in capsys.readouterr().err
    assert not results.exists()


def test_make_hands_on_what_it_is_given() -> None:
    given = ("ONLY=train_unet", "PEER_SCRIPT=/tmp/a script.py", "STRICT=1", "FILE=1")
    told = subprocess.run(
        ["make", "-n", "-o", "install-dev", "bench", *given],
        cwd=default_root(),
        # Inside another make (`make test`) it would tell of the folders that it enters and leaves.
        env={
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MAKE", "MFLAGS"))
        },
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shlex.split(told.replace("\\\n", " "))[1:] == [
        *("-m", "benchmarks", "--only", "train_unet"),
        *("--peer-script", "/tmp/a script.py", "--strict", "--file"),
    ]


def test_what_does_not_run_is_said_without_a_figure() -> None:
    row = Row("clip_scoring.torchmetrics", "does not run (AttributeError)", None)
    assert "| `clip_scoring.torchmetrics` | does not run (AttributeError) |" in markdown([row])


def names(path: Path) -> list[str]:
    return [row["name"] for row in json.loads(path.read_text())]


def test_rows_of_other_benchmarks_stay_and_in_parts_those_of_other_names_too(results: Path) -> None:
    merge([Row("a.one", "s", 1.0), Row("b.one", "s", 1.0), Row("a.two", "s", 1.0)])
    merge([Row("a.one", "s", 2.0)], in_parts=True)
    assert sorted(names(results)) == ["a.one", "a.two", "b.one"]
    assert {row["name"]: row["ours"] for row in json.loads(results.read_text())}["a.one"] == 2.0
    merge([Row("a.three", "s", 1.0)])
    assert sorted(names(results)) == ["a.three", "b.one"]
    merge([])
    assert sorted(names(results)) == ["a.three", "b.one"]


def test_what_is_measured_again_keeps_its_place(results: Path) -> None:
    merge([Row(name, "s", 1.0) for name in ("a", "a.one", "b", "b.one", "c")])
    merge([Row("b", "s", 2.0), Row("b.two", "s", 2.0)])
    assert names(results) == ["a", "a.one", "b", "b.two", "c"]
    merge([Row("a.one", "s", 3.0), Row("b.three", "s", 3.0)], in_parts=True)
    assert names(results) == ["a", "a.one", "b", "b.two", "b.three", "c"]
    merge([Row("d", "s", 1.0), Row("a", "s", 4.0)])
    assert names(results) == ["a", "b", "b.two", "b.three", "c", "d"]


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


def test_what_a_gpu_runs_of_scoring_is_known_to_run() -> None:
    found = {row.name: row for row in clip_scoring.run(rehearse=True)}
    assert found["clip_scoring_gpu.worker"].required and "bf16" in found["clip_scoring_gpu"].unit
    apart = found["clip_scoring_gpu.fp32.difference"].ours
    assert apart is not None and apart < 1e-4


def at(speed: float, peak: float = 1.0) -> training_runs.Measured:
    """A run of so many steps a second."""
    return training_runs.Measured([1, 3], [0.0, 2 / speed], [0.1, 0.1], peak, 2 * peak)


def test_a_run_that_fails_is_a_row_and_the_next_ones_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measured(work: Path, *_: object, **training: object) -> training_runs.Measured:
        work.mkdir()
        if training.get("compile"):
            raise training_runs.RunFailed("TrainingError: training.compile: no compiler")
        return at(0.5)

    monkeypatch.setattr(train_sd21_gpu, "run_ours", measured)
    monkeypatch.setattr(train_sd21_gpu, "_step_flops", lambda *_: 1e12)
    found = {row.name: row for row in train_sd21_gpu.run(rehearse=True, part=["unet.batch2"])}
    failed = found["train_sd21_gpu.unet.batch2.with_compile"]
    assert failed.ours is None and "training.compile: no compiler" in failed.unit
    assert found["train_sd21_gpu.unet.batch2"].ours == 0.5
    assert found["train_sd21_gpu.unet.batch2.with_lora"].ratio == 1.0
    assert not any("text_encoder" in name for name in found)

    alone = list(train_sd21_gpu.run(rehearse=True, part=["with_lora"]))
    assert "measure its part plain first" in alone[0].unit


def test_operations_that_cannot_be_counted_take_no_speed_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(*_: object) -> float:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(train_sd21_gpu, "run_ours", lambda work, *_, **__: work.mkdir() or at(5))
    monkeypatch.setattr(train_sd21_gpu, "_step_flops", no_memory)
    found = list(train_sd21_gpu.run(rehearse=True, part=["unet.batch2.plain"]))
    assert {row.name: row.ours for row in found if row.unit == "steps/s"} == {
        "train_sd21_gpu.unet.batch2": 5.0
    }
    assert [row.name for row in found if row.ours is None] == ["train_sd21_gpu.unet.batch2.rate"]


def test_the_runs_that_decide_how_the_rest_is_measured_come_first(tmp_path: Path) -> None:
    scale = train_sd21_gpu.FULL
    comparison = train_sd21_gpu._Comparison(tmp_path, tmp_path, tmp_path, scale, 1, {})
    runs = [name.removeprefix("train_sd21_gpu.").split(".", 2) for name, _ in comparison.runs()]
    measures = ["plain", "without_cuda_graphs", "peer"]
    assert runs[:3] == [["unet", "batch1", measure] for measure in measures]
    models = ["unet", "unet_text_encoder"]
    plain = [[model, batch] for model, batch, measure in runs if measure == "plain"]
    assert plain == [[model, batch] for model in models for batch in ("batch1", "batch4")]


def test_in_rounds_both_sides_are_measured_in_turn_and_compile_is_held_against_the_peer_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[str] = []

    def ours(work: Path, *_: object, compile: bool = False, **__: object) -> object:
        work.mkdir()
        turns.append("ours")
        return at(9.0) if compile else at(6.0 if len(turns) > 2 else 5.0, peak=2.0)

    def peer(script: Path, work: Path, *_: object, **__: object) -> object:
        work.mkdir()
        turns.append("peer")
        return at(3.0, peak=4.0)

    monkeypatch.setenv(training_runs.PEER_SCRIPT, __file__)
    monkeypatch.setattr(train_sd21_gpu, "run_ours", ours)
    monkeypatch.setattr(train_sd21_gpu, "run_peer", peer)
    for name in ("_step_flops", "_vae_seconds", "_text_encoder_seconds"):
        monkeypatch.setattr(train_sd21_gpu, name, lambda *_: 0.002)
    found = train_sd21_gpu.run(rehearse=True, part=["unet.batch2"], rounds=3)
    rows = {row.name.removeprefix("train_sd21_gpu.unet.batch2"): row for row in found}
    # The plain run, the one without CUDA graphs, three rounds.
    assert turns[:8] == ["ours", "ours", *3 * ["ours", "peer"]]
    compared, compiled = rows[""], rows[".with_compile.to_peer"]
    assert (compared.ours, compared.peer, compared.ratio) == (6.0, 3.0, 2.0)
    assert "medians of 3 in turn" in compared.peer_name and "at least 1.5" in compared.required
    assert (compiled.ours, compiled.ratio, compiled.required) == (9.0, 3.0, "")
    reserved = rows[".memory_reserved"]
    assert (reserved.ours, reserved.peer, reserved.required) == (4.0, 8.0, "")
    waits = rows[".with_bitsandbytes_own_adam_step"]  # against the one run without CUDA graphs
    assert (waits.peer, waits.ratio, waits.peer_name) == (5.0, 1.2, "without CUDA graphs")
    assert rows[".captions_at_each_step"].ours == 2.0


def test_the_memory_that_a_run_reserves_is_that_of_its_first_step_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter([(8.0, 9.0), (4.0, 6.0)])
    monkeypatch.setattr(training_runs, "_peaks", lambda: next(peaks))
    recorder = training_runs._Recorder(tmp_path / "measured.json")
    recorder.add(1, 0.1)
    recorder.add(2, 0.1)
    recorder.write()
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert (measured["peak_gib"], measured["reserved_gib"]) == (4.0, 9.0)
