"""The warehouse: idempotent and append-only, one writer, a published copy that is always whole."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import duckdb
import pandas as pd
import pytest

from posterpipe.core.champion.decisions import read_decisions
from posterpipe.core.warehouse.database import (
    Warehouse,
    WarehouseBusy,
    WarehouseError,
    WarehouseMissing,
)
from posterpipe.core.warehouse.publication import publish_scores
from posterpipe.core.warehouse.rows import (
    fill_checkpoints,
    insert,
    record_generations,
    replace_current,
)
from posterpipe.core.warehouse.schema import SCHEMA_VERSION

NOW = dt.datetime(2026, 1, 2, 3, 4, 5)
LATER = dt.datetime(2026, 2, 2)
METRIC = "clip_t.crop.scorer.abc.v1"


def generation(key: str, variant: str = "sd", status: str = "ok", **changes: object) -> dict:
    return {
        "generation_key": key,
        "pixel_key": f"pixels {key}",
        "variant": variant,
        "prompt_id": "rocket",
        "prompt": "a rocket 'Orbit'",
        "score_text": "a rocket",
        "negative_prompt": "",
        "title": "Orbit",
        "seed": 2**32 - 1,
        "checkpoint_id": "tuned1" if variant.startswith("dreambooth") else "base1",
        "image": "" if status == "failed" else "0" * 64,
        "image_path": "" if status == "failed" else "blobs/00/0.png",
        "status": status,
        "reason": "" if status == "ok" else "why",
        "width": 64,
        "height": 96,
        "settings": "{}",
        **changes,
    }


def score(key: str, value: float | None, status: str = "ok") -> dict:
    reason = "" if status == "ok" else "why"
    return {
        "generation_key": key, "metric_id": METRIC, "value": value, "status": status,
        "reason": reason, "scored_at": NOW, "run_id": "run",
    }  # fmt: skip


GENERATIONS = [
    generation("g1"),
    generation("g2", "dreambooth"),
    generation("g3", "sd_negative", "blocked"),
    generation("g4", "sd", "failed", seed=4),
]
SCORES = [
    score("g1", 0.25),
    score("g2", -0.1),
    score("g3", None, "blocked"),
    score("g4", None, "failed"),
]


def fill(
    warehouse: Warehouse,
    generations: list[dict] = GENERATIONS,
    scores: list[dict] = SCORES,
    when: dt.datetime = NOW,
) -> None:
    with warehouse.write() as connection:
        frame = pd.DataFrame(generations)
        record_generations(connection, frame, run_id="run", recorded_at=when)
        insert(connection, "fct_score", pd.DataFrame(scores).astype({"value": "float64"}))
        replace_current(connection, frame.generation_key)


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(tmp_path / "warehouse" / "scores.duckdb", busy_seconds=0.3)


def everything(warehouse: Warehouse) -> dict[str, list[tuple]]:
    tables = ("fct_image", "fct_score", "dim_prompt", "dim_checkpoint", "current_generation")
    with warehouse.read() as connection:
        return {
            name: connection.execute(f"SELECT * FROM {name} ORDER BY ALL").fetchall()
            for name in tables
        }


def test_the_view_that_analysts_read(warehouse: Warehouse) -> None:
    fill(warehouse)
    with warehouse.read() as connection:
        view = connection.execute("SELECT * FROM clip_scores ORDER BY generation_key").df()
    assert list(view.columns) == [
        "variant", "prompt_id", "prompt", "seed", "checkpoint_id", "metric_id", "clip_cosine",
        "clip_score", "image_path", "scored_at", "run_id", "generation_key", "is_current",
        "status",
    ]  # fmt: skip
    assert list(view.generation_key) == ["g1", "g2", "g3", "g4"]
    assert view.clip_cosine[0] == 0.25 and view.clip_score[0] == 0.625
    assert view.clip_cosine[1] == -0.1 and view.clip_score[1] == 0
    # A blocked image has no score, and not a score of 0.
    assert view.clip_cosine[2:].isna().all() and view.clip_score[2:].isna().all()
    assert view.prompt[0] == "a rocket 'Orbit'" and view.seed[0] == 2**32 - 1
    assert list(view.status) == ["ok", "ok", "blocked", "failed"]
    assert view.is_current.all() and view.scored_at[0] == NOW and view.run_id[0] == "run"


def test_writing_twice_changes_nothing(warehouse: Warehouse) -> None:
    fill(warehouse)
    before = everything(warehouse)
    fill(warehouse, when=LATER)
    assert everything(warehouse) == before


def test_rows_that_exist_are_never_changed(warehouse: Warehouse) -> None:
    fill(warehouse)
    other = [generation("g1", image_path="elsewhere"), generation("g3", "sd_negative")]
    fill(warehouse, other, [score("g1", 0.9), score("g3", 0.9)], LATER)
    assert everything(warehouse)["fct_score"][0][2] == 0.25
    images = {row[0]: row for row in everything(warehouse)["fct_image"]}
    assert images["g1"][9] == "blobs/00/0.png" and images["g3"][10] == "blocked"
    assert len(everything(warehouse)["fct_image"]) == 4


def test_a_failure_is_replaced_by_a_later_success_and_not_the_other_way(
    warehouse: Warehouse,
) -> None:
    fill(warehouse)
    assert set(warehouse.scores(METRIC, ["g1", "g3", "g4", "g5"]).generation_key) == {"g1", "g3"}
    fill(warehouse, [generation("g4", seed=4)], [score("g4", 0.5)])
    scores = warehouse.scores(METRIC, ["g4"])
    assert (scores.value[0], scores.status[0]) == (0.5, "ok")
    fill(warehouse, [generation("g4", status="failed", seed=4)], [score("g4", None, "failed")])
    assert warehouse.scores(METRIC, ["g4"]).value[0] == 0.5
    assert {row[0]: row[10] for row in everything(warehouse)["fct_image"]}["g4"] == "ok"


def test_an_image_that_was_drawn_again_is_named_by_its_new_file(warehouse: Warehouse) -> None:
    fill(warehouse)
    before = everything(warehouse)
    # The file was lost; drawn in a batch of another size, its pixels are rounded otherwise.
    again = {"image": "1" * 64, "image_path": "blobs/11/1.png"}
    fill(warehouse, [generation("g1", **again), *GENERATIONS[1:]], [score("g1", 0.9)], LATER)
    after = everything(warehouse)
    assert after["fct_score"] == before["fct_score"]
    first, *others = after["fct_image"]
    assert first[8:10] == ("1" * 64, "blobs/11/1.png") and others == before["fct_image"][1:]
    assert (*first[:8], *first[10:]) == (*before["fct_image"][0][:8], *before["fct_image"][0][10:])
    # One that cannot be drawn again keeps its place.
    fill(warehouse, [generation("g1", status="failed"), *GENERATIONS[1:]], SCORES, LATER)
    assert everything(warehouse) == after


def test_what_is_current_is_what_was_named_last(warehouse: Warehouse) -> None:
    fill(warehouse)
    fill(warehouse, [GENERATIONS[1], generation("g5")], [score("g5", 0.3)])
    with warehouse.read() as connection:
        rows = connection.execute(
            "SELECT generation_key FROM clip_scores WHERE is_current ORDER BY ALL"
        ).fetchall()
        total = connection.execute("SELECT count(*) FROM clip_scores").fetchall()
    assert rows == [("g2",), ("g5",)] and total == [(5,)]


def test_a_reworded_prompt_is_a_new_row_of_the_same_id(warehouse: Warehouse) -> None:
    fill(warehouse)
    fill(warehouse, [generation("g6", prompt="one rocket")], [score("g6", 0.1)])
    with warehouse.read() as connection:
        rows = connection.execute(
            "SELECT prompt FROM clip_scores WHERE prompt_id = 'rocket' "
            "AND generation_key IN ('g1', 'g6') ORDER BY generation_key"
        ).fetchall()
    assert rows == [("a rocket 'Orbit'",), ("one rocket",)]


def test_the_same_key_twice_at_once_is_one_row_and_a_success_counts(warehouse: Warehouse) -> None:
    fill(warehouse)
    twice = [score("g9", None, "failed"), score("g9", 0.2), score("g9", 0.3)]
    fill(warehouse, [generation("g9")], twice)
    with warehouse.read() as connection:
        rows = connection.execute(
            "SELECT value, status FROM fct_score WHERE generation_key = 'g9'"
        ).fetchall()
    assert rows == [(0.2, "ok")]


def test_an_error_rolls_everything_back_and_closes(warehouse: Warehouse) -> None:
    fill(warehouse)
    before = everything(warehouse)
    with pytest.raises(RuntimeError, match="half way"), warehouse.write() as connection:
        connection.execute("DELETE FROM fct_score")
        raise RuntimeError("half way")
    with pytest.raises(duckdb.ConstraintException), warehouse.write() as connection:
        insert(connection, "fct_score", pd.DataFrame([score("g9", None)]))
    assert everything(warehouse) == before


def test_reading_before_the_first_write(warehouse: Warehouse) -> None:
    with pytest.raises(WarehouseMissing, match="materialize the asset `clip_scores`"):  # noqa: SIM117
        with warehouse.read():
            pass
    assert warehouse.scores(METRIC, ["g1"]).empty
    with pytest.raises(RuntimeError), warehouse.write():
        raise RuntimeError
    assert warehouse.scores(METRIC, ["g1"]).empty


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "scores.duckdb"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(WarehouseError, match=r"scores\.duckdb: cannot be opened"):  # noqa: SIM117
        with Warehouse(path).write():
            pass


def test_a_folder_without_rights_is_told(warehouse: Warehouse) -> None:
    warehouse.prepare()
    folder = warehouse.path.parent
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("root may write into every folder")
        with pytest.raises(WarehouseError, match="the folder writable"), warehouse.write() as held:
            held.execute("INSERT INTO schema_version VALUES (0)")
        folder.chmod(0)
        for use in (warehouse.read, warehouse.write):
            with pytest.raises(WarehouseError, match="Permission denied"), use():
                pass
    finally:
        folder.chmod(0o755)


def test_a_path_that_cannot_be_is_told(tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path / ("x" * 300) / "warehouse.duckdb")
    for use in (warehouse.read, warehouse.write):
        with (
            pytest.raises(WarehouseError, match=r"xxx.*File name too long.*POSTERPIPE_STORE"),
            use(),
        ):
            pass


def test_a_newer_schema_is_refused(warehouse: Warehouse) -> None:
    with warehouse.write() as connection:
        connection.execute("INSERT INTO schema_version VALUES (99)")
    with pytest.raises(WarehouseError, match="newer posterpipe"), warehouse.write():
        pass


def test_a_file_keeps_its_identity_and_another_one_has_another(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    """It tells what was written into a file that is lost from what lies in the one there is."""
    assert warehouse.identity() == ""
    identity = warehouse.prepare()
    assert identity
    fill(warehouse)
    with duckdb.connect(str(warehouse.path)) as connection:
        connection.execute("CREATE TABLE big AS SELECT range AS x FROM range(100000)")
        connection.execute("CHECKPOINT")
        connection.execute("DROP TABLE big")
        assert warehouse.identity() == identity  # asked while another connection writes
    with warehouse.read():
        assert warehouse.prepare() == identity
    published = publish_scores(warehouse.path, tmp_path / "public", run_id="run")
    assert Warehouse(published.database).identity() not in ("", identity)
    warehouse.path.unlink()
    assert warehouse.identity() == ""
    fill(warehouse)
    assert warehouse.identity() not in ("", identity)


def test_a_copy_of_before_that_is_put_back_is_another_file(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    """It lacks what was written since, so whoever wrote it must not take it for the same."""
    fill(warehouse)
    identity = warehouse.identity()
    copy = tmp_path / "copy.duckdb"
    shutil.copyfile(warehouse.path, copy)
    shutil.copyfile(copy, warehouse.path)
    assert warehouse.identity() == identity, "nothing is lacking"
    identities = [identity]
    for _ in range(2):
        fill(warehouse, scores=[score("new", 0.5)])
        assert warehouse.identity() == identities[-1]
        shutil.copyfile(copy, warehouse.path)
        behind = warehouse.identity()
        assert behind not in ("", *identities)
        # Who writes next, as often as it may be, does not make it the old one again.
        for number in range(3):
            fill(warehouse, scores=[score(f"other {number}", 0.5)])
            assert warehouse.identity() == warehouse.prepare() == behind
        identities.append(behind)


def test_a_copy_of_before_another_program_wrote_is_another_file_once_that_is_noted(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    """dbt writes its reports into the same file."""
    identity = warehouse.prepare()
    copy = tmp_path / "copy.duckdb"
    shutil.copyfile(warehouse.path, copy)
    with duckdb.connect(str(warehouse.path)) as connection:
        connection.execute("CREATE TABLE report AS SELECT 1 AS x")
    assert warehouse.prepare() == identity
    shutil.copyfile(copy, warehouse.path)
    assert warehouse.identity() not in ("", identity)


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_log_of_the_file_of_before_is_named_where_it_keeps_a_file_from_being_opened(
    warehouse: Warehouse, tmp_path: Path, made_anew: bool
) -> None:
    fill(warehouse)
    copy = tmp_path / "copy.duckdb"
    shutil.copyfile(warehouse.path, copy)
    fill(warehouse, scores=[score("new", 0.5)])
    script = "import duckdb, os, sys; c = duckdb.connect(sys.argv[1]); "
    script += "c.execute('DELETE FROM fct_score'); os._exit(0)"
    subprocess.run([sys.executable, "-c", script, str(warehouse.path)], check=True)
    warehouse.path.unlink()
    if not made_anew:
        shutil.copyfile(copy, warehouse.path)
    with pytest.raises(WarehouseError, match=r"take scores\.duckdb\.wal away"):
        fill(warehouse)
    warehouse.path.with_name("scores.duckdb.wal").unlink()
    fill(warehouse)


def test_a_crash_before_the_file_is_noted_makes_it_no_other_file(warehouse: Warehouse) -> None:
    fill(warehouse)
    identity = warehouse.identity()
    note = warehouse.path.with_suffix(".json")
    noted = note.read_text("utf-8")
    fill(warehouse, scores=[score("new", 0.5)])
    assert note.read_text("utf-8") != noted
    note.write_text(noted, "utf-8")
    assert warehouse.identity() == identity
    process = hold(warehouse.path, 60)
    try:
        assert warehouse.identity() == identity
    finally:
        process.kill()
        process.wait()
    assert warehouse.prepare() == identity
    # A file from before there were notes, or whose note cannot be read, is the one that it was.
    for damage in ("", "{}", "[]", None):
        note.unlink() if damage is None else note.write_text(damage)
        assert warehouse.identity() == warehouse.prepare() == identity


def test_a_file_of_the_first_schema_is_brought_up_to_date(warehouse: Warehouse) -> None:
    warehouse.path.parent.mkdir(parents=True)
    script = Path(__file__).with_name("warehouse_v1.sql").read_text("utf-8")
    with duckdb.connect(str(warehouse.path)) as connection:
        connection.execute(script)
        frame = pd.DataFrame(GENERATIONS)
        record_generations(connection, frame, run_id="run", recorded_at=NOW)
        insert(connection, "fct_score", pd.DataFrame(SCORES).astype({"value": "float64"}))
        replace_current(connection, frame.generation_key)
    before, identity = everything(warehouse), warehouse.identity()
    assert before["fct_score"]
    fill(warehouse)
    assert everything(warehouse) == before
    assert warehouse.identity() == identity
    with warehouse.write() as connection:
        drawing = {"pixel_key": "pixels g1", "run_id": "run", "environment_id": "e"}
        insert(connection, "fct_drawing", pd.DataFrame([drawing]))
        facts = {
            "checkpoint_id": "tuned1", "base_model": "base1", "training_set_version": "t",
            "settings": "{}", "trained_at": NOW, "run_id": "training",
        }  # fmt: skip
        fill_checkpoints(connection, pd.DataFrame([facts]))
        fill_checkpoints(connection, pd.DataFrame([{**facts, "base_model": "another"}]))
    with warehouse.read() as connection:
        drawn = connection.execute("SELECT pixel_key, drawn_at FROM fct_drawing").fetchall()
        trained = connection.execute(
            "SELECT checkpoint_id, base_model, run_id FROM dim_checkpoint ORDER BY ALL"
        ).fetchall()
        version = connection.execute("SELECT max(version) FROM schema_version").fetchall()
    assert drawn == [("pixels g1", None)]
    assert trained == [("base1", None, "run"), ("tuned1", "base1", "training")]
    assert version == [(SCHEMA_VERSION,)]
    published = publish_scores(warehouse.path, warehouse.path.with_name("public"), run_id="run")
    with duckdb.connect(str(published.database), read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM clip_scores").fetchall() == [(4,)]


def test_decisions_of_an_older_schema_learn_their_base_model(warehouse: Warehouse) -> None:
    warehouse.path.parent.mkdir(parents=True)
    script = Path(__file__).with_name("warehouse_v1.sql").read_text("utf-8")
    with duckdb.connect(str(warehouse.path)) as connection:
        connection.execute(script)
        connection.execute(
            "INSERT INTO dim_checkpoint (checkpoint_id, kind, base_model, first_seen_at) "
            "VALUES ('tuned1', 'tuned', 'base1', now()), ('base1', 'base', NULL, now())"
        )
        connection.execute(
            "INSERT INTO fct_promotion SELECT name, TIMESTAMP '2026-01-01', name, '', 'promote', "
            "'', '{}', 'gate', '' FROM (VALUES ('tuned1'), ('base1'), ('nobody')) AS named(name)"
        )
    before = read_decisions(warehouse)
    assert before["checkpoint_id"].tolist() == ["tuned1", "base1", "nobody"]
    assert before["base_model"].isna().all()
    with warehouse.write():
        pass
    after = read_decisions(warehouse)
    assert after["base_model"].fillna("?").tolist() == ["base1", "base1", "?"]
    pd.testing.assert_frame_equal(
        before.drop(columns="base_model"), after.drop(columns="base_model")
    )


HOLDER = """
import sys, time, duckdb
connection = duckdb.connect(sys.argv[1])
connection.execute("BEGIN")
connection.execute("INSERT INTO current_generation VALUES ('half')")
print("open", flush=True)
time.sleep(float(sys.argv[2]))
"""


def hold(path: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    return process


def test_who_finds_it_locked_learns_who_has_it(warehouse: Warehouse) -> None:
    fill(warehouse)
    process = hold(warehouse.path, 60)
    try:
        for use in (warehouse.write, warehouse.read):
            with pytest.raises(WarehouseBusy, match=rf"process {process.pid} .*wait for it"), use():
                pass
        with pytest.raises(WarehouseBusy, match=f"process {process.pid}"):
            publish_scores(
                warehouse.path, warehouse.path.with_name("public"), run_id="run", busy_seconds=0.2
            )
    finally:
        process.kill()
        process.wait()


def test_who_waits_gets_it_in_the_end(warehouse: Warehouse) -> None:
    fill(warehouse)
    process = hold(warehouse.path, 1.0)
    patient = Warehouse(warehouse.path, busy_seconds=60)
    fill(patient, [generation("g7")], [score("g7", 0.4)])
    process.wait()
    assert patient.scores(METRIC, ["g7"]).value[0] == 0.4


def test_threads_of_one_process_take_turns(warehouse: Warehouse) -> None:
    patient = Warehouse(warehouse.path, busy_seconds=60)
    fill(patient)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            fill(patient, [generation(f"t{number}")], [score(f"t{number}", 0.1)])
            assert len(patient.scores(METRIC, [f"t{number}"])) == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(patient.scores(METRIC, [f"t{number}" for number in range(4)])) == 4


FIRST_WRITES = """
import sys, time
from pathlib import Path
from posterpipe.core.warehouse.database import Warehouse
from posterpipe_tests.core.warehouse.test_database import METRIC, fill, generation, score
folder, number = Path(sys.argv[1]), int(sys.argv[2])
for round in range(int(sys.argv[3])):
    warehouse = Warehouse(folder / f"{round}.duckdb", busy_seconds=60)
    (folder / f"{round} {number}").touch()
    while len(list(folder.glob(f"{round} *"))) < 3:  # all begin at the same moment
        time.sleep(0.0005)
    if number:
        fill(warehouse, [generation(f"g{number}")], [score(f"g{number}", 0.5)])
    else:
        while warehouse.scores(METRIC, ["g1", "g2"]).empty:  # a reader sees nothing, or a row
            pass
"""


def test_processes_that_write_first_at_the_same_moment_make_one_warehouse(tmp_path: Path) -> None:
    rounds = 12
    command = [sys.executable, "-c", FIRST_WRITES, str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(number), str(rounds)], stderr=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    for number in range(rounds):
        scores = Warehouse(tmp_path / f"{number}.duckdb").scores(METRIC, ["g1", "g2"])
        assert sorted(scores.generation_key) == ["g1", "g2"]
    assert not list(tmp_path.glob(".*"))


def test_nobody_sees_the_file_before_its_tables_are_in_it(warehouse: Warehouse) -> None:
    seen = []

    class Watched(Warehouse):
        def _prepare(self, connection: duckdb.DuckDBPyConnection) -> None:
            seen.append(self.path.exists())
            super()._prepare(connection)

    fill(Watched(warehouse.path))
    assert seen[0] is False, "the place was taken by a file that is no warehouse yet"
    assert everything(warehouse)["fct_score"]


def test_a_killed_writer_leaves_nothing_half_done(warehouse: Warehouse) -> None:
    fill(warehouse)
    before = everything(warehouse)
    process = hold(warehouse.path, 60)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert everything(warehouse) == before
    fill(warehouse)
    assert everything(warehouse) == before
