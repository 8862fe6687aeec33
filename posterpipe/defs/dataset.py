"""From posters to a training set: resized images, captions, the CSV.

What belongs here: the three assets. What does not: pixels (`core.images`), BLIP (`core.captioner`)
and the files of a training set (`core.training_set`).
"""

import dagster as dg

from posterpipe.defs.resources import (
    MODEL_FINGERPRINT,
    TABLES,
    Deployment,
    Table,
    columns,
    counts,
    rows,
    table_output,
    table_preview,
    thumbnails,
)


@dg.asset(
    group_name="dataset",
    kinds={"python", "pillow"},
    owners=["team:data"],
    code_version="1",
    io_manager_key=TABLES,
    metadata=columns(
        poster_id="string: the poster",
        image="string: sha256 of the training image, a PNG in the store",
        fit="string: stretch, pad or crop",
        width="int: pixels",
        height="int: pixels",
        status="string: ok or failed",
        reason="string: why it failed, and what to do",
    ),
)
def resized_posters(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    raw_posters: Table,
) -> dg.Output[Table]:
    """Each usable poster as a training image: upright, RGB, resized with LANCZOS.

    Size and fit are settings (`images`); `stretch` is what the study did. Runs after `raw_posters`;
    a poster that was resized before is not resized again.
    """
    from posterpipe.core.images import resize_posters

    store = deployment.store
    progress = deployment.progress(context)
    resized = resize_posters(store, raw_posters, deployment.settings.images, progress)
    names = dict(zip(raw_posters["poster_id"], raw_posters["source_name"], strict=True))
    images = [
        (store.path(row.image, ".png"), names[row.poster_id])
        for row in rows(resized)
        if row.status == "ok"
    ]
    return table_output(
        resized,
        {
            "contact_sheet": thumbnails(images),
            **counts(resized, "status"),
            "failed": table_preview(resized[resized["status"] != "ok"], ["poster_id", "reason"]),
        },
    )


@dg.asset(
    group_name="dataset",
    kinds={"python", "huggingface"},
    owners=["team:data"],
    code_version="1",
    io_manager_key=TABLES,
    pool="gpu",
    metadata=columns(
        poster_id="string: the poster",
        caption="string: what the poster shows, in words",
        source="string: who wrote it; model is BLIP",
        model="string: id or folder of the captioner",
        revision="string: fingerprint of its weights",
        status="string: ok or failed",
        reason="string: why it failed, and what to do",
    ),
)
def poster_captions(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    resized_posters: Table,
) -> dg.Output[Table]:
    """A caption for each training image, written by BLIP in batches.

    Captions are what the fine-tuning learns each image under. Runs after `resized_posters`; an
    image that this captioner has described before is not described again.
    """
    from posterpipe.core.captioner import caption_posters
    from posterpipe.core.models import fingerprint

    settings = deployment.settings
    store = deployment.store
    captions = caption_posters(
        store, resized_posters, settings.captioner, settings.root, deployment.progress(context)
    )
    images = dict(zip(resized_posters["poster_id"], resized_posters["image"], strict=True))
    captioned = captions[captions["status"] == "ok"]
    return table_output(
        captions,
        {
            "contact_sheet": thumbnails(
                [
                    (store.path(images[row.poster_id], ".png"), row.caption)
                    for row in rows(captioned)
                ]
            ),
            "captions": table_preview(captions, ["caption", "source", "status", "reason"]),
            **counts(captions, "source"),
            MODEL_FINGERPRINT: fingerprint(settings.captioner.model, settings.root),
            "distinct_captions": int(captioned["caption"].nunique()),
            "mean_words": sum(len(text.split()) for text in captioned["caption"])
            / max(len(captioned), 1),
        },
    )


@dg.asset(
    group_name="dataset",
    kinds={"python", "csv"},
    owners=["team:data"],
    code_version="1",
    io_manager_key=TABLES,
)
def training_csv(
    deployment: dg.ResourceParam[Deployment],
    resized_posters: Table,
    poster_captions: Table,
) -> dg.Output[Table]:
    """The training set: `training.csv` with file_name and caption, beside its images.

    What the trainer reads, and what `datasets.load_dataset("imagefolder", data_dir=...)` reads as
    well. Each version lies in a folder of its own, named by the hash of its CSV, and stays.
    """
    from posterpipe.core.training_set import build_training_set

    store = deployment.store
    table, folder, version = build_training_set(store, resized_posters, poster_captions)
    return table_output(
        table.assign(training_set=version),
        {
            "contact_sheet": thumbnails(
                [(folder / row.file_name, row.caption) for row in rows(table)]
            ),
            "training_csv": table_preview(table, ["file_name", "caption"]),
            "folder": dg.MetadataValue.path(folder),
            "training_set": version,
        },
        data_version=version,
    )
