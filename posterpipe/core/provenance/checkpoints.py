"""Checkpoints that know what they are.

What belongs here: what a checkpoint says of itself, what was recorded of it, and refusing one that
is not the one it is taken for, or was tuned from another base model. What does not: training one
(`core.training`, `core.dreambooth`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from posterpipe.core.provenance.lineages import describe_difference, lineage
from posterpipe.core.store import Store

CHECKPOINT = "checkpoint"

RECORD_NAME = "posterpipe.json"
"""What a checkpoint says of itself, in its folder."""


class CheckpointMismatch(Exception):
    """A checkpoint is not the one it is taken for. The message tells the difference in words."""


class BaseModelsDiffer(Exception):
    """A checkpoint was tuned from another base model than the one that it is to be used with. The
    message names both, and says what to do."""


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


def checkpoint_facts(store: Store, checkpoint_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What was recorded of some checkpoints, by id; others, such as base models, are left out."""
    return store.results(CHECKPOINT, checkpoint_ids)


def images_trained_on(store: Store, facts: Mapping[str, Any]) -> list[str]:
    """The images (sha256 of blobs) that a checkpoint was trained on, sorted; none where they were
    not written down. `facts`: what was recorded of the checkpoint."""
    posters = lineage(store, str(facts.get("training_set", "")), str(facts.get("lineage", "")))
    return [] if posters is None else sorted({str(image) for image in posters["image"] if image})


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


def _other_settings(store: Store, record: Mapping[str, Any], checkpoint_id: str) -> str:
    wanted = checkpoint_facts(store, [checkpoint_id]).get(checkpoint_id, {}).get("settings") or {}
    found = record.get("settings") or {}
    other = [
        f"{name} {found.get(name)} instead of {wanted[name]}"
        for name in sorted(wanted)
        if found.get(name) != wanted[name]
    ]
    return f"it was trained with other settings ({', '.join(other) or 'which ones is not known'})"


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
