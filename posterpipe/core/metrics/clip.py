"""CLIP: how well an image fits its text.

What belongs here: CLIP-T, the cosine of image and text embedding, and scoring a table of
generations with it. What does not: other encoders, the scaled score (a view of `warehouse`),
intervals (`statistics`).

The raw cosine in -1..1 is kept (Hessel et al. 2021 call 2.5 * max(cosine, 0) the CLIPScore). An
image is compared with the prompt's score text, which is the same for every variant: no title, no
trigger word, never the negative prompt.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from posterpipe.core.models import (
    ModelMissing,
    best_device,
    fingerprint,
    locate,
    quiet_hub,
    torch_dtype,
)
from posterpipe.core.progress import Progress
from posterpipe.core.store import Store, compute_missing, content_key
from posterpipe.core.warehouse import Warehouse, insert, record_generations, replace_current
from posterpipe.settings import ScorerSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLIP_T_VERSION = 1
"""Raised when the same encoder and preprocessing would give other numbers."""

_KEPT_TEXTS = 4096


def clip_t_id(settings: ScorerSettings, root: Path) -> str:
    """`clip_t.<preprocessing>.<model>.<fingerprint>.v<version>`, with the precision where it is
    not fp32: e.g. `clip_t.crop.clip-vit-large-patch14.1f9a02c4.v1`. Loads nothing heavy."""
    model = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(settings.model.id).name)
    revision = fingerprint(settings.model, root)[:8]
    name = f"clip_t.{settings.preprocessing}.{model}.{revision}.v{CLIP_T_VERSION}"
    return name if settings.precision == "fp32" else f"{name}.{settings.precision}"


class ClipTextSimilarity:
    """CLIP-T: the cosine of image and text embedding. Made once, called on batches.

    Equals `CLIPModel` with `CLIPProcessor` (its PIL form) of transformers. `crop` is CLIP's own
    preprocessing: the shorter side to the encoder's size, then the square in the middle, which cuts
    a third of a poster's height away; `pad` puts the whole image on a square of CLIP's mean colour.
    Raises ModelMissing.
    """

    def __init__(self, settings: ScorerSettings, root: Path) -> None:
        import transformers
        from safetensors import SafetensorError
        from transformers.utils import logging as transformers_logging

        quiet_hub()
        transformers_logging.disable_progress_bar()
        self.settings = settings
        self.metric_id = clip_t_id(settings, root)
        folder = locate(settings.model, root)
        self.device: torch.device = best_device()
        short = settings.precision if self.device.type != "cpu" else "fp32"
        try:
            self.tokenizer: Any = transformers.CLIPTokenizer.from_pretrained(folder)
            # The PIL form by name: torchvision's resize gives other pixels.
            self.image_processor: Any = transformers.CLIPImageProcessorPil.from_pretrained(folder)
            model: Any = transformers.CLIPModel.from_pretrained(
                folder, dtype=torch_dtype(short), use_safetensors=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ModelMissing(
                f"{folder}: the CLIP model cannot be loaded ({reason}); copy it again, or name "
                "another one with POSTERPIPE_SCORER__MODEL__ID"
            ) from error
        self.model = model.requires_grad_(False).eval().to(self.device)
        self.max_tokens = min(
            int(self.tokenizer.model_max_length), model.config.text_config.max_position_embeddings
        )
        self._texts: dict[str, np.ndarray] = {}

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """Raw cosines, float32 (batch,), of each image with the text beside it."""
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts: give one text an image")
        return np.einsum("nd,nd->n", self.image_features(images), self.text_features(texts))

    def image_features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Image embeddings of length 1, float32 (batch, dimension)."""
        size = self.settings.batch_size
        parts = [self._images(images[i : i + size]) for i in range(0, len(images), size)]
        return np.concatenate([self._nothing(), *parts])

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Text embeddings of length 1, float32 (batch, dimension); each text is encoded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if len(self._texts) + len(new) > _KEPT_TEXTS:
            self._texts.clear()
            new = list(dict.fromkeys(texts))
        size = self.settings.batch_size
        for start in range(0, len(new), size):
            part = new[start : start + size]
            self._texts.update(zip(part, self._encode(part), strict=True))
        return np.stack([self._texts[text] for text in texts]) if texts else self._nothing()

    def _nothing(self) -> np.ndarray:
        return np.zeros((0, self.model.config.projection_dim), np.float32)

    def _images(self, images: Sequence[Image.Image]) -> np.ndarray:
        import torch

        rgb = [image.convert("RGB") for image in images]
        if self.settings.preprocessing == "pad":
            mean = np.round(np.asarray(self.image_processor.image_mean) * 255).astype(int)
            rgb = [letterbox(image, (int(mean[0]), int(mean[1]), int(mean[2]))) for image in rgb]
        pixels = self.image_processor(rgb, return_tensors="pt").pixel_values
        pixels = pixels.to(self.device, self.model.dtype)
        with torch.inference_mode(), self._autocast():
            return _unit(self.model.get_image_features(pixel_values=pixels))

    def _encode(self, texts: list[str]) -> np.ndarray:
        import torch

        # The tokenizer cuts long texts, since it keeps the end token, which CLIP reads.
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode(), self._autocast():
            return _unit(
                self.model.get_text_features(
                    input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
                )
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        import torch

        if self.device.type == "cpu" and self.settings.precision == "bf16":
            return torch.autocast("cpu", torch.bfloat16)
        return nullcontext()


def letterbox(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The whole image in the middle of a square of its longer side, RGB."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _unit(features: Tensor | Any) -> np.ndarray:
    """Features of length 1, float32; transformers 5 wraps the projected ones in an output."""
    vectors = getattr(features, "pooler_output", features).float()
    return (vectors / vectors.norm(dim=-1, keepdim=True)).cpu().numpy()


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

    `generations` is the table of all current generations (see `sampler.COLUMNS`), `root` the
    settings' root. The model is loaded only if something is missing, and the warehouse is not open
    while it works; cosines are kept in the store as they come, so that a kill loses little. A
    blocked or failed image, or one whose file cannot be read, gets a row with no value, a status
    and the reason. Raises ModelMissing and WarehouseBusy.
    """
    metric_id = clip_t_id(settings, root)
    known = warehouse.scores(metric_id, generations["generation_key"])
    missing = generations[~generations["generation_key"].isin(known["generation_key"])]
    new = _scores(store, missing, settings, root, progress)
    now = dt.datetime.now(dt.UTC).replace(tzinfo=None)
    with warehouse.write() as connection:
        record_generations(connection, generations, run_id=run_id, recorded_at=now)
        insert(connection, "dim_metric", _description(metric_id, settings, root, now))
        insert(
            connection,
            "fct_score",
            new.assign(metric_id=metric_id, scored_at=now, run_id=run_id),
        )
        replace_current(connection, generations["generation_key"])
    # Read back, so that a score which another run wrote first is the one that counts.
    stored = warehouse.scores(metric_id, generations["generation_key"], with_failed=True)
    places = generations[["generation_key", "variant", "prompt_id", "seed", "checkpoint_id"]]
    scores = places.merge(
        stored.rename(columns={"value": "clip_cosine"}), on="generation_key", how="left"
    ).assign(metric_id=metric_id)
    order = ["generation_key", "metric_id", "variant", "prompt_id", "seed", "checkpoint_id",
             "clip_cosine", "status", "reason"]  # fmt: skip
    return Scored(metric_id=metric_id, scores=scores[order], added=len(missing))


def _description(
    metric_id: str, settings: ScorerSettings, root: Path, now: dt.datetime
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "metric_id": [metric_id],
            "name": ["CLIP-T"],
            "encoder": [settings.model.id],
            "revision": [settings.model.revision or fingerprint(settings.model, root)],
            "preprocessing": [settings.preprocessing],
            "version": [CLIP_T_VERSION],
            "description": ["cosine of image and score text, -1 to 1"],
            "first_seen_at": [now],
        }
    )


def _scores(
    store: Store,
    generations: pd.DataFrame,
    settings: ScorerSettings,
    root: Path,
    progress: Progress,
) -> pd.DataFrame:
    """generation_key, value, status, reason of generations without a score."""
    drawn = generations[generations["status"] == "ok"]
    pairs: dict[str, tuple[Path, str]] = {}
    pair_of: dict[str, str] = {}
    for row in drawn.itertuples(index=False):
        key = content_key(row.image, row.score_text)
        pairs[key] = (store.root / str(row.image_path), str(row.score_text))
        pair_of[str(row.generation_key)] = key
    unreadable: dict[str, str] = {}

    def compute(missing: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        metric = ClipTextSimilarity(settings, root)
        with progress.task(f"Scoring {len(missing)} images", len(missing), "images") as tick:
            for start in range(0, len(missing), settings.batch_size):
                batch = missing[start : start + settings.batch_size]
                images: dict[str, Image.Image] = {}
                for key in batch:
                    try:
                        with Image.open(pairs[key][0]) as image:
                            images[key] = image.convert("RGB")
                    except OSError as error:
                        unreadable[key] = (
                            f"{pairs[key][0]}: cannot be read ({error}); "
                            "materialize the generations again"
                        )
                cosines = metric(list(images.values()), [pairs[key][1] for key in images])
                for key, cosine in zip(images, cosines, strict=True):
                    yield key, {"cosine": float(cosine)}
                tick(len(batch))

    kind = f"score.{clip_t_id(settings, root)}"
    cosines = compute_missing(store, kind, list(pairs), compute, save_every=settings.batch_size)
    rows: list[tuple[str, float | None, str, str]] = []
    for row in generations.itertuples(index=False):
        generation = str(row.generation_key)
        pair = pair_of.get(generation)
        if pair is None:
            rows.append((generation, None, str(row.status), str(row.reason)))
        elif pair not in cosines:
            rows.append((generation, None, "failed", unreadable.get(pair, "not scored")))
        elif not np.isfinite(cosines[pair]["cosine"]):
            rows.append((generation, None, "failed", "the encoder gave no finite number"))
        else:
            rows.append((generation, cosines[pair]["cosine"], "ok", ""))
    frame = pd.DataFrame(rows, columns=["generation_key", "value", "status", "reason"])
    return frame.astype({"value": "float64"})
