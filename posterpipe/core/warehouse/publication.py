"""The folder that analysts read: the database, its tables as Parquet, and the last few of both.

What belongs here: what a publication holds, copying the database, and how one publication takes the
place of another. What does not: the database (`database`), and when to publish (`defs.reports`).

    public/scores.duckdb            the database, a file of the newest snapshot (a hard link)
    public/parquet/<table>.parquet  its tables, a folder of the newest snapshot (a symbolic link)
    public/snapshots/<time>/        the newest publications, each whole: scores.duckdb and parquet/;
                                    their names follow each other, also where the clock was set back

Everything is read-only and replaced by renaming, the database first. Whoever has a file open keeps
reading it; whoever reads several Parquet files at once and wants them of one publication resolves
`parquet` first, or reads from a snapshot.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path

import duckdb

from posterpipe.core.errors import first_line
from posterpipe.core.files import fsync, has_symbolic_links, link_or_copy, remove_leftovers
from posterpipe.core.warehouse.database import (
    BUSY_SECONDS,
    WarehouseError,
    WarehouseMissing,
    retry_while_busy,
)
from posterpipe.core.warehouse.schema import (
    SCHEMA_VERSION,
    TABLE,
    TABLES,
    VIEWS,
    comment_on,
    describe_warehouse,
)

SNAPSHOTS_KEPT = 5
"""Publications that stay, the newest included; each takes as much room as the database."""

DATABASE, PARQUET, SNAPSHOTS = "scores.duckdb", "parquet", "snapshots"

PUBLICATION_TABLE = "publication"
"""One row: which publication this is."""

STORAGE_VERSION = "v1.5.0"
"""File format of the published copy: clients of DuckDB 1.5 and later read it."""

_COMMENTS = {
    TABLE: "Which publication this is: one row.",
    "publication_id": "Its name, and that of its snapshot.",
    "published_at": "When it was published (UTC).",
    "run_id": "The Dagster run that published it.",
    "posterpipe": "Version of posterpipe.",
    "schema_version": "Version of the schema of the warehouse.",
    "dbt": "Version of dbt-core that made the reports.",
    "duckdb": "Version of DuckDB that wrote the file.",
    "storage_version": "File format: DuckDB of this version and later reads it.",
    "row_counts": "Rows by table.",
}

_FORMAT = "%Y-%m-%dT%H-%M-%S.%fZ"


class PublishError(WarehouseError):
    """The copy is not what it should be; the published file is left as it was."""


@dataclass(frozen=True)
class Publication:
    """One publication."""

    publication_id: str
    """When it was, in UTC, or just after the one before where the clock was set back since; the
    name of its snapshot."""
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
    the previous publication stays. Raises WarehouseMissing, WarehouseBusy and PublishError.
    """
    private, public = Path(private), Path(public)
    if not private.exists():
        raise WarehouseMissing(
            f"{private}: no scores have been written yet; materialize the asset `clip_scores` first"
        )
    snapshots = public / SNAPSHOTS
    now = dt.datetime.now(dt.UTC)
    try:
        snapshots.mkdir(parents=True, exist_ok=True)
        publication_id = _name_after(_whole(snapshots), now)
        links = has_symbolic_links(snapshots)
    except OSError as error:
        raise _not_published(public, error) from error
    if not links:
        raise PublishError(
            f"{public}: could not be published, since the file system has no symbolic links, and "
            f"`{PARQUET}` is one; put the store (POSTERPIPE_STORE) on one that has them"
        )
    for parent in (public, snapshots):
        remove_leftovers(parent)
    with _temporary(snapshots) as folder:
        database = folder / DATABASE
        try:
            rows = retry_while_busy(
                lambda: _copy(private, database, publication_id, now, run_id, reports),
                private,
                busy_seconds,
            )
            _verify(database, rows, private)
            _settle(database)
            _write_parquet(database, folder / PARQUET)
            fsync(folder)
            os.rename(folder, snapshots / publication_id)
            fsync(snapshots)
            try:
                _point_at(snapshots / publication_id, public)
            except OSError:
                if not _is_shown(snapshots / publication_id, public):  # each try would leave one
                    shutil.rmtree(snapshots / publication_id, ignore_errors=True)
                raise
        except (duckdb.Error, OSError) as error:
            raise _not_published(public, error) from error
    for old in sorted(_whole(snapshots))[:-kept]:
        if old != publication_id:  # whatever else lies there
            shutil.rmtree(snapshots / old, ignore_errors=True)
    return Publication(
        publication_id,
        public / DATABASE,
        public / PARQUET,
        snapshots / publication_id,
        rows,
    )


def content_digest(database: Path) -> str:
    """sha256 (hex) of the tables of a published database and their rows, in whatever order these
    lie. Which publication it is does not count: the same again has the same digest."""
    contents = []
    with duckdb.connect(str(database), read_only=True) as connection:
        names = connection.execute(
            "SELECT table_name FROM duckdb_tables() WHERE NOT internal AND table_name <> ? "
            "ORDER BY table_name",
            [PUBLICATION_TABLE],
        ).fetchall()
        for (name,) in names:
            [(rows, total)] = connection.execute(
                f'SELECT count(*), coalesce(sum(hash(t)), 0) FROM "{name}" AS t'
            ).fetchall()
            contents.append((name, rows, str(total)))
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _not_published(public: Path, error: BaseException) -> PublishError:
    return PublishError(
        f"{public}: could not be published ({first_line(error)}); the previous publication stays. "
        "Make room on the disk, make the folder writable, and publish again"
    )


def _copy(
    private: Path,
    copy: Path,
    publication_id: str,
    now: dt.datetime,
    run_id: str,
    reports: Collection[str] | None,
) -> dict[str, int]:
    """Writes the copy, with its table `publication`; the rows that its other tables must have."""
    copy.unlink(missing_ok=True)
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH {_quoted(private)} AS original (READ_ONLY)")
        connection.execute(
            f"ATTACH {_quoted(copy)} AS copied (STORAGE_VERSION '{STORAGE_VERSION}')"
        )
        connection.execute("COPY FROM DATABASE original TO copied")
        rows = _row_counts(connection, "original")
        if reports is not None:
            for name in _drop_others(connection, "copied", {*TABLES, *VIEWS, *reports}):
                rows.pop(name, None)
        describe_warehouse(connection, "copied")
        _tell(connection, "copied", publication_id, now, run_id, rows)
        connection.execute("CHECKPOINT copied")
        connection.execute("DETACH copied")
    return rows


def _drop_others(
    connection: duckdb.DuckDBPyConnection, database: str, known: Collection[str]
) -> list[str]:
    """Drops the views and tables whose names are not `known`; which those were."""
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
    others = [entry for entry in listed if entry[2] not in known]
    for kind, schema, name in others:
        connection.execute(f'DROP {kind} "{database}"."{schema}"."{name}"')
    return [_qualified(schema, name) for _, schema, name in others]


def _verify(copy: Path, rows: dict[str, int], private: Path) -> None:
    """Raises PublishError where the copy has other rows, or a view of it does not answer."""
    # Views name their tables by the database's name where dbt wrote them: the copy is checked under
    # the name that it will be opened with.
    with duckdb.connect(str(copy), read_only=True) as connection:
        found = _row_counts(connection, copy.stem)
        del found[PUBLICATION_TABLE]
        if found != rows:
            differing = sorted(set(found.items()) ^ set(rows.items()))
            raise PublishError(
                f"{private}: its copy has other rows ({differing}); publish again, and check the "
                "disk if it happens twice"
            )
        views = connection.execute(
            "SELECT schema_name, view_name FROM duckdb_views() "
            "WHERE NOT internal AND database_name = current_database()"
        ).fetchall()
        for schema, view in views:
            name = f'"{schema}"."{view}"'
            try:
                connection.execute(f"SELECT * FROM {name} LIMIT 1").fetchall()
            except duckdb.Error as error:
                raise PublishError(
                    f"{private}: the view {name} does not answer in the published copy "
                    f"({first_line(error)}); name tables in it without the database, or "
                    "make it a table"
                ) from error


def _row_counts(connection: duckdb.DuckDBPyConnection, database: str) -> dict[str, int]:
    names = connection.execute(
        "SELECT schema_name, table_name FROM duckdb_tables() "
        "WHERE NOT internal AND database_name = ? ORDER BY ALL",
        [database],
    ).fetchall()
    counts = {}
    for schema, name in names:
        query = f'SELECT count(*) FROM "{database}"."{schema}"."{name}"'
        counts[_qualified(schema, name)] = int(connection.execute(query).fetchall()[0][0])
    return counts


def _qualified(schema: str, name: str) -> str:
    return name if schema == "main" else f"{schema}.{name}"


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


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
    comment_on(connection, database, PUBLICATION_TABLE, _COMMENTS)


def _write_parquet(database: Path, folder: Path) -> None:
    """Every table and view as a file of its own."""
    folder.mkdir()
    with duckdb.connect(str(database), read_only=True) as connection:
        names = connection.execute(
            "SELECT table_schema, table_name FROM information_schema.tables "
            "WHERE table_catalog = current_database() ORDER BY ALL"
        ).fetchall()
        for schema, name in names:
            file = folder / f"{_qualified(schema, name)}.parquet"
            connection.execute(
                f'COPY (FROM "{schema}"."{name}") TO {_quoted(file)} '
                "(FORMAT parquet, COMPRESSION zstd)"
            )
            _settle(file)
    fsync(folder)


def _settle(file: Path) -> None:
    """On the disk, and read-only."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())
    file.chmod(0o444)


def _point_at(snapshot: Path, public: Path) -> None:
    """Makes the snapshot what `public` shows."""
    with _temporary(public) as folder:
        database, parquet = folder / DATABASE, folder / PARQUET
        if not link_or_copy(snapshot / DATABASE, database):
            database.chmod(0o644)
            _settle(database)
        parquet.symlink_to(Path(SNAPSHOTS, snapshot.name, PARQUET), target_is_directory=True)
        copied = _is_copied(public / PARQUET)
        os.replace(database, public / DATABASE)
        if copied:
            os.rename(public / PARQUET, folder / "copied")
        os.replace(parquet, public / PARQUET)
        fsync(public)


def _is_copied(parquet: Path) -> bool:
    """Whether a folder lies where the link belongs, as a copy of the store leaves it that follows
    links; the snapshots hold all of it. Raises OSError where it holds anything else."""
    if parquet.is_symlink() or not parquet.is_dir():
        return False
    if any(path.suffix != ".parquet" for path in parquet.iterdir()):
        raise OSError(f"{parquet} holds other files than published tables: move it elsewhere")
    return True


def _is_shown(snapshot: Path, public: Path) -> bool:
    return (public / PARQUET).resolve() == (snapshot / PARQUET).resolve()


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


def _name_after(names: Collection[str], now: dt.datetime) -> str:
    """The name of a publication of now: later than all that are there, whose order is their age."""
    moments = [now]
    for name in names:
        with contextlib.suppress(ValueError):  # somebody else's
            told = dt.datetime.strptime(name, _FORMAT).replace(tzinfo=dt.UTC)
            moments.append(told + dt.timedelta(microseconds=1))
    return max(moments).strftime(_FORMAT)
