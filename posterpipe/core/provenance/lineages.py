"""The posters that a training set was made of.

What belongs here: where that is written down and read, how two training sets differ, and that none
of the posters is gone. What does not: writing it when the set is made (`records`), and making it
(`core.training`).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from posterpipe.core.store import TRAINING_SETS, Store, cells
from posterpipe.core.training.training_set import CSV_NAME

TRAINING_SET = "training_set"

LINEAGES = "lineages"
"""Folder of the store."""

LINEAGE_COLUMNS = [
    "file_name",
    "caption",
    "poster_id",
    "image",
    "source_names",
    "caption_source",
    "caption_model",
    "caption_revision",
]

_NAMES_TOLD = 3  # posters that a message names


class PostersGone(Exception):
    """A training set holds posters that are not to be trained on any more. The message names them,
    and says what to do."""


def lineage(store: Store, training_set: str, name: str = "") -> pd.DataFrame | None:
    """The posters of a training set (LINEAGE_COLUMNS), or None where nothing is known of it.

    `name`: of the lineage; without it, the last. Of a training set that no step recorded, file
    names and captions come from its folder.
    """
    for which in (name or current_lineage(store, training_set), ""):
        path = lineage_path(store, training_set, which)
        if path.exists():
            return pd.read_parquet(path)
    try:
        text = (store.root / TRAINING_SETS / training_set / CSV_NAME).read_text("utf-8")
    except OSError:
        return None
    frame = pd.DataFrame(list(csv.DictReader(io.StringIO(text))), columns=["file_name", "caption"])
    empty = {name: "" for name in LINEAGE_COLUMNS if name not in frame}
    frame = frame.assign(**empty)
    frame["source_names"] = [[] for _ in range(len(frame))]
    return frame[LINEAGE_COLUMNS]


def lineage_path(store: Store, training_set: str, name: str = "") -> Path:
    """Where the posters of a training set are written down; `name`: of the lineage, "" for the one
    of an older store."""
    return store.root / LINEAGES / f"{training_set}{f'.{name}' if name else ''}.parquet"


def last_lineage_path(store: Store, training_set: str) -> Path:
    """Where it is written down which lineage a training set had last."""
    return store.root / LINEAGES / f"{training_set}.json"


def current_lineage(store: Store, training_set: str) -> str:
    """The name of the lineage that a training set had last; "" where none was recorded."""
    try:
        return str(json.loads(last_lineage_path(store, training_set).read_text("utf-8"))["lineage"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def lineage_of(
    training: pd.DataFrame, captions: pd.DataFrame | None, posters: pd.DataFrame | None
) -> pd.DataFrame:
    """The lineage that these tables tell (LINEAGE_COLUMNS). What is not known of a poster is "" or
    an empty list."""
    table = training[["file_name", "caption", "poster_id", "image"]].copy()
    names: dict[str, list[str]] = {}
    if posters is not None:
        named = posters[posters["status"].isin(["ok", "duplicate"])]
        for poster_id, name in cells(named, "poster_id", "source_name"):
            names.setdefault(poster_id, []).append(name)
    posters_of_rows = table["poster_id"].tolist()
    table["source_names"] = [names.get(poster_id, []) for poster_id in posters_of_rows]
    for column in ("source", "model", "revision"):
        known: dict[str, str] = {}
        if captions is not None and column in captions:
            known = dict(cells(captions, "poster_id", column))
        table[f"caption_{column}"] = [known.get(poster, "") for poster in posters_of_rows]
    return table[LINEAGE_COLUMNS]


def training_steps(store: Store, training_set: str, name: str = "") -> list[dict[str, Any]]:
    """How a training set came about: its table and all that it was made from, as far as that was
    recorded; each with asset, table_version, run_id, code_version, environment, made_at.

    `name`: of the lineage; without it, the last.
    """
    key = f"{training_set}/{name or current_lineage(store, training_set)}"
    found = store.results(TRAINING_SET, [key, training_set])
    steps: list[dict[str, Any]] = (found.get(key) or found.get(training_set) or {}).get("steps", [])
    return steps


def require_posters(store: Store, training_set: str, poster_ids: Iterable[str]) -> None:
    """Raises PostersGone unless every poster of a training set is usable (status ok) by the table
    `raw_posters` of now. To be called before a training: what was deleted is not trained on again,
    also while something keeps the set from being made anew. Without that table nothing is asked."""
    version = store.table_version("raw_posters")
    if version is None:
        return
    posters = store.read_table("raw_posters", version)
    there = {*posters.loc[posters["status"] == "ok", "poster_id"]}
    gone = [poster for poster in poster_ids if poster not in there]
    if not gone:
        return
    known = lineage(store, training_set)
    rows = [] if known is None else known.to_dict("records")
    names = {str(row["poster_id"]): _name(row) for row in rows}
    told = _sentence_of_names(
        "of the training set not there any more",
        [names.get(poster, poster[:12]) for poster in gone],
    )
    raise PostersGone(
        f"{told}; what was deleted, replaced or rejected is not trained on. The set was not made "
        "anew since, as where a blocking check of `raw_posters`, `resized_posters` or "
        "`poster_captions` has not passed: see to that, and run the job `retrain`"
    )


def describe_difference(store: Store, before: str, after: str) -> str:
    """What makes two training sets differ, in words: posters added, removed, re-captioned, resized.

    `before` and `after` are versions of training sets.
    """
    frames = {version: lineage(store, version) for version in (before, after)}
    unknown = [version[:12] or "none" for version, frame in frames.items() if frame is None]
    one, two = frames[before], frames[after]
    if one is None or two is None:
        return f"what differs is not known: nothing is kept of {' and '.join(unknown)}"
    # Sets that no step recorded are known by the names of their images alone.
    key = "poster_id" if one["poster_id"].all() and two["poster_id"].all() else "file_name"
    old: dict[str, Any] = {str(row[key]): row for row in one.to_dict("records")}
    new: dict[str, Any] = {str(row[key]): row for row in two.to_dict("records")}
    both = [name for name in new if name in old]
    parts = [
        _sentence_of_names("added", [_name(new[name]) for name in new if name not in old]),
        _sentence_of_names("removed", [_name(old[name]) for name in old if name not in new]),
        _sentence_of_names(
            "re-captioned",
            [
                f"{_name(new[name])}: “{old[name]['caption']}” became “{new[name]['caption']}”"
                for name in both
                if old[name]["caption"] != new[name]["caption"]
            ],
        ),
        _sentence_of_names(
            "resized differently",
            [_name(new[name]) for name in both if old[name]["image"] != new[name]["image"]],
        ),
    ]
    return "; ".join(part for part in parts if part) or "the same posters and captions"


def _name(row: Mapping[Any, Any]) -> str:
    names = list(row["source_names"])
    return str(names[0] if names else row["file_name"])


def _sentence_of_names(verb: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:_NAMES_TOLD])
    more = f" and {len(names) - _NAMES_TOLD} more" if len(names) > _NAMES_TOLD else ""
    noun = "poster" if len(names) == 1 else "posters"
    return f"{len(names)} {noun} {verb}: {shown}{more}"
