"""What is removed from Dagster's history, and what stays: a real instance with real ticks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.asset_key import EntityKey

from posterpipe.defs.housekeeping import KEPT_DAYS, forget_evaluations, housekeeping

DAY = 24 * 3600


@dg.asset
def posters() -> None: ...


@dg.asset(deps=[posters], automation_condition=dg.AutomationCondition.eager())
def captions() -> None: ...


@dg.sensor(target=[posters])
def talkative(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    context.log.info("nothing new")
    return dg.SkipReason("nothing new")


DEFINITIONS = dg.Definitions(assets=[posters, captions], sensors=[talkative, housekeeping])


def look(instance: dg.DagsterInstance) -> str:
    context = dg.build_sensor_context(instance, definitions=DEFINITIONS)
    return str(housekeeping.evaluate_tick(context).skip_message)


def tick(instance: dg.DagsterInstance, name: str, days_ago: float) -> Path:
    """The log of a tick of `talkative`, in the name of that sensor."""
    with dg.SensorEvaluationContext(
        instance.get_ref(),
        log_key=["__repository__", name, str(days_ago)],
        repository_name="__repository__",
        repository_def=DEFINITIONS.get_repository_def(),
        sensor_name=name,
    ) as context:
        talkative.evaluate_tick(context)
    log = Path(instance.root_directory, "storage", "__repository__", name, f"{days_ago}.err")
    assert "nothing new" in log.read_text()
    at = time.time() - days_ago * DAY
    os.utime(log, (at, at))
    return log


def test_logs_of_ticks_go_after_a_week_and_those_of_others_stay(
    instance_with_logs: dg.DagsterInstance,
) -> None:
    old, young = (
        tick(instance_with_logs, "talkative", KEPT_DAYS + 1),
        tick(instance_with_logs, "talkative", 6),
    )
    others = tick(instance_with_logs, "of_another_code_location", KEPT_DAYS + 1)
    run = dg.materialize([posters], instance=instance_with_logs)
    (ofrun,) = Path(instance_with_logs.root_directory, "storage", run.run_id).rglob("*.err")
    os.utime(ofrun, (0, 0))
    assert "1 logs of ticks" in look(instance_with_logs)
    assert [file.exists() for file in (old, young, others, ofrun)] == [False, True, True, True]
    assert "0 logs of ticks" in look(instance_with_logs)


def test_a_look_ends_in_time_and_the_next_one_goes_on(
    instance_with_logs: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tick(instance_with_logs, "talkative", KEPT_DAYS + 1)
    with monkeypatch.context() as slow:
        slow.setattr("posterpipe.defs.housekeeping.TICK_BUDGET_SECONDS", 0.0)
        look(instance_with_logs)
    assert old.exists()
    look(instance_with_logs)
    assert not old.exists()


def test_evaluations_go_after_a_week(instance: dg.DagsterInstance) -> None:
    storage = instance.schedule_storage
    assert storage is not None
    key: EntityKey = captions.key
    result = dg.evaluate_automation_conditions(DEFINITIONS, instance)
    (evaluation,) = [one.serializable_evaluation for one in result.results]
    storage.add_auto_materialize_asset_evaluations(1, [evaluation.with_run_ids(set())])

    def kept() -> int:
        return len(storage.get_auto_materialize_asset_evaluations(key, limit=9))

    look(instance)
    assert kept() == 1
    forget_evaluations(instance, time.time() + 1)  # as a week later
    assert kept() == 0
