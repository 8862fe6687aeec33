"""When assets are materialized: jobs, and which assets no longer match what they were made from.

What belongs here: code versions that follow the settings, jobs, staleness. What does not: the
assets themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import dagster as dg

from posterpipe.defs.resources import MODEL_FINGERPRINT, TABLE_VERSION, Deployment
from posterpipe.settings import Settings

DATA_VERSION = "dagster/data_version"
INPUT_DATA_VERSION = "dagster/input_data_version/"
CODE_VERSION = "dagster/code_version"

refresh_dataset = dg.define_asset_job(
    "refresh_dataset",
    dg.AssetSelection.groups("ingest", "dataset"),
    description="Posters, captions and the training set; nothing that takes hours.",
)
retrain = dg.define_asset_job(
    "retrain",
    dg.AssetSelection.assets("dreambooth_checkpoint").downstream(),
    description="Fine-tune on the training set as it is, then draw, score and publish.",
)
evaluate = dg.define_asset_job(
    "evaluate",
    dg.AssetSelection.groups("generation", "scoring", "reports"),
    description="Draw the prompt suite with the models as they are, score and publish.",
)
everything = dg.define_asset_job(
    "everything",
    dg.AssetSelection.all(),
    description="From the posters to the published scores. What exists already is not redone.",
)

JOBS = (refresh_dataset, retrain, evaluate, everything)

_BATCH = {"batch_size"}  # how many at once does not decide what comes out

_REPORTING = {"log_every_steps", "save_every_steps", "keep_saves"}

_DECIDING: Mapping[str, Callable[[Settings], list[Any]]] = {
    "raw_posters": lambda s: [s.images.min_side, s.images.max_pixels],
    "resized_posters": lambda s: [s.images.width, s.images.height, s.images.fit],
    "poster_captions": lambda s: [s.captioner.model_dump(mode="json", exclude=_BATCH)],
    "dreambooth_checkpoint": lambda s: [
        s.base_model.model_dump(mode="json"),
        s.training.model_dump(mode="json", exclude=_REPORTING),
    ],
    "base_generations": lambda s: [
        s.base_model.model_dump(mode="json"),
        s.sampler.model_dump(mode="json", exclude=_BATCH),
    ],
    "tuned_generations": lambda s: [s.sampler.model_dump(mode="json", exclude=_BATCH)],
    "clip_scores": lambda s: [s.scorer.model_dump(mode="json", exclude=_BATCH)],
}
"""Settings that decide what is in an asset, by asset."""


def with_settings_in_code_version(assets: Iterable[Any], settings: Settings) -> list[Any]:
    """The assets with a code version that also changes with the settings that decide them.

    A changed learning rate then makes the checkpoint stale just as changed code does, in the UI
    and for automation.
    """

    def spec_with_settings(spec: dg.AssetSpec) -> dg.AssetSpec:
        deciding = _DECIDING.get(spec.key.to_user_string())
        if deciding is None:
            return spec
        text = json.dumps(deciding(settings), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return spec.replace_attributes(code_version=f"{spec.code_version}-{digest}")

    return list(dg.map_asset_specs(spec_with_settings, assets))


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
    latest = {spec.key: _latest(instance, spec.key) for spec in specs}
    models = _Models(deployment)
    reasons = {}
    for spec in specs:
        reason = _staleness(spec, latest, deployment, models)
        if reason:
            reasons[spec.key] = reason
    return reasons


def _latest(instance: dg.DagsterInstance, key: dg.AssetKey) -> dg.AssetMaterialization | None:
    record = instance.get_latest_materialization_event(key)
    return record.asset_materialization if record else None


def _staleness(
    spec: dg.AssetSpec,
    latest: Mapping[dg.AssetKey, dg.AssetMaterialization | None],
    deployment: Deployment,
    models: _Models,
) -> str:
    made = latest[spec.key]
    if made is None:
        return "never materialized"
    tags = made.tags or {}
    if spec.code_version and tags.get(CODE_VERSION) != spec.code_version:
        return "its code or settings changed"
    for dep in spec.deps:
        upstream = latest.get(dep.asset_key)
        now = (upstream.tags or {}).get(DATA_VERSION) if upstream else None
        used = tags.get(INPUT_DATA_VERSION + dep.asset_key.to_user_string())
        if now != used:
            return f"{dep.asset_key.to_user_string()} changed"
    model = made.metadata.get(MODEL_FINGERPRINT)
    if model is not None and model.value != models.fingerprint(spec.key):
        return "its model changed"
    return _lost(spec.key, made, deployment)


def _lost(key: dg.AssetKey, made: dg.AssetMaterialization, deployment: Deployment) -> str:
    """Why what was made is not there any more; "" when it is."""
    name = key.path[-1]
    files = {
        "clip_scores": [deployment.warehouse_path],
        "leaderboard": [deployment.warehouse_path],
        "published_scores": [deployment.published_path],
        "contact_sheet": [deployment.contact_sheet_path],
    }.get(name, [])
    version = made.metadata.get(TABLE_VERSION)
    if version is not None and deployment.store.table_version(name) != version.value:
        return "its table is gone or another one"
    if name == "dreambooth_checkpoint":
        path = made.metadata.get("path")
        files = [deployment.store_root / str(path.value)] if path else []
    gone = [file for file in files if not file.exists()]
    return f"{gone[0]} is gone" if gone else ""


class _Models:
    """Fingerprints of the models as they are now, each read once."""

    def __init__(self, deployment: Deployment) -> None:
        settings = deployment.settings
        self._root = settings.root
        self._refs = {
            "poster_captions": settings.captioner.model,
            "dreambooth_checkpoint": settings.base_model,
            "base_generations": settings.base_model,
            "clip_scores": settings.scorer.model,
        }
        self._known: dict[str, str] = {}

    def fingerprint(self, key: dg.AssetKey) -> str | None:
        """Of the asset's model; None for an asset without one. Raises ModelMissing."""
        from posterpipe.core.models import fingerprint

        ref = self._refs.get(key.path[-1])
        if ref is None:
            return None
        if ref.id not in self._known:
            self._known[ref.id] = fingerprint(ref, self._root)
        return self._known[ref.id]
