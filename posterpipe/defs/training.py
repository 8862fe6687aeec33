"""Fine-tuning, in a process of its own.

What belongs here: the checkpoint asset, and how the training process's reports reach the run. What
does not: the training (`core.dreambooth`) and that process (`defs.training_worker`).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import dagster as dg
from dagster._core.errors import DagsterPipesExecutionError  # not exported

from posterpipe.defs.resources import (
    MODEL_FINGERPRINT,
    TABLES,
    Deployment,
    Table,
    columns,
    table_output,
)

WORKER = "posterpipe.defs.training_worker"
"""Module of the training process."""


class TrainingFailed(Exception):
    """The training process ended without a checkpoint. The message is what it said last."""


@dg.asset(
    group_name="training",
    kinds={"python", "pytorch", "huggingface"},
    owners=["team:ml"],
    code_version="1",
    io_manager_key=TABLES,
    pool="gpu",
    metadata=columns(
        checkpoint_id="string: hash of training set, base model, settings and trainer version",
        path="string: the diffusers directory, inside the store",
        training_set="string: version of training.csv that it was trained on",
        base_model="string: fingerprint of the base model",
        steps="int: optimizer steps",
        final_loss="float: smoothed loss at the end",
    ),
)
def dreambooth_checkpoint(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    training_csv: Table,
) -> dg.Output[Table]:
    """Stable Diffusion fine-tuned on the training set with DreamBooth: a diffusers directory.

    The step that costs a GPU, hours with the real models. It runs under `accelerate launch` in a
    process of its own and goes on from its last save after an interruption. A checkpoint is named
    by everything that decides it: one that exists is used, not trained again.
    """
    import pandas as pd

    from posterpipe.core.dreambooth.config import RunConfig, Versions, checkpoint_id
    from posterpipe.core.models import fingerprint, locate

    settings = deployment.settings
    store = deployment.store
    versions = Versions(
        training_set=str(training_csv["training_set"].iloc[0]),
        base_model=fingerprint(settings.base_model, settings.root),
    )

    def run_config(name: str) -> RunConfig:
        return RunConfig(
            base_model=locate(settings.base_model, settings.root),
            training_set=store.root / "training_sets" / versions.training_set,
            output_dir=store.root / "checkpoints" / name,
            work_dir=store.root / "training" / name,
            width=settings.images.width,
            height=settings.images.height,
            training=settings.training,
            versions=versions,
        )

    name = checkpoint_id(run_config("unnamed"), versions)
    config = run_config(name)
    record_file = config.output_dir / "posterpipe.json"
    reused = record_file.exists()
    if reused:
        context.log.info(f"{config.output_dir} exists: nothing to train")
    else:
        _train(context, deployment, config.to_toml(config.work_dir / "run.toml"))
    record = json.loads(record_file.read_text("utf-8"))
    row = {
        "checkpoint_id": name,
        "path": config.output_dir.relative_to(store.root).as_posix(),
        "training_set": versions.training_set,
        "base_model": versions.base_model,
        "steps": record["steps"],
        "final_loss": record["final_loss"],
    }
    metadata = _metadata(config.output_dir, record)
    return table_output(
        pd.DataFrame([row]),
        {
            **metadata,
            "path": row["path"],
            "reused": reused,
            "training_set": versions.training_set,
            "images": len(training_csv),
            MODEL_FINGERPRINT: versions.base_model,
        },
        data_version=name,
    )


def _train(context: dg.AssetExecutionContext, deployment: Deployment, config_file: Path) -> None:
    import torch

    from posterpipe.core.dreambooth.launch import launch_command

    gpus = torch.cuda.device_count()
    reader = _Reports()
    with reader.shown_by(deployment, context):
        try:
            dg.PipesSubprocessClient(message_reader=reader).run(
                context=context,
                command=launch_command(
                    config_file, module=WORKER, processes=max(1, gpus), cpu=gpus == 0
                ),
                cwd=str(deployment.settings.root),
            )
        except DagsterPipesExecutionError as error:
            raise TrainingFailed(reader.last_words or f"training: {error}") from error


def _metadata(checkpoint: Path, record: dict[str, Any]) -> dict[str, Any]:
    from posterpipe.core.gallery import markdown_image

    metadata: dict[str, Any] = {
        "steps": int(record["steps"]),
        "final_loss": float(record["final_loss"]),
        "steps_per_second": record["steps"] / max(record["seconds"], 1e-9),
        "seconds": float(record["seconds"]),
        "packages": dg.MetadataValue.json(record["packages"]),
        "settings": dg.MetadataValue.json(record["settings"]),
        "directory": dg.MetadataValue.path(checkpoint),
    }
    curve = checkpoint / "loss.png"
    if curve.exists():
        metadata["loss_curve"] = dg.MetadataValue.md(markdown_image(curve, "loss over the steps"))
    return metadata


class _Reports(dg.PipesTempFileMessageReader):
    """Reads the messages of the training process, and shows its step reports as progress.

    A step report is a custom message with `step`, `total` and numbers to show beside. Dagster would
    hand custom messages over at the end only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last_words = ""
        self._show: Callable[[dict[str, Any]], None] = lambda report: None

    @contextmanager
    def shown_by(self, deployment: Deployment, context: dg.AssetExecutionContext) -> Iterator[None]:
        """While inside, reports advance a task of the deployment's progress."""
        total = deployment.settings.training.max_train_steps
        done = 0
        with deployment.progress(context).task("train", total, "steps") as tick:

            def show(report: dict[str, Any]) -> None:
                nonlocal done
                tick(report["step"] - done, loss=report["smoothed_loss"], lr=report["lr"])
                done = report["step"]

            self._show = show
            yield

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[Mapping[str, Any]]:
        """See PipesMessageReader.read_messages."""
        watched = cast(dg.PipesMessageHandler, _Watched(handler, self._read))
        with super().read_messages(watched) as params:
            yield params

    def _read(self, message: dict[str, Any]) -> bool:
        """Whether the message was a report and is done with."""
        params = message.get("params") or {}
        if message["method"] == "closed" and params.get("exception"):
            self.last_words = str(params["exception"].get("message") or "").strip()
        if message["method"] != "report_custom_message":
            return False
        payload = params.get("payload")
        if not isinstance(payload, dict) or not {"step", "smoothed_loss", "lr"} <= payload.keys():
            return False
        self._show(payload)
        return True


class _Watched:
    """A message handler that lets `read` see each message first."""

    def __init__(
        self, handler: dg.PipesMessageHandler, read: Callable[[dict[str, Any]], bool]
    ) -> None:
        self._handler = handler
        self._read = read

    def handle_message(self, message: Any) -> None:
        if not self._read(message):
            self._handler.handle_message(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)
