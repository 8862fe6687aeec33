"""The finished model: a complete diffusers directory with its record, curves and card.

What belongs here: writing and recognising finished checkpoints. What does not: the base model
(`base_model`), saves during a run (`saves`), the words of the card (`card`).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from posterpipe.core.dreambooth.base_model import disk_dtype, load_text_encoder, load_unet
from posterpipe.core.dreambooth.card import CARD_NAME, write_card
from posterpipe.core.dreambooth.config import (
    MODEL_PARTS,
    SAMPLES_NAME,
    TRAINER_VERSION,
    RunConfig,
    Versions,
)
from posterpipe.core.dreambooth.continuing import name_of
from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.core.dreambooth.guards import only_writer_of, writing
from posterpipe.core.dreambooth.lora import merge_lora, write_lora
from posterpipe.core.dreambooth.reports import (
    METRICS_NAME,
    PICTURE_NAME,
    HoldoutLoss,
    Journal,
    StepReport,
    TrainResult,
    draw_curves,
    finite,
    write_metrics,
)
from posterpipe.core.dreambooth.samples import draw_grid
from posterpipe.core.dreambooth.saves import save_path, sync_path, sync_tree
from posterpipe.core.models import EXPORTS_NAME
from posterpipe.core.provenance.checkpoints import RECORD_NAME
from posterpipe.core.provenance.environments import package_version
from posterpipe.core.weights import keep_weights_read

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
_PACKAGES = (
    "posterpipe", "torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "peft",
)  # fmt: skip
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.h5", "*.onnx*")
_LOADERS = {"unet": load_unet, "text_encoder": load_text_encoder}


def write_checkpoint(
    config: RunConfig,
    versions: Versions,
    checkpoint_id: str,
    *,
    trained: Mapping[str, nn.Module],
    journal: Journal,
    steps: int,
    lost: int | None,
    processes: int,
) -> None:
    """Writes the finished directory under a temporary name and renames it to `output_dir`, whose
    lock is held.

    trained: models by the name of their folder, cast in place to the precision of the base's
    files; all other parts are the base's own files. With LoRA their merged weights are written, so
    that whatever reads Stable Diffusion reads this, and beside them the small file that diffusers
    loads on top of the base model. steps: after which the weights are as they are; journal.ended_by
    tells why no more were made. lost: the step with the lowest held-out loss, where its weights
    should have been taken and were lost. processes: that shared the work, each with batches of its
    own. What was written by `write_export` goes into its folder `exports`.
    """
    final = config.output_dir
    temporary = _temporary(final)
    _copy_base(config, temporary, trained)
    if config.training.method == "lora":
        write_lora(temporary, trained, config.training)
    for name, model in trained.items():
        if config.training.method == "lora":
            model = merge_lora(_LOADERS[name](config.base_model), model)
        _write_model(model, temporary / name, disk_dtype(config.base_model))
    write_metrics(temporary / METRICS_NAME, journal)
    draw_curves(temporary / PICTURE_NAME, journal)
    samples = config.work_dir / SAMPLES_NAME / checkpoint_id
    if any(samples.glob("*.png")):  # none, where memory ran out each time
        shutil.copytree(samples, temporary / SAMPLES_NAME)
        draw_grid(temporary / f"{SAMPLES_NAME}.png", temporary / SAMPLES_NAME)
    exports = exports_folder(config, checkpoint_id)
    if exports.exists():
        shutil.copytree(exports, temporary / EXPORTS_NAME, ignore=shutil.ignore_patterns(".*.tmp"))
    record = _record(config, versions, checkpoint_id, journal, steps, lost, processes)
    write_json(temporary / RECORD_NAME, record)
    write_card(temporary / CARD_NAME, config, record)
    _share(temporary)
    sync_tree(temporary)
    os.replace(temporary, final)
    sync_path(final.parent)


@contextlib.contextmanager
def only_writer(config: RunConfig, log: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of `output_dir`: no run with another work folder writes the finished model
    meanwhile."""
    with (
        writing("the finished model", config.output_dir),
        only_writer_of(config.output_dir, log),
    ):
        yield


def try_output(config: RunConfig) -> None:
    """Raises OSError where `write_checkpoint` could not write: an empty folder goes the way of the
    finished one, and is removed. The lock of `output_dir` is held."""
    temporary = _temporary(config.output_dir)
    try:
        os.replace(temporary, config.output_dir)
    except OSError:
        temporary.rmdir()
        raise
    config.output_dir.rmdir()


def _temporary(final: Path) -> Path:
    """A new folder beside `final`. Those of processes that were killed are removed: none that lives
    writes there now."""
    names = re.compile(rf"\.{re.escape(final.name)}\.\d+\.tmp")
    for path in final.parent.iterdir():
        if names.fullmatch(path.name):
            shutil.rmtree(path)
    temporary = final.parent / f".{final.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    return temporary


def exports_folder(config: RunConfig, checkpoint_id: str) -> Path:
    """Where the models from the middle of a run are until it has finished."""
    return config.work_dir / EXPORTS_NAME / checkpoint_id


def write_export(
    config: RunConfig, checkpoint_id: str, step: int, trained: Mapping[str, nn.Module]
) -> None:
    """Writes the models as they are after `step`, there whole or not at all.

    trained: as for `write_checkpoint`, left as they are. A diffusers directory; with LoRA only the
    small files.
    """
    folder = exports_folder(config, checkpoint_id)
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(".*.tmp"):
        shutil.rmtree(abandoned)
    final = save_path(folder, step)
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    if config.training.method == "lora":
        write_lora(temporary, trained, config.training)
    else:
        _copy_base(config, temporary, trained)
        for name, model in trained.items():
            copy = _LOADERS[name](config.base_model)
            copy.load_state_dict(model.state_dict())
            _write_model(copy, temporary / name, disk_dtype(config.base_model))
    _share(temporary)
    sync_tree(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    sync_path(folder)


def _copy_base(config: RunConfig, folder: Path, trained: Mapping[str, nn.Module]) -> None:
    """Everything of a diffusers directory but the trained models, weights under the names that are
    read without being told of a variant: not all parts would be there in the same."""
    ignore = shutil.ignore_patterns(*_PICKLES)
    for part in MODEL_PARTS:
        if part in trained:
            continue
        shutil.copytree(config.base_model / part, folder / part, ignore=ignore)
        keep_weights_read(folder / part)
    index = _model_index(config.base_model)
    if config.training.zero_terminal_snr:
        index["scheduler"] = ["diffusers", _end_in_noise(folder / SCHEDULER_CONFIG)]
    write_json(folder / "model_index.json", index)


def read_result(config: RunConfig, checkpoint_id: str) -> TrainResult | None:
    """The result of a run that has finished before, None when there is none.

    An empty folder is none: the finished one takes its place. Raises TrainingError when
    `output_dir` holds something else.
    """
    if not os.path.lexists(config.output_dir) or _is_empty(config.output_dir):
        return None
    path = config.output_dir / RECORD_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["checkpoint_id"] == checkpoint_id:
            return TrainResult(
                output_dir=config.output_dir,
                checkpoint_id=checkpoint_id,
                steps=record["steps"],
                final_loss=record["final_loss"],
                seconds=record["seconds"],
                resumed_from=0,
                ended_by=record["ended_by"],
                reports=tuple(StepReport.from_json(report) for report in record["reports"]),
                holdout=tuple(HoldoutLoss(**loss) for loss in record["holdout"]),
            )
        found = f"the checkpoint {record['checkpoint_id']}, and this run makes {checkpoint_id}"
    except (OSError, ValueError, KeyError, TypeError):
        found = f"something that is no checkpoint of posterpipe (no good {RECORD_NAME})"
    raise TrainingError(f"{config.output_dir}: it holds {found}; remove it or change output_dir")


def _is_empty(folder: Path) -> bool:
    try:
        return not folder.is_symlink() and next(folder.iterdir(), None) is None
    except OSError:
        return False


def _write_model(model: Any, folder: Path, dtype: torch.dtype) -> None:
    model = model.to(device="cpu", dtype=dtype).to(memory_format=torch.contiguous_format)
    model.save_pretrained(folder, safe_serialization=True)
    _forget_origin(folder / "config.json")


def _end_in_noise(path: Path) -> str:
    """Has a scheduler's config begin where training began, as arXiv:2305.08891 asks; the name of
    its class, which is DDIM's where the base's would not do so (such as PNDM's)."""
    config = json.loads(path.read_text(encoding="utf-8"))
    known = getattr(diffusers, str(config.get("_class_name")), None)
    if known is None or "rescale_betas_zero_snr" not in inspect.signature(known).parameters:
        config.update(_class_name="DDIMScheduler", clip_sample=False)
    config.update(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    # diffusers' own configs hold infinities, which `write_json` has no word for.
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return str(config["_class_name"])


def _record(
    config: RunConfig,
    versions: Versions,
    checkpoint_id: str,
    journal: Journal,
    steps: int,
    lost: int | None,
    processes: int,
) -> dict[str, Any]:
    return {
        "checkpoint_id": checkpoint_id,
        "training_set": versions.training_set,
        "class_set": versions.class_set,
        "holdout_set": versions.holdout_set,
        "continued": name_of(versions.continued),
        "base_model": versions.base_model,
        "base_model_name": config.base_model_name or config.base_model.name,
        "trainer": TRAINER_VERSION,
        "width": config.width,
        "height": config.height,
        "settings": config.training.model_dump(mode="json"),
        "packages": {name: package_version(name) for name in _PACKAGES},
        "processes": processes,
        "steps": steps,
        "lost_lowest_step": lost,
        "ended_by": journal.ended_by,
        "final_loss": journal.reports[-1].smoothed_loss,
        "last_loss": journal.reports[-1].loss,
        "seconds": journal.seconds,
        "reports": [asdict(report) for report in journal.reports],
        "holdout": [asdict(loss) for loss in journal.holdout],
    }


def _forget_origin(config: Path) -> None:
    """Takes out the path of this machine from which the model was loaded."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    write_json(config, values)


def _model_index(base_model: Path) -> dict[str, Any]:
    """The base's index without the parts that are not carried over, such as a safety checker."""
    index = json.loads((base_model / "model_index.json").read_text(encoding="utf-8"))
    for name, value in index.items():
        if isinstance(value, list) and name not in MODEL_PARTS:
            index[name] = [None, None]
    return {**index, "requires_safety_checker": False}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes readable JSON with a fixed order of keys; a number that JSON has not, such as an
    infinite limit among the settings, becomes null."""
    text = json.dumps(_strict(values), indent=2, sort_keys=True, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return finite(value) if isinstance(value, float) else value


def _share(folder: Path) -> None:
    """Ordinary permissions: safetensors writes its files for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
