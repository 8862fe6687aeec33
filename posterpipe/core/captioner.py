"""Captions by BLIP (Li et al. 2022).

What belongs here: the captioner and the table of captions that it gives. What does not: the images
(`images`) and the file that trainers read (`training_set`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from PIL import Image

from posterpipe.core.models import best_device, fingerprint, locate, quiet_hub, torch_dtype
from posterpipe.core.progress import NoProgress, Progress
from posterpipe.core.store import Store, compute_missing, content_key
from posterpipe.settings import CaptionerSettings

CAPTION_VERSION = 1
"""Raise it when the captioner decodes otherwise: every caption by the model is then made again."""

COLUMNS = ["poster_id", "caption", "source", "model", "revision", "status", "reason"]


class Captioner:
    """BLIP, loaded once and called on batches.

    Raises ModelMissing where the model cannot be had.
    """

    def __init__(self, settings: CaptionerSettings, root: Path) -> None:
        folder = locate(settings.model, root)

        from transformers import AutoTokenizer, BlipForConditionalGeneration
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        quiet_hub()
        self.settings = settings
        self.device = best_device()
        self.dtype = torch_dtype(settings.precision)
        # By its PIL name: the other backend needs torchvision and resizes differently.
        self.image_processor = BlipImageProcessorPil.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = BlipForConditionalGeneration.from_pretrained(
            folder, dtype=self.dtype, use_safetensors=True
        )
        self.model = model.to(self.device).eval()

    def __call__(self, images: list[Image.Image]) -> list[str]:
        """One caption for each RGB image, of any sizes. Beam search: the same images, the same
        captions."""
        if not images:
            return []
        import torch

        pixel_values = self.image_processor(images=images, return_tensors="pt").pixel_values
        with torch.inference_mode():
            tokens = self.model.generate(
                pixel_values=pixel_values.to(self.device, self.dtype),
                do_sample=False,
                num_beams=self.settings.num_beams,
                max_new_tokens=self.settings.max_new_tokens,
                no_repeat_ngram_size=self.settings.no_repeat_ngram_size,
            )
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def caption_key(image: str, settings: CaptionerSettings, revision: str) -> str:
    """Key of a caption: the training image (its blob), the model and how it is decoded."""
    return content_key(
        "caption",
        CAPTION_VERSION,
        image,
        revision,
        settings.num_beams,
        settings.max_new_tokens,
        settings.no_repeat_ngram_size,
        settings.precision,
    )


def caption_posters(
    store: Store,
    resized: pd.DataFrame,
    settings: CaptionerSettings,
    root: Path,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The caption of each training image.

    `resized`: the table of `images.resize_posters`; only rows with status `ok` count. Columns of
    the result: poster_id, caption, source (`model`), model (id), revision (fingerprint of the
    model), status (`ok` or `failed`), reason; sorted by poster_id. A caption that was made before
    is not made again, and with nothing to do the model is not loaded; a failed one is tried again.
    Raises ModelMissing.
    """
    progress = progress or NoProgress()
    revision = fingerprint(settings.model, root)
    usable = resized[resized["status"] == "ok"].sort_values("poster_id")
    keys = {
        str(poster_id): caption_key(str(image), settings, revision)
        for poster_id, image in zip(usable["poster_id"], usable["image"], strict=True)
    }
    # Two posters may come to the same pixels: one image, one caption.
    image_of = {keys[str(row.poster_id)]: str(row.image) for row in usable.itertuples()}

    def compute(missing: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
        captioner = Captioner(settings, root)
        size = settings.batch_size
        with progress.task("caption posters", len(missing), "posters") as tick:
            for start in range(0, len(missing), size):
                batch = missing[start : start + size]
                paths = [store.path(image_of[key], ".png") for key in batch]
                yield from zip(batch, _caption_batch(captioner, paths), strict=True)
                tick(len(batch))

    rows = compute_missing(
        store,
        "caption",
        list(image_of),
        compute,
        save_every=settings.batch_size,
        usable=lambda row: row["status"] == "ok",
    )
    return pd.DataFrame(
        [
            {
                "poster_id": poster_id,
                "source": "model",
                "model": settings.model.id,
                "revision": revision,
                **rows[key],
            }
            for poster_id, key in keys.items()
        ],
        columns=COLUMNS,
    )


def _caption_batch(captioner: Captioner, paths: list[Path]) -> list[dict[str, str]]:
    """A row for each image; one that fails does not take the others of its batch with it."""
    try:
        captions = captioner([_read(path) for path in paths])
    except Exception as error:  # a damaged file, or too little memory for the batch
        if len(paths) == 1:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if isinstance(error, FileNotFoundError):
                reason = f"{paths[0]} is gone; materialize resized_posters again"
            return [{"caption": "", "status": "failed", "reason": reason}]
        return [row for path in paths for row in _caption_batch(captioner, [path])]
    return [
        {"caption": caption, "status": "ok", "reason": ""}
        if caption
        else {"caption": "", "status": "failed", "reason": "the model found no words; write them"}
        for caption in captions
    ]


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
