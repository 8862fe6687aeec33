"""Class images for prior preservation (Ruiz et al. 2023, arXiv:2208.12242, section 3.2).

What belongs here: what the base model draws of the class prompt, as a training set of its own. What
does not: drawing (`generations`, `sampler`), how the images are weighed in training (`dreambooth`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from posterpipe.core.generations import generate
from posterpipe.core.progress import Progress
from posterpipe.core.prompts import Prompt
from posterpipe.core.store import Store
from posterpipe.core.training.training_set import build_training_set
from posterpipe.core.variants import BASE_VARIANTS
from posterpipe.settings import Settings

COLUMNS = ["file_name", "caption", "poster_id", "image"]


@dataclass(frozen=True)
class ClassImages:
    """The class images of some settings."""

    table: pd.DataFrame
    """file_name, caption (the prompt), poster_id (the key of the image's pixels), image (blob)."""
    folder: Path | None = None
    """The training set that they are; None where there are none."""
    version: str = ""
    """Of that set; "" where there is none."""
    failed: int = 0
    """Images that could not be drawn this time, and are not in the set."""


def build_class_images(
    store: Store,
    model_dir: Path,
    model_id: str,
    settings: Settings,
    progress: Progress,
    *,
    run_id: str,
) -> ClassImages:
    """The class images; none where `training.prior_preservation` is off.

    `model_dir` and `model_id` are the base model and its fingerprint. `training.class_image_count`
    images of `training.class_prompt` with the seeds from 0 on, in the size of the training images.
    Images drawn before are not drawn again; black ones are left out. Raises ModelMissing,
    SamplerError, DeviceGone, TrainingSetEmpty.
    """
    training = settings.training
    if not training.prior_preservation:
        return ClassImages(pd.DataFrame(columns=COLUMNS, dtype="object"))
    size = {"width": settings.images.width, "height": settings.images.height}
    prompt = Prompt(
        prompt_id="class-images",
        prompt=training.class_prompt,
        score_text=training.class_prompt,
        negative="",
        title="",
        seeds=tuple(range(training.class_image_count)),
    )
    drawn = generate(
        store,
        [prompt],
        BASE_VARIANTS[:1],
        model_dir,
        model_id,
        settings.sampler.model_copy(update=size),
        progress,
        run_id=run_id,
    )
    drawn = drawn.rename(columns={"pixel_key": "poster_id"})
    captions = drawn[["poster_id", "status"]].assign(caption=training.class_prompt, source="model")
    table, folder, version = build_training_set(store, drawn, captions, template="{caption}")
    return ClassImages(table, folder, version, failed=int((drawn["status"] == "failed").sum()))
