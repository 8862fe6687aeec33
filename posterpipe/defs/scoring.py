"""How well images match their prompts.

What belongs here: the asset over the score warehouse. What does not: CLIP (`core.metrics.clip`),
the warehouse (`core.warehouse`), and what is concluded from scores (`dbt_like_reports`).
"""

import dagster as dg

from posterpipe.defs.resources import (
    FAILED_ITEMS,
    MODEL_FINGERPRINT,
    TABLES,
    Deployment,
    Table,
    columns,
    counts,
    naming_the_asset,
    rows,
    table_output,
    table_preview,
)


@dg.asset(
    group_name="scoring",
    kinds={"python", "huggingface", "duckdb"},
    owners=["team:ml"],
    code_version="4",
    io_manager_key=TABLES,
    pool="warehouse",
    metadata=columns(
        generation_key="string: the image and what it is scored against",
        metric_id="string: encoder, preprocessing and version of the metric",
        variant="string: sd, sd_negative, dreambooth or dreambooth_negative",
        prompt_id="string: the prompt in the suite",
        seed="int: of the noise; the same for all variants",
        checkpoint_id="string: the checkpoint, or the fingerprint of the base model",
        clip_cosine="float: raw cosine of image and scored text, -1 to 1; empty without a score",
        status="string: ok, blocked or failed",
        reason="string: why it is not ok",
    ),
)
def clip_scores(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    base_generations: Table,
    tuned_generations: Table,
) -> dg.Output[Table]:
    """The CLIP cosine of every image with its prompt's scored text, kept in the DuckDB warehouse.

    All variants of a prompt are scored against the same natural words, never the negative prompt.
    Rows are only added; the view `clip_scores` of the published database is what analysts read.
    An image that was scored before is not scored again.
    """

    from posterpipe.core.history import record_history
    from posterpipe.core.metrics.base import unread_count
    from posterpipe.core.metrics.clip import score_generations
    from posterpipe.core.models import fingerprint
    from posterpipe.core.provenance import base_and_tuned, environment

    settings = deployment.settings
    warehouse = deployment.warehouse.prepare()
    generations = base_and_tuned(deployment.store, base_generations, tuned_generations)
    with naming_the_asset(context):
        scored = score_generations(
            deployment.store,
            deployment.warehouse,
            generations,
            settings.scorer,
            settings.root,
            deployment.progress(context),
            run_id=context.run.run_id,
        )
    record_history(deployment.store, deployment.warehouse, generations, run_id=context.run.run_id)
    scores = scored.scores
    means = scores.groupby("variant", sort=False)["clip_cosine"]
    summary = means.agg(images="size", mean="mean", deviation="std").reset_index()
    return table_output(
        scores,
        {
            **{
                f"mean_{row.variant}": float(row.mean)
                for row in rows(summary.dropna(subset=["mean"]))
            },
            **counts(scores, "status"),
            FAILED_ITEMS: unread_count(generations, scores),
            "newly_scored": scored.added,
            "by_variant": table_preview(summary),
            "metric": scored.metric_id,
            MODEL_FINGERPRINT: fingerprint(settings.scorer.model, settings.root),
            "warehouse": dg.MetadataValue.path(deployment.warehouse_path),
            "trace": _how_to_trace(scores),
            "environment": dg.MetadataValue.json(environment()),
        },
        warehouse=warehouse,
    )


def _how_to_trace(scores: Table) -> dg.MarkdownMetadataValue:
    """The commands that tell where the first score of each variant comes from."""
    firsts = scores.drop_duplicates("variant")
    lines = [
        f"- {row.variant}, {row.prompt_id}, seed {row.seed}: "
        f"`posterpipe trace {row.generation_key[:16]}`"
        for row in rows(firsts)
    ]
    return dg.MetadataValue.md(
        "\n".join(["Where a score comes from, down to the posters:", "", *lines])
    )
