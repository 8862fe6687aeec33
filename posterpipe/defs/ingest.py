"""Posters as they arrive.

What belongs here: the assets over the landing folder or bucket, and over the holdout folder. What
does not: judging and decoding files (`core.posters.landing`), and noticing that they arrived
(`arrivals`).
"""

from typing import TYPE_CHECKING, Any

import dagster as dg

from posterpipe.defs.metadata import (
    SOURCE_DIGEST,
    SOURCE_PORTABLE,
    THUMBNAILS,
    UNREAD,
    columns,
    counts,
    rows,
    table_preview,
    thumbnails,
)
from posterpipe.defs.resources import TABLES, Deployment, Table, table_output

if TYPE_CHECKING:
    from posterpipe.core.store import Store

_DESCRIBED = dict(
    poster_id="string: sha256 of the file's bytes, the poster's name from here on",
    source_name="string: path inside the folder",
    size_bytes="int: size of the file",
    format="string: what the content is, whatever the extension says",
    width="int: pixels, as stored",
    height="int: pixels, as stored",
    perceptual_hash="string: 16 hex digits, alike for pictures that look alike; only where ok",
    status="string: ok, rejected or duplicate",
    reason="string: why it is not ok, and what to do",
    near_duplicate_of="string: an earlier poster that it resembles; it is used all the same",
)
_COLUMNS = columns(**_DESCRIBED)


@dg.asset(
    group_name="ingest",
    kinds={"python", "pillow"},
    owners=["team:data"],
    code_version="4",
    io_manager_key=TABLES,
    metadata=_COLUMNS,
)
def raw_posters(
    context: dg.AssetExecutionContext, deployment: dg.ResourceParam[Deployment]
) -> dg.Output[Table]:
    """Every file of the landing folder, judged: usable, rejected (with the reason) or a duplicate.

    Drop posters into the folder (`data/raw_posters/`, or the setting `landing`, which may also name
    a bucket): the sensor `arrivals` notices and materializes this. Usable posters are copied into
    the store under the hash of their bytes, so nothing later depends on the folder; unchanged files
    are not read again. Posters that look like an earlier one are marked, and used all the same.
    """
    from posterpipe.core.posters.landing import landing_digest, list_posters, scan
    from posterpipe.core.posters.listing import Folder, open_place

    settings = deployment.settings
    store = deployment.store
    place = open_place(settings.landing, settings.root)
    entries = list_posters(place)
    digests = {
        SOURCE_DIGEST: landing_digest(entries, store),
        SOURCE_PORTABLE: landing_digest(entries, store, portable=True),
    }
    posters = scan(place, settings.images, store, deployment.progress(context), entries=entries)
    resembling = posters[posters["near_duplicate_of"] != ""]
    return table_output(
        posters,
        {
            **_shown(posters, store),
            "near_duplicates": len(resembling),
            "resembling": table_preview(resembling, ["source_name", "near_duplicate_of"]),
            "folder": dg.MetadataValue.path(place.location)
            if isinstance(place, Folder)
            else dg.MetadataValue.text(place.location),
            **digests,
        },
    )


@dg.asset(
    group_name="ingest",
    kinds={"python", "pillow"},
    owners=["team:data"],
    code_version="4",
    io_manager_key=TABLES,
    metadata=columns(**_DESCRIBED, caption="string: what the text file beside it says"),
)
def holdout_posters(
    context: dg.AssetExecutionContext, deployment: dg.ResourceParam[Deployment]
) -> dg.Output[Table]:
    """Film posters that are never trained on, judged like the others.

    What generated posters are compared with, and what no training set may contain. They lie in
    `data/holdout_posters/` (the setting `holdout`); the sensor `arrivals` notices when that folder
    changes. A text file beside a poster, `moon.txt` for `moon.png`, is its caption where the loss
    on held-out posters is measured; `captions.csv` is about the landing folder alone. Without any
    poster the table is empty, and so are the scores against them. Where there were some, a folder
    that is missing or holds nothing is an error: nothing may be mounted there.
    """
    from posterpipe.core.captions.people import unread_count
    from posterpipe.core.posters.arrivals import holdout_digest, holdout_entries, missing_holdout
    from posterpipe.core.posters.landing import LandingEmpty, scan_holdout
    from posterpipe.core.posters.listing import HOLDOUT, open_place
    from posterpipe.core.training.holdout_set import with_captions

    settings = deployment.settings
    store = deployment.store
    folder = settings.path(settings.holdout)
    progress = deployment.progress(context)
    entries = holdout_entries(folder)
    if missing := missing_holdout(folder, entries, store):
        raise LandingEmpty(missing)
    digests = {
        SOURCE_DIGEST: holdout_digest(entries, store),
        SOURCE_PORTABLE: holdout_digest(entries, store, portable=True),
    }
    place = open_place(folder, role=HOLDOUT)
    found = scan_holdout(place, settings.images, store, progress, entries=entries)
    posters, written = with_captions(found, place, entries, store, progress)
    shown = _shown(posters, store)
    unused = written[written["status"] != "ok"]
    return table_output(
        posters,
        {
            **shown,
            UNREAD: shown[UNREAD] + unread_count(written),
            "captions_not_used": table_preview(unused, ["source_name", "reason"]),
            "folder": dg.MetadataValue.path(folder),
            **digests,
        },
    )


def _shown(posters: Table, store: "Store") -> dict[str, Any]:
    """What the UI shows of a table of posters, and how many could not be read."""
    from posterpipe.core.posters.landing import unread_count

    usable = posters[posters["status"] == "ok"]
    refused = posters[posters["status"] != "ok"]
    images = [(store.path(row.poster_id), row.source_name) for row in rows(usable.head(THUMBNAILS))]
    return {
        "contact_sheet": thumbnails(images, total=len(usable)),
        **counts(posters, "status"),
        "refused": table_preview(refused, ["source_name", "status", "reason"]),
        "posters": table_preview(posters.drop(columns="poster_id")),
        UNREAD: unread_count(posters),
    }
