"""The safety net behind the policy: a sensor that requests what is stale.

What belongs here: which of the stale assets are requested, and when. What does not: what is stale
(`staleness`), and the policy that takes up changes as they happen (`automation`).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

import dagster as dg
from dagster import DagsterEventType, DagsterRunStatus
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecord
from dagster._core.storage.asset_check_execution_record import (
    AssetCheckExecutionRecordStatus as Status,
)

from posterpipe.core.retries import ATTEMPTS
from posterpipe.defs.arrivals import REASON_TAG, UNFINISHED
from posterpipe.defs.automation import ON_SCHEDULE, all_upstream
from posterpipe.defs.dbt_reports import reports_mistake
from posterpipe.defs.resources import Deployment
from posterpipe.defs.retries import Passing, passing, passing_obstacle, retry_reason
from posterpipe.defs.staleness import (
    Models,
    data_version,
    digest,
    is_adopted,
    is_of,
    latest_materializations,
    made_or_wiped,
    materializations,
    other_base_model,
    staleness,
)

SWEEP_SECONDS = 60
"""Seconds between two sweeps. The policy looks more often, so that it is first as a rule."""

_EVENTS = 100
"""Events read of one asset; more runs or versions do not change what is decided."""


@dg.sensor(
    name="stale_sweep",
    target=dg.AssetSelection.all(),
    minimum_interval_seconds=SWEEP_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Requests what does not match what it is made from and what the policy has not "
    "taken up: changes that it could not see, code and settings of assets without inputs, replaced "
    "models, lost files, items that failed. Says in its skip reason what is stale, and why it "
    "waits.",
)
def stale_sweep(
    context: dg.SensorEvaluationContext, deployment: dg.ResourceParam[Deployment]
) -> dg.SensorResult:
    """The safety net behind the policy: judges by what is recorded now, whatever happened before.

    Requests the most upstream of the stale assets, each in a run of its own; what is downstream
    then follows by data version. An asset is requested when two sweeps in a row find it ready with
    the same inputs, so that the policy comes first. It is not requested while it or something
    upstream is being made (a training holds up only what reads it, as in the policy), while a
    blocking check of an input has not passed or the checkpoint is another base model's, or when it
    failed ATTEMPTS times, was canceled, or stayed stale with the same inputs, code and model. What
    failed gets a new chance when an input is made again, also with the same content: that is how a
    damaged table is mended. A checkpoint is requested where nothing but its table is lost, which
    trains nothing. Failures for want of an accelerator or of room on the disk do not count: they
    are tried again after ever longer pauses (`retries`). A report that dbt cannot read is not there
    to be stale: that is told first.
    """
    repository = context.repository_def
    assert repository is not None, "a sensor of a code location has its repository"
    tick = _Sweep(repository, context.instance, deployment, _read_cursor(context.cursor))
    requests, waiting, memory = tick.decide()
    for request in requests:
        context.log.info(f"{request.run_key}: {request.tags[REASON_TAG]}")
    told = [mistake, *waiting] if (mistake := reports_mistake(deployment.settings)) else waiting
    if mistake and requests:
        context.log.error(mistake)
    return dg.SensorResult(
        run_requests=requests,
        skip_reason=None if requests else "; ".join(told) or "everything matches its inputs",
        cursor=json.dumps({name: asdict(known) for name, known in memory.items()}),
    )


@dataclass(frozen=True)
class _Known:
    """What the sweep remembers of an asset that is stale, until it is not."""

    made_with: str
    """Digest of its code version and model."""
    since: int
    """Failures before this event of the log do not count: code or model were others."""
    state: str
    """Digest of `made_with`, the versions of its inputs, and when these were made."""
    requested: int
    """How often the sweep requested it in that state."""
    ready: str
    """The run key under which the last sweep would have requested it, or ""."""


def _read_cursor(cursor: str | None) -> dict[str, _Known]:
    try:
        return {name: _Known(**known) for name, known in json.loads(cursor or "{}").items()}
    except (ValueError, TypeError):
        return {}  # of another version; what is remembered only spares requests


@dataclass(frozen=True)
class _Outcome:
    """How a run ended that tried to make an asset."""

    status: DagsterRunStatus
    passing: Passing | None = None
    """What it waits for; None where it did not fail so."""


class _Sweep:
    """One look at all assets."""

    def __init__(
        self,
        repository: dg.RepositoryDefinition,
        instance: dg.DagsterInstance,
        deployment: Deployment,
        known: Mapping[str, _Known],
    ) -> None:
        self._instance = instance
        self._deployment = deployment
        self._known = known
        self._specs = {
            key: assets.specs_by_key[key]
            for key, assets in repository.assets_defs_by_key.items()
            if assets.is_executable
        }
        self._reads = {
            key: [dep.asset_key for dep in spec.deps] for key, spec in self._specs.items()
        }
        graph = repository.asset_graph
        checks = [key for key in graph.asset_check_keys if graph.get_check_spec(key).blocking]
        self._blocking: dict[dg.AssetKey, list[dg.AssetCheckKey]] = {}
        for check in sorted(checks):
            self._blocking.setdefault(check.asset_key, []).append(check)
        self._latest = latest_materializations(instance, self._specs)
        self._checked = instance.event_log_storage.get_latest_asset_check_execution_by_key(checks)
        self._models = Models(deployment)

    def decide(self) -> tuple[list[dg.RunRequest], list[str], dict[str, _Known]]:
        """What to request, why the rest of what is stale waits, and what to remember."""
        stale = {key: reason for key in self._specs if (reason := self._reason(key))}
        if not stale:
            return [], [], {}
        running = self._running()
        memory: dict[str, _Known] = {}
        waiting: list[str] = []
        ready: dict[dg.AssetKey, str] = {}
        for key, reason in stale.items():
            name = key.to_user_string()
            known = memory[name] = self._remember(key)
            run_key, obstacle = self._judge(key, known, running)
            if obstacle:
                waiting.append(f"{name}: {reason}, but {obstacle}")
            else:
                ready[key] = run_key
        requests = []
        for key, run_key in ready.items():
            name = key.to_user_string()
            known = memory[name]
            first = {*all_upstream(key, self._reads)} & (running | ready.keys())
            if first:
                waiting.append(f"{name}: {stale[key]}, but {_names(first)} comes first")
            elif name in self._known and self._known[name].ready == run_key:
                tags = {REASON_TAG: stale[key]}
                requests.append(dg.RunRequest(run_key, asset_selection=[key], tags=tags))
                memory[name] = replace(known, requested=known.requested + 1)
            else:
                waiting.append(f"{name}: {stale[key]}, requested at the next look")
                memory[name] = replace(known, ready=run_key)
        return requests, waiting, memory

    def _reason(self, key: dg.AssetKey) -> str:
        """Why an asset is to be made again; "" when it is not."""
        reason = staleness(self._specs[key], self._latest, self._deployment, self._models)
        if reason:
            return reason
        # As after a run that died between an asset and its check, which holds up what follows.
        unchecked = [check.name for check in self._blocking.get(key, []) if self._not_run(check)]
        if unchecked:
            return f"its check {unchecked[0]} did not run"
        return retry_reason(self._instance, key, self._latest[key])

    def _judge(self, key: dg.AssetKey, known: _Known, running: set[dg.AssetKey]) -> tuple[str, str]:
        """The run key of a stale asset, and what stands in the way of requesting it."""
        name = key.to_user_string()
        if key.path[-1] in ON_SCHEDULE and not is_adopted(
            self._specs[key], self._latest, self._deployment, self._models
        ):
            return "", "it follows its schedule"
        if key in running:
            return "", "it is being made"
        for upstream in self._reads[key]:
            if self._latest.get(upstream) is None:
                return "", f"{upstream.to_user_string()} was never made"
            for check in self._blocking.get(upstream, []):
                if not self._passed(check):
                    blocked = f"{check.name} of {upstream.to_user_string()}"
                    return "", f"a blocking check has not passed: {blocked}"
        if obstacle := other_base_model(
            key, self._reads[key], self._latest, self._deployment, self._models
        ):
            return "", obstacle
        outcomes = self._outcomes(key, known.since)
        if any(outcome.status == DagsterRunStatus.CANCELED for outcome in outcomes):
            return "", "its run was canceled: materialize it, or change something"
        failures = sum(outcome.status == DagsterRunStatus.FAILURE for outcome in outcomes)
        passes = [outcome.passing for outcome in outcomes if outcome.passing is not None]
        if failures - len(passes) >= ATTEMPTS:
            return "", f"it failed {failures} times with these inputs"
        if known.requested - len(passes) >= ATTEMPTS:  # those runs made nothing
            return "", "it stayed so when it was made again"
        if obstacle := passing_obstacle(passes):
            return "", obstacle
        since = made_or_wiped(self._instance, key, self._latest[key])
        return f"{name}-{digest(known.state, since, failures)[:16]}", ""

    def _remember(self, key: dg.AssetKey) -> _Known:
        spec = self._specs[key]
        known = self._known.get(key.to_user_string())
        made_with = digest(spec.code_version, self._models.fingerprint(key))[:16]
        since = known.since if known else 0
        if known and known.made_with != made_with:
            since = self._instance.event_log_storage.get_maximum_record_id() or 0
        versions = {}
        for upstream in self._reads[key]:
            record = self._latest.get(upstream)
            made = record.storage_id if record else 0
            versions[upstream.to_user_string()] = (data_version(record), made)
        state = digest(made_with, versions)[:16]
        requested = known.requested if known and known.state == state else 0
        return _Known(made_with, since, state, requested, ready="")

    def _running(self) -> set[dg.AssetKey]:
        """Assets that a run is to make and has not made yet."""
        running: set[dg.AssetKey] = set()
        for run in self._instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)):
            assets: dict[DagsterEventType, set[dg.AssetKey]] = {
                DagsterEventType.ASSET_MATERIALIZATION_PLANNED: set(),
                DagsterEventType.ASSET_MATERIALIZATION: set(),
            }
            for entry in self._instance.all_logs(run.run_id, of_type=set(assets)):
                event = entry.get_dagster_event()
                if event.asset_key:
                    assets[event.event_type].add(event.asset_key)
            planned, made = assets.values()
            running |= planned - made
        return running

    def _passed(self, check: dg.AssetCheckKey) -> bool:
        """Whether a check passed on the latest materialization, as the policy judges it."""
        record = self._checked.get(check)
        return record is not None and record.status == Status.SUCCEEDED and self._is_latest(record)

    def _not_run(self, check: dg.AssetCheckKey) -> bool:
        """Whether nothing is known, or will be, of a check on the latest materialization."""
        record = self._checked.get(check)
        if record is None:
            return True
        if record.status == Status.PLANNED:
            run = self._instance.get_run_by_id(record.run_id)
            return run is None or run.is_finished
        return not self._is_latest(record)

    def _is_latest(self, record: AssetCheckExecutionRecord) -> bool:
        return is_of(record, self._latest.get(record.key.asset_key))

    def _outcomes(self, key: dg.AssetKey, since: int) -> list[_Outcome]:
        """How the runs ended that tried to make the asset from what its inputs are now."""
        made = self._latest[key]
        planned = self._instance.event_log_storage.get_event_records(
            dg.EventRecordsFilter(
                DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
                asset_key=key,
                after_cursor=max(since, made.storage_id if made else 0),
            ),
            limit=_EVENTS,
        )
        if not planned:
            return []
        began = max(map(self._version_began, self._reads[key]), default=0)
        inputs = [record for name in self._reads[key] if (record := self._latest.get(name))]
        made_again = max((record.storage_id for record in inputs), default=0)
        steps = {
            record.run_id: (record.storage_id, record.event_log_entry.get_dagster_event().step_key)
            for record in planned
            if record.storage_id > began
        }
        if not steps:
            return []
        outcomes = []
        for run in self._instance.get_runs(dg.RunsFilter(run_ids=list(steps))):
            event, step = steps[run.run_id]
            outcome = self._outcome(run, step)
            canceled = run.status == DagsterRunStatus.CANCELED  # which a person meant
            if outcome is not None and (canceled or event > made_again):
                outcomes.append(outcome)
        return outcomes

    def _outcome(self, run: dg.DagsterRun, step: str | None) -> _Outcome | None:
        """How a run ended; None where a step failed and it did not come as far as this one. What a
        person stopped, they stopped as a whole."""
        kinds = {DagsterEventType.STEP_START, DagsterEventType.STEP_FAILURE}
        log = self._instance.all_logs(run.run_id, of_type=kinds)
        own = [entry for entry in log if entry.get_dagster_event().step_key == step]
        failed = any(entry.get_dagster_event().is_step_failure for entry in log)
        if not own and failed and run.status != DagsterRunStatus.CANCELED:
            return None
        failures = [entry for entry in own if entry.get_dagster_event().is_step_failure]
        return _Outcome(run.status, passing(failures[-1]) if failures else None)

    def _version_began(self, key: dg.AssetKey) -> int:
        """Since which event of the log an asset has the data version that it has now."""
        records = materializations(self._instance, key, _EVENTS)
        began = 0
        for record in records:
            if data_version(record) != data_version(records[0]):
                break
            began = record.storage_id
        return began


def _names(keys: Iterable[dg.AssetKey]) -> str:
    return ", ".join(sorted(key.to_user_string() for key in keys))
