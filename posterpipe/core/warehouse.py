"""The score warehouse: one DuckDB file that the pipeline writes.

What belongs here: the schema, opening and closing the file, adding rows. What does not: computing
scores (`metrics`), reports over them (the dbt project), and the copy that analysts read
(`publication`).

Tables (times are UTC; `run_id` names the Dagster run that wrote the row):

    fct_image           one row a generated image, key generation_key
    fct_score           one row a number, key (generation_key, metric_id), value NULL unless ok
    dim_prompt          prompts, key prompt_key: a reworded prompt is a new row of the same id
    dim_checkpoint      models that images were drawn with
    dim_metric          what a metric_id means
    fct_promotion       decisions about which checkpoint is served, of each base model
    fct_drawing         which run drew some pixels, key pixel_key
    dim_environment     versions of code and packages, key environment_id
    run_environment     which environments a run worked in
    fct_nearest         the training poster an image is nearest to, key (generation_key, metric_id)
    fct_title           the title set in type on an image, key generation_key
    fct_reading         what the OCR read on an image, key (generation_key, lettering)
    current_generation  the images that the latest tables of generations name
    current_metric      the metrics that each scoring step used last
    current_poster      the posters as they are now, with their captions
    clip_scores         the view that most analysts read

Rows are only ever added, and adding one twice changes nothing. The exceptions: a row with status
failed, which a later success replaces; the file of an image that was drawn again since its own was
lost, which may differ in the rounding of its pixels; what is not known of a checkpoint (NULL),
which is filled in when it is; fct_nearest, fct_title and fct_reading, where the latest measurement
of a key counts, since it also depends on the holdout posters and the lettering, and of which the
last two lose the images that are lettered no more; and the tables current_..., which are replaced
as a whole.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import random
import re
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pandas as pd

from posterpipe.core.errors import first_line
from posterpipe.core.files import fsync, write_atomic
from posterpipe.core.store import content_key, writing
from posterpipe.core.variants import is_tuned

SCHEMA_VERSION = 5
"""2 added fct_drawing, dim_environment and run_environment; 3 added fct_nearest, fct_title,
fct_reading, current_metric and current_poster; 4 added fct_promotion.base_model; 5 added
fct_nearest.copy_sensitivity. Every version so far only added tables and columns: files of an older
one are brought up to date by creating what is missing."""

BUSY_SECONDS = 120.0
"""How long to wait for another process that has the file open."""

_TABLES = """
CREATE TABLE IF NOT EXISTS fct_image (
    generation_key  VARCHAR NOT NULL,
    pixel_key       VARCHAR NOT NULL,
    variant         VARCHAR NOT NULL,
    prompt_key      VARCHAR NOT NULL,
    prompt_id       VARCHAR NOT NULL,
    negative_prompt VARCHAR NOT NULL,
    seed            BIGINT NOT NULL,
    checkpoint_id   VARCHAR NOT NULL,
    image           VARCHAR NOT NULL,
    image_path      VARCHAR NOT NULL,
    status          VARCHAR NOT NULL CHECK (status IN ('ok', 'blocked', 'failed')),
    reason          VARCHAR NOT NULL,
    width           INTEGER,
    height          INTEGER,
    settings        VARCHAR,
    run_id          VARCHAR,
    recorded_at     TIMESTAMP NOT NULL
);
CREATE TABLE IF NOT EXISTS fct_score (
    generation_key  VARCHAR NOT NULL,
    metric_id       VARCHAR NOT NULL,
    value           DOUBLE,
    status          VARCHAR NOT NULL CHECK (status IN ('ok', 'blocked', 'failed')),
    reason          VARCHAR NOT NULL,
    scored_at       TIMESTAMP NOT NULL,
    run_id          VARCHAR,
    CHECK ((status = 'ok') = (value IS NOT NULL))
);
CREATE TABLE IF NOT EXISTS dim_prompt (
    prompt_key      VARCHAR PRIMARY KEY,
    prompt_id       VARCHAR NOT NULL,
    prompt          VARCHAR NOT NULL,
    score_text      VARCHAR NOT NULL,
    title           VARCHAR NOT NULL,
    first_seen_at   TIMESTAMP NOT NULL
);
CREATE TABLE IF NOT EXISTS dim_checkpoint (
    checkpoint_id        VARCHAR PRIMARY KEY,
    kind                 VARCHAR NOT NULL CHECK (kind IN ('base', 'tuned')),
    base_model           VARCHAR,
    training_set_version VARCHAR,
    settings             VARCHAR,
    trained_at           TIMESTAMP,
    first_seen_at        TIMESTAMP NOT NULL,
    run_id               VARCHAR
);
CREATE TABLE IF NOT EXISTS dim_metric (
    metric_id       VARCHAR PRIMARY KEY,
    name            VARCHAR NOT NULL,
    encoder         VARCHAR,
    revision        VARCHAR,
    preprocessing   VARCHAR,
    version         INTEGER,
    description     VARCHAR,
    first_seen_at   TIMESTAMP NOT NULL
);
CREATE TABLE IF NOT EXISTS fct_promotion (
    decision_id     VARCHAR PRIMARY KEY,
    decided_at      TIMESTAMP NOT NULL,
    checkpoint_id   VARCHAR NOT NULL,
    champion_before VARCHAR,
    decision        VARCHAR NOT NULL CHECK (decision IN ('promote', 'hold', 'reject')),
    reason          VARCHAR NOT NULL,
    numbers         VARCHAR,
    decided_by      VARCHAR,
    run_id          VARCHAR,
    base_model      VARCHAR
);
CREATE TABLE IF NOT EXISTS current_generation (
    generation_key  VARCHAR NOT NULL
);
CREATE TABLE IF NOT EXISTS fct_drawing (
    pixel_key       VARCHAR PRIMARY KEY,
    run_id          VARCHAR NOT NULL,
    environment_id  VARCHAR,
    drawn_at        TIMESTAMP
);
CREATE TABLE IF NOT EXISTS dim_environment (
    environment_id  VARCHAR PRIMARY KEY,
    posterpipe      VARCHAR,
    source          VARCHAR,
    commit_id       VARCHAR,
    python          VARCHAR,
    platform        VARCHAR,
    packages        VARCHAR
);
CREATE TABLE IF NOT EXISTS run_environment (
    run_id          VARCHAR NOT NULL,
    environment_id  VARCHAR NOT NULL,
    PRIMARY KEY (run_id, environment_id)
);
CREATE TABLE IF NOT EXISTS fct_nearest (
    generation_key       VARCHAR NOT NULL,
    metric_id            VARCHAR NOT NULL,
    nearest_poster       VARCHAR NOT NULL,
    similarity           DOUBLE NOT NULL,
    similarity_threshold DOUBLE,
    copy_sensitivity     DOUBLE,
    hash_poster          VARCHAR NOT NULL,
    hash_distance        INTEGER,
    hash_threshold       INTEGER,
    copied               BOOLEAN NOT NULL,
    measured_at          TIMESTAMP NOT NULL,
    run_id               VARCHAR,
    PRIMARY KEY (generation_key, metric_id)
);
CREATE TABLE IF NOT EXISTS fct_title (
    generation_key  VARCHAR PRIMARY KEY,
    title           VARCHAR NOT NULL,
    image           VARCHAR NOT NULL,
    image_path      VARCHAR NOT NULL,
    style           VARCHAR,
    cap_height      INTEGER,
    contrast        DOUBLE,
    scrim           BOOLEAN,
    covered         DOUBLE,
    status          VARCHAR NOT NULL CHECK (status IN ('ok', 'blocked', 'failed')),
    reason          VARCHAR NOT NULL,
    set_at          TIMESTAMP NOT NULL,
    run_id          VARCHAR
);
CREATE TABLE IF NOT EXISTS fct_reading (
    generation_key  VARCHAR NOT NULL,
    lettering       VARCHAR NOT NULL CHECK (lettering IN ('drawn', 'set')),
    title           VARCHAR NOT NULL,
    read            VARCHAR NOT NULL,
    distance        DOUBLE NOT NULL,
    exact           BOOLEAN NOT NULL,
    read_at         TIMESTAMP NOT NULL,
    run_id          VARCHAR,
    PRIMARY KEY (generation_key, lettering)
);
CREATE TABLE IF NOT EXISTS current_metric (
    step            VARCHAR NOT NULL,
    metric_id       VARCHAR NOT NULL,
    place           INTEGER NOT NULL,
    PRIMARY KEY (step, metric_id)
);
CREATE TABLE IF NOT EXISTS current_poster (
    poster_id         VARCHAR NOT NULL,
    source_name       VARCHAR NOT NULL,
    status            VARCHAR NOT NULL,
    reason            VARCHAR NOT NULL,
    format            VARCHAR,
    width             INTEGER,
    height            INTEGER,
    size_bytes        BIGINT,
    near_duplicate_of VARCHAR,
    image             VARCHAR,
    image_path        VARCHAR,
    caption           VARCHAR,
    caption_source    VARCHAR,
    caption_status    VARCHAR,
    caption_reason    VARCHAR,
    in_training_set   BOOLEAN NOT NULL,
    recorded_at       TIMESTAMP NOT NULL,
    run_id            VARCHAR
);
"""

_COLUMNS = """
ALTER TABLE fct_nearest ADD COLUMN IF NOT EXISTS copy_sensitivity DOUBLE;
ALTER TABLE fct_promotion ADD COLUMN IF NOT EXISTS base_model VARCHAR;
UPDATE fct_promotion SET base_model = known.base_model
FROM (
    SELECT checkpoint_id, CASE kind WHEN 'base' THEN checkpoint_id ELSE base_model END AS base_model
    FROM dim_checkpoint
) AS known
WHERE fct_promotion.checkpoint_id = known.checkpoint_id AND fct_promotion.base_model IS NULL;
"""
"""What tables of an older schema lack, filled in as far as it is known."""

TABLES = frozenset({"schema_version", *re.findall(r"CREATE TABLE IF NOT EXISTS (\w+)", _TABLES)})
"""What the pipeline writes; whatever else lies there is a report."""

VIEWS = frozenset({"clip_scores"})

# greatest() passes over NULL, so a blocked image would score 0 without the CASE.
_VIEW = """
CREATE OR REPLACE VIEW clip_scores AS
WITH current_key AS (
    SELECT DISTINCT generation_key FROM current_generation
)
SELECT
    image.variant,
    image.prompt_id,
    prompt.prompt,
    image.seed,
    image.checkpoint_id,
    score.metric_id,
    score.value AS clip_cosine,
    CASE WHEN score.value IS NOT NULL THEN 2.5 * greatest(score.value, 0) END AS clip_score,
    image.image_path,
    score.scored_at,
    score.run_id,
    score.generation_key,
    current_key.generation_key IS NOT NULL AS is_current,
    score.status
FROM fct_score AS score
JOIN fct_image AS image ON image.generation_key = score.generation_key
JOIN dim_prompt AS prompt ON prompt.prompt_key = image.prompt_key
LEFT JOIN current_key ON current_key.generation_key = score.generation_key
WHERE score.metric_id LIKE 'clip\\_t.%' ESCAPE '\\'
"""

_REPLACES_FAILED = {
    "fct_image": ("generation_key",),
    "fct_score": ("generation_key", "metric_id"),
}
"""Tables whose failed rows a later success replaces, and their keys.

`insert` keeps the keys unique; these two have no index that would. They grow to millions of rows,
and each opening of the file for a few new ones would read and write an index over all of them,
which takes longer than to look for the few, and makes the file five times as large.
"""

_KEEPS_LATEST = {
    "fct_nearest": ("generation_key", "metric_id"),
    "fct_title": ("generation_key",),
    "fct_reading": ("generation_key", "lettering"),
}
"""Tables of which the latest measurement of a key counts, and their keys."""

_WHEN_AND_WHO = ("measured_at", "set_at", "read_at", "run_id")
"""Columns that alone are no reason to replace a row: the same measurement again changes nothing."""

_BLOCK = 4096
"""Bytes of each of the three blocks that a DuckDB file begins with. The first one is written once,
with a random identifier by which DuckDB knows the log that belongs to the file. The two others are
headers that take turns: each checkpoint, the one at closing as well, counts on in the older one."""

_COUNT = slice(8, 16)
"""Where a header has that count, an unsigned number of 8 bytes, the lowest first."""

_opening = threading.Lock()

_writing: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

T = TypeVar("T")


class WarehouseError(Exception):
    """The warehouse cannot be used. The message names the file and says what to do."""


class WarehouseMissing(WarehouseError):
    """Nothing has been written yet."""


class WarehouseBusy(WarehouseError):
    """Another process has the file open. The message says which, where DuckDB tells."""


@dataclass(frozen=True)
class _State:
    """How far a file has got. The latest one that is known is noted beside it."""

    file: str
    """Digest of its first block."""
    checkpoints: int
    identity: str


class Warehouse:
    """The private file. `path` is the DuckDB file; its folder is created by the first write.

    DuckDB lets one process open a file for writing, and then no other, readers included: so it is
    opened for as short as possible, and whoever finds it locked waits up to `busy_seconds`.
    """

    def __init__(self, path: Path, *, busy_seconds: float = BUSY_SECONDS) -> None:
        self.path = Path(path)
        self.busy_seconds = busy_seconds

    def identity(self) -> str:
        """Of the file, "" where there is none: another one after it was lost and made again, or
        after a copy was put in its place that lacks what was written later; and the same whatever
        is written. Opens no database, so it can be asked while a step writes.

        Whoever fills the warehouse keeps it, to know that what it wrote is there no more. How far
        the file had got is noted beside it (`warehouse.json` for `warehouse.duckdb`) by `write` and
        `prepare`: a file that is behind that is an earlier copy.
        """
        now = self._state(self._noted())
        return now.identity if now else ""

    def prepare(self) -> str:
        """Creates the file where there is none, and notes how far it has got. Its `identity`.
        Raises WarehouseError and StoreError."""
        if not self.path.exists():
            self._create()
        self._note()
        return self.identity()

    @contextmanager
    def write(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection inside one transaction: committed at the end, rolled back on an error.

        Creates file and schema. Always closes. Raises WarehouseBusy, WarehouseError and StoreError.
        """
        if not self.path.exists():
            self._create()
        with self._turn():
            self._note()  # before: what is written now must not hide that the file is behind
            with self._connection(read_only=False) as connection:
                connection.begin()
                try:
                    self._prepare(connection)
                    yield connection
                    connection.commit()
                except BaseException as error:
                    # An error may have ended the transaction already.
                    with contextlib.suppress(duckdb.Error):
                        connection.rollback()
                    if _of_the_disk(error):
                        raise WarehouseError(
                            f"{self.path}: could not be written ({first_line(error)}); make room "
                            "on the disk, and materialize the asset again: nothing of it was "
                            "written"
                        ) from error
                    raise
            self._note()

    @contextmanager
    def read(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A read-only connection. Always closes. Raises WarehouseMissing and WarehouseBusy."""
        if not self.path.exists():
            raise WarehouseMissing(
                f"{self.path}: no scores have been written yet; materialize the asset "
                "`clip_scores` first"
            )
        with self._connection(read_only=True) as connection:
            yield connection

    def scores(
        self, metric_id: str, generation_keys: Iterable[str], *, with_failed: bool = False
    ) -> pd.DataFrame:
        """generation_key, value, status, reason of those images that have a score of that metric.

        Failed ones, which are to be tried again, only on request. Empty before the first write.
        """
        if not self.path.exists():
            return _NO_SCORES.copy()
        with self.read() as connection:
            return read_scores(connection, metric_id, generation_keys, with_failed=with_failed)

    def _create(self) -> None:
        """Makes the file with its tables under another name, and links it into place whole.

        Between DuckDB's creating a file and its first lock on it, others would find a file of no
        bytes, which is no database; and then one without tables.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            with contextlib.closing(_open(new, read_only=False)) as connection:
                connection.begin()
                self._prepare(connection)
                connection.commit()
            with contextlib.suppress(FileExistsError):  # another process was first
                _link(new, self.path)
        except (duckdb.Error, OSError) as error:
            raise WarehouseError(
                f"{self.path}: cannot be created ({first_line(error)}); make room on the disk and "
                "the folder writable, and materialize the asset again"
            ) from error
        finally:
            for left in (new, new.with_name(f"{new.name}.wal")):
                with contextlib.suppress(OSError):
                    left.unlink()
        fsync(self.path.parent)

    def _state(self, noted: _State | None) -> _State | None:
        """How far the file has got; None where there is none.

        `noted`, how far it had got, is read before, so that a file which somebody is writing is
        never behind it. Two who find it behind give it the same new identity.
        """
        try:
            with open(self.path, "rb") as opened:
                first, *headers = (opened.read(_BLOCK) for _ in range(3))
        except FileNotFoundError:
            return None
        file = hashlib.sha256(first).hexdigest()[:16]
        checkpoints = max(int.from_bytes(header[_COUNT], "little") for header in headers)
        if noted is None:
            identity = file
        elif noted.file == file and noted.checkpoints <= checkpoints:
            identity = noted.identity
        else:
            identity = content_key(noted.identity, file)[:16]
        return _State(file, checkpoints, identity)

    def _noted(self) -> _State | None:
        """What was noted last; None before the first time, and where it cannot be read."""
        try:
            return _State(**json.loads(self._note_path.read_text("utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _note(self) -> None:
        """Notes how far the file has got. A crash that comes before leaves the note behind the
        file, which is taken for the same then."""
        noted = self._noted()
        now = self._state(noted)
        if now is not None and now != noted:
            with writing(self._note_path):
                write_atomic(self._note_path, (json.dumps(asdict(now)) + "\n").encode())

    @property
    def _note_path(self) -> Path:
        return self.path.with_suffix(".json")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """DuckDB's lock is one of processes; threads of one process would write at once, and the
        transactions of all but one would fail."""
        lock = _writing[str(self.path.resolve())]
        if not lock.acquire(timeout=self.busy_seconds):
            raise WarehouseBusy(_who_is_busy(self.path, "", self.busy_seconds))
        try:
            yield
        finally:
            lock.release()

    def _prepare(self, connection: duckdb.DuckDBPyConnection) -> None:
        connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
        version = _single(connection, "SELECT max(version) FROM schema_version")
        if version == SCHEMA_VERSION:
            return
        if version is not None and version > SCHEMA_VERSION:
            raise WarehouseError(
                f"{self.path}: written by a newer posterpipe (schema {version}, this one knows "
                f"{SCHEMA_VERSION}); upgrade posterpipe or move the file away"
            )
        connection.execute(_TABLES)
        connection.execute(_COLUMNS)
        connection.execute(_VIEW)
        connection.execute("INSERT INTO schema_version VALUES (?)", [SCHEMA_VERSION])

    @contextmanager
    def _connection(self, *, read_only: bool) -> Iterator[duckdb.DuckDBPyConnection]:
        try:
            connection = retry_while_busy(
                lambda: _open(self.path, read_only=read_only),
                self.path,
                self.busy_seconds,
            )
        except duckdb.Error as error:
            log = f"take {self.path.name}.wal away if it is of a file that lay here before; else "
            raise WarehouseError(
                f"{self.path}: cannot be opened ({first_line(error)}); "
                f"{log if 'WAL' in str(error) else ''}make it readable and writable, or, if it is "
                "damaged, move it away and materialize `clip_scores` again"
            ) from error
        try:
            yield connection
        finally:
            connection.close()


def insert(connection: duckdb.DuckDBPyConnection, table: str, rows: pd.DataFrame) -> int:
    """Add rows by column name; columns that are left out are NULL, keys that exist are left alone.

    In fct_image and fct_score a row that has failed is replaced by one that has not, and a row of
    fct_image names the file of the image that was drawn last; in fct_nearest, fct_title and
    fct_reading a row is replaced by one that says something else. Returns how many of the rows are
    in the table now that were not.
    """
    if rows.empty:
        return 0
    conflict = "ON CONFLICT DO NOTHING"
    if table in _REPLACES_FAILED:
        conflict = ""
        rows = _news(connection, table, rows)
    elif keys := _KEEPS_LATEST.get(table):
        values = [str(name) for name in rows.columns if name not in keys]
        changes = ", ".join(f"{name} = excluded.{name}" for name in values)
        told = [name for name in values if name not in _WHEN_AND_WHO]
        differs = " OR ".join(f"{table}.{n} IS DISTINCT FROM excluded.{n}" for n in told)
        conflict = f"ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {changes} WHERE {differs}"
    connection.register("new_rows", rows)
    written = _single(connection, f"INSERT INTO {table} BY NAME SELECT * FROM new_rows {conflict}")
    connection.unregister("new_rows")
    return int(written)


def _news(connection: duckdb.DuckDBPyConnection, table: str, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that say something new, one a key; failed ones that they replace are deleted."""
    keys = list(_REPLACES_FAILED[table])
    rows = rows.reset_index(drop=True)
    good_first = rows.sort_values("status", key=lambda status: status == "failed", kind="stable")
    rows = rows.loc[good_first.drop_duplicates(keys).index.sort_values()]
    connection.register("new_keys", rows[keys])
    looked_for = " AND ".join(f"{key} IN (SELECT {key} FROM new_keys)" for key in keys)
    image = "image" if table == "fct_image" else "NULL"
    there = connection.execute(
        f"SELECT {', '.join(keys)}, status AS known, {image} AS known_image FROM {table} "
        f"WHERE {looked_for}"
    ).df()
    connection.unregister("new_keys")
    there = there.drop_duplicates(keys)
    held = rows[keys].merge(there, on=keys, how="left")
    known = held["known"].to_numpy()
    if table == "fct_image":
        drawn = ~pd.isna(known) & (known != "failed") & (rows["status"] != "failed").to_numpy()
        again = drawn & (held["known_image"].to_numpy() != rows["image"].to_numpy())
        if again.any():
            _name_files(connection, rows.loc[again, ["generation_key", "image", "image_path"]])
    replaces = (known == "failed") & (rows["status"] != "failed").to_numpy()
    if replaces.any():
        connection.register("replaced", rows.loc[replaces, keys])
        same = " AND ".join(f"{table}.{key} = replaced.{key}" for key in keys)
        connection.execute(f"DELETE FROM {table} USING replaced WHERE {same}")
        connection.unregister("replaced")
    return rows[pd.isna(known) | replaces]


def _name_files(connection: duckdb.DuckDBPyConnection, drawn: pd.DataFrame) -> None:
    """Images (generation_key, image, image_path) that were drawn again: other bytes, same key."""
    connection.register("drawn_again", drawn)
    connection.execute(
        """
        UPDATE fct_image SET image = drawn_again.image, image_path = drawn_again.image_path
        FROM drawn_again
        WHERE fct_image.generation_key = drawn_again.generation_key
        """
    )
    connection.unregister("drawn_again")


HELD_COLUMNS = ("generation_key", "value", "status", "reason")
"""Of the scores that the warehouse holds of a metric: see `Warehouse.scores`."""

_NO_SCORES = pd.DataFrame(columns=list(HELD_COLUMNS)).astype({"value": "float64"})


def read_scores(
    connection: duckdb.DuckDBPyConnection,
    metric_id: str,
    generation_keys: Iterable[str],
    *,
    with_failed: bool = False,
) -> pd.DataFrame:
    """See `Warehouse.scores`: the same in a connection that is open."""
    connection.register("wanted", _key_frame(generation_keys))
    try:
        return connection.execute(
            f"""
            SELECT {", ".join(HELD_COLUMNS)}
            FROM fct_score
            WHERE metric_id = ?
              AND generation_key IN (SELECT generation_key FROM wanted)
              AND (? OR status <> 'failed')
            """,
            [metric_id, with_failed],
        ).df()
    except duckdb.CatalogException as error:
        if "fct_score" not in str(error):
            raise
        return _NO_SCORES.copy()  # a file that holds reports only
    finally:
        connection.unregister("wanted")


def prompt_key(prompt_id: str, prompt: str, score_text: str, title: str) -> str:
    """Key of one wording of a prompt."""
    return content_key("prompt", prompt_id, prompt, score_text, title)


def record_generations(
    connection: duckdb.DuckDBPyConnection,
    generations: pd.DataFrame,
    *,
    run_id: str,
    recorded_at: dt.datetime,
) -> None:
    """Adds a table of generations (`generations.COLUMNS`) with its prompts and checkpoints."""
    if generations.empty:
        return
    texts = generations[["prompt_id", "prompt", "score_text", "title"]]
    keys = [prompt_key(*map(str, row)) for row in texts.itertuples(index=False)]
    prompts = texts.assign(prompt_key=keys, first_seen_at=recorded_at).drop_duplicates("prompt_key")
    tuned = is_tuned(generations["variant"])
    checkpoints = pd.DataFrame(
        {
            "checkpoint_id": generations["checkpoint_id"],
            "kind": tuned.map({True: "tuned", False: "base"}),
            "first_seen_at": recorded_at,
            "run_id": run_id,
        }
    ).drop_duplicates("checkpoint_id")
    images = generations.drop(columns=["prompt", "score_text", "title"]).assign(
        prompt_key=keys, run_id=run_id, recorded_at=recorded_at
    )
    insert(connection, "dim_prompt", prompts)
    insert(connection, "dim_checkpoint", checkpoints)
    insert(connection, "fct_image", images.drop_duplicates("generation_key"))


def fill_checkpoints(connection: duckdb.DuckDBPyConnection, facts: pd.DataFrame) -> None:
    """Fills in what dim_checkpoint does not know of its rows.

    `facts`: checkpoint_id, base_model, training_set_version, settings (JSON), trained_at, run_id of
    the training; ids that have no row are passed over. The run of a row that was written without
    them is the one that met the checkpoint first, and is replaced by the one that trained it.
    """
    connection.register("facts", facts)
    connection.execute(
        """
        UPDATE dim_checkpoint SET
            base_model = facts.base_model,
            training_set_version = facts.training_set_version,
            settings = facts.settings,
            trained_at = facts.trained_at,
            run_id = facts.run_id
        FROM facts
        WHERE dim_checkpoint.checkpoint_id = facts.checkpoint_id
          AND dim_checkpoint.training_set_version IS NULL
        """
    )
    connection.unregister("facts")


def replace_current(connection: duckdb.DuckDBPyConnection, generation_keys: Iterable[str]) -> None:
    """Makes these images the current ones, in the transaction of the connection."""
    connection.register("new_current", _key_frame(generation_keys).drop_duplicates())
    connection.execute("DELETE FROM current_generation")
    connection.execute("INSERT INTO current_generation SELECT generation_key FROM new_current")
    connection.unregister("new_current")


def replace_metrics(
    connection: duckdb.DuckDBPyConnection, step: str, metric_ids: Sequence[str]
) -> None:
    """Makes these metrics, in their order, the ones that a scoring step uses."""
    connection.execute("DELETE FROM current_metric WHERE step = ?", [step])
    places = pd.DataFrame({"metric_id": list(dict.fromkeys(metric_ids))})
    insert(connection, "current_metric", places.assign(step=step, place=range(1, len(places) + 1)))


def delete_titles(connection: duckdb.DuckDBPyConnection, generation_keys: Iterable[str]) -> None:
    """Takes out what is known of these images' titles: they are lettered no more."""
    connection.register("untitled", _key_frame(generation_keys))
    for table in ("fct_title", "fct_reading"):
        connection.execute(
            f"DELETE FROM {table} WHERE generation_key IN (SELECT generation_key FROM untitled)"
        )
    connection.unregister("untitled")


def replace_posters(connection: duckdb.DuckDBPyConnection, posters: pd.DataFrame) -> None:
    """Makes these posters (columns of current_poster) the ones that there are.

    The same posters as before change nothing, the time they were recorded at included.
    """
    connection.register("new_posters", posters)
    told = ", ".join(str(name) for name in posters.columns if name not in ("recorded_at", "run_id"))
    changes = _single(
        connection,
        f"""
        SELECT
            (SELECT count(*) FROM
                (SELECT {told} FROM new_posters EXCEPT ALL SELECT {told} FROM current_poster))
            + (SELECT count(*) FROM
                (SELECT {told} FROM current_poster EXCEPT ALL SELECT {told} FROM new_posters))
        """,
    )
    if changes:
        connection.execute("DELETE FROM current_poster")
        connection.execute("INSERT INTO current_poster BY NAME SELECT * FROM new_posters")
    connection.unregister("new_posters")


def _open(path: Path, *, read_only: bool) -> duckdb.DuckDBPyConnection:
    # Threads that open one file share its instance, and one that comes at the wrong moment would
    # find it without the function that reads DataFrames, which DuckDB adds when it is there.
    with _opening:
        return duckdb.connect(str(path), read_only=read_only)


def _of_the_disk(error: BaseException) -> bool:
    """Whether it is the disk's fault; at a commit, DuckDB tells that as one of the transaction."""
    at_commit = isinstance(error, duckdb.TransactionException) and "Could not write" in str(error)
    return at_commit or isinstance(error, duckdb.IOException | duckdb.FatalException)


def _link(file: Path, place: Path) -> None:
    """Raises FileExistsError where something is at that place."""
    try:
        os.link(file, place)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if place.exists():
            raise FileExistsError(place) from None
        os.rename(file, place)


def retry_while_busy(open_it: Callable[[], T], path: Path, seconds: float) -> T:
    """What `open_it` returns, tried again while another connection has the file. Raises
    WarehouseBusy after `seconds`; other errors of DuckDB pass."""
    deadline = time.monotonic() + seconds
    pause = 0.02
    while True:
        try:
            return open_it()
        except duckdb.Error as error:
            text = str(error)
            if not _busy(text):
                raise
            if time.monotonic() + pause > deadline:
                raise WarehouseBusy(_who_is_busy(path, text, seconds)) from error
        # Jitter, so that two who wait do not keep in step.
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(pause * 2, 1.0)


def _busy(text: str) -> bool:
    return (
        "Could not set lock" in text
        or "different configuration than existing connections" in text
        or "being used by another process" in text
        or "already attached" in text
    )


def _who_is_busy(path: Path, text: str, seconds: float) -> str:
    found = re.search(r"held in (.+?) \(PID (\d+)\)(?: by user (\S+))?", text)
    if found:
        user = f" of {found[3].rstrip('.')}" if found[3] else ""
        who = f"process {found[2]}{user} ({found[1]}) has it open; end that, or wait for it"
    elif "lock" in text:
        who = "another process has it open; end that, or wait for it"
    else:
        who = "this process has it open elsewhere; close that connection first"
    return (
        f"{path}: still locked after {seconds:g} s: {who}. "
        "Analysts should query the published copy, which nobody locks"
    )


def _key_frame(generation_keys: Iterable[str]) -> pd.DataFrame:
    # The type by name: an empty column would have none.
    return pd.DataFrame({"generation_key": pd.Series(list(generation_keys), dtype="object")})


def _single(
    connection: duckdb.DuckDBPyConnection, query: str, values: Sequence[object] = ()
) -> Any:
    """The one value of a query. All rows are fetched: DuckDB 2 refuses further statements on a
    connection while a result is not read to its end, as `fetchone` leaves it."""
    return connection.execute(query, list(values)).fetchall()[0][0]
