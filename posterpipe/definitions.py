"""The composition of posterpipe: settings in, Dagster definitions out; nothing else."""

import dagster as dg

from posterpipe.defs import checks, dataset, generation, ingest, reports, scoring, training
from posterpipe.defs.automation import JOBS, with_settings_in_code_version
from posterpipe.defs.resources import TABLES, Deployment, StoreIOManager
from posterpipe.settings import Settings, load_settings


def build_defs(settings: Settings, deployment: Deployment | None = None) -> dg.Definitions:
    """Fresh definitions of one deployment; give a `deployment` to say where progress is shown."""
    deployment = deployment or Deployment(settings)
    dbt = reports.dbt_project(settings)
    assets = [
        *dg.load_assets_from_modules([ingest, dataset, training, generation, scoring, reports]),
        reports.dbt_models(dbt),
    ]
    return dg.Definitions(
        assets=with_settings_in_code_version(assets, settings),
        asset_checks=dg.load_asset_checks_from_modules([checks]),
        jobs=JOBS,
        executor=dg.multiprocess_executor.configured({"max_concurrent": settings.max_concurrent}),
        resources={
            "deployment": deployment,
            TABLES: StoreIOManager(deployment),
            "dbt": reports.dbt_resource(dbt),
        },
    )


defs = build_defs(load_settings())
