"""A version of `core` that is raised reaches the assets whose tables it decides.

A raised constant makes new keys, so that everything is computed again when it is asked for. What
asks is the asset's `code_version`: without, the old table stays until something else changes, and
then rows change that have nothing to do with it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import posterpipe.core
from posterpipe.definitions import build_defs
from posterpipe.settings import load_settings

ROOT = Path(posterpipe.core.__file__).parent

RAISED_FOR: dict[str, tuple[object, dict[str, int]]] = {
    "posters.landing.INSPECT_VERSION": (4, {"raw_posters": 4, "holdout_posters": 4}),
    "captions.people.READ_VERSION": (3, {"human_captions": 3, "holdout_posters": 4}),
    "images.PREPARE_VERSION": (2, {"resized_posters": 2, "fidelity_scores": 3}),
    "captioner.CAPTION_VERSION": (2, {"poster_captions": 2}),
    "sampler.SAMPLER_VERSION": (
        1,
        {
            "class_images": 1,
            "base_generations": 1,
            "tuned_generations": 2,
            "champion_generations": 2,
        },
    ),
    "sampler.FP32_VERSION": (
        "the same fp32 on every device",
        {
            "class_images": 2,
            "base_generations": 2,
            "tuned_generations": 3,
            "champion_generations": 3,
        },
    ),
    "sampler.SHORT_LORA_VERSION": (
        "LoRA added in fp32",
        {"tuned_generations": 2, "champion_generations": 2},
    ),
    "dreambooth.config.TRAINER_VERSION": ("3", {"dreambooth_checkpoint": 3}),
    # Part of the settings that decide a checkpoint, and so of the code version.
    "dreambooth.effects.FROZEN_LORA_VERSION": ("texts in fp32", {"dreambooth_checkpoint": 3}),
    "dreambooth.latents._LATENTS_VERSION": (3, {"dreambooth_checkpoint": 3}),
    "dreambooth.texts._EMBEDDINGS_VERSION": (1, {"dreambooth_checkpoint": 3}),
    "typography.titled.TYPOGRAPHY_VERSION": (4, {"titled_posters": 3, "legibility_scores": 3}),
    "typography.titled.GREEK_CAPITALS_VERSION": ("without accents", {"titled_posters": 4}),
    "metrics.encoders.ENCODER_VERSION": (2, {"clip_scores": 4, "fidelity_scores": 5}),
    "metrics.clip.CLIP_T_VERSION": (1, {"clip_scores": 3, "fidelity_scores": 3}),
    "metrics.specificity.SPECIFICITY_VERSION": (1, {"fidelity_scores": 3}),
    "metrics.fidelity.FIDELITY_VERSION": (1, {"fidelity_scores": 3}),
    "metrics.fidelity.HASH_VERSION": (1, {"fidelity_scores": 3}),
    "metrics.fidelity.CONTROL_VERSION": (1, {"fidelity_scores": 5}),
    "metrics.diversity.DIVERSITY_VERSION": (1, {"fidelity_scores": 3}),
    "metrics.pickscore.PICKSCORE_VERSION": (1, {"fidelity_scores": 3}),
    "metrics.legibility.LEGIBILITY_VERSION": (2, {"legibility_scores": 3}),
    "metrics.legibility.READER_VERSION": (2, {"legibility_scores": 3}),
}
"""Each version of core, and the `code_version` that the assets have to have at least with it. Who
raises one raises theirs, and notes all of them here."""

DECIDE_NO_TABLE = {
    "warehouse.publication.STORAGE_VERSION",
    "quality.images.STATISTICS_VERSION",  # of numbers that checks look at
    "warehouse.schema.SCHEMA_VERSION",
}


def versions() -> dict[str, object]:
    """The versions that the modules of core define."""
    found: dict[str, object] = {}
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if re.fullmatch(r"_?[A-Z0-9_]+_VERSION", name):
                    found[f"{module}.{name}"] = ast.literal_eval(node.value)
    return found


def test_a_raised_version_of_core_is_raised_in_the_assets_that_it_decides() -> None:
    known = {name: value for name, value in versions().items() if name not in DECIDE_NO_TABLE}
    assert known == {name: value for name, (value, _) in RAISED_FOR.items()}
    specs = build_defs(load_settings("starter")).resolve_all_asset_specs()
    codes = {spec.key.to_user_string(): spec.code_version or "" for spec in specs}
    for name, (_, assets) in RAISED_FOR.items():
        for asset, least in assets.items():
            assert int(codes[asset].split("-")[0]) >= least, f"{name} was raised for {asset}"
