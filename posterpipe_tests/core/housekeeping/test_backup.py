"""A backup that is taken while the pipeline works, and put back."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import threading
from pathlib import Path

import dagster as dg
import pandas as pd
import pytest

from posterpipe.core.files import unchanged
from posterpipe.core.housekeeping.backup import ELSEWHERE, WHOLE, BackupError, back_up
from posterpipe.core.store import Store
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.core.warehouse.publication import publish_scores
from posterpipe.core.warehouse.rows import insert
from posterpipe_tests.core.warehouse.test_database import score


class Checkout:
    """A store, Dagster's home and posters below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store(root / "data" / "store")
        self.home = root / ".dagster"
        self.landing = root / "data" / "raw_posters"
        self.warehouse = Warehouse(self.store.root / "warehouse.duckdb")

    def instance(self) -> dg.DagsterInstance:
        return dg.DagsterInstance.from_config(str(self.home))

    def fill(self) -> tuple[str, str]:
        """The hash of a blob, and the id of a run."""
        self.landing.mkdir(parents=True)
        (self.landing / "poster.png").write_bytes(b"a poster")
        (self.landing / ".poster.png.1.tmp").write_bytes(b"half a poster")
        blob = self.store.put(b"an image", ".png")
        linked = self.store.root / "training_sets" / "1" / "a.png"
        linked.parent.mkdir(parents=True)
        os.link(self.store.path(blob, ".png"), linked)
        self.store.write_table("raw_posters", pd.DataFrame({"poster": ["a"]}))
        self.store.add_results("caption", {"key": {"caption": "a cat"}})
        with self.warehouse.write() as connection:
            insert(connection, "fct_score", pd.DataFrame([score("1" * 64, 0.25)]))
        (self.store.root / "public").mkdir()
        publish_scores(self.warehouse.path, self.store.root / "public", run_id="a run")
        self.home.mkdir()
        (self.home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")

        @dg.asset
        def posters() -> None: ...

        with self.instance() as instance:
            return blob, dg.materialize([posters], instance=instance).run_id

    def back_up(self, folder: Path) -> None:
        back_up(folder, root=self.root, store=self.store.root, places=[self.home, self.landing])


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout")


def test_what_is_copied_while_others_write_is_whole_when_it_is_put_back(
    checkout: Checkout, tmp_path: Path
) -> None:
    blob, run_id = checkout.fill()
    stop = threading.Event()
    written: list[int] = []

    def work() -> None:
        while not stop.is_set():
            checkout.store.add_results("caption", {str(len(written)): {"caption": "x" * 5_000}})
            written.append(1)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        # A step holds the warehouse, and a transaction of Dagster is open.
        with checkout.warehouse.write(), checkout.instance() as instance:
            checkout.back_up(tmp_path / "backup")
            assert instance.get_run_by_id(run_id)
    finally:
        stop.set()
        worker.join()
    restored = Checkout(tmp_path / "restored")
    parts = [str(tmp_path / "backup" / name) for name in ("data", ".dagster")]
    subprocess.run(["cp", "-a", *parts, str(restored.root)], check=True)
    assert unchanged(restored.store.path(blob, ".png"), blob)
    linked = restored.store.root / "training_sets" / "1" / "a.png"
    assert linked.stat().st_ino == restored.store.path(blob, ".png").stat().st_ino
    assert restored.store.read_table("raw_posters")["poster"].tolist() == ["a"]
    assert restored.store.results("caption", ["key"]) == {"key": {"caption": "a cat"}}
    with sqlite3.connect(restored.store.root / "index.sqlite") as index:
        assert index.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    restored.store.add_results("caption", {"new": {}})
    with restored.warehouse.write() as connection:
        assert connection.sql("SELECT value FROM fct_score").fetchall() == [(0.25,)]
    with restored.instance() as instance:
        run = instance.get_run_by_id(run_id)
        assert run is not None and run.status == dg.DagsterRunStatus.SUCCESS
        assert instance.get_latest_materialization_event(dg.AssetKey("posters")) is not None
        assert instance.all_logs(run_id)
    assert [path.name for path in restored.landing.iterdir()] == ["poster.png"]
    assert not (restored.store.root / "public").exists()
    assert (tmp_path / "backup" / WHOLE).exists()


def test_a_disk_without_hard_links_has_copies_of_what_is_linked(
    checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob, _ = checkout.fill()

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("posterpipe.core.housekeeping.backup.os.link", refuse)
    checkout.back_up(tmp_path / "backup")
    whole = list((tmp_path / "backup").rglob("training_sets/1/a.png"))
    assert [unchanged(path, blob) for path in whole] == [True]
    assert (tmp_path / "backup" / WHOLE).exists()


def test_places_elsewhere_lie_apart_and_missing_ones_are_named(
    checkout: Checkout, tmp_path: Path
) -> None:
    checkout.fill()
    posters, nowhere = tmp_path / "posters", tmp_path / "nowhere.csv"
    posters.mkdir()
    (posters / "far.png").write_bytes(b"far")
    (checkout.store.root / "public" / "scores.duckdb").unlink()
    done = back_up(
        tmp_path / "backup",
        root=checkout.root,
        store=checkout.store.root,
        places=[posters, nowhere],
    )
    assert done.missing == [nowhere, checkout.store.root / "public" / "scores.duckdb"]
    copied = done.folder / ELSEWHERE / posters.relative_to("/") / "far.png"
    assert copied.read_bytes() == b"far"
    assert done.files == sum(path.is_file() for path in done.folder.rglob("*")) - 1


def test_a_folder_that_holds_something_or_lies_in_the_store_is_refused(
    checkout: Checkout, tmp_path: Path
) -> None:
    checkout.fill()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(BackupError, match="used is not empty"):
        checkout.back_up(tmp_path / "used")
    with pytest.raises(BackupError, match=r"lies in .*store"):
        checkout.back_up(checkout.store.root / "backup")
    with pytest.raises(BackupError, match=r"file/backup: cannot be used"):
        checkout.back_up(tmp_path / "used" / "file" / "backup")


def test_a_store_that_cannot_be_written_is_copied_and_what_cannot_be_read_of_it_is_told(
    checkout: Checkout, tmp_path: Path
) -> None:
    checkout.fill()
    root, index = checkout.store.root, checkout.store.root / "index.sqlite"
    root.chmod(0o555)
    try:
        if os.access(root, os.W_OK):
            pytest.skip("root may write into every folder")
        checkout.back_up(tmp_path / "backup")
        copy = Checkout(tmp_path / "backup").store
        assert copy.results("caption", ["key"]) == {"key": {"caption": "a cat"}}
        # What a killed process left in the log would be lost by reading past it.
        root.chmod(0o755)
        log = index.with_name("index.sqlite-wal")
        log.write_bytes(b"the last results")
        root.chmod(0o555)
        with pytest.raises(BackupError, match=r"index\.sqlite: cannot be copied"):
            checkout.back_up(tmp_path / "second")
    finally:
        root.chmod(0o755)


def test_a_place_of_which_nobody_can_tell_whether_it_is_there_is_told(
    checkout: Checkout, tmp_path: Path
) -> None:
    too_long = tmp_path / ("x" * 300) / "store"
    with pytest.raises(BackupError, match=r"xxx.*: cannot be copied \(File name too long\)"):
        back_up(tmp_path / "backup", root=checkout.root, store=too_long, places=[])


def test_a_copy_that_broke_off_is_told_and_does_not_pass_for_a_whole_one(
    checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout.fill()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "b.png")

    monkeypatch.setattr("posterpipe.core.housekeeping.backup.shutil.copy2", full)
    with pytest.raises(BackupError, match=r"No space left on device.*is not whole"):
        checkout.back_up(tmp_path / "backup")
    assert not (tmp_path / "backup" / WHOLE).exists()
