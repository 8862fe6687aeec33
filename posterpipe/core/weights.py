"""The weights in the directory of one model, such as a U-Net's or a CLIP's.

What belongs here: which of its files are read, and reading them whole. What does not: finding the
directory (`models`), and on what device it runs (`devices`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from posterpipe.core.errors import named_line
from posterpipe.core.memory import is_out_of_memory

Model = TypeVar("Model")

HALF = "fp16"
"""The variant of diffusers' and transformers' file names that is read where no other is there."""

_NAMED_AT_MOST = 3


class WeightsUnusable(ValueError):
    """Weights that are not all there, or lie in files that are not read. The message names the
    files or weights; what to do depends on the model, and is told by whoever loads it."""


def variant(folder: Path) -> str | None:
    """None for plain weights, "fp16" where only those are there."""
    plain = [*folder.glob("*model.safetensors"), *folder.glob("*model.safetensors.index.json")]
    return HALF if not plain and any(folder.glob(f"*.{HALF}*.safetensors")) else None


def weight_files(folder: Path) -> list[Path]:
    """The files that `load_weights` reads, of a model that may be there in two precisions."""
    half = variant(folder) == HALF
    return [
        path
        for path in sorted(folder.glob("*.safetensors"))
        if (f".{HALF}" in path.name) == half and "non_ema" not in path.name
    ]


def keep_weights_read(folder: Path) -> None:
    """Removes the weights that `load_weights` does not read, and takes the variant out of the names
    of those that it does."""
    half = variant(folder) == HALF
    read = {path.name for path in weight_files(folder)}
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index*.json")]:
        index = path.suffix == ".json"
        if (f".{HALF}" in path.name) != half or (not index and path.name not in read):
            path.unlink()
        elif half:
            if index:
                text = path.read_text("utf-8").replace(f".{HALF}", "")
                path.write_text(text, encoding="utf-8")
            path.rename(path.with_name(path.name.replace(f".{HALF}", "")))


def load_weights(
    cls: type[Model], folder: Path, *, dispensable: Sequence[str] = (), **options: Any
) -> Model:
    """`cls.from_pretrained`, of safetensors alone and with every weight.

    diffusers and transformers give random numbers to weights that the files lack, which only a line
    in their log tells, and follow an index to files of any kind. `dispensable`: beginnings of names
    of weights that may be missing, since nothing uses them. Raises WeightsUnusable, OSError, and
    whatever says that memory has run out.
    """
    _require_safetensors(folder)
    try:
        model, told = cast(Any, cls).from_pretrained(
            folder,
            use_safetensors=True,
            variant=variant(folder),
            output_loading_info=True,
            **options,
        )
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of a damaged config or of other shapes: anything
        if is_out_of_memory(error):
            raise
        raise WeightsUnusable(named_line(error)) from error
    missing = [
        name for name in sorted(told["missing_keys"]) if not name.startswith((*dispensable,))
    ]
    if missing:
        more = f" and {len(missing) - _NAMED_AT_MOST} more" if len(missing) > _NAMED_AT_MOST else ""
        raise WeightsUnusable(
            f"weights are missing: {', '.join(missing[:_NAMED_AT_MOST])}{more}; the files are of "
            "another model, or were cut short"
        )
    return cast(Model, model)


def _require_safetensors(folder: Path) -> None:
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        try:
            files = json.loads(index.read_text("utf-8"))["weight_map"].values()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsUnusable(f"{index.name} is no index of weights") from error
        for name in sorted(set(map(str, files))):
            # Neither a pickle nor a file somewhere else.
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise WeightsUnusable(f"{index.name} names {name!r}, which is no safetensors file")
