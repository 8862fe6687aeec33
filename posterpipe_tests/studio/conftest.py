"""A deployment small enough for pages: tiny models, four posters, nothing computed yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from posterpipe.settings import Settings, load_settings
from posterpipe.studio.served import Choice
from posterpipe_tests.core.metrics.tiny import build_tiny_clip
from posterpipe_tests.models import TINY_HEIGHT, TINY_WIDTH, build_tiny_stable_diffusion

SUITE = """
prompts:
  - id: red-rocket
    prompt: a minimalist film poster with a red rocket
    score_text: a red rocket
    negative: a cat
    title: Red One
    seeds: [7, 8]
"""

POSTERS = {"one.png": "red", "two.png": "green", "three.png": "blue", "four.png": "white"}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `base` and `scorer`."""
    folder = tmp_path_factory.mktemp("models")
    build_tiny_stable_diffusion(folder / "base")
    build_tiny_clip(folder / "scorer")
    return folder


@pytest.fixture
def deployment(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """The settings of the deployment, which `load_settings()` gives as well."""
    posters = tmp_path / "posters"
    posters.mkdir()
    for name, colour in POSTERS.items():
        Image.new("RGB", (80, 120), colour).save(posters / name)
    (tmp_path / "suite.yaml").write_text(SUITE, encoding="utf-8")
    values = {
        "ROOT": tmp_path,
        "LANDING": posters,
        "CAPTIONS": tmp_path / "captions.csv",
        "PROMPT_SUITE": tmp_path / "suite.yaml",
        "STORE": tmp_path / "store",
        "BASE_MODEL__ID": tiny_models / "base",
        "SCORER__MODEL__ID": tiny_models / "scorer",
        "SAMPLER__WIDTH": TINY_WIDTH,
        "SAMPLER__HEIGHT": TINY_HEIGHT,
        "SAMPLER__NUM_INFERENCE_STEPS": 3,
        "LETTERING__MIN_WIDTH": 320,
    }
    for name, value in values.items():
        monkeypatch.setenv(f"POSTERPIPE_{name}", str(value))
    yield load_settings("starter")


@pytest.fixture
def base(tmp_path: Path) -> Choice:
    """A choice for tests that load no model."""
    return Choice("0123456789ab", "base", tmp_path, champion=True)
