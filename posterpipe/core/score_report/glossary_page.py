"""The glossary, with what it says of the scorer.

What belongs here: what stands on the page. What does not: markup and style (`glossary.html.j2`).
"""

from __future__ import annotations

from typing import Any

from posterpipe.core.score_report import charts
from posterpipe.core.score_report.data import Published, text


def glossary_context(published: Published) -> dict[str, Any]:
    """For `glossary.html.j2`: the scorer, and between which cosines the images lie."""
    encoder = next(
        (
            text(row["encoder"])
            for row in published.rows("dim_metric")
            if row["metric_id"] == published.headline_metric
        ),
        "",
    )
    values = [shot.cosine for _, shot in published.shots if shot.cosine is not None]
    span = f"{charts.plain(min(values), 2)} to {charts.plain(max(values), 2)}" if values else ""
    return {"encoder": encoder, "span": span, "starter": "starter" in encoder}
