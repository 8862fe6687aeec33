"""Tensors that are computed once: one file an item, named by everything that decides it.

What belongs here: finding what is there and computing what is missing. What does not: what the
keys are made of and what is computed (`latents`, `texts`).

A run with other settings, and a run on one poster more, find what earlier ones computed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posterpipe.core.dreambooth.guards import writing
from posterpipe.core.dreambooth.saves import sync_path

Tensors = dict[str, Tensor]


def key_of(*parts: object) -> str:
    """32 hex digits of JSON values: equal parts, equal key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cached_tensors(
    folder: Path,
    keys: Sequence[str],
    compute: Callable[[list[int]], Iterator[tuple[int, Tensors]]],
    *,
    log: Callable[[str], None],
) -> list[Tensors]:
    """The tensors of `keys`, in their order, on the CPU.

    compute: gets the indices of the missing keys, each key once, and yields (index, tensors) as
    they come; each is on disk at once, so that a killed run need not do it again. It is not called
    when nothing is missing. A damaged file is made again, which is logged. Raises TrainingError
    for a folder or file that cannot be written.
    """
    known: dict[str, Tensors] = {}
    for key in keys:
        path = folder / f"{key}.safetensors"
        if key in known or not os.path.exists(path):  # which also answers for what is no folder
            continue
        try:
            known[key] = load_file(path)
            os.utime(path)  # what nobody reads for long is tidied away
        except (SafetensorError, OSError) as error:
            log(f"{path} is damaged ({error}) and made again")
    missing = {key: index for index, key in enumerate(keys) if key not in known}
    if missing:
        with writing("latents and text embeddings", folder):
            folder.mkdir(parents=True, exist_ok=True)
        for index, tensors in compute(sorted(missing.values())):
            owned = {name: value.cpu().contiguous() for name, value in tensors.items()}
            path = folder / f"{keys[index]}.safetensors"
            with writing("a latent or text embedding", path):
                _write(path, owned)
            known[keys[index]] = owned
    return [known[key] for key in keys]


def _write(path: Path, tensors: Tensors) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary)
    sync_path(temporary)
    os.replace(temporary, path)
