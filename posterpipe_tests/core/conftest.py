"""What tests of the core share.

What belongs here: fixtures and stand-ins that several of its files ask for. What does not: tables
and pictures to work on, which lie in modules beside the tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from posterpipe.core.store import Store
from posterpipe_tests.models import build_tiny_stable_diffusion


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_stable_diffusion(tmp_path_factory.mktemp("models") / "tiny")


def disk_is_full(*_: object) -> None:
    """In the place of what writes."""
    raise OSError(28, "No space left on device")
