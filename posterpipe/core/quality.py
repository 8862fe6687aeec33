"""What is wrong with posters, captions, images and scores: numbers, limits and names.

What belongs here: pure functions from tables to a `Finding`, and the statistics of an image. What
does not: the limits' values (`CheckSettings`), when a check runs and what it stops (`defs.checks`),
mending what was found.

A finding names what is wrong by the names that people know: files of the landing folder, prompts
and seeds.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from posterpipe.core.images import PLAIN_HASHES
from posterpipe.core.parallel import parallel_map
from posterpipe.core.progress import NoProgress, Progress
from posterpipe.core.prompts import shared_seeds
from posterpipe.core.store import Store, cells, compute_missing, content_key, unchanged

STATISTICS_VERSION = 1
"""Raise it when `image_statistics` gives other numbers: every image is then looked at again."""

BLACK, WHITE = 8, 247
"""Of 255. Below, above: no eye tells it from black or white."""

PLAIN_DEVIATION = 2.0
"""Standard deviation, of 255, of an image of one colour: JPEG adds about 1."""

_TAIL = 0.001
"""Share of the pixels that may be otherwise at either end: dust does not make a picture."""

COSINE_ROUNDING = 1e-6
"""By how much the product of two float32 vectors of length 1 may pass 1."""

_NAMED = 3
"""Posters named for one caption; the rest are counted."""

_PAIRS_AT_ONCE = 4_000_000
"""Bounds the memory of comparing hashes: 8 bytes a pair."""

_WORD = re.compile(r"\w+(?:['’]\w+)*")


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    passed: bool
    summary: str
    """One sentence: what is there and what should be."""
    remedy: str
    """What to do where it did not pass."""
    expected: int | float | str
    """The limit, e.g. `at most 0.25`."""
    actual: int | float | str
    offenders: pd.DataFrame
    """Everything that counts against it, named; also where it is within the limit."""
    numbers: Mapping[str, int | float] = field(default_factory=dict)
    """Further numbers, worth a curve over time."""

    @property
    def description(self) -> str:
        """The summary, and the remedy where one is needed."""
        return self.summary if self.passed else f"{self.summary}: {self.remedy}"


# -- posters ---------------------------------------------------------------------------------------


def enough_posters(posters: pd.DataFrame, min_posters: int) -> Finding:
    """Whether `raw_posters` has at least `min_posters` usable ones (status `ok`)."""
    usable = int((posters["status"] == "ok").sum())
    refused = posters[posters["status"] != "ok"]
    return Finding(
        passed=usable >= min_posters,
        summary=f"{usable} usable posters; at least {min_posters} are needed",
        remedy="put more into the landing folder, mend the refused ones, or lower "
        "checks.min_posters",
        expected=f"at least {min_posters}",
        actual=usable,
        offenders=refused[["source_name", "status", "reason"]],
    )


def rejected_share(posters: pd.DataFrame, max_share: float) -> Finding:
    """Which share of the files in `raw_posters` was rejected; duplicates are no fault."""
    rejected = posters[posters["status"] == "rejected"]
    share = _share(len(rejected), len(posters))
    return Finding(
        passed=share <= max_share,
        summary=f"{len(rejected)} of {len(posters)} files rejected ({share:.1%}); at most "
        f"{max_share:.1%} are expected",
        remedy="mend or remove them as each reason says; if all of a delivery are named, ask who "
        "made it. The limit is checks.max_rejected_share",
        expected=f"at most {max_share:g}",
        actual=share,
        offenders=rejected[["source_name", "reason"]],
        numbers={"rejected": len(rejected)},
    )


def some_held_out(holdout: pd.DataFrame, folder: Path) -> Finding:
    """Whether `holdout_posters` has a usable one; `folder` is where they lie."""
    usable = int((holdout["status"] == "ok").sum())
    refused = holdout[holdout["status"] != "ok"]
    return Finding(
        passed=usable > 0,
        summary=f"{usable} usable holdout posters in {folder}",
        remedy="put film posters there that are not trained on, mend the refused ones, or set "
        "POSTERPIPE_HOLDOUT to another folder",
        expected="at least 1",
        actual=usable,
        offenders=refused[["source_name", "status", "reason"]],
    )


def near_duplicates(posters: pd.DataFrame, max_share: float) -> Finding:
    """Which share of the usable posters in `raw_posters` resembles an earlier one."""
    usable = posters[posters["status"] == "ok"]
    flagged = usable[usable["near_duplicate_of"] != ""]
    share = _share(len(flagged), len(usable))
    return Finding(
        passed=share <= max_share,
        summary=f"{len(flagged)} of {len(usable)} posters resemble an earlier one ({share:.1%}); "
        f"at most {max_share:.1%} are expected",
        remedy="look at the pairs and remove the worse one of each, since what is there twice is "
        "learned twice. The limit is checks.max_near_duplicate_share",
        expected=f"at most {max_share:g}",
        actual=share,
        offenders=flagged[["source_name", "near_duplicate_of"]],
        numbers={"near_duplicates": len(flagged)},
    )


def source_names(posters: pd.DataFrame) -> dict[str, str]:
    """The file in the landing folder by poster_id; of duplicates the one that is used."""
    ordered = posters.sort_values("status", key=lambda status: status != "ok", kind="stable")
    names: dict[str, str] = {}
    for poster_id, name in cells(ordered, "poster_id", "source_name"):
        names.setdefault(str(poster_id), str(name))
    return names


def failed_share(
    table: pd.DataFrame, names: Mapping[str, str], max_share: float, what: str
) -> Finding:
    """Which share of the rows of `resized_posters` or `poster_captions` has failed.

    `what` they hold, in words; `names`: see `source_names`.
    """
    failed = [
        (names.get(str(poster_id), str(poster_id)), str(reason))
        for poster_id, status, reason in cells(table, "poster_id", "status", "reason")
        if status != "ok"
    ]
    share = _share(len(failed), len(table))
    return Finding(
        passed=share <= max_share,
        summary=f"{len(failed)} of {len(table)} {what} could not be made ({share:.1%}); at most "
        f"{max_share:.1%} may fail",
        remedy="do what the reasons say and materialize the asset again; it is also tried again by "
        "itself, ever more seldom, for a week. The limit is checks.max_failed_share",
        expected=f"at most {max_share:g}",
        actual=share,
        offenders=pd.DataFrame(failed, columns=["source_name", "reason"]),
        numbers={"failed": len(failed)},
    )


# -- images ----------------------------------------------------------------------------------------


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
    store: Store, blobs: Iterable[str], progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """`image_statistics` of PNGs in the store, by blob.

    Each image is read once, whatever asks; one that cannot be read has a `problem` instead and is
    read again the next time.
    """
    progress = progress or NoProgress()
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
    share = _share(len(blank), len(made))
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
    share = _share(len(blank), len(drawn))
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


# -- captions --------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.casefold())


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Every run of `n` words, in order."""
    found = words(text)
    return list(zip(*(found[start:] for start in range(n)), strict=False))


def repeated_share(caption: str, n: int = 2) -> float:
    """Which share of a caption's n-grams repeats an earlier one, 0 to 1.

    Welleck et al. 2020 (arXiv:1908.04319) call it seq-rep-n. With pairs of words `a cat cat cat`
    has 1/3, and a caption that says one phrase over and over comes near 1.
    """
    grams = ngrams(caption, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_n(captions: Iterable[str], n: int) -> float:
    """Distinct n-grams among all n-grams of the captions, 0 to 1 (Li et al. 2016,
    arXiv:1510.03055). It falls as captions are added, so it compares sets of one size only."""
    grams = Counter(gram for caption in captions for gram in ngrams(caption, n))
    return _share(len(grams), grams.total())


def repeated_captions(
    captions: pd.DataFrame,
    names: Mapping[str, str],
    *,
    max_repeated_share: float,
    max_shared: float,
) -> Finding:
    """Captions in `poster_captions` that repeat themselves, and those that several posters share.

    Passes when none repeats itself more than `max_repeated_share` (see `repeated_share`) and at
    most the share `max_shared` of the posters has the caption of another. `names`: see
    `source_names`.
    """
    made = captions[captions["status"] == "ok"]
    posters_of: dict[str, list[str]] = {}
    wording: dict[str, str] = {}
    for poster_id, caption in cells(made, "poster_id", "caption"):
        same = _same_words(str(caption))
        wording.setdefault(same, str(caption))
        posters_of.setdefault(same, []).append(names.get(str(poster_id), str(poster_id)))
    repeating = [
        (wording[same], _some(posters), f"{share:.0%} of its word pairs are repeats")
        for same, posters in posters_of.items()
        if (share := repeated_share(same)) > max_repeated_share
    ]
    shared = sorted(
        (same for same, posters in posters_of.items() if len(posters) > 1),
        key=lambda same: -len(posters_of[same]),
    )
    sharing = [
        (wording[same], _some(posters_of[same]), f"{len(posters_of[same])} posters have it")
        for same in shared
    ]
    sharers = sum(len(posters_of[same]) for same in shared)
    share = _share(sharers, len(made))
    return Finding(
        passed=not repeating and share <= max_shared,
        summary=f"{len(repeating)} captions repeat themselves, and {sharers} of {len(made)} "
        f"posters have the caption of another ({share:.1%}; at most {max_shared:.1%} are expected)",
        remedy="write better ones beside the posters (`<poster>.txt`) or into data/captions.csv, "
        "or raise captioner.num_beams and set captioner.no_repeat_ngram_size. The limits are "
        "checks.max_repeated_share and checks.max_shared_captions",
        expected=f"0 repeat themselves, at most {max_shared:g} share one",
        actual=f"{len(repeating)} repeat themselves, {share:.3g} share one",
        offenders=pd.DataFrame([*repeating, *sharing], columns=["caption", "posters", "problem"]),
        numbers={"repeating": len(repeating), "sharing": sharers, "sharing_share": share},
    )


def caption_diversity(
    captions: pd.DataFrame, names: Mapping[str, str], min_distinct: float
) -> Finding:
    """Which share of the captions in `poster_captions` is distinct.

    A captioner that says the same of every poster has nothing to teach. `names`: see
    `source_names`.
    """
    made = captions[captions["status"] == "ok"]
    texts = [str(caption) for caption in made["caption"].tolist()]
    by_words: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        by_words.setdefault(_same_words(text), []).append(place)
    share = _share(len(by_words), len(texts))
    files = [names.get(str(poster_id), str(poster_id)) for poster_id in made["poster_id"].tolist()]
    often = sorted((places for places in by_words.values() if len(places) > 1), key=len)[::-1]
    return Finding(
        passed=bool(texts) and share >= min_distinct,
        summary=f"{len(by_words)} distinct captions for {len(texts)} posters ({share:.1%}); at "
        f"least {min_distinct:.1%} are needed",
        remedy="look at the captions and the training images: a captioner that cannot see says the "
        "same of every picture. The limit is checks.min_distinct_captions",
        expected=f"at least {min_distinct:g}",
        actual=share,
        offenders=pd.DataFrame(
            [
                (texts[places[0]], len(places), _some([files[place] for place in places]))
                for places in often
            ],
            columns=["caption", "count", "posters"],
        ),
        numbers={
            "distinct_1": distinct_n(texts, 1),
            "distinct_2": distinct_n(texts, 2),
            "mean_words": sum(len(words(text)) for text in texts) / max(len(texts), 1),
        },
    )


# -- the training set ------------------------------------------------------------------------------


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


def incomplete_rows(training: pd.DataFrame, training_sets: Path) -> Finding:
    """Rows of `training_csv` without their image or without a caption, and files that were changed.

    `training_sets`: the folder of all training sets; each lies in a folder named by the sha256 of
    its `training.csv`.
    """
    found: list[tuple[str, str, str]] = []
    for version in training["training_set"].unique():
        csv = training_sets / str(version) / "training.csv"
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
    share = _share(len(long), len(training))
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
    learned by heart.
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
    near = _near_pairs(
        [look[poster_id] for poster_id in known], list(seen["perceptual_hash"]), max_distance
    )
    for trained_at, held_at, distance in near:
        pair = (known[trained_at], str(seen["poster_id"].iloc[held_at]))
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


def _near_pairs(
    hashes: Sequence[str], others: Sequence[str], max_distance: int
) -> list[tuple[int, int, int]]:
    """(index, index of the other, bits that differ) of all pairs within `max_distance`."""
    if not hashes or not others or max_distance < 0:
        return []
    ours = np.array([int(value, 16) for value in hashes], dtype=np.uint64)
    theirs = np.array([int(value, 16) for value in others], dtype=np.uint64)
    pairs: list[tuple[int, int, int]] = []
    step = max(1, _PAIRS_AT_ONCE // len(theirs))
    for start in range(0, len(ours), step):
        distances = np.bitwise_count(ours[start : start + step, None] ^ theirs[None, :])
        for row, column in np.argwhere(distances <= max_distance):
            pairs.append((start + int(row), int(column), int(distances[row, column])))
    return pairs


# -- generations and scores ------------------------------------------------------------------------


def missing_images(
    generations: pd.DataFrame,
    suite: pd.DataFrame,
    variants: Sequence[str],
    delayed: Sequence[str] = (),
) -> Finding:
    """Which (variant, prompt, seed) of the suite was not drawn.

    `suite`: the table `prompt_suite`; `delayed`: variants of the prompts that hold `negative_from`
    only. A blocked image was drawn; it counts elsewhere.
    """
    expected = [
        (variant, str(row.prompt_id), int(seed))
        for row in suite.itertuples(index=False)
        for seed in json.loads(str(row.seeds))
        for variant in (*variants, *(delayed if _holds(row, "negative_from") else ()))
    ]
    columns = (generations[name] for name in ("variant", "prompt_id", "seed", "status", "reason"))
    state = {
        (str(variant), str(prompt_id), int(seed)): (str(status), str(reason))
        for variant, prompt_id, seed, status, reason in zip(*columns, strict=True)
    }
    missing = []
    for cell in expected:
        status, reason = state.get(cell, ("", "not in the table"))
        if status in ("", "failed"):
            missing.append((*cell, reason))
    present = len(expected) - len(missing)
    return Finding(
        passed=not missing,
        summary=f"{present} of {len(expected)} images are there; every variant, prompt and seed "
        "is needed for a fair comparison",
        remedy="mend what each reason names and materialize the generations again: only the "
        "missing ones are drawn",
        expected=len(expected),
        actual=present,
        offenders=pd.DataFrame(missing, columns=["variant", "prompt_id", "seed", "reason"]),
    )


def prompts_sharing_seeds(suite: pd.DataFrame) -> Finding:
    """Which prompts of the suite (the table `prompt_suite`) draw from the same noise as another."""
    seeds = {
        str(row.prompt_id): json.loads(str(row.seeds)) for row in suite.itertuples(index=False)
    }
    shared = shared_seeds(seeds)
    rows = [(name, seed) for seed, names in shared.items() for name in names]
    offenders = pd.DataFrame(rows, columns=["prompt_id", "seed"])
    several = int(offenders["prompt_id"].nunique())
    return Finding(
        passed=not several,
        summary=f"{several} of {len(suite)} prompts share a seed with another; each should have "
        "its own",
        remedy="give each prompt other seeds: intervals and tests take prompts for independent, "
        "which images from the same noise are not, and come out too sure of themselves",
        expected=0,
        actual=several,
        offenders=offenders,
        numbers={"shared_seeds": len(shared)},
    )


def impossible_cosines(scores: pd.DataFrame) -> Finding:
    """Rows of `clip_scores` whose cosine is outside -1..1, missing though the status is `ok`, or
    there though it is not."""
    cosine = scores["clip_cosine"].astype("float64")
    scored = scores["status"] == "ok"
    # Written so that NaN, which compares false with everything, is no possible value.
    possible = cosine.abs() <= 1 + COSINE_ROUNDING
    wrong = scores[(scored & ~possible) | (~scored & cosine.notna())]
    numbers = {}
    if cosine.notna().any():
        numbers = {"lowest": float(cosine.min()), "highest": float(cosine.max())}
    return Finding(
        passed=wrong.empty,
        summary=f"{len(wrong)} of {len(scores)} scores are impossible; a cosine lies within -1 "
        "and 1, and exactly the images with status ok have one",
        remedy="the scorer or its precision is at fault: set scorer.precision to fp32, and report "
        "it",
        expected=0,
        actual=len(wrong),
        offenders=wrong[["variant", "prompt_id", "seed", "clip_cosine", "status"]],
        numbers=numbers,
    )


def unscored(scores: pd.DataFrame, generations: pd.DataFrame) -> pd.DataFrame:
    """The rows of `generations` that `clip_scores` has no score of."""
    done = scores[scores["status"] != "failed"]
    return generations[~generations["generation_key"].isin(done["generation_key"])]


def score_freshness(
    scores: pd.DataFrame,
    generations: pd.DataFrame,
    *,
    drawn_at: dt.datetime,
    waiting_since: Mapping[str, dt.datetime] = MappingProxyType({}),
    scored_at: dt.datetime,
    now: dt.datetime,
    max_delay_hours: float,
    max_age_days: float | None,
) -> Finding:
    """Whether `clip_scores` holds the scores of the current generations, and how old they are.

    `generations`: all current tables of generations, one after the other; `drawn_at`: when the last
    of them was materialized, `scored_at`: when the scores were; `waiting_since`: since when images
    without a score are in these tables, by generation_key, where it is another time. None may wait
    longer than `max_delay_hours`; a run may be at it. With `max_age_days` the scores may not be
    older than that, even where nothing has changed.
    """
    waiting = unscored(scores, generations)
    gone = scores[~scores["generation_key"].isin(generations["generation_key"])]
    cell = ["variant", "prompt_id", "seed"]
    offenders = pd.concat(
        [
            waiting[cell].assign(problem="has no score"),
            gone[cell].assign(problem="the score of an image that is not current any more"),
        ],
        ignore_index=True,
    )
    age = (now - scored_at).total_seconds() / 86400
    since = [waiting_since.get(str(key), drawn_at) for key in waiting["generation_key"]]
    longest = min(since, default=drawn_at)
    delay = (now - longest).total_seconds() / 3600 if len(offenders) else 0.0
    late = delay > max_delay_hours
    old = max_age_days is not None and age > max_age_days
    current = len(generations) - len(waiting)
    return Finding(
        passed=not late and not old,
        summary=f"{current} of {len(generations)} current images have their score, {len(gone)} "
        f"scores are of former ones; last scored {_ago(now - scored_at)}"
        + (f", {delay:.1f} h behind the generations" if len(offenders) else ""),
        remedy="materialize clip_scores; if a run of it failed, its log tells why. The limits are "
        "checks.max_scoring_delay_hours and checks.max_score_age_days",
        expected=f"all scored within {max_delay_hours:g} h"
        + (f", at most {max_age_days:g} days ago" if max_age_days is not None else ""),
        actual=current,
        offenders=offenders,
        numbers={"age_days": age, "behind_hours": delay},
    )


# -- evidence --------------------------------------------------------------------------------------


def unset_titles(titled: pd.DataFrame) -> Finding:
    """Rows of `titled_posters` whose title could not be set; `titled` as of
    `typography.TITLED_COLUMNS`."""
    wanted = titled[titled["status"] != "blocked"]
    failed = wanted[wanted["status"] != "ok"]
    done = len(wanted) - len(failed)
    return Finding(
        passed=failed.empty,
        summary=f"{done} of {len(wanted)} titles are set",
        remedy="each reason says what to do: another title, another lettering.style, or a font",
        expected=len(wanted),
        actual=done,
        offenders=failed[["title", "reason"]].drop_duplicates(),
    )


def unread_titles(legibility: pd.DataFrame, min_share: float) -> Finding:
    """Titles set in type that the OCR did not read exactly; the table `legibility_scores`. Of all
    titles, those on blocked images included, as reports count them."""
    typeset = legibility[legibility["lettering"] == "set"]
    exact = typeset["exact"].astype(bool)
    drawn = legibility.loc[legibility["lettering"] == "drawn", "exact"].astype(bool)
    share = _share(int(exact.sum()), len(typeset)) if len(typeset) else 1.0
    return Finding(
        passed=share >= min_share,
        summary=f"{share:.1%} of {len(typeset)} titles set in type are read exactly, and "
        f"{_share(int(drawn.sum()), len(drawn)):.1%} of those that the model drew; at least "
        f"{min_share:.1%} of the first are expected",
        remedy="look at the named posters; try another lettering.style, a larger "
        "lettering.min_width or more lettering.contrast. The limit is checks.min_titles_read",
        expected=f"at least {min_share:g}",
        actual=share,
        offenders=typeset.loc[~exact, ["generation_key", "title", "read", "distance"]],
        numbers={"drawn": _share(int(drawn.sum()), len(drawn))},
    )


def unmeasured_images(evidence: pd.DataFrame) -> Finding:
    """Rows of `fidelity_scores` (`evidence.EVIDENCE_COLUMNS`) that have failed."""
    failed = evidence[evidence["status"] == "failed"]
    done = len(evidence) - len(failed)
    return Finding(
        passed=failed.empty,
        summary=f"{done} of {len(evidence)} numbers could be measured, or the image is blocked",
        remedy="each reason says what is missing; materialize fidelity_scores again when it is "
        "there. Until then the gate holds the new checkpoint",
        expected=len(evidence),
        actual=done,
        offenders=failed[["metric", "variant", "prompt_id", "seed", "reason"]],
    )


def copied_posters(evidence: pd.DataFrame, max_share: float) -> Finding:
    """Images of tuned models that count as copies of a training poster; as `unmeasured_images`.

    Does not pass either where the holdout posters were too few to say what a copy is, or where
    posters that a checkpoint was trained on cannot be read.
    """
    # A table that an older posterpipe made lacks them.
    later = ["copy_threshold", "lost_posters"]
    compared = evidence.reindex(columns=[*evidence.columns.union(later, sort=False)])
    compared = compared[(compared["role"] == "copies") & compared["copied"].notna()]
    tuned = compared[compared["variant"].str.startswith("dreambooth")]
    copies = tuned[tuned["copied"].astype(bool)]
    share = _share(len(copies), len(tuned))
    summary = (
        f"{len(copies)} of {len(tuned)} images of fine-tuned models are nearer to a "
        f"training poster than nearly all new posters are ({share:.1%}); at most "
        f"{max_share:.1%} may be"
    )
    remedy = (
        "the gate rejects this checkpoint: train fewer steps, at a lower rate, or on more "
        "posters. The limit is gate.copy_limit"
    )
    expected: str = f"at most {max_share:g}"
    actual: float | str = share
    known = tuned.empty or bool(compared["copy_threshold"].notna().any())
    if share <= max_share and not known:
        summary = (
            f"{len(copies)} of {len(tuned)} images of fine-tuned models equal a training poster; "
            "how near is too near is not known"
        )
        remedy = (
            "add holdout posters, three or more that are no copies of training posters, to the "
            "folder `holdout`. Until then the gate holds the new checkpoint"
        )
        expected += ", by a threshold from the holdout posters"
        actual = f"{share:g}, without a threshold"
    lost = 0 if tuned.empty else int(tuned["lost_posters"].fillna(0).max())
    if share <= max_share and lost:
        summary += f"; {lost} posters that a checkpoint was trained on cannot be read any more"
        remedy = "put the posters back, or leave them out for good, and run the job `retrain`"
        expected += ", of all posters trained on"
    return Finding(
        passed=share <= max_share and known and not lost,
        summary=summary,
        remedy=remedy,
        expected=expected,
        actual=actual,
        offenders=copies[["variant", "prompt_id", "seed", "nearest_poster", "value"]],
        numbers={"copies": len(copies)},
    )


def rejected_champion(champion: pd.DataFrame, verdict: str, there: bool) -> Finding:
    """Whether what is served was rejected, or is gone.

    `champion`: the one row of the asset; `verdict`: the gate's latest one about that checkpoint, ""
    for none; `there`: whether its directory is.
    """
    row = champion.iloc[0]
    wrong = verdict == "reject" or not there
    problem = "the gate rejected it" if verdict == "reject" else "its files are gone"
    return Finding(
        passed=not wrong,
        summary=f"the checkpoint {row['checkpoint_id']} is served"
        + (f", and {problem}" if wrong else ""),
        remedy="materialize champion; `posterpipe champion rollback` serves the one before",
        expected="a checkpoint that is there and not rejected",
        actual=int(wrong),
        offenders=pd.DataFrame(
            [(row["checkpoint_id"], problem)] if wrong else [], columns=["checkpoint_id", "problem"]
        ),
    )


# -- words and numbers -----------------------------------------------------------------------------


def _holds(row: Any, name: str) -> bool:
    """Whether a row has a value in a column that its table may lack."""
    return bool(pd.notna(getattr(row, name, None)))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _same_words(caption: str) -> str:
    """What two captions have in common that differ in case and spaces only."""
    return " ".join(caption.casefold().split())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _ago(passed: dt.timedelta) -> str:
    hours = passed.total_seconds() / 3600
    return f"{hours:.1f} h ago" if hours < 48 else f"{hours / 24:.1f} days ago"
