"""Specificity: whether an image fits its own prompt, or what all prompts of the suite share.

What belongs here: CLIP-T's negative control, an image's cosine with the texts of the other prompts,
and what is left of CLIP-T without it. What does not: CLIP-T itself (`clip`) and the encoders
(`encoders`).

The texts of a suite have much in common ("a minimalist film poster of ..."), and an image that
comes to look like a film poster comes nearer to all of them: a gain that is none of following the
prompt. The control is the mean over all other texts, so that it hangs on no exchange of prompts
drawn by chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from posterpipe.core.metrics.base import (
    SCORE_COLUMNS,
    Measurement,
    Metric,
    digest,
    encoder_metric,
    encoding_failures,
    image_files,
    score_rows,
)
from posterpipe.core.metrics.encoders import encoder_id, kept_embeddings, kept_text_embeddings
from posterpipe.core.progress import Progress
from posterpipe.core.store import Store
from posterpipe.settings import ScorerSettings

SPECIFICITY_VERSION = 1
"""Raised when the same embeddings would give other numbers."""


@dataclass(frozen=True)
class Specificity:
    """What comparing images with all texts of a suite gave; float64 (batch,) each."""

    specific: np.ndarray
    """Cosine with the own text less the mean cosine with the others, -2..2."""
    control: np.ndarray
    """The mean cosine with the others, -1..1."""
    rank: np.ndarray
    """Share of the others that fit less than the own text, ties half, 0..1; 0.5 is chance."""


class PromptSpecificity:
    """An image's own text beside the others of the suite. Made once, called on batches.

    `texts`: embeddings of length 1, float32 (texts, dimension), of two texts or more.
    """

    def __init__(self, texts: np.ndarray) -> None:
        if len(texts) < 2:
            raise ValueError("an image's own text needs another one beside it; give two or more")
        self._texts = np.asarray(texts, dtype=np.float64)

    def __call__(self, images: np.ndarray, own: np.ndarray) -> Specificity:
        """`images`: embeddings of length 1, float32 (batch, dimension); `own`: int (batch,), which
        text is each image's."""
        cosines = np.clip(np.asarray(images, np.float64) @ self._texts.T, -1.0, 1.0)
        others = len(self._texts) - 1
        mine = cosines[np.arange(len(cosines)), own]
        control = (cosines.sum(axis=1) - mine) / others
        lower = (cosines < mine[:, None]).sum(axis=1)
        equal = (cosines == mine[:, None]).sum(axis=1) - 1
        return Specificity(mine - control, control, (lower + equal / 2) / others)


def suite_texts(generations: pd.DataFrame) -> list[str]:
    """The score texts of the generations, each once, in order."""
    return sorted(set(generations["score_text"].astype(str)))


def specificity_metrics(
    texts: list[str], settings: ScorerSettings, root: Path
) -> tuple[Metric, Metric, Metric]:
    """CLIP-T specific, CLIP-T control and CLIP-T rank: the three of `Specificity`.

    Their ids name the suite's texts: with another prompt beside it, an image has other numbers.
    """
    tail = f"{digest(texts)}.{encoder_id(settings, root)}.v{SPECIFICITY_VERSION}"

    def metric(start: str, name: str, description: str) -> Metric:
        return encoder_metric(
            f"{start}.{tail}", name, settings, root, SPECIFICITY_VERSION, description
        )

    return (
        metric(
            "clip_specific",
            "CLIP-T specific",
            "cosine with the image's own score text less its mean cosine with the suite's other "
            "texts, -2 to 2; 0 says that it fits every prompt alike",
        ),
        metric(
            "clip_control",
            "CLIP-T control",
            "the negative control: mean cosine with the score texts of the suite's other prompts, "
            "-1 to 1; a gain that is seen here too is none of following the prompt",
        ),
        metric(
            "clip_rank",
            "CLIP-T rank",
            "share of the suite's other texts that fit the image less than its own, ties half, "
            "0 to 1; 0.5 is chance, 1 says that its own fits best",
        ),
    )


def measure_specificity(
    store: Store,
    generations: pd.DataFrame,
    settings: ScorerSettings,
    root: Path,
    progress: Progress,
) -> Measurement:
    """The metrics for a table as of `generations.COLUMNS`, with the roles specific, control, rank.

    The other texts are those of the whole table, unusable images included, so that a blocked image
    changes no other's number; a text that several prompts share counts once. None of the metrics
    where there is one text only. The model is loaded only for images and texts that the store has
    no embedding of. Raises ModelMissing.
    """
    texts = suite_texts(generations)
    if len(texts) < 2:
        nothing = pd.DataFrame(columns=list(SCORE_COLUMNS)).astype({"value": "float64"})
        return Measurement([], nothing)
    metrics = specificity_metrics(texts, settings, root)
    drawn = generations[generations["status"] == "ok"]
    images = kept_embeddings(store, settings, root, image_files(store, drawn), progress)
    worker = PromptSpecificity(kept_text_embeddings(store, settings, root, texts))
    ready = drawn[drawn["image"].isin(images.vectors.keys())]
    place = {text: number for number, text in enumerate(texts)}
    own = ready["score_text"].astype(str).map(place).to_numpy(dtype=int)
    failures = encoding_failures(drawn, images.unreadable)
    values: list[dict[str, float]] = [{}, {}, {}]
    if len(ready):
        found = worker(images.rows(ready["image"].astype(str).tolist()), own)
        keys = ready["generation_key"].astype(str)
        values = [
            dict(zip(keys, numbers.tolist(), strict=True))
            for numbers in (found.specific, found.control, found.rank)
        ]
    scores = [
        score_rows(generations, metric.metric_id, own_values, failures)
        for metric, own_values in zip(metrics, values, strict=True)
    ]
    names = ("specific", "control", "rank")
    roles = {metric.metric_id: name for metric, name in zip(metrics, names, strict=True)}
    return Measurement(list(metrics), pd.concat(scores, ignore_index=True), roles)
