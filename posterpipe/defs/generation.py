"""Posters drawn for the prompt suite, before and after the fine-tuning.

What belongs here: the assets from the suite to the images. What does not: drawing
(`core.generations`), the suite's rules (`core.prompts`) and judging images (`scoring`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from posterpipe.core.variants import OF_BASE, OF_TUNED
from posterpipe.defs.resources import (
    FAILED_ITEMS,
    MODEL_FINGERPRINT,
    SOURCE_DIGEST,
    SOURCE_PORTABLE,
    TABLES,
    Deployment,
    Table,
    columns,
    counts,
    naming_the_asset,
    rows,
    table_output,
    table_preview,
    thumbnails,
)

_COLUMNS = columns(
    generation_key="string: the image and what it is scored against",
    pixel_key="string: everything that decides a pixel: model, prompt, seed, sampler, size",
    variant="string: sd, sd_negative, dreambooth or dreambooth_negative; with _delayed for a "
    "negative prompt that acts from a later step on",
    prompt_id="string: the prompt in the suite",
    prompt="string: what the model was given",
    score_text="string: what the image is compared with",
    negative_prompt="string: what the model was steered away from",
    title="string: what the poster should be called",
    seed="int: of the noise; the same for all variants",
    checkpoint_id="string: the checkpoint, or the fingerprint of the base model",
    image="string: sha256 of the PNG in the store",
    image_path="string: its path inside the store",
    status="string: ok, blocked (black or constant) or failed",
    reason="string: why it is not ok",
    width="int: pixels",
    height="int: pixels",
    settings="string: the sampler's settings, JSON",
)


@dg.asset(
    group_name="generation",
    kinds={"python", "yaml"},
    owners=["team:ml"],
    code_version="1",
    io_manager_key=TABLES,
    metadata=columns(
        prompt_id="string: its name",
        prompt="string: what the models are given",
        score_text="string: natural words that images are scored against",
        negative="string: what the negative variants steer away from",
        title="string: what the poster should be called",
        seeds="string: one image per seed and variant, JSON list",
    ),
)
def prompt_suite(deployment: dg.ResourceParam[Deployment]) -> dg.Output[Table]:
    """The fixed questions that every model answers: prompts, scored texts, negatives, seeds.

    Edit `data/prompt_suites/animated_movies.yaml` (or the setting `prompt_suite`): the sensor
    `arrivals` notices and materializes this. A mistake is reported with file and line.
    """
    from posterpipe.core.prompts import load_suite, read_suite, suite_table
    from posterpipe.core.sampler import known_text_limit

    settings = deployment.settings
    path = settings.path(settings.prompt_suite)
    data = read_suite(path)
    digest = hashlib.sha256(data).hexdigest()
    # The tokenizer cuts what is longer, and nobody would know.
    limit = known_text_limit(settings.base_model, settings.root)
    prompts = load_suite(path, limit=limit, data=data)
    table = suite_table(prompts)
    return table_output(
        table,
        {
            "prompts": table_preview(table),
            "images_a_variant": sum(len(prompt.seeds) for prompt in prompts),
            "file": dg.MetadataValue.path(path),
            SOURCE_DIGEST: digest,
            SOURCE_PORTABLE: digest,
        },
    )


@dg.asset(
    group_name="generation",
    kinds={"python", "huggingface"},
    owners=["team:ml"],
    code_version="2",
    io_manager_key=TABLES,
    pool="gpu",
    metadata=_COLUMNS,
)
def base_generations(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    prompt_suite: Table,
) -> dg.Output[Table]:
    """Posters drawn by the base model for every prompt and seed, without and with the negative.

    The thesis's first two variants, and the yardstick of the others. Does not depend on the
    checkpoint: retraining never draws these again.
    """
    from posterpipe.core.models import fingerprint, locate

    settings = deployment.settings
    model_id = fingerprint(settings.base_model, settings.root)
    return _generations(
        context,
        deployment,
        prompt_suite,
        OF_BASE,
        locate(settings.base_model, settings.root),
        model_id,
        {"model": settings.base_model.id, MODEL_FINGERPRINT: model_id},
    )


@dg.asset(
    group_name="generation",
    kinds={"python", "huggingface"},
    owners=["team:ml"],
    code_version="3",
    io_manager_key=TABLES,
    pool="gpu",
    metadata=_COLUMNS,
)
def tuned_generations(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    prompt_suite: Table,
    dreambooth_checkpoint: Table,
) -> dg.Output[Table]:
    """Posters drawn by the fine-tuned model, for the same prompts and seeds as the base model.

    The thesis's last two variants. The noise of each image depends on its seed alone, so an image
    differs from the base model's only by what the fine-tuning changed.
    """
    from posterpipe.core.models import known_fingerprint
    from posterpipe.core.provenance import require_base_model, require_checkpoint

    settings = deployment.settings
    checkpoint = dreambooth_checkpoint.iloc[0]
    require_base_model(
        deployment.store,
        checkpoint["checkpoint_id"],
        known_fingerprint(settings.base_model, settings.root),
        settings.base_model.id,
    )
    folder = deployment.store_root / checkpoint["path"]
    require_checkpoint(
        deployment.store,
        folder,
        checkpoint_id=checkpoint["checkpoint_id"],
        training_set=checkpoint["training_set"],
        base_model=checkpoint["base_model"],
    )
    return _generations(
        context,
        deployment,
        prompt_suite,
        OF_TUNED,
        folder,
        checkpoint["checkpoint_id"],
        {"checkpoint_id": checkpoint["checkpoint_id"]},
    )


def _generations(
    context: dg.AssetExecutionContext,
    deployment: Deployment,
    suite: Table,
    variants: Sequence[str],
    model_dir: Path,
    model_id: str,
    metadata: Mapping[str, Any],
) -> dg.Output[Table]:
    from posterpipe.core.generations import generate
    from posterpipe.core.prompts import suite_prompts

    store = deployment.store
    with naming_the_asset(context):
        generations = generate(
            store,
            suite_prompts(suite),
            variants,
            model_dir,
            model_id,
            deployment.settings.sampler,
            deployment.progress(context),
            run_id=context.run.run_id,
        )
    drawn = generations[generations["status"] == "ok"]
    # The first seed of each prompt, the variants beside each other: never chosen by hand.
    firsts = drawn.drop_duplicates(["prompt_id", "variant"]).sort_values(
        ["prompt_id", "variant"], kind="stable"
    )
    return table_output(
        generations,
        {
            "contact_sheet": thumbnails(
                [
                    (deployment.store_root / row.image_path, f"{row.prompt_id} {row.variant}")
                    for row in rows(firsts)
                ],
                shown=64,
            ),
            **counts(generations, "status"),
            FAILED_ITEMS: int((generations["status"] == "failed").sum()),
            "not_drawn": table_preview(
                generations[generations["status"] != "ok"],
                ["variant", "prompt_id", "seed", "status", "reason"],
            ),
            **metadata,
        },
    )
