"""Telling people about runs and checks that failed.

What belongs here: the sensor, and what the instance knows of a failure. What does not: the message
and how it is sent (`core.alerts`).

Dagster's own `run_failure_sensor` looks at each failure once, whether or not its function got the
message through. This sensor looks at the failed runs of a day and tells of those that nobody was
told of, which a tag of the run says, so a mail server that is down for an hour delays a message and
loses none.

A blocking check that fails makes its run fail, and the run's message tells what was found. The
other checks leave their run alone: those that fail as errors are told of by themselves, once until
they pass.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster import DagsterEventType, DagsterRunStatus
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluation
from dagster._core.storage.asset_check_execution_record import (
    AssetCheckExecutionRecordStatus as Status,
)

from posterpipe.core.retries import clock
from posterpipe.defs.arrivals import REASON_TAG
from posterpipe.defs.launcher import under_lease
from posterpipe.defs.resources import Deployment
from posterpipe.settings import Settings

if TYPE_CHECKING:
    from posterpipe.core.alerts import Alert, FailedRun

TOLD_TAG = "posterpipe/told"
"""Tag of failed runs: over which channels people were told."""

MESSAGES_PER_TICK = 3
"""Each can take half a minute when receivers hang, and both channels work at the same time."""

TICK_INTERVAL_SECONDS = 30
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0
"""Seconds until a message that did not get through is tried again; doubled each time."""

TICK_BUDGET_SECONDS = 25.0
"""After so long no further message is begun: Dagster gives a sensor a minute."""


def sensors(settings: Settings) -> tuple[dg.SensorDefinition, ...]:
    """The sensor of this module: on where a receiver is configured, else off."""
    from posterpipe.core.alerts import channels

    on = bool(channels(settings.alerts))

    @dg.sensor(
        name="failure_alerts",
        minimum_interval_seconds=TICK_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING if on else dg.DefaultSensorStatus.STOPPED,
        description="Tells people of runs that failed, and of checks that failed as errors, over a "
        "webhook, by e-mail, or both. Off until `alerts.webhook_url` or `alerts.email_to` is set "
        "(POSTERPIPE_ALERTS__WEBHOOK_URL, POSTERPIPE_ALERTS__EMAIL_TO). What could not be sent is "
        "tried again; a run's tag `posterpipe/told` says who was told.",
    )
    def failure_alerts(
        context: dg.SensorEvaluationContext, deployment: dg.ResourceParam[Deployment]
    ) -> dg.SensorResult:
        return tell(context, deployment.settings)

    return (failure_alerts,)


@dataclass
class _Memory:
    """What the sensor's cursor holds."""

    since: float
    """When the sensor began: what failed before is history, not news."""
    tried: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Failures, by run id or check, whose message did not get through: how often it was tried, and
    when to try again."""
    checks: dict[str, list[str]] = field(default_factory=dict)
    """Checks that have not passed since people were told of them: over which channels."""

    @classmethod
    def of(cls, cursor: str | None, now: float) -> "_Memory":
        try:
            held = json.loads(cursor or "")
            tried = {name: (int(count), float(at)) for name, (count, at) in held["tried"].items()}
            return cls(float(held["since"]), tried, dict(held["checks"]))
        except (ValueError, TypeError, KeyError, AttributeError):
            return cls(now)


@dataclass(frozen=True)
class _Failure:
    """A run or a check that failed."""

    name: str
    """Of the memory: the run's id, or the check."""
    label: str
    """In words."""
    told: list[str]
    """Channels over which people were told."""
    alert: Callable[[], "Alert"]
    """Reads what the message says."""
    mark: Callable[[list[str]], None]
    """Keeps over which channels people are told now."""


def tell(
    context: dg.SensorEvaluationContext, settings: Settings, now: float | None = None
) -> dg.SensorResult:
    """One look: tell of failures that nobody was told of. Says what it did as skip reason."""
    from posterpipe.core.alerts import channels

    now = time.time() if now is None else now
    memory = _Memory.of(context.cursor, now)
    configured = channels(settings.alerts)
    if not configured:
        reason = (
            "nobody to tell: set POSTERPIPE_ALERTS__WEBHOOK_URL or POSTERPIPE_ALERTS__EMAIL_TO, "
            "and load the code location again"
        )
        return dg.SensorResult(skip_reason=reason, cursor=json.dumps(asdict(memory)))
    started = time.monotonic()
    oldest = max(memory.since, now - settings.alerts.max_age_hours * 3600)
    said: list[str] = []
    tried: dict[str, tuple[int, float]] = {}
    waiting = 0
    for failure in (
        *_failed_runs(context, settings, oldest),
        *_failed_checks(context, settings, memory, oldest),
    ):
        to_tell = [channel for channel in configured if channel not in failure.told]
        if not to_tell:
            continue
        count, not_before = memory.tried.get(failure.name, (0, 0.0))
        late = len(said) >= MESSAGES_PER_TICK or time.monotonic() - started > TICK_BUDGET_SECONDS
        if late or now < not_before:
            waiting += 1
            tried |= {failure.name: (count, not_before)} if count else {}
            continue
        outcome, complete = _tell_of(context, failure, to_tell, settings)
        said.append(outcome)
        if not complete:
            pause = min(FIRST_PAUSE * 2**count, LONGEST_PAUSE)
            tried[failure.name] = (count + 1, now + pause)
    if waiting:
        said.append(f"{waiting} failures are told of later")
    reason = "; ".join(said) or f"nothing failed untold since {clock(oldest)}"
    memory.tried = tried
    return dg.SensorResult(skip_reason=reason, cursor=json.dumps(asdict(memory)))


def _failed_runs(
    context: dg.SensorEvaluationContext, settings: Settings, oldest: float
) -> Iterator[_Failure]:
    """The runs that failed since then."""
    from posterpipe.core.alerts import compose

    instance = context.instance

    def of(run: dg.DagsterRun, ended_at: float) -> _Failure:
        return _Failure(
            run.run_id,
            f"run {run.run_id[:8]}",
            _told_of(run),
            lambda: compose(failed_run(instance, run, ended_at), settings.alerts),
            lambda told: instance.add_run_tags(
                run.run_id, {TOLD_TAG: f"{run.run_id[:8]}: {', '.join(told)}"}
            ),
        )

    failed = dg.RunsFilter(
        statuses=[DagsterRunStatus.FAILURE], updated_after=datetime.fromtimestamp(oldest, UTC)
    )
    for record in instance.get_run_records(failed, ascending=True):
        ended_at = record.end_time or record.update_timestamp.timestamp()
        if ended_at >= oldest:
            yield of(record.dagster_run, ended_at)


def _failed_checks(
    context: dg.SensorEvaluationContext, settings: Settings, memory: _Memory, oldest: float
) -> Iterator[_Failure]:
    """The checks that failed as errors since then, of runs that did not fail; those that passed are
    forgotten."""
    from posterpipe.core.alerts import FailedCheck, channels, compose_check

    def of(name: str, check: FailedCheck) -> _Failure:
        return _Failure(
            name,
            f"check {name}",
            memory.checks.get(name, []),
            lambda: compose_check(check, settings.alerts),
            lambda told: memory.checks.update({name: told}),
        )

    assert context.repository_def is not None
    graph = context.repository_def.asset_graph
    keys = [key for key in graph.asset_check_keys if not graph.get_check_spec(key).blocking]
    latest = context.instance.event_log_storage.get_latest_asset_check_execution_by_key(keys)
    for key, record in sorted(latest.items()):
        asset = key.asset_key.to_user_string()
        name = f"{asset}: {key.name}"
        evaluation, entry = record.evaluation, record.event
        if record.status == Status.PLANNED or evaluation is None or entry is None:
            continue  # its run is going on, or ended without looking
        if not _is_error(evaluation):
            memory.checks.pop(name, None)
            continue
        run = context.instance.get_run_by_id(record.run_id)
        if entry.timestamp < oldest or run is None or not run.is_finished:
            continue
        if run.status == DagsterRunStatus.FAILURE:  # the message about the run says it
            memory.checks[name] = channels(settings.alerts)
            continue
        yield of(
            name, FailedCheck(asset, key.name, _found(evaluation), run.run_id, entry.timestamp)
        )


def _tell_of(
    context: dg.SensorEvaluationContext, failure: _Failure, to_tell: list[str], settings: Settings
) -> tuple[str, bool]:
    """Sends the message about one failure and marks it. What came of it, in words, and whether
    everyone is told now."""
    from posterpipe.core.alerts import AlertNotSent, send

    alert = failure.alert()

    def problem_of(channel: str) -> str:
        try:
            send(alert, channel, settings.alerts)
        except AlertNotSent as error:
            return str(error)
        except Exception as error:  # whatever it is, the other failures are to be told of
            return type(error).__name__
        return ""

    with ThreadPoolExecutor(len(to_tell)) as pool:
        problems = dict(zip(to_tell, pool.map(problem_of, to_tell), strict=True))
    sent = [channel for channel, problem in problems.items() if not problem]
    if sent:
        failure.mark([*failure.told, *sent])
    parts = [f"told by {channel}" for channel in sent]
    for channel, problem in problems.items():
        if problem:
            parts.append(f"not told by {channel}, to be tried again: {problem}")
            context.log.warning(f"{failure.label}: {parts[-1]}")
    return f"{failure.label}: {', '.join(parts)}", len(sent) == len(to_tell)


def failed_run(instance: dg.DagsterInstance, run: dg.DagsterRun, ended_at: float) -> "FailedRun":
    """What the instance knows of a failed run."""
    from posterpipe.core.alerts import FailedRun

    reasons = [
        (event.step_key or "", reason_of(event.step_failure_data.error))
        for event in _events(instance, run.run_id, DagsterEventType.STEP_FAILURE)
    ]
    if not reasons:
        reasons = [
            ("", event.message or "")
            for event in _events(instance, run.run_id, DagsterEventType.RUN_FAILURE)
        ]
    looked_at = [
        event.asset_check_evaluation_data
        for event in _events(instance, run.run_id, DagsterEventType.ASSET_CHECK_EVALUATION)
    ]
    name = run.job_name
    if name == "__ASSET_JOB" and run.asset_selection:
        keys = sorted(key.to_user_string() for key in run.asset_selection)
        name = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    return FailedRun(
        run.run_id,
        name,
        reasons,
        started_by=_started_by(run),
        why=run.tags.get(REASON_TAG, ""),
        ended_at=ended_at,
        retried="dagster/did_retry" in run.tags,
        checks=[
            (f"{check.asset_key.to_user_string()}: {check.check_name}", _found(check))
            for check in looked_at
            if _is_error(check)
        ],
    )


def _is_error(evaluation: AssetCheckEvaluation) -> bool:
    return not evaluation.passed and evaluation.severity == dg.AssetCheckSeverity.ERROR


def _found(evaluation: AssetCheckEvaluation) -> str:
    return evaluation.description or "it does not say what it found; its metadata may"


def reason_of(error: Any) -> str:
    """What a step's error says: posterpipe's own sentence where there is one among its causes, else
    the innermost message with its class."""
    if error is None:
        return ""
    while True:
        message = str(error.message).strip()
        name, _, rest = message.partition(": ")
        if name.startswith("posterpipe.") and rest:
            return rest
        if error.cause is None:
            return message
        error = error.cause


def _events(
    instance: dg.DagsterInstance, run_id: str, kind: DagsterEventType
) -> list[dg.DagsterEvent]:
    records = instance.get_records_for_run(run_id, of_type=kind).records
    return [
        record.event_log_entry.dagster_event
        for record in records
        if record.event_log_entry.dagster_event is not None
    ]


def _started_by(run: dg.DagsterRun) -> str:
    for kind in ("sensor", "schedule"):
        if name := run.tags.get(f"dagster/{kind}_name"):
            return f"the {kind} {name}"
    return "posterpipe demo" if under_lease(run) else "a person"


def _told_of(run: dg.DagsterRun) -> list[str]:
    """Over which channels people were told of a run. One that is executed again in the UI has the
    tags of the run before, of which alone they were told."""
    run_id, _, channels = run.tags.get(TOLD_TAG, "").rpartition(":")
    mine = run_id == run.run_id[:8]
    return [name.strip() for name in channels.split(",")] if mine else []
