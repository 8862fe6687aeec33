"""Class images: drawn once, a training set of their own, nothing where they are not wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from posterpipe.core.dreambooth.data import read_training_set
from posterpipe.core.progress import NoProgress
from posterpipe.core.sampler import ImageRequest, Sampler
from posterpipe.core.store import Store
from posterpipe.core.training.class_images import build_class_images
from posterpipe.settings import Settings, load_settings
from posterpipe_tests.models import TINY_HEIGHT, TINY_WIDTH, build_tiny_stable_diffusion


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_stable_diffusion(tmp_path_factory.mktemp("models") / "base")


def settings_with(**training: object) -> Settings:
    size = {"width": TINY_WIDTH, "height": TINY_HEIGHT}
    return load_settings(
        "starter",
        images=size,
        sampler={**size, "num_inference_steps": 1, "batch_size": 2},
        training={"prior_preservation": True, "class_image_count": 3, **training},
    )


def test_they_are_drawn_once_and_are_a_training_set(base_model: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")

    def build(settings: Settings) -> tuple[int, Path | None, str]:
        made = build_class_images(store, base_model, "base", settings, NoProgress(), run_id="run")
        assert made.failed == 0
        return len(made.table), made.folder, made.version

    count, folder, version = build(settings_with(class_prompt="a film poster"))
    assert folder is not None
    examples = read_training_set(folder)
    assert count == len(examples) == 3
    assert {example.caption for example in examples} == {"a film poster"}
    blobs = {path: path.stat().st_mtime_ns for path in store.root.glob("blobs/*/*")}
    assert build(settings_with(class_prompt="a film poster")) == (3, folder, version)
    assert {path: path.stat().st_mtime_ns for path in store.root.glob("blobs/*/*")} == blobs

    more, _, other = build(settings_with(class_prompt="a film poster", class_image_count=4))
    assert (more, other != version) == (4, True)
    assert len(list(store.root.glob("blobs/*/*"))) == len(blobs) + 1


def test_those_that_could_not_be_drawn_are_counted(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Sampler.__call__

    def fails(self: Sampler, requests: Sequence[ImageRequest], on_step: None = None) -> Any:
        if any(request.seed == 1 for request in requests):
            raise RuntimeError("no such kernel")
        return call(self, requests, on_step)

    monkeypatch.setattr(Sampler, "__call__", fails)
    settings = settings_with(class_prompt="a film poster")
    made = build_class_images(
        Store(tmp_path / "store"), base_model, "base", settings, NoProgress(), run_id="run"
    )
    assert (len(made.table), made.failed) == (2, 1)


def test_nothing_is_drawn_where_the_prior_is_off(tmp_path: Path) -> None:
    settings = settings_with(prior_preservation=False)
    store = Store(tmp_path / "store")
    made = build_class_images(
        store, tmp_path / "no model", "base", settings, NoProgress(), run_id="run"
    )
    assert (len(made.table), made.folder, made.version) == (0, None, "")
