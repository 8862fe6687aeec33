"""The checkpoint that the settings of now ask for: trained, or adopted where the store has it.

What belongs here: the sets it is trained on, its id and its place in the store. What does not: the
training (`dreambooth`), how its process is started and heard (the Dagster layer), what a checkpoint
was made of (`provenance`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posterpipe.core.dreambooth.config import RunConfig, Versions, make_checkpoint_id
from posterpipe.core.dreambooth.launch import launch_command
from posterpipe.core.models import fingerprint, locate
from posterpipe.core.progress import Progress
from posterpipe.core.provenance.checkpoints import RECORD_NAME, read_record
from posterpipe.core.provenance.lineages import current_lineage, require_posters
from posterpipe.core.store import Store
from posterpipe.core.training.class_images import build_class_images
from posterpipe.core.training.holdout_set import build_holdout_set
from posterpipe.settings import Settings

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint in the store.

    lineage: of its training set; "" if not recorded. held_out: version of the table of held-out
    posters; "" before there is one. record: what its own record holds. reused: nothing was trained.
    """

    checkpoint_id: str
    folder: Path
    versions: Versions
    lineage: str
    held_out: str
    record: dict[str, Any]
    reused: bool


def train_or_adopt(
    store: Store,
    settings: Settings,
    training_csv: pd.DataFrame,
    progress: Progress,
    *,
    run_id: str,
    worker: str,
    launch: Callable[[list[str], Path], None],
    log: Callable[[str], None],
) -> Checkpoint:
    """The checkpoint of the settings' training on that set; one that the store has is adopted.

    worker: module that trains. launch: runs a command to its end, which trains in the given work
    folder. Raises PostersGone, and what `build_class_images`, `build_holdout_set` and `launch` do.
    """
    import torch

    training, images = settings.training, settings.images
    base_model = locate(settings.base_model, settings.root)
    base_version = fingerprint(settings.base_model, settings.root)
    training_set = str(training_csv["training_set"].iloc[0])
    # Both are in the store already, or made now: a run may ask for other class images than the
    # asset's, and the held-out posters are resized and captioned by the settings of now.
    prior = build_class_images(store, base_model, base_version, settings, progress, run_id=run_id)
    lineage = current_lineage(store, training_set)  # before it may change meanwhile
    # And no other: posters that come later are noticed.
    held_out = store.table_version("holdout_posters") or ""
    holdout_set, holdout_version = None, ""
    if training.holdout_every_steps is not None and held_out:
        posters = store.read_table("holdout_posters", held_out)
        holdout_set, holdout_version = build_holdout_set(store, posters, settings, progress)
    versions = Versions(
        training_set=training_set,
        base_model=base_version,
        class_set=prior.version,
        holdout_set=holdout_version,
    )
    gpus = torch.cuda.device_count()
    processes = max(1, gpus)
    image_settings: dict[str, Any] = {
        "width": images.width,
        "height": images.height,
        "buckets": images.fit == "bucket",
    }
    checkpoint_id = make_checkpoint_id(versions, training, **image_settings, processes=processes)
    config = RunConfig(
        base_model=base_model,
        base_model_name=settings.base_model.id,
        training_set=store.root / "training_sets" / training_set,
        class_set=prior.folder,
        holdout_set=holdout_set,
        output_dir=store.root / "checkpoints" / checkpoint_id,
        work_dir=store.root / "training" / checkpoint_id,
        cache_dir=store.root / "training" / "cache",
        **image_settings,
        training=training,
        sampler=settings.sampler,
        versions=versions,
    )
    record_file = config.output_dir / RECORD_NAME
    reused = store.keep(config.output_dir) and record_file.exists()
    if reused:
        log(f"{config.output_dir} exists: nothing to train")
    else:
        require_posters(store, training_set, training_csv["poster_id"])
        file = config.to_toml(config.work_dir / "run.toml")
        launch(
            launch_command(file, module=worker, processes=processes, cpu=not gpus), config.work_dir
        )
    record = read_record(config.output_dir)
    return Checkpoint(checkpoint_id, config.output_dir, versions, lineage, held_out, record, reused)
