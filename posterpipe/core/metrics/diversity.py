"""Diversity: how far the images of one prompt differ from each other.

What belongs here: the distance of an image from the other seeds of its prompt, variant and
checkpoint. What does not: similarity to posters (`fidelity`) and the encoders (`encoders`).

A model that has collapsed draws the same picture for every seed: its images score well one by one,
and only their likeness gives them away.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from posterpipe.core.metrics.base import (
    Measurement,
    Metric,
    digest,
    encoder_metric,
    image_files,
    score_rows,
)
from posterpipe.core.metrics.encoders import encoder_id, kept_embeddings
from posterpipe.core.progress import Progress
from posterpipe.core.store import Store
from posterpipe.settings import ScorerSettings

DIVERSITY_VERSION = 1

_GROUP = ["variant", "prompt_id", "checkpoint_id"]


class Diversity:
    """Mean distance of each image from the others of its group. Called on one group at a time."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """1 less the mean cosine with the other images, float64 (group,) in 0..2; NaN if alone.

        `images`: embeddings of length 1, float32 (group, dimension). The mean over the group is
        the mean over its pairs.
        """
        n = len(images)
        if n < 2:
            return np.full(n, np.nan)
        exact = np.asarray(images, dtype=np.float64)
        cosines = np.clip(exact @ exact.T, -1.0, 1.0)
        np.fill_diagonal(cosines, 0.0)
        return 1 - cosines.sum(axis=1) / (n - 1)


def diversity_metric(generations: pd.DataFrame, settings: ScorerSettings, root: Path) -> Metric:
    """What diversity is for these generations.

    Its id names the prompts and seeds of the suite: with another seed beside it, an image has
    another distance from the others.
    """
    cells = generations[["prompt_id", "seed"]].drop_duplicates()
    suite = digest(f"{row.prompt_id}:{row.seed}" for row in cells.itertuples(index=False))
    return encoder_metric(
        f"diversity.{suite}.{encoder_id(settings, root)}.v{DIVERSITY_VERSION}", "diversity",
        settings, root, DIVERSITY_VERSION,
        "1 less the mean cosine with the images of the prompt's other seeds, 0 to 2; 0 is one "
        "picture again and again",
    )  # fmt: skip


def measure_diversity(
    store: Store,
    generations: pd.DataFrame,
    encoders: Sequence[ScorerSettings],
    root: Path,
    progress: Progress,
) -> Measurement:
    """Diversity by each encoder, for a table of generations (`generations.COLUMNS`); the first one
    has the role diversity.

    Blocked images are left out of their group: they show nothing that could differ. Where one has
    failed, the whole group is tried again when it is there. Raises ModelMissing.
    """
    metrics = [diversity_metric(generations, encoder, root) for encoder in encoders]
    scores = [
        _scores(store, generations, metric, encoder, root, progress)
        for metric, encoder in zip(metrics, encoders, strict=True)
    ]
    roles = {metrics[0].metric_id: "diversity"}
    return Measurement(metrics, pd.concat(scores, ignore_index=True), roles)


def _scores(
    store: Store,
    generations: pd.DataFrame,
    metric: Metric,
    settings: ScorerSettings,
    root: Path,
    progress: Progress,
) -> pd.DataFrame:
    drawn = generations[generations["status"] == "ok"]
    embeddings = kept_embeddings(store, settings, root, image_files(store, drawn), progress)
    worker = Diversity()
    values: dict[str, float] = {}
    failures: dict[str, str] = {}
    for _, group in generations.groupby(_GROUP, sort=False):
        own = group[group["status"] == "ok"]
        keys = own["generation_key"].astype(str).tolist()
        missing = (group["status"] == "failed").any() or not own["image"].isin(
            embeddings.vectors.keys()
        ).all()
        if missing:
            failures |= dict.fromkeys(keys, "another image of the prompt is missing")
        elif len(own) < 2:
            failures |= dict.fromkeys(
                keys, "the prompt has no second image to differ from; give it more seeds"
            )
        else:
            distances = worker(embeddings.rows(own["image"].astype(str).tolist()))
            values |= dict(zip(keys, distances.tolist(), strict=True))
    return score_rows(generations, metric.metric_id, values, failures)
