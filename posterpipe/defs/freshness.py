"""How old the scores are, and whether they are those of the current images.

What belongs here: what the event log tells of it, as the check `scores_are_current` asks, and the
schedule that runs this check alone. What does not: the judgement (`core.quality`), and the other
checks (`checks`).
"""

import datetime as dt
from typing import TYPE_CHECKING

import dagster as dg

from posterpipe.defs.arrivals import REASON_TAG
from posterpipe.defs.automation import BY_HAND
from posterpipe.defs.metadata import TABLE_VERSION
from posterpipe.defs.resources import Deployment, Table
from posterpipe.defs.staleness import materializations
from posterpipe.defs.timing import cron_of
from posterpipe.settings import Settings

if TYPE_CHECKING:
    from posterpipe.core.quality import Finding
    from posterpipe.core.store import Store

_VERSIONS = 200
"""Materializations looked at to see how long an image waits for its score."""


def scores_are_current(
    instance: dg.DagsterInstance,
    deployment: Deployment,
    clip_scores: Table,
    base_generations: Table,
    tuned_generations: Table,
) -> "Finding":
    """What the check of that name finds."""
    import pandas as pd

    from posterpipe.core import quality
    from posterpipe.core.provenance.checkpoints import BaseModelsDiffer, base_and_tuned

    limits = deployment.settings.checks
    held_back = ""
    try:
        generations = base_and_tuned(deployment.store, base_generations, tuned_generations)
    except BaseModelsDiffer as error:
        generations = pd.concat([base_generations, tuned_generations], ignore_index=True)
        held_back = str(error)
    unscored = quality.unscored(clip_scores, generations)["generation_key"].astype(str)
    return quality.score_freshness(
        clip_scores,
        generations,
        held_back=held_back,
        waiting_since=_in_tables_since(instance, deployment.store, set(unscored)),
        drawn_at=max(
            _materialized_at(instance, name) for name in ("base_generations", "tuned_generations")
        ),
        scored_at=_materialized_at(instance, "clip_scores"),
        now=dt.datetime.now(dt.UTC),
        max_delay_hours=limits.max_scoring_delay_hours,
        max_age_days=limits.max_score_age_days,
    )


def _materialized_at(instance: dg.DagsterInstance, name: str) -> dt.datetime:
    """When an asset was last materialized; long ago where that is not on record."""
    records = materializations(instance, dg.AssetKey(name), 1)
    return dt.datetime.fromtimestamp(records[0].timestamp if records else 0, dt.UTC)


def _in_tables_since(
    instance: dg.DagsterInstance, store: "Store", keys: set[str]
) -> dict[str, dt.datetime]:
    """Since when the tables of generations hold these, as far as their versions are kept."""
    from posterpipe.core.store import TableMissing

    since: dict[str, dt.datetime] = {}
    for name in ("base_generations", "tuned_generations"):
        left, held = keys, {}
        records = materializations(instance, dg.AssetKey(name), _VERSIONS)
        for record in records if left else ():
            made = record.asset_materialization
            entry = made.metadata.get(TABLE_VERSION) if made else None
            if entry is None:
                break
            version = str(entry.value)
            try:
                if version not in held:
                    table = store.read_table(name, version)
                    held[version] = set(table["generation_key"].astype(str))
            except TableMissing:
                break
            left = left & held[version]
            if not left:
                break
            since |= dict.fromkeys(left, dt.datetime.fromtimestamp(record.timestamp, dt.UTC))
    return since


def score_freshness_schedule(settings: Settings) -> dg.ScheduleDefinition:
    """Runs `scores_are_current` on its own: stale scores would otherwise be noticed only by the run
    that replaces them."""
    key = dg.AssetCheckKey(dg.AssetKey("clip_scores"), "scores_are_current")
    job = dg.define_asset_job(
        "check_score_freshness",
        dg.AssetSelection.checks(key),
        description="Whether the scores are those of the current images, and how old they are.",
        tags=BY_HAND,
    )

    def score_freshness(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        for name in ("base_generations", "tuned_generations", "clip_scores"):
            if context.instance.get_latest_materialization_event(dg.AssetKey(name)) is None:
                return dg.SkipReason(f"nothing to check yet: {name} was never materialized")
        return dg.RunRequest(tags={REASON_TAG: "due, by its schedule"})

    decorated = dg.schedule(
        job=job,
        cron_schedule=settings.checks.freshness_cron,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Once a day: are the scores those of the current images?",
    )
    with cron_of("checks.freshness_cron", settings.checks.freshness_cron):
        return decorated(score_freshness)
