"""A training set on disk.

What belongs here: reading training.csv and its images, and refusing what cannot be trained on. What
does not: how the set was made (`training_set`), latents (`latents`), the order of samples
(`draws`).
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from posterpipe.core.dreambooth.errors import TrainingSetError
from posterpipe.core.images import upright
from posterpipe.core.training.training_set import CSV_NAME

_NAMED_AT_MOST = 5
_PIXELS_A_LATENT = 8


@dataclass(frozen=True)
class Example:
    """One row of training.csv."""

    image: Path
    caption: str


def read_training_set(folder: Path) -> list[Example]:
    """The rows of `folder`/training.csv (file_name, caption; further columns are ignored).

    Raises TrainingSetError with file and line for anything that cannot be trained on, and names
    the images that are missing.
    """
    path = folder / CSV_NAME
    remedy = "materialize the asset that makes it again"
    line = 1  # where the row begins that is read
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            absent = {"file_name", "caption"} - set(reader.fieldnames or ())
            if absent:
                raise TrainingSetError(
                    f"{path}:1: the column {' and '.join(sorted(absent))} is missing; {remedy}"
                )
            examples = []
            line = reader.line_num + 1
            for row in reader:
                name, caption = row["file_name"], row["caption"]
                if row.get(None) or name is None or caption is None:
                    raise TrainingSetError(
                        f"{path}:{reader.line_num}: not as many cells as the heading; {remedy}"
                    )
                if not name.strip() or not caption.strip():
                    empty = "caption" if name.strip() else "file_name"
                    raise TrainingSetError(f"{path}:{reader.line_num}: no {empty}; {remedy}")
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise TrainingSetError(
                        f"{path}:{reader.line_num}: {name!r} lies outside the folder; images lie "
                        "beside training.csv"
                    )
                examples.append(Example(folder / name, caption))
                line = reader.line_num + 1
    except OSError as error:
        raise TrainingSetError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except UnicodeDecodeError as error:
        raise TrainingSetError(f"{path}: not in UTF-8 ({error}); {remedy}") from error
    except csv.Error as error:
        raise TrainingSetError(f"{path}:{line}: {_in_words(error)}; {remedy}") from error
    if not examples:
        raise TrainingSetError(f"{path}: no rows; {remedy} from at least one usable image")
    # Unlike `is_file`, which raises OSError for a name that is too long to be any file's.
    missing = [example.image.name for example in examples if not os.path.isfile(example.image)]
    if missing:
        more = f" and {len(missing) - _NAMED_AT_MOST} more" if len(missing) > _NAMED_AT_MOST else ""
        raise TrainingSetError(
            f"{path}: {', '.join(missing[:_NAMED_AT_MOST])}{more} missing in {folder}; {remedy}"
        )
    return examples


def _in_words(error: csv.Error) -> str:
    said = str(error)
    if said == "unexpected end of data":
        return "a quote is opened there and not closed"
    if said.startswith("field larger"):
        most = csv.field_size_limit()
        return f"a cell has more than {most} characters, or its quote is not closed"
    return f"no row of a CSV ({said})"


def load_pixels(path: Path, size: tuple[int, int] | None) -> Tensor:
    """One image: float32 (3, height, width) in -1..1.

    Seen as `images.upright` does: turned by its EXIF orientation, transparency over white, 16 bits
    to 8. size: width and height in pixels that it must have then; None: any multiples of 8. Raises
    TrainingSetError when it cannot be read or has another size.
    """
    try:
        with Image.open(path) as image:
            image.load()
            seen = upright(image)
            check_size(path, seen.size, size)
            rgb = np.asarray(seen)
    except (TrainingSetError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever they find
        raise TrainingSetError(
            f"{path}: not a readable image ({error}); materialize training_csv again"
        ) from error
    return torch.from_numpy(rgb.copy()).permute(2, 0, 1).float() / 127.5 - 1


def check_size(path: Path, found: tuple[int, int], wanted: tuple[int, int] | None) -> None:
    """Raises TrainingSetError unless an image of `found` (width, height) can be trained on."""
    if wanted is not None and found != wanted:
        raise TrainingSetError(
            f"{path}: {found[0]}x{found[1]} pixels, but the run trains at "
            f"{wanted[0]}x{wanted[1]}; materialize training_csv again with the same image settings"
        )
    if found[0] % _PIXELS_A_LATENT or found[1] % _PIXELS_A_LATENT:
        raise TrainingSetError(
            f"{path}: {found[0]}x{found[1]} pixels, and both must be multiples of "
            f"{_PIXELS_A_LATENT}; materialize training_csv again with images.fit = bucket"
        )
