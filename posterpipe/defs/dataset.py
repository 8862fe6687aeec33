"""From posters to a training set: resized images, captions by people and by BLIP, the CSV.

What belongs here: the four assets. What does not: pixels (`core.images`), what people wrote
(`core.captions`), BLIP (`core.captioner`) and the files of a training set
(`core.training.training_set`).
"""

import dagster as dg

from posterpipe.defs.metadata import (
    FAILED_ITEMS,
    MODEL_FINGERPRINT,
    SOURCE_DIGEST,
    SOURCE_PORTABLE,
    THUMBNAILS,
    UNREAD,
    captioned_thumbnails,
    columns,
    counts,
    rows,
    table_preview,
    thumbnails,
)
from posterpipe.defs.resources import TABLES, Deployment, Table, naming_the_asset, table_output


@dg.asset(
    group_name="dataset",
    kinds={"python", "pillow"},
    owners=["team:data"],
    code_version="2",
    io_manager_key=TABLES,
    metadata=columns(
        poster_id="string: the poster",
        image="string: sha256 of the training image, a PNG in the store",
        fit="string: stretch, pad, crop or bucket",
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

    Size and fit are settings (`images`); `stretch` is what the thesis did. Runs after
    `raw_posters`; a poster that was resized before is not resized again.
    """
    from posterpipe.core.images import resize_posters, retriable_count
    from posterpipe.core.store import cells

    store = deployment.store
    progress = deployment.progress(context)
    resized = resize_posters(store, raw_posters, deployment.settings.images, progress)
    names = dict(cells(raw_posters, "poster_id", "source_name"))
    usable = resized[resized["status"] == "ok"]
    images = [
        (store.path(row.image, ".png"), names[row.poster_id])
        for row in rows(usable.head(THUMBNAILS))
    ]
    return table_output(
        resized,
        {
            "contact_sheet": thumbnails(images, total=len(usable)),
            **counts(resized, "status"),
            "failed": table_preview(resized[resized["status"] != "ok"], ["poster_id", "reason"]),
            FAILED_ITEMS: retriable_count(resized),
        },
    )


@dg.asset(
    group_name="dataset",
    kinds={"python", "csv"},
    owners=["team:data"],
    code_version="3",
    io_manager_key=TABLES,
    metadata=columns(
        source_name="string: the poster, as in raw_posters; what the file says if there is none",
        caption="string: what a person wrote",
        origin="string: sidecar (a text file beside the poster) or captions.csv",
        status="string: ok (at most once a poster) or rejected",
        reason="string: file and line, why it does not count, and what to do",
    ),
)
def human_captions(
    context: dg.AssetExecutionContext, deployment: dg.ResourceParam[Deployment]
) -> dg.Output[Table]:
    """What people wrote about posters: text files beside them, and `data/captions.csv`.

    A caption by a person wins over BLIP's and is never overwritten. Put `rocket.txt` beside
    `rocket.png`, or a row `rocket.png,a red rocket` into the CSV (the setting `captions`; columns
    file_name and caption). With neither the table is empty. Runs when one of these files, or the
    list of posters, changed. A landing folder without any poster is an error, as for `raw_posters`:
    nothing may be mounted there.
    """
    from posterpipe.core.captions.csv_file import read_csv
    from posterpipe.core.captions.people import read_human_captions, unread_count
    from posterpipe.core.posters.arrivals import captions_digest
    from posterpipe.core.posters.landing import list_posters
    from posterpipe.core.posters.listing import open_place

    settings = deployment.settings
    place = open_place(settings.landing, settings.root)
    entries = list_posters(place)
    csv = read_csv(settings.path(settings.captions))
    digests = {
        SOURCE_DIGEST: captions_digest(entries, csv.digest, deployment.store),
        SOURCE_PORTABLE: captions_digest(entries, csv.digest, deployment.store, portable=True),
    }
    table = read_human_captions(
        place,
        csv,
        deployment.store,
        deployment.progress(context),
        entries=entries,
    )
    unused = table[table["status"] != "ok"]
    return table_output(
        table,
        {
            **counts(table, "status"),
            "captions": table_preview(table[table["status"] == "ok"]),
            "not_used": table_preview(unused, ["source_name", "reason"]),
            "file": dg.MetadataValue.path(csv.path),
            **digests,
            UNREAD: unread_count(table),
        },
    )


@dg.asset(
    group_name="dataset",
    kinds={"python", "huggingface"},
    owners=["team:data"],
    code_version="2",
    io_manager_key=TABLES,
    pool="gpu",
    metadata=columns(
        poster_id="string: the poster",
        caption="string: what the poster shows, in words",
        source="string: who wrote it: model is BLIP, human a person",
        model="string: id or folder of the captioner; empty for human",
        revision="string: fingerprint of its weights; empty for human",
        status="string: ok or failed",
        reason="string: why it failed, or what to look at, and what to do",
    ),
)
def poster_captions(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    raw_posters: Table,
    resized_posters: Table,
    human_captions: Table,
) -> dg.Output[Table]:
    """A caption for each training image: a person's where there is one, else BLIP's.

    Captions are what the fine-tuning learns each image under. BLIP works in batches and describes
    an image once; it is asked again only when the captioner or its settings change, and never for
    a poster that a person described. Runs after the three tables that it reads.
    """
    from posterpipe.core.captioner import HUMAN, MODEL, caption_posters, retriable_count
    from posterpipe.core.captions.people import captions_by_poster
    from posterpipe.core.models import fingerprint
    from posterpipe.core.store import cells

    settings = deployment.settings
    store = deployment.store
    with naming_the_asset(context):
        captions = caption_posters(
            store,
            resized_posters,
            settings.captioner,
            settings.root,
            deployment.progress(context),
            human=captions_by_poster(raw_posters, human_captions),
        )
    images = dict(cells(resized_posters, "poster_id", "image"))
    captioned = captions[captions["status"] == "ok"]
    by_source = {MODEL: 0, HUMAN: 0, **counts(captions, "source")}
    # Without captions by the model, another model changes nothing.
    model = (
        {MODEL_FINGERPRINT: fingerprint(settings.captioner.model, settings.root)}
        if by_source[MODEL]
        else {}
    )
    return table_output(
        captions,
        {
            "contact_sheet": captioned_thumbnails(
                [
                    (store.path(images[row.poster_id], ".png"), row.caption)
                    for row in rows(captioned.head(THUMBNAILS))
                ],
                total=len(captioned),
            ),
            "captions": table_preview(captions, ["caption", "source", "status", "reason"]),
            **by_source,
            **model,
            FAILED_ITEMS: retriable_count(captions),
            "to_look_at": int((captions["reason"] != "").sum()),
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
    deps=["holdout_posters"],  # of which none may be in it: its check looks again when they change
)
def training_csv(
    deployment: dg.ResourceParam[Deployment],
    resized_posters: Table,
    poster_captions: Table,
) -> dg.Output[Table]:
    """The training set: `training.csv` with file_name and caption, beside its images.

    What the trainer reads, and what `datasets.load_dataset("imagefolder", data_dir=...)` reads as
    well. Captions are worded by the settings `captioner.template` and `captioner.trigger` here, so
    another wording captions nothing again. Each version lies in a folder of its own, named by the
    hash of its CSV, and stays.
    """
    from posterpipe.core.training.training_set import build_training_set

    store = deployment.store
    captioner = deployment.settings.captioner
    table, folder, version = build_training_set(
        store,
        resized_posters,
        poster_captions,
        template=captioner.template,
        trigger=captioner.trigger,
    )
    return table_output(
        table.assign(training_set=version),
        {
            "contact_sheet": captioned_thumbnails(
                [(folder / row.file_name, row.caption) for row in rows(table.head(THUMBNAILS))],
                total=len(table),
            ),
            "training_csv": table_preview(table, ["file_name", "caption"]),
            "folder": dg.MetadataValue.path(folder),
            "training_set": version,
            "template": captioner.template,
            "trigger": captioner.trigger or "none",
        },
        data_version=version,
    )
