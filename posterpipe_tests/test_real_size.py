"""The whole chain at the real size, on a CPU, in 24 GiB: nothing of the starter's size is baked
in."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import threading
from pathlib import Path

import dagster as dg
import psutil
import pytest
from rich.console import Console

from posterpipe.commands.demo import Watch, materialize
from posterpipe.core.progress import BarProgress
from posterpipe.defs.resources import Deployment
from posterpipe.settings import default_root, load_settings
from posterpipe_tests.real_size import build

LIMIT_GIB = 24
OTHER_MODELS = ("blip-image-captioning-large", "clip-vit-large-patch14", "dinov2-base")
SUITE = """
prompts:
  - id: rocket
    prompt: animated movie poster 'rocket' only one spaceship is prominently displayed in the center
    score_text: a film poster of one spaceship
    negative: busy, cluttered
    seeds: [11]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which models are built on demand: a new one, or one that is kept."""
    kept = os.environ.get("POSTERPIPE_REAL_SIZE_MODELS")
    return Path(kept) if kept else tmp_path_factory.mktemp("models")


class Memory:
    """The most memory that this process and those below it held at one moment, looked at each half
    second. Peaks of each, added up, would count moments that never were together."""

    def __init__(self) -> None:
        self.peak_gib = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        this = psutil.Process()
        while not self._ended.wait(0.5):
            held = 0
            for process in [this, *this.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    held += process.memory_info().rss
            self.peak_gib = max(self.peak_gib, held / 2**30)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "base"),
    [("sd21", "stable-diffusion-2-1-base"), ("sd21_768", "stable-diffusion-2-1")],
)
def test_two_posters_and_two_steps_go_through_the_whole_chain(
    tmp_path: Path, models: Path, profile: str, base: str
) -> None:
    # pytest keeps what bitsandbytes logs when first imported, with it an exception, and with that
    # the frames of all who asked for it: a sampler with its model, for the rest of the test.
    importlib.import_module("bitsandbytes")
    shipped = load_settings(profile)
    assert shipped.base_model.id.endswith(base)
    data = default_root() / "data"
    for folder, count in (("raw_posters", 2), ("holdout_posters", 1)):
        (tmp_path / folder).mkdir()
        for poster in sorted((data / folder).iterdir())[:count]:
            shutil.copy(poster, tmp_path / folder)
    (tmp_path / "suite.yaml").write_text(SUITE)
    ref = {name: {"id": str(build(name, models))} for name in (base, *OTHER_MODELS)}
    settings = load_settings(
        profile,
        landing=tmp_path / "raw_posters",
        holdout=tmp_path / "holdout_posters",
        captions=tmp_path / "captions.csv",
        prompt_suite=tmp_path / "suite.yaml",
        store=tmp_path / "store",
        base_model=ref[base],
        captioner={
            "model": ref["blip-image-captioning-large"],
            "batch_size": 2,
            "num_beams": 1,
            "max_new_tokens": 8,
        },
        training={
            **shipped.training.model_dump(),
            "max_train_steps": 2,
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            "holdout_every_steps": 2,
            "holdout_timesteps": 1,
            "log_every_steps": 1,
        },
        sampler={
            **shipped.sampler.model_dump(),
            "num_inference_steps": 2,
            "precision": "bf16",
            "batch_size": 1,
        },
        scorer={"model": ref["clip-vit-large-patch14"], "batch_size": 4},
        evidence={"image_encoders": [ref["clip-vit-large-patch14"], ref["dinov2-base"]]},
        checks={"min_posters": 2},
    )
    home = tmp_path / "home"
    home.mkdir()
    shutil.copyfile(default_root() / "deploy" / "dagster.yaml", home / "dagster.yaml")
    screen = io.StringIO()
    console = Console(file=screen, width=120)
    with dg.DagsterInstance.from_config(str(home)) as instance, Memory() as memory:
        deployment = Deployment(settings, BarProgress(console))
        watch = Watch()
        assert materialize(deployment, instance, console, watch), (watch.failures, watch.warnings)
    scores = deployment.store.read_table("clip_scores")
    assert sorted(scores["variant"]) == ["dreambooth", "dreambooth_negative", "sd", "sd_negative"]
    row = deployment.store.read_table("dreambooth_checkpoint").iloc[0]
    record = json.loads((deployment.store_root / row["path"] / "posterpipe.json").read_text())
    assert record["steps"] == 2 and len(record["holdout"]) == 2
    assert record["settings"]["optimizer"] == "adamw_8bit"
    training = max(report["memory_gib"] for report in record["reports"])
    print(
        f"{profile}: training {training:.1f} GiB, {record['seconds']:.0f} s for two steps; "
        f"everything together {memory.peak_gib:.1f} GiB"
    )
    assert training < memory.peak_gib < LIMIT_GIB
