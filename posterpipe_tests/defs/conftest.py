"""What the tests of the Dagster layer share."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol

import dagster as dg
import pytest
import sqlalchemy
from alembic.config import Config
from alembic.script import ScriptDirectory
from dagster._core.storage.event_log.sqlite import sqlite_event_log
from dagster._core.storage.runs.sqlite import sqlite_run_storage
from dagster._core.storage.schedules.sqlite import sqlite_schedule_storage
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.pool import QueuePool

from posterpipe_tests.defs.harness import World

DAGSTER_YAML = """
telemetry: {enabled: false}
# Two processes a step would copy what it prints, which no test reads there.
compute_logs:
  module: dagster._core.storage.noop_compute_log_manager
  class: NoOpComputeLogManager
"""


@event.listens_for(Engine, "connect")
def _leave_the_disk_alone(connection: Any, _: object) -> None:
    """Dagster's databases of a test need not outlive a power failure, and waiting for the disk is a
    fifth of these tests' time."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")


@pytest.fixture(scope="package", autouse=True)
def _revisions_are_read_once() -> Iterator[None]:
    """Dagster asks of each database whether it has the newest revision, for which alembic reads a
    hundred files: most of the time that an instance takes to open."""
    read = ScriptDirectory.from_config

    @cache
    def read_once(folder: str) -> ScriptDirectory:
        config = Config()
        config.set_main_option("script_location", folder)
        return read(config)

    def from_config(config: Config) -> ScriptDirectory:
        return read_once(str(config.get_main_option("script_location")))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ScriptDirectory, "from_config", from_config)
        yield


class Pool(QueuePool):
    """Connections that stay open when their engine is told to let them go."""

    def dispose(self) -> None:
        pass

    def recreate(self) -> QueuePool:
        return self


@pytest.fixture(scope="package", autouse=True)
def _connections_are_kept() -> Iterator[None]:
    """Dagster makes an engine for each look into one of its databases, which opens the file and
    compiles the statements anew: three quarters of the time of a run."""

    @lru_cache(maxsize=32)
    def make_once(url: str, timeout: float | None) -> Engine:
        arguments = {} if timeout is None else {"timeout": timeout}
        return sqlalchemy.create_engine(url, poolclass=Pool, connect_args=arguments)

    def create_engine(url: str, connect_args: Mapping[str, float] = {}, **_: object) -> Engine:
        return make_once(url, connect_args.get("timeout"))

    with pytest.MonkeyPatch.context() as patched:
        for module in (sqlite_event_log, sqlite_run_storage, sqlite_schedule_storage):
            patched.setattr(module, "create_engine", create_engine)
        yield


class MakeWorld(Protocol):
    """Makes a world of assets, on an instance of its own."""

    def __call__(self, checked: str = "", **reads: str) -> World: ...


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose databases are made and hold nothing: read it only."""
    home = tmp_path_factory.mktemp("empty") / "dagster_home"
    home.mkdir()
    (home / "dagster.yaml").write_text(DAGSTER_YAML)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        # A database is made when it is first asked; that of events without a run has no name.
        instance.get_runs(limit=1)
        instance.get_asset_keys(limit=1)
        instance.all_logs("")
        instance.all_instigator_state()
    return home


@pytest.fixture
def instance(tmp_path: Path, empty_home: Path) -> Iterator[dg.DagsterInstance]:
    """A Dagster instance on disk, as people have one."""
    home = tmp_path / "dagster_home"
    shutil.copytree(empty_home, home)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        yield instance


@pytest.fixture
def instance_with_logs(tmp_path: Path, empty_home: Path) -> Iterator[dg.DagsterInstance]:
    """The same, which keeps on disk what runs and ticks log, as Dagster does unless told
    otherwise."""
    home = tmp_path / "dagster_home_with_logs"
    shutil.copytree(empty_home, home)
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}")
    with dg.DagsterInstance.from_config(str(home)) as instance:
        yield instance


@pytest.fixture
def make_world(tmp_path: Path, instance: dg.DagsterInstance) -> MakeWorld:
    """`make_world(a="", b="a", c="a b", checked="a")`: a world of assets and what they read."""

    def make(checked: str = "", **reads: str) -> World:
        inputs = {name: names.split() for name, names in reads.items()}
        return World(tmp_path, instance, inputs, checked=checked.split())

    return make
