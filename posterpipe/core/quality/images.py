"""Images that show nothing.

What belongs here: the statistics of an image's pixels, kept in the store, and the share of blank
images among those trained on and those drawn. What does not: images that are missing
(`generations`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from posterpipe.core.parallel import parallel_map
from posterpipe.core.progress import NO_PROGRESS, Progress
from posterpipe.core.quality.finding import Finding, share_of
from posterpipe.core.store import Store, cells, compute_missing, content_key

STATISTICS_VERSION = 1
"""Raise it when `image_statistics` gives other numbers: every image is then looked at again."""

BLACK, WHITE = 8, 247
"""Of 255. Below, above: no eye tells it from black or white."""

PLAIN_DEVIATION = 2.0
"""Standard deviation, of 255, of an image of one colour: JPEG adds about 1."""

_TAIL = 0.001
"""Share of the pixels that may be otherwise at either end: dust does not make a picture."""


def image_statistics(image: Image.Image) -> dict[str, float]:
    """Of an image's RGB values, each 0 to 255: `darkest` and `brightest` (of all channels, but for
    0.1 % of the pixels at either end) and `deviation` (the largest of the channels' standard
    deviations)."""
    counts = np.asarray(image.convert("RGB").histogram(), dtype=np.float64).reshape(3, 256)
    levels = np.arange(256)
    shares = counts / counts.sum(axis=1, keepdims=True)
    below = np.cumsum(shares, axis=1)
    means = shares @ levels
    variances = (shares * (levels - means[:, None]) ** 2).sum(axis=1)
    return {
        "darkest": float((below > _TAIL).argmax(axis=1).min()),
        "brightest": float((below >= 1 - _TAIL).argmax(axis=1).max()),
        "deviation": float(np.sqrt(variances.max())),
    }


def blank_reason(statistics: Mapping[str, Any]) -> str:
    """Why an image of such statistics shows nothing; "" for one that shows something."""
    if statistics.get("problem"):
        return str(statistics["problem"])
    if statistics["brightest"] <= BLACK:
        return "all black"
    if statistics["darkest"] >= WHITE:
        return "all white"
    if statistics["deviation"] < PLAIN_DEVIATION:
        return "all of one colour"
    return ""


def stored_statistics(
    store: Store, blobs: Iterable[str], progress: Progress = NO_PROGRESS
) -> dict[str, dict[str, Any]]:
    """`image_statistics` of PNGs in the store, by blob.

    Each image is read once, whatever asks; one that cannot be read has a `problem` instead and is
    read again the next time.
    """
    by_key = {content_key("image_statistics", STATISTICS_VERSION, blob): blob for blob in blobs}

    def compute(missing: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        with progress.task("measure images", len(missing), "images") as tick:
            paths = [store.path(by_key[key], ".png") for key in missing]
            for key, row in zip(missing, parallel_map(_read_statistics, paths), strict=True):
                yield key, row
                tick()

    rows = compute_missing(
        store,
        "image_statistics",
        list(by_key),
        compute,
        save_every=256,
        usable=lambda row: not row.get("problem"),
    )
    return {by_key[key]: row for key, row in rows.items()}


def _read_statistics(path: Path) -> dict[str, Any]:
    try:
        with Image.open(path) as image:
            return image_statistics(image)
    except FileNotFoundError:
        return {"problem": "its file is gone from the store"}
    except Exception as error:  # damaged bytes make Pillow raise nearly anything
        return {"problem": f"cannot be read ({error})"}


def blank_training_images(
    resized: pd.DataFrame,
    names: Mapping[str, str],
    statistics: Mapping[str, Mapping[str, Any]],
    max_share: float,
) -> Finding:
    """Which share of the images in `resized_posters` shows nothing.

    `names`: see `source_names`; `statistics`: see `stored_statistics`.
    """
    made = resized[resized["status"] == "ok"]
    blank = [
        (names.get(str(poster_id), str(poster_id)), reason)
        for poster_id, image in cells(made, "poster_id", "image")
        if (reason := blank_reason(statistics[str(image)]))
    ]
    share = share_of(len(blank), len(made))
    return Finding(
        passed=share <= max_share,
        summary=f"{len(blank)} of {len(made)} training images show nothing ({share:.1%}); at most "
        f"{max_share:.1%} may",
        remedy="look at those posters and export them again, or remove them; where the posters are "
        "right, their decoding is not. The limit is checks.max_blank_share",
        expected=f"at most {max_share:g}",
        actual=share,
        offenders=pd.DataFrame(blank, columns=["source_name", "reason"]),
        numbers={"blank": len(blank)},
    )


def blank_generations(
    generations: pd.DataFrame,
    statistics: Mapping[str, Mapping[str, Any]],
    max_share: float,
) -> Finding:
    """Which share of the images of a table of generations shows nothing.

    Those with status `blocked`, and those that the sampler took for good but whose `statistics`
    (see `stored_statistics`) say otherwise.
    """
    drawn = generations[generations["status"] != "failed"]
    reasons = [
        str(row.reason) if row.status == "blocked" else blank_reason(statistics[str(row.image)])
        for row in drawn.itertuples(index=False)
    ]
    blank = drawn.assign(reason=reasons)[[bool(reason) for reason in reasons]]
    share = share_of(len(blank), len(drawn))
    return Finding(
        passed=share <= max_share,
        summary=f"{len(blank)} of {len(drawn)} images show nothing ({share:.1%}); at most "
        f"{max_share:.1%} are expected",
        remedy="look at the loss curve of the checkpoint, and where sampler.precision is fp16 try "
        "bf16 or fp32. The limit is checks.max_blocked_share",
        expected=f"at most {max_share:g}",
        actual=share,
        offenders=blank[["variant", "prompt_id", "seed", "reason"]],
        numbers={"blank": len(blank)},
    )
