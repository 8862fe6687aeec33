"""Which assets no longer match what they are made from.

What belongs here: code versions that follow the settings, and the comparison of what was recorded
with what is there. What does not: the assets themselves, and when they run (`automation`, `sweep`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import dagster as dg
from dagster import DagsterEventType
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecord

from posterpipe.core.dreambooth.effects import deciding
from posterpipe.defs.metadata import (
    BASE_MODEL,
    CHALLENGER,
    CHAMPION,
    DATA_VERSION,
    HELD_OUT,
    INPUTS_READ,
    LAST_DECISION,
    MODEL_FINGERPRINT,
    TABLE_VERSION,
    WAREHOUSE,
)
from posterpipe.defs.resources import Deployment
from posterpipe.settings import SAMPLING_SPEED, ModelRef, Settings

INPUT_DATA_VERSION = "dagster/input_data_version/"

CODE_VERSION = "dagster/code_version"

_REPORTED = 20
"""Materializations reported by hand, one after another, that are looked behind at most."""

CHECKPOINT = dg.AssetKey("dreambooth_checkpoint")

_BATCH = {"batch_size"}  # how many at once does not decide what comes out

_WORDING = {"template", "trigger"}  # applied to captions when training.csv is built

_PRIOR = {"prior_preservation", "class_prompt", "class_image_count"}


def _judging(settings: Settings) -> list[Any]:
    images = settings.images
    return [images.min_side, images.max_pixels, images.near_duplicate_distance]


def _size(settings: Settings) -> list[Any]:
    images = settings.images
    buckets = [images.bucket_step] if images.fit == "bucket" else []
    return [images.width, images.height, images.fit, *buckets]


def _drawing(settings: Settings) -> list[Any]:
    return [
        settings.base_model.model_dump(mode="json"),
        settings.sampler.model_dump(mode="json", exclude=SAMPLING_SPEED),
    ]


_DECIDING: Mapping[str, Callable[[Settings], list[Any]]] = {
    "raw_posters": _judging,
    "holdout_posters": _judging,
    "resized_posters": _size,
    "poster_captions": lambda s: [
        s.captioner.model_dump(mode="json", exclude=_BATCH | _WORDING),
    ],
    "training_csv": lambda s: [s.captioner.model_dump(mode="json", include=_WORDING)],
    "class_images": lambda s: [
        s.training.model_dump(mode="json", include=_PRIOR),
        *(_drawing(s) + _size(s) if s.training.prior_preservation else []),
    ],
    "dreambooth_checkpoint": lambda s: [
        s.base_model.model_dump(mode="json"),
        deciding(s.training),
    ],
    "base_generations": _drawing,
    "tuned_generations": lambda s: [s.sampler.model_dump(mode="json", exclude=SAMPLING_SPEED)],
    "champion_generations": lambda s: [s.sampler.model_dump(mode="json", exclude=SAMPLING_SPEED)],
    "titled_posters": lambda s: [s.lettering.model_dump(mode="json")],
    "clip_scores": lambda s: [s.scorer.model_dump(mode="json", exclude=_BATCH)],
    "fidelity_scores": lambda s: [
        s.scorer.model_dump(mode="json", exclude=_BATCH),
        s.evidence.model_dump(mode="json", exclude=_BATCH),
        s.checks.holdout_distance,
        *_size(s),
        s.gate.copy_limit,  # of its check, which has the gate's limit
    ],
    "champion": lambda s: [s.gate.model_dump(mode="json")],
    "score_report": lambda s: [s.public_url],  # where its metadata leads
}
"""Settings that decide what is in an asset, by asset."""

_LIMITS: Mapping[str, tuple[str, ...]] = {
    "raw_posters": ("min_posters", "max_rejected_share", "max_near_duplicate_share"),
    "resized_posters": ("max_blank_share", "max_failed_share"),
    "poster_captions": (
        "max_repeated_share",
        "max_shared_captions",
        "min_distinct_captions",
        "max_failed_share",
    ),
    "training_csv": ("min_posters", "holdout_distance", "max_long_captions", "max_lost_share"),
    "base_generations": ("max_blocked_share",),
    "tuned_generations": ("max_blocked_share",),
    "clip_scores": ("max_scoring_delay_hours", "max_score_age_days"),
    "legibility_scores": ("min_titles_read",),
}
"""Limits of the checks of an asset (settings `checks`). Another limit makes the asset again, from
the store, since its checks run with it; what comes out is the same, so nothing else follows."""

_CHECKED_WITH: Mapping[str, Callable[[Settings], list[Any]]] = {
    # Their texts are counted in tokens as the base model's text encoder does.
    "prompt_suite": lambda s: [s.base_model.model_dump(mode="json")],
    "training_csv": lambda s: [s.base_model.model_dump(mode="json")],
}
"""What else an asset is judged by, in its checks or while it is read, with the same effect."""


def with_settings_in_code_version(assets: Iterable[Any], settings: Settings) -> list[Any]:
    """The assets with a code version that also changes with the settings that decide them, or what
    their checks say.

    A changed learning rate then makes the checkpoint stale just as changed code does, in the UI
    and for automation.
    """

    def spec_with_settings(spec: dg.AssetSpec) -> dg.AssetSpec:
        name = spec.key.to_user_string()
        if not any(name in rules for rules in (_DECIDING, _LIMITS, _CHECKED_WITH)):
            return spec
        deciding = _DECIDING[name](settings) if name in _DECIDING else []
        if name in _CHECKED_WITH:
            deciding = [*deciding, *_CHECKED_WITH[name](settings)]
        limits = settings.checks.model_dump(mode="json", include=set(_LIMITS.get(name, ())))
        version = f"{spec.code_version}-{digest(*deciding, limits)[:8]}"
        return spec.replace_attributes(code_version=version)

    return list(dg.map_asset_specs(spec_with_settings, assets))


def digest(*parts: object) -> str:
    """sha256 (hex) of parts as JSON, for code versions. Not to be replaced by `content_key`: other
    digests would make every asset look changed, and forget which runs failed or were canceled."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def stale_assets(
    specs: Iterable[dg.AssetSpec], instance: dg.DagsterInstance, deployment: Deployment
) -> dict[dg.AssetKey, str]:
    """Assets that do not match what they are made from, each with the reason in words.

    Level-triggered: it compares what was recorded with what is there, whatever happened between.
    An asset is stale when it was never made, when its code or settings changed, when an input has
    another data version than the one that was used, when its model was replaced, or when what it
    made is gone. Assets downstream of stale ones are judged by what is recorded now.
    """
    specs = list(specs)
    latest = latest_materializations(instance, [spec.key for spec in specs])
    models = Models(deployment)
    reasons = {}
    for spec in specs:
        reason = staleness(spec, latest, deployment, models)
        if reason:
            reasons[spec.key] = reason
    return reasons


def latest_materializations(
    instance: dg.DagsterInstance, keys: Iterable[dg.AssetKey]
) -> dict[dg.AssetKey, dg.EventLogRecord | None]:
    """The latest materialization of each asset, in one query.

    Those that a person reported by hand, without a data version, do not count where there is
    another: nothing was made, and what was made before still holds.
    """
    latest: dict[dg.AssetKey, dg.EventLogRecord | None] = dict.fromkeys(keys)
    for record in instance.get_asset_records(list(latest)):
        entry = record.asset_entry
        made = entry.last_materialization_record
        if made is not None and data_version(made) is None:
            (made,) = materializations(instance, entry.asset_key, 1)
        latest[entry.asset_key] = made
    return latest


def materializations(
    instance: dg.DagsterInstance, of: dg.AssetKey | dg.AssetRecordsFilter, limit: int
) -> list[dg.EventLogRecord]:
    """Up to so many materializations of an asset, the latest first; those that do not count (see
    `latest_materializations`) are left out."""
    records: list[dg.EventLogRecord] = []
    made: list[dg.EventLogRecord] = []
    for more in (0, _REPORTED):
        records = list(instance.fetch_materializations(of, limit=limit + more).records)
        made = [record for record in records if data_version(record) is not None]
        if len(made) == len(records):
            break
    return (made or records)[:limit]


def data_version(record: dg.EventLogRecord | None) -> str | None:
    """The data version of a materialization; None before the first."""
    made = record.asset_materialization if record else None
    return (made.tags or {}).get(DATA_VERSION) if made else None


def made_or_wiped(
    instance: dg.DagsterInstance, key: dg.AssetKey, made: dg.EventLogRecord | None
) -> int:
    """The event of the log since which an asset is there as it is, or is not there: its latest
    materialization, else when a person wiped it; 0 for one that never was."""
    if made is not None:
        return made.storage_id
    wiped = dg.EventRecordsFilter(DagsterEventType.ASSET_WIPED, asset_key=key)
    found = instance.event_log_storage.get_event_records(wiped, limit=1)
    return found[0].storage_id if found else 0


def is_of(record: AssetCheckExecutionRecord, made: dg.EventLogRecord | None) -> bool:
    """Whether a check was evaluated on this materialization, as the policy judges it."""
    target = record.evaluation.target_materialization_data if record.evaluation else None
    return made is not None and (
        record.run_id == made.run_id
        or (target is not None and target.storage_id == made.storage_id)
    )


def staleness(
    spec: dg.AssetSpec,
    latest: Mapping[dg.AssetKey, dg.EventLogRecord | None],
    deployment: Deployment,
    models: Models,
) -> str:
    """Why an asset does not match what it is made from, or is not there; "" when it does and is.

    `latest` holds the latest materializations of the asset and of what it reads.
    """
    return _difference(spec, latest, deployment, models) or _lost(
        spec.key, _made(spec.key, latest), deployment
    )


def is_adopted(
    spec: dg.AssetSpec,
    latest: Mapping[dg.AssetKey, dg.EventLogRecord | None],
    deployment: Deployment,
    models: Models,
) -> bool:
    """Whether making a checkpoint again would adopt the one that is there: it matches what it is
    made from, and its directory is there, whatever became of its table. `latest` as of
    `staleness`."""
    if _difference(spec, latest, deployment, models):
        return False
    path = _made(spec.key, latest).metadata.get("path")
    return path is not None and (deployment.store_root / str(path.value)).is_dir()


def _made(
    key: dg.AssetKey, latest: Mapping[dg.AssetKey, dg.EventLogRecord | None]
) -> dg.AssetMaterialization:
    record = latest[key]
    made = record.asset_materialization if record else None
    assert made is not None, "else it differs"
    return made


def _difference(
    spec: dg.AssetSpec,
    latest: Mapping[dg.AssetKey, dg.EventLogRecord | None],
    deployment: Deployment,
    models: Models,
) -> str:
    """Why an asset does not match what it is made from; "" when it does."""
    inputs = [dep.asset_key for dep in spec.deps]
    if difference := recorded_difference(spec.key, spec.code_version, inputs, latest):
        return difference
    made = _made(spec.key, latest)
    model = made.metadata.get(MODEL_FINGERPRINT)
    now = models.fingerprint(spec.key) if model else None
    if model is not None and now is not None and model.value != now:
        return "its model changed"
    held_out = made.metadata.get(HELD_OUT)
    if held_out is not None and held_out.value != held_out_version(deployment):
        return "the held-out posters, which decide when its training stops, changed"
    return _decided(spec.key, made, deployment)


def recorded_difference(
    key: dg.AssetKey,
    code_version: str | None,
    inputs: Iterable[dg.AssetKey],
    latest: Mapping[dg.AssetKey, dg.EventLogRecord | None],
) -> str:
    """How the code version and the inputs of now differ from those that the latest materialization
    recorded; "" where they do not. `latest` as of `staleness`."""
    record = latest[key]
    made = record.asset_materialization if record else None
    if made is None:
        return "never materialized"
    tags = made.tags or {}
    if code_version and tags.get(CODE_VERSION) != code_version:
        return "its code or settings changed"
    for name in inputs:
        if data_version(latest.get(name)) != used_version(made, name):
            return f"{name.to_user_string()} changed"
    return ""


def other_base_model(
    key: dg.AssetKey,
    inputs: Iterable[dg.AssetKey],
    latest: Mapping[dg.AssetKey, dg.EventLogRecord | None],
    deployment: Deployment,
    models: Models,
) -> str:
    """Why an asset waits for a training, since the checkpoint was tuned from another base model
    than the one of now; "" where it does not.

    As after a change of the profile. The checkpoint is not drawn with then, nor are its images
    compared with those of the base model: all but `champion`, which says so and serves the base
    model. `latest`: of what the asset reads.
    """
    reads = {name.path[-1]: latest.get(name) for name in inputs}
    if "dreambooth_checkpoint" in reads:
        checkpoint = data_version(reads["dreambooth_checkpoint"])
        base_model = models.fingerprint(CHECKPOINT)
    elif {"base_generations", "tuned_generations"} <= reads.keys() and key.path[-1] != "champion":
        checkpoint = _said(reads["tuned_generations"], "checkpoint_id")
        base_model = _said(reads["base_generations"], MODEL_FINGERPRINT)
    else:
        return ""
    from posterpipe.core.provenance.checkpoints import tuned_from_another
    from posterpipe.core.store import StoreError

    name = deployment.settings.base_model.id
    try:
        differs = tuned_from_another(deployment.store, checkpoint or "", base_model, name)
    except StoreError:
        return ""  # the step says so, of whose failure people are told
    return differs and f"{differs}: it waits for the schedule `training`, or for the job `retrain`"


def _said(record: dg.EventLogRecord | None, entry: str) -> str | None:
    """An entry of the metadata of a materialization; None where there is none."""
    made = record.asset_materialization if record else None
    value = made.metadata.get(entry) if made else None
    return None if value is None else str(value.value)


def used_version(made: dg.AssetMaterialization, name: dg.AssetKey) -> str | None:
    """The data version of an input that a materialization was made from; None for none.

    The one that was read, where the step told; else the one that Dagster noted when it started.
    """
    read = made.metadata.get(INPUTS_READ)
    versions = read.value if isinstance(read, dg.JsonMetadataValue) else None
    if isinstance(versions, Mapping) and name.to_user_string() in versions:
        return str(versions[name.to_user_string()])
    return (made.tags or {}).get(INPUT_DATA_VERSION + name.to_user_string())


def held_out_version(deployment: Deployment) -> str:
    """Version of the table of held-out posters and their captions; "" before there is one."""
    return deployment.store.table_version("holdout_posters") or ""


def _decided(key: dg.AssetKey, made: dg.AssetMaterialization, deployment: Deployment) -> str:
    """What people decided about the champion since; "" for nothing.

    The assets around the champion read decisions, which are no asset: they are made of what those
    assets measured. Decisions of the gate are known to the asset that took them.
    """
    name = key.path[-1]
    if name not in ("champion", "champion_generations"):
        return ""
    from posterpipe.core.champion.decisions import defender_of, of_base, read_mirrored_decisions
    from posterpipe.core.warehouse.database import WarehouseError

    try:
        told = read_mirrored_decisions(deployment.store_root)
    except WarehouseError as error:
        return str(error)  # so will the step, of whose failure people are told
    known = {entry: str(value.value) for entry, value in made.metadata.items() if value is not None}
    if name == "champion":
        # What profiles decide that share the store is no news here.
        told = of_base(told, known.get(BASE_MODEL, ""))
        last = str(told["decision_id"].iloc[-1]) if len(told) else ""
        return "" if known.get(LAST_DECISION) == last else "another checkpoint was chosen"
    defender = defender_of(told, known.get(BASE_MODEL, ""), known.get(CHALLENGER, ""))
    return "" if known.get(CHAMPION) == defender else "another champion is to be beaten"


def _lost(key: dg.AssetKey, made: dg.AssetMaterialization, deployment: Deployment) -> str:
    """Why what was made is not there any more; "" when it is."""
    name = key.path[-1]
    files = {
        "clip_scores": [deployment.warehouse_path],
        "fidelity_scores": [deployment.warehouse_path],
        "legibility_scores": [deployment.warehouse_path],
        "champion": [deployment.warehouse_path],
        "poster_inventory": [deployment.warehouse_path],
        "published_scores": [deployment.published_path, deployment.published_parquet_path],
        "contact_sheet": [deployment.contact_sheet_path],
        "score_report": [deployment.report_path],
        "growth_chart": [deployment.thesis_path / "growth.json"],
    }.get(name, [])
    version = made.metadata.get(TABLE_VERSION)
    if version is not None:
        from posterpipe.core.housekeeping.presence import lost_part

        store = deployment.store
        if store.table_version(name) != version.value:
            return "its table is gone or another one"
        if lost := lost_part(store, name):
            return lost
    if name == "dreambooth_checkpoint":
        path = made.metadata.get("path")
        files = [deployment.store_root / str(path.value)] if path else []
    gone = [file for file in files if not file.exists()]
    if gone:
        return f"{gone[0]} is gone"
    filled = made.metadata.get(WAREHOUSE)
    if filled is not None and filled.value != deployment.warehouse.identity():
        return (
            f"{deployment.warehouse_path} is another file than the one that it filled, or an "
            "earlier copy"
        )
    return ""


class Models:
    """Fingerprints of the models as they are now, each read once."""

    def __init__(self, deployment: Deployment) -> None:
        settings = deployment.settings
        self._root = settings.root
        self._refs: dict[str, tuple[ModelRef, ...]] = {
            "poster_captions": (settings.captioner.model,),
            "class_images": (settings.base_model,),
            "dreambooth_checkpoint": (settings.base_model,),
            "base_generations": (settings.base_model,),
            "clip_scores": (settings.scorer.model,),
            "fidelity_scores": (settings.scorer.model, *settings.evidence.models),
        }
        self._known: dict[tuple[str, str | None], str | None] = {}

    def fingerprint(self, key: dg.AssetKey) -> str | None:
        """Of the asset's models together; None for an asset without one, and where one is missing
        or would have to be downloaded."""
        from posterpipe.core.models import joint_fingerprint

        found = [self._of(ref) for ref in self._refs.get(key.path[-1], ())]
        known = [one for one in found if one is not None]
        return joint_fingerprint(known) if known and len(known) == len(found) else None

    def _of(self, ref: ModelRef) -> str | None:
        from posterpipe.core.models import known_fingerprint

        name = (ref.id, ref.revision)
        if name not in self._known:
            self._known[name] = known_fingerprint(ref, self._root)
        return self._known[name]
