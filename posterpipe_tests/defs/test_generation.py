"""Drawing as assets: what could not be drawn is tried again, who lost the device is named, and no
checkpoint draws for another base model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest

from posterpipe.core.models import fingerprint
from posterpipe.core.provenance.checkpoints import CHECKPOINT, BaseModelsDiffer
from posterpipe.core.sampler import ImageRequest, Sampler
from posterpipe.defs import retries
from posterpipe.defs.generation import base_generations, prompt_suite, tuned_generations
from posterpipe.defs.metadata import FAILED_ITEMS
from posterpipe.defs.resources import TABLES, Deployment, store_tables
from posterpipe.defs.sweep import stale_sweep
from posterpipe.settings import load_settings
from posterpipe_tests.defs.harness import Daemon
from posterpipe_tests.models import (
    TINY_HEIGHT,
    TINY_TOKENS,
    TINY_WIDTH,
    build_tiny_stable_diffusion,
)

SUITE = """
prompts:
  - id: rocket
    prompt: a rocket
    score_text: a rocket
    seeds: [1, 2]
"""


@pytest.fixture
def daemon(tmp_path: Path, instance: dg.DagsterInstance) -> Daemon:
    """The suite and what the base model draws of it; nothing is made yet."""
    (tmp_path / "suite.yaml").write_text(SUITE, "utf-8")
    settings = load_settings(
        "starter",
        store=tmp_path / "store",
        prompt_suite=tmp_path / "suite.yaml",
        base_model={"id": str(build_tiny_stable_diffusion(tmp_path / "base"))},
        sampler={"width": TINY_WIDTH, "height": TINY_HEIGHT, "num_inference_steps": 1},
    )
    deployment = Deployment(settings)
    definitions = dg.Definitions(
        assets=[prompt_suite, base_generations],
        sensors=[stale_sweep],
        resources={"deployment": deployment, TABLES: store_tables(deployment)},
    )
    return Daemon(definitions, instance)


def test_a_checkpoint_of_another_base_model_draws_nothing(
    daemon: Daemon, tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    """As after a change of the profile: the sampler is that of the new one."""
    assert daemon.run("prompt_suite")
    deployment = daemon.definitions.resources["deployment"]  # type: ignore[index]
    facts = {"base_model": "another", "base_model_name": "its name"}
    deployment.store.add_results(CHECKPOINT, {"tuned": facts})
    row = {"checkpoint_id": "tuned", "path": "checkpoints/tuned", "training_set": "", **facts}
    deployment.store.write_table("dreambooth_checkpoint", pd.DataFrame([row]))
    inputs = [
        dg.AssetSpec(name).with_io_manager_key(TABLES)
        for name in ("prompt_suite", "dreambooth_checkpoint")
    ]
    own = fingerprint(deployment.settings.base_model, deployment.settings.root)
    told = (
        f"tuned was tuned from the base model another, and the base model is {own} now.*`retrain`"
    )
    with pytest.raises(BaseModelsDiffer, match=told):
        dg.materialize(
            [tuned_generations, *inputs],
            instance=instance,
            resources=daemon.definitions.resources,
        )


def fail_with(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """Let the drawing of the second seed fail."""
    call = Sampler.__call__

    def fails(self: Sampler, requests: Sequence[ImageRequest], on_step: None = None) -> Any:
        if any(request.seed == 2 for request in requests):
            raise RuntimeError(message)
        return call(self, requests, on_step)

    monkeypatch.setattr(Sampler, "__call__", fails)


def failed_items(daemon: Daemon) -> Any:
    made = daemon.instance.get_latest_materialization_event(dg.AssetKey("base_generations"))
    assert made is not None
    assert made.asset_materialization is not None
    return made.asset_materialization.metadata[FAILED_ITEMS].value


def last_failure(daemon: Daemon) -> str:
    """What the one step that failed in the latest run said."""
    run = daemon.instance.get_runs(limit=1)[0]
    failures = daemon.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    [said] = [
        entry.get_dagster_event().step_failure_data.error_display_string for entry in failures
    ]
    return said


def test_images_that_could_not_be_drawn_are_drawn_later(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        fail_with(patched, "no such kernel")
        assert daemon.run("prompt_suite", "base_generations")
    assert failed_items(daemon) == 2  # with and without the negative prompt, which is empty
    assert [daemon.sweep(), daemon.sweep()] == [[], []]
    monkeypatch.setattr(retries, "now", lambda: time.time() + 3600)
    assert [daemon.sweep(), daemon.sweep()] == [[], ["base_generations"]]
    assert daemon.work() == [True]
    assert failed_items(daemon) == 0
    monkeypatch.setattr(retries, "now", lambda: time.time() + 7200)
    assert [daemon.sweep(), daemon.sweep()] == [[], []]


def test_a_device_that_is_gone_is_told_with_the_asset_that_lost_it(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, "CUDA error: unspecified launch failure")
    assert daemon.run("prompt_suite")
    assert not daemon.run("base_generations")
    assert "base_generations: the sampler can no longer use its device" in last_failure(daemon)
    assert [daemon.sweep(), daemon.sweep()] == [[], []]
    assert "its GPU was lost; it is tried again after" in daemon.said


def test_a_prompt_that_the_base_model_would_cut_is_refused_where_the_model_is_here(
    daemon: Daemon, tmp_path: Path
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(SUITE.replace("prompt: a rocket", f"prompt: {'red ' * TINY_TOKENS}"), "utf-8")
    assert not daemon.run("prompt_suite")
    assert f"{suite}:4: `prompt` has 48 tokens and the models read 46" in last_failure(daemon)
    (tmp_path / "base" / "model_index.json").unlink()
    assert daemon.run("prompt_suite")  # what cannot be counted is estimated, and CLIP reads 75
