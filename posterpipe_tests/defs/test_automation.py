"""What follows by itself when something changed: real runs on a real instance, tick by tick.

A small world of assets under the policy shows the behaviour; posterpipe's own graph shows that it
is in force there.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
from PIL import Image

from posterpipe.core.models import fingerprint, known_fingerprint
from posterpipe.core.provenance.checkpoints import CHECKPOINT
from posterpipe.core.store import Store
from posterpipe.definitions import build_defs
from posterpipe.defs.automation import ON_SCHEDULE, all_upstream, rebuild_when_inputs_change
from posterpipe.defs.metadata import MODEL_FINGERPRINT
from posterpipe.defs.resources import Deployment
from posterpipe.settings import load_settings
from posterpipe_tests.defs.conftest import MakeWorld
from posterpipe_tests.defs.harness import Daemon, World, report_all_made, report_made

RAW_POSTERS = dg.AssetKey("raw_posters")


@pytest.fixture
def chain(make_world: MakeWorld) -> World:
    """a -> b -> c, all made and at rest."""
    world = make_world(a="", b="a", c="b")
    world.run("a")
    world.settle()
    assert world.stale() == []
    forget_history(world)
    return world


def forget_history(world: World) -> None:
    world.started.clear()
    world.computed.clear()


# ---- what a change reaches ----------------------------------------------------------------------


def test_what_was_never_made_is_made_as_soon_as_its_inputs_are_there(make_world: MakeWorld) -> None:
    world = make_world(a="", b="a", c="b")
    assert world.tick() == []
    world.run("a")
    assert world.settle() == [["b"], ["c"]]
    assert world.contents["c"] == "c(b(1))"


def test_an_asset_that_is_new_in_the_code_is_made(chain: World) -> None:
    chain.reads["d"] = ["b"]
    chain.deploy()
    assert chain.settle() == [["d"]]


def test_an_input_made_again_with_the_same_version_requests_nothing(chain: World) -> None:
    chain.run("a")
    assert chain.tick() == []
    chain.run("b")
    assert chain.tick() == []


def test_a_change_runs_all_that_it_reaches_and_nothing_else(make_world: MakeWorld) -> None:
    world = make_world(a="", x="", b="a", y="x", c="b y")
    world.run("a", "x")
    world.settle()
    forget_history(world)
    world.change("a", "2")
    assert world.settle() == [["b"], ["c"]]
    assert world.started == ["a", "b", "c"]
    assert world.contents["c"] == "c(b(2) y(1))"


def test_where_the_output_stays_the_same_nothing_further_runs(chain: World) -> None:
    chain.shown["b"] = lambda content: "b of one digit"
    chain.change("a", "2")
    assert chain.settle() == [["b"], ["c"]]
    chain.change("a", "3")
    assert chain.settle() == [["b"]]
    assert chain.stale() == []


def test_there_and_back_again_rebuilds_from_the_store(chain: World) -> None:
    chain.change("a", "2")
    assert chain.settle() == [["b"], ["c"]]
    forget_history(chain)
    chain.change("a", "1")
    assert chain.settle() == [["b"], ["c"]]
    assert chain.contents["c"] == "c(b(1))"
    assert chain.started == ["a", "b", "c"]
    assert chain.computed == []


def test_other_code_runs_its_asset_and_what_follows_where_the_output_differs(chain: World) -> None:
    chain.shown["b"] = lambda content: content.replace("bNew", "b")
    chain.code["b"] = "New"
    chain.deploy()
    assert chain.settle() == [["b"]]
    del chain.shown["b"]
    chain.code["b"] = "Newer"
    chain.deploy()
    assert chain.settle() == [["b"], ["c"]]
    assert chain.contents["c"] == "c(bNewer(1))"


def test_a_change_is_taken_up_by_the_run_that_made_it(chain: World) -> None:
    chain.outside["a"] = "2"
    chain.run("a", "b", "c")
    assert chain.settle() == []
    assert chain.stale() == []


def test_what_a_job_made_from_nothing_is_not_made_again(make_world: MakeWorld) -> None:
    world = make_world(a="", b="a", c="b")
    assert world.tick() == []
    assert world.run("a", "b", "c")
    assert world.settle() == []


def test_a_change_that_waited_and_that_a_job_took_up_requests_nothing(chain: World) -> None:
    job = chain.enqueue(["b", "c"])  # such as a training: long under way when a changes
    chain.change("a", "2")
    assert [chain.tick() for _ in range(2)] == [[]] * 2
    assert chain.work() == [True] and job
    assert chain.contents["c"] == "c(b(2))"
    assert chain.settle() == []


def test_with_two_inputs_from_one_source_an_asset_runs_once(make_world: MakeWorld) -> None:
    world = make_world(a="", b="a", c="b", d="c", e="a d")
    world.run("a")
    world.settle()
    forget_history(world)
    world.change("a", "2")
    assert world.settle() == [["b"], ["c"], ["d"], ["e"]]
    assert world.contents["e"] == "e(2 d(c(b(2))))"


def test_an_input_that_comes_out_the_same_keeps_the_others_waiting_no_longer(
    make_world: MakeWorld,
) -> None:
    world = make_world(a="", b="a", c="b", d="a c")
    world.run("a")
    world.settle()
    world.shown["b"] = lambda content: "b(1)"
    world.change("a", "2")
    assert world.settle() == [["b"], ["d"]]


# ---- nothing is lost, whenever it happens -------------------------------------------------------


def before_the_run_starts(world: World) -> None:
    world.change("a", "3")


def before_the_run_starts_and_a_tick_sees_it(world: World) -> None:
    world.change("a", "3")
    assert world.tick() == []


def while_it_runs(world: World) -> None:
    world.meanwhile["b"] = lambda: world.change("a", "3")


def while_it_runs_and_a_tick_sees_it(world: World) -> None:
    def meanwhile() -> None:
        world.change("a", "3")
        assert world.tick() == []
        assert world.tick() == []

    world.meanwhile["b"] = meanwhile


def after_a_tick_saw_it_run(world: World) -> None:
    def meanwhile() -> None:
        assert world.tick() == []
        world.change("a", "3")

    world.meanwhile["b"] = meanwhile


def between_its_end_and_the_next_tick(world: World) -> None:
    world.work()
    world.change("a", "3")


def twice_while_it_runs(world: World) -> None:
    def meanwhile() -> None:
        world.change("a", "4")
        assert world.tick() == []
        world.change("a", "3")

    world.meanwhile["b"] = meanwhile


@pytest.mark.parametrize(
    "change_again",
    [
        before_the_run_starts,
        before_the_run_starts_and_a_tick_sees_it,
        while_it_runs,
        while_it_runs_and_a_tick_sees_it,
        after_a_tick_saw_it_run,
        between_its_end_and_the_next_tick,
        twice_while_it_runs,
    ],
)
def test_a_second_change_is_not_lost(chain: World, change_again: Callable[[World], None]) -> None:
    chain.change("a", "2")
    assert chain.tick() == ["b"]
    change_again(chain)
    chain.settle()
    assert chain.stale() == []
    assert chain.contents["c"] == "c(b(3))"
    assert chain.tick() == []


def test_a_change_is_kept_while_a_run_of_hours_goes_on(chain: World) -> None:
    def hours() -> None:
        for content in "3", "4", "5":
            chain.change("a", content)
            for _ in range(3):
                assert chain.tick() == []

    chain.change("a", "2")
    chain.meanwhile["b"] = hours
    chain.settle()
    assert chain.contents["c"] == "c(b(5))"
    assert chain.started.count("b") == 2


def test_nothing_runs_twice_at_once(chain: World) -> None:
    chain.change("a", "2")
    assert chain.tick() == ["b"]
    chain.change("a", "3")
    assert [chain.tick() for _ in range(3)] == [[], [], []]
    assert len(chain.queue) == 1


# ---- failures -----------------------------------------------------------------------------------


def ticks_between_runs(world: World) -> None:
    pass


def ticks_that_see_it_run(world: World) -> None:
    def look() -> None:
        world.tick()
        world.meanwhile["b"] = look

    world.meanwhile["b"] = look


@pytest.mark.parametrize("ticks", [ticks_between_runs, ticks_that_see_it_run])
def test_a_failed_run_is_tried_once_more_and_not_for_ever(
    chain: World, ticks: Callable[[World], None]
) -> None:
    chain.broken.add("b")
    ticks(chain)
    chain.change("a", "2")
    for _ in range(8):
        chain.tick()
        chain.work()
    assert chain.started == ["a", "b", "b"]


@pytest.mark.parametrize("ticks", [ticks_between_runs, ticks_that_see_it_run])
def test_a_failed_asset_runs_again_when_its_input_is_fixed(
    chain: World, ticks: Callable[[World], None]
) -> None:
    chain.broken.add("b")
    ticks(chain)
    chain.change("a", "2")
    for _ in range(6):
        chain.tick()
        chain.work()
    chain.meanwhile.clear()
    chain.broken.clear()
    chain.change("a", "3")
    assert chain.settle() == [["b"], ["c"]]
    assert chain.stale() == []


def test_a_retry_that_goes_well_is_followed(chain: World) -> None:
    chain.broken.add("b")
    chain.change("a", "2")
    assert chain.tick() == ["b"]
    assert chain.work() == [False]
    chain.broken.clear()
    ticks = [chain.tick() for _ in range(2)]
    assert sorted(ticks) == [[], ["b"]]
    assert chain.settle() == [["c"]]
    assert chain.stale() == []


@pytest.mark.parametrize("ticks", [ticks_between_runs, ticks_that_see_it_run])
def test_what_also_reads_other_inputs_waits_for_the_retry(
    make_world: MakeWorld, ticks: Callable[[World], None]
) -> None:
    world = make_world(a="", b="a", c="a b")
    world.run("a")
    world.settle()
    forget_history(world)
    world.broken.add("b")
    ticks(world)
    world.change("a", "2")
    assert world.tick() == ["b"]
    assert world.work() == [False]
    world.broken.clear()
    world.meanwhile.clear()
    for _ in range(4):
        world.tick()
        world.work()
    assert world.started == ["a", "b", "b", "c"]
    assert world.stale() == []


def test_what_failed_for_good_does_not_keep_others_waiting(make_world: MakeWorld) -> None:
    world = make_world(a="", b="a", c="a b")
    world.run("a")
    world.settle()
    forget_history(world)
    world.broken.add("b")
    world.change("a", "2")
    for _ in range(8):
        world.tick()
        world.work()
    assert world.started == ["a", "b", "b", "c"]
    assert world.contents["c"] == "c(2 b(1))"


def test_each_change_has_a_retry_of_its_own(chain: World) -> None:
    chain.broken.add("b")
    for content in "2", "3":
        forget_history(chain)
        chain.change("a", content)
        for _ in range(6):
            chain.tick()
            chain.work()
        assert chain.started == ["a", "b", "b"]


def test_a_change_that_lands_as_it_fails_is_not_lost(chain: World) -> None:
    def meanwhile() -> None:
        chain.change("a", "3")

    chain.broken.add("b")
    chain.change("a", "2")
    chain.tick()
    chain.meanwhile["b"] = meanwhile
    assert chain.work() == [False]
    chain.broken.clear()
    chain.settle()
    assert chain.stale() == []


def test_a_job_that_stopped_early_makes_nothing_run_that_is_up_to_date(chain: World) -> None:
    chain.broken.add("a")
    assert not chain.run("a", "b", "c")
    assert [chain.tick() for _ in range(4)] == [[]] * 4


def test_a_job_that_fails_is_not_made_again_by_the_policy(chain: World) -> None:
    """What then stays stale is for the sweep."""
    chain.broken.add("b")
    chain.outside["a"] = "2"
    assert not chain.run("a", "b", "c")
    assert chain.contents["a"] == "2" and "b" in chain.stale()
    assert [chain.tick() for _ in range(4)] == [[]] * 4


# ---- checks and trainings -----------------------------------------------------------------------


@pytest.fixture
def held_back(make_world: MakeWorld) -> World:
    """a (its check fails on what it holds now) -> b -> c."""
    world = make_world(checked="a", a="", b="a", c="b")
    world.run("a")
    assert world.settle() == [["b"], ["c"]]
    world.failing.add("a")
    world.change("a", "2")
    return world


def test_a_check_that_fails_stops_what_follows(held_back: World) -> None:
    assert [held_back.tick() for _ in range(4)] == [[]] * 4
    assert held_back.contents["c"] == "c(b(1))"


def test_what_was_stopped_goes_on_when_the_check_alone_is_run_and_passes(held_back: World) -> None:
    assert held_back.settle() == []
    held_back.failing.clear()
    assert held_back.check("a")
    assert held_back.settle() == [["b"], ["c"]]
    assert held_back.stale() == []


def test_what_was_stopped_goes_on_when_the_input_is_fixed(held_back: World) -> None:
    assert held_back.settle() == []
    held_back.failing.clear()
    held_back.change("a", "3")
    assert held_back.settle() == [["b"], ["c"]]
    assert held_back.stale() == []


def test_what_was_stopped_does_not_run_when_the_input_is_as_before(held_back: World) -> None:
    assert held_back.settle() == []
    held_back.failing.clear()
    held_back.change("a", "1")
    assert held_back.settle() == []
    assert held_back.stale() == []


def test_a_check_that_fails_again_still_stops(held_back: World) -> None:
    assert held_back.settle() == []
    held_back.check("a")
    assert held_back.settle() == []


def test_nothing_requests_a_training(make_world: MakeWorld) -> None:
    world = make_world(csv="", dreambooth_checkpoint="csv", tuned="dreambooth_checkpoint")
    world.run("csv")
    assert world.settle() == []
    world.run("dreambooth_checkpoint")
    assert world.settle() == [["tuned"]]
    world.change("csv", "2")
    assert world.settle() == []


def test_only_what_reads_the_checkpoint_waits_for_a_training(make_world: MakeWorld) -> None:
    world = make_world(
        csv="",
        suite="",
        dreambooth_checkpoint="csv",
        tuned="dreambooth_checkpoint suite",
        base="suite",
        scores="base tuned",
    )
    world.run("csv", "suite", "dreambooth_checkpoint")
    world.settle()
    forget_history(world)

    def hours() -> None:
        world.change("suite", "2")
        assert world.tick() == ["base"]
        world.work()
        assert world.tick() == ["scores"]
        world.work()
        assert world.tick() == []

    world.outside["csv"] = "2"
    world.run("csv")
    world.meanwhile["dreambooth_checkpoint"] = hours
    world.run("dreambooth_checkpoint")
    assert world.settle() == [["tuned"], ["scores"]]
    assert world.stale() == []


# ---- posterpipe's own graph ---------------------------------------------------------------------


def test_all_but_the_outside_world_and_the_training_follow_by_themselves() -> None:
    settings = load_settings("starter")
    defs, deployment = build_defs(settings), Deployment(settings)
    specs = list(defs.resolve_all_asset_specs())
    reads = {spec.key: [dep.asset_key for dep in spec.deps] for spec in specs}
    following, others = set(), set()
    for spec in specs:
        name = spec.key.to_user_string()
        if spec.automation_condition is None:
            others.add(name)
            assert not list(spec.deps) or name in ON_SCHEDULE, name
        else:
            following.add(name)
            policy = rebuild_when_inputs_change(all_upstream(spec.key, reads), deployment)
            assert spec.automation_condition == policy, name
    assert {"raw_posters", "prompt_suite", "dreambooth_checkpoint"} <= others
    assert {"resized_posters", "poster_captions", "training_csv", "tuned_generations"} <= following
    assert {"clip_scores", "leaderboard", "published_scores", "contact_sheet"} <= following


def test_the_policy_and_the_sweep_run_unless_told_otherwise() -> None:
    defs = build_defs(load_settings("starter"))
    for name in "automation", "stale_sweep":
        sensor = defs.resolve_sensor_def(name)
        assert sensor.default_status == dg.DefaultSensorStatus.RUNNING


def test_the_policy_is_evaluated_where_its_condition_is_known_and_leaves_no_log_behind(
    instance_with_logs: dg.DagsterInstance,
) -> None:
    settings = load_settings("starter")
    defs = build_defs(settings)
    policy = rebuild_when_inputs_change([dg.AssetKey("a")], Deployment(settings))
    assert not policy.is_serializable
    # As the daemon asks for a tick: what is logged goes into a file of the tick.
    with dg.SensorEvaluationContext(
        instance_with_logs.get_ref(),
        log_key=["__repository__", "automation", "1"],
        repository_name="__repository__",
        repository_def=defs.get_repository_def(),
        sensor_name="automation",
    ) as context:
        evaluated = defs.resolve_sensor_def("automation").evaluate_tick(context)
    judged = {one.key for one in evaluated.automation_condition_evaluations}
    assert dg.AssetKey("resized_posters") in judged and not evaluated.run_requests
    # It is asked every 15 seconds, for ever.
    home = Path(instance_with_logs.root_directory)
    left = [file for file in home.rglob("*") if "automation" in str(file)]
    assert left == []


def test_the_policy_sees_the_whole_way_up_but_not_past_a_schedule() -> None:
    """A change of a poster holds up whatever lies below it; a training only what reads it."""
    specs = build_defs(load_settings("starter")).resolve_all_asset_specs()
    reads = {spec.key: [dep.asset_key for dep in spec.deps] for spec in specs}
    names = {key.path[-1]: key for key in reads}

    def above(name: str) -> set[str]:
        return {key.path[-1] for key in all_upstream(names[name], reads)}

    assert {"raw_posters", "prompt_suite", "champion", "leaderboard"} <= above("published_scores")
    assert "dreambooth_checkpoint" not in above("published_scores")
    assert above("tuned_generations") == {"dreambooth_checkpoint", "prompt_suite"}
    assert above("base_generations") == {"prompt_suite"}


def test_after_a_change_of_the_base_model_what_its_checkpoint_draws_waits_for_a_training(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    """Neither drawn by a checkpoint of one model with the settings of another, nor compared."""
    before, after = (
        load_settings(profile, store=tmp_path / "store") for profile in ("starter", "sd21")
    )
    old = fingerprint(before.base_model, before.root)
    new = known_fingerprint(after.base_model, after.root) or "downloaded"
    for checkpoint, model, settings in (("1", old, before), ("2", new, after)):
        facts = {"base_model": model, "base_model_name": settings.base_model.id}
        Store(tmp_path / "store").add_results(CHECKPOINT, {checkpoint: facts})
    report_all_made(
        build_defs(before),
        instance,
        tuned_generations={"checkpoint_id": "1"},
        base_generations={MODEL_FINGERPRINT: old},
    )
    daemon = Daemon(build_defs(before), instance)
    assert daemon.tick() == []
    definitions = build_defs(after)
    daemon.load(definitions)
    specs = {spec.key.to_user_string(): spec for spec in definitions.resolve_all_asset_specs()}

    def requested() -> set[str]:
        """What a tick requests; the runs come to nothing."""
        names = set(daemon.tick())
        for run_id in [*daemon.queue]:
            daemon.cancel(run_id)
        return names

    drawn = requested()
    assert {"base_generations", "resized_posters"} <= drawn
    compare = {"clip_scores", "titled_posters", "contact_sheet", "champion_generations"}
    assert not drawn & {"tuned_generations", *compare}
    report_made(specs["prompt_suite"], instance, {}, "1")  # its texts fit the new model as well
    report_made(specs["base_generations"], instance, {MODEL_FINGERPRINT: new}, "2")
    assert requested() == {"champion"}, "which serves the base model"
    daemon.sweep()
    another = "but the checkpoint 1 was tuned from the base model"
    assert f"tuned_generations: its code or settings changed, {another}" in daemon.said
    assert f"contact_sheet: base_generations changed, {another}" in daemon.said
    assert not {"tuned_generations", *compare} & {*daemon.sweep()}
    # The training, and with it what follows.
    report_made(specs["dreambooth_checkpoint"], instance, {}, "2")
    assert "tuned_generations" in requested()
    read = {"dreambooth_checkpoint": "2"}
    report_made(specs["tuned_generations"], instance, {"checkpoint_id": "2"}, "2", read)
    assert requested() >= {"clip_scores", "titled_posters", "contact_sheet"}


def test_a_retraining_also_draws_with_the_base_model_that_it_starts_from() -> None:
    """Else its checkpoint would be compared with the model of before another one was chosen."""
    job = build_defs(load_settings("starter")).resolve_job_def("retrain")
    assert dg.AssetKey("base_generations") in job.asset_layer.executable_asset_keys


def test_a_tick_without_a_change_requests_nothing_and_is_cheap(
    instance: dg.DagsterInstance,
) -> None:
    definitions = build_defs(load_settings("starter"))
    report_all_made(definitions, instance)
    daemon = Daemon(definitions, instance)
    assert daemon.tick() == []
    seconds = []
    for _ in range(3):
        started = time.process_time()
        assert daemon.tick() == []
        seconds.append(time.process_time() - started)
    # CPU seconds, the least of three: about 0.6 where it was measured.
    assert min(seconds) < 2.0
    # It is quiet because nothing changed, not because nothing could be requested.
    [posters] = [spec for spec in definitions.resolve_all_asset_specs() if spec.key == RAW_POSTERS]
    report_made(posters, instance, {}, version="2")
    assert "resized_posters" in daemon.tick()


def test_posters_that_come_and_go_rebuild_the_dataset_from_the_store(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    landing, store = tmp_path / "landing", tmp_path / "store"
    landing.mkdir()
    for number in range(6):
        pixels = random.Random(number).randbytes(80 * 120 * 3)
        Image.frombytes("RGB", (80, 120), pixels).save(landing / f"{number}.png")
    size = {"width": 32, "height": 48}
    settings = load_settings("starter", landing=landing, store=store, images=size)
    deployment = Deployment(settings)
    daemon = Daemon(build_defs(settings, deployment), instance)

    def look_again() -> tuple[int, set[Path]]:
        """Rows of resized_posters and files of the store, when what changed was followed."""
        assert daemon.run("raw_posters")
        assert daemon.tick() == ["resized_posters"]
        assert daemon.work() == [True]
        if daemon.tick():  # captions, which need a model
            daemon.cancel(daemon.queue[-1])
        return len(deployment.store.read_table("resized_posters")), set(store.glob("blobs/*/*"))

    daemon.tick()
    rows, files = look_again()
    assert rows == 6
    (landing / "0.png").rename(tmp_path / "0.png")
    assert look_again() == (5, files)
    (tmp_path / "0.png").rename(landing / "0.png")
    assert look_again() == (6, files)
    assert not daemon.tick()


@pytest.mark.slow
def test_another_limit_and_other_holdout_posters_run_the_checks_again(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    landing, holdout = tmp_path / "landing", tmp_path / "holdout"
    landing.mkdir()
    for number in range(6):
        pixels = random.Random(number).randbytes(80 * 120 * 3)
        Image.frombytes("RGB", (80, 120), pixels).save(landing / f"{number}.png")
        (landing / f"{number}.txt").write_text(f"poster number {number}", encoding="utf-8")

    def definitions(**checks: int) -> dg.Definitions:
        settings = load_settings(
            "starter",
            landing=landing,
            holdout=holdout,
            captions=tmp_path / "captions.csv",
            store=tmp_path / "store",
            images={"width": 32, "height": 48},
            checks=checks,
        )
        return build_defs(settings)

    def passed(name: str) -> bool:
        """Whether a check of the training set passed on what is there now."""
        key = dg.AssetCheckKey(dg.AssetKey("training_csv"), name)
        record = instance.get_latest_asset_check_evaluation_record(key)
        assert record is not None and isinstance(record.evaluation, dg.AssetCheckEvaluation)
        return record.evaluation.passed

    daemon = Daemon(definitions(), instance)
    for name in (
        *("raw_posters", "human_captions", "holdout_posters"),
        *("resized_posters", "poster_captions", "training_csv"),
    ):
        assert daemon.run(name), name
    assert passed("no_poster_is_held_out")
    daemon.tick()
    assert not daemon.tick()

    # A poster that is trained on is held out as well, and no more.
    holdout.mkdir()
    (holdout / "README.md").write_text("so that it is not taken for a folder that is not mounted")
    (holdout / "held.png").write_bytes((landing / "0.png").read_bytes())
    assert daemon.run("holdout_posters")
    assert daemon.tick() == ["training_csv"]
    daemon.work()
    assert not passed("no_poster_is_held_out")
    (holdout / "held.png").unlink()
    assert daemon.run("holdout_posters")
    assert daemon.tick() == ["training_csv"]
    daemon.work()
    assert passed("no_poster_is_held_out")

    # More posters are wanted than there are.
    assert passed("enough_training_rows")
    daemon.load(definitions(min_posters=7))
    assert daemon.tick() == ["training_csv"]
    daemon.work()
    assert not passed("enough_training_rows")
