"""What tests of the core share.

What belongs here: fixtures that several of its files ask for. What does not: values and functions,
which lie in modules beside the tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from posterpipe_tests.models import build_tiny_stable_diffusion


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_stable_diffusion(tmp_path_factory.mktemp("models") / "tiny")
