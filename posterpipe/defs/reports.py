"""What analysts and designers look at.

What belongs here: the published database, the inventory, the contact sheet and the growth chart.
What does not: the dbt models as assets (`defs.dbt_reports`) and their SQL (`dbt_like_reports/`),
copying the database (`core.warehouse.publication`) and arranging pictures (`core.gallery`).
"""

import hashlib
import io
from collections.abc import Sequence

import dagster as dg
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus
from dagster_dbt import DbtProject

from posterpipe.defs.dbt_reports import dbt_models
from posterpipe.defs.metadata import columns, counts, table_preview
from posterpipe.defs.resources import TABLES, Deployment, StoreIOManager, Table, table_output
from posterpipe.defs.staleness import digest

WRITERS = (
    "clip_scores",
    "fidelity_scores",
    "legibility_scores",
    "champion",
    "poster_inventory",
)
"""Assets that fill the warehouse: what is published is of all of them."""


def models_and_publication(project: DbtProject) -> list[dg.AssetsDefinition]:
    """The dbt models, and the publication of them all: a new model is published without a word
    elsewhere."""
    models = dbt_models(project)
    return [models, publication(sorted(models.keys), sorted(models.check_keys))]


def publication(
    reports: Sequence[dg.AssetKey], tests: Sequence[dg.AssetCheckKey]
) -> dg.AssetsDefinition:
    """The asset that publishes these reports, unless one of their tests failed, with the tables
    they are made from.

    Which reports there are is in its code version: no input changes when one is taken away.
    """
    names = digest(*sorted(key.to_user_string() for key in reports))[:8]

    @dg.asset(
        group_name="reports",
        kinds={"python", "duckdb"},
        owners=["team:analytics"],
        code_version=f"3-{names}",
        deps=[*WRITERS, *reports],
        pool="warehouse",
    )
    def published_scores(
        context: dg.AssetExecutionContext, deployment: dg.ResourceParam[Deployment]
    ) -> dg.MaterializeResult:
        """The analysts' copy of the warehouse: `data/store/public/scores.duckdb`.

        Read-only and replaced in one step, so that it can be queried at any time, also while a
        retraining writes; only after the tests of all reports passed. Readable with DuckDB 1.5 and
        later. To see a newer copy, close your connections and open it again. The same tables are in
        `parquet/` beside it, the last few publications in `snapshots/`.
        """
        from posterpipe.core.warehouse.publication import content_digest, publish_scores

        _require_passed(context.instance, tests)
        published = publish_scores(
            deployment.warehouse_path,
            deployment.published_path.parent,
            run_id=context.run.run_id,
            reports=[key.path[-1] for key in reports],
        )
        return dg.MaterializeResult(
            data_version=dg.DataVersion(content_digest(published.database)),
            metadata={
                "path": dg.MetadataValue.path(published.database),
                "parquet": dg.MetadataValue.path(published.parquet),
                "publication": published.publication_id,
                "bytes": published.database.stat().st_size,
                "dagster/row_count": published.rows["fct_score"],
                "tables": dg.MetadataValue.table(
                    [
                        dg.TableRecord({"table": name, "rows": count})
                        for name, count in published.rows.items()
                    ]
                ),
            },
        )

    return published_scores


def _require_passed(instance: dg.DagsterInstance, tests: Sequence[dg.AssetCheckKey]) -> None:
    """Also where the publication is materialized by itself, whatever was before."""
    latest = instance.event_log_storage.get_latest_asset_check_execution_by_key(list(tests))
    failed = [
        f"{key.name} of {key.asset_key.to_user_string()}"
        for key, record in latest.items()
        if record.status == AssetCheckExecutionRecordStatus.FAILED
    ]
    if failed:
        raise dg.Failure(
            f"not published, since tests failed: {', '.join(sorted(failed))}; the publication of "
            "the last time stays. Look at the failing check, mend what it names, and materialize "
            "the report again",
            allow_retries=False,
        )


@dg.asset(
    group_name="reports",
    kinds={"python", "duckdb"},
    owners=["team:analytics"],
    code_version="2",
    io_manager_key=TABLES,
    pool="warehouse",
    metadata=columns(
        poster_id="string: sha256 of the file's bytes",
        source_name="string: path inside the landing folder",
        status="string: ok, rejected or duplicate",
        reason="string: why it is not ok",
        format="string: what the content is",
        width="int: pixels, as stored",
        height="int: pixels, as stored",
        size_bytes="int: size of the file",
        near_duplicate_of="string: an earlier poster that it resembles",
        image="string: sha256 of the resized PNG; empty but for usable posters",
        image_path="string: its path inside the store",
        caption="string: what the poster shows, in words",
        caption_source="string: model or human",
        caption_status="string: ok or failed",
        caption_reason="string: why it failed, or what to look at",
        in_training_set="bool: whether it is trained on",
    ),
)
def poster_inventory(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    raw_posters: Table,
    resized_posters: Table,
    poster_captions: Table,
    training_csv: Table,
) -> dg.Output[Table]:
    """What the dataset holds now, put into the warehouse: every poster with its state and caption.

    The reports on data quality count it, and the names of posters that images are near to come
    from it. The same posters as before change nothing there.
    """
    from posterpipe.core.posters.inventory import record_inventory, take_inventory

    warehouse = deployment.warehouse.prepare()
    table = take_inventory(
        deployment.store, raw_posters, resized_posters, poster_captions, training_csv
    )
    record_inventory(deployment.warehouse, table, run_id=context.run.run_id)
    return table_output(
        table,
        {**counts(table, "status"), "in_training_set": int(table["in_training_set"].sum())},
        warehouse=warehouse,
    )


@dg.asset(
    group_name="reports",
    kinds={"python", "pillow"},
    owners=["team:analytics"],
    code_version="3",
)
def contact_sheet(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    tables: dg.ResourceParam[StoreIOManager],
    prompt_suite: Table,
    base_generations: Table,
    tuned_generations: Table,
) -> dg.MaterializeResult:
    """One picture of the whole suite: a row a prompt, a column a variant, the same noise in a row.

    Always the first seed of each prompt, never chosen by hand; written to
    `data/store/public/contact_sheet.png`.
    """
    from posterpipe.core.files import write_atomic
    from posterpipe.core.gallery import markdown_image, of_first_seed, suite_sheet
    from posterpipe.core.provenance.checkpoints import base_and_tuned

    generations = base_and_tuned(deployment.store, base_generations, tuned_generations)
    sheet = suite_sheet(prompt_suite, generations, deployment.store_root)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    path = deployment.contact_sheet_path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
    return dg.MaterializeResult(
        data_version=dg.DataVersion(hashlib.sha256(buffer.getvalue()).hexdigest()),
        metadata={
            "contact_sheet": dg.MetadataValue.md(markdown_image(sheet, "prompts by variants")),
            "path": dg.MetadataValue.path(path),
            "images": len(of_first_seed(prompt_suite, generations)),
            **tables.inputs_read(context.get_step_execution_context().step.key),
        },
    )


@dg.asset(
    group_name="reports",
    kinds={"python", "pillow"},
    owners=["team:analytics"],
    code_version="7",
)
def growth_chart(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    tables: dg.ResourceParam[StoreIOManager],
    base_generations: Table,
    tuned_generations: Table,
    clip_scores: Table,
    fidelity_scores: Table,
) -> dg.MaterializeResult:
    """The thesis's result from today's scores: its chart of the four variants, with intervals.

    Its table beside the thesis's four numbers, what their scales are, what fine-tuning and the
    negative prompt each do (bootstrap over prompts), the same with the texts of other prompts (the
    negative control), and the prompts that gained most and lost most, chosen by rule. Pictures,
    `growth.csv`, `effects.csv`, `control.csv` and `growth.json` lie in
    `data/store/public/thesis/`. Which effects are more than chance, all questions counted, the
    report `paired_effects` says.
    """
    from posterpipe.core import thesis
    from posterpipe.core.gallery import markdown_image
    from posterpipe.core.provenance.checkpoints import base_and_tuned

    generations = base_and_tuned(deployment.store, base_generations, tuned_generations)
    report = thesis.report(clip_scores, generations, fidelity_scores, deployment.store_root)
    folder = deployment.thesis_path
    report.write(folder)
    pictures = {
        name: dg.MetadataValue.md(markdown_image(picture, report.captions[name]))
        for name, picture in report.pictures.items()
    }
    return dg.MaterializeResult(
        data_version=dg.DataVersion(report.digest),
        metadata={
            **pictures,
            "table": table_preview(report.table),
            "effects": table_preview(report.effects),
            "control": table_preview(report.control),
            "scales": dg.MetadataValue.md(thesis.SCALES),
            "metric": report.metric_id,
            "path": dg.MetadataValue.path(folder),
            **tables.inputs_read(context.get_step_execution_context().step.key),
        },
    )
