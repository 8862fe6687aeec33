"""What a step leaves in the store about what it made.

What belongs here: writing it, once and for all. What does not: reading it (`lineages`,
`checkpoints`, `trace`).
"""

from __future__ import annotations

import datetime as dt
import io
import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from posterpipe.core.files import write_atomic
from posterpipe.core.provenance.checkpoints import CHECKPOINT, CheckpointMismatch, read_record
from posterpipe.core.provenance.environments import ENVIRONMENT, record_environment
from posterpipe.core.provenance.lineages import (
    TRAINING_SET,
    current_lineage,
    last_lineage_path,
    lineage_of,
    lineage_path,
)
from posterpipe.core.store import Store, TableMissing, table_version, writing

TABLE = "table"

LASTING_KINDS = (ENVIRONMENT, CHECKPOINT)
"""Records that are never tidied away: the history of a score row needs them."""

_NAME_LENGTH = 16  # hex digits of a lineage's content in its name


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
    lineage = lineage_of(
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
        last = last_lineage_path(store, training_set)
        with writing(last):
            write_atomic(last, json.dumps({"lineage": name}).encode())


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


def _table_or_none(store: Store, name: str, version: str | None) -> pd.DataFrame | None:
    if version is None:
        return None
    try:
        return store.read_table(name, version)
    except TableMissing:
        return None


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


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
