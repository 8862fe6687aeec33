"""Crash-safe saves of a run that is still training.

What belongs here: writing a save so that it is there whole or not at all, finding the newest good
one, and turning optimizer states into tensors and JSON and back. What does not: what is in a save
(`Learner.state` and the journal of `reports`), the finished model (`checkpoint`).

A save is a folder `step-00000100` with safetensors, `state.json` and, written last,
`manifest.json` with the size and sha256 of every file. It is written under a temporary name and
renamed; older ones are removed only then. Each run has a folder of its own for them, so that no
other one removes them. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.core.files import sha256_of

_MANIFEST = "manifest.json"
_STATE = "state.json"
_UNUSABLE = (OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class Save:
    """A complete save. `state`: JSON values; tensors are read on demand."""

    folder: Path
    run: str
    """The id of the checkpoint that its run makes."""
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors that were saved under `name`, on the CPU."""
        return load_file(self.folder / f"{name}.safetensors")


def write_save(
    folder: Path,
    *,
    step: int,
    checkpoint_id: str,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int | None,
) -> Path:
    """Adds the save of `step` to `folder`, which is this run's alone, and then removes all but the
    newest `keep`; with None, only the saves of later steps.

    checkpoint_id: of the run, by which a save is recognised as its own. tensors: a name -> its
    tensors. state: anything JSON holds; raises ValueError for a number that it cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(".*.tmp"):
        shutil.rmtree(abandoned)
    final = save_path(folder, step)
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    for name, values in tensors.items():
        # Clones: safetensors refuses tensors that share memory, as 8-bit Adam's maps do.
        owned = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in values.items()}
        save_file(owned, temporary / f"{name}.safetensors")
    (temporary / _STATE).write_text(json.dumps(dict(state), allow_nan=False), encoding="utf-8")
    files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
    manifest = {"run": checkpoint_id, "step": step, "files": files}
    (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync_tree(temporary)
    if final.exists():  # a damaged save that this run was refused and has now made again
        shutil.rmtree(final)
    os.replace(temporary, final)
    sync_path(folder)
    # Later ones than this were refused when the run began.
    others = [path for path in _folders(folder) if path != final]
    older = [path for path in others if path.name < final.name]
    kept = older if keep is None else older[: keep - 1]
    for path in set(others) - set(kept):
        shutil.rmtree(path)
    return final


def keep_only(folder: Path, steps: Collection[int | None]) -> None:
    """Removes all saves in `folder` but those of some steps."""
    for path in _folders(folder):
        if _step(path) not in steps:
            shutil.rmtree(path)


def saved_steps(folder: Path) -> list[int]:
    """Of which steps there are saves, whole or damaged."""
    return [_step(path) for path in _folders(folder)]


def keep_newest(folder: Path) -> None:
    """Removes all saves in `folder` but the last."""
    keep_only(folder, saved_steps(folder)[:1])


def remove_saves(folder: Path) -> None:
    """Removes all saves of a run that has finished, and the folder above when no other has any."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def other_runs(folder: Path) -> list[str]:
    """The names of the folders beside a run's: other runs that have not finished."""
    return sorted(path.name for path in folder.parent.glob("*") if path != folder)


def newest_save(folder: Path, *, checkpoint_id: str, log: Callable[[str], None]) -> Save | None:
    """The newest save of a run that is whole. Others are passed over, and the reason is logged."""
    for path in _folders(folder):
        try:
            return _read(path, checkpoint_id)
        except _UNUSABLE as error:
            log(f"{path} is not used: {error}; looking for the save before it")
    return None


def save_of_step(
    folder: Path, step: int, *, checkpoint_id: str, log: Callable[[str], None]
) -> Save | None:
    """The save of a run at `step`; None where it is not there whole, and the reason is logged."""
    path = save_path(folder, step)
    try:
        return _read(path, checkpoint_id)
    except _UNUSABLE as error:
        log(f"{path} is not used: {error}")
    return None


def read_save(path: Path) -> Save:
    """A save of any run. Raises TrainingError where there is none, or it is not whole."""
    try:
        return _read(path, None)
    except _UNUSABLE as error:
        raise TrainingError(f"{path}: no save that can be used: {error}") from error


def save_fingerprint(path: Path) -> str:
    """`run/step/sha256` of a save, which changes with every byte of it. Raises TrainingError where
    there is none."""
    try:
        data = (path / _MANIFEST).read_bytes()
        manifest = json.loads(data)
        return f"{manifest['run']}/{int(manifest['step'])}/{hashlib.sha256(data).hexdigest()}"
    except _UNUSABLE as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(
            f"{path}: no save is there ({reason}); name a folder step-... within work_dir/saves of "
            "another run"
        ) from error


def _read(path: Path, checkpoint_id: str | None) -> Save:
    if not (path / _MANIFEST).exists():
        raise ValueError(f"it has no {_MANIFEST}")
    manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    if checkpoint_id is not None and manifest["run"] != checkpoint_id:
        raise ValueError(
            f"it belongs to the run {manifest['run']}, and this one is {checkpoint_id}"
        )
    for name, wanted in manifest["files"].items():
        if not (path / name).exists():
            raise ValueError(f"{name} is missing")
        if _fingerprint(path / name) != wanted:
            raise ValueError(f"{name} is not as it was written")
    state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    return Save(path, str(manifest["run"]), int(manifest["step"]), state)


def save_path(folder: Path, step: int) -> Path:
    """The folder of what belongs to a step."""
    return folder / f"step-{step:08d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-" + 8 * "[0-9]"), reverse=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def sync_tree(folder: Path) -> None:
    """Puts every file and folder below `folder`, and itself, on the disk."""
    for path in folder.rglob("*"):
        sync_path(path)
    sync_path(folder)


def sync_path(path: Path) -> None:
    """Puts one file, or the names in one folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """An optimizer's `state_dict` as JSON values and tensors; `unpack` is the inverse.

    Mappings become lists of pairs, since their keys are numbers as well as names.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(value, Mapping):
            return {"pairs": [[key, walk(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [walk(item) for item in value]
        return value

    return walk(tree), tensors


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `pack` was given; tuples come back as lists."""
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        return tensors[packed["tensor"]]
    return {key: unpack(item, tensors) for key, item in packed["pairs"]}
