"""What the tests of the Dagster layer share."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import dagster as dg
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from posterpipe_tests.defs.harness import World


@event.listens_for(Engine, "connect")
def _leave_the_disk_alone(connection: Any, _: object) -> None:
    """Dagster's databases of a test need not outlive a power failure, and waiting for the disk is a
    fifth of these tests' time."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")


class MakeWorld(Protocol):
    """Makes a world of assets, on an instance of its own."""

    def __call__(self, checked: str = "", **reads: str) -> World: ...


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """A Dagster instance on disk, as people have one."""
    home = tmp_path / "dagster_home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    with dg.DagsterInstance.from_config(str(home)) as instance:
        yield instance


@pytest.fixture
def make_world(tmp_path: Path, instance: dg.DagsterInstance) -> MakeWorld:
    """`make_world(a="", b="a", c="a b", checked="a")`: a world of assets and what they read."""

    def make(checked: str = "", **reads: str) -> World:
        inputs = {name: names.split() for name, names in reads.items()}
        return World(tmp_path, instance, inputs, checked=checked.split())

    return make
