"""The training set: `training.csv` beside its images.

What belongs here: which posters are trained on, with which words, and the folder that trainers
read. What does not: captions (`captions`, `captioner`), how many tokens they have
(`sampler.text_limit`) and training (`dreambooth`).

The folder, complete as soon as it is there:

    training_sets/<version>/training.csv          file_name,caption
    training_sets/<version>/train/<image>.png
    training_sets/<version>/train/metadata.csv    the same rows for `imagefolder`

`datasets.load_dataset("imagefolder", data_dir=<the folder>)` reads it. The images lie in `train/`
because that library takes a file named `training.csv` for the whole training split unless a
folder of that name is there.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
import uuid
from pathlib import Path

import pandas as pd

from posterpipe.core.files import fsync, link_or_copy, unchanged, write_atomic
from posterpipe.core.store import TRAINING_SETS, Store, cells, writing
from posterpipe.settings import DEFAULT_TEMPLATE

COLUMNS = ["file_name", "caption", "poster_id", "image"]
CSV_NAME = "training.csv"
IMAGES = "train"
METADATA = f"{IMAGES}/metadata.csv"
NAME_LENGTH = 16
"""Hex digits of an image's sha256 in its file name: unique among billions."""


class TrainingSetEmpty(Exception):
    """No poster can be trained on. The message names the tables to look at."""


def build_training_set(
    store: Store,
    resized: pd.DataFrame,
    captions: pd.DataFrame,
    *,
    template: str = DEFAULT_TEMPLATE,
    trigger: str = "",
) -> tuple[pd.DataFrame, Path, str]:
    """The table, the folder and the version (sha256 of `training.csv`) of a training set.

    Of posters with both an image and a caption (tables of `resize_posters` and `caption_posters`,
    status `ok`), in the order of their poster_id. Columns of the table: file_name (relative to the
    folder), caption (as `training_caption` words it), poster_id, image (blob). File names hold the
    hash of the pixels' PNG, so that the version changes with any image or caption; posters that
    come to the same image are trained on once, with a person's caption if one of them has one. A
    folder of that version that was changed since is made anew. Raises TrainingSetEmpty, and
    FileNotFoundError for an image that is gone, or that was changed and is removed therefore.
    """
    frame = _join(resized, captions)
    frame["caption"] = [
        training_caption(text, template, trigger) for text in frame["caption"].tolist()
    ]
    if frame.empty:
        raise TrainingSetEmpty(
            "No poster has both an image and a caption: look at the column `reason` of "
            "raw_posters, resized_posters and poster_captions, and put usable posters in"
        )
    text = csv_text(frame)
    version = hashlib.sha256(text.encode("utf-8")).hexdigest()
    folder = store.root / TRAINING_SETS / version
    if not (store.keep(folder) and _is_complete(folder, frame, text)):
        with writing(folder):
            store.folder(TRAINING_SETS)
            _write(store, frame, text, folder)
    return frame, folder, version


def training_caption(caption: str, template: str, trigger: str) -> str:
    """A caption as it is trained on: the template (`CaptionerSettings.template`) filled, one line.

    Trainers put a phrase in front of every caption, so that prompts can call the look by it.
    """
    return " ".join(template.format(trigger=trigger, caption=caption).split())


def csv_text(frame: pd.DataFrame) -> str:
    """`file_name,caption` as CSV, one line a poster, always with `\\n`."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["file_name", "caption"])
    writer.writerows(cells(frame, "file_name", "caption"))
    return buffer.getvalue()


def _join(resized: pd.DataFrame, captions: pd.DataFrame) -> pd.DataFrame:
    images = resized.loc[resized["status"] == "ok", ["poster_id", "image"]]
    words = captions.loc[captions["status"] == "ok", ["poster_id", "caption", "source"]].copy()
    # A line break inside a cell is legal CSV, and what many readers of it get wrong.
    words["caption"] = [" ".join(str(caption).split()) for caption in words["caption"].tolist()]
    frame = images.merge(words[words["caption"] != ""], on="poster_id", validate="one_to_one")
    # "human" sorts before "model": what a person wrote of one copy is true of the others.
    frame = frame.sort_values(["source", "poster_id"]).drop_duplicates("image")
    frame = frame.sort_values("poster_id").reset_index(drop=True)
    frame["file_name"] = [
        f"{IMAGES}/{image[:NAME_LENGTH]}.png" for image in frame["image"].tolist()
    ]
    return frame[COLUMNS]


def _is_complete(folder: Path, frame: pd.DataFrame, text: str) -> bool:
    """Whether everything is in the folder as `_write` writes it."""
    try:
        written = (folder / CSV_NAME).read_bytes(), (folder / METADATA).read_bytes()
    except OSError:
        return False
    return written == (text.encode("utf-8"), _metadata(frame)) and all(
        unchanged(f"{folder}/{name}", image) for name, image in cells(frame, "file_name", "image")
    )


def _metadata(frame: pd.DataFrame) -> bytes:
    inner = frame.assign(file_name=frame["file_name"].str.removeprefix(f"{IMAGES}/"))
    return csv_text(inner).encode("utf-8")


def _write(store: Store, frame: pd.DataFrame, text: str, folder: Path) -> None:
    temporary = folder.with_name(f".{folder.name[:12]}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        (temporary / IMAGES).mkdir(parents=True)
        for file_name, image in cells(frame, "file_name", "image"):
            _link(store, image, f"{temporary}/{file_name}")
        write_atomic(temporary / METADATA, _metadata(frame))
        write_atomic(temporary / CSV_NAME, text.encode("utf-8"))
        if folder.exists():
            # Someone changed it; the whole folder is made again.
            shutil.rmtree(folder)
        try:
            os.rename(temporary, folder)
        except OSError:
            # Another process was first, with the same content.
            if not _is_complete(folder, frame, text):
                raise
        fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _link(store: Store, image: str, target: str) -> None:
    source = store.path(image, ".png")
    there = source.exists()
    if not store.intact(image, ".png"):
        what = "was changed after it was made, and is removed" if there else "is gone"
        raise FileNotFoundError(f"{source} {what}; materialize resized_posters again")
    if not link_or_copy(source, target):
        fsync(Path(target))  # its time says that it is whole
