"""Posters as they arrive.

What belongs here: the asset over the landing folder. What does not: judging and decoding files
(`core.landing`).
"""

import dagster as dg

from posterpipe.defs.resources import (
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
    group_name="ingest",
    kinds={"python", "pillow"},
    owners=["team:data"],
    code_version="1",
    io_manager_key=TABLES,
    metadata=columns(
        poster_id="string: sha256 of the file's bytes, the poster's name from here on",
        source_name="string: path inside the landing folder",
        size_bytes="int: size of the file",
        format="string: what the content is, whatever the extension says",
        width="int: pixels, as stored",
        height="int: pixels, as stored",
        status="string: ok, rejected or duplicate",
        reason="string: why it is not ok, and what to do",
    ),
)
def raw_posters(
    context: dg.AssetExecutionContext, deployment: dg.ResourceParam[Deployment]
) -> dg.Output[Table]:
    """Every file of the landing folder, judged: usable, rejected (with the reason) or a duplicate.

    Drop posters into the folder (`data/raw_posters/`, or the setting `landing`) and materialize
    this. Usable posters are copied into the store under the hash of their bytes, so nothing later
    depends on the folder; unchanged files are not read again.
    """
    from posterpipe.core.landing import scan

    settings = deployment.settings
    store = deployment.store
    folder = settings.path(settings.landing)
    posters = scan(folder, settings.images, store, deployment.progress(context))
    usable = posters[posters["status"] == "ok"]
    refused = posters[posters["status"] != "ok"]
    return table_output(
        posters,
        {
            "contact_sheet": thumbnails(
                [(store.path(row.poster_id), row.source_name) for row in rows(usable)]
            ),
            **counts(posters, "status"),
            "refused": table_preview(refused, ["source_name", "status", "reason"]),
            "posters": table_preview(posters.drop(columns="poster_id")),
            "folder": dg.MetadataValue.path(folder),
        },
    )
