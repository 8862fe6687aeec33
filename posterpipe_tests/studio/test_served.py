"""Which models there are, and which one is served."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from posterpipe.core.champion.decisions import DECISION_COLUMNS, GATE, write_decisions
from posterpipe.core.models import fingerprint
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.core.warehouse.publication import publish_scores
from posterpipe.settings import ModelRef, Settings
from posterpipe.studio.served import Models

GOOD, BAD, NEW = "aaaa0000aaaa", "bbbb1111bbbb", "cccc2222cccc"


def checkpoint(settings: Settings, name: str) -> None:
    folder = settings.path(settings.store) / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "posterpipe.json").write_text(json.dumps({"checkpoint_id": name}), encoding="utf-8")


def decided(settings: Settings, *verdicts: tuple[str, str], minute: int = 0) -> Path:
    """Writes decisions of the gate; the warehouse."""
    path = settings.path(settings.store) / "warehouse.duckdb"
    rows: list[dict[str, Any]] = [
        {
            "decision_id": f"{minute}-{place}", "checkpoint_id": name, "champion_before": "",
            "decided_at": dt.datetime(2026, 1, 1, 0, minute, place), "decision": verdict,
            "reason": "a test", "numbers": "{}", "decided_by": GATE, "run_id": "run",
        }
        for place, (name, verdict) in enumerate(verdicts)
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=list(DECISION_COLUMNS))
    write_decisions(Warehouse(path), lambda *_: table)
    return path


def test_before_any_checkpoint_the_base_model_is_the_champion(deployment: Settings) -> None:
    served = Models(deployment).served()
    (only,) = served.choices
    assert only is served.champion is served.base
    assert only.name == fingerprint(deployment.base_model, deployment.root)
    assert not deployment.path(deployment.store).exists(), "looking creates nothing"


def test_a_base_model_that_is_not_downloaded_yet_goes_by_its_id(deployment: Settings) -> None:
    checkpoint(deployment, GOOD)
    decided(deployment, (GOOD, "promote"))
    elsewhere = ModelRef(id="owner/name-of-no-model", revision="main")
    served = Models(deployment.model_copy(update={"base_model": elsewhere})).served()
    assert served.champion.name == GOOD and not served.notes
    assert served.base.name == "owner/name-of-no-model"


def test_the_champion_is_the_default_and_a_rejected_checkpoint_is_marked(
    deployment: Settings,
) -> None:
    for name in (GOOD, BAD, NEW):
        checkpoint(deployment, name)
    decided(deployment, (GOOD, "promote"), (BAD, "reject"))
    served = Models(deployment).served()
    assert served.champion.name == GOOD and served.champion.champion
    marks = {choice.name: choice.rejected for choice in served.choices}
    assert marks == {GOOD: False, served.base.name: False, BAD: True, NEW: False}
    assert "rejected" in served.named(BAD).label and "not judged" in served.named(NEW).label
    assert served.named("gone").name == GOOD


def test_a_checkpoint_rejected_later_is_not_the_default_any_more(deployment: Settings) -> None:
    checkpoint(deployment, GOOD)
    decided(deployment, (GOOD, "promote"))
    models = Models(deployment)
    assert models.served().champion.name == GOOD
    decided(deployment, (GOOD, "reject"), minute=1)
    assert models.served().champion.kind == "base"


def test_while_the_pipeline_writes_the_published_copy_tells_the_champion(
    deployment: Settings,
) -> None:
    checkpoint(deployment, GOOD)
    private = decided(deployment, (GOOD, "promote"))
    publish_scores(private, private.parent / "public", run_id="run")
    hold = (
        "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('held', flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(private)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as writer:  # fmt: skip
        assert writer.stdout is not None and writer.stdout.readline().strip() == "held"
        assert Models(deployment).served().champion.name == GOOD
        assert writer.stdin is not None
        writer.stdin.close()
        writer.wait(30)


def test_a_champion_whose_files_are_gone_is_told_and_the_base_model_draws(
    deployment: Settings,
) -> None:
    decided(deployment, (GOOD, "promote"))
    served = Models(deployment).served()
    assert served.champion.kind == "base"
    (told,) = served.notes
    assert GOOD[:8] in told
