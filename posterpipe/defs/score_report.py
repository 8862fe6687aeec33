"""The score report as an asset.

What belongs here: when it is written, and how the UI leads to it. What does not: its pages
(`core.score_report`).
"""

import dagster as dg

from posterpipe.defs.resources import Deployment


@dg.asset(
    group_name="reports",
    kinds={"python", "html"},
    owners=["team:analytics"],
    code_version="7",
    deps=["published_scores"],
)
def score_report(
    context: dg.AssetExecutionContext, deployment: dg.ResourceParam[Deployment]
) -> dg.MaterializeResult:
    """The report that people read: `data/store/public/report/index.html`.

    Leaderboard with intervals, growth chart, paired effects, trend over checkpoints, a gallery of
    every prompt, seed and variant, copies, legibility, the gate's log, data quality, a glossary.
    One static folder: open it from disk, or copy it to any web server. Written from the published
    database whenever that changed, and replaced as a whole.
    """
    from posterpipe.core.score_report import write_report

    # Images of the store are linked here; `posterpipe gc` leaves them alone meanwhile.
    with deployment.store.lease():
        written = write_report(
            deployment.published_path,
            deployment.store_root,
            deployment.report_path.parent,
            progress=deployment.progress(context),
        )
    address = deployment.settings.public_url
    return dg.MaterializeResult(
        data_version=dg.DataVersion(written.digest),
        metadata={
            "open": dg.MetadataValue.url(
                f"{address.rstrip('/')}/report/{written.index.name}"
                if address
                else written.index.resolve().as_uri()
            ),
            "path": dg.MetadataValue.path(written.index),
            "says": dg.MetadataValue.md(written.summary),
            "pages": written.pages,
            "images": written.images,
            "missing_files": written.missing,
            "new_small_images": written.made,
            "bytes": written.bytes,
        },
    )
