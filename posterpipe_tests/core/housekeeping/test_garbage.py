"""Garbage: what nobody needs goes, and nothing that anybody needs does, whatever else happens."""

from __future__ import annotations

import datetime as dt
import json
import multiprocessing
import os
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from posterpipe.cli import app
from posterpipe.core.champion.decisions import GATE, write_decisions
from posterpipe.core.champion.evidence import held_out
from posterpipe.core.housekeeping.garbage import (
    CACHE_SECONDS,
    Garbage,
    Item,
    champions,
    find_garbage,
    remove_garbage,
)
from posterpipe.core.posters.arrivals import holdout_entries
from posterpipe.core.posters.landing import scan_holdout
from posterpipe.core.posters.listing import HOLDOUT, Folder
from posterpipe.core.progress import NoProgress
from posterpipe.core.provenance.checkpoints import CHECKPOINT
from posterpipe.core.provenance.lineages import TRAINING_SET, lineage_path
from posterpipe.core.provenance.records import TABLE
from posterpipe.core.store import Store, StoreError, compute_missing
from posterpipe.core.training.holdout_set import build_holdout_set
from posterpipe.core.warehouse.database import Warehouse
from posterpipe_tests.core.tiny_blip import build_tiny_blip

SPAWN = multiprocessing.get_context("spawn")
LONG_AGO = 1_000_000.0
HOUR = 3600.0


def age(root: Path, when: float = LONG_AGO) -> None:
    """Everything was used last a long time ago."""
    for path in sorted(root.rglob("*"), reverse=True):
        if path.suffix != ".lease":
            with suppress(FileNotFoundError):
                os.utime(path, (when, when))
    if (root / "index.sqlite").exists():
        with closing(sqlite3.connect(root / "index.sqlite", timeout=60)) as index, index:
            index.execute("UPDATE results SET used_at = ?", [int(when)])


def names(garbage: Garbage, kind: str) -> set[str]:
    return {item.name for item in garbage.of(kind)}


def table_of(*blobs: str) -> pd.DataFrame:
    return pd.DataFrame({"image": list(blobs)})


def images(store: Store, *contents: str) -> list[str]:
    return [store.put(content.encode(), ".png") for content in contents]


# -- what is garbage -----------------------------------------------------------------------------


def test_an_empty_store_holds_no_garbage(store: Store) -> None:
    garbage = find_garbage(store, grace_seconds=0)
    assert garbage.items == []
    assert garbage.busy_since is None


def test_blobs_that_no_kept_table_names_go(store: Store) -> None:
    named, unnamed = images(store, "named", "unnamed")
    store.write_table("t", table_of(named))
    age(store.root)
    garbage = find_garbage(store)
    assert garbage.items == [
        Item("blobs", f"{unnamed}.png", len("unnamed"), store.path(unnamed, ".png"))
    ]
    assert store.path(unnamed, ".png").exists()  # finding is not removing
    assert remove_garbage(store, garbage).removed == garbage.items
    assert store.path(named, ".png").exists()
    assert not store.path(unnamed, ".png").exists()


def test_a_name_counts_wherever_it_stands_in_a_table(store: Store) -> None:
    a, b, c, d = images(store, "a", "b", "c", "d")
    store.write_table("path", pd.DataFrame({"image_path": [f"blobs/{a[:2]}/{a}.png"]}))
    store.write_table("json", pd.DataFrame({"drawn": [json.dumps({"titled": [b]})], "n": [1]}))
    store.write_table("list", pd.DataFrame({"images": [[c], []]}))
    age(store.root)
    assert names(find_garbage(store), "blobs") == {f"{d}.png"}


def test_what_was_used_within_the_grace_time_stays(store: Store) -> None:
    (blob,) = images(store, "unnamed")
    age(store.root, time.time() - 3 * HOUR)
    assert find_garbage(store, grace_seconds=4 * HOUR).items == []
    assert len(find_garbage(store, grace_seconds=2 * HOUR).items) == 1
    assert store.has(blob, ".png")
    assert find_garbage(store, grace_seconds=2 * HOUR).items == []


def test_the_last_versions_of_a_table_stay_with_all_they_name(store: Store) -> None:
    blobs = images(store, "1", "2", "3", "4")
    versions = []
    for number, blob in enumerate(blobs):
        versions.append(store.write_table("t", table_of(blob)))
        age(store.root, LONG_AGO + number)
    garbage = find_garbage(store, keep_versions=2)
    assert names(garbage, "tables") == {f"t/{version}" for version in versions[:2]}
    assert names(garbage, "blobs") == {f"{blob}.png" for blob in blobs[:2]}
    remove_garbage(store, garbage)
    # Going back one step finds everything as it was.
    assert store.read_table("t", versions[2])["image"].tolist() == [blobs[2]]
    assert store.path(blobs[2], ".png").exists()


def test_the_current_version_stays_however_old_its_file(store: Store) -> None:
    old, new = images(store, "old", "new")
    first = store.write_table("t", table_of(old))
    age(store.root, LONG_AGO)
    second = store.write_table("t", table_of(new))
    store.write_table("t", table_of(old))
    age(store.root, LONG_AGO)
    os.utime(store.root / "tables" / "t" / f"{second}.parquet", (LONG_AGO + 9, LONG_AGO + 9))
    garbage = find_garbage(store, keep_versions=1)
    assert names(garbage, "tables") == {f"t/{second}"}
    remove_garbage(store, garbage)
    assert store.table_version("t") == first
    assert store.has(old, ".png") and not store.has(new, ".png")


def test_nothing_goes_by_a_damaged_table_or_pointer(store: Store) -> None:
    old, new = images(store, "old", "new")
    folder = store.root / "tables" / "t"
    for blob in (new, old):
        version = store.write_table("t", table_of(blob))
    (folder / "current.json").write_bytes(b"")
    age(store.root)
    assert not find_garbage(store, keep_versions=1).items
    (folder / f"{version}.parquet").write_bytes(b"PAR1")
    age(store.root)
    with pytest.raises(StoreError, match=rf"{version}.parquet: .* materialize the asset `t`"):
        find_garbage(store, keep_versions=1)


def test_rows_go_with_the_blob_that_they_name(store: Store) -> None:
    kept, gone = images(store, "kept", "gone")
    store.write_table("t", table_of(kept))
    store.add_results(
        "resized",
        {"k1": {"image": kept}, "k2": {"image": gone}, "k3": {"image": "", "status": "failed"}},
    )
    store.add_results("landing_file", {"k4": {"poster_id": gone}})
    store.add_results("embedding.clip", {kept: {"vector": "…"}, gone: {"vector": "…"}})
    store.add_results("landing_rehashed", {"k5": {"digest": "0" * 64}})
    age(store.root)
    garbage = find_garbage(store)
    assert names(garbage, "results") == {
        "resized k2",
        "landing_file k4",
        f"embedding.clip {gone}",
    }
    remove_garbage(store, garbage)
    left = {(kind, key) for kind, key, _, _ in store.all_results()}
    assert left == {
        ("resized", "k1"),
        ("resized", "k3"),
        ("embedding.clip", kept),
        ("landing_rehashed", "k5"),
    }


def training_set(store: Store, version: str, *blobs: str) -> Path:
    folder = store.folder("training_sets", version)
    (folder / "train").mkdir()
    for blob in blobs:
        os.link(store.path(blob, ".png"), folder / "train" / f"{blob[:16]}.png")
    (folder / "training.csv").write_text("file_name,caption\n")
    return folder


def checkpoint(store: Store, name: str, trained_on: str) -> Path:
    folder = store.folder("checkpoints", name)
    (folder / "posterpipe.json").write_text(json.dumps({"checkpoint_id": name}))
    store.add_results(CHECKPOINT, {name: {"training_set": trained_on}})
    return folder


def training(store: Store, name: str, trains_on: str) -> Path:
    folder = store.folder("training", name)
    (folder / "run.toml").write_text(f'width = 8\n\n[versions]\ntraining_set = "{trains_on}"\n')
    (folder / "saves" / name / "step-00000002").mkdir(parents=True)
    (folder / "saves" / name / "step-00000002" / "unet.safetensors").write_bytes(b"weights")
    return folder


def test_nothing_goes_that_is_made_of_the_held_out_posters_of_now(
    store: Store, tmp_path: Path
) -> None:
    # It imports torch, which the other processes of these tests can do without.
    from posterpipe_tests.core.training.test_holdout_set import settings_for as holdout_settings

    (tmp_path / "holdout").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (120, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "holdout" / f"{number}.png")
    build_tiny_blip(tmp_path / "captioner")
    settings = holdout_settings(tmp_path)
    posters = scan_holdout(
        Folder(tmp_path / "holdout", HOLDOUT),
        settings.images,
        store,
        entries=holdout_entries(tmp_path / "holdout"),
    )
    store.write_table("holdout_posters", posters)
    made = build_holdout_set(store, posters, settings, NoProgress())
    blobs = list(held_out(store, posters, settings, NoProgress()).files)
    store.add_results("embedding", {blob: {"image": blob, "vector": [1]} for blob in blobs})
    age(store.root)
    garbage = find_garbage(store)
    assert garbage.of("blobs") == garbage.of("training sets") == []
    assert {item.name.split()[0] for item in garbage.of("results")} <= {"table"}
    remove_garbage(store, garbage)
    ticks = Counting()
    assert build_holdout_set(store, posters, settings, ticks) == made
    assert ticks.done == 0
    # Of posters that are not held out any more it goes like everything else.
    for number in range(4):
        age(store.root, LONG_AGO + number)
        fewer = posters.head(2).assign(reason=f"{number}")
        store.write_table("holdout_posters", fewer)
        build_holdout_set(store, fewer.head(1 + number % 2), settings, NoProgress())
    age(store.root)
    assert len(find_garbage(store, keep_versions=1).of("blobs")) == 2


class Counting(NoProgress):
    """Counts what is done."""

    done = 0

    @contextmanager
    def task(
        self, description: str, total: int, unit: str = "items", *, already: int = 0
    ) -> Iterator[Callable[..., None]]:
        def tick(n: int = 1, **numbers: Any) -> None:
            self.done += n

        yield tick


def test_training_sets_checkpoints_and_trainings_go_by_the_tables(store: Store) -> None:
    now, before, resumed, trained = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
    for version in (now, before, resumed, trained):
        training_set(store, version)
        path = lineage_path(store, version)
        path.parent.mkdir(exist_ok=True)
        pd.DataFrame({"image": []}).to_parquet(path)
        store.add_results(TRAINING_SET, {version: {"images": 1}})
    checkpoint(store, "1" * 16, now)
    checkpoint(store, "2" * 16, trained)
    unfinished = training(store, "3" * 16, now)
    finished = training(store, "1" * 16, now)
    abandoned = training(store, "4" * 16, before)
    running = training(store, "5" * 16, resumed)
    store.write_table("training_csv", pd.DataFrame({"training_set": [now]}))
    version = store.write_table("dreambooth_checkpoint", pd.DataFrame({"id": ["1" * 16]}))
    store.add_results(TABLE, {f"dreambooth_checkpoint/{version}": {}, f"t/{'e' * 64}": {}})
    age(store.root)
    save = running / "saves" / running.name / "step-00000002" / "unet.safetensors"
    os.utime(save)  # started by hand, and saved a moment ago

    garbage = find_garbage(store)
    assert {item.path for item in garbage.of("trainings")} == {finished, abandoned}
    assert names(garbage, "training sets") == {before, trained}
    assert names(garbage, "checkpoints") == {"2" * 16}
    # Scores may tell of what was trained, for ever; of the others nobody will ask.
    assert names(garbage, "lineages") == {f"{before}.parquet"}
    assert names(garbage, "results") == {f"training_set {before}", f"table t/{'e' * 64}"}

    remove_garbage(store, garbage)
    assert unfinished.is_dir() and save.exists()
    assert not abandoned.exists() and not finished.exists()
    assert sorted(path.name for path in (store.root / "training_sets").iterdir()) == [now, resumed]
    assert find_garbage(store).items == []


def test_posters_that_a_kept_checkpoint_was_trained_on_stay(store: Store) -> None:
    kept, gone, other = images(store, "kept", "gone", "other")
    for name, trained_on, image in (("1" * 16, "a" * 64, kept), ("2" * 16, "b" * 64, gone)):
        checkpoint(store, name, trained_on)
        path = lineage_path(store, trained_on)
        path.parent.mkdir(exist_ok=True)
        pd.DataFrame({"image": [image]}).to_parquet(path)
    store.write_table("tuned_generations", pd.DataFrame({"checkpoint_id": ["1" * 16]}))
    age(store.root)
    assert names(find_garbage(store), "blobs") == {f"{gone}.png", f"{other}.png"}
    # One that can be gone back to, as champions of before, counts as well.
    assert names(find_garbage(store, needed=["2" * 16]), "blobs") == {f"{other}.png"}


def test_an_unfinished_training_keeps_every_set_of_images_that_it_names(store: Store) -> None:
    now, holdout = "a" * 64, "b" * 64
    training_set(store, now)
    training_set(store, holdout)
    work = training(store, "1" * 16, now)
    with open(work / "run.toml", "a") as config:
        config.write(f'holdout_set = "{holdout}"\n')
    store.write_table("training_csv", pd.DataFrame({"training_set": [now]}))
    age(store.root)
    assert find_garbage(store).items == []
    checkpoint(store, "1" * 16, now)
    age(store.root)
    assert names(find_garbage(store), "training sets") == {holdout}


def test_what_was_champion_lately_can_be_gone_back_to(store: Store) -> None:
    warehouse = Warehouse(store.root / "warehouse.duckdb")
    assert champions(warehouse, 3) == set()
    names_of = [str(n) * 16 for n in range(1, 6)]
    for name in names_of:
        checkpoint(store, name, "a" * 64)
    rows = [
        (1, names_of[0], "promote", GATE, "{}"),
        (2, names_of[1], "promote", GATE, "{}"),
        (3, names_of[2], "promote", GATE, "{}"),
        (4, names_of[3], "reject", GATE, "{}"),
        (5, names_of[0], "promote", "a person", '{"pinned": true}'),
        (6, names_of[4], "promote", GATE, "{}"),
    ]
    decided = pd.DataFrame(
        rows, columns=["day", "checkpoint_id", "decision", "decided_by", "numbers"]
    )
    decided = decided.assign(
        decision_id=decided["day"].astype(str),
        decided_at=[dt.datetime(2026, 1, day) for day in decided["day"]],
        champion_before="",
        reason="why",
        run_id="run",
    )
    write_decisions(warehouse, lambda *_: decided.drop(columns="day"))
    # The pinned one, which was promoted again by that, and the last of the gate.
    assert champions(warehouse, 1) == {names_of[0], names_of[4]}
    assert champions(warehouse, 3) == {names_of[0], names_of[2], names_of[4]}
    age(store.root)
    garbage = find_garbage(store, needed=champions(warehouse, 3))
    assert names(garbage, "checkpoints") == {names_of[1], names_of[3]}
    # Another base model's champions push none of these out.
    others = decided.drop(columns="day").assign(base_model="other base")
    others["decision_id"] += " other"
    others["checkpoint_id"] = "other " + others["checkpoint_id"]
    write_decisions(warehouse, lambda *_: others)
    kept = champions(warehouse, 1)
    assert kept >= {names_of[0], names_of[4], f"other {names_of[4]}"}
    warehouse.path.unlink()
    assert champions(warehouse, 1) == kept


def test_cached_tensors_go_when_no_training_reads_them_any_more(store: Store) -> None:
    folder = store.folder("training", "cache", "latents")
    old, read = folder / "old.safetensors", folder / "read.safetensors"
    for path in (old, read):
        path.write_bytes(b"tensor")
    age(store.root, time.time() - CACHE_SECONDS - HOUR)
    os.utime(read, (time.time() - 20 * 24 * HOUR,) * 2)
    assert {item.path for item in find_garbage(store).items} == {old}


def test_sizes_are_what_the_disk_gives_back(store: Store) -> None:
    kept, gone = images(store, "x" * 1000, "y" * 500)
    training_set(store, "a" * 64, kept, gone)
    store.write_table("t", table_of(kept))
    age(store.root)
    garbage = find_garbage(store)
    # The kept blob's other link frees nothing; the two links of the other one free it once.
    assert garbage.size == 500 + len("file_name,caption\n")


def test_leftovers_of_killed_processes_go_and_those_at_work_stay(store: Store) -> None:
    (blob,) = images(store, "blob")
    store.write_table("t", table_of(blob))
    dead = [
        store.root / "blobs" / blob[:2] / f".{blob}.png.0123.tmp",
        store.root / "tables" / "t" / ".current.json.0123.tmp",
        store.folder("training_sets", ".abc.0123.tmp"),
        store.folder("training", "1" * 16, "saves", "1" * 16, ".step-00000002.77.tmp"),
    ]
    for path in dead[:2]:
        path.write_bytes(b"half")
    (dead[2] / "train").mkdir()
    writing = store.folder("checkpoints", ".feed.99.tmp")
    (writing / "unet").mkdir()
    age(store.root)
    (writing / "unet" / "model.safetensors").write_bytes(b"more comes")
    os.utime(writing / "unet", (LONG_AGO, LONG_AGO))
    os.utime(writing, (LONG_AGO, LONG_AGO))
    garbage = find_garbage(store)
    assert {item.path for item in garbage.of("leftovers")} == set(dead)
    remove_garbage(store, garbage)
    assert not any(path.exists() for path in dead)
    assert (writing / "unet" / "model.safetensors").exists()


def test_what_has_another_form_than_ours_is_left_alone(store: Store) -> None:
    foreign = [
        store.folder("checkpoints", "my own model"),
        store.folder("training_sets", "by hand"),
        store.folder("training", "notes"),
        store.folder("starter_training", "saves"),
        store.folder("blobs", "ab") / "readme.txt",
        store.folder("public") / "scores.duckdb",
        store.root / "warehouse.duckdb",
    ]
    for path in foreign[4:]:
        path.write_text("")
    age(store.root)
    assert find_garbage(store, grace_seconds=0).items == []


@pytest.mark.parametrize("wrong", [{"keep_versions": 0}, {"grace_seconds": -1.0}])
def test_nonsense_is_refused(store: Store, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        find_garbage(store, **wrong)  # type: ignore[arg-type]


# -- while others work ---------------------------------------------------------------------------


def test_what_a_running_step_has_used_stays_however_long_it_works(store: Store) -> None:
    used, unused = images(store, "used", "unused")
    store.add_results("k", {"used": {"image": used}, "unused": {"image": unused}})
    age(store.root)
    with store.lease():
        (lease,) = (store.root / "leases").iterdir()
        begun = time.time() - 50 * HOUR
        os.utime(lease, (begun, begun))
        # Used soon after it began, and named by nothing yet.
        os.utime(store.path(used, ".png"), (begun + 5, begun + 5))
        store.results("k", ["used"])
        garbage = find_garbage(store, grace_seconds=HOUR)
        assert garbage.busy_since == pytest.approx(begun, abs=1)
        assert names(garbage, "blobs") == {f"{unused}.png"}
        assert names(garbage, "results") == {"k unused"}
    garbage = find_garbage(store, grace_seconds=HOUR)
    assert garbage.busy_since is None
    assert names(garbage, "blobs") == {f"{unused}.png", f"{used}.png"}


def test_a_table_that_a_step_reads_keeps_what_it_names_when_it_is_replaced(store: Store) -> None:
    old, new = images(store, "old", "new")
    first = store.write_table("t", table_of(old))
    age(store.root)
    with store.lease():
        version = store.table_version("t")
        # Another run replaces it, before this one has opened the file.
        store.write_table("t", table_of(new))
        remove_garbage(store, find_garbage(store, keep_versions=1, grace_seconds=0))
        assert version == first
        assert store.read_table("t", version)["image"].tolist() == [old]
        assert store.path(old, ".png").exists()


def test_what_is_used_between_finding_and_removing_stays(store: Store) -> None:
    a, b = images(store, "a", "b")
    store.add_results("k", {"a": {"image": a}, "b": {"image": b}})
    folder = training_set(store, "a" * 64)
    age(store.root)
    garbage = find_garbage(store, grace_seconds=0)
    assert len(garbage.items) == 5
    assert store.has(a, ".png")
    assert store.results("k", ["a"])
    assert store.keep(folder)
    removal = remove_garbage(store, garbage)
    assert {item.name for item in removal.in_use} == {f"{a}.png", "k a", "a" * 64}
    assert {item.name for item in removal.removed} == {f"{b}.png", "k b"}
    assert store.path(a, ".png").exists() and folder.exists()


def test_while_something_is_removed_nobody_can_mark_anything_as_used(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    images(store, "one", "another")
    (store.root / "training_sets" / (64 * "a")).mkdir(parents=True)
    age(store.root)
    garbage = find_garbage(store)
    wanted = {item.path for item in garbage.items}
    removed: set[Path] = set()

    def alone(remove: Any) -> Any:
        def removes(path: Any, *arguments: Any, **options: Any) -> None:
            if path in wanted:
                with open(store.root / "garbage.lock") as lock, pytest.raises(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                removed.add(path)
            remove(path, *arguments, **options)

        return removes

    for name in ("unlink", "rename"):
        monkeypatch.setattr(os, name, alone(getattr(os, name)))
    assert len(remove_garbage(store, garbage).removed) == len(removed) == 3 and removed == wanted


def test_what_cannot_be_removed_is_named_and_the_rest_goes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = images(store, "a", "b")
    age(store.root)
    unlink = Path.unlink

    def stubborn(path: Path, missing_ok: bool = False) -> None:
        if path.stem == a:
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", stubborn)
    removal = remove_garbage(store, find_garbage(store, grace_seconds=0))
    assert [item.name for item in removal.removed] == [f"{b}.png"]
    (problem,) = removal.problems
    assert a in problem and "Permission denied" in problem and "writable" in problem


ITEMS, ROUNDS = 12, 40


def _go_to_and_fro(root: Path, meeting: Barrier | None) -> None:
    """A pipeline whose input changes A, B, A, ... with a long pause between two runs; each run
    trusts what it finds, and looks at the end whether all that its table names is there.

    With a `meeting`, it waits twice in each round for the process that tidies: before the run, and
    when it has found what it needs and has not written its table yet. Then the table before the
    last is all that goes, and nothing is ever computed twice.
    """
    store = Store(root)
    chance = random.Random(1)

    def pause() -> None:
        if meeting is None:
            time.sleep(chance.random() * 0.03)
        else:
            meeting.wait(WAIT_SECONDS)
            meeting.wait(WAIT_SECONDS)

    for turn in range(ROUNDS):
        store.put(f"wrong turn {turn}".encode(), ".png")
        age(root)
        state = "AB"[turn % 2]
        contents = {f"{state}-{n}": f"picture {state} {n}".encode() for n in range(ITEMS)}
        known = turn >= 2 and meeting is not None

        def compute(
            missing: list[str], contents: dict[str, bytes] = contents, known: bool = known
        ) -> Iterator[tuple[str, dict]]:
            assert not known, f"{missing} had been computed before"
            for key in missing:
                yield key, {"image": store.put(contents[key], ".png")}

        def work(contents: dict[str, bytes] = contents, compute: Any = compute) -> list[str]:
            rows = compute_missing(
                store,
                "picture",
                list(contents),
                compute,
                save_every=4,
                usable=lambda row: store.has(row["image"], ".png"),
            )
            assert list(rows) == list(contents), "a row was lost"
            return [row["image"] for row in rows.values()]

        pause()
        with store.lease():
            blobs = work()
            pause()
            store.write_table("pictures", table_of(*blobs))
            named = store.read_table("pictures")["image"]
            found = [store.path(image, ".png").read_bytes() for image in named]
            assert found == list(contents.values())
            assert work() == blobs


WAIT_SECONDS = 120.0


@pytest.mark.parametrize("found", ["before the run", "during the run"])
def test_nothing_goes_that_a_running_step_relies_on(tmp_path: Path, found: str) -> None:
    root = tmp_path / "store"
    store = Store(root)
    meeting = SPAWN.Barrier(2)
    worker = SPAWN.Process(target=_go_to_and_fro, args=(root, meeting))
    worker.start()
    removed: Counter[str] = Counter()
    try:
        for _ in range(ROUNDS):
            meeting.wait(WAIT_SECONDS)
            garbage = find_garbage(store, keep_versions=1, grace_seconds=0)
            meeting.wait(WAIT_SECONDS)
            meeting.wait(WAIT_SECONDS)
            if found == "during the run":
                garbage = find_garbage(store, keep_versions=1, grace_seconds=0)
            removal = remove_garbage(store, garbage)
            removed.update(item.kind for item in removal.removed)
            meeting.wait(WAIT_SECONDS)
    except threading.BrokenBarrierError:
        pass  # the worker says why
    worker.join()
    assert worker.exitcode == 0
    # What the steps did not need went all the same.
    assert removed["blobs"] >= ROUNDS - 1


def test_a_step_and_gc_at_full_speed_beside_each_other(tmp_path: Path) -> None:
    root = tmp_path / "store"
    store = Store(root)
    worker = SPAWN.Process(target=_go_to_and_fro, args=(root, None))
    worker.start()
    removed: Counter[str] = Counter()
    chance = random.Random(2)
    while worker.is_alive():
        garbage = find_garbage(store, keep_versions=1, grace_seconds=0)
        removed.update(item.kind for item in remove_garbage(store, garbage).removed)
        time.sleep(chance.random() * 0.03)
    worker.join()
    assert worker.exitcode == 0
    assert removed["blobs"] > 0


# -- the command ---------------------------------------------------------------------------------


def gc(store: Store, *arguments: str, columns: int = 200) -> Result:
    environment = {"POSTERPIPE_STORE": str(store.root), "COLUMNS": str(columns)}
    return CliRunner().invoke(app, ["gc", *arguments], env=environment)


def test_the_command_lists_and_only_with_yes_removes(store: Store) -> None:
    named, unnamed = images(store, "named", "u" * 2_500_000)
    store.write_table("t", table_of(named))
    age(store.root)
    listed = gc(store)
    assert listed.exit_code == 0, listed.output
    assert f"{unnamed}.png" in listed.stdout and "2.5 MB" in listed.stdout
    assert "Nothing was removed" in listed.stdout and "--yes" in listed.stdout
    assert f"{unnamed}.png" in gc(store, columns=80).stdout.replace(" ", "").replace("\n", "")
    assert store.path(unnamed, ".png").exists()
    done = gc(store, "--yes")
    assert done.exit_code == 0, done.output
    assert "Removed 1 items, 2.5 MB" in done.stdout
    assert not store.path(unnamed, ".png").exists()
    assert "Nothing to remove" in gc(store, "--yes").stdout


def test_the_command_names_a_store_as_it_is_called_and_refuses_an_endless_grace(
    store: Store,
) -> None:
    named = Store(store.root / "store [/old] :cat:")
    assert f"Nothing to remove in {named.root}:" in gc(named).stdout
    for hours in ("inf", "nan"):
        refused = gc(named, "--grace-hours", hours)
        assert refused.exit_code == 2 and "--grace-hours" in refused.output
