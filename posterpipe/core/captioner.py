"""Captions by BLIP (Li et al. 2022), and the table of all captions.

What belongs here: the captioner, which posters it describes, and the table of captions that it and
people give. What does not: reading what people wrote (`captions`), BLIP's arithmetic (`blip`), the
images (`images`) and the file that trainers read (`training_set`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
from PIL import Image

from posterpipe.core.captions.people import HumanCaption
from posterpipe.core.devices import (
    DeviceGone,
    best_device,
    give_memory_back,
    noticing_a_gone_device,
    torch_dtype,
    usable_precision,
)
from posterpipe.core.errors import first_line, named_line
from posterpipe.core.memory import TOO_LITTLE_MEMORY, doubt, is_out_of_memory
from posterpipe.core.models import ModelMissing, fingerprint, locate, quiet_hub
from posterpipe.core.parallel import cores
from posterpipe.core.progress import NO_PROGRESS, Progress
from posterpipe.core.store import Store, cells, compute_missing, content_key
from posterpipe.core.weights import load_weights
from posterpipe.settings import CaptionerSettings

if TYPE_CHECKING:
    import torch

Loaded = TypeVar("Loaded")

_CAPTIONER = "the captioner"

CAPTION_VERSION = 2
"""Raise it when the captioner decodes otherwise: every caption by the model is then made again."""

NO_WORDS = "the model found no words; write them"
"""The reason of a failure that stays, whoever tries again: the model would say the same."""

COLUMNS = ["poster_id", "caption", "source", "model", "revision", "status", "reason"]

MODEL, HUMAN = "model", "human"
"""Values of the column `source`."""


@dataclass(frozen=True)
class Description:
    """What the model says of an image; `cut` where it ran into the limit of its length."""

    caption: str
    cut: bool


class Captioner:
    """BLIP, loaded once and called on batches.

    `device`: the accelerator of this machine, else the CPU, unless given. Raises ModelMissing where
    the model cannot be had.
    """

    def __init__(
        self, settings: CaptionerSettings, root: Path, device: torch.device | None = None
    ) -> None:
        folder = locate(settings.model, root)

        from safetensors import SafetensorError
        from transformers import AutoTokenizer, BlipForConditionalGeneration
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
        from transformers.utils import logging

        from posterpipe.core.blip import without_repeated_work

        quiet_hub()
        logging.disable_progress_bar()
        self.settings = settings
        self.device = device or best_device()
        self.precision = usable_precision(settings.precision, self.device)
        self.dtype = torch_dtype(self.precision)
        # By its PIL name: the other backend needs torchvision and resizes differently.
        try:
            self.image_processor = BlipImageProcessorPil.from_pretrained(folder)
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            model: Any = load_weights(BlipForConditionalGeneration, folder, dtype=self.dtype)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelMissing(
                f"{folder}: the model cannot be loaded ({named_line(error)}); copy it again, or "
                "name another BLIP with POSTERPIPE_CAPTIONER__MODEL__ID"
            ) from error
        self.model = without_repeated_work(model.to(self.device).eval())

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """One caption for each RGB image, of any sizes. Beam search: the same images, the same
        captions."""
        if not images:
            return []
        import torch

        pixels = torch.stack([self.pixels(image) for image in images])
        return [described.caption for described in self.describe(pixels)]

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """An RGB image as the model sees it: float32 (3, height, width). For any thread."""
        processor = self.image_processor
        resized = image
        if processor.do_resize:
            # What the processor would do by way of arrays of the whole poster.
            size = (processor.size["width"], processor.size["height"])
            resized = image.resize(size, processor.resample)
        pixels: torch.Tensor = processor(
            images=resized, do_resize=False, return_tensors="pt"
        ).pixel_values
        return pixels[0]

    def describe(self, pixels: torch.Tensor) -> list[Description]:
        """A caption for each image of a batch (images, 3, height, width).

        All images have one size and all captions one start, so nothing in a batch is padding; it
        lasts as long as its longest caption. One thread at a time.
        """
        from posterpipe.core.blip import generate

        tokens = generate(
            self.model,
            pixels.to(self.device, self.dtype),
            do_sample=False,
            num_beams=self.settings.num_beams,
            max_new_tokens=self.settings.max_new_tokens,
            no_repeat_ngram_size=self.settings.no_repeat_ngram_size,
        )
        ended = (tokens == self.model.config.text_config.sep_token_id).any(dim=1).tolist()
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [
            Description(" ".join(text.split()), cut=not end)
            for text, end in zip(texts, ended, strict=True)
        ]


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
    progress: Progress = NO_PROGRESS,
    *,
    human: Mapping[str, HumanCaption] | None = None,
) -> pd.DataFrame:
    """The caption of each training image: a person's where there is one, else the model's.

    `resized`: the table of `images.resize_posters`; only rows with status `ok` count. `human`:
    captions by people by poster_id (`captions.people.captions_by_poster`). Columns of the result:
    poster_id, caption, source (`model` or `human`), model (id, "" for human), revision (fingerprint
    of the model, "" for human), status (`ok` or `failed`), reason (why it failed; of an `ok` one,
    what a person should look at: cut short, or several people disagree); sorted by poster_id.

    The model describes only images that nobody else did and that it did not describe before, and
    with nothing to do it is not loaded; a failed one is tried again, but for those of which it had
    nothing to say. Raises ModelMissing, and DeviceGone; what was described by then is kept.
    """
    human = human or {}
    usable = resized[resized["status"] == "ok"].sort_values("poster_id")
    images = dict(cells(usable, "poster_id", "image"))
    undescribed = {name: image for name, image in images.items() if name not in human}
    described = _described(store, undescribed, settings, root, progress)
    by_people = {"source": HUMAN, "model": "", "revision": "", "status": "ok"}
    rows = []
    for poster_id in images:
        written = human.get(poster_id)
        if written is not None:
            row = {**by_people, "caption": written.caption, "reason": written.note}
        elif poster_id in described:
            row = described[poster_id]
        else:
            continue  # interrupted; the next run goes on
        rows.append({"poster_id": poster_id, **row})
    return pd.DataFrame(rows, columns=COLUMNS)


def retriable_count(captions: pd.DataFrame) -> int:
    """How many captions of the table above failed in a way that may pass by itself."""
    return int(((captions["status"] == "failed") & (captions["reason"] != NO_WORDS)).sum())


def _described(
    store: Store,
    images: Mapping[str, str],
    settings: CaptionerSettings,
    root: Path,
    progress: Progress,
) -> dict[str, dict[str, str]]:
    """Rows by poster_id of what the model says of `images` (blobs by poster_id)."""
    if not images:
        return {}
    revision = fingerprint(settings.model, root)
    keys = {name: caption_key(image, settings, revision) for name, image in images.items()}
    # Two posters may come to the same pixels: one image, one caption.
    image_of = {keys[name]: image for name, image in images.items()}

    def compute(missing: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
        with noticing_a_gone_device(_CAPTIONER, best_device()):
            captioner = Captioner(settings, root)
        paths = [store.path(image_of[key], ".png") for key in missing]
        with progress.task("caption posters", len(missing), "posters") as tick:
            for key, row in zip(missing, caption_files(captioner, paths), strict=True):
                yield key, {**row, "image": image_of[key]}
                tick()
        model = weakref.ref(captioner.model)
        del captioner
        give_memory_back(model)

    rows = compute_missing(
        store,
        "caption",
        list(image_of),
        compute,
        save_every=settings.batch_size,
        usable=lambda row: row["status"] == "ok" or row["reason"] == NO_WORDS,
    )
    by_model = {"source": MODEL, "model": settings.model.id, "revision": revision}
    return {name: {**by_model, **rows[key]} for name, key in keys.items() if key in rows}


def caption_files(captioner: Captioner, paths: Sequence[Path]) -> Iterator[dict[str, str]]:
    """caption, status and reason for each image file, in their order.

    While a batch is described, threads decode the images of the next one.
    """

    def load(path: Path) -> torch.Tensor | dict[str, str]:
        try:
            with Image.open(path) as image:
                return captioner.pixels(image.convert("RGB"))
        except FileNotFoundError:
            return _failed(f"{path} is gone; materialize resized_posters again")
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            return _failed(_reason(error))

    for batch in _batches_ahead(load, paths, captioner.settings.batch_size):
        pixels = [item for item in batch if not isinstance(item, dict)]
        rows = iter(_caption_batch(captioner, pixels))
        yield from (item if isinstance(item, dict) else next(rows) for item in batch)


def _batches_ahead(
    load: Callable[[Path], Loaded], paths: Sequence[Path], size: int
) -> Iterator[list[Loaded]]:
    """What `load` makes of the paths, in batches; the next batch is loaded while one is used."""
    with ThreadPoolExecutor(cores(), thread_name_prefix="posterpipe") as pool:
        waiting = [pool.submit(load, path) for path in paths[:size]]
        try:
            for start in range(size, len(paths) + size, size):
                batch = [future.result() for future in waiting]
                waiting = [pool.submit(load, path) for path in paths[start : start + size]]
                yield batch
        finally:
            for future in waiting:
                future.cancel()


def _caption_batch(captioner: Captioner, pixels: list[torch.Tensor]) -> list[dict[str, str]]:
    """A row for each image; one that fails does not take the others of its batch with it.

    Raises DeviceGone, since nothing later can succeed either.
    """
    if not pixels:
        return []
    import torch

    try:
        with noticing_a_gone_device(_CAPTIONER, captioner.device):
            described = captioner.describe(torch.stack(pixels))
    except DeviceGone:
        raise
    except Exception as error:  # too little memory for the batch, perhaps
        if len(pixels) == 1:
            return [_failed(_reason(error))]
        half = len(pixels) // 2
        return [
            *_caption_batch(captioner, pixels[:half]),
            *_caption_batch(captioner, pixels[half:]),
        ]
    return [_row(description, captioner.settings) for description in described]


def _row(description: Description, settings: CaptionerSettings) -> dict[str, str]:
    if not description.caption:
        return _failed(NO_WORDS)
    reason = (
        f"cut at captioner.max_new_tokens = {settings.max_new_tokens}; raise it, or write the "
        "caption yourself"
        if description.cut
        else ""
    )
    return {"caption": description.caption, "status": "ok", "reason": reason}


def _failed(reason: str) -> dict[str, str]:
    return {"caption": "", "status": "failed", "reason": reason}


def _reason(error: Exception) -> str:
    """In words that are the same each time that it fails."""
    if is_out_of_memory(error):
        return TOO_LITTLE_MEMORY + doubt(error)
    return first_line(error)
