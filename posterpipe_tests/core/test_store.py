"""The store: what is written is all there or not there, and nothing is computed twice."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posterpipe.core.files import write_atomic
from posterpipe.core.store import (
    Store,
    StoreError,
    TableMissing,
    compute_missing,
    content_key,
    table_version,
)
from posterpipe.settings import ImageSettings
from posterpipe_tests.core.conftest import disk_is_full

FORK = multiprocessing.get_context("fork")


def test_bytes_lie_under_their_sha256_with_their_suffix(store: Store) -> None:
    blob = store.put(b"poster", ".png")
    assert blob == hashlib.sha256(b"poster").hexdigest()
    assert store.path(blob, ".png") == store.root / "blobs" / blob[:2] / f"{blob}.png"
    assert store.path(blob, ".png").read_bytes() == b"poster"
    assert store.has(blob, ".png")
    assert not store.has(blob)


def test_bytes_that_are_there_are_not_written_again_but_marked_as_used(store: Store) -> None:
    path = store.path(store.put(b"poster"))
    inode = path.stat().st_ino
    os.utime(path, (1, 1))
    store.put(b"poster")
    assert path.stat().st_ino == inode
    assert time.time() - path.stat().st_mtime < 60


def test_a_blob_that_somebody_saved_over_is_told_however_often_it_was_used_since(
    store: Store,
) -> None:
    blob = store.put(b"poster")
    path = store.path(blob)
    assert store.intact(blob)
    os.chmod(path, 0o644)
    path.write_bytes(b"posted")
    os.utime(path, ns=(1_500_000_001, 1_500_000_001))
    assert store.has(blob)  # which marks it as used
    assert time.time() - path.stat().st_mtime < 60
    assert not store.intact(blob)
    assert not path.exists()
    assert store.put(b"poster") == blob
    assert store.intact(blob)


def test_a_blob_is_read_once_where_it_was_kept_before_there_were_seals(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = store.put(b"poster")
    os.utime(store.path(blob), ns=(1_500_000_001, 1_500_000_001))
    assert store.intact(blob)
    read: list[object] = []
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: read.append(arguments))
    assert store.intact(blob)
    os.utime(store.path(blob), (1, 1))
    assert store.intact(blob)
    assert read == []


def test_those_who_share_a_store_by_their_group_may_still_mark_blobs_as_used(
    store: Store,
) -> None:
    before = os.umask(0o002)
    try:
        path = store.path(store.put(b"poster"))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o464


def test_whoever_asks_for_something_counts_as_its_user(store: Store) -> None:
    path = store.path(store.put(b"poster"))
    version = store.write_table("posters", FRAME)
    parquet = store.root / "tables" / "posters" / f"{version}.parquet"
    for asked, ask in [
        (path, lambda: store.has(path.name)),
        (parquet, lambda: store.read_table("posters")),
        (parquet, lambda: store.write_table("posters", FRAME)),
    ]:
        os.utime(asked, (1, 1))
        ask()
        assert time.time() - asked.stat().st_mtime < 60


def test_a_table_that_is_replaced_was_in_use_until_now(store: Store) -> None:
    old = store.write_table("posters", FRAME)
    parquet = store.root / "tables" / "posters" / f"{old}.parquet"
    os.utime(parquet, (1, 1))
    store.write_table("posters", FRAME.head(1))
    assert time.time() - parquet.stat().st_mtime < 60


def test_what_is_gone_cannot_be_kept(store: Store) -> None:
    path = store.path(store.put(b"poster"))
    path.unlink()
    assert not store.keep(path)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    write_atomic(target, b"old")

    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_store_that_cannot_be_created_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="POSTERPIPE_STORE"):
        Store(tmp_path / "file" / "store")


def test_results_come_back_in_the_order_asked_and_without_the_absent(store: Store) -> None:
    store.add_results("caption", {"a": {"text": "ä"}, "b": {"text": "two"}})
    found = store.results("caption", ["b", "missing", "a", "b"])
    assert list(found.items()) == [("b", {"text": "two"}), ("a", {"text": "ä"})]
    assert store.results("other kind", ["a"]) == {}


def test_the_first_writer_of_a_result_wins(store: Store) -> None:
    store.add_results("k", {"a": {"n": 1}})
    store.add_results("k", {"a": {"n": 2}, "b": {"n": 3}})
    assert store.results("k", ["a", "b"]) == {"a": {"n": 1}, "b": {"n": 3}}


def test_more_keys_than_sqlite_takes_in_one_statement(store: Store) -> None:
    rows = {f"{n:05}": {"n": n} for n in range(2500)}
    store.add_results("k", rows)
    assert store.results("k", rows) == rows


def used_at(store: Store) -> dict[str, int]:
    return {key: at for _, key, _, at in store.all_results()}


def age_rows(store: Store, at: int = 1) -> None:
    with closing(sqlite3.connect(store.root / "index.sqlite")) as index, index:
        index.execute("UPDATE results SET used_at = ?", [at])


def test_reading_and_adding_results_marks_them_as_used(store: Store) -> None:
    store.add_results("k", {"a": {"n": 1}, "b": {"n": 2}, "c": {"n": 3}})
    age_rows(store)
    store.results("k", ["a"])
    store.add_results("k", {"b": {"n": 9}})
    found = used_at(store)
    assert time.time() - min(found["a"], found["b"]) < 60
    assert found["c"] == 1
    assert store.results("k", ["b"]) == {"b": {"n": 2}}


def test_only_what_was_not_used_since_is_forgotten(store: Store) -> None:
    store.add_results("k", {"old": {}, "new": {}})
    age_rows(store)
    store.results("k", ["new"])
    wanted = [("k", "old"), ("k", "new"), ("k", "never there")]
    assert store.forget_unused(wanted, time.time() - 60) == {("k", "old")}
    assert list(store.results("k", ["old", "new"])) == ["new"]


def test_an_index_of_the_first_form_is_brought_up_to_date(store: Store) -> None:
    with closing(sqlite3.connect(store.root / "index.sqlite")) as index, index:
        index.execute(
            "CREATE TABLE results (kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, "
            "PRIMARY KEY (kind, key)) WITHOUT ROWID"
        )
        index.execute("INSERT INTO results VALUES ('k', 'a', '{\"n\":1}')")
    assert used_at(store) == {"a": 0}
    workers = [FORK.Process(target=_write_results, args=(store.root, n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert store.results("k", ["a"]) == {"a": {"n": 1}}
    assert used_at(store)["a"] > 0


# -- leases --------------------------------------------------------------------------------------


def test_a_lease_lives_as_long_as_the_work(store: Store) -> None:
    assert store.live_leases() == []
    with store.lease(), store.lease():
        begun = store.live_leases()
        assert len(begun) == 2
        assert all(abs(time.time() - moment) < 60 for moment in begun)
    assert store.live_leases() == []
    assert list((store.root / "leases").iterdir()) == []


def _hold_lease(root: Path) -> None:
    with Store(root).lease():
        time.sleep(600)


def test_a_killed_process_leaves_no_lease_behind(store: Store) -> None:
    worker = FORK.Process(target=_hold_lease, args=(store.root,))
    worker.start()
    deadline = time.monotonic() + 30
    while not store.live_leases() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert store.live_leases()
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join()
    assert store.live_leases() == []
    assert list((store.root / "leases").iterdir()) == []


def test_work_holds_a_lease(store: Store) -> None:
    def compute(keys: list[str]) -> Iterator[tuple[str, dict]]:
        yield keys[0], {"leases": len(store.live_leases())}

    assert compute_missing(store, "k", ["a"], compute) == {"a": {"leases": 1}}


def test_an_index_that_is_no_database_says_what_to_do(store: Store) -> None:
    (store.root / "index.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match=r"index\.sqlite: is not a database .* move it away"):
        store.results("k", ["a"])


def test_an_index_that_is_damaged_within_says_what_to_do(store: Store) -> None:
    keys = [f"{n:032}" for n in range(2_000)]
    store.add_results("k", {key: {"n": 1} for key in keys})
    path = store.root / "index.sqlite"
    with closing(sqlite3.connect(path)) as index:
        index.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:  # all but the first page, which says that it is a database
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    with pytest.raises(StoreError, match=r"index\.sqlite: is not a database .* move it away"):
        store.results("k", keys)


def test_a_file_system_without_locks_is_named_with_the_setting(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with store.lease():  # as where nothing can be written: nobody is told of it
        assert not store.live_leases()
    turn = store.turn()
    with pytest.raises(StoreError, match=r"cannot be locked .* POSTERPIPE_STORE"), turn:
        pass
    assert not list(store.root.rglob("*.lease"))


def _write_results(root: Path, worker: int) -> None:
    store = Store(root)
    for n in range(10):
        store.add_results("k", {f"{worker}-{n}": {"n": n}, f"shared-{n}": {"by": worker}})
        store.put(f"blob {n}".encode())


def test_processes_write_into_one_store_at_the_same_time(tmp_path: Path) -> None:
    workers = [FORK.Process(target=_write_results, args=(tmp_path, n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    keys = [f"{w}-{n}" for w in [*range(4), "shared"] for n in range(10)]
    assert len(Store(tmp_path).results("k", keys)) == 50
    assert len(list((tmp_path / "blobs").rglob("*"))) <= 20


# -- work ----------------------------------------------------------------------------------------


def _squares(calls: list[str]) -> object:
    def compute(keys: list[str]) -> Iterator[tuple[str, dict]]:
        for key in keys:
            calls.append(key)
            yield key, {"square": int(key) ** 2}

    return compute


def test_only_what_is_missing_is_computed(store: Store) -> None:
    calls: list[str] = []
    compute_missing(store, "k", ["1", "2"], _squares(calls))  # type: ignore[arg-type]
    rows = compute_missing(store, "k", ["3", "2", "1", "3"], _squares(calls))  # type: ignore[arg-type]
    assert calls == ["1", "2", "3"]
    assert list(rows.items()) == [
        ("3", {"square": 9}),
        ("2", {"square": 4}),
        ("1", {"square": 1}),
    ]


def test_work_that_fails_keeps_what_was_done(store: Store) -> None:
    def fails(keys: list[str]) -> Iterator[tuple[str, dict]]:
        yield keys[0], {"n": 1}
        raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError, match="the model broke"):
        compute_missing(store, "k", ["a", "b"], fails)
    assert store.results("k", ["a", "b"]) == {"a": {"n": 1}}


def test_results_that_are_no_longer_usable_are_computed_again(store: Store) -> None:
    versions = iter([1, 2])

    def compute(keys: list[str]) -> Iterator[tuple[str, dict]]:
        version = next(versions)
        yield from ((key, {"version": version}) for key in keys)

    compute_missing(store, "k", ["a"], compute)
    rows = compute_missing(store, "k", ["a"], compute, usable=lambda row: row["version"] > 1)
    assert rows == {"a": {"version": 2}}


def test_what_another_process_computed_meanwhile_is_not_forgotten(store: Store) -> None:
    store.add_results("k", {"a": {"n": 1}, "b": {"n": 1}})
    judged = store.results("k", ["a", "b"])
    store.forget_results("k", {"a": {"n": 1}})
    store.add_results("k", {"a": {"n": 2}})
    store.forget_results("k", judged)
    assert store.results("k", ["a", "b"]) == {"a": {"n": 2}}


def test_rows_are_forgotten_and_noted_in_one_transaction(store: Store) -> None:
    store.add_results("k", {"a": {"n": 1}, "b": {"n": 1}})
    store.forget_results("k", {"a": {"n": 1}}, note=("noted", {"n": 1}))
    store.forget_results("k", {"b": {"n": 1}}, note=("noted", {"n": 2}))
    assert store.results("k", ["a", "b"]) == {}
    assert store.results("noted", ["noted"]) == {"noted": {"n": 2}}
    store.add_results("k", {"a": {"n": 1}})
    with pytest.raises(TypeError):
        store.forget_results("k", {"a": {"n": 1}}, note=("noted", {"n": object()}))
    assert store.results("k", ["a"]) == {"a": {"n": 1}}


def test_rows_that_another_process_takes_away_meanwhile_are_not_missing(store: Store) -> None:
    store.add_results("k", {"there": {"n": 0}})

    def compute(keys: list[str]) -> Iterator[tuple[str, dict]]:
        yield "a", {"n": 1}
        store.forget_results("k", {"there": {"n": 0}, "a": {"n": 1}})
        yield "b", {"n": 2}

    rows = compute_missing(store, "k", ["there", "a", "b"], compute, save_every=1)
    assert rows == {"there": {"n": 0}, "a": {"n": 1}, "b": {"n": 2}}


def _slow_work(root: Path) -> None:
    def compute(keys: list[str]) -> Iterator[tuple[str, dict]]:
        for key in keys:
            time.sleep(0.01)
            yield key, {"pid": os.getpid()}

    compute_missing(Store(root), "k", [str(n) for n in range(1000)], compute, save_every=4)


def test_killed_work_loses_no_more_than_one_save(tmp_path: Path) -> None:
    keys = [str(n) for n in range(1000)]
    worker = FORK.Process(target=_slow_work, args=(tmp_path,))
    worker.start()
    store = Store(tmp_path)
    deadline = time.monotonic() + 30
    while not (done := store.results("k", keys)) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join()
    done = store.results("k", keys)
    assert done
    assert len(done) % 4 == 0
    again: list[str] = []

    def rest(missing: list[str]) -> Iterator[tuple[str, dict]]:
        again.extend(missing)
        yield from ((key, {}) for key in missing)

    compute_missing(store, "k", keys, rest)
    assert len(again) == 1000 - len(done)


# -- tables --------------------------------------------------------------------------------------

FRAME = pd.DataFrame({"name": ["a", None], "n": [1, 2], "share": [0.5, float("nan")]})


def test_a_table_comes_back_with_its_version(store: Store) -> None:
    assert store.table_version("posters") is None
    version = store.write_table("posters", FRAME)
    assert store.table_version("posters") == version == table_version(FRAME)
    back = store.read_table("posters")
    pd.testing.assert_frame_equal(back, FRAME, check_dtype=False)
    assert table_version(back) == version


def test_older_versions_of_a_table_stay_readable(store: Store) -> None:
    old = store.write_table("posters", FRAME)
    new = store.write_table("posters", FRAME.head(1))
    assert old != new
    assert len(store.read_table("posters", old)) == 2
    assert len(store.read_table("posters")) == 1


def test_a_table_of_no_rows_keeps_its_columns(store: Store) -> None:
    store.write_table("posters", FRAME.head(0))
    assert list(store.read_table("posters").columns) == ["name", "n", "share"]


def test_a_missing_table_names_the_asset_to_materialize(store: Store) -> None:
    with pytest.raises(TableMissing, match="materialize the asset `raw_posters`"):
        store.read_table("raw_posters")
    store.write_table("raw_posters", FRAME)
    with pytest.raises(TableMissing, match="version abc"):
        store.read_table("raw_posters", "abc")


@pytest.mark.parametrize("left", [0, 4, 300, -1])
def test_a_damaged_table_is_told_by_name_and_written_anew(store: Store, left: int) -> None:
    version = store.write_table("posters", FRAME)
    file = store.root / "tables" / "posters" / f"{version}.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    with pytest.raises(TableMissing, match=rf"{version}.parquet: cannot .* asset `posters`"):
        store.read_table("posters")
    assert store.write_table("posters", FRAME) == version
    assert file.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"{}", b"\xff"])
def test_a_table_whose_pointer_is_damaged_counts_as_not_there_and_is_named_anew(
    store: Store, content: bytes
) -> None:
    version = store.write_table("posters", FRAME)
    (store.root / "tables" / "posters" / "current.json").write_bytes(content)
    assert store.table_version("posters") is None
    with pytest.raises(TableMissing, match="materialize the asset `posters`"):
        store.read_table("posters")
    store.write_table("posters", FRAME)
    assert store.table_version("posters") == version


def test_the_version_of_a_table_is_known_by_heart() -> None:
    # Written down, so that a new pandas cannot change the versions of existing tables unseen.
    assert table_version(FRAME).startswith("0e8219333c2479a7")


@pytest.mark.parametrize(
    "other",
    [
        FRAME.rename(columns={"n": "m"}),
        FRAME[["n", "name", "share"]],
        FRAME.iloc[::-1],
        FRAME.assign(n=[1, 3]),
        FRAME.assign(name=["a", ""]),
        FRAME.assign(n=["1", "2"]),
    ],
    ids=["column name", "column order", "row order", "value", "empty text", "type"],
)
def test_the_version_changes_with(other: pd.DataFrame) -> None:
    assert table_version(other) != table_version(FRAME)


@pytest.mark.parametrize(
    "same",
    [
        FRAME.set_axis([7, 8]),
        FRAME.astype({"n": "float64"}),
        FRAME.astype({"n": "Int64", "name": "object"}),
        FRAME.convert_dtypes(),
        FRAME.astype("object"),
    ],
    ids=["index", "float", "nullable", "converted", "objects"],
)
def test_the_version_does_not_depend_on_how_values_are_held(same: pd.DataFrame) -> None:
    assert table_version(same) == table_version(FRAME)


cells = st.one_of(st.none(), st.text(max_size=5))
columns = st.fixed_dictionaries(
    {
        "text": st.lists(cells, min_size=4, max_size=4),
        "whole": st.lists(st.integers(-(2**40), 2**40), min_size=4, max_size=4),
        "real": st.lists(st.floats(allow_infinity=False, width=32), min_size=4, max_size=4),
        "truth": st.lists(st.booleans(), min_size=4, max_size=4),
    }
)


@settings(max_examples=25, deadline=None)
@given(columns)
def test_any_table_has_the_same_version_after_it_was_kept(
    tmp_path_factory: pytest.TempPathFactory, values: dict
) -> None:
    store = Store(tmp_path_factory.mktemp("store"))
    frame = pd.DataFrame(values)
    assert table_version(store.read_table("t", store.write_table("t", frame))) == table_version(
        frame
    )


# -- keys ----------------------------------------------------------------------------------------


def test_keys_do_not_depend_on_the_order_of_names_nor_on_the_kind_of_number() -> None:
    assert content_key({"a": 1, "b": (2, 3)}) == content_key({"b": [2, 3], "a": np.int64(1)})
    assert content_key(Path("a") / "b") == content_key("a/b")
    assert content_key(datetime(2026, 1, 2)) == content_key("2026-01-02T00:00:00")


def test_keys_tell_parts_apart() -> None:
    assert content_key("ab", "c") != content_key("a", "bc")
    assert content_key(1) != content_key("1")
    assert content_key(ImageSettings(fit="pad")) != content_key(ImageSettings(fit="crop"))


def test_a_key_of_something_without_canonical_form_is_refused() -> None:
    with pytest.raises(TypeError, match="object"):
        content_key(object())
