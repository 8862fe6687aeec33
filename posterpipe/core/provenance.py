"""What is written down about where things come from, and checkpoints that know their training set.

What belongs here: the records that steps leave in the store, each written once and never changed,
and refusing a checkpoint that is not the one it is taken for. What does not: telling it all for one
score (`trace`), the keys that decide what is computed again (no record changes one), and the
warehouse, which holds copies of some records for analysts.

Records are rows of the store's index (`Store.results`):

    environment    id -> versions of posterpipe, of its source, of Python and of packages
    table          name/version -> run, asset's code version, environment, versions of the inputs
    training_set   version/lineage -> number of images, and the steps that led to it, from the
                   posters on
    checkpoint     id -> training set, lineage, base model, settings, packages, run

and the posters of each training set, as `lineages/<training set>.<lineage>.parquet`. One training
set may have come about in several ways: from another poster of the same pixels, or with a caption
that a person wrote in the model's very words. Each is a lineage, named by what it holds, and
`lineages/<training set>.json` tells which was the last. Older stores have one lineage a training
set, without a name.
"""

from __future__ import annotations

import csv
import datetime as dt
import hashlib
import importlib.metadata
import io
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from posterpipe.core.files import write_atomic
from posterpipe.core.store import (
    TRAINING_SETS,
    Store,
    TableMissing,
    cells,
    content_key,
    table_version,
    writing,
)
from posterpipe.core.training.training_set import CSV_NAME
from posterpipe.settings import default_root

ENVIRONMENT = "environment"
TABLE = "table"
TRAINING_SET = "training_set"
CHECKPOINT = "checkpoint"

LASTING_KINDS = (ENVIRONMENT, CHECKPOINT)
"""Records that are never tidied away: the history of a score row needs them."""

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

PACKAGES = (
    "dagster", "torch", "diffusers", "transformers", "tokenizers", "accelerate", "bitsandbytes",
    "safetensors", "numpy", "pandas", "pyarrow", "pillow", "duckdb",
)  # fmt: skip
"""Packages whose version may show in a result."""

RECORD_NAME = "posterpipe.json"
"""What a checkpoint says of itself, in its folder."""

_NAMED = 3  # posters that a message names
_NAME_LENGTH = 16  # hex digits of a lineage's content in its name


class CheckpointMismatch(Exception):
    """A checkpoint is not the one it is taken for. The message tells the difference in words."""


class BaseModelsDiffer(Exception):
    """A checkpoint was tuned from another base model than the one that it is to be used with. The
    message names both, and says what to do."""


class PostersGone(Exception):
    """A training set holds posters that are not to be trained on any more. The message names them,
    and says what to do."""


# -- environments --------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """The code that runs here: posterpipe (version), source (hash of its Python files), commit (""
    outside of a checkout), python, platform, packages (name to version)."""
    return {
        "posterpipe": package_version("posterpipe"),
        "source": _source_hash(),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}".lower(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }


def record_environment(store: Store) -> str:
    """Writes down the code that runs here; its id, 16 hex digits."""
    values = environment()
    environment_id = content_key(ENVIRONMENT, values)[:16]
    store.add_results(ENVIRONMENT, {environment_id: values})
    return environment_id


def package_version(package: str) -> str | None:
    """The version that is installed; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source_hash() -> str:
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(package).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()[:12]


def _commit() -> str:
    root = default_root()
    if not (root / ".git").exists():
        return ""  # an installed package, perhaps inside the repository of somebody else
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


# -- tables, training sets, checkpoints -----------------------------------------------------------


def record_table(
    store: Store,
    name: str,
    version: str,
    *,
    run_id: str,
    code_version: str,
    inputs: Mapping[str, str],
) -> None:
    """Writes down how a version of a table was made, the first time that it was made.

    `inputs`: the versions of the tables that were read. Of a training set and of a checkpoint, what
    their tables name is written down as well.
    """
    record = {
        "run_id": run_id,
        "code_version": code_version,
        "environment": record_environment(store),
        "inputs": dict(inputs),
        "made_at": _now(),
    }
    store.add_results(TABLE, {f"{name}/{version}": record})
    if name == "training_csv":
        _record_training_set(store, version, record)
    elif name == "dreambooth_checkpoint":
        _record_checkpoints(store, version, record)


def _steps(store: Store, waiting: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """These (table, version) and all that they were made from, as far as that was recorded."""
    steps: dict[tuple[str, str], dict[str, Any]] = {}
    while waiting:
        asset, table_version = waiting.pop()
        key = f"{asset}/{table_version}"
        record = store.results(TABLE, [key]).get(key)
        if record is None or (asset, table_version) in steps:
            continue
        inputs = record.pop("inputs")
        steps[asset, table_version] = {"asset": asset, "table_version": table_version, **record}
        waiting += sorted(inputs.items(), reverse=True)
    return list(steps.values())


def _record_training_set(store: Store, version: str, record: Mapping[str, Any]) -> None:
    training = store.read_table("training_csv", version)
    if training.empty or "training_set" not in training:
        return
    training_set = str(training["training_set"].iloc[0])
    # By what was read this time: the same table may have been made of others before.
    own = {name: value for name, value in record.items() if name != "inputs"}
    steps = [{"asset": "training_csv", "table_version": version, **own}]
    steps += _steps(store, sorted(record["inputs"].items(), reverse=True))
    versions = {step["asset"]: step["table_version"] for step in steps}
    lineage = _lineage(
        training,
        _table_or_none(store, "poster_captions", versions.get("poster_captions")),
        _table_or_none(store, "raw_posters", versions.get("raw_posters")),
    )
    name = table_version(lineage)[:_NAME_LENGTH]
    facts = {"images": len(training), "steps": steps}
    store.add_results(TRAINING_SET, {f"{training_set}/{name}": facts})
    path = lineage_path(store, training_set, name)
    if not store.keep(path):
        buffer = io.BytesIO()
        lineage.to_parquet(buffer, index=False)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, buffer.getvalue())
    if current_lineage(store, training_set) != name:
        last = _last_lineage(store, training_set)
        with writing(last):
            write_atomic(last, json.dumps({"lineage": name}).encode())


def _table_or_none(store: Store, name: str, version: str | None) -> pd.DataFrame | None:
    if version is None:
        return None
    try:
        return store.read_table(name, version)
    except TableMissing:
        return None


def _lineage(
    training: pd.DataFrame, captions: pd.DataFrame | None, posters: pd.DataFrame | None
) -> pd.DataFrame:
    """Columns LINEAGE_COLUMNS; what is not known of a poster is "" or an empty list."""
    lineage = training[["file_name", "caption", "poster_id", "image"]].copy()
    names: dict[str, list[str]] = {}
    if posters is not None:
        named = posters[posters["status"].isin(["ok", "duplicate"])]
        for poster_id, name in cells(named, "poster_id", "source_name"):
            names.setdefault(poster_id, []).append(name)
    posters_of_rows = lineage["poster_id"].tolist()
    lineage["source_names"] = [names.get(poster_id, []) for poster_id in posters_of_rows]
    for column in ("source", "model", "revision"):
        known: dict[str, str] = {}
        if captions is not None and column in captions:
            known = dict(cells(captions, "poster_id", column))
        lineage[f"caption_{column}"] = [known.get(poster, "") for poster in posters_of_rows]
    return lineage[LINEAGE_COLUMNS]


def lineage_path(store: Store, training_set: str, name: str = "") -> Path:
    """Where the posters of a training set are written down; `name`: of the lineage, "" for the one
    of an older store."""
    return store.root / LINEAGES / f"{training_set}{f'.{name}' if name else ''}.parquet"


def _last_lineage(store: Store, training_set: str) -> Path:
    return store.root / LINEAGES / f"{training_set}.json"


def current_lineage(store: Store, training_set: str) -> str:
    """The name of the lineage that a training set had last; "" where none was recorded."""
    try:
        return str(json.loads(_last_lineage(store, training_set).read_text("utf-8"))["lineage"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def training_steps(store: Store, training_set: str, name: str = "") -> list[dict[str, Any]]:
    """How a training set came about: its table and all that it was made from, as far as that was
    recorded; each with asset, table_version, run_id, code_version, environment, made_at.

    `name`: of the lineage; without it, the last.
    """
    key = f"{training_set}/{name or current_lineage(store, training_set)}"
    found = store.results(TRAINING_SET, [key, training_set])
    steps: list[dict[str, Any]] = (found.get(key) or found.get(training_set) or {}).get("steps", [])
    return steps


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


def _record_checkpoints(store: Store, version: str, record: Mapping[str, Any]) -> None:
    for row in store.read_table("dreambooth_checkpoint", version).to_dict("records"):
        try:
            said = read_record(store.root / str(row["path"]))
        except CheckpointMismatch:
            said = {}
        said.pop("reports", None)  # the loss of every step; it stays in the checkpoint's folder
        values = {
            **said,
            "training_set": row["training_set"],
            "lineage": row.get("lineage") or current_lineage(store, str(row["training_set"])),
            "base_model": row["base_model"],
            "run_id": record["run_id"],
            "environment": record["environment"],
            "recorded_at": record["made_at"],
        }
        store.add_results(CHECKPOINT, {str(row["checkpoint_id"]): values})


def checkpoint_facts(store: Store, checkpoint_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What was recorded of some checkpoints, by id; others, such as base models, are left out."""
    return store.results(CHECKPOINT, checkpoint_ids)


def images_trained_on(store: Store, facts: Mapping[str, Any]) -> list[str]:
    """The images (sha256 of blobs) that a checkpoint was trained on, sorted; none where they were
    not written down. `facts`: what was recorded of the checkpoint."""
    posters = lineage(store, str(facts.get("training_set", "")), str(facts.get("lineage", "")))
    return [] if posters is None else sorted({str(image) for image in posters["image"] if image})


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
    told = _named(
        "of the training set not there any more",
        [names.get(poster, poster[:12]) for poster in gone],
    )
    raise PostersGone(
        f"{told}; what was deleted, replaced or rejected is not trained on. The set was not made "
        "anew since, as where a blocking check of `raw_posters`, `resized_posters` or "
        "`poster_captions` has not passed: see to that, and run the job `retrain`"
    )


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


# -- checkpoints that know what they are ----------------------------------------------------------


def read_record(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises CheckpointMismatch when it says nothing."""
    path = folder / RECORD_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {**record, "checkpoint_id": str(record["checkpoint_id"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointMismatch(
            f"{folder}: no finished checkpoint of posterpipe is there (no good {RECORD_NAME}); "
            "materialize dreambooth_checkpoint again"
        ) from error


def require_checkpoint(
    store: Store,
    folder: Path,
    *,
    checkpoint_id: str,
    training_set: str | None = None,
    base_model: str | None = None,
) -> None:
    """Raises CheckpointMismatch unless `folder` holds the checkpoint of that id, tuned from that
    base model (fingerprint) on that training set (version); the message tells what differs.

    To be called before a checkpoint is loaded. What is not given is what was recorded when the
    checkpoint of that id was trained.
    """
    record = read_record(folder)
    recorded = checkpoint_facts(store, [checkpoint_id]).get(checkpoint_id, record)
    training_set = training_set or str(recorded.get("training_set", ""))
    base_model = base_model or str(recorded.get("base_model", ""))
    differences = []
    trained_on = str(record.get("training_set", ""))
    if trained_on != training_set:
        differences.append(
            f"it was trained on the training set {trained_on[:12]}, and not on {training_set[:12]}"
            f" ({describe_difference(store, trained_on, training_set)})"
        )
    if record.get("base_model") != base_model:
        differences.append(
            f"it was tuned from the base model {record.get('base_model')}, and not from "
            f"{base_model}"
        )
    if record["checkpoint_id"] != checkpoint_id and not differences:
        differences.append(_other_settings(store, record, checkpoint_id))
    if differences:
        which = record["checkpoint_id"]
        asked = f"checkpoint {checkpoint_id} is asked for, and " if which != checkpoint_id else ""
        raise CheckpointMismatch(
            f"{folder}: {asked}this is {which}: {'; '.join(differences)}. Remove the folder and "
            "materialize dreambooth_checkpoint again"
        )


def tuned_from_another(
    store: Store, checkpoint_id: str, base_model: str | None, name: str = ""
) -> str:
    """How the base model that a checkpoint was tuned from differs from this one, in words; "" where
    it does not, or where nothing is known of the checkpoint.

    `base_model`: its fingerprint; None where that is not known on this machine, as before a model
    is downloaded. Then its `name` tells, which is the id in the settings.
    """
    facts = checkpoint_facts(store, [checkpoint_id]).get(checkpoint_id, {})
    known, now = facts.get("base_model"), base_model
    if now is None:
        known, now = facts.get("base_model_name"), name
    if not known or known == now:
        return ""
    return (
        f"the checkpoint {checkpoint_id} was tuned from the base model {known}, and the base model "
        f"is {now} now"
    )


def require_base_model(
    store: Store, checkpoint_id: str, base_model: str | None, name: str = ""
) -> None:
    """Raises BaseModelsDiffer where a checkpoint is known to be tuned from another base model; see
    `tuned_from_another`. To be called before images of the two are compared, since they differ by
    more than the fine-tuning then."""
    if differs := tuned_from_another(store, checkpoint_id, base_model, name):
        raise BaseModelsDiffer(
            f"{differs}, so nothing is drawn with it or compared: run the job `retrain`, which "
            "tunes this one, or go back to the profile of before"
        )


def base_and_tuned(store: Store, base: pd.DataFrame, tuned: pd.DataFrame) -> pd.DataFrame:
    """The images of the base model and of a tuned one in one table (`generations.COLUMNS`). Raises
    BaseModelsDiffer where the one is not tuned from the other."""
    require_base_model(
        store, str(tuned["checkpoint_id"].iloc[0]), str(base["checkpoint_id"].iloc[0])
    )
    return pd.concat([base, tuned], ignore_index=True)


def _other_settings(store: Store, record: Mapping[str, Any], checkpoint_id: str) -> str:
    wanted = checkpoint_facts(store, [checkpoint_id]).get(checkpoint_id, {}).get("settings") or {}
    found = record.get("settings") or {}
    other = [
        f"{name} {found.get(name)} instead of {wanted[name]}"
        for name in sorted(wanted)
        if found.get(name) != wanted[name]
    ]
    return f"it was trained with other settings ({', '.join(other) or 'which ones is not known'})"


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
        _named("added", [_name(new[name]) for name in new if name not in old]),
        _named("removed", [_name(old[name]) for name in old if name not in new]),
        _named(
            "re-captioned",
            [
                f"{_name(new[name])}: “{old[name]['caption']}” became “{new[name]['caption']}”"
                for name in both
                if old[name]["caption"] != new[name]["caption"]
            ],
        ),
        _named(
            "resized differently",
            [_name(new[name]) for name in both if old[name]["image"] != new[name]["image"]],
        ),
    ]
    return "; ".join(part for part in parts if part) or "the same posters and captions"


def _name(row: Mapping[Any, Any]) -> str:
    names = list(row["source_names"])
    return str(names[0] if names else row["file_name"])


def _named(verb: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    noun = "poster" if len(names) == 1 else "posters"
    return f"{len(names)} {noun} {verb}: {shown}{more}"
