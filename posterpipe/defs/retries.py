"""When an asset is made again because items of it failed, or its run for a reason that passes.

What belongs here: whether it is time, by what the event log tells. What does not: how long the
pauses are (`core.retries`), requesting the run (`sweep`), and files outside that could not be read
(`arrivals`).
"""

import errno
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import dagster as dg
from dagster import DagsterEventType

from posterpipe.core.retries import (
    FIRST_PAUSE_SECONDS,
    ROOM_PAUSE_SECONDS,
    clock,
    pause_after,
)
from posterpipe.defs.metadata import FAILED_ITEMS
from posterpipe.defs.staleness import CODE_VERSION, INPUT_DATA_VERSION, materializations

GIVE_UP_SECONDS = 7 * 86_400.0
"""What failed for so long is tried again only when an input, code or a setting changes."""

DEVICE_GONE = "DeviceGone"
"""Name of the error of `core.devices` after which another process may do what this one cannot."""

_TRIES = 20
"""Materializations looked at to see how long items have failed: a week takes twelve."""


def retry_reason(
    instance: dg.DagsterInstance, key: dg.AssetKey, made: dg.EventLogRecord | None
) -> str:
    """Why an asset whose items failed is to be made again now; "" where it is not, or not yet.

    `made`: its latest materialization. Failures may pass by themselves, such as too little memory,
    so they are tried again after as long as they have been tried already, for a week.
    """
    failed = _failed(made)
    if made is None or not failed:
        return ""
    tried = made_at(made) - _failing_since(instance, key, made)
    if tried >= GIVE_UP_SECONDS or now() - made_at(made) < pause_after(tried):
        return ""
    return f"{failed} of its items failed at {clock(made_at(made))}"


@dataclass(frozen=True)
class Passing:
    """A failure of a step that may pass without anyone's doing, or by doing that the pipeline does
    not see."""

    what: str
    at: float
    """Seconds since 1970."""


_GPU_LOST = "its GPU was lost"
_DISK_FULL = "the disk was full"
_PAUSES = {_GPU_LOST: FIRST_PAUSE_SECONDS, _DISK_FULL: ROOM_PAUSE_SECONDS}
_REMEDIES = {_GPU_LOST: "look at the machine", _DISK_FULL: "make room"}


def passing(failure: dg.EventLogEntry) -> Passing | None:
    """What a step that failed waits for; None where it failed for a reason that stays."""
    error = failure.get_dagster_event().step_failure_data.error
    while error is not None:
        if error.cls_name == DEVICE_GONE:
            return Passing(_GPU_LOST, failed_at(failure))
        if os.strerror(errno.ENOSPC) in error.message:  # whoever wrote: the store, DuckDB, dbt
            return Passing(_DISK_FULL, failed_at(failure))
        error = error.cause
    return None


def passing_failure(instance: dg.DagsterInstance, run_id: str) -> Passing | None:
    """What a run that failed waits for; None where it failed for a reason that stays."""
    failures = instance.all_logs(run_id, of_type=DagsterEventType.STEP_FAILURE)
    return passing(failures[-1]) if failures else None


def passing_obstacle(failures: Sequence[Passing]) -> str:
    """Why what failed so is not to be tried yet; "" where it is time, or where nothing failed. The
    pauses grow like those of failed items."""
    if not failures:
        return ""
    last = max(failures, key=lambda failure: failure.at)
    tried = last.at - min(failure.at for failure in failures)
    if tried >= GIVE_UP_SECONDS:
        remedy = _REMEDIES[last.what]
        return f"{last.what} {len(failures)} times: {remedy}, and materialize the asset"
    again = last.at + pause_after(tried, _PAUSES[last.what])
    return f"{last.what}; it is tried again after {clock(again)}" if now() < again else ""


def failed_at(failure: dg.EventLogEntry) -> float:
    """When a step failed, in seconds since 1970."""
    return failure.timestamp


def now() -> float:
    """Seconds since 1970."""
    return time.time()


def made_at(record: dg.EventLogRecord) -> float:
    """When a materialization was made, in seconds since 1970."""
    return record.timestamp


def _failing_since(
    instance: dg.DagsterInstance, key: dg.AssetKey, made: dg.EventLogRecord
) -> float:
    """When it was first made with failed items, of the latest times in a row from the same."""
    since = made_at(made)
    for record in materializations(instance, key, _TRIES):
        if _made_from(record) != _made_from(made) or not _failed(record):
            break
        since = made_at(record)
    return since


def _failed(record: dg.EventLogRecord | None) -> int:
    made = record.asset_materialization if record else None
    entry = made.metadata.get(FAILED_ITEMS) if made else None
    return int(str(entry.value)) if entry else 0


def _made_from(record: dg.EventLogRecord) -> Mapping[str, str]:
    """Versions of code and inputs."""
    made = record.asset_materialization
    tags = (made.tags or {}) if made else {}
    return {
        name: value
        for name, value in tags.items()
        if name == CODE_VERSION or name.startswith(INPUT_DATA_VERSION)
    }
