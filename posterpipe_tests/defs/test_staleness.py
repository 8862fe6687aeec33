"""What no longer matches what it is made from, and the sweep behind the policy.

The policy is kept quiet in most of these tests: without `tick` nobody evaluates it.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest

from posterpipe.core.devices import DeviceGone
from posterpipe.core.retries import ATTEMPTS
from posterpipe.core.store import writing
from posterpipe.definitions import build_defs
from posterpipe.defs import retries
from posterpipe.defs.arrivals import REASON_TAG
from posterpipe.defs.automation import with_policy
from posterpipe.defs.metadata import (
    BASE_MODEL,
    CHALLENGER,
    CHAMPION,
    FAILED_ITEMS,
    LAST_DECISION,
    TABLE_VERSION,
    WAREHOUSE,
)
from posterpipe.defs.reports import WRITERS
from posterpipe.defs.resources import TABLES, Deployment, StoreIOManager, store_tables, table_output
from posterpipe.defs.staleness import stale_assets
from posterpipe.defs.sweep import stale_sweep
from posterpipe.settings import load_settings
from posterpipe_tests.defs.conftest import MakeWorld
from posterpipe_tests.defs.harness import (
    RUN_KEY,
    Broken,
    Daemon,
    World,
    report_all_made,
    report_made,
)


@pytest.fixture
def chain(make_world: MakeWorld) -> World:
    """a -> b -> c, all made, and nobody evaluates the policy."""
    world = make_world(a="", b="a", c="b")
    world.run("a", "b", "c")
    assert world.sweep() == []
    assert world.stale() == []
    world.started.clear()
    return world


def sweep_and_work(world: World, times: int) -> None:
    for _ in range(times):
        world.sweep()
        world.work()


# ---- what it finds ------------------------------------------------------------------------------


def test_without_the_policy_a_change_still_reaches_all_that_depends_on_it(chain: World) -> None:
    chain.change("a", "2")
    assert chain.settle_by_sweeps() == [["b"], ["c"]]
    assert chain.stale() == []
    assert chain.started == ["a", "b", "c"]


def test_without_the_policy_everything_is_made_from_nothing(make_world: MakeWorld) -> None:
    world = make_world(a="", x="", b="a", c="b x")
    assert world.settle_by_sweeps() == [["a", "x"], ["b"], ["c"]]
    assert world.stale() == []


def test_where_the_output_stays_the_same_nothing_further_runs(chain: World) -> None:
    chain.shown["b"] = lambda content: "b(1)"
    chain.change("a", "2")
    assert chain.settle_by_sweeps() == [["b"]]


def test_there_and_back_again_is_requested_again(chain: World) -> None:
    for content in "2", "1", "2":
        chain.change("a", content)
        assert chain.settle_by_sweeps() == [["b"], ["c"]]
        assert chain.stale() == []


def test_it_finds_what_a_person_wiped_however_often(chain: World) -> None:
    for name in ("a", "b") * 2:
        chain.instance.wipe_assets([dg.AssetKey(name)])
        assert chain.settle_by_sweeps() == [[name]]


def test_it_finds_a_change_there_and_back_that_the_policy_cannot_see(chain: World) -> None:
    chain.tick()
    chain.change("a", "2")
    assert chain.tick() == ["b"]
    chain.change("a", "3")
    assert chain.work() == [True]
    chain.change("a", "2")
    assert chain.settle() == [["c"]]
    assert chain.stale() == ["b", "c"]
    assert chain.settle_by_sweeps() == [["b"], ["c"]]
    assert chain.stale() == []


def test_it_finds_other_code_of_an_asset_without_inputs(chain: World) -> None:
    chain.tick()
    chain.code["a"] = "2"
    chain.deploy()
    assert chain.tick() == []
    assert chain.settle_by_sweeps() == [["a"]]


def test_it_finds_what_a_job_that_stopped_early_did_not_take_up(chain: World) -> None:
    chain.tick()
    chain.outside["a"] = "2"
    chain.broken.add("b")
    assert not chain.run("a", "b", "c")
    chain.broken.clear()
    assert chain.tick() == []
    assert chain.settle_by_sweeps() == [["b"], ["c"]]
    assert chain.stale() == []


def test_it_finds_a_lost_table_and_does_not_rebuild_it_for_ever(make_world: MakeWorld) -> None:
    """An asset whose table never appears is as lost after each run as before it."""
    world = make_world(a="")

    @dg.asset(name="a", code_version="1")
    def forgetful() -> dg.MaterializeResult[None]:
        world.started.append("a")
        return dg.MaterializeResult(
            data_version=dg.DataVersion("1"), metadata={TABLE_VERSION: "of no table"}
        )

    world.load(dg.Definitions(assets=[forgetful], resources=world.resources))
    sweep_and_work(world, 10)
    assert world.started == ["a"] * ATTEMPTS
    assert "its table is gone" in world.said


def test_it_finds_a_check_that_came_to_no_result(make_world: MakeWorld) -> None:
    """As when the run died between the asset and its check: nothing would ever go on."""
    world = make_world(checked="a", a="", b="a")
    world.run("a", "b")
    world.tick()
    world.broken.add("check of a")
    assert not world.change("a", "2")
    world.broken.clear()
    assert world.tick() == []
    assert world.settle_by_sweeps() == [["a"], ["b"]]
    assert world.stale() == []


def test_a_check_that_never_comes_to_a_result_is_not_run_for_ever(make_world: MakeWorld) -> None:
    world = make_world(checked="a", a="")
    world.broken.add("check of a")
    world.run("a")
    sweep_and_work(world, 10)
    assert world.started == ["a"] * (1 + ATTEMPTS)
    assert "its check holds did not run" in world.said


def test_it_finds_what_was_made_from_a_table_that_was_there_for_a_moment(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster notes the versions of inputs when a step starts. Another run may write before the
    step reads, and one after it may bring back what was noted."""
    content, meanwhile = ["first"], [0]

    @dg.asset(io_manager_key=TABLES, code_version="1")
    def posters() -> dg.Output[pd.DataFrame]:
        return table_output(pd.DataFrame({"name": content}), {})

    @dg.asset(io_manager_key=TABLES, code_version="1")
    def resized(posters: pd.DataFrame) -> dg.Output[pd.DataFrame]:
        return table_output(posters.assign(width=1), {})

    deployment = Deployment(load_settings("starter", store=tmp_path / "store"))
    resources = {"deployment": deployment, TABLES: store_tables(deployment)}
    definitions = dg.Definitions([posters, resized], sensors=[stale_sweep], resources=resources)
    daemon = Daemon(definitions, instance)
    load = StoreIOManager.load_input

    def late(manager: StoreIOManager, context: dg.InputContext) -> Any:
        if meanwhile:
            meanwhile.clear()
            content[0] = "second"
            assert daemon.run("posters")
        return load(manager, context)

    assert daemon.run("posters")
    monkeypatch.setattr(StoreIOManager, "load_input", late)
    assert daemon.run("resized")
    assert deployment.store.read_table("resized")["name"].tolist() == ["second"]
    # It was made from what there is now, whatever Dagster noted.
    assert daemon.settle_by_sweeps() == []
    content[0] = "first"
    assert daemon.run("posters")
    assert daemon.settle_by_sweeps() == [["resized"]]
    assert deployment.store.read_table("resized")["name"].tolist() == ["first"]
    assert daemon.settle_by_sweeps() == []


# ---- what it leaves alone -----------------------------------------------------------------------


def test_it_lets_the_policy_come_first(chain: World) -> None:
    chain.tick()
    chain.change("a", "2")
    assert chain.sweep() == []
    assert chain.tick() == ["b"]
    chain.work()
    assert chain.sweep() == []
    assert chain.tick() == ["c"]
    chain.work()
    assert [chain.sweep() for _ in range(3)] == [[]] * 3
    assert chain.said == "everything matches its inputs"


def test_items_that_failed_are_tried_again_ever_more_seldom_and_not_for_ever(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(a="", b="a")
    failing = {"b": 1}

    @dg.asset(name="b", deps=["a"], code_version="1")
    def unlucky() -> dg.MaterializeResult[None]:
        world.started.append("b")
        return dg.MaterializeResult(
            data_version=dg.DataVersion(f"{failing['b']} failed"),
            metadata={FAILED_ITEMS: failing["b"]},
        )

    world.load(
        dg.Definitions(
            assets=[world._asset("a"), unlucky], sensors=[stale_sweep], resources=world.resources
        )
    )
    world.run("a", "b")
    hour = 3600.0
    clock = 0.0
    made: dict[int, float] = {}

    def note() -> None:
        [record] = world.instance.fetch_materializations(dg.AssetKey("b"), limit=1).records
        made[record.storage_id] = clock

    monkeypatch.setattr(retries, "now", lambda: clock)
    monkeypatch.setattr(retries, "made_at", lambda record: made[record.storage_id])
    note()
    for pause in (1, 1, 2, 4, 8, 16, 24, 24, 24, 24, 24, 24):
        clock += pause * hour - 1
        assert [world.sweep(), world.sweep()] == [[], []]
        clock += 1
        assert [world.sweep(), world.sweep()] == [[], ["b"]]
        assert world.work() == [True]
        note()
    clock += 1000 * hour
    assert [world.sweep(), world.sweep()] == [[], []]
    # After a change of the input it is another matter.
    world.change("a", "2")
    assert [world.sweep(), world.sweep()] == [[], ["b"]]
    world.work()
    note()
    clock += hour
    failing["b"] = 0
    assert [world.sweep(), world.sweep()] == [[], ["b"]]
    world.work()
    note()
    clock += 1000 * hour
    assert [world.sweep(), world.sweep()] == [[], []]


def test_it_requests_nothing_that_is_queued_or_running(chain: World) -> None:
    chain.change("a", "2")
    chain.sweep()
    assert chain.sweep() == ["b"]
    assert [chain.sweep() for _ in range(3)] == [[]] * 3
    assert "b: a changed, but it is being made" in chain.said

    def look() -> None:
        assert [chain.sweep() for _ in range(3)] == [[]] * 3

    chain.meanwhile["b"] = look
    assert chain.work() == [True]


def test_it_waits_for_what_is_made_upstream(chain: World) -> None:
    chain.code["c"] = "2"
    chain.deploy()

    def look() -> None:
        assert [chain.sweep() for _ in range(3)] == [[]] * 3
        assert "a comes first" in chain.said

    chain.meanwhile["a"] = look
    chain.run("a")
    assert chain.settle_by_sweeps() == [["c"]]


def test_a_training_holds_up_only_what_reads_it(make_world: MakeWorld) -> None:
    """It takes hours, and what is made of the images of before is not made of its checkpoint."""
    world = make_world(
        csv="", dreambooth_checkpoint="csv", tuned="dreambooth_checkpoint", scores="tuned"
    )
    world.run("csv", "dreambooth_checkpoint", "tuned", "scores")
    requested: list[list[str]] = []

    def look(name: str) -> None:
        world.code[name] = "2"
        world.deploy()
        world.sweep()
        requested.append(world.sweep())

    world.meanwhile["dreambooth_checkpoint"] = lambda: look("scores")
    world.run("dreambooth_checkpoint")
    assert requested == [["scores"]]
    world.work()
    world.meanwhile["dreambooth_checkpoint"] = lambda: look("tuned")
    world.run("dreambooth_checkpoint")
    assert requested == [["scores"], []]
    assert "tuned: its code or settings changed, but dreambooth_checkpoint comes first" in (
        world.said
    )


def test_the_same_look_twice_requests_one_run_that_tells_why(chain: World) -> None:
    """As when the daemon dies after it launched the run and before it kept the cursor."""
    chain.change("a", "2")
    chain.sweep()
    assert chain.sweep(forget=True) == ["b"]
    assert chain.sweep() == []
    [run_id] = chain.queue
    run = chain.instance.get_run_by_id(run_id)
    assert run is not None
    assert run.tags[REASON_TAG] == "a changed"
    assert run.tags[RUN_KEY].startswith("b-")


def test_it_never_requests_a_training_but_what_is_stale_below_it(make_world: MakeWorld) -> None:
    world = make_world(csv="", dreambooth_checkpoint="csv", suite="", tuned="dreambooth_checkpoint")
    world.reads["tuned"] = ["dreambooth_checkpoint", "suite"]
    world.deploy()
    world.run("csv", "suite", "dreambooth_checkpoint", "tuned")
    world.change("csv", "2")
    assert world.settle_by_sweeps() == []
    assert "dreambooth_checkpoint: csv changed, but it follows its schedule" in world.said
    world.change("suite", "2")
    assert world.settle_by_sweeps() == [["tuned"]]
    assert world.stale() == ["dreambooth_checkpoint", "tuned"]


def test_a_checkpoint_whose_table_alone_is_lost_is_made_again_and_no_other(
    make_world: MakeWorld,
) -> None:
    """Which trains nothing: the directory is there, and is adopted."""
    world = make_world(csv="", dreambooth_checkpoint="csv")
    store = Deployment(load_settings("starter", store=world.home / "store")).store
    (world.home / "store" / "model").mkdir(parents=True)

    @dg.asset(deps=["csv"], code_version="1")
    def dreambooth_checkpoint() -> dg.MaterializeResult[None]:
        world.started.append("dreambooth_checkpoint")
        version = store.write_table("dreambooth_checkpoint", pd.DataFrame({"path": ["model"]}))
        metadata = {TABLE_VERSION: version, "path": "model"}
        return dg.MaterializeResult(data_version=dg.DataVersion("1"), metadata=metadata)

    assets = [world._asset("csv"), dreambooth_checkpoint]
    world.load(dg.Definitions(assets=assets, resources=world.resources))
    world.run("csv", "dreambooth_checkpoint")
    assert world.settle_by_sweeps() == []
    shutil.rmtree(store.root / "tables" / "dreambooth_checkpoint")
    assert world.settle_by_sweeps() == [["dreambooth_checkpoint"]]
    # With another training set it would be trained.
    shutil.rmtree(store.root / "tables" / "dreambooth_checkpoint")
    world.change("csv", "2")
    assert world.settle_by_sweeps() == []
    assert "dreambooth_checkpoint: csv changed, but it follows its schedule" in world.said


def test_what_a_person_reported_as_made_makes_nothing_again(chain: World) -> None:
    for name in ("a", "b"):
        chain.instance.report_runless_asset_event(dg.AssetMaterialization(name))
    assert chain.settle_by_sweeps() == []
    chain.change("a", "2")
    assert chain.settle_by_sweeps() == [["b"], ["c"]]


def test_a_failed_blocking_check_holds_it_back_until_it_passes(make_world: MakeWorld) -> None:
    world = make_world(checked="a", a="", b="a", c="b")
    world.run("a", "b", "c")
    world.failing.add("a")
    world.change("a", "2")
    assert world.settle_by_sweeps() == []
    assert "b: a changed, but a blocking check has not passed: holds of a" in world.said
    world.failing.clear()
    world.check("a")
    assert world.settle_by_sweeps() == [["b"], ["c"]]
    assert world.stale() == []


def test_what_it_requests_is_checked(make_world: MakeWorld) -> None:
    world = make_world(checked="a", a="", b="a")
    world.failing.add("a")
    assert world.settle_by_sweeps() == [["a"]]
    assert "b: never materialized, but a blocking check has not passed: holds of a" in world.said


# ---- failures -----------------------------------------------------------------------------------


def test_a_failed_run_is_tried_once_more_and_not_for_ever(chain: World) -> None:
    chain.broken.add("b")
    chain.change("a", "2")
    sweep_and_work(chain, 10)
    assert chain.started == ["a", "b", "b"]
    assert "b: a changed, but it failed 2 times with these inputs" in chain.said


def test_an_input_that_is_made_again_gives_what_failed_another_chance(chain: World) -> None:
    chain.broken.add("b")
    chain.change("a", "2")
    sweep_and_work(chain, 6)
    assert "it failed 2 times" in chain.said
    chain.broken.clear()
    chain.run("a")  # with the same content, as when its damaged table was written anew
    sweep_and_work(chain, 6)
    assert chain.stale() == []
    assert chain.started == ["a", "b", "b", "a", "b", "c"]


def test_policy_and_sweep_together_try_a_failed_run_once_more(chain: World) -> None:
    chain.tick()
    chain.broken.add("b")
    chain.change("a", "2")
    for _ in range(6):
        for look in chain.tick, chain.tick, chain.sweep:
            look()
            chain.work()
    assert chain.started == ["a", "b", "b"]


def test_it_retries_when_the_policy_is_kept_from_it(chain: World) -> None:
    chain.tick()
    chain.broken.add("b")
    chain.change("a", "2")
    chain.tick()
    chain.work()
    sweep_and_work(chain, 6)
    assert chain.started == ["a", "b", "b"]


@pytest.mark.slow
def test_a_device_that_is_gone_is_waited_for_ever_more_seldom_and_not_for_ever(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(a="", b="a")
    error: list[Exception] = []

    @dg.asset(name="b", deps=["a"], code_version="1")
    def on_the_gpu() -> None:
        world.started.append("b")
        if error:
            raise error[-1]

    world.load(
        dg.Definitions(
            assets=with_policy([world._asset("a"), on_the_gpu], world.resources["deployment"]),
            sensors=[stale_sweep],
            resources=world.resources,
        )
    )
    world.run("a", "b")
    world.tick()
    hour = 3600.0
    clock = 0.0
    failed: dict[str, float] = {}
    monkeypatch.setattr(retries, "now", lambda: clock)
    monkeypatch.setattr(retries, "failed_at", lambda entry: failed.setdefault(entry.run_id, clock))
    error.append(DeviceGone("the captioner can no longer use its device"))
    world.change("a", "2")
    for _ in range(4):  # the policy tries at once, and once more
        world.tick()
        world.work()
    assert world.started == ["a", "b", "a", "b", "b"]
    for pause in (1, 1, 2, 4, 8, 16, 24, 24, 24, 24, 24, 24):
        assert [world.sweep(), world.sweep()] == [[], []]
        assert "b: a changed, but its GPU was lost; it is tried again after" in world.said
        clock += pause * hour - 1
        assert [world.sweep(), world.sweep()] == [[], []]
        clock += 1
        assert [world.sweep(), world.sweep()] == [[], ["b"]]
        assert world.work() == [False]
    clock += 1000 * hour
    assert [world.sweep(), world.sweep()] == [[], []]
    assert "b: a changed, but its GPU was lost 14 times" in world.said
    # After a change of the input it is another matter, and other failures are counted as ever.
    failed.clear()
    world.change("a", "3")
    assert [world.sweep(), world.sweep()] == [[], ["b"]]
    assert world.work() == [False]
    error.append(Broken("b"))
    world.started.clear()
    for _ in range(8):
        clock += 2 * hour
        world.sweep()
        world.work()
    assert world.started == ["b", "b"]
    assert "b: a changed, but it failed 3 times with these inputs" in world.said
    world.change("a", "4")
    error.append(DeviceGone("the captioner can no longer use its device"))
    assert [world.sweep(), world.sweep()] == [[], ["b"]]
    assert world.work() == [False]
    assert [world.sweep(), world.sweep()] == [[], []]
    error.clear()
    clock += hour
    assert [world.sweep(), world.sweep()] == [[], ["b"]]
    assert world.work() == [True]
    assert [world.sweep(), world.sweep()] == [[], []]
    assert world.said == "everything matches its inputs"


def test_a_full_disk_is_waited_for(chain: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    failed: dict[str, float] = {}
    monkeypatch.setattr(retries, "now", lambda: clock)
    monkeypatch.setattr(retries, "failed_at", lambda entry: failed.setdefault(entry.run_id, clock))

    def full() -> None:
        chain.meanwhile["b"] = full
        with writing(Path("tables/b")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    chain.meanwhile["b"] = full
    chain.change("a", "2")
    for tries, pause in enumerate((300, 300, 600, 1200), start=1):
        sweep_and_work(chain, 4)
        assert chain.started == ["a", *["b"] * tries]
        assert "b: a changed, but the disk was full; it is tried again after" in chain.said
        clock += pause
    chain.meanwhile.clear()  # there is room
    assert chain.settle_by_sweeps() == [["b"], ["c"]]


def test_a_fix_of_the_input_runs_it_again(chain: World) -> None:
    chain.broken.add("b")
    chain.change("a", "2")
    sweep_and_work(chain, 6)
    chain.broken.clear()
    chain.change("a", "3")
    assert chain.settle_by_sweeps() == [["b"], ["c"]]
    assert chain.stale() == []


def test_a_fix_of_the_code_runs_it_again(chain: World) -> None:
    chain.broken.add("b")
    chain.change("a", "2")
    sweep_and_work(chain, 6)
    chain.broken.clear()
    chain.code["b"] = "2"
    chain.deploy()
    assert chain.settle_by_sweeps() == [["b"], ["c"]]
    assert chain.stale() == []


def test_a_run_that_a_person_canceled_is_not_requested_again(chain: World) -> None:
    chain.change("a", "2")
    chain.sweep()
    chain.sweep()
    chain.cancel(chain.queue[0])
    assert [chain.sweep() for _ in range(4)] == [[]] * 4
    assert "its run was canceled: materialize it, or change something" in chain.said
    chain.change("a", "3")
    assert chain.settle_by_sweeps() == [["b"], ["c"]]


def test_of_a_run_that_a_person_stopped_in_a_step_the_later_ones_are_not_requested(
    make_world: MakeWorld,
) -> None:
    world = make_world(a="", b="a", c="a b")
    world.run("a", "b", "c")
    world.change("a", "2")

    def stopped() -> None:
        (run,) = world.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
        world.instance.report_run_canceling(run)
        raise dg.DagsterExecutionInterruptedError

    world.meanwhile["b"] = stopped
    assert not world.run("b", "c")
    assert [world.sweep() for _ in range(4)] == [[]] * 4
    for name in "b", "c":
        assert f"{name}: a changed, but its run was canceled: materialize it" in world.said


def test_runs_that_failed_before_they_reached_it_do_not_count(chain: World) -> None:
    chain.change("a", "2")
    chain.broken.add("a")
    for _ in range(ATTEMPTS):
        assert not chain.run("a", "b")
    chain.broken.clear()
    assert chain.settle_by_sweeps() == [["b"], ["c"]]
    assert chain.stale() == []


def test_what_fails_does_not_keep_others_waiting(make_world: MakeWorld) -> None:
    world = make_world(a="", x="", b="a", c="b x")
    world.run("a", "x", "b", "c")
    world.broken.add("b")
    world.change("a", "2")
    sweep_and_work(world, 6)
    world.change("x", "2")
    assert world.settle_by_sweeps() == [["c"]]


# ---- posterpipe's own graph ---------------------------------------------------------------------


def test_with_nothing_made_only_what_reads_the_outside_world_is_requested(
    instance: dg.DagsterInstance,
) -> None:
    defs = build_defs(load_settings("starter"))
    daemon = Daemon(defs, instance)
    roots = {
        spec.key.to_user_string() for spec in defs.resolve_all_asset_specs() if not list(spec.deps)
    }
    assert daemon.sweep() == []
    assert set(daemon.sweep()) == roots


@pytest.mark.parametrize("restored", [False, True])
def test_all_that_filled_a_lost_warehouse_fills_the_new_one(
    tmp_path: Path, instance: dg.DagsterInstance, restored: bool
) -> None:
    """The first of them makes the file again; the others must not take it for the one they know."""
    settings = load_settings("starter", store=tmp_path / "store")
    deployment = Deployment(settings)
    defs = build_defs(settings)
    specs = {spec.key.to_user_string(): spec for spec in defs.resolve_all_asset_specs()}
    files = (
        deployment.published_path,
        deployment.published_parquet_path,
        deployment.contact_sheet_path,
        deployment.report_path,
        deployment.thesis_path / "growth.json",
    )
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    known: dict[str, dict[str, str]] = {
        "champion": {LAST_DECISION: ""},
        "champion_generations": {CHAMPION: "b", BASE_MODEL: "b", CHALLENGER: "c"},
    }

    def metadata() -> dict[str, dict[str, str]]:
        identity = deployment.warehouse.prepare()
        return {name: {WAREHOUSE: identity, **known.get(name, {})} for name in WRITERS}

    def stale() -> set[str]:
        found = stale_assets(specs.values(), instance, deployment)
        return {key.to_user_string() for key in found}

    report_all_made(defs, instance, **{**known, **metadata()})
    copy = tmp_path / "copy.duckdb"
    shutil.copyfile(deployment.warehouse_path, copy)
    with deployment.warehouse.write() as connection:
        connection.execute("INSERT INTO current_generation VALUES ('new')")
    assert stale() == set()
    deployment.warehouse_path.unlink()
    if restored:
        shutil.copyfile(copy, deployment.warehouse_path)
    assert stale() == set(WRITERS)
    left = set(WRITERS)
    for name in WRITERS:
        # The same table as before, in another file: its data version says so.
        report_made(specs[name], instance, metadata()[name])
        left.remove(name)
        assert stale() == left


def test_a_table_in_another_warehouse_is_another_data_version() -> None:
    """So what reads the warehouse is made again as well, reports and publication included."""
    table = pd.DataFrame({"a": [1]})
    outputs = [table_output(table, {}, warehouse=one) for one in ("", "x", "x", "y")]
    versions = [str(output.data_version and output.data_version.value) for output in outputs]
    assert versions[1] == versions[2]
    assert len(set(versions)) == 3
    assert len({str(output.metadata[TABLE_VERSION]) for output in outputs}) == 1


def test_what_is_published_follows_all_that_fills_the_warehouse() -> None:
    specs = build_defs(load_settings("starter")).resolve_all_asset_specs()
    [published] = [spec for spec in specs if spec.key.path[-1] == "published_scores"]
    assert {dep.asset_key.path[-1] for dep in published.deps} >= set(WRITERS)


def test_a_look_at_a_large_graph_where_nothing_is_stale_is_cheap(make_world: MakeWorld) -> None:
    names = [f"asset_{number}" for number in range(30)]
    reads = dict(zip(names, ["", *names], strict=False))
    world = make_world(**reads)
    world.run(*names)
    assert world.sweep() == []
    started = time.process_time()
    assert world.sweep() == []
    assert time.process_time() - started < 1.0
    assert world.said == "everything matches its inputs"
