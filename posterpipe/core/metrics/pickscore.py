"""PickScore: which image people would rather have for a prompt.

What belongs here: the worker and its id. What does not: the encoder it is built on (`encoders`).

Kirstain et al. (2023, arXiv:2305.01569) fine-tuned a CLIP ViT-H on choices of people who had asked
for the images; it agrees with people more often than CLIP does. It is measured only where its
weights are configured (`evidence.pickscore`), since they are 4 GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from posterpipe.core.metrics.base import (
    Measurement,
    Metric,
    encoder_metric,
    encoding_failures,
    image_files,
    score_rows,
)
from posterpipe.core.metrics.encoders import ClipEncoder, encoder_id, kept_embeddings
from posterpipe.core.models import fingerprint, locate
from posterpipe.core.progress import Progress
from posterpipe.core.store import Store
from posterpipe.settings import EvidenceSettings, ModelRef, ScorerSettings

PICKSCORE_VERSION = 1


def pickscore_settings(evidence: EvidenceSettings) -> ScorerSettings | None:
    """How PickScore encodes, or None where it is not configured. Its authors crop, as CLIP does."""
    if evidence.pickscore is None:
        return None
    return ScorerSettings(
        model=evidence.pickscore,
        batch_size=evidence.batch_size,
        preprocessing="crop",
        precision=evidence.precision,
    )


def pickscore_encoder_id(settings: ScorerSettings, processor: ModelRef | None, root: Path) -> str:
    """`encoder_id`, with the fingerprint of the processor where that is another model's: it decides
    what the encoder sees and reads. Raises ModelMissing."""
    name = encoder_id(settings, root)
    return name if processor is None else f"{name}.{fingerprint(processor, root)[:8]}"


def pickscore_metric(settings: ScorerSettings, processor: ModelRef | None, root: Path) -> Metric:
    """What PickScore with these settings is; `processor` is `evidence.pickscore_processor`."""
    encoder = pickscore_encoder_id(settings, processor, root)
    return encoder_metric(
        f"pickscore.{encoder}.v{PICKSCORE_VERSION}", "PickScore", settings, root,
        PICKSCORE_VERSION, "scaled cosine of image and score text, about 15 to 25; only differences"
        " for one text mean something",
    )  # fmt: skip


class PickScore(ClipEncoder):
    """The scaled cosine of image and text. Made once, called on batches. Raises ModelMissing."""

    def __init__(
        self, settings: ScorerSettings, root: Path, *, processor: ModelRef | None = None
    ) -> None:
        super().__init__(settings, root, processor=locate(processor, root) if processor else None)
        self.encoder_id = pickscore_encoder_id(settings, processor, root)
        self.metric_id = pickscore_metric(settings, processor, root).metric_id
        self.scale = float(self.model.logit_scale.float().exp())

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """Scores, float32 (batch,), of each image for the text beside it."""
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts: give one text an image")
        return self.scores(self.image_features(images), texts)

    def scores(self, features: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """As a call, of image embeddings that are kept: float32 (batch, dimension)."""
        return self.scale * np.einsum("nd,nd->n", features, self.text_features(texts))


def measure_pickscore(
    store: Store,
    generations: pd.DataFrame,
    evidence: EvidenceSettings,
    root: Path,
    progress: Progress,
) -> Measurement | None:
    """PickScore of generations, with the role preference; None where it is not configured.

    Give only generations that have no score yet: the model is loaded whenever one of them is ok.
    Raises ModelMissing.
    """
    settings = pickscore_settings(evidence)
    if settings is None:
        return None
    processor = evidence.pickscore_processor
    metric = pickscore_metric(settings, processor, root)
    drawn = generations[generations["status"] == "ok"]
    roles = {metric.metric_id: "preference"}
    if drawn.empty:
        return Measurement([metric], score_rows(generations, metric.metric_id, {}, {}), roles)
    worker = PickScore(settings, root, processor=processor)
    embeddings = kept_embeddings(
        store, settings, root, image_files(store, drawn), progress, encoder=worker
    )
    ready = drawn[drawn["image"].isin(embeddings.vectors.keys())]
    values: dict[str, float] = {}
    if not ready.empty:
        numbers = worker.scores(
            embeddings.rows(ready["image"].astype(str).tolist()),
            ready["score_text"].astype(str).tolist(),
        )
        values = dict(zip(ready["generation_key"].astype(str), numbers.tolist(), strict=True))
    failures = encoding_failures(drawn, embeddings.unreadable)
    scores = score_rows(generations, metric.metric_id, values, failures)
    return Measurement([metric], scores, roles)
