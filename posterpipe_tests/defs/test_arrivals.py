"""The sensor that notices what arrives: real looks, real runs of the assets that read it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import numpy as np
import pytest
from PIL import Image

from posterpipe.core import prompts
from posterpipe.core.captions.people import rehash_sidecars
from posterpipe.core.posters import arrivals, landing
from posterpipe.core.posters.listing import Entry, Folder, open_place
from posterpipe.core.retries import ROOM_PAUSE_SECONDS
from posterpipe.definitions import build_defs
from posterpipe.defs import arrivals as look_module
from posterpipe.defs import retries
from posterpipe.defs.arrivals import REASON_TAG, ROOTS, _Root, reading_problem
from posterpipe.defs.metadata import SOURCE_DIGEST
from posterpipe.defs.resources import Deployment
from posterpipe.settings import load_settings
from posterpipe_tests.defs.harness import RUN_KEY, Daemon

SUITE = """
prompts:
  - id: rocket
    prompt: a rocket
    score_text: a rocket
    seeds: [1]
"""


class Place:
    """A deployment with a landing folder, and a daemon that looks at it."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance, **settings: Any) -> None:
        self.folder = folder / "landing"
        self.suite = folder / "suite.yaml"
        self.captions = folder / "captions.csv"
        self.holdout = folder / "holdout"
        if not self.folder.exists():
            self.folder.mkdir()
            self.write(self.suite, SUITE)
            for name in ("a.png", "b.png", "c.png"):
                self.put(name)
        automation = {"settle_seconds": 10, **settings.pop("automation", {})}
        self.settings = load_settings(
            "starter",
            **{
                "landing": self.folder,
                "prompt_suite": self.suite,
                "captions": self.captions,
                "holdout": self.holdout,
                "store": folder / "store",
                "automation": automation,
                "checks": {"min_posters": 1},
                **settings,
            },
        )
        self.definitions = build_defs(self.settings)
        self.daemon = Daemon(self.definitions, instance)
        self.cursor: str | None = None
        self.said = ""

    def put(self, name: str, *, age: float = 60) -> Path:
        """A poster whose look comes from its name, last changed `age` seconds ago."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        coarse = np.random.default_rng(list(name.encode())).integers(0, 256, (6, 4, 3))
        Image.fromarray(coarse.astype(np.uint8)).resize((80, 120)).save(path)
        return self.written(path, age)

    def write(self, path: Path, text: str, *, age: float = 60) -> Path:
        path.write_text(text, encoding="utf-8")
        return self.written(path, age)

    def written(self, path: Path, age: float) -> Path:
        os.utime(path, (time.time() - age,) * 2)
        return path

    def look(self) -> list[str]:
        """One look of the sensor; the assets that it requested, queued one run each."""
        sensor = self.definitions.resolve_sensor_def("arrivals")
        context = dg.build_sensor_context(
            self.daemon.instance,
            cursor=self.cursor,
            definitions=self.definitions,
            resources={"deployment": Deployment(self.settings)},
        )
        data = sensor.evaluate_tick(context)
        self.cursor = data.cursor
        self.said = data.skip_message or ""
        requested = []
        for request in data.run_requests or []:
            tags = {**request.tags, RUN_KEY: str(request.run_key)}
            if self.daemon.instance.get_runs(dg.RunsFilter(tags={RUN_KEY: tags[RUN_KEY]})):
                continue  # as the daemon does
            names = [key.to_user_string() for key in request.asset_selection or []]
            self.daemon.enqueue(names, tags)
            requested += names
        return requested

    def settle(self) -> list[list[str]]:
        """Looks and work until two looks in a row request nothing; what each look requested."""
        looks: list[list[str]] = []
        for _ in range(12):
            looks.append(self.look())
            self.daemon.work()
            if looks[-2:] == [[], []]:
                return [look for look in looks if look]
        raise AssertionError(f"it does not come to rest: {looks}")

    def names(self) -> list[str]:
        """Posters in the table."""
        made = self.daemon.instance.get_latest_materialization_event(dg.AssetKey("raw_posters"))
        assert made is not None
        assert made.asset_materialization is not None
        shown: Any = made.asset_materialization.metadata["posters"]
        return [record.data["source_name"] for record in shown.records]

    def last_run(self) -> dg.DagsterRun:
        return self.daemon.instance.get_runs(limit=1)[0]


@pytest.fixture
def place(tmp_path: Path, instance: dg.DagsterInstance) -> Place:
    """Everything outside was read."""
    place = Place(tmp_path, instance)
    assert place.look() == []
    assert place.look() == list(ROOTS)
    assert place.daemon.work() == [True] * len(ROOTS)
    assert place.look() == []
    return place


def test_what_was_read_is_not_read_again_and_the_look_says_what_it_saw(place: Place) -> None:
    assert place.look() == []
    assert f"raw_posters: 3 posters in {place.folder}, unchanged since 20" in place.said
    assert "human_captions: 0 sidecars and no captions.csv, unchanged since" in place.said
    assert "prompt_suite: suite.yaml, unchanged since" in place.said
    assert set(json.loads(str(place.cursor))) == set(ROOTS)


def test_a_new_poster_is_read_and_nothing_else(place: Place) -> None:
    place.put("d.png")
    assert place.look() == []
    assert "4 posters" in place.said
    assert "1 new: d.png" in place.said
    assert place.look() == ["raw_posters"]
    assert "1 new: d.png" in place.last_run().tags[REASON_TAG]
    assert place.daemon.work() == [True]
    assert place.names() == ["a.png", "b.png", "c.png", "d.png"]
    assert place.settle() == []


def test_a_poster_that_was_taken_away_is_gone_from_the_table(place: Place) -> None:
    (place.folder / "b.png").unlink()
    assert place.settle() == [["raw_posters"]]
    assert place.names() == ["a.png", "c.png"]


def test_there_and_back_again_is_read_each_time(place: Place, tmp_path: Path) -> None:
    for _ in range(2):
        shutil.move(place.folder / "b.png", tmp_path / "b.png")
        assert place.settle() == [["raw_posters"]]
        shutil.move(tmp_path / "b.png", place.folder / "b.png")
        assert place.settle() == [["raw_posters"]]
        assert place.names() == ["a.png", "b.png", "c.png"]


def test_a_table_that_a_person_wiped_is_read_again_however_often(place: Place) -> None:
    for _ in range(3):
        place.daemon.instance.wipe_assets([dg.AssetKey("prompt_suite")])
        assert place.settle() == [["prompt_suite"]]


def test_captions_request_captions_and_prompts_request_prompts(place: Place) -> None:
    place.write(place.folder / "a.txt", "a red rocket")
    assert place.settle() == [["human_captions"]]
    place.write(place.captions, "file_name,caption\nb.png,a blue cat\n")
    assert place.settle() == [["human_captions"]]
    place.write(place.captions, "file_name,caption\nb.png,a black cat\n")
    assert place.settle() == [["human_captions"]]
    place.write(place.suite, SUITE.replace("a rocket", "a red rocket"))
    assert place.settle() == [["prompt_suite"]]
    # The same words again are no change.
    place.write(place.suite, SUITE.replace("a rocket", "a red rocket"), age=5000)
    assert place.settle() == []
    # A caption is given by name, so with captions a poster concerns both.
    place.put("d.png")
    assert place.settle() == [["raw_posters", "human_captions"]]


def test_held_out_posters_are_looked_for_whether_or_not_there_is_a_folder(place: Place) -> None:
    assert f"no posters in {place.holdout}" in place.said
    held = place.put("held.png")
    place.holdout.mkdir()
    held = held.rename(place.holdout / held.name)
    assert place.settle() == [["holdout_posters"]]
    place.written(held, age=1)
    assert place.look() == []
    assert "waiting for held.png" in place.said
    held.unlink()
    (place.holdout / "README.md").write_text("none any more")
    assert place.settle() == [["holdout_posters"]]
    shutil.rmtree(place.holdout)
    assert place.settle() == []
    place.holdout.write_text("no folder")
    assert place.settle() == []
    assert f"{place.holdout}: this is a file; set POSTERPIPE_HOLDOUT to the folder" in place.said


@pytest.mark.parametrize("missing", [True, False], ids=["missing", "empty"])
def test_held_out_posters_stay_while_nothing_is_mounted_where_they_lie(
    place: Place, tmp_path: Path, missing: bool
) -> None:
    held = place.put("held.png")
    place.holdout.mkdir()
    held.rename(place.holdout / held.name)
    assert place.settle() == [["holdout_posters"]]
    store = Deployment(place.settings).store
    assert len(store.read_table("holdout_posters")) == 1
    place.holdout.rename(tmp_path / "unmounted")
    if not missing:
        place.holdout.mkdir()
    assert place.settle() == []
    assert f"no posters in {place.holdout}, which held 1 poster before" in place.said
    assert "POSTERPIPE_HOLDOUT" in place.said
    # Nor when somebody asks for the asset.
    assert not place.daemon.run("holdout_posters")
    assert len(store.read_table("holdout_posters")) == 1
    # What the message says works.
    place.holdout.mkdir(exist_ok=True)
    (place.holdout / "README.md").write_text("none any more")
    assert place.settle() == [["holdout_posters"]]
    assert store.read_table("holdout_posters").empty
    shutil.rmtree(place.holdout)
    (tmp_path / "unmounted").rename(place.holdout)
    assert place.settle() == [["holdout_posters"]]
    assert len(store.read_table("holdout_posters")) == 1


def test_a_file_that_is_being_written_is_waited_for_by_name(place: Place) -> None:
    place.put("ready.png")
    place.put("growing.png", age=1)
    for _ in range(3):
        assert place.look() == []
        assert "waiting for growing.png" in place.said
        assert "2 new: growing.png, ready.png" in place.said
    place.put("growing.png")
    assert place.look() == []  # this look shows something else than the one before
    assert place.look() == ["raw_posters"]


def test_a_file_that_never_rests_holds_up_the_others_for_a_while_only(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    place = Place(tmp_path, instance, automation={"patience_seconds": 0})
    place.put("growing.png", age=1)
    assert "raw_posters" in place.look()
    place.daemon.work()
    assert "growing.png" in place.names()


def test_nothing_is_requested_twice_while_a_run_waits(place: Place) -> None:
    place.put("d.png")
    place.look()
    assert place.look() == ["raw_posters"]
    place.put("e.png")
    for _ in range(3):
        assert place.look() == []
    assert "a run for it is under way" in place.said
    # The run began to wait before the last poster came, and reads it.
    assert place.daemon.work() == [True]
    assert place.settle() == []
    assert place.names() == ["a.png", "b.png", "c.png", "d.png", "e.png"]


def test_a_full_disk_is_waited_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    later = 0.0
    now = retries.now
    monkeypatch.setattr(retries, "now", lambda: now() + later)
    place.put("d.png")
    with monkeypatch.context() as full:
        full.setattr("posterpipe.core.store.write_atomic", no_room)
        assert place.settle() == [["raw_posters"]]
    assert "the disk was full; it is tried again after" in place.said
    later = ROOM_PAUSE_SECONDS
    assert place.settle() == [["raw_posters"]]
    assert "d.png" in place.names()


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_run_is_tried_once_more_and_again_after_a_change(place: Place) -> None:
    place.write(place.suite, "prompts: 5")
    assert place.settle() == [["prompt_suite"], ["prompt_suite"]]
    assert "it failed 2 times (runs" in place.said
    place.write(place.suite, SUITE.replace("a rocket", "two rockets"))
    assert place.settle() == [["prompt_suite"]]
    assert "it failed" not in place.said


def test_a_canceled_run_is_not_started_again_until_something_changes(place: Place) -> None:
    place.put("d.png")
    place.look()
    place.look()
    place.daemon.cancel(place.daemon.queue[0])
    assert place.settle() == []
    assert "its run was canceled" in place.said
    place.put("e.png")
    assert place.settle() == [["raw_posters"]]


@pytest.mark.parametrize("missing", [True, False], ids=["missing", "empty"])
def test_an_empty_or_missing_folder_requests_nothing_and_says_why(
    place: Place, missing: bool
) -> None:
    if missing:
        shutil.rmtree(place.folder)
    else:
        for path in place.folder.iterdir():
            path.unlink()
    assert place.settle() == []
    assert str(place.folder) in place.said
    assert "POSTERPIPE_LANDING" in place.said
    place.folder.mkdir(exist_ok=True)
    place.put("d.png")
    assert place.settle() == [["raw_posters"]]
    assert place.names() == ["d.png"]


def test_captions_stay_while_nothing_is_mounted_where_the_posters_lie(
    place: Place, tmp_path: Path
) -> None:
    place.write(place.folder / "a.txt", "a red rocket")
    assert place.settle() == [["human_captions"]]
    captions = Deployment(place.settings).store.read_table("human_captions")
    assert captions["caption"].tolist() == ["a red rocket"]
    place.folder.rename(tmp_path / "unmounted")
    place.folder.mkdir()
    assert place.settle() == []
    assert f"human_captions: no posters in {place.folder}" in place.said
    # Nor when somebody asks for the asset.
    assert not place.daemon.run("human_captions")
    assert Deployment(place.settings).store.read_table("human_captions").equals(captions)
    place.folder.rmdir()
    (tmp_path / "unmounted").rename(place.folder)
    assert place.settle() == []


def test_a_missing_prompt_suite_holds_up_nothing_else(place: Place) -> None:
    place.suite.unlink()
    place.put("d.png")
    assert place.settle() == [["raw_posters"]]
    assert "suite.yaml is not there" in place.said


def test_a_change_that_a_person_materialized_is_not_requested(place: Place) -> None:
    place.put("d.png")
    assert place.daemon.run("raw_posters")
    assert place.settle() == []


def test_what_was_taken_back_while_the_run_waited_is_read_when_it_comes_again(
    place: Place, tmp_path: Path
) -> None:
    """The run was requested for d.png and did not find it: that is not read, whatever its run is
    tagged with."""
    new = place.put("d.png")
    place.look()
    assert place.look() == ["raw_posters"]
    shutil.move(new, tmp_path / "d.png")
    assert place.daemon.work() == [True]
    assert place.names() == ["a.png", "b.png", "c.png"]
    shutil.move(tmp_path / "d.png", new)
    assert place.settle() == [["raw_posters"]]
    assert place.names() == ["a.png", "b.png", "c.png", "d.png"]


def test_words_that_were_changed_for_a_while_only_are_those_in_the_table(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the run waits, and while its step reads: what counts as read is what was read."""
    store = Deployment(place.settings).store
    good = "file_name,caption\na.png,first words\n"
    place.write(place.captions, good)
    place.look()
    assert place.look() == ["human_captions"]
    place.write(place.captions, good.replace("first words", "a typo"))
    assert place.daemon.work() == [True]
    place.write(place.captions, good)
    assert place.settle() == [["human_captions"]]
    assert store.read_table("human_captions")["caption"].tolist() == ["first words"]

    digest = arrivals.captions_digest
    written: list[Path] = []

    def a_typo_follows(*listed: Any, **more: Any) -> str:
        found = digest(*listed, **more)
        if not written:
            written.append(place.write(place.captions, good.replace("first", "frist")))
        return found

    monkeypatch.setattr(arrivals, "captions_digest", a_typo_follows)
    assert place.daemon.run("human_captions")
    assert written
    monkeypatch.undo()
    place.write(place.captions, good)
    place.settle()
    assert store.read_table("human_captions")["caption"].tolist() == ["first words"]


def test_prompts_and_held_out_posters_that_change_while_they_are_read_are_read_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Deployment(place.settings).store
    load, scan = prompts.load_suite, landing.scan
    held = place.put("held.png")
    place.holdout.mkdir()
    held = held.rename(place.holdout / held.name)
    place.settle()
    stats = held.stat()

    def another_suite(*arguments: Any, **more: Any) -> Any:
        place.write(place.suite, SUITE.replace("a rocket", "a cat"))
        return load(*arguments, **more)

    def another_folder(*arguments: Any, **more: Any) -> Any:
        place.put("more.png").rename(place.holdout / "more.png")
        return scan(*arguments, **more)

    monkeypatch.setattr(prompts, "load_suite", another_suite)
    monkeypatch.setattr(landing, "scan", another_folder)
    assert place.daemon.run("prompt_suite")
    assert place.daemon.run("holdout_posters")
    monkeypatch.undo()
    place.write(place.suite, SUITE)
    (place.holdout / "more.png").unlink()
    assert held.stat().st_ino == stats.st_ino
    place.settle()
    assert store.read_table("prompt_suite")["prompt"].tolist() == ["a rocket"]
    assert store.read_table("holdout_posters")["source_name"].tolist() == ["held.png"]


def test_what_cannot_be_looked_at_for_an_unforeseen_reason_hides_nothing_else(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.put("d.png")
    place.write(place.suite, SUITE.replace("a rocket", "a red rocket"))

    def broken(*_: Any) -> None:
        raise RecursionError("maximum recursion depth exceeded")

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "entries", broken)
        assert place.settle() == [["prompt_suite"]]
        assert "raw_posters: could not be looked at (RecursionError" in place.said
        assert "prompt_suite: suite.yaml, unchanged" in place.said
    assert place.settle() == [["raw_posters"]]


def test_a_place_that_does_not_answer_hides_nothing_else(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a bucket, or a folder of the network."""
    place.put("d.png")
    place.write(place.suite, SUITE.replace("a rocket", "a red rocket"))
    answer = threading.Event()
    told = Folder.entries

    def silent(folder: Folder) -> list[Entry]:
        if folder.path == place.folder:
            answer.wait(60)
        return told(folder)

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "entries", silent)
        patched.setattr(look_module, "ANSWER_SECONDS", 0.1)
        assert place.settle() == [["prompt_suite"]]
        for name in ("raw_posters", "human_captions"):
            assert f"{name}: {place.folder}: did not answer within 0.1 s" in place.said
        assert "did not answer" in reading_problem(Deployment(place.settings))
        answer.set()
    assert place.settle() == [["raw_posters"]]


def test_a_step_that_sees_other_inodes_is_not_requested_for_ever(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = landing.landing_digest

    def elsewhere(*listed: Any, portable: bool = False) -> str:
        return seen(*listed, portable=True) if portable else "as another host sees it"

    monkeypatch.setattr(landing, "landing_digest", elsewhere)
    place.put("d.png")
    assert place.settle() == [["raw_posters"]]
    made = place.daemon.instance.get_latest_materialization_event(dg.AssetKey("raw_posters"))
    assert made is not None
    assert made.asset_materialization is not None
    recorded = made.asset_materialization.metadata[SOURCE_DIGEST].value
    assert recorded == "as another host sees it"
    place.put("e.png")
    assert place.settle() == [["raw_posters"]]


@pytest.mark.slow
def test_runs_that_never_see_what_the_look_sees_are_requested_ever_more_seldom(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where they have other rights in a folder, or a mount with other dates."""
    seen = landing.landing_digest

    def elsewhere(*listed: Any, portable: bool = False) -> str:
        return f"{seen(*listed, portable=portable)} with other rights"

    monkeypatch.setattr(landing, "landing_digest", elsewhere)
    ahead, hour = 0.0, 3600.0
    monkeypatch.setattr(look_module, "time", SimpleNamespace(time=lambda: time.time() + ahead))
    place.put("d.png")
    assert place.settle() == [["raw_posters"], ["raw_posters"]]
    assert "2 runs saw something else there than this look" in place.said
    ahead += hour - 60
    assert place.settle() == []
    ahead += 61
    assert place.look() == ["raw_posters"]
    assert place.daemon.work() == [True]
    ahead = 0.0  # what is made has the date of the real clock
    # A change is read at once.
    place.put("e.png")
    assert place.settle() == [["raw_posters"], ["raw_posters"]]
    assert "e.png" in place.names()
    # And all is as it was when both see the same.
    monkeypatch.setattr(landing, "landing_digest", seen)
    place.put("f.png")
    assert place.settle() == [["raw_posters"]]


def test_what_a_rehash_found_is_read(place: Place) -> None:
    path = place.folder / "a.png"
    stats = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(stats.st_atime_ns, stats.st_mtime_ns))
    assert place.settle() == []
    landing.rehash(open_place(place.folder), landing.Store(place.settings.store))
    # The holdout posters as well: one record tells of both folders what was read when.
    assert place.settle() == [["raw_posters", "holdout_posters"]]


def test_a_caption_that_changed_behind_its_date_is_read_after_a_rehash(place: Place) -> None:
    path = place.write(place.folder / "a.txt", "a red rocket")
    assert place.settle() == [["human_captions"]]
    stats = path.stat()
    path.write_text("a tin rocket")
    os.utime(path, ns=(stats.st_atime_ns, stats.st_mtime_ns))
    assert place.settle() == []
    store = Deployment(place.settings).store
    found = rehash_sidecars(open_place(place.folder), store)
    assert (found.same, found.changed) == (0, ["a.txt"])
    assert place.settle() == [["human_captions"]]
    assert store.read_table("human_captions")["caption"].tolist() == ["a tin rocket"]
    assert rehash_sidecars(open_place(place.folder), store).same == 1
    assert place.settle() == []


def test_how_long_a_file_could_not_be_read_is_counted_from_the_first_time(place: Place) -> None:
    (place.folder / "gone.png").symlink_to(place.folder / "nowhere.png")
    os.utime(place.folder / "gone.png", (1, 1), follow_symlinks=False)
    (place.folder / "link").symlink_to(place.folder)  # which no other look would enter
    assert place.settle() == [["raw_posters"]]
    first = _Root("raw_posters", place.daemon.instance).last_read()
    assert (first.unread, first.unread_since) == (1, first.at)
    assert place.daemon.run("raw_posters")
    second = _Root("raw_posters", place.daemon.instance).last_read()
    assert (second.at > first.at, second.unread_since) == (True, first.at)
    place.put("d.png")
    assert place.settle() == [["raw_posters"]]
    third = _Root("raw_posters", place.daemon.instance).last_read()
    assert (third.unread, third.unread_since) == (1, third.at)


def test_a_damaged_cursor_only_delays(place: Place) -> None:
    for cursor in ("not json", "[1]", '{"raw_posters": 5}', '{"raw_posters": {"other": 1}}'):
        place.put(f"{len(cursor)}.png")
        place.cursor = cursor
        assert place.settle() == [["raw_posters"]]


@pytest.fixture
def bucket() -> Iterator[str]:
    import fsspec

    files = fsspec.filesystem("memory")
    files.mkdir("/arrivals")
    yield "memory://arrivals"
    files.rm("/arrivals", recursive=True)


def test_posters_arrive_in_a_bucket_too(
    tmp_path: Path, instance: dg.DagsterInstance, bucket: str
) -> None:
    import fsspec

    place = Place(tmp_path, instance, landing=bucket)
    assert place.look() == []
    assert "no posters in memory://arrivals" in place.said
    for name in ("a.png", "b.png"):
        fsspec.filesystem("memory").pipe(f"/arrivals/{name}", (place.folder / name).read_bytes())
    requested = place.settle()
    assert [name for look in requested for name in look].count("raw_posters") == 1
    assert place.names() == ["a.png", "b.png"]
    fsspec.filesystem("memory").rm("/arrivals/a.png")
    assert place.settle() == [["raw_posters"]]
    assert place.names() == ["b.png"]


def test_a_bucket_that_cannot_be_opened_is_a_problem_told_without_its_password(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    place = Place(tmp_path, instance, landing="ftp://ida:secret@127.0.0.1:9/posters")  # discard
    assert place.look() == []
    assert "ftp://ida@127.0.0.1:9/posters: cannot be opened (Conn" in place.said
    assert "secret" not in place.said
