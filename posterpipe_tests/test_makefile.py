"""What the targets of the Makefile run, and what they remove."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from posterpipe.settings import default_root

CACHES = (".venv/bin/python", ".mypy_cache/x", "dbt_like_reports/target/manifest.json")
MADE = ("store/warehouse.duckdb", "store/checkpoints/one/model.safetensors", "home/history.db")
KEPT = ("store/starter_training/save.pt", "data/raw_posters/a.png", "notes.txt")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """With store and Dagster's home elsewhere, by variables."""
    for name in (*CACHES, *MADE, *KEPT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def make(checkout: Path, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        ["make", "-f", str(default_root() / "Makefile"), *arguments],
        cwd=checkout,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def there(checkout: Path) -> set[str]:
    return {name for name in (*CACHES, *MADE, *KEPT) if (checkout / name).exists()}


def elsewhere(checkout: Path) -> dict[str, str]:
    return {
        "POSTERPIPE_STORE": str(checkout / "store"),
        "DAGSTER_HOME": str(checkout / "home"),
    }


def test_clean_leaves_checkpoints_scores_and_runs_alone(checkout: Path) -> None:
    usual = checkout / "data" / "store"
    (checkout / "store").rename(usual)
    (checkout / "home").rename(checkout / ".dagster")
    make(checkout, "clean")
    assert (usual / "checkpoints/one/model.safetensors").exists()
    assert (usual / "warehouse.duckdb").exists() and (checkout / ".dagster/history.db").exists()
    assert not {name for name in CACHES if (checkout / name).exists()}
    assert (checkout / "notes.txt").exists()


def test_clean_store_first_lists_what_would_go_and_removes_nothing(checkout: Path) -> None:
    told = make(checkout, "clean-store", **elsewhere(checkout))
    assert there(checkout) == {*CACHES, *MADE, *KEPT}
    for name in ("store/warehouse.duckdb", "store/checkpoints", "home/history.db"):
        assert str(checkout / name) in told
    assert "starter_training" not in told and "YES=1" in told


def test_clean_store_removes_what_the_variables_name_and_says_so(checkout: Path) -> None:
    told = make(checkout, "clean-store", "YES=1", **elsewhere(checkout))
    assert there(checkout) == {*CACHES, *KEPT}
    assert str(checkout / "store/checkpoints") in told and "Removed" in told


def test_clean_store_finds_the_usual_places_without_variables(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("POSTERPIPE_STORE", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)
    (checkout / "store").rename(checkout / "data" / "store")
    (checkout / "home").rename(checkout / ".dagster")
    make(checkout, "clean-store", "YES=1")
    assert not (checkout / "data/store/warehouse.duckdb").exists()
    assert (checkout / "data/store/starter_training/save.pt").exists()
    assert not (checkout / ".dagster/history.db").exists()
    make(checkout, "clean-store", "YES=1")


def test_migrate_finds_the_home_that_dev_uses(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    tools = Path(sys.executable).parent
    make(checkout, "-o", "install", "migrate", f"BIN={tools}", PYTHONPATH=str(default_root()))
    assert (checkout / ".dagster" / "dagster.yaml").exists()
    assert (checkout / ".dagster" / "history").is_dir()
