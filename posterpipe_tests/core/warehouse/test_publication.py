"""The publication: whole at any moment, read-only, with a history; nothing blocks it, and what
fails leaves the one before."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pandas as pd
import pytest

from posterpipe.core.warehouse import publication
from posterpipe.core.warehouse.database import Warehouse, WarehouseMissing
from posterpipe.core.warehouse.publication import PublishError, content_digest, publish_scores
from posterpipe.core.warehouse.schema import COMMENTS, SCHEMA_VERSION, TABLES, VIEWS
from posterpipe_tests.core.conftest import Disk
from posterpipe_tests.core.warehouse.test_database import fill, generation, hold, score


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    warehouse = Warehouse(tmp_path / "warehouse.duckdb", busy_seconds=60)
    fill(warehouse)
    return warehouse


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return tmp_path / "public"


def query(database: Path, sql: str) -> list[tuple]:
    with duckdb.connect(str(database), read_only=True) as connection:
        return connection.execute(sql).fetchall()


def report(warehouse: Warehouse, name: str) -> None:
    with warehouse.write() as connection:
        connection.execute(f"CREATE OR REPLACE TABLE {name} AS SELECT 42 AS answer")


def test_a_publication_tells_what_it_is(warehouse: Warehouse, public: Path) -> None:
    report(warehouse, "mine")
    published = publish_scores(warehouse.path, public, run_id="the run", reports=["mine"])
    with duckdb.connect(str(public / "scores.duckdb"), read_only=True) as connection:
        row: Any
        (row,) = connection.execute("FROM publication").df().itertuples(index=False)
        tables = {name for (name,) in connection.execute("SHOW TABLES").fetchall()}
        told = connection.execute(
            "SELECT comment FROM duckdb_columns() WHERE table_name = 'publication'"
        ).fetchall()
        (tags,) = connection.execute(
            "SELECT tags FROM duckdb_databases() WHERE database_name = 'scores'"
        ).fetchall()
    assert row.publication_id == published.publication_id == published.snapshot.name
    assert (row.run_id, row.schema_version) == ("the run", SCHEMA_VERSION)
    assert abs(pd.Timestamp.now("UTC").tz_localize(None) - row.published_at).total_seconds() < 60
    assert row.duckdb == duckdb.__version__ and row.dbt.startswith("1.11")
    assert row.posterpipe and row.storage_version == "v1.5.0" and "v1.5" in str(tags)
    assert row.row_counts == published.rows
    assert (row.row_counts["fct_score"], row.row_counts["mine"]) == (4, 1)
    assert tables == {*TABLES, "clip_scores", "mine", "publication"}
    assert all(len(comment) > 5 for (comment,) in told)


def test_the_digest_is_of_the_rows_whatever_their_order(warehouse: Warehouse, public: Path) -> None:
    def published(answers: str) -> str:
        with warehouse.write() as connection:
            connection.execute(
                f"CREATE OR REPLACE TABLE mine AS SELECT unnest({answers}) AS answer"
            )
        publication = publish_scores(warehouse.path, public, run_id="run", reports=["mine"])
        return content_digest(publication.database)

    before = published("[1, 2]")
    assert published("[2, 1]") == before
    assert published("[1, 3]") != before
    assert published("[1, 2, 2]") != before


def test_everything_that_is_published_is_described(warehouse: Warehouse, public: Path) -> None:
    publish_scores(warehouse.path, public, run_id="run")
    database = public / "scores.duckdb"
    columns = query(
        database,
        "SELECT table_name, column_name, comment FROM duckdb_columns() WHERE NOT internal",
    )
    whole = query(
        database,
        "SELECT table_name, comment FROM duckdb_tables() WHERE NOT internal "
        "UNION ALL SELECT view_name, comment FROM duckdb_views() WHERE NOT internal",
    )
    assert {name for name, _ in whole} == {*TABLES, *VIEWS, "publication"}
    assert not [row for row in (*columns, *whole) if not row[-1]]
    there = {(table, column) for table, column, _ in columns}
    told = {(table, name) for table, texts in COMMENTS.items() for name in texts if name}
    assert told <= there


def test_what_an_older_schema_lacks_is_not_described(warehouse: Warehouse, public: Path) -> None:
    with warehouse.write() as connection:
        connection.execute("ALTER TABLE fct_promotion DROP COLUMN base_model")
        connection.execute("DROP TABLE fct_reading")
    publish_scores(warehouse.path, public, run_id="run")
    told = query(
        public / "scores.duckdb",
        "SELECT count(comment), count(*) FROM duckdb_columns() WHERE NOT internal",
    )
    assert told[0][0] == told[0][1]


READ_BY_AN_OLDER_CLIENT = """
import duckdb, json, sys
assert duckdb.__version__.startswith("1.5."), duckdb.__version__
with duckdb.connect(sys.argv[1], read_only=True) as connection:
    names = [name for (name,) in connection.execute("SHOW TABLES").fetchall()]
    counts = {n: len(connection.execute(f'SELECT * FROM "{n}"').fetchall()) for n in names}
print(json.dumps(counts))
"""


@pytest.mark.slow
def test_a_duckdb_1_5_client_reads_every_table(
    warehouse: Warehouse, public: Path, tmp_path: Path
) -> None:
    older = tmp_path / "older"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    done = subprocess.run([*install, str(older), "duckdb>=1.5,<1.6"], capture_output=True)
    if done.returncode:
        pytest.skip("DuckDB 1.5 cannot be installed here")
    published = publish_scores(warehouse.path, public, run_id="run")
    read = subprocess.run(
        [sys.executable, "-c", READ_BY_AN_OLDER_CLIENT, str(public / "scores.duckdb")],
        env={**os.environ, "PYTHONPATH": str(older)},
        capture_output=True,
        text=True,
    )
    assert read.returncode == 0, read.stderr
    counts = json.loads(read.stdout)
    assert {name: counts[name] for name in published.rows} == published.rows
    assert counts["publication"] == 1 and counts["clip_scores"] > 0


def test_parquet_holds_the_same_rows(warehouse: Warehouse, public: Path) -> None:
    publish_scores(warehouse.path, public, run_id="run")
    database = public / "scores.duckdb"
    names = [name for (name,) in query(database, "SHOW TABLES")]
    files = {path.stem for path in (public / "parquet").iterdir()}
    assert files == set(names) and "clip_scores" in files
    with duckdb.connect(str(database), read_only=True) as connection:
        for name in names:
            file = public / "parquet" / f"{name}.parquet"
            left = connection.execute(f"FROM {name} EXCEPT ALL FROM '{file}'").fetchall()
            right = connection.execute(f"FROM '{file}' EXCEPT ALL FROM {name}").fetchall()
            assert left == right == [], name


def test_nothing_published_can_be_written(warehouse: Warehouse, public: Path) -> None:
    published = publish_scores(warehouse.path, public, run_id="run")
    files = [public / "scores.duckdb", *published.snapshot.rglob("*.*")]
    files = [file for file in files if file.is_file()]
    assert len(files) > len(TABLES)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o444}


def test_the_last_few_publications_stay_and_each_is_whole(
    warehouse: Warehouse, public: Path
) -> None:
    made = []
    for number in range(4):
        fill(warehouse, [generation(f"n{number}")], [score(f"n{number}", 0.1)])
        made.append(publish_scores(warehouse.path, public, run_id=f"run {number}", kept=3))
    snapshots = sorted((public / "snapshots").iterdir())
    assert [path.name for path in snapshots] == [p.publication_id for p in made[1:]]
    for path, published in zip(snapshots, made[1:], strict=True):
        rows = query(path / "scores.duckdb", "SELECT count(*) FROM fct_score")
        assert rows == [(published.rows["fct_score"],)]
        parquet = path / "parquet" / "fct_score.parquet"
        with duckdb.connect() as connection:
            assert connection.execute(f"SELECT count(*) FROM '{parquet}'").fetchall() == rows
    # The newest one takes no room twice.
    assert (
        os.stat(public / "scores.duckdb").st_ino == os.stat(snapshots[-1] / "scores.duckdb").st_ino
    )
    assert (public / "parquet").resolve() == (snapshots[-1] / "parquet").resolve()


def test_a_publication_survives_a_power_cut_and_its_database_comes_first(
    warehouse: Warehouse, public: Path, disk: Disk
) -> None:
    snapshot = publish_scores(warehouse.path, public, run_id="run").snapshot
    assert disk.renamed == [snapshot, public / "scores.duckdb", public / "parquet"]
    assert disk.half == [] and disk.unnamed == {}


def test_a_clock_that_is_set_back_takes_no_publication_away(
    warehouse: Warehouse, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(dt.datetime):
        ahead = dt.timedelta(hours=3)

        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Any:
            return dt.datetime.now(tz) + cls.ahead

    clock = SimpleNamespace(datetime=Clock, UTC=dt.UTC, timedelta=dt.timedelta)
    monkeypatch.setattr(publication, "dt", clock)
    made = [publish_scores(warehouse.path, public, run_id="ahead", kept=2) for _ in range(2)]
    Clock.ahead = dt.timedelta()
    made += [publish_scores(warehouse.path, public, run_id="right", kept=2) for _ in range(2)]
    assert sorted(path.name for path in (public / "snapshots").iterdir()) == [
        published.publication_id for published in made[2:]
    ]
    assert (public / "parquet").resolve() == (made[-1].snapshot / "parquet").resolve()
    assert (public / "parquet" / "fct_score.parquet").exists()


def test_a_report_that_was_taken_away_is_not_published_any_more(
    warehouse: Warehouse, public: Path
) -> None:
    report(warehouse, "kept")
    report(warehouse, "taken_away")
    with warehouse.write() as connection:
        connection.execute("CREATE VIEW old_view AS SELECT answer FROM taken_away")
    publish_scores(warehouse.path, public, run_id="run", reports=["kept"])
    names = {name for (name,) in query(public / "scores.duckdb", "SHOW TABLES")}
    assert "kept" in names and not names & {"taken_away", "old_view"}
    assert not (public / "parquet" / "taken_away.parquet").exists()
    with warehouse.read() as connection:
        assert connection.execute("SELECT answer FROM taken_away").fetchall() == [(42,)]


def test_a_publication_that_fails_leaves_the_one_before(
    warehouse: Warehouse, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = publish_scores(warehouse.path, public, run_id="run")
    before = {path: path.read_bytes() for path in public.rglob("*") if path.is_file()}
    fill(warehouse, [generation("more")], [score("more", 0.1)])
    # While the rows are copied, while Parquet is written, and when it is to take its place.
    with duckdb.connect(str(warehouse.path)) as connection:
        connection.execute("CREATE TABLE gone (a INTEGER)")
        connection.execute("CREATE VIEW broken AS SELECT a FROM gone")
        connection.execute("DROP TABLE gone")
    with pytest.raises(PublishError, match="broken"):
        publish_scores(warehouse.path, public, run_id="run")
    with duckdb.connect(str(warehouse.path)) as connection:
        connection.execute("DROP VIEW broken")
    from posterpipe.core.warehouse import publication

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    def refused(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    for name in ("_write_parquet", "_point_at"):
        with monkeypatch.context() as patch, pytest.raises(PublishError, match="No space left"):
            patch.setattr(publication, name, full)
            publish_scores(warehouse.path, public, run_id="run")
    # And where files cannot be linked, while the copy gets onto the disk.
    settle = publication._settle
    with monkeypatch.context() as patch, pytest.raises(PublishError, match="No space left"):
        patch.setattr(os, "link", full)
        patch.setattr(
            publication,
            "_settle",
            lambda file: full() if file.parent.parent == public else settle(file),
        )
        publish_scores(warehouse.path, public, run_id="run")
    # And where the file system has no symbolic links.
    with monkeypatch.context() as patch, pytest.raises(PublishError, match="symbolic links"):
        patch.setattr(os, "symlink", refused)
        publish_scores(warehouse.path, public, run_id="run")
    after = {path: path.read_bytes() for path in public.rglob("*") if path.is_file()}
    assert after == before
    assert query(public / "scores.duckdb", "SELECT publication_id FROM publication") == [
        (published.publication_id,)
    ]
    assert not list(public.rglob("*.tmp"))
    # What is shown already stays, also where the disk fails when it is to be made lasting.
    with monkeypatch.context() as patch, pytest.raises(PublishError, match="No space"):
        sync = publication.fsync
        patch.setattr(publication, "fsync", lambda path: full() if path == public else sync(path))
        publish_scores(warehouse.path, public, run_id="run")
    assert list((public / "parquet").glob("fct_score.parquet"))
    publish_scores(warehouse.path, public, run_id="run")
    assert query(public / "scores.duckdb", "SELECT count(*) FROM fct_score") == [(5,)]


ANALYST = """
import duckdb, sys
connection = duckdb.connect(sys.argv[1], read_only=True)
print(connection.execute("SELECT count(*) FROM fct_score").fetchall()[0][0], flush=True)
sys.stdin.readline()
print(connection.execute("SELECT count(*) FROM fct_score").fetchall()[0][0], flush=True)
"""


def test_an_analyst_with_the_file_open_blocks_nothing_and_keeps_what_was_opened(
    warehouse: Warehouse, public: Path
) -> None:
    publish_scores(warehouse.path, public, run_id="run", kept=1)
    analyst = subprocess.Popen(
        [sys.executable, "-c", ANALYST, str(public / "scores.duckdb")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert analyst.stdout is not None and analyst.stdout.readline() == "4\n"
    impatient = Warehouse(warehouse.path, busy_seconds=0.5)
    fill(impatient, [generation("more")], [score("more", 0.1)])
    for _ in range(3):
        publish_scores(warehouse.path, public, run_id="run", kept=1, busy_seconds=0.5)
    assert query(public / "scores.duckdb", "SELECT count(*) FROM fct_score") == [(5,)]
    assert analyst.communicate("go\n")[0] == "4\n"


READER = """
import json, sys, time
import duckdb

database, done = sys.argv[1:]
seen, opened, last = set(), 0, -1
print("ready", flush=True)
while True:
    # All of one connection is of one publication; the next connection sees the newest.
    with duckdb.connect(database, read_only=True) as connection:
        ask = lambda sql: connection.execute(sql).fetchall()[0]
        name, told = ask("SELECT publication_id, row_counts['fct_score'] FROM publication")
        (scores,) = ask("SELECT count(*) FROM fct_score")
        (images,) = ask("SELECT count(*) FROM fct_image")
        (current,) = ask("SELECT count(*) FROM clip_scores WHERE is_current")
        (total,) = ask("SELECT sum(value) FROM fct_score WHERE status = 'ok'")
        (again,) = ask("SELECT publication_id FROM publication")
    whole = told == scores == images == current and name == again
    # Every transaction of the writer adds one image with the score 1.
    if not whole or abs(total - (scores - 4) - 0.15) > 1e-6 or scores < last:
        print(json.dumps(["torn", name, again, told, scores, images, current, total, last]))
        sys.exit(1)
    last = scores
    opened += 1
    seen.add(name)
    try:
        open(done).close()
    except FileNotFoundError:
        continue
    # The publisher is done: one more look must show its last publication.
    if name == open(done).read():
        break
print(json.dumps(["fine", len(seen), opened, last]))
"""

WRITER = """
import sys, time
from pathlib import Path
import pandas as pd
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.core.warehouse.rows import insert, record_generations
from posterpipe_tests.core.warehouse.test_database import LATER, generation, score

warehouse, number = Warehouse(Path(sys.argv[1]), busy_seconds=60), 0
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    key = f"w{number}"
    with warehouse.write() as connection:
        frame = pd.DataFrame([generation(key, seed=number)])
        record_generations(connection, frame, run_id="run", recorded_at=LATER)
        insert(connection, "fct_score", pd.DataFrame([score(key, 1.0)]))
        connection.execute("INSERT INTO current_generation VALUES (?)", [key])
    number += 1
    time.sleep(0.1)  # as long as steps of the pipeline leave it closed, at least
print(number)
"""


@pytest.mark.parametrize(
    ("readers", "publications"), [(2, 4), pytest.param(8, 200, marks=pytest.mark.slow(minutes=5))]
)
def test_readers_query_without_pause_through_many_publications(
    warehouse: Warehouse, public: Path, tmp_path: Path, readers: int, publications: int
) -> None:
    """While another process writes: no error, nothing torn or mixed, and who opens anew sees the
    newest."""
    published = publish_scores(warehouse.path, public, run_id="run 0")
    done = tmp_path / "done"

    def start(script: str, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    reading = [start(READER, public / "scores.duckdb", done) for _ in range(readers)]
    writer = start(WRITER, warehouse.path, done)
    try:
        for number in range(publications):
            published = publish_scores(warehouse.path, public, run_id=f"run {number}", kept=3)
        temporary = tmp_path / "temporary"
        temporary.write_text(published.publication_id)
        temporary.rename(done)
        ends = [
            SimpleNamespace(out=process.communicate(timeout=60), code=process.returncode)
            for process in [writer, *reading]
        ]
    finally:
        for process in [writer, *reading]:
            process.kill()
    assert [end.code for end in ends] == [0] * (1 + readers), [end.out for end in ends]
    assert int(ends[0].out[0]) > publications // 10, "the writer wrote all the while"
    for end in ends[1:]:
        kind, seen, opened, last = json.loads(end.out[0])
        assert kind == "fine"
        assert seen > publications // 10 and opened >= seen
        assert last == published.rows["fct_score"]
    assert len(list((public / "snapshots").iterdir())) == 3


def test_the_published_file_is_readable_while_the_private_one_is_written(
    warehouse: Warehouse, public: Path
) -> None:
    publish_scores(warehouse.path, public, run_id="run")
    process = hold(warehouse.path, 60)
    try:
        assert query(public / "scores.duckdb", "SELECT count(*) FROM clip_scores") == [(4,)]
    finally:
        process.kill()
        process.wait()


def test_views_of_reports_are_published_too(public: Path, tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path / "scores.duckdb")
    fill(warehouse)
    with duckdb.connect(str(warehouse.path)) as connection:
        connection.execute("CREATE SCHEMA reports")
        # As dbt writes it: with the name of the database.
        connection.execute(
            "CREATE VIEW reports.best AS SELECT * FROM scores.main.clip_scores WHERE seed > 0"
        )
        connection.execute("CREATE TABLE reports.numbers AS SELECT 42 AS answer")
    published = publish_scores(warehouse.path, public, run_id="run")
    assert query(published.database, "SELECT count(*) FROM reports.best") == [(4,)]
    assert query(published.database, "SELECT answer FROM reports.numbers") == [(42,)]
    assert published.rows["reports.numbers"] == 1


def test_before_the_first_score_there_is_nothing_to_publish(public: Path, tmp_path: Path) -> None:
    with pytest.raises(WarehouseMissing, match="clip_scores"):
        publish_scores(tmp_path / "none.duckdb", public, run_id="run")
    assert not public.exists()


def test_what_a_killed_publication_left_is_swept(warehouse: Warehouse, public: Path) -> None:
    old, new = (public / "snapshots" / f".{name}.tmp" for name in ("old", "new"))
    for left in (old, new):
        left.mkdir(parents=True)
        (left / "scores.duckdb").write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    publish_scores(warehouse.path, public, run_id="run")
    assert not old.exists() and new.exists()


def test_a_store_that_was_copied_without_its_link_is_published_from_again(
    warehouse: Warehouse, public: Path, tmp_path: Path
) -> None:
    publish_scores(warehouse.path, public, run_id="run")
    copied = tmp_path / "copied"
    shutil.copytree(public, copied)  # follows links
    assert not (copied / "parquet").is_symlink()
    published = publish_scores(warehouse.path, copied, run_id="again")
    assert (copied / "parquet").resolve() == (published.snapshot / "parquet").resolve()
    assert query(published.database, "SELECT count(*) FROM publication") == [(1,)]
    assert not [path for path in copied.iterdir() if path.name.startswith(".")]


def test_a_folder_of_somebody_else_is_not_taken_for_published_tables(
    warehouse: Warehouse, public: Path
) -> None:
    (public / "parquet").mkdir(parents=True)
    (public / "parquet" / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(PublishError, match="holds other files than published tables"):
        publish_scores(warehouse.path, public, run_id="run")
    assert (public / "parquet" / "notes.txt").exists()
    assert not (public / "scores.duckdb").exists()
