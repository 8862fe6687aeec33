"""What is measured of images: how well they match their prompts, and the evidence beside it.

What belongs here: the assets that put scores into the warehouse. What does not: how they are
measured (`core.metrics`, `core.champion.evidence`), the warehouse (`core.warehouse`), and what is
concluded from them (`champion`, `dbt_like_reports`).
"""

import dagster as dg

from posterpipe.defs.metadata import (
    FAILED_ITEMS,
    MODEL_FINGERPRINT,
    columns,
    counts,
    rows,
    table_preview,
)
from posterpipe.defs.resources import TABLES, Deployment, Table, naming_the_asset, table_output


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
    from posterpipe.core.metrics.base import summary, unread_count
    from posterpipe.core.metrics.clip import score_generations
    from posterpipe.core.models import fingerprint
    from posterpipe.core.provenance.checkpoints import base_and_tuned
    from posterpipe.core.provenance.environments import environment
    from posterpipe.core.warehouse.history import record_history

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
    means = summary(scores, "clip_cosine", "variant")
    return table_output(
        scores,
        {
            **{
                f"mean_{row.variant}": float(row.mean)
                for row in rows(means.dropna(subset=["mean"]))
            },
            **counts(scores, "status"),
            FAILED_ITEMS: unread_count(generations, scores),
            "newly_scored": scored.added,
            "by_variant": table_preview(means),
            "metric": scored.metric_id,
            MODEL_FINGERPRINT: fingerprint(settings.scorer.model, settings.root),
            "warehouse": dg.MetadataValue.path(deployment.warehouse_path),
            "trace": _how_to_trace(scores),
            "environment": dg.MetadataValue.json(environment()),
        },
        warehouse=warehouse,
    )


@dg.asset(
    group_name="scoring",
    kinds={"python", "huggingface", "duckdb"},
    owners=["team:ml"],
    code_version="7",
    io_manager_key=TABLES,
    pool="warehouse",
    deps=["clip_scores"],
    metadata=columns(
        generation_key="string: the image and what it is scored against",
        metric_id="string: encoder, preprocessing, posters compared with, version",
        metric="string: its name",
        role="string: what the gate reads it for",
        value="float: empty without a score",
        status="string: ok, blocked or failed",
        reason="string: why it is not ok",
        nearest_poster="string: sha256 of the nearest training image by the first encoder",
        copied="bool: whether it counts as a copy, by the first encoder or the perceptual hash",
        copied_by="string: cosine or hash, whichever says so; empty for no copy",
        copied_poster="string: sha256 of the training image that it is a copy of",
        copy_threshold="float: cosine from which it does; empty with too few holdout posters",
        copy_sensitivity="float: share of altered training posters that it finds",
        lost_posters="int: posters that the checkpoint was trained on and that cannot be read",
        copy_unsure="bool: whether too few holdout posters say if its perceptual hash is a copy's",
    ),
)
def fidelity_scores(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    holdout_posters: Table,
    base_generations: Table,
    tuned_generations: Table,
    champion_generations: Table,
) -> dg.Output[Table]:
    """Whether images are like film posters the model never saw, not copies, and not all alike.

    CLIP-T with crop and pad; the same with the texts of the other prompts (the negative control),
    and what of it is the own prompt's alone; similarity to holdout and training posters and their
    difference (the overfit gap), the nearest training poster, diversity within a prompt, and
    PickScore where it is configured. An image is encoded once an encoder; new posters or metrics
    encode it no second time.

    A checkpoint is held against the posters that it was trained on, which may lie in the folder no
    more. Holdout posters that one of the compared checkpoints was trained on do not count.
    """
    from posterpipe.core.champion.evidence import held_out, measure, side_by_side, trained_on
    from posterpipe.core.metrics.base import summary, unread_count
    from posterpipe.core.models import fingerprint, joint_fingerprint

    settings = deployment.settings
    store = deployment.store
    progress = deployment.progress(context)
    warehouse = deployment.warehouse.prepare()
    generations = side_by_side(base_generations, tuned_generations, champion_generations)
    base = str(base_generations["checkpoint_id"].iloc[0])
    holdout = held_out(store, holdout_posters, settings, progress)
    evidence = measure(
        store,
        deployment.warehouse,
        generations,
        trained_on(store, sorted({*generations["checkpoint_id"].astype(str)} - {base})),
        holdout,
        settings,
        progress,
        challenger=str(tuned_generations["checkpoint_id"].iloc[0]),
        run_id=context.run.run_id,
    )
    table = evidence.table
    return table_output(
        table,
        {
            "by_variant": table_preview(summary(table, "value", "metric", "variant")),
            "copies": len(evidence.copies),
            "copied": table_preview(evidence.copies),
            "thresholds": table_preview(evidence.copy_thresholds(len(holdout.files))),
            **counts(table, "status"),
            FAILED_ITEMS: unread_count(generations, table),
            MODEL_FINGERPRINT: joint_fingerprint(
                fingerprint(ref, settings.root)
                for ref in (settings.scorer.model, *settings.evidence.models)
            ),
        },
        warehouse=warehouse,
    )


@dg.asset(
    group_name="scoring",
    kinds={"python", "duckdb"},
    owners=["team:ml"],
    code_version="4",
    io_manager_key=TABLES,
    pool="warehouse",
    deps=["clip_scores"],
    metadata=columns(
        generation_key="string: the image",
        lettering="string: drawn by the model, or set in type",
        title="string: what should be read",
        status="string: ok, blocked (nothing to read) or failed; what is not ok was not read",
        read="string: what was read, line by line",
        distance="float: normalised edit distance, 0 (the title) to 1; empty where not read",
        exact="bool: whether the title was read exactly",
        measurable="bool: whether the OCR knows all letters of the title; else it cannot say",
    ),
)
def legibility_scores(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    base_generations: Table,
    tuned_generations: Table,
    titled_posters: Table,
) -> dg.Output[Table]:
    """Whether a real OCR reads the title, as the model drew it and as it was set in type.

    Both are read on the same images, those that are lettered. An image that was read before is not
    read again. One that is blocked is not read, and counts as one without its title. A title in
    letters that the OCR does not know has no score, and counts nowhere.
    """
    import pandas as pd

    from posterpipe.core.metrics.titles_read import read_titles
    from posterpipe.core.typography import lettering_id

    warehouse = deployment.warehouse.prepare()
    found = read_titles(
        deployment.store,
        deployment.warehouse,
        pd.concat([base_generations, tuned_generations], ignore_index=True),
        titled_posters,
        deployment.progress(context),
        set_by=lettering_id(deployment.settings.lettering),
        run_id=context.run.run_id,
    )
    table = found.table
    measurable = table[table["measurable"].astype(bool)]
    beyond = table.loc[~table["measurable"].astype(bool), ["title"]].drop_duplicates()
    shares = measurable.groupby("lettering")["exact"].mean()
    return table_output(
        table,
        {
            **{f"exact_{name}": float(share) for name, share in shares.items()},
            FAILED_ITEMS: found.unread,
            "misread": table_preview(
                measurable[(measurable["lettering"] == "set") & ~measurable["exact"].astype(bool)]
            ),
            "letters_unknown_to_the_ocr": table_preview(beyond),
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
