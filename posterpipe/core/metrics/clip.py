"""CLIP: how well an image fits its text.

What belongs here: CLIP-T, the cosine of image and text embedding, and scoring a table of
generations with it. What does not: the encoder (`encoders`), its negative control (`specificity`),
the scaled score (a view of `warehouse`), intervals (`statistics`).

The raw cosine in -1..1 is kept (Hessel et al. 2021 call 2.5 * max(cosine, 0) the CLIPScore). An
image is compared with the prompt's score text, which is the same for every variant: no title, no
trigger word, never the negative prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from posterpipe.core.devices import usable_precision
from posterpipe.core.metrics.base import (
    Metric,
    encoder_metric,
    image_files,
    record_scores,
    score_rows,
)
from posterpipe.core.metrics.encoders import ClipEncoder, encoder_id, kept_embeddings
from posterpipe.core.progress import Progress
from posterpipe.core.store import Store, compute_missing, content_key
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.settings import ScorerSettings

CLIP_T_VERSION = 1
"""Raised when the same encoder and preprocessing would give other numbers."""


def clip_t_id(settings: ScorerSettings, root: Path) -> str:
    """`clip_t.<preprocessing>.<model>.<fingerprint>.v<version>`, with the precision where it is
    not fp32: e.g. `clip_t.crop.clip-vit-large-patch14.1f9a02c4.v1`. Loads nothing heavy."""
    encoder = encoder_id(settings.model_copy(update={"precision": "fp32"}), root)
    name = f"clip_t.{encoder}.v{CLIP_T_VERSION}"
    precision = usable_precision(settings.precision)
    return name if precision == "fp32" else f"{name}.{precision}"


def clip_t_metric(settings: ScorerSettings, root: Path) -> Metric:
    """What CLIP-T with these settings is."""
    return encoder_metric(
        clip_t_id(settings, root), "CLIP-T", settings, root, CLIP_T_VERSION,
        "cosine of image and score text, -1 to 1",
    )  # fmt: skip


class ClipTextSimilarity(ClipEncoder):
    """CLIP-T: the cosine of image and text embedding. Made once, called on batches.

    `crop` and `pad` are two metrics: see `ClipEncoder`. Raises ModelMissing.
    """

    def __init__(self, settings: ScorerSettings, root: Path) -> None:
        super().__init__(settings, root)
        self.metric_id = clip_t_id(settings, root)

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """Raw cosines, float32 (batch,), of each image with the text beside it."""
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts: give one text an image")
        return cosines(self.image_features(images), self.text_features(texts))


def cosines(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """float32 (n,): of embeddings of length 1, float32 (n, dimension), row by row."""
    # Rounding can carry a product of unit vectors a hair outside.
    return np.clip(np.einsum("nd,nd->n", images, texts), -1.0, 1.0)


@dataclass(frozen=True)
class Scored:
    """What scoring gave."""

    metric_id: str
    scores: pd.DataFrame
    """generation_key, metric_id, variant, prompt_id, seed, checkpoint_id, clip_cosine, status,
    reason: one row a generation, in their order; clip_cosine is NaN where the status is not ok."""
    added: int
    """Rows that the warehouse did not have."""


def score_generations(
    store: Store,
    warehouse: Warehouse,
    generations: pd.DataFrame,
    settings: ScorerSettings,
    root: Path,
    progress: Progress,
    *,
    run_id: str,
) -> Scored:
    """Scores the generations that the warehouse has no score for, and makes them the current ones.

    `generations` is the table of all current generations (see `generations.COLUMNS`), `root` the
    settings' root. The model is loaded only if something is missing, and the warehouse is not open
    while it works; cosines are kept in the store as they come, so that a kill loses little. A
    blocked or failed image, or one whose file cannot be read, gets a row with no value, a status
    and the reason. Raises ModelMissing and WarehouseBusy.
    """
    metric_id = clip_t_id(settings, root)
    known = warehouse.scores(metric_id, generations["generation_key"])
    missing = generations[~generations["generation_key"].isin(known["generation_key"])]
    new = clip_t_scores(store, missing, settings, root, progress)
    stored = record_scores(
        warehouse, generations, [clip_t_metric(settings, root)], new, run_id=run_id,
        step="clip_scores", make_current=True,
    )  # fmt: skip
    places = generations[["generation_key", "variant", "prompt_id", "seed", "checkpoint_id"]]
    scores = places.merge(
        stored.rename(columns={"value": "clip_cosine"}), on="generation_key", how="left"
    ).assign(metric_id=metric_id)
    order = ["generation_key", "metric_id", "variant", "prompt_id", "seed", "checkpoint_id",
             "clip_cosine", "status", "reason"]  # fmt: skip
    return Scored(metric_id=metric_id, scores=scores[order], added=len(missing))


def clip_t_scores(
    store: Store,
    generations: pd.DataFrame,
    settings: ScorerSettings,
    root: Path,
    progress: Progress,
) -> pd.DataFrame:
    """The scores (SCORE_COLUMNS) of generations, nothing written to the warehouse.

    What the store has of images and pairs is not computed again. Raises ModelMissing.
    """
    drawn = generations[generations["status"] == "ok"]
    pairs: dict[str, tuple[str, str]] = {}
    files = image_files(store, drawn)
    pair_of: dict[str, str] = {}
    for row in drawn.itertuples(index=False):
        image, text = str(row.image), str(row.score_text)
        key = content_key(image, text)
        pairs[key] = (image, text)
        pair_of[str(row.generation_key)] = key
    unreadable: dict[str, str] = {}

    def compute(missing: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        encoder = ClipTextSimilarity(settings, root)
        wanted = dict.fromkeys(pairs[key][0] for key in missing)
        images = kept_embeddings(
            store, settings, root, {image: files[image] for image in wanted}, progress,
            encoder=encoder,
        )  # fmt: skip
        unreadable.update(images.unreadable)
        ready = [key for key in missing if pairs[key][0] in images.vectors]
        if not ready:
            return
        similarities = cosines(
            images.rows([pairs[key][0] for key in ready]),
            encoder.text_features([pairs[key][1] for key in ready]),
        )
        for key, similarity in zip(ready, similarities, strict=True):
            yield key, {"cosine": float(similarity)}

    metric_id = clip_t_id(settings, root)
    # Cheap once the embeddings are kept, and what saves loading the model when nothing is new.
    known = compute_missing(store, f"score.{metric_id}", list(pairs), compute, save_every=4096)
    values: dict[str, float] = {}
    failures: dict[str, str] = {}
    for generation, pair in pair_of.items():
        if pair in known:
            values[generation] = known[pair]["cosine"]
        else:
            failures[generation] = unreadable.get(pairs[pair][0], "not scored")
    return score_rows(generations, metric_id, values, failures)
