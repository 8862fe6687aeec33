"""When an asset is made again because some of its items failed, or its run lost the accelerator.

What belongs here: whether it is time, by what the event log tells. What does not: how long the
pauses are (`core.retries`), requesting the run (`sweep`), and files outside that could not be read
(`arrivals`).
"""

import time
from collections.abc import Mapping, Sequence

import dagster as dg

from posterpipe.core.retries import clock, pause_after
from posterpipe.defs.metadata import FAILED_ITEMS
from posterpipe.defs.staleness import CODE_VERSION, INPUT_DATA_VERSION

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


def device_obstacle(gone_at: Sequence[float]) -> str:
    """Why an asset is not to be made yet whose runs lost the accelerator at these times, in seconds
    since 1970; "" where it is time, or where none did. The pauses are those of failed items."""
    if not gone_at:
        return ""
    tried = max(gone_at) - min(gone_at)
    if tried >= GIVE_UP_SECONDS:
        return (
            f"its GPU was lost {len(gone_at)} times: look at the machine, and materialize the asset"
        )
    again = max(gone_at) + pause_after(tried)
    if now() < again:
        return f"its GPU was lost; it is tried again after {clock(again)}"
    return ""


def device_gone_at(failure: dg.EventLogEntry) -> float | None:
    """When a step failed, in seconds since 1970, if it lost the accelerator; else None."""
    error = failure.get_dagster_event().step_failure_data.error
    while error is not None and error.cls_name != DEVICE_GONE:
        error = error.cause
    return None if error is None else failed_at(failure)


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
    for record in instance.fetch_materializations(key, limit=_TRIES).records:
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
