"""The composition of posterpipe: settings in, Dagster definitions out.

What belongs here: which assets, checks, jobs, sensors and schedules there are, and the resources
that they are given. What does not: what any of them does (`defs`).
"""

import gc

import dagster as dg

from posterpipe.core.openmp import wait_briefly
from posterpipe.defs import (
    alerts,
    arrivals,
    champion,
    checks,
    dataset,
    dbt_reports,
    freshness,
    generation,
    ingest,
    reports,
    retraining,
    score_report,
    scoring,
    training,
)
from posterpipe.defs.automation import JOBS, automation, with_policy
from posterpipe.defs.housekeeping import housekeeping
from posterpipe.defs.overview import OVERVIEW
from posterpipe.defs.resources import TABLES, Deployment, store_tables
from posterpipe.defs.staleness import with_settings_in_code_version
from posterpipe.defs.sweep import stale_sweep
from posterpipe.defs.timing import described
from posterpipe.settings import Settings, load_settings


def build_defs(settings: Settings, deployment: Deployment | None = None) -> dg.Definitions:
    """Fresh definitions of one deployment; give a `deployment` to say where progress is shown."""
    deployment = deployment or Deployment(settings)
    dbt = dbt_reports.dbt_project(settings)
    assets = [
        *dg.load_assets_from_modules(
            [ingest, dataset, training, generation, scoring, champion, reports]
        ),
        *reports.models_and_publication(dbt),
        *dg.load_assets_from_modules([score_report]),
    ]
    assets = with_policy(with_settings_in_code_version(assets, settings), deployment)
    return dg.Definitions(
        assets=described(assets, settings, JOBS),
        asset_checks=dg.load_asset_checks_from_modules([checks]),
        jobs=JOBS,
        sensors=[
            *arrivals.sensors(settings),
            automation,
            stale_sweep,
            housekeeping,
            *alerts.sensors(settings),
        ],
        schedules=[*retraining.schedules(settings), freshness.score_freshness_schedule(settings)],
        executor=dg.multiprocess_executor.configured({"max_concurrent": settings.max_concurrent}),
        resources={
            "deployment": deployment,
            TABLES: store_tables(deployment),
            "dbt": dbt_reports.dbt_resource(dbt),
        },
        metadata={"overview": dg.MetadataValue.md(OVERVIEW)},
    )


wait_briefly()
# Meanwhile the garbage collector would look, again and again, through all that Dagster's import has
# made: more than half of the time that building takes. Afterwards it would do so once more for what
# was built, all of which stays as long as the process.
gc.disable()
try:
    defs = build_defs(load_settings())
finally:
    gc.freeze()
    gc.enable()
