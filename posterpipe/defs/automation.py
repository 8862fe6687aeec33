"""When assets are materialized: the policy of what follows by itself, its sensor, and jobs.

What belongs here: one policy for all assets, jobs for people and schedules. What does not: what is
made from what (the assets), which assets are stale (`staleness`) and the net behind the policy
(`sweep`), and the sensors that watch the outside world.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any

import dagster as dg
from dagster._core.definitions.sensor_definition import SensorExecutionData

from posterpipe.defs.arrivals import REASON_TAG
from posterpipe.defs.overview import OVERVIEW
from posterpipe.defs.resources import Deployment
from posterpipe.defs.staleness import (
    Models,
    latest_materializations,
    other_base_model,
    recorded_difference,
)

Condition = dg.AutomationCondition

ON_SCHEDULE = ("dreambooth_checkpoint",)
"""Assets that cost hours and follow a schedule of their own: nothing here requests them."""

TICK_SECONDS = 15
"""Seconds between two evaluations of the policy: 0.1 s of work each, and a change takes one tick
for each asset of the chain below it."""

BY_HAND = {REASON_TAG: "asked for by a person"}
"""Tag of a job's runs; what starts one by itself gives its own reason."""

refresh_dataset = dg.define_asset_job(
    "refresh_dataset",
    dg.AssetSelection.groups("ingest", "dataset"),
    description="Posters, captions and the training set, without a training. Takes seconds with "
    "few new posters, since what is known is not resized or captioned again. The sensor `arrivals` "
    "does the same by itself.",
    tags=BY_HAND,
)
retrain = dg.define_asset_job(
    "retrain",
    dg.AssetSelection.groups("ingest", "dataset")
    | dg.AssetSelection.assets("dreambooth_checkpoint").upstream()
    | dg.AssetSelection.assets("dreambooth_checkpoint").downstream()
    # Of the same base model as the checkpoint, also right after another one was chosen.
    | dg.AssetSelection.assets("base_generations"),
    description="Reads the posters and captions as they are now, fine-tunes on them, then draws, "
    "scores, judges and publishes. The schedule `training` starts it at night when enough is new; "
    "by hand it does not wait, and the launchpad takes other training settings for one run.",
    tags=BY_HAND,
)
evaluate = dg.define_asset_job(
    "evaluate",
    dg.AssetSelection.groups("generation", "scoring", "reports"),
    description="Draws the prompt suite with the models as they are, scores, judges and publishes. "
    "Nothing is trained, and images that exist are not drawn again: cheap after a change of the "
    "suite, a metric or a report.",
    tags=BY_HAND,
)
everything = dg.define_asset_job(
    "everything",
    dg.AssetSelection.all(),
    description=OVERVIEW,
    tags=BY_HAND,
)

JOBS = (refresh_dataset, retrain, evaluate, everything)


@dataclass(frozen=True)
class Differs(dg.AutomationCondition[dg.AssetKey]):
    """An asset whose latest materialization was made from other versions of its inputs, or by
    another code version, than there are now.

    Level-triggered, and of what is recorded: whoever made the asset, and whatever changed there
    and back meanwhile. Dagster has no such condition; one of our own is evaluated in the code
    location's process (`use_user_code_server`).
    """

    @property
    def name(self) -> str:
        """As the UI shows it."""
        return "differs from what it is made from"

    def evaluate(
        self, context: dg.AutomationContext[dg.AssetKey]
    ) -> dg.AutomationResult[dg.AssetKey]:
        """Reads two or more records of the event log, and none for an asset that is not due."""
        if context.candidate_subset.is_empty:
            return dg.AutomationResult(context, context.get_empty_subset())
        node = context.asset_graph.get(context.key)
        inputs = sorted(node.parent_keys)
        latest = latest_materializations(context.asset_graph_view.instance, [context.key, *inputs])
        differs = recorded_difference(context.key, node.code_version, inputs, latest)
        subset = context.candidate_subset if differs else context.get_empty_subset()
        return dg.AutomationResult(context, subset)


@dataclass(frozen=True)
class OfOneBaseModel(dg.AutomationCondition[dg.AssetKey]):
    """True while what an asset is made from is of one base model: the checkpoint that it reads was
    tuned from the configured one, the images that it compares were drawn by a base model and by a
    checkpoint that was tuned from it (`other_base_model`)."""

    deployment: Deployment = field(compare=False)

    @property
    def name(self) -> str:
        """As the UI shows it."""
        return "its checkpoint is of the base model of now"

    def evaluate(
        self, context: dg.AutomationContext[dg.AssetKey]
    ) -> dg.AutomationResult[dg.AssetKey]:
        """Reads records of the event log, and none for an asset that is not due."""
        if context.candidate_subset.is_empty:
            return dg.AutomationResult(context, context.get_empty_subset())
        inputs = sorted(context.asset_graph.get(context.key).parent_keys)
        latest = latest_materializations(context.asset_graph_view.instance, inputs)
        models = Models(self.deployment)
        waits = other_base_model(context.key, inputs, latest, self.deployment, models)
        subset = context.get_empty_subset() if waits else context.candidate_subset
        return dg.AutomationResult(context, subset)


def rebuild_when_inputs_change(
    upstream: Iterable[dg.AssetKey], deployment: Deployment
) -> dg.AutomationCondition:
    """Run an asset when what it is made from changed, and only then; `upstream` as `all_upstream`.

        due        = latch(input changed | code changed | missing | failed for the first time)
        requested  = due & not in progress & nothing upstream busy
                     & inputs there & their blocking checks passed
                     & differs from what it is made from
                     & its checkpoint is of the base model of now

    Why each term is there; the tests of this module show each at work:

    - *input changed* is a change of data version, not an update: an input that was made again and
      came out the same requests nothing, so a change goes no further than it reaches. A change
      made by a run that holds this asset as well (a job for everything) is taken up in that run.
    - *code changed* covers settings as well, which are part of the code version (`staleness`).
    - *missing* starts what was never made, or was wiped.
    - *failed for the first time* since the last change or success, in a run of this policy: one
      retry. `execution_failed().newly_true()` alone retries for ever: a retry that a tick sees
      running makes it false, so the next failure is newly true again. `~newly_requested` makes it
      false once after each request, for runs that fail before a tick sees them. Runs of others
      are left alone: a job that stops early fails for all assets it did not reach, and those that
      are up to date need no run.
    - The *latch* (`since`) keeps a change while the gates are shut: while this asset is made, for
      hours perhaps, or while a check holds it back. A request opens the latch, unless something
      changed since that request: `newly_requested` comes one tick late, and without `~due` it
      would take away a change that landed in between.
    - *not in progress*: the change is taken up after the run, not by a second one beside it.
    - *nothing upstream busy*, or about to be tried again: an asset with two inputs that come from
      one source runs once, when both are there. It looks all the way up, since an input may be due
      before anything between it and the source has started; but not past an asset that follows a
      schedule, since what the base model draws need not wait for a training. Each upstream asset
      is named: conditions on inputs of inputs follow every path, of which there are thousands.
    - *inputs there*: an asset whose input was never made cannot run.
    - *blocking checks passed* on the latest materialization of each input, also when only the
      check ran again.
    - *differs*: only a request opens the latch, so it still holds a change that was taken up
      otherwise (by a job, by the night's training, by the run that was under way) or taken back.
      What is recorded then tells that there is nothing to do.

    - *its checkpoint is of the base model of now*: after a change of the profile the checkpoint is
      another model's until the next training, and what it draws would be compared with images that
      differ by more than the fine-tuning. What is there stays meanwhile; see `other_base_model`.

    What it cannot see: a change there and back between two ticks that was built in between; a run
    of others that was to take up a change and did not; what happens outside of Dagster. Those are
    for the stale sweep (`sweep`).
    """
    changed = (
        Condition.any_deps_match(
            Condition.data_version_changed() & ~Condition.executed_with_root_target()
        ).with_label("input changed")
        | Condition.code_version_changed()
        | Condition.newly_missing()
    )
    requested = Condition.newly_requested().since(Condition.newly_updated())
    failed = (Condition.execution_failed() & ~Condition.newly_requested()).newly_true()
    first_failure = (failed & requested).since(changed | Condition.newly_updated()).newly_true()
    due = changed | first_failure.with_label("failed for the first time")
    busy = (
        Condition.in_progress()
        | Condition.will_be_requested()
        | (Condition.execution_failed() & Condition.newly_requested())  # its retry comes next
    )
    return (
        due.since(Condition.newly_requested() & ~due).with_label("due")
        & ~Condition.in_progress()
        & ~reduce(or_, [Condition.asset_matches(key, busy) for key in upstream]).with_label(
            "anything upstream is busy"
        )
        & ~Condition.any_deps_missing()
        & Condition.all_deps_blocking_checks_passed()
        & Differs()
        & OfOneBaseModel(deployment)
    ).with_label("rebuild when inputs change")


def all_upstream(
    key: dg.AssetKey, reads: Mapping[dg.AssetKey, Sequence[dg.AssetKey]]
) -> list[dg.AssetKey]:
    """An asset's inputs, and what is further up, up to assets ON_SCHEDULE, which count only as
    inputs; sorted. `reads`: the inputs of every asset."""
    found = set(reads[key])
    ahead = [name for name in found if name.path[-1] not in ON_SCHEDULE]
    while ahead:
        for name in reads.get(ahead.pop(), ()):
            if name not in found and name.path[-1] not in ON_SCHEDULE:
                found.add(name)
                ahead.append(name)
    return sorted(found)


def with_policy(assets: Iterable[Any], deployment: Deployment) -> list[Any]:
    """The assets with the policy, but for those without inputs and those with a schedule.

    Assets without inputs read the outside world, and only a look at it tells whether it changed.
    """
    assets = list(assets)
    reads: dict[dg.AssetKey, list[dg.AssetKey]] = {}

    def remembered(spec: dg.AssetSpec) -> dg.AssetSpec:
        reads[spec.key] = [dep.asset_key for dep in spec.deps]
        return spec

    def spec_with_policy(spec: dg.AssetSpec) -> dg.AssetSpec:
        if not follows_its_inputs(spec):
            return spec
        policy = rebuild_when_inputs_change(all_upstream(spec.key, reads), deployment)
        return spec.replace_attributes(automation_condition=policy)

    list(dg.map_asset_specs(remembered, assets))

    return list(dg.map_asset_specs(spec_with_policy, assets))


def follows_its_inputs(spec: dg.AssetSpec) -> bool:
    """Whether an asset is rebuilt by the policy."""
    return bool(list(spec.deps)) and spec.key.path[-1] not in ON_SCHEDULE


class _SensorWithoutLog(dg.AutomationConditionSensorDefinition):
    """Keeps no log of its ticks.

    Dagster writes two lines for each asset at each tick, 46 KB every 15 seconds, into a file that
    nothing removes. They hold nothing that the recorded evaluations do not.
    """

    def evaluate_tick(self, context: dg.SensorEvaluationContext) -> SensorExecutionData:
        """As the sensor that it is, with a context that knows no file to log into."""
        with dg.build_sensor_context(
            context.instance,
            cursor=context.cursor,
            repository_name=context.repository_name,
            repository_def=context.repository_def,
            sensor_name=self.name,
        ) as without_log:
            return super().evaluate_tick(without_log)


# Said at every start otherwise; Dagster is pinned exactly.
warnings.filterwarnings("ignore", "Parameter `use_user_code_server`", dg.BetaWarning)

automation = _SensorWithoutLog(
    "automation",
    target=dg.AssetSelection.all(),
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=TICK_SECONDS,
    use_user_code_server=True,  # where `Differs` is known
    description="Rebuilds what depends on something that changed; see each asset's condition.",
    run_tags={REASON_TAG: "what it is made from changed, its code, or its settings"},
)
