"""What Dagster's history keeps and nobody needs any more.

What belongs here: the sensor that removes it. What does not: ticks, which Dagster forgets itself
(`retention` in deploy/dagster.yaml), runs and what was materialized, which stay, and the store's
garbage (`core.housekeeping.garbage`).
"""

import time
from pathlib import Path

import dagster as dg
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager

KEPT_DAYS = 7
"""As long as ticks that requested nothing are kept."""

TICK_INTERVAL_SECONDS = 3600

TICK_BUDGET_SECONDS = 30.0
"""After so long the rest is left to the next look: Dagster gives a sensor a minute."""


@dg.sensor(
    name="housekeeping",
    minimum_interval_seconds=TICK_INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Removes, once an hour, what Dagster itself keeps for ever: logs of sensors and "
    f"schedules, and evaluations of assets' conditions, that are older than {KEPT_DAYS} days. "
    "Requests nothing.",
)
def housekeeping(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """One look; says what was removed."""
    assert context.repository_def is not None
    before = time.time() - KEPT_DAYS * 24 * 3600
    forget_evaluations(context.instance, before)
    removed = remove_tick_logs(context.instance, context.repository_def, before)
    return dg.SkipReason(
        f"removed evaluations and {removed} logs of ticks that were older than {KEPT_DAYS} days"
    )


def forget_evaluations(instance: dg.DagsterInstance, before: float) -> None:
    """Forgets how conditions of assets were evaluated before then (seconds since 1970).

    Dagster's daemon does so only where it evaluates them itself, not for a sensor in the code
    location. Those of one new poster are 10 MB.
    """
    if instance.schedule_storage is not None:
        instance.schedule_storage.purge_asset_evaluations(before)


def remove_tick_logs(
    instance: dg.DagsterInstance, repository: dg.RepositoryDefinition, before: float
) -> int:
    """Removes what sensors and schedules of ours logged before then; how many files.

    Where Dagster keeps logs elsewhere than on disk, nothing is removed.
    """
    logs = instance.compute_log_manager
    if not isinstance(logs, LocalComputeLogManager):
        return 0
    removed = 0
    started = time.monotonic()
    names = [sensor.name for sensor in repository.sensor_defs]
    names += [schedule.name for schedule in repository.schedule_defs]
    for name in names:
        of_a_tick = logs.get_captured_local_path([repository.name, name, "0"], "err")
        for file in Path(of_a_tick).parent.glob("*.err"):
            if time.monotonic() - started > TICK_BUDGET_SECONDS:
                return removed
            if file.stat().st_mtime < before:
                file.unlink()
                removed += 1
    return removed
