"""What is wrong with the training set.

What belongs here: its rows and files, captions that are too long, and posters that are held out as
well. What does not: the posters it is made of (`posters`), the wording of captions (`captions`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from posterpipe.core.files import unchanged
from posterpipe.core.images import PLAIN_HASHES
from posterpipe.core.quality.finding import Finding, share_of
from posterpipe.core.quality.posters import source_names
from posterpipe.core.store import cells
from posterpipe.core.training.training_set import CSV_NAME

_PAIRS_AT_ONCE = 4_000_000
"""Bounds the memory of comparing hashes: 8 bytes a pair."""


def enough_rows(training: pd.DataFrame, posters: pd.DataFrame, min_posters: int) -> Finding:
    """Whether `training_csv` still has `min_posters` rows after resizing and captioning.

    `posters`: `raw_posters`; its usable ones that are not trained on are named.
    """
    usable = posters[posters["status"] == "ok"]
    lost = usable[~usable["poster_id"].isin(training["poster_id"])]
    return Finding(
        passed=len(training) >= min_posters,
        summary=f"{len(training)} posters to train on; at least {min_posters} are needed",
        remedy="look at the column `reason` of resized_posters and poster_captions, or lower "
        "checks.min_posters",
        expected=f"at least {min_posters}",
        actual=len(training),
        offenders=lost[["source_name"]],
        numbers={"left_out": len(lost)},
    )


def shrinkage(
    training: pd.DataFrame, trained: Mapping[str, str] | None, max_share: float
) -> Finding:
    """By which share `training_csv` is smaller than the set that was trained on last.

    `trained`: captions of that one by file name; None where there is nothing to compare with.
    Posters in the place of others are no loss, and other images of the same posters neither.
    """
    before = trained or {}
    fewer = max(0, len(before) - len(training))
    share = share_of(fewer, len(before))
    gone = sorted(before.keys() - set(training["file_name"])) if fewer else []
    compared = (
        f"{len(before)} were trained on last ({share:.1%} fewer; at most {max_share:.1%} may be)"
        if before
        else "no earlier training to compare with"
    )
    return Finding(
        passed=share <= max_share,
        summary=f"{len(training)} posters to train on, and {compared}",
        remedy="see whether all posters are there: perhaps a disk is not mounted, or a delivery "
        "broke off. If they were removed on purpose, raise checks.max_lost_share to 1 until the "
        "next training",
        expected=f"at most {max_share:g}",
        actual=share,
        offenders=pd.DataFrame(
            [(name, before[name]) for name in gone], columns=["file_name", "caption"]
        ),
        numbers={"fewer": fewer},
    )


def incomplete_rows(training: pd.DataFrame, training_sets: Path) -> Finding:
    """Rows of `training_csv` without their image or without a caption, and files that were changed.

    `training_sets`: the folder of all training sets; each lies in a folder named by the sha256 of
    its `training.csv`.
    """
    found: list[tuple[str, str, str]] = []
    for version in training["training_set"].unique():
        csv = training_sets / str(version) / CSV_NAME
        try:
            digest = hashlib.sha256(csv.read_bytes()).hexdigest()
        except OSError as error:
            found.append((csv.name, "", f"cannot be read ({error.strerror})"))
        else:
            if digest != version:
                found.append((csv.name, "", "was changed after it was written"))
    names = ("training_set", "file_name", "caption", "image")
    for version, file_name, written, image in cells(training, *names):
        caption = "" if written is None else str(written)
        if not caption.strip():
            found.append((str(file_name), caption, "no caption"))
        path = f"{training_sets}/{version}/{file_name}"
        if unchanged(path, str(image)):
            continue
        problem = "no image"
        if os.path.exists(path):
            empty = os.path.getsize(path) == 0
            problem = "an empty file" if empty else "another image than was written"
        found.append((str(file_name), caption, problem))
    return Finding(
        passed=not found,
        summary=f"{len(training)} rows, {len(found)} faults; each row needs its image and a "
        "caption",
        remedy="materialize training_csv again, which makes its folder anew",
        expected=0,
        actual=len(found),
        offenders=pd.DataFrame(found, columns=["file_name", "caption", "problem"]),
    )


def long_captions(
    training: pd.DataFrame, count_tokens: Callable[[str], int], max_tokens: int, max_share: float
) -> Finding:
    """Which share of the captions in `training_csv` has more tokens than the text encoder reads.

    `count_tokens` and `max_tokens` leave out start and end token (see `sampler.text_limit`).
    """
    captions = training["caption"].astype(str)
    tokens = {caption: count_tokens(caption) for caption in captions.unique()}
    counted = training.assign(tokens=captions.map(tokens))
    long = counted[counted["tokens"] > max_tokens].sort_values("tokens", ascending=False)
    longest = int(counted["tokens"].max()) if len(counted) else 0
    share = share_of(len(long), len(training))
    return Finding(
        passed=share <= max_share,
        summary=f"{len(long)} of {len(training)} captions have more than the {max_tokens} tokens "
        f"that the text encoder reads ({share:.1%}; at most {max_share:.1%} may); the longest has "
        f"{longest}",
        remedy="write shorter ones (`<poster>.txt` or data/captions.csv), shorten "
        "captioner.template, or lower captioner.max_new_tokens; the limit is "
        "checks.max_long_captions, and what is within it is cut at the end by the trainer",
        expected=f"at most {max_share:g}",
        actual=share,
        offenders=long[["file_name", "caption", "tokens"]],
        numbers={"long": len(long), "longest": longest},
    )


def holdout_overlap(
    training: pd.DataFrame, posters: pd.DataFrame, holdout: pd.DataFrame, max_distance: int
) -> Finding:
    """Posters of `training_csv` that are in the holdout set as well: by bytes, or by looks.

    `posters`: `raw_posters`; `holdout`: the same table of the holdout folder. Looks are the same up
    to `max_distance` bits between perceptual hashes; -1 compares bytes only, as do pictures of one
    plain colour, which all have one hash. Scores on the holdout set would otherwise praise what was
    learned by heart. Of several holdout posters that look like a training poster, the nearest is
    named.
    """
    files = source_names(posters)
    usable = posters[posters["status"] == "ok"]
    look = dict(cells(usable, "poster_id", "perceptual_hash"))
    held = holdout[holdout["poster_id"] != ""]
    held_files = held.groupby("poster_id", sort=False)["source_name"].first().to_dict()
    trained = [str(poster_id) for poster_id in training["poster_id"].tolist()]
    pairs = {
        (poster_id, poster_id): "the same bytes" for poster_id in trained if poster_id in held_files
    }
    seen = held[~held["perceptual_hash"].isin(["", *PLAIN_HASHES])]
    known = [
        poster_id for poster_id in trained if look.get(poster_id, "") not in ("", *PLAIN_HASHES)
    ]
    near = _nearest(
        [look[poster_id] for poster_id in known], list(seen["perceptual_hash"]), max_distance
    )
    held_ids = [str(poster_id) for poster_id in seen["poster_id"]]
    for trained_at, held_at, distance in near:
        pair = (known[trained_at], held_ids[held_at])
        pairs.setdefault(pair, f"the same picture: {distance} of 64 bits differ")
    offenders = pd.DataFrame(
        [
            (files.get(ours, ours), held_files[theirs], problem)
            for (ours, theirs), problem in pairs.items()
        ],
        columns=["training_poster", "holdout_poster", "problem"],
    )
    both = len({ours for ours, _ in pairs})
    compared = (
        f"{both} of {len(training)} training posters are among the {len(held)} holdout posters"
    )
    return Finding(
        passed=offenders.empty,
        summary=f"{compared}; none may be" if len(held) else "no holdout posters to compare with",
        remedy="remove each from the landing folder or from the holdout folder, and run this check "
        "again; where two posters only look alike, lower checks.holdout_distance",
        expected=0,
        actual=both,
        offenders=offenders,
        numbers={"holdout_posters": len(held)},
    )


def _nearest(
    hashes: Sequence[str], others: Sequence[str], max_distance: int
) -> list[tuple[int, int, int]]:
    """(index, index of the nearest other, bits that differ) of each hash that has one within
    `max_distance`, of equally near ones the first.

    Not all pairs: where a thousand posters are of one template, each is like each.
    """
    if not hashes or not others or max_distance < 0:
        return []
    ours = np.array([int(value, 16) for value in hashes], dtype=np.uint64)
    theirs = np.array([int(value, 16) for value in others], dtype=np.uint64)
    found: list[tuple[int, int, int]] = []
    step = max(1, _PAIRS_AT_ONCE // len(theirs))
    for start in range(0, len(ours), step):
        distances = np.bitwise_count(ours[start : start + step, None] ^ theirs[None, :])
        nearest = distances.argmin(axis=1)
        least = distances.min(axis=1)
        found += [
            (start + int(row), int(nearest[row]), int(least[row]))
            for row in np.flatnonzero(least <= max_distance)
        ]
    return found
