"""When the model is trained again.

What belongs here: the schedule, where the facts for its decision come from, and what the latest
checkpoint was trained on. What does not: the decision (`core.training.retraining`) and the training
(`training`). Other assets follow their inputs at once (`automation`); a training costs hours of a
GPU, so it waits for the night and for enough changes.
"""

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import dagster as dg
from dagster import DagsterEventType, DagsterRunStatus
from dagster._core.storage.asset_check_execution_record import (
    AssetCheckExecutionRecordStatus as Status,
)

from posterpipe.defs.arrivals import REASON_TAG, UNFINISHED, reading_problem
from posterpipe.defs.automation import retrain
from posterpipe.defs.metadata import DATA_VERSION
from posterpipe.defs.resources import Deployment
from posterpipe.defs.retries import passing_failure
from posterpipe.defs.staleness import (
    CHECKPOINT,
    digest,
    is_of,
    latest_materializations,
    materializations,
    stale_assets,
    used_version,
)
from posterpipe.defs.timing import cron_of
from posterpipe.settings import Settings

if TYPE_CHECKING:
    from posterpipe.core.training.retraining import Situation

TRAINING_SET = dg.AssetKey("training_csv")

STATE_TAG = "posterpipe/training_state"
"""Tag of the runs that the schedule starts: what was to be trained, after which checkpoint."""

_VERSIONS = 1000
"""Materializations of the training set that are looked through for the oldest change."""


def schedules(settings: Settings) -> tuple[dg.ScheduleDefinition, ...]:
    """The schedule of this module, as the settings say. Raises SettingsError for a wrong cron."""
    automation = settings.automation

    def training(
        context: dg.ScheduleEvaluationContext, deployment: dg.ResourceParam[Deployment]
    ) -> dg.RunRequest | dg.SkipReason:
        return consider_training(context, deployment, dt.datetime.now(dt.UTC))

    decorated = dg.schedule(
        name="training",
        job=retrain,
        cron_schedule=automation.training_cron,
        execution_timezone=automation.training_timezone,
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Starts `retrain` when the training set is another one than the latest "
        f"checkpoint was trained on, and at least {automation.min_new_posters} posters came, went "
        f"or got another caption, or the change is {automation.max_age_days:g} days old; also when "
        "there is no checkpoint, or its settings, code or base model changed. Else it says why.",
    )
    with cron_of("automation.training_cron", automation.training_cron):
        return (decorated(training),)


def consider_training(
    context: dg.ScheduleEvaluationContext, deployment: Deployment, now: dt.datetime
) -> dg.RunRequest | dg.SkipReason:
    """A run of `retrain`, or why there is none. `now` decides how old changes are."""
    from posterpipe.core.training.retraining import decide

    facts, state = _facts(context, deployment)
    decision = decide(facts, deployment.settings.automation, now)
    if not decision.train:
        return dg.SkipReason(decision.reason)
    # Ticks do not share run keys in Dagster: what keeps the next tick from a second run is that
    # `_facts` finds the first one.
    return dg.RunRequest(
        f"{state}-{len(facts.failed_runs)}",
        # By name, since a run of the whole job names no assets, and the policy would not see that
        # what follows the checkpoint is made in this run, and request it again. The job begins at
        # the posters: what was deleted meanwhile, or is held back by a check, is not trained on.
        asset_selection=sorted(
            context.repository_def.get_job(retrain.name).asset_layer.executable_asset_keys
        ),
        tags={STATE_TAG: state, REASON_TAG: decision.reason},
    )


def _facts(
    context: dg.ScheduleEvaluationContext, deployment: Deployment
) -> tuple["Situation", str]:
    """What the decision rests on, and the tag of runs for exactly this training."""
    from posterpipe.core.training.retraining import Situation, compare, differing_since

    instance = context.instance
    sets = materializations(instance, TRAINING_SET, _VERSIONS)
    versions = [
        (_tag(record, DATA_VERSION), dt.datetime.fromtimestamp(record.timestamp, dt.UTC))
        for record in sets
    ]
    checkpoints = materializations(instance, CHECKPOINT, 1)
    checkpoint = checkpoints[0] if checkpoints else None
    made = checkpoint.asset_materialization if checkpoint else None
    trained = (used_version(made, TRAINING_SET) or "") if made else ""
    current = versions[0][0] if versions else ""
    spec, other_reason = _other_reason(context, deployment)
    state = digest(
        current, trained, other_reason, spec.code_version, checkpoint and checkpoint.storage_id
    )[:16]
    tried = instance.get_run_records(dg.RunsFilter(tags={STATE_TAG: state}))
    graph = context.repository_def.asset_graph
    upstream = dg.AssetSelection.assets(TRAINING_SET).upstream().resolve(graph)
    latest = latest_materializations(instance, upstream)
    folders = deployment.store_root / "training_sets"
    situation = Situation(
        current=current,
        trained=trained,
        other_reason=other_reason,
        changes=compare(folders / trained, folders / current) if trained and current else None,
        changed_at=differing_since(versions, trained),
        failed_checks=_failed_checks(context, latest),
        unreadable=reading_problem(deployment),
        running=_running(instance),
        failed_runs=_failed_runs(instance, tried, latest),
        canceled_run=next(iter(_with_status(tried, DagsterRunStatus.CANCELED)), ""),
    )
    return situation, state


def _tag(record: dg.EventLogRecord, name: str) -> str:
    made = record.asset_materialization
    return str((made.tags or {}).get(name, "")) if made else ""


def _other_reason(
    context: dg.ScheduleEvaluationContext, deployment: Deployment
) -> tuple[dg.AssetSpec, str]:
    """The checkpoint's specification, and why it does not hold whatever its training set is."""
    definitions = context.repository_def.assets_defs_by_key
    spec = definitions[CHECKPOINT].specs_by_key[CHECKPOINT]
    others = [dep for dep in spec.deps if dep.asset_key != TRAINING_SET]
    specs = [
        spec.replace_attributes(deps=others),
        *(definitions[dep.asset_key].specs_by_key[dep.asset_key] for dep in others),
    ]
    reason = stale_assets(specs, context.instance, deployment).get(CHECKPOINT, "")
    return spec, f"the checkpoint does not hold: {reason}" if reason else ""


def _with_status(runs: Iterable[dg.RunRecord], status: DagsterRunStatus) -> list[str]:
    return [run.dagster_run.run_id for run in runs if run.dagster_run.status == status]


def _failed_runs(
    instance: dg.DagsterInstance,
    tried: Sequence[dg.RunRecord],
    latest: Mapping[dg.AssetKey, dg.EventLogRecord | None],
) -> list[str]:
    """Those of the runs that the schedule started whose failure still counts.

    That of a training does. A run that failed before, when posters or captions were read, does not
    once another run has made one of these since: what was wrong was mended, and what comes out may
    be the same training set. One for want of a GPU or of room on the disk does not: another night
    may have both. `latest`: the materializations of that set, and of what it is made from.
    """
    began = {
        run.dagster_run.run_id: run.start_time or run.create_timestamp.timestamp() for run in tried
    }
    made_at = max(
        (record.timestamp for record in latest.values() if record and record.run_id not in began),
        default=0.0,
    )
    return [
        run_id
        for run_id in _with_status(tried, DagsterRunStatus.FAILURE)
        if (made_at < began[run_id] or _trained(instance, run_id))
        and passing_failure(instance, run_id) is None
    ]


def _trained(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Whether a run came as far as the training."""
    log = instance.all_logs(run_id, of_type=DagsterEventType.STEP_START)
    return any(entry.get_dagster_event().step_key == CHECKPOINT.path[-1] for entry in log)


def _failed_checks(
    context: dg.ScheduleEvaluationContext,
    latest: Mapping[dg.AssetKey, dg.EventLogRecord | None],
) -> list[str]:
    """Blocking checks of the training set, and of what it is made from, that did not pass.

    Those of an earlier materialization, and those that never ran, do not count: the run makes
    these assets again, and stops where a check does not pass.
    """
    graph = context.repository_def.asset_graph
    checks = [key for key in graph.asset_check_keys if key.asset_key in latest]
    blocking = [key for key in checks if graph.get_check_spec(key).blocking]
    found = context.instance.event_log_storage.get_latest_asset_check_execution_by_key(blocking)
    failed = []
    for check, record in found.items():
        # Planned ones are recorded as well, by something else than an evaluation.
        evaluation = record.evaluation if record.status == Status.FAILED else None
        if (
            evaluation is not None
            and evaluation.severity == dg.AssetCheckSeverity.ERROR
            and is_of(record, latest[check.asset_key])
        ):
            described = evaluation.description or "no description"
            failed.append(f"{check.name} of {check.asset_key.path[-1]} ({described})")
    return sorted(failed)


def _running(instance: dg.DagsterInstance) -> str:
    """The run that makes a checkpoint, or is about to; "" for none."""
    planned = DagsterEventType.ASSET_MATERIALIZATION_PLANNED
    for run in instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)):
        for entry in instance.all_logs(run.run_id, of_type=planned):
            if entry.get_dagster_event().asset_key == CHECKPOINT:
                return run.run_id
    return ""


def captions_trained_on(
    instance: dg.DagsterInstance, deployment: Deployment
) -> Mapping[str, str] | None:
    """The training set of the latest checkpoint, captions by file name; None where it is not there
    any more, and where its posters came from another place than those of now."""
    from posterpipe.core.training.retraining import captions_in

    records = materializations(instance, CHECKPOINT, 1)
    made = records[0].asset_materialization if records else None
    version = used_version(made, TRAINING_SET) if made else None
    then = _landing_before(instance, records[0].storage_id) if records else None
    now = _landing_before(instance)
    if not version or (then and now and then != now):
        return None
    return captions_in(deployment.store_root / "training_sets" / version)


def _landing_before(instance: dg.DagsterInstance, storage_id: int | None = None) -> str | None:
    """Where the posters lay that were read last before an event of the log; None if not on
    record."""
    posters = dg.AssetRecordsFilter(dg.AssetKey("raw_posters"), before_storage_id=storage_id)
    for record in materializations(instance, posters, 1):
        made = record.asset_materialization
        folder = made.metadata.get("folder") if made else None
        return str(folder.value) if folder else None
    return None
