"""The services as `make dev` starts them, left to themselves: webserver, daemon, code server.

Nothing is requested by hand. The tests copy posters into a folder and take them away, kill the
services, and look through the webserver's GraphQL at what follows.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from posterpipe_tests.services import (
    POSTERS,
    Made,
    Services,
    build_deployment,
    draw_poster,
    started,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_deployment(tmp_path)


def everything_matches(assets: Mapping[str, Made], count: int) -> bool:
    """Every asset is there, and was made from its inputs as they are now."""
    return len(assets) == count and all(
        version == assets[name].version
        for made in assets.values()
        for name, version in made.inputs.items()
    )


def posters(assets: Mapping[str, Made]) -> list[str]:
    if "raw_posters" not in assets:
        return []
    return [row["source_name"] for row in assets["raw_posters"].metadata["posters"]]


@pytest.fixture
def services(folder: Path) -> Iterator[Services]:
    with started(folder) as services:
        yield services


@pytest.mark.slow
def test_posters_that_come_and_go_are_followed_without_another_touch(
    services: Services, folder: Path
) -> None:
    # What is to run by itself is on.
    instigators = services.instigators()
    for name in ("arrivals", "automation", "stale_sweep", "training"):
        assert instigators[name]["status"] == "RUNNING", name

    # From nothing to published scores, the first training included.
    count = services.expected()
    first = services.wait("everything is made", lambda assets: everything_matches(assets, count))
    assert len(posters(first)) == POSTERS
    assert first["training_csv"].metadata["dagster/row_count"] == POSTERS

    # One more poster.
    draw_poster(folder / "new.png", 100)
    shutil.copyfile(folder / "new.png", folder / "landing" / "new.png")

    def arrived(assets: dict[str, Made]) -> bool:
        return "new.png" in posters(assets) and everything_matches(assets, count)

    second = services.wait("the new poster is everywhere", arrived)
    assert second["poster_captions"].metadata["dagster/row_count"] == POSTERS + 1
    assert second["training_csv"].metadata["dagster/row_count"] == POSTERS + 1
    checkpoint = second["dreambooth_checkpoint"]
    assert checkpoint.metadata["training_set"] == second["training_csv"].version
    assert checkpoint.metadata["reused"] is False
    assert second["tuned_generations"].metadata["checkpoint_id"] == checkpoint.version
    for name in ("tuned_generations", "clip_scores", "published_scores"):
        assert second[name].version != first[name].version, name
    # What does not depend on posters is as it was, whatever a retraining looks at, and what follows
    # the checkpoint was made with it, and not once more by the policy.
    assert second["base_generations"].version == first["base_generations"].version
    followers = [run for run in services.runs() if run["jobName"] == "retrain"]
    assert second["published_scores"].run_id == followers[0]["runId"]

    # And away again: nothing of it is trained on, and what is known is not trained again.
    (folder / "landing" / "new.png").unlink()

    def gone(assets: dict[str, Made]) -> bool:
        return "new.png" not in posters(assets) and everything_matches(assets, count)

    third = services.wait("the poster is gone everywhere", gone)
    assert third["training_csv"].version == first["training_csv"].version
    assert third["dreambooth_checkpoint"].version == first["dreambooth_checkpoint"].version
    assert third["dreambooth_checkpoint"].metadata["reused"] is True
    assert third["clip_scores"].version == first["clip_scores"].version

    # Then it is quiet, and says why.
    ended = ("SUCCESS", "FAILURE", "CANCELED")
    services.wait("no run is left", lambda _: all(r["status"] in ended for r in services.runs()))
    runs = services.runs()
    time.sleep(75)
    assert services.runs() == runs
    said = services.said()
    assert f"{POSTERS} posters in {folder / 'landing'}, unchanged since" in said["arrivals"]
    assert "the checkpoint was trained on this training set" in said["training"]


@pytest.mark.slow
def test_services_that_were_killed_during_a_training_go_on_by_themselves(folder: Path) -> None:
    def training(run: dict[str, Any]) -> bool:
        return run["jobName"] == "retrain" and run["status"] == "STARTED"

    with started(folder) as services:
        count = services.expected()
        services.wait("a training", lambda assets: any(map(training, services.runs())))
        (killed,) = filter(training, services.runs())
        services.kill()
    with started(folder) as services:
        services.wait("everything is made", lambda assets: everything_matches(assets, count))
        statuses = {run["runId"]: run["status"] for run in services.runs()}
        assert statuses.pop(killed["runId"]) == "FAILURE"
        assert "SUCCESS" in statuses.values()
