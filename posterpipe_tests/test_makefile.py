"""What the targets of the Makefile run, and what they remove."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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


MAKE = ("make", "-f", str(default_root() / "Makefile"))


def attempt(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MAKE, *arguments],
        cwd=checkout,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def make(checkout: Path, *arguments: str, **variables: str) -> str:
    done = attempt(checkout, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_that(folder: Path, does: str) -> Path:
    """A Python whose `-m venv` leaves an environment without pip, and then `does` something."""
    python = folder / "python3"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] || exec {sys.executable} "$@"\n'
        f"mkdir -p .venv/bin && cp /bin/true .venv/bin/python && {does}\n"
    )
    python.chmod(0o755)
    return python


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
    monkeypatch.setenv("DAGSTER_HOME", "")  # as if it were not set
    tools = Path(sys.executable).parent
    make(checkout, "-o", "install", "migrate", f"BIN={tools}", PYTHONPATH=str(default_root()))
    assert (checkout / ".dagster" / "dagster.yaml").exists()
    assert (checkout / ".dagster" / "history").is_dir()


def test_an_environment_that_could_not_be_made_is_removed_and_the_package_named(
    tmp_path: Path,
) -> None:
    python = python_that(tmp_path, "exit 1")
    done = attempt(tmp_path, ".venv/bin/pip", f"PYTHON={python}")
    assert done.returncode != 0 and "apt install python3-venv" in done.stdout
    assert not (tmp_path / ".venv").exists()


def test_an_environment_whose_making_was_stopped_is_removed(tmp_path: Path) -> None:
    waits = "import pathlib, time; pathlib.Path('begun').touch(); time.sleep(60)"
    python = python_that(tmp_path, f'exec {sys.executable} -c "{waits}"')
    making = subprocess.Popen(
        [*MAKE, ".venv/bin/pip", f"PYTHON={python}"],
        cwd=tmp_path,
        start_new_session=True,
        # A shell leaves it ignored in what runs in its background, the tests for one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(making.pid, signal.SIGINT)  # as Ctrl-C does
        assert making.wait(60) != 0
    finally:
        making.kill()
    assert not (tmp_path / ".venv").exists()


def test_a_half_made_environment_is_made_whole_and_the_install_says_that_it_takes_long(
    tmp_path: Path,
) -> None:
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    (tmp_path / "pyproject.toml").write_text("no project")
    # What is here is no project, so pip ends with an error.
    done = attempt(tmp_path, "install", f"PYTHON={Path(sys.executable).resolve()}")
    assert (tmp_path / ".venv/bin/pip").exists(), done.stderr
    assert "installing the packages: some gigabytes" in done.stdout
    assert done.returncode != 0 and not (tmp_path / ".venv/installed").exists()
