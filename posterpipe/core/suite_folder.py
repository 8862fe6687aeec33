"""The prompt suite drawn by any model into a folder that people look at.

What belongs here: which models can be given, and what lies in the folder. What does not: drawing
(`generations`) and the pictures' layout (`gallery`). Nothing of it becomes a table or a score.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from posterpipe.core.files import write_atomic
from posterpipe.core.gallery import grid
from posterpipe.core.generations import generate
from posterpipe.core.models import (
    ModelMissing,
    directory_fingerprint,
    fingerprint,
    joint_fingerprint,
    locate,
)
from posterpipe.core.progress import Progress
from posterpipe.core.prompts import Prompt
from posterpipe.core.sampler import LORA_WEIGHTS, lora_weights
from posterpipe.core.store import Store
from posterpipe.core.variants import OF_TUNED
from posterpipe.settings import ModelRef, SamplerSettings

INDEX, SHEET = "index.csv", "contact_sheet.png"
FIELDS = ("file", "prompt_id", "seed", "prompt", "negative_prompt", "status", "reason")

_ENDINGS = dict(zip(OF_TUNED, ("", "_negative", "_negative_delayed"), strict=True))
_HEADINGS = dict(zip(OF_TUNED, ("plain", "negative prompt", "late negative prompt"), strict=True))
_SHOWN = 24
"""Prompts that the sheet shows, from the first on."""


@dataclass(frozen=True)
class AnyModel:
    """A whole Stable Diffusion model, or LoRA weights with the model that they are added to."""

    folder: Path
    fingerprint: str
    base: Path | None = None


def find_model(ref: ModelRef, base: ModelRef, root: Path) -> AnyModel:
    """The model that `ref` means: a directory of a whole model, one with LoRA weights in the form
    of diffusers (`pytorch_lora_weights.safetensors`) for the model `base`, or a hub id.

    Relative directories start at `root`. Raises ModelMissing.
    """
    from posterpipe.core.dreambooth.lora import KOHYA_NAME  # it imports torch

    folder = root / Path(ref.id).expanduser()
    if folder.is_dir() and lora_weights(folder) is not None:
        both = (directory_fingerprint(folder), fingerprint(base, root))
        return AnyModel(folder, joint_fingerprint(both), locate(base, root))
    if [path.name for path in folder.glob("*.safetensors")] == [KOHYA_NAME]:
        raise ModelMissing(
            f"{folder}: {KOHYA_NAME} has the names of kohya's scripts, which are not read; give "
            f"the folder {LORA_WEIGHTS}, which the training wrote beside it"
        )
    return AnyModel(locate(ref, root), fingerprint(ref, root))


def draw_into(
    folder: Path,
    store: Store,
    suite: Sequence[Prompt],
    model: AnyModel,
    settings: SamplerSettings,
    progress: Progress,
) -> pd.DataFrame:
    """Draws the suite and writes it into `folder`; the rows of INDEX (FIELDS), one an image.

    The folder gets `<prompt id>/<seed>.png`, and `<seed>_negative.png` beside it where the prompt
    has a negative one; INDEX; and SHEET, the first seed of the first prompts. Other files in it are
    left alone. Images lie in the store as well until `garbage` removes them: what was stopped goes
    on there, and nothing is drawn twice. Raises ModelMissing, SamplerError, DeviceGone, StoreError,
    and OSError where the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)  # before anything is drawn
    for prompt in suite:
        (folder / prompt.prompt_id).mkdir(exist_ok=True)
    with store.lease():
        table = generate(
            store,
            suite,
            list(OF_TUNED),
            model.folder,
            model.fingerprint,
            settings,
            progress,
            run_id="posterpipe draw",
            base_dir=model.base,
        )
        # An empty negative prompt asks for the same image once more.
        asked = table[(table["variant"] == OF_TUNED[0]) | (table["negative_prompt"] != "")]
        files = [
            f"{row.prompt_id}/{row.seed}{_ENDINGS[str(row.variant)]}.png"
            for row in asked.itertuples()
        ]
        for file, image in zip(files, asked["image_path"], strict=True):
            if image:
                write_atomic(folder / file, (store.root / str(image)).read_bytes())
        write_atomic(folder / SHEET, _sheet(suite[:_SHOWN], asked, store))
    index = asked.assign(file=files)[list(FIELDS)].reset_index(drop=True)
    index.loc[index["status"] == "failed", "file"] = ""
    write_atomic(folder / INDEX, _csv(index))
    return index


def _sheet(suite: Sequence[Prompt], images: pd.DataFrame, store: Store) -> bytes:
    headings = {each.prompt_id: f"{each.prompt} · seed {each.seeds[0]}" for each in suite}
    firsts = {each.prompt_id: each.seeds[0] for each in suite}
    shown = images[images["seed"] == images["prompt_id"].map(firsts)]
    places = zip(shown["prompt_id"], shown["variant"], shown["image_path"], strict=True)
    picture = grid(
        list(headings.values()),
        [_HEADINGS[variant] for variant in OF_TUNED if variant in set(images["variant"])],
        {
            (headings[name], _HEADINGS[variant]): store.root / path
            for name, variant, path in places
            if path
        },
        title="First seed of each prompt",
        blocks=2,
    )
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _csv(index: pd.DataFrame) -> bytes:
    return index.to_csv(index=False, quoting=csv.QUOTE_MINIMAL).encode("utf-8")
