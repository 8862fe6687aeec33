"""The services as `make dev` starts them, on a deployment with tiny models.

What belongs here: such a deployment, its services, and what they tell through GraphQL. What does
not: what must hold (the tests).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from posterpipe.defs.metadata import DATA_VERSION, INPUTS_READ
from posterpipe.defs.staleness import INPUT_DATA_VERSION
from posterpipe.settings import default_root
from posterpipe_tests.core.metrics.test_clip import build_tiny_clip
from posterpipe_tests.core.tiny_blip import build_tiny_blip
from posterpipe_tests.models import TINY_HEIGHT, TINY_WIDTH, build_tiny_stable_diffusion

POSTERS = 6
HELD_OUT = 3
PATIENCE = 2_400.0
"""Seconds; everything from an empty store takes about three minutes on two free cores."""

PROFILE = """
base_model = {{ id = "{folder}/base" }}
landing = "{folder}/landing"
holdout = "{folder}/holdout"
captions = "{folder}/captions.csv"
prompt_suite = "{folder}/suite.yaml"
store = "{folder}/store"

[images]
width = {width}
height = {height}

[captioner]
model = {{ id = "{folder}/captioner" }}
num_beams = 1
max_new_tokens = 12

[training]
max_train_steps = 2
train_batch_size = 2
log_every_steps = 1
save_every_steps = 2
mixed_precision = "fp32"
optimizer = "adamw"
learning_rate = 1e-3

[sampler]
width = {width}
height = {height}
num_inference_steps = 2
batch_size = 4

[scorer]
model = {{ id = "{folder}/scorer" }}

# A captioner of random weights has no choice.
[checks]
max_repeated_share = 1.0
max_shared_captions = 1.0

[automation]
training_cron = "* * * * *"
min_new_posters = 1
settle_seconds = 1
sensor_interval_seconds = 5
"""

SUITE = """
prompts:
  - id: rocket
    prompt: a film poster of a red rocket
    score_text: a red rocket
    negative: busy
    seeds: [1, 2]
"""

ASSETS = """
query {
  assetNodes {
    assetKey { path }
    dependencyKeys { path }
    assetMaterializations(limit: 1) {
      runId
      timestamp
      tags { key value }
      metadataEntries {
        label
        ... on IntMetadataEntry { intValue }
        ... on TextMetadataEntry { text }
        ... on BoolMetadataEntry { boolValue }
        ... on JsonMetadataEntry { jsonString }
        ... on TableMetadataEntry { table { records } }
      }
    }
  }
}
"""

INSTIGATORS = """
query {
  repositoriesOrError {
    ... on RepositoryConnection {
      nodes {
        sensors { name sensorState { status ticks(limit: 20) { status skipReason } } }
        schedules { name scheduleState { status ticks(limit: 20) { status skipReason } } }
      }
    }
  }
}
"""

RUNS = (
    "query { runsOrError { ... on Runs { results { runId status jobName tags { key value } } } } }"
)


@dataclass
class Made:
    """The latest materialization of an asset."""

    run_id: str
    version: str
    inputs: dict[str, str]
    """Data versions that it was made from, by asset."""
    metadata: dict[str, Any]


class Services:
    """What `make dev` starts, and what it shows."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self._process = process
        self.url = url
        self._log = log
        self._client = httpx.Client(timeout=60)

    def ask(self, query: str) -> Any:
        """The data of a GraphQL query."""
        answer = self._client.post(f"{self.url}/graphql", json={"query": query})
        answer.raise_for_status()
        content = answer.json()
        assert "errors" not in content, content["errors"]
        return content["data"]

    def assets(self) -> dict[str, Made]:
        """Every asset that was made, as it is now."""
        made = {}
        for node in self.ask(ASSETS)["assetNodes"]:
            for event in node["assetMaterializations"]:
                tags = {tag["key"]: tag["value"] for tag in event["tags"]}
                metadata = {entry["label"]: _value(entry) for entry in event["metadataEntries"]}
                noted = {
                    name: tags.get(INPUT_DATA_VERSION + name, "")
                    for name in ("/".join(key["path"]) for key in node["dependencyKeys"])
                }
                made["/".join(node["assetKey"]["path"])] = Made(
                    event["runId"],
                    tags[DATA_VERSION],
                    noted | metadata.get(INPUTS_READ, {}),  # as `staleness.used_version` takes them
                    metadata,
                )
        return made

    def expected(self) -> int:
        """How many assets there are."""
        return len(self.ask(ASSETS)["assetNodes"])

    def instigators(self) -> dict[str, dict[str, Any]]:
        """Sensors and schedules, with status and last ticks."""
        (repository,) = self.ask(INSTIGATORS)["repositoriesOrError"]["nodes"]
        states = {each["name"]: each["sensorState"] for each in repository["sensors"]}
        return states | {each["name"]: each["scheduleState"] for each in repository["schedules"]}

    def said(self) -> dict[str, str]:
        """The last skip reason of each sensor and schedule."""
        return {
            name: next((tick["skipReason"] for tick in state["ticks"] if tick["skipReason"]), "")
            for name, state in self.instigators().items()
        }

    def wait(self, what: str, holds: Callable[[dict[str, Made]], bool]) -> dict[str, Made]:
        """The assets as soon as they are so; fails with all that is known when that takes long."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"the services ended:\n{self.last_words()}"
            assets = self.assets()
            if holds(assets):
                return assets
            time.sleep(2)
        runs = self.runs()
        raise AssertionError(
            f"{what}: not after {PATIENCE:.0f} s\n"
            + "\n".join(f"{name}: {made}"[:400] for name, made in self.assets().items())
            + "\n".join(f"{run['status']} {run['jobName']} {run['tags']}"[:400] for run in runs)
            + "\n".join(f"{name}: {state}"[:400] for name, state in self.instigators().items())
            + f"\n{self.last_words()}"
        )

    def last_words(self) -> str:
        """The end of what the services logged."""
        return self._log.read_text("utf-8", errors="replace")[-6000:]

    def runs(self) -> list[dict[str, Any]]:
        """All runs, the last one first."""
        return list(self.ask(RUNS)["runsOrError"]["results"])

    def kill(self) -> None:
        """End the services and their runs as a power cut does."""
        os.killpg(self._process.pid, signal.SIGKILL)  # the group that it was started as
        self._process.wait(60)

    def stop(self) -> None:
        """End the services as Ctrl-C does, and whatever of theirs is left then."""
        self._client.close()
        self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        with suppress(ProcessLookupError):
            self.kill()


def _value(entry: Mapping[str, Any]) -> Any:
    if "table" in entry:
        return [json.loads(record) for record in entry["table"]["records"]]
    if "jsonString" in entry:
        return json.loads(entry["jsonString"])
    names = ("intValue", "text", "boolValue")
    return next((entry[name] for name in names if name in entry), None)


def draw_poster(path: Path, number: int) -> None:
    coarse = np.random.default_rng(number).integers(0, 256, (6, 4, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((80, 120), Image.Resampling.BICUBIC)
    image.save(path)


def build_deployment(folder: Path) -> Path:
    """Tiny models, posters, prompts, a profile that names them, and a DAGSTER_HOME; `folder`."""
    build_tiny_stable_diffusion(folder / "base")
    build_tiny_blip(folder / "captioner")
    build_tiny_clip(folder / "scorer")
    (folder / "landing").mkdir()
    for number in range(POSTERS):
        draw_poster(folder / "landing" / f"poster {number}.png", number)
    (folder / "holdout").mkdir()
    for number in range(HELD_OUT):
        draw_poster(folder / "holdout" / f"held {number}.png", 200 + number)
    (folder / "suite.yaml").write_text(SUITE, "utf-8")
    profile = PROFILE.format(folder=folder, width=TINY_WIDTH, height=TINY_HEIGHT)
    (folder / "tiny.toml").write_text(profile, "utf-8")
    (folder / "home").mkdir()
    shutil.copyfile(default_root() / "deploy" / "dagster.yaml", folder / "home" / "dagster.yaml")
    return folder


@contextmanager
def started(folder: Path) -> Iterator[Services]:
    """The services of a deployment in that folder, until they are stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("POSTERPIPE_")
    }
    environment |= {
        "DAGSTER_HOME": str(folder / "home"),
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "POSTERPIPE_PROFILE": str(folder / "tiny.toml"),
    }
    log = folder / "services.log"
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dagster", "dev"),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--workspace", str(default_root() / "workspace.yaml")),
            ],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    running = Services(process, f"http://127.0.0.1:{port}", log)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None, running.last_words()
            try:
                running.expected()
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline, running.last_words()
                time.sleep(1)
        yield running
    finally:
        running.stop()
