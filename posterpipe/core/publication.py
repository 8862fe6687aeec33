"""The folder that analysts read: the database, its tables as Parquet, and the last few of both.

What belongs here: what a publication holds and how one takes the place of another. What does not:
copying the database (`warehouse`), and when to publish (`defs.reports`).

    public/scores.duckdb            the database, a file of the newest snapshot (a hard link)
    public/parquet/<table>.parquet  its tables, a folder of the newest snapshot (a symbolic link)
    public/snapshots/<time>/        the newest publications, each whole: scores.duckdb and parquet/

Everything is read-only and replaced by renaming, the database first. Who has a file open keeps
reading it; who reads several Parquet files at once and wants them of one publication resolves
`parquet` first, or reads from a snapshot.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path

import duckdb

from posterpipe.core.store import fsync_folder
from posterpipe.core.warehouse import (
    BUSY_SECONDS,
    SCHEMA_VERSION,
    STORAGE_VERSION,
    TABLES,
    VIEWS,
    PublishError,
    publish,
)

SNAPSHOTS_KEPT = 5
"""Publications that stay, the newest included; each takes as much room as the database."""

DATABASE, PARQUET, SNAPSHOTS = "scores.duckdb", "parquet", "snapshots"

PUBLICATION_TABLE = "publication"
"""One row: which publication this is."""

_FORMAT = "%Y-%m-%dT%H-%M-%S.%fZ"
_LEFT_OVER_SECONDS = 86_400


@dataclass(frozen=True)
class Publication:
    """One publication."""

    publication_id: str
    """When it was, in UTC; the name of its snapshot."""
    database: Path
    parquet: Path
    snapshot: Path
    rows: dict[str, int]
    """Of each table; without the table `publication` itself."""


def publish_scores(
    private: Path,
    public: Path,
    *,
    run_id: str,
    reports: Collection[str] | None = None,
    kept: int = SNAPSHOTS_KEPT,
    busy_seconds: float = BUSY_SECONDS,
) -> Publication:
    """Publishes the private database into the folder `public`.

    `reports` are the tables to publish beside the warehouse's own: one whose model was taken away
    is still in the private file and would be read for ever. None: all that are there. On any error
    the publication of before stays. Raises WarehouseMissing, WarehouseBusy and PublishError.
    """
    public = Path(public)
    snapshots = public / SNAPSHOTS
    now = dt.datetime.now(dt.UTC)
    publication_id = now.strftime(_FORMAT)
    try:
        snapshots.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_published(public, error) from error
    _sweep(public)
    rows: dict[str, int] = {}

    def finish(connection: duckdb.DuckDBPyConnection, database: str) -> None:
        if reports is not None:
            _drop_others(connection, database, {*TABLES, *VIEWS, *reports})
        rows.update(_row_counts(connection, database))
        _tell(connection, database, publication_id, now, run_id, rows)

    with _temporary(snapshots) as folder:
        publish(private, folder / DATABASE, busy_seconds=busy_seconds, finish=finish)
        try:
            _write_parquet(folder / DATABASE, folder / PARQUET)
            fsync_folder(folder)
            os.rename(folder, snapshots / publication_id)
            fsync_folder(snapshots)
            _point_at(snapshots / publication_id, public)
        except (duckdb.Error, OSError) as error:
            raise _not_published(public, error) from error
    for old in sorted(_whole(snapshots))[:-kept]:
        shutil.rmtree(snapshots / old, ignore_errors=True)
    return Publication(
        publication_id,
        public / DATABASE,
        public / PARQUET,
        snapshots / publication_id,
        rows,
    )


def _not_published(public: Path, error: BaseException) -> PublishError:
    return PublishError(
        f"{public}: could not be published ({error}); the publication of the last time stays. "
        "Make room on the disk, make the folder writable, and publish again"
    )


def _drop_others(
    connection: duckdb.DuckDBPyConnection, database: str, known: Collection[str]
) -> None:
    listed = connection.execute(
        """
        SELECT 'VIEW', schema_name, view_name
        FROM duckdb_views()
        WHERE NOT internal AND database_name = $name
        UNION ALL
        SELECT 'TABLE', schema_name, table_name
        FROM duckdb_tables()
        WHERE NOT internal AND database_name = $name
        """,
        {"name": database},
    ).fetchall()
    for kind, schema, name in listed:
        if name not in known:
            connection.execute(f'DROP {kind} "{database}"."{schema}"."{name}"')


def _row_counts(connection: duckdb.DuckDBPyConnection, database: str) -> dict[str, int]:
    names = connection.execute(
        "SELECT schema_name, table_name FROM duckdb_tables() "
        "WHERE NOT internal AND database_name = ? ORDER BY ALL",
        [database],
    ).fetchall()
    counts = {}
    for schema, name in names:
        query = f'SELECT count(*) FROM "{database}"."{schema}"."{name}"'
        counts[name if schema == "main" else f"{schema}.{name}"] = int(
            connection.execute(query).fetchall()[0][0]
        )
    return counts


def _tell(
    connection: duckdb.DuckDBPyConnection,
    database: str,
    publication_id: str,
    now: dt.datetime,
    run_id: str,
    rows: dict[str, int],
) -> None:
    """Writes the table `publication`."""
    table = f'"{database}".main.{PUBLICATION_TABLE}'
    connection.execute(
        f"""
        CREATE TABLE {table} (
            publication_id  VARCHAR NOT NULL,
            published_at    TIMESTAMP NOT NULL,
            run_id          VARCHAR NOT NULL,
            posterpipe      VARCHAR NOT NULL,
            schema_version  INTEGER NOT NULL,
            dbt             VARCHAR NOT NULL,
            duckdb          VARCHAR NOT NULL,
            storage_version VARCHAR NOT NULL,
            row_counts      MAP(VARCHAR, BIGINT) NOT NULL
        )
        """
    )
    connection.execute(
        f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?, ?, ?, ?, map(?::VARCHAR[], ?::BIGINT[]))",
        [
            publication_id,
            now.replace(tzinfo=None),
            run_id,
            installed_version("posterpipe"),
            SCHEMA_VERSION,
            installed_version("dbt-core"),
            duckdb.__version__,
            STORAGE_VERSION,
            list(rows),
            list(rows.values()),
        ],
    )
    for name, comment in {
        "": "Which publication this is: one row.",
        "publication_id": "Its name, and that of its snapshot.",
        "published_at": "When it was published (UTC).",
        "run_id": "The Dagster run that published it.",
        "posterpipe": "Version of posterpipe.",
        "schema_version": "Version of the schema of the warehouse.",
        "dbt": "Version of dbt-core that made the reports.",
        "duckdb": "Version of DuckDB that wrote the file.",
        "storage_version": "File format: DuckDB of this version and later reads it.",
        "row_counts": "Rows by table.",
    }.items():
        what = f"COLUMN {table}.{name}" if name else f"TABLE {table}"
        connection.execute(f"COMMENT ON {what} IS '{comment}'")


def _write_parquet(database: Path, folder: Path) -> None:
    """Every table and view as a file of its own."""
    folder.mkdir()
    with duckdb.connect(str(database), read_only=True) as connection:
        names = connection.execute(
            "SELECT table_schema, table_name FROM information_schema.tables "
            "WHERE table_catalog = current_database() ORDER BY ALL"
        ).fetchall()
        for schema, name in names:
            file = folder / (f"{name}.parquet" if schema == "main" else f"{schema}.{name}.parquet")
            target = str(file).replace("'", "''")
            connection.execute(
                f"""COPY (FROM "{schema}"."{name}") TO '{target}' """
                "(FORMAT parquet, COMPRESSION zstd)"
            )
            _settle(file)
    fsync_folder(folder)


def _settle(file: Path) -> None:
    """On the disk, and read-only."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())
    file.chmod(0o444)


def _point_at(snapshot: Path, public: Path) -> None:
    """Makes the snapshot what `public` shows."""
    with _temporary(public) as folder:
        database, parquet = folder / DATABASE, folder / PARQUET
        try:
            os.link(snapshot / DATABASE, database)
        except OSError:  # file systems without hard links
            shutil.copyfile(snapshot / DATABASE, database)
            _settle(database)
        parquet.symlink_to(Path(SNAPSHOTS, snapshot.name, PARQUET), target_is_directory=True)
        os.replace(database, public / DATABASE)
        os.replace(parquet, public / PARQUET)
        fsync_folder(public)


@contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    folder = parent / f".{uuid.uuid4().hex[:12]}.tmp"
    try:
        folder.mkdir()
    except OSError as error:
        raise _not_published(parent, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _whole(snapshots: Path) -> list[str]:
    """Names of the snapshots, temporary ones left out."""
    return [path.name for path in snapshots.iterdir() if not path.name.startswith(".")]


def _sweep(public: Path) -> None:
    """Removes what a publication that was killed has left: those older than a day."""
    for parent in (public, public / SNAPSHOTS):
        for left in parent.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _LEFT_OVER_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
