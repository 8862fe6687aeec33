"""Posters drawn for the prompt suite, before and after the fine-tuning.

What belongs here: the assets from the suite to the images, with their titles set in type. What does
not: drawing (`core.generations`), the suite's rules (`core.prompts`), type (`core.typography`) and
judging images (`scoring`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from posterpipe.core.variants import OF_BASE, OF_TUNED
from posterpipe.defs.metadata import (
    BASE_MODEL,
    CHALLENGER,
    CHAMPION,
    FAILED_ITEMS,
    MODEL_FINGERPRINT,
    SOURCE_DIGEST,
    SOURCE_PORTABLE,
    columns,
    counts,
    rows,
    table_preview,
    thumbnails,
)
from posterpipe.defs.resources import TABLES, Deployment, Table, naming_the_asset, table_output

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
    prompts = load_suite(path, limit=limit, sampler=settings.sampler, data=data)
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
    from posterpipe.core.provenance.checkpoints import require_base_model, require_checkpoint

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


@dg.asset(
    group_name="generation",
    kinds={"python", "huggingface"},
    owners=["team:ml"],
    code_version="3",
    io_manager_key=TABLES,
    pool="gpu",
    metadata=_COLUMNS,
)
def champion_generations(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    prompt_suite: Table,
    base_generations: Table,
    tuned_generations: Table,
) -> dg.Output[Table]:
    """What the newest checkpoint has to beat: the suite as the champion before it draws it.

    Drawn anew only when the suite or the sampler changed since; the base model's images are there
    already. Decisions about the newest checkpoint itself do not count here, so its promotion makes
    nothing of this stale; a pin or a rollback by a person does.
    """
    from posterpipe.core.champion.decisions import defender_of, read_decisions
    from posterpipe.core.provenance.checkpoints import require_checkpoint

    base = str(base_generations["checkpoint_id"].iloc[0])
    challenger = str(tuned_generations["checkpoint_id"].iloc[0])
    # Read from the warehouse, although that waits for its writers: the copy beside it may lag, and
    # the gate would refuse to compare with that champion.
    champion = defender_of(read_decisions(deployment.warehouse), base, challenger)
    if champion == base:
        table, failed = base_generations, 0  # whoever drew them tries them again
    else:
        folder = deployment.store_root / "checkpoints" / champion
        require_checkpoint(deployment.store, folder, checkpoint_id=champion)
        table = _draw(context, deployment, prompt_suite, OF_TUNED, folder, champion)
        failed = int((table["status"] == "failed").sum())
    return table_output(
        table,
        {
            CHAMPION: champion,
            CHALLENGER: challenger,
            BASE_MODEL: base,
            **counts(table, "status"),
            FAILED_ITEMS: failed,
        },
    )


@dg.asset(
    group_name="generation",
    kinds={"python", "pillow"},
    owners=["team:ml"],
    code_version="4",
    io_manager_key=TABLES,
    metadata=columns(
        generation_key="string: the image that was lettered",
        untitled_image="string: sha256 of the PNG without the title",
        title="string: what was set",
        image="string: sha256 of the titled PNG in the store",
        image_path="string: its path inside the store",
        style="string: type style",
        lines="string: JSON list",
        cap_height="int: pixels",
        contrast="float: the least of letters and ground, 1 to 21",
        scrim="bool: whether the ground had to be helped",
        covered="float: share of the main object below the letters, 0 to 1",
        status="string: ok, blocked or failed",
        reason="string: why it is not ok, or what was left out of the title",
    ),
)
def titled_posters(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    base_generations: Table,
    tuned_generations: Table,
) -> dg.Output[Table]:
    """Generated posters with their titles set in type, which the model cannot draw.

    Models of this size draw shapes like letters and no words. The images of the first seeds of each
    prompt (setting `lettering.seeds`), never chosen ones. Scores are always taken of the images
    before this step, since CLIP reads.
    """
    import pandas as pd

    from posterpipe.core.metrics.base import unread_count
    from posterpipe.core.typography import set_titles

    generations = pd.concat([base_generations, tuned_generations], ignore_index=True)
    most = deployment.settings.lettering.seeds
    if most is not None:
        generations = generations.groupby(["variant", "prompt_id"], sort=False).head(most)
    titled = set_titles(
        deployment.store, generations, deployment.settings.lettering, deployment.progress(context)
    )
    done = titled[titled["status"] == "ok"]
    firsts = done.drop_duplicates("title")
    return table_output(
        titled,
        {
            "contact_sheet": thumbnails(
                [(deployment.store_root / row.image_path, row.title) for row in rows(firsts)]
            ),
            **counts(titled, "status"),
            FAILED_ITEMS: unread_count(generations, titled),
            "least_contrast": float(done["contrast"].min()) if len(done) else None,
            "with_scrim": int(done["scrim"].sum()),
            "not_set": table_preview(titled[titled["status"] != "ok"], ["title", "reason"]),
        },
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
    generations = _draw(context, deployment, suite, variants, model_dir, model_id)
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


def _draw(
    context: dg.AssetExecutionContext,
    deployment: Deployment,
    suite: Table,
    variants: Sequence[str],
    model_dir: Path,
    model_id: str,
) -> Table:
    from posterpipe.core.generations import generate
    from posterpipe.core.prompts import suite_prompts

    with naming_the_asset(context):
        return generate(
            deployment.store,
            suite_prompts(suite),
            variants,
            model_dir,
            model_id,
            deployment.settings.sampler,
            deployment.progress(context),
            run_id=context.run.run_id,
        )
