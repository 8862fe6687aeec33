"""What the pipeline survives: kill -9 at any moment, company, full and read-only disks, posters
that change while they are read, many bad files.

Real assets in real processes, which really die. A server forks them after it has imported
everything, so that one takes seconds; the models are tiny. Whatever happened, three things must
hold: nothing half-written is visible, nothing that was done is done again, and in the end all is as
if nothing had happened. The training alone is killed in `core/dreambooth/test_crash.py`, the
services in `test_live_daemon.py`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import multiprocessing
import os
import pkgutil
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from fnmatch import fnmatch
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import numpy as np
import pandas as pd
import pytest
from dagster._core.launcher import WorkerStatus
from PIL import Image
from rich.console import Console

from posterpipe.commands import demo
from posterpipe.core import captioner, images
from posterpipe.core.posters import landing
from posterpipe.core.posters.listing import Folder
from posterpipe.core.store import Store, StoreError, table_version
from posterpipe.core.warehouse import database
from posterpipe.definitions import build_defs
from posterpipe.defs import resources, training
from posterpipe.defs.alerts import reason_of
from posterpipe.defs.launcher import end_dead_runs
from posterpipe.defs.resources import Deployment
from posterpipe.settings import ImageSettings, default_root, load_settings
from posterpipe_tests.core.metrics.test_clip import build_tiny_clip
from posterpipe_tests.core.tiny_blip import build_tiny_blip
from posterpipe_tests.models import TINY_HEIGHT, TINY_WIDTH, build_tiny_stable_diffusion

POSTERS = 8
"""One of them is described by a person, the others by the model, two at a time."""

CHAIN = (
    *("raw_posters", "holdout_posters", "human_captions", "resized_posters", "poster_captions"),
    *("training_csv", "class_images", "dreambooth_checkpoint", "prompt_suite"),
    *("base_generations", "tuned_generations", "clip_scores"),
)
"""Everything but the reports, which dbt makes of what is there (for the published file see
`core/warehouse/test_publication.py`)."""

SUITE = """
prompts:
  - id: rocket
    prompt: a film poster of a red rocket
    score_text: a red rocket
    negative: busy
    seeds: [1, 2]
  - id: cat
    prompt: a film poster of a blue cat
    score_text: a blue cat
    negative: red
    seeds: [3]
"""

PATIENCE = 300.0
"""Seconds for one run on a busy machine; a few on an idle one."""

TASKS = {
    "landing_file": "read posters",
    "resized": "resize posters",
    "caption": "caption posters",
    "generation": "Drawing",
}
"""Kinds of results in the store, and the task that makes them."""


# -- a deployment, and a run of it in a process of its own -----------------------------------------


class World:
    """Posters, prompts and models in a folder, and stores beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.landing = folder / "landing"
        self.landing.mkdir()
        for number in range(POSTERS):
            coarse = np.random.default_rng(number).integers(0, 256, (6, 4, 3)).astype(np.uint8)
            poster = Image.fromarray(coarse).resize((80, 120), Image.Resampling.BICUBIC)
            poster.save(self.landing / f"poster {number}.png")
        (self.landing / "poster 0.txt").write_text("what a person wrote", "utf-8")
        (self.landing / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not for long")
        (folder / "suite.yaml").write_text(SUITE, "utf-8")
        build_tiny_stable_diffusion(folder / "base")
        build_tiny_blip(folder / "captioner")
        build_tiny_clip(folder / "scorer")
        self.whole = self.store("whole", trained=False)
        """The store of a run that nothing happened to."""

    def store(self, name: str, *, trained: bool = True) -> Path:
        """The folder of an empty store; `trained`: but for the checkpoint of the whole run."""
        root = self.folder / name
        root.mkdir()
        if trained:
            self.lend_checkpoint(root)
        return root

    def lend_checkpoint(self, root: Path) -> None:
        """Spares a store the training."""
        (root / "checkpoints").symlink_to(self.whole / "checkpoints")

    def settings(self, root: Path) -> dict[str, Any]:
        """What to load the settings with for a store."""
        size = {"width": TINY_WIDTH, "height": TINY_HEIGHT}
        return {
            "landing": self.landing,
            "holdout": self.folder / "holdout",
            "captions": self.folder / "captions.csv",
            "prompt_suite": self.folder / "suite.yaml",
            "store": root,
            "base_model": {"id": str(self.folder / "base")},
            "images": size,
            "captioner": {
                "model": {"id": str(self.folder / "captioner")},
                "batch_size": 2,
                "num_beams": 1,
                "max_new_tokens": 8,
            },
            # A captioner of random weights has no choice.
            "checks": {"max_repeated_share": 1, "max_shared_captions": 1},
            "training": {
                "max_train_steps": 6,
                "train_batch_size": 2,
                "log_every_steps": 1,
                "save_every_steps": 2,
                "mixed_precision": "fp32",
                "optimizer": "adamw",
                "learning_rate": 1e-3,
            },
            "sampler": {**size, "num_inference_steps": 2, "batch_size": 2},
            "scorer": {"model": {"id": str(self.folder / "scorer")}},
        }

    def start(self, root: Path, arm: Callable[[], None] | None = None) -> BaseProcess:
        """A run of the chain with that store; `arm` prepares its death."""
        return in_process(run_chain, self.settings(root), report_of(root), arm)

    def run(self, root: Path, arm: Callable[[], None] | None = None) -> int | None:
        """The exit code of such a run when it has ended."""
        return finished(self.start(root, arm))


def in_process(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def finished(process: BaseProcess) -> int | None:
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
        pytest.fail(f"a run did not end within {PATIENCE:.0f} s")
    return process.exitcode


class Counted:
    """Counts the items that a run worked on, by the first word or two of each task."""

    def __init__(self) -> None:
        self.items: Counter[str] = Counter()

    @contextmanager
    def task(
        self, description: str, total: int, unit: str = "items", *, already: int = 0
    ) -> Iterator[Callable[..., None]]:
        name = next((task for task in TASKS.values() if description.startswith(task)), description)

        def tick(n: int = 1, **numbers: Any) -> None:
            self.items[name] += n

        yield tick


def report_of(root: Path) -> Path:
    """Where a run writes what it did, beside its store."""
    return root.with_name(f"{root.name}.json")


def run_chain(settings: dict[str, Any], report: Path, arm: Callable[[], None] | None) -> None:
    """Materialize the chain; leaves a report if it lives."""
    import torch

    torch.set_num_threads(1)
    report.unlink(missing_ok=True)
    if arm is not None:
        arm()
    counted = Counted()
    loaded = load_settings("starter", **settings)
    defs = build_defs(loaded, Deployment(loaded, counted))
    with dg.DagsterInstance.ephemeral() as instance:
        result = defs.resolve_job_def("everything").execute_in_process(
            instance=instance,
            asset_selection=[dg.AssetKey(name) for name in CHAIN],
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            raise_on_error=False,
        )
    failures = []
    for event in result.all_events:
        if event.event_type == dg.DagsterEventType.STEP_FAILURE:
            failures.append(f"{event.step_key}: {reason_of(event.step_failure_data.error)}")
    done = {"success": result.success, "items": counted.items, "failures": failures}
    report.write_text(json.dumps(done), "utf-8")


def said(root: Path) -> dict[str, Any]:
    """The report of the last run with a store."""
    report: dict[str, Any] = json.loads(report_of(root).read_text("utf-8"))
    return report


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("survival"))
    assert world.run(world.whole) == 0
    report = said(world.whole)
    assert report["success"], report["failures"]
    assert report["items"]["Drawing"] == 12
    assert_sound(world.whole)
    return world


# -- what must hold --------------------------------------------------------------------------------


def saved(root: Path) -> Counter[str]:
    """Results in a store by kind, as another program reads them."""
    path = root / "index.sqlite"
    if not path.exists():
        return Counter()
    with closing(sqlite3.connect(path)) as index:
        if not index.execute("SELECT 1 FROM sqlite_master WHERE name = 'results'").fetchall():
            return Counter()
        kinds = index.execute("SELECT kind, count(*) FROM results GROUP BY kind").fetchall()
    return Counter(dict(kinds))


def tables(root: Path) -> dict[str, str]:
    """The version of each current table."""
    return {
        pointer.parent.name: str(json.loads(pointer.read_text("utf-8"))["version"])
        for pointer in root.glob("tables/*/current.json")
    }


def blobs(root: Path) -> set[str]:
    return {path.name for path in root.glob("blobs/*/*") if not path.name.startswith(".")}


def files(folder: Path) -> set[str]:
    """Of a folder and those below, but for what killed processes left, which has hidden names."""
    names = {path.relative_to(folder) for path in folder.rglob("*")}
    return {str(name) for name in names if not any(part.startswith(".") for part in name.parts)}


def scores(root: Path) -> pd.DataFrame:
    """What the warehouse holds, but for times and runs."""
    with duckdb.connect(str(root / "warehouse.duckdb"), read_only=True) as connection:
        return connection.execute(
            "SELECT generation_key, metric_id, value, score.status, image.image, image.prompt_key "
            "FROM fct_score AS score FULL JOIN fct_image AS image USING (generation_key) "
            "ORDER BY ALL"
        ).df()


def assert_sound(root: Path) -> None:
    """Nothing half-written is visible: whatever has its name is whole."""
    for path in root.glob("blobs/*/*"):
        if not path.name.startswith("."):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem, path
    for name, version in tables(root).items():
        assert table_version(pd.read_parquet(root / "tables" / name / f"{version}.parquet")) == (
            version
        ), name
    for file in root.glob("tables/*/*.parquet"):
        if not file.name.startswith("."):
            assert table_version(pd.read_parquet(file)) == file.stem, file
    for folder in root.glob("training_sets/*"):
        if folder.name.startswith("."):
            continue
        text = (folder / "training.csv").read_bytes()
        assert hashlib.sha256(text).hexdigest() == folder.name
        for row in csv.DictReader(text.decode("utf-8").splitlines()):
            with Image.open(folder / row["file_name"]) as image:
                image.load()
    kept = Store(root)
    for kind, key, value, _ in kept.all_results(["resized", "generation"]):
        row = json.loads(value)
        assert row["status"] != "ok" or kept.path(row["image"], ".png").exists(), (kind, key)
    if (root / "warehouse.duckdb").exists():
        # The scores of one asset are one transaction, the tables themselves included.
        with duckdb.connect(str(root / "warehouse.duckdb"), read_only=True) as connection:
            found = connection.execute("SELECT count(*) FROM duckdb_tables()").fetchall()
        if found != [(0,)]:
            rows = scores(root)
            assert len(rows) in (0, 12)
            assert not rows["image"].isna().any()


def assert_as_if_nothing_happened(root: Path, world: World) -> None:
    """All is as after the run that nothing happened to, to the byte."""
    assert tables(root) == tables(world.whole)
    for name, version in tables(root).items():
        file = Path("tables") / name / f"{version}.parquet"
        assert (root / file).read_bytes() == (world.whole / file).read_bytes(), name
    assert blobs(root) == blobs(world.whole)
    assert files(root / "training_sets") == files(world.whole / "training_sets")
    pd.testing.assert_frame_equal(scores(root), scores(world.whole))
    assert_sound(root)


def assert_goes_on(root: Path, world: World, before: Mapping[str, int]) -> None:
    """Another run does what is missing, no more, and comes to the same end."""
    assert world.run(root) == 0
    report = said(root)
    assert report["success"], report["failures"]
    complete = saved(world.whole)
    for kind, task in TASKS.items():
        assert report["items"].get(task, 0) == complete[kind] - before.get(kind, 0), kind
    assert_as_if_nothing_happened(root, world)


# -- how runs die ----------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(owner_name: str, name: str, number: int) -> None:
    """Dies when a function of a module or class is called for the `number`-th time."""
    owner = pkgutil.resolve_name(owner_name)
    original, calls = getattr(owner, name), 0

    def dies(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            die()
        return original(*arguments, **keywords)

    setattr(owner, name, dies)


def on_sync(pattern: str, number: int = 1, *, half: bool = False) -> None:
    """Dies when the `number`-th file or folder like `pattern` is made durable; `half`: when only
    half of it was written."""
    original, calls = os.fsync, 0

    def dies(handle: int) -> None:
        nonlocal calls
        if fnmatch(os.readlink(f"/proc/self/fd/{handle}"), pattern):
            calls += 1
            if calls == number:
                if half:
                    os.ftruncate(handle, os.fstat(handle).st_size // 2)
                die()
        original(handle)

    os.fsync = dies  # type: ignore[assignment]


def while_results_are_saved(kind: str, number: int) -> None:
    """Dies inside the transaction that saves results."""
    index, calls = Store._index, 0

    class Dies:
        def __init__(self, connection: sqlite3.Connection) -> None:
            self._connection = connection

        def executemany(self, statement: str, values: list[tuple[Any, ...]]) -> None:
            nonlocal calls
            self._connection.executemany(statement, values)
            if values and values[0][0] == kind:
                calls += 1
                if calls == number:
                    die()

        def __enter__(self) -> Dies:
            self._connection.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._connection.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._connection, name)

    @contextmanager
    def dying_index(self: Store) -> Iterator[Any]:
        with index(self) as connection:
            yield Dies(connection)

    Store._index = dying_index  # type: ignore[method-assign]


def while_the_database_is_written(*, committed: bool) -> None:
    """Dies when everything was inserted, before or after it counts."""
    write = database.Warehouse.write

    @contextmanager
    def dies(self: database.Warehouse) -> Iterator[duckdb.DuckDBPyConnection]:
        with write(self) as connection:
            yield connection
            if not committed:
                die()
        die()

    database.Warehouse.write = dies  # type: ignore[method-assign]


def after_the_step(asset: str) -> None:
    """Dies between a step and the next."""
    keep = resources.StoreIOManager.handle_output

    def dies(self: Any, context: dg.OutputContext, obj: Any) -> None:
        keep(self, context, obj)
        if context.asset_key.path[-1] == asset:
            die()

    resources.StoreIOManager.handle_output = dies  # type: ignore[method-assign]


DEATHS: dict[str, tuple[Callable[[], None], dict[str, int]]] = {
    "while posters are read": (
        partial(on_call, "posterpipe.core.posters.landing", "perceptual_hash", 6),
        {},
    ),
    "while images are resized": (partial(on_call, "posterpipe.core.images", "png_bytes", 7), {}),
    "with half a picture written": (
        partial(on_sync, "*/blobs/*.png.*.tmp", 4, half=True),
        {"landing_file": POSTERS + 1},
    ),
    "while captioning": (
        partial(on_call, "posterpipe.core.captioner:Captioner", "describe", 3),
        {"resized": POSTERS, "caption": 2},
    ),
    "while captions are saved": (
        partial(while_results_are_saved, "caption", 2),
        {"resized": POSTERS, "caption": 2},
    ),
    "with half a table written": (
        partial(on_sync, "*/tables/poster_captions/*.parquet.*.tmp", half=True),
        {"caption": POSTERS - 1},
    ),
    "between a table and its name": (
        partial(on_sync, "*/tables/poster_captions/.current.json.*.tmp", half=True),
        {"caption": POSTERS - 1},
    ),
    "when a table was named": (
        partial(on_sync, "*/tables/poster_captions", 2),
        {"caption": POSTERS - 1},
    ),
    "with half a training set written": (
        partial(on_sync, "*/training_sets/*/.training.csv.*.tmp", half=True),
        {"caption": POSTERS - 1},
    ),
    "between two steps": (partial(after_the_step, "training_csv"), {"caption": POSTERS - 1}),
    "while drawing": (
        partial(on_call, "posterpipe.core.sampler:Sampler", "__call__", 3),
        {"generation": 2},
    ),
    "while the database is written": (
        partial(while_the_database_is_written, committed=False),
        {"generation": 12},
    ),
    "when the database was written": (
        partial(while_the_database_is_written, committed=True),
        {"generation": 12},
    ),
}
"""How to prepare each death, and what the run must have saved by then."""


QUICK = ("while the database is written",)
"""Deaths that the fast tests die."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in DEATHS],
)
def test_killed(world: World, name: str) -> None:
    arm, least = DEATHS[name]
    root = world.store(f"killed {name}")
    assert world.run(root, arm) == -signal.SIGKILL
    assert_sound(root)
    before = saved(root)
    for kind, count in least.items():
        assert before[kind] >= count, kind
    assert_goes_on(root, world, before)


def while_training() -> None:
    """Dies when the training process has told of its third step."""
    shown = training._Reports._read

    def dies(self: Any, message: dict[str, Any]) -> bool:
        payload = (message.get("params") or {}).get("payload")
        if isinstance(payload, dict) and payload.get("step") == 3:
            die()
        return shown(self, message)

    training._Reports._read = dies  # type: ignore[method-assign]


@pytest.mark.slow
def test_killed_while_training_a_run_goes_on_and_no_second_training_runs_beside(
    world: World,
) -> None:
    root = world.store("killed while training", trained=False)
    assert world.run(root, while_training) == -signal.SIGKILL
    assert_sound(root)
    before = saved(root)
    assert before["caption"] == POSTERS - 1
    # The base model's images wait for no training; whatever follows it is not there.
    assert "training_csv" in tables(root) and "dreambooth_checkpoint" not in tables(root)
    assert not list((root / "checkpoints").glob("*/unet"))
    assert_goes_on(root, world, before)
    (ours,), (theirs,) = ((at / "checkpoints").glob("*/unet/*.safetensors")
                          for at in (root, world.whole))  # fmt: skip
    assert ours.read_bytes() == theirs.read_bytes()


def run_demo(settings: dict[str, Any], home: Path) -> None:
    """What `posterpipe demo` does, until it captions: there it stays."""
    describe = captioner.Captioner.describe

    def stays(self: Any, *arguments: Any) -> Any:
        signal.pause()
        return describe(self, *arguments)

    captioner.Captioner.describe = stays  # type: ignore[assignment, method-assign]
    deployment = Deployment(load_settings("starter", **settings), Counted())
    with dg.DagsterInstance.from_config(str(home)) as instance:
        demo.materialize(deployment, instance, Console(file=io.StringIO()), demo.Watch())


def test_a_demo_that_was_killed_leaves_no_run_behind_that_the_services_wait_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = world.store("demo killed")
    home = world.folder / "home of the demo"
    home.mkdir()
    shutil.copyfile(default_root() / "deploy" / "dagster.yaml", home / "dagster.yaml")
    with dg.DagsterInstance.from_config(str(home)) as instance:
        storage = instance.event_log_storage
        process = in_process(run_demo, world.settings(root), home)
        deadline = time.monotonic() + PATIENCE

        def wait_for_a_slot() -> None:
            """Until a step holds one; between two steps none does."""
            while not storage.get_concurrency_run_ids():
                assert process.is_alive() and time.monotonic() < deadline
                time.sleep(0.1)

        wait_for_a_slot()
        (run,) = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
        check = instance.run_launcher.check_run_worker_health
        # The services may run in another container than the demo, or in a new one.
        monkeypatch.setattr(socket, "gethostname", lambda: "another")
        assert check(run).status == WorkerStatus.RUNNING
        end_dead_runs(instance)
        lives = instance.get_run_by_id(run.run_id)
        assert lives is not None and lives.status == dg.DagsterRunStatus.STARTED
        wait_for_a_slot()
        process.kill()
        process.join()
        assert check(run).status == WorkerStatus.FAILED
        end_dead_runs(instance)
        ended = instance.get_run_by_id(run.run_id)
        assert ended is not None and ended.status == dg.DagsterRunStatus.FAILURE
        assert not storage.get_concurrency_run_ids()
        assert not list((home / "leases").iterdir())


@pytest.mark.slow
def test_killed_again_and_again_at_any_moment_a_run_comes_to_its_end(world: World) -> None:
    root = world.store("killed again and again")
    delay, deaths = 1.0, 0
    while True:
        process = world.start(root)
        process.join(delay)
        if not process.is_alive():
            break
        process.kill()
        process.join()
        deaths += 1
        assert_sound(root)
        delay += 0.4
    assert process.exitcode == 0
    assert said(root)["success"], said(root)["failures"]
    assert deaths >= 3
    assert_as_if_nothing_happened(root, world)


# -- company ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_runs_at_once_on_the_same_assets_come_to_one_end(world: World) -> None:
    root = world.store("two at once")
    second = root.with_name("the second of two at once.json")
    both = [
        world.start(root),
        in_process(run_chain, world.settings(root), second, None),
    ]
    assert [finished(process) for process in both] == [0, 0]
    for report in (report_of(root), second):
        told = json.loads(report.read_text("utf-8"))
        assert told["success"], told["failures"]
    assert_as_if_nothing_happened(root, world)


# -- disks -----------------------------------------------------------------------------------------


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[Callable[..., None]]:
    """Mounts something at a folder while inside; what it gives mounts it again, otherwise.

    Skips the test where that is not permitted.
    """
    if shutil.which("mount") is None:
        pytest.skip("there is no command `mount` here")
    done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")

    def again(*other: str) -> None:
        subprocess.run(["mount", *other, str(place)], check=True)

    try:
        yield again
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_told_and_when_there_is_room_the_run_goes_on(world: World) -> None:
    root = world.store("full", trained=False)
    with mounted(root, "-t", "tmpfs", "-o", "size=64k", "tmpfs") as mount_again:
        world.lend_checkpoint(root)
        stopped = []
        for room in ("64k", "512k", "1m"):
            mount_again("-o", f"remount,size={room}")
            assert world.run(root) == 0
            report = said(root)
            assert not report["success"]
            told = report["failures"][0]
            stopped.append(told.partition(":")[0])
            assert "room on the disk" in told or "writable" in told, told
            assert str(root) in told
            mount_again("-o", "remount,size=64m")  # SQLite wants room even to read
            assert_sound(root)
        assert len(set(stopped)) > 1, stopped  # it came further each time
        mount_again("-o", "remount,size=64m")
        assert_goes_on(root, world, saved(root))


@pytest.mark.slow
def test_a_read_only_store_can_be_read_and_is_told_and_left_alone(world: World) -> None:
    root = world.store("read only")
    assert world.run(root) == 0
    name, version = next(iter(tables(root).items()))

    def contents() -> dict[str, tuple[int, int]]:
        files = (path for path in root.rglob("*") if path.is_file())
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

    with mounted(root, "--bind", str(root)) as mount_again:
        before = contents()
        mount_again("-o", "remount,ro,bind")
        kept = Store(root)
        assert table_version(kept.read_table(name)) == version
        keys = [key for kind, key, _, _ in kept.all_results(["caption"])]
        assert len(kept.results("caption", keys)) == POSTERS - 1
        with pytest.raises(StoreError, match=r"be written \(Read-only file system\); make room"):
            kept.put(b"new")
        with pytest.raises(StoreError, match=r"be written .*read-?only"):
            kept.add_results("caption", {"new": {}})
        assert world.run(root) == 0
        report = said(root)
        assert not report["success"]
        assert all("writ" in told and str(root) in told for told in report["failures"])
        assert contents() == before
    assert_goes_on(root, world, saved(root))


# -- posters ---------------------------------------------------------------------------------------


def keep_replacing(path: Path, contents: list[bytes], enough: Path) -> None:
    """Replaces a file over and over, until `enough` is there: at once by another one, by writing
    over it bit by bit, and then a little while not at all."""
    other = path.with_name(".other")
    turn = 0
    while not enough.exists() or turn % 4:
        if turn % 4 == 0:
            time.sleep(0.2)
        data = contents[turn % len(contents)]
        if turn % 4 < 2:
            other.write_bytes(data)
            os.replace(other, path)
        else:
            with open(path, "wb", buffering=0) as file:
                for start in range(0, len(data), 100_000):
                    file.write(data[start : start + 100_000])
        turn += 1


def test_a_poster_that_is_replaced_while_it_is_read_is_one_or_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "landing"
    folder.mkdir()
    poster = folder / "poster.png"
    contents = []
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (900, 600, 3)).astype(np.uint8)
        Image.fromarray(noise).save(poster, compress_level=0)
        contents.append(poster.read_bytes())
    whole = {hashlib.sha256(data).hexdigest() for data in contents}
    kept = Store(tmp_path / "store")
    limits = ImageSettings(width=64, height=96)
    enough = tmp_path / "enough"
    writer = in_process(keep_replacing, poster, contents, enough)
    seen: Counter[str] = Counter()
    deadline = time.monotonic() + 60
    while writer.is_alive():
        if min(seen["ok"], seen["rejected"]) >= 10 or time.monotonic() > deadline:
            enough.touch()
        row = landing.scan(Folder(folder), limits, kept).iloc[0]
        seen[row["status"]] += 1
        if row["status"] == "ok":
            assert row["poster_id"] in whole
            resized = images.resize_posters(
                kept, landing.scan(Folder(folder), limits, kept), limits
            )
            assert set(resized["status"]) <= {"ok"}
        else:
            # Caught while it is written it is empty or cut, or no more what was listed.
            assert "again" in row["reason"], row["reason"]
    assert finished(writer) == 0
    assert seen["ok"] and seen["rejected"], seen  # else nothing was tried
    # When it rests, it is read as it is.
    last = landing.scan(Folder(folder), limits, kept).iloc[0]
    assert last["status"] == "ok"
    assert last["poster_id"] == hashlib.sha256(poster.read_bytes()).hexdigest()
    assert_sound(kept.root)


BAD = (
    lambda number: b"",
    lambda number: b"no picture, number %d" % number,
    lambda number: b"\x89PNG\r\n\x1a\n" + number.to_bytes(8, "big"),
    lambda number: b"\xff\xd8\xff\xe0" + number.to_bytes(400, "big"),
    lambda number: b"GIF89a" + number.to_bytes(8, "big"),
)
"""What is in bad files."""


def read_and_resize(folder: Path, root: Path, report: Path) -> None:
    """Both tables of a folder, and what they took."""
    limits = ImageSettings(width=32, height=48, min_side=16)
    counted = Counted()
    kept = Store(root)
    before = memory_mb()
    posters = landing.scan(Folder(folder), limits, kept, counted)
    resized = images.resize_posters(kept, posters, limits, counted)
    kept.write_table("raw_posters", posters)
    kept.write_table("resized_posters", resized)
    told = {"items": counted.items, "memory_mb": memory_mb() - before}
    report.write_text(json.dumps(told), "utf-8")


def memory_mb() -> float:
    """The most memory that this process has held."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


@pytest.mark.slow
def test_a_thousand_bad_files_among_ten_thousand_are_rows_with_reasons(tmp_path: Path) -> None:
    folder, report = tmp_path / "landing", tmp_path / "report.json"
    folder.mkdir()
    for number in range(10_000):
        path = folder / f"{number:05}.png"
        if number % 10 == 3:
            path.write_bytes(BAD[number // 10 % len(BAD)](number))
            continue
        fields = np.random.default_rng(number).integers(0, 256, (6, 4, 3), dtype=np.uint8)
        image = Image.fromarray(fields).resize((16, 24), Image.Resampling.NEAREST)
        image.save(path, compress_level=1)
    root = tmp_path / "store"
    assert finished(in_process(read_and_resize, folder, root, report)) == 0
    told = json.loads(report.read_text("utf-8"))
    assert told["items"] == {"read posters": 10_000, "resize posters": 9_000}
    assert told["memory_mb"] < 200
    posters = Store(root).read_table("raw_posters")
    assert posters["status"].value_counts().to_dict() == {"ok": 9_000, "rejected": 1_000}
    refused = posters[posters["status"] == "rejected"]
    assert all(int(name[:5]) % 10 == 3 for name in refused["source_name"])
    assert (refused["reason"].str.len() > 20).all()
    assert (Store(root).read_table("resized_posters")["status"] == "ok").sum() == 9_000
    # And again: nothing is read twice, the bad ones neither.
    assert finished(in_process(read_and_resize, folder, root, report)) == 0
    assert json.loads(report.read_text("utf-8"))["items"] == {}
