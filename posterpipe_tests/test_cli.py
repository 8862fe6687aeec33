"""The console command: what it says, and how it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from posterpipe import cli
from posterpipe.commands import demo, doctor
from posterpipe.core.models import ModelMissing
from posterpipe.core.posters.landing import scan
from posterpipe.core.posters.listing import Folder
from posterpipe.core.store import Store
from posterpipe.settings import ModelRef, Settings, SettingsError, load_settings
from posterpipe_tests.models import HubCache

MISSING = {"id": "data/models/nowhere/base"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "posterpipe.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **environment},
        timeout=300,
    )


def test_a_wrong_setting_is_one_sentence_without_traceback(tmp_path: Path) -> None:
    result = run(
        "demo", POSTERPIPE_SAMPLER__BATCH_SIZE="none", POSTERPIPE_STORE=str(tmp_path / "store")
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("posterpipe: ")
    assert "sampler.batch_size" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "store").exists()


def test_an_unknown_profile_names_those_there_are() -> None:
    result = run("doctor", POSTERPIPE_PROFILE="sd99")
    assert result.returncode == 1
    assert "starter" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_model_stops_the_demo_before_it_begins(tmp_path: Path) -> None:
    result = run(
        "demo",
        POSTERPIPE_BASE_MODEL__ID=MISSING["id"],
        POSTERPIPE_STORE=str(tmp_path / "store"),
        DAGSTER_HOME=str(tmp_path / "home"),
    )
    assert result.returncode == 1
    assert "posterpipe: " in result.stderr
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "store").exists()


def test_other_errors_keep_their_traceback() -> None:
    assert cli.is_plain(SettingsError("wrong"))
    assert cli.is_plain(ModelMissing("not there"))
    assert not cli.is_plain(ValueError("a bug"))


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        ('"$@" gc >/dev/full', 1, "posterpipe: What was printed could not be written (No space"),
        ('"$@" gc --help >/dev/full', 1, "posterpipe: What was printed could not be written (No"),
        ('"$@" gc | true; exit "${PIPESTATUS[0]}"', 1, ""),
        ('"$@" gc >&- 2>&-', 0, ""),
        ('"$@" demo >&-', 1, "posterpipe: The model directory"),
    ],
)
def test_output_that_is_lost_is_told_in_one_sentence_if_at_all(
    tmp_path: Path, script: str, status: int, said: str
) -> None:
    command = [sys.executable, "-m", "posterpipe.cli"]
    done = subprocess.run(
        ["bash", "-c", script, "bash", *command],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "POSTERPIPE_STORE": str(tmp_path / "store"),
            "POSTERPIPE_BASE_MODEL__ID": MISSING["id"],
            "DAGSTER_HOME": str(tmp_path / "home"),
        },
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def test_what_an_output_cannot_spell_is_a_question_mark(tmp_path: Path) -> None:
    store = tmp_path / "st\u00f6re \u2013"
    place = {"POSTERPIPE_STORE": str(store), "PYTHONIOENCODING": "latin-1", "COLUMNS": "500"}
    told = subprocess.run(
        [sys.executable, "-m", "posterpipe.cli", "gc"],
        capture_output=True,
        env={**os.environ, **place},
    )
    assert told.returncode == 0 and str(tmp_path / "st\u00f6re ?").encode("latin-1") in told.stdout


def states(settings: Settings) -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in doctor.examine(settings)}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    monkeypatch.setattr(doctor, "HUB", "http://127.0.0.1:9")  # the discard port: nobody answers
    return load_settings("starter", store=tmp_path / "store")


def test_doctor_looks_without_leaving_anything_behind(settings: Settings) -> None:
    found = states(settings)
    assert found["store"].state == "ok"
    assert found["posters"].text.startswith("50 ")
    assert found["packages"].state == "ok"
    assert {"devices", "precision", "memory", "disk", "prompts"} <= found.keys()
    assert not settings.store.exists()


def test_doctor_shows_long_paths_whole(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = "/a-folder-[/of]-a-long-name-:cat:" * 5
    found = doctor.Finding("missing", "store", f"{path}: cannot be written")
    monkeypatch.setattr(doctor, "examine", lambda _: iter([found]))
    monkeypatch.setenv("COLUMNS", "80")
    assert doctor.run_doctor() == 1
    assert f"{path}:cannotbewritten" in "".join(capsys.readouterr().out.split())


def test_doctor_outlives_a_torch_that_cannot_be_loaded(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    monkeypatch.setattr(doctor, "HUB_MEMORY_GB", 10**6)
    hub = settings.model_copy(update={"base_model": ModelRef(id="owner/model", revision=None)})
    found = states(hub)
    assert found["devices"].state == "missing" and "make install" in found["devices"].text
    assert found["memory"].state == "note"
    assert found["prompts"].state == "ok"


def test_doctor_does_not_take_emulated_bf16_for_computed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_an_older_gpu(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", of_an_older_gpu)
    assert "the GPU computes bf16" not in states(settings)["precision"].text


def test_doctor_does_not_mind_the_hub_where_the_profile_does_not_need_it(
    settings: Settings,
) -> None:
    finding = states(settings)["hub"]
    assert finding.state == "ok"
    assert "does not need it" in finding.text


def test_doctor_names_what_is_missing_and_what_to_do(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home?"))
    empty = tmp_path / "empty"
    empty.mkdir()
    found = states(
        settings.model_copy(
            update={
                "landing": empty,
                "prompt_suite": tmp_path / "nowhere.yaml",
                "base_model": settings.base_model.model_copy(update=MISSING),
            }
        )
    )
    for subject, remedy in [
        ("posters", "POSTERPIPE_LANDING"),
        ("prompts", "nowhere.yaml"),
        ("base model", "nowhere"),
        ("history", "DAGSTER_HOME"),
    ]:
        assert found[subject].state == "missing", subject
        assert remedy in found[subject].text, subject


def test_doctor_names_a_store_whose_path_cannot_be(tmp_path: Path, settings: Settings) -> None:
    store = tmp_path / ("x" * 300) / "store"
    found = states(settings.model_copy(update={"store": store}))["store"]
    assert found.state == "missing" and "POSTERPIPE_STORE" in found.text
    assert "xxx" in found.text and "File name too long" in found.text


def test_doctor_names_a_store_where_nothing_can_be_published(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refused)
    found = doctor._store(settings)
    assert found.state == "missing" and "no symbolic links" in found.text
    assert not settings.store.exists()


def test_doctor_tells_of_prompts_that_share_a_seed(tmp_path: Path, settings: Settings) -> None:
    assert states(settings)["prompts"].state == "ok"
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "defaults: {seeds: [7]}\nprompts:\n"
        "  - {id: cat, prompt: a cat, score_text: a cat}\n"
        "  - {id: sea, prompt: the sea, score_text: the sea}\n"
    )
    found = states(settings.model_copy(update={"prompt_suite": suite}))["prompts"]
    assert found.state == "note" and "cat and sea share the seed 7" in found.text


def test_doctor_names_a_negative_prompt_that_comes_too_late(
    tmp_path: Path, settings: Settings
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "prompts:\n"
        "  - {id: a, prompt: a red rocket, score_text: a red rocket, negative: dogs, seeds: [1],\n"
        "     negative_from: 0.99}\n"
    )
    sampler = settings.sampler.model_copy(update={"num_inference_steps": 6})
    changed = settings.model_copy(update={"prompt_suite": suite, "sampler": sampler})
    found = doctor._suite(changed)
    assert found.state == "missing"
    assert f"{suite}:3" in found.text and "write at most 0.83" in found.text


def test_doctor_asks_for_the_hub_where_the_profile_needs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "HUB", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    found = states(
        load_settings(
            "sd21", store=tmp_path, base_model={"id": "posterpipe-tests/not-a-model-anywhere"}
        )
    )
    assert found["base model"].state == "note"
    assert found["hub"].state == "missing"
    assert "POSTERPIPE_PROFILE=starter" in found["hub"].text


def test_doctor_tells_which_revisions_can_move(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: Settings
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    commit, model = "0123456789" * 4, settings.path(Path(settings.scorer.model.id))
    HubCache(tmp_path / "cache").add("owner/clip", commit, model)
    moving, pinned = ModelRef(id="owner/clip", revision="main"), ModelRef(id="o/p", revision=commit)
    found = states(
        settings.model_copy(
            update={
                "scorer": settings.scorer.model_copy(update={"model": moving}),
                "evidence": settings.evidence.model_copy(update={"image_encoders": (pinned,)}),
            }
        )
    )
    assert found["scorer"].state == "note"
    assert "owner/clip is in the local cache. Its revision main can move" in found["scorer"].text
    assert f"revision = '{commit}'" in found["scorer"].text
    assert "move" not in found["evidence p"].text and "not here yet" in found["evidence p"].text
    assert found["hub"].state == "missing"


@pytest.mark.parametrize(
    ("gib", "bf16", "training", "noted"),
    [
        (15.6, False, {}, ""),
        (11.6, False, {}, "GPU memory"),
        (15.6, False, {"train_batch_size": 4}, "GPU memory"),
        (80.0, False, {}, ""),
        (80.0, True, {}, "precision"),
        (80.0, True, {"mixed_precision": "bf16"}, ""),
        (80.0, False, {"mixed_precision": "bf16"}, "precision"),
        (20.0, True, {"mixed_precision": "bf16", "optimizer": "adamw"}, "GPU memory"),
        (23.5, True, {"mixed_precision": "bf16", "optimizer": "adamw"}, ""),
        (7.6, True, {"mixed_precision": "bf16", "method": "lora"}, ""),
    ],
)
def test_doctor_tells_of_a_gpu_that_is_too_small_and_of_a_worse_precision(
    monkeypatch: pytest.MonkeyPatch, gib: float, bf16: bool, training: dict[str, Any], noted: str
) -> None:
    import torch

    gpu = SimpleNamespace(name="a card", total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    settings = load_settings("sd21")
    settings = settings.model_copy(
        update={"training": settings.training.model_copy(update=training)}
    )
    notes = {
        found.subject: found.text for found in doctor._devices(settings) if found.state != "ok"
    }
    assert notes.keys() == ({noted} if noted else set())
    if noted == "GPU memory":
        assert "Little memory" in notes[noted] and f"{gib:.0f} GiB" in notes[noted]
    elif noted:
        better = "bf16" if bf16 else "fp16"
        assert f"POSTERPIPE_TRAINING__MIXED_PRECISION={better}" in notes[noted]


def test_doctor_asks_no_gpu_memory_of_the_starter_models(settings: Settings) -> None:
    assert list(doctor._gpu_memory(settings, 2.0)) == []


def test_the_demo_wants_its_models_and_prompts_first(tmp_path: Path) -> None:
    settings = load_settings("starter", store=tmp_path / "store", base_model=MISSING)
    with pytest.raises(ModelMissing, match="nowhere"):
        demo.require_inputs(settings)


def test_the_demo_ends_with_its_paths_and_the_champion_as_they_are(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, line = tmp_path / "store [/old] :cat:", "champion  held: [urgent] see [/ticket 12]"
    deployment: Any = SimpleNamespace(
        published_path=folder, contact_sheet_path=folder, report_path=folder, settings=settings
    )
    for name in ("leaderboard_table", "control_line"):
        monkeypatch.setattr(demo, name, lambda _: "")
    monkeypatch.setattr(demo, "champion_line", lambda _: line)
    demo._conclude(deployment, demo.Watch(), 1.0, tmp_path)
    told = capsys.readouterr().out
    assert line in told and f"score report   {folder}\n" in told


def test_rehash_reads_every_poster_and_says_what_changed(tmp_path: Path) -> None:
    landing = tmp_path / "landing"
    landing.mkdir()
    Image.effect_noise((80, 120), 50).save(landing / "a.bmp")
    holdout = tmp_path / "holdout"
    holdout.mkdir()
    Image.effect_noise((80, 120), 50).save(holdout / "held.bmp")
    place = {
        "POSTERPIPE_LANDING": str(landing),
        "POSTERPIPE_HOLDOUT": str(holdout),
        "POSTERPIPE_STORE": str(tmp_path / "store"),
    }
    first = run("rehash", **place)
    assert first.returncode == 0, first.stderr
    assert "1 not read before:\n  a.bmp" in first.stdout
    assert "1 not read before:\n  held.bmp" in first.stdout
    scan(Folder(landing), load_settings("starter").images, Store(tmp_path / "store"))
    data, stats = bytearray((landing / "a.bmp").read_bytes()), (landing / "a.bmp").stat()
    data[-1] ^= 1
    with open(landing / "a.bmp", "r+b") as file:
        file.write(data)
    os.utime(landing / "a.bmp", ns=(stats.st_atime_ns, stats.st_mtime_ns))
    second = run("rehash", **place)
    assert second.returncode == 0, second.stderr
    assert "1 changed while path, size and date stayed:\n  a.bmp" in second.stdout
    assert "materialize" in second.stdout


def test_rehash_of_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    result = run(
        "rehash",
        POSTERPIPE_LANDING=str(tmp_path / "nowhere"),
        POSTERPIPE_STORE=str(tmp_path / "store"),
    )
    assert result.returncode == 1
    assert result.stderr.startswith("posterpipe: ")
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_champion_is_shown_pinned_and_rolled_back_by_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from posterpipe.cli import app
    from posterpipe.core.champion.decisions import (
        GATE,
        GateError,
        read_decisions,
        read_mirrored_decisions,
        write_decisions,
    )
    from posterpipe.core.warehouse.database import Warehouse

    monkeypatch.setenv("POSTERPIPE_STORE", str(tmp_path))
    warehouse = Warehouse(tmp_path / "warehouse.duckdb")

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, ["champion", *words])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    assert "the base model" in run() and "No checkpoint has been judged" in run("show")
    promoted = {
        "decision_id": "1", "decided_at": pd.Timestamp("2026-02-03"), "checkpoint_id": "c0ffee12",
        "champion_before": "", "decision": "promote", "reason": "every check passed",
        "numbers": "{}", "decided_by": GATE, "run_id": "run",
    }  # fmt: skip
    write_decisions(warehouse, lambda *_: pd.DataFrame([promoted]))
    assert "Served: c0ffee12 (a fine-tuned checkpoint)" in run()
    run("rollback", "--why", "draws hands", "--who", "Ida Moss")
    assert "the base model, pinned" in run() and "draws hands" in run() and "Ida Moss" in run()
    run("pin", "c0ff", "--why", "it sells", "--who", "Otto")
    assert "Served: c0ffee12 (a fine-tuned checkpoint, pinned)" in run()
    run("unpin", "--why", "enough")
    words = run("show").split()
    did = [word for word in words if word in ("promote", "pin", "unpin")]
    assert did == ["promote", "pin", "pin", "unpin"]
    log = read_decisions(warehouse)
    assert log["reason"].tolist() == ["every check passed", "draws hands", "it sells", "enough"]
    assert log["decided_by"].tolist()[1:3] == ["Ida Moss", "Otto"] and log["decided_by"].iloc[3]
    assert read_mirrored_decisions(tmp_path)["decision_id"].tolist() == log["decision_id"].tolist()
    with pytest.raises(GateError, match="has not seen the checkpoint nobody"):
        run("pin", "nobody", "--why", "x")
    for who, why in (("Ida", "b\udcff"), ("b\udcff", "it sells")):  # as Python has such bytes
        with pytest.raises(GateError, match="no text in UTF-8"):
            run("pin", "c0ff", "--why", why, "--who", who)
    # A reason is shown as it was written, and whole: what looks like markup, and long links.
    link = "https://tracker.example.org/posters/issues/1234567890-burnt-in-letters-of-every-poster"
    run("pin", "c0ff", "--why", f"[urgent] :boom: see [/ticket 12] and {link}")
    shown = run("show").replace(" ", "")
    assert "[urgent]:boom:see[/ticket12]and" in shown and link in shown
    with (
        monkeypatch.context() as nameless,
        pytest.raises(GateError, match="9753 has no name"),
    ):
        for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            nameless.delenv(name, raising=False)
        nameless.setattr("os.getuid", lambda: 9753)
        run("unpin", "--why", "x")
    # A base model that is not here yet has no fingerprint: enough to look, too little to decide.
    monkeypatch.setenv("POSTERPIPE_BASE_MODEL__ID", "owner/name-of-no-model")
    assert "Served: c0ffee12 (a fine-tuned checkpoint)" in run()
    with pytest.raises(ModelMissing, match="hf download owner/name-of-no-model"):
        run("rollback", "--why", "x")
