"""Fine-tuning, in a process of its own.

What belongs here: the class images and the checkpoint as assets, the training settings as Dagster's
launchpad shows them, and how the training process's reports reach the run. What does not: the
training (`core.dreambooth`) and that process (`defs.training_worker`).
"""

import json
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast, get_args, get_origin

import dagster as dg
from dagster._core.errors import (  # not exported
    DagsterExecutionInterruptedError,
    DagsterPipesExecutionError,
)
from pydantic import ValidationError

from posterpipe.defs.metadata import (
    FAILED_ITEMS,
    HELD_OUT,
    MODEL_FINGERPRINT,
    columns,
    rows,
    thumbnails,
)
from posterpipe.defs.resources import TABLES, Deployment, Table, naming_the_asset, table_output
from posterpipe.setting_words import described
from posterpipe.settings import SettingsError
from posterpipe.training_settings import TrainingSettings
from posterpipe.variables import in_our_words

if TYPE_CHECKING:
    from posterpipe.core.dreambooth.reports import StepReport
    from posterpipe.core.progress import Progress

WORKER = "posterpipe.defs.training_worker"
"""Module of the training process."""

_LOOK_SECONDS = 0.1
"""Between two looks at what the training process says."""


class TrainingFailed(Exception):
    """The training process ended without a checkpoint. The message is its last error."""


def launchpad_fields() -> dict[str, dg.Field]:
    """A config field for each training setting, with its meaning, unit, bounds, default and source.

    None has a default of its own: what a run leaves out is as the deployment's profile says.
    """
    return {
        name: dg.Field(
            _config_type(name, field.annotation),
            is_required=False,
            description=described(field),
        )
        for name, field in TrainingSettings.model_fields.items()
    }


def _config_type(name: str, annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _config_type(name, arguments[0])
    if origin is Literal:
        values = [dg.EnumValue(value) for value in arguments]
        return dg.Enum(f"training_{name}", values)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return dg.Noneable(_config_type(name, inner))
    if origin is tuple:
        return dg.Array(_config_type(name, arguments[0]))
    return annotation


def training_settings(base: TrainingSettings, overrides: Mapping[str, Any]) -> TrainingSettings:
    """The deployment's settings with what a run was launched with. Raises SettingsError."""
    try:
        return TrainingSettings(**{**base.model_dump(), **overrides})
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'training'}: "
            f"{in_our_words(item['msg'])}"
            for item in error.errors()
        )
        raise SettingsError(f"config of dreambooth_checkpoint: {problems}; correct it") from error


@dg.asset(
    group_name="training",
    kinds={"python", "huggingface"},
    owners=["team:ml"],
    code_version="2",
    io_manager_key=TABLES,
    pool="gpu",
    metadata=columns(
        file_name="string: the image inside the folder of the set",
        caption="string: the class prompt",
        poster_id="string: key of everything that decides its pixels",
        image="string: sha256 of the PNG in the store",
        class_set="string: version of the set",
    ),
)
def class_images(
    context: dg.AssetExecutionContext, deployment: dg.ResourceParam[Deployment]
) -> dg.Output[Table]:
    """What the base model draws of the class prompt, to be trained on beside the posters.

    Prior preservation keeps the fine-tuned model from forgetting what else belongs to the class.
    Off by default, and then this table is empty; switch it on with `training.prior_preservation`.
    Drawn once for each prompt, base model and sampler, then taken from the store.
    """
    from posterpipe.core.models import fingerprint, locate
    from posterpipe.core.training.class_images import build_class_images

    settings = deployment.settings
    store = deployment.store
    model_dir, model_id = Path(), ""
    if settings.training.prior_preservation:  # else no model is needed, nor looked for
        model_dir = locate(settings.base_model, settings.root)
        model_id = fingerprint(settings.base_model, settings.root)
    with naming_the_asset(context):
        made = build_class_images(
            store,
            model_dir,
            model_id,
            settings,
            deployment.progress(context),
            run_id=context.run.run_id,
        )
    images = [(store.path(row.image, ".png"), str(row.caption)) for row in rows(made.table)]
    return table_output(
        made.table.assign(class_set=made.version),
        {
            "contact_sheet": thumbnails(images),
            "prior_preservation": settings.training.prior_preservation,
            "class_prompt": settings.training.class_prompt,
            **({MODEL_FINGERPRINT: model_id} if model_id else {}),
            **({"folder": dg.MetadataValue.path(made.folder)} if made.folder else {}),
            FAILED_ITEMS: made.failed,
        },
        data_version=made.version or "off",
    )


@dg.asset(
    group_name="training",
    kinds={"python", "pytorch", "huggingface"},
    owners=["team:ml"],
    code_version="3",
    io_manager_key=TABLES,
    pool="gpu",
    deps=[class_images],
    config_schema=launchpad_fields(),
    metadata=columns(
        checkpoint_id="string: hash of training set, base model, settings, trainer version and, "
        "where there are several, the number of GPUs",
        path="string: the diffusers directory, inside the store",
        training_set="string: version of training.csv that it was trained on",
        lineage="string: which posters and captions it was made of then; empty if not recorded",
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
    by everything that decides it: one that exists is used, not trained again. While it trains, the
    loss on the held-out posters shows whether it still learns or only remembers. A run can be
    launched with other settings in its config.
    """
    import pandas as pd

    from posterpipe.core.training.checkpoints import train_or_adopt

    overrides = dict(context.op_execution_context.op_config or {})
    training = training_settings(deployment.settings.training, overrides)
    with naming_the_asset(context):
        checkpoint = train_or_adopt(
            deployment.store,
            deployment.settings.model_copy(update={"training": training}),
            training_csv,
            deployment.progress(context),
            run_id=context.run.run_id,
            worker=WORKER,
            launch=lambda command, work_dir: _train(context, deployment, command, work_dir),
            log=context.log.info,
        )
    versions, record = checkpoint.versions, checkpoint.record
    row = {
        "checkpoint_id": checkpoint.checkpoint_id,
        "path": checkpoint.folder.relative_to(deployment.store.root).as_posix(),
        "training_set": versions.training_set,
        "lineage": checkpoint.lineage,
        "base_model": versions.base_model,
        "steps": record["steps"],
        "final_loss": record["final_loss"],
    }
    metadata = _metadata(checkpoint.folder, record)
    if training.early_stop_patience is not None:
        metadata[HELD_OUT] = checkpoint.held_out
    return table_output(
        pd.DataFrame([row]),
        {
            **metadata,
            "path": row["path"],
            "reused": checkpoint.reused,
            "training_set": versions.training_set,
            "images": len(training_csv),
            "launched_with": dg.MetadataValue.json(overrides),
            MODEL_FINGERPRINT: versions.base_model,
        },
        data_version=checkpoint.checkpoint_id,
    )


def _train(
    context: dg.AssetExecutionContext, deployment: Deployment, command: list[str], work_dir: Path
) -> None:
    from posterpipe.core.dreambooth.launch import STOPPING_SECONDS, launch_environment

    reader = _Reports(work_dir)
    client = dg.PipesSubprocessClient(
        env=launch_environment(),
        cwd=str(deployment.settings.root),
        message_reader=reader,
        termination_timeout_seconds=STOPPING_SECONDS,
    )
    with reader.shown_by(deployment.progress(context)):
        try:
            client.run(context=context, command=command)
        except DagsterPipesExecutionError as error:
            raise TrainingFailed(reader.last_words or f"training: {error}") from error


def _metadata(checkpoint: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What the UI shows and plots from run to run, of a checkpoint trained now or before."""
    from posterpipe.core.dreambooth.reports import METRICS_NAME
    from posterpipe.core.gallery import markdown_image

    last = record["reports"][-1]
    metadata: dict[str, Any] = {
        "steps": int(record["steps"]),
        "ended_by": str(record["ended_by"]),
        "final_loss": float(record["final_loss"]),
        "steps_per_second": last["step"] / max(record["seconds"], 1e-9),
        "seconds": float(record["seconds"]),
        "memory_gib": float(last["memory_gib"]),
        "skipped_steps": int(last.get("skipped_steps", 0)),  # older records did not count them
        "packages": dg.MetadataValue.json(record["packages"]),
        "settings": dg.MetadataValue.json(record["settings"]),
        "directory": dg.MetadataValue.path(checkpoint),
        "card": dg.MetadataValue.path(checkpoint / "README.md"),
        "metrics": dg.MetadataValue.path(checkpoint / METRICS_NAME),
    }
    if record["holdout"]:
        losses = [measured["loss"] for measured in record["holdout"]]
        if record["holdout"][0]["step"] == 0:
            metadata["holdout_loss_at_start"] = float(losses[0])
        metadata["holdout_loss_lowest"] = float(min(losses))
        metadata["holdout_loss_at_end"] = float(losses[-1])
    pictures = {
        "loss_curve": ("loss.png", "loss and held-out loss over the steps"),
        "samples": ("samples.png", "samples while training: prompts by steps"),
    }
    for entry, (file_name, alt) in pictures.items():
        if (checkpoint / file_name).exists():
            metadata[entry] = dg.MetadataValue.md(markdown_image(checkpoint / file_name, alt))
    return metadata


class _Reports(dg.PipesTempFileMessageReader):
    """Reads the messages of the training process, and shows its step reports as progress.

    A step report is a custom message with the fields of `StepReport`. Dagster would hand custom
    messages over at the end only. A run that is cancelled is read until the process that trains in
    `work_dir` has saved and ended.
    """

    def __init__(self, work_dir: Path) -> None:
        super().__init__()
        self.last_words = ""
        self._work_dir = work_dir
        self._show: Callable[[Any], None] = lambda report: None

    @contextmanager
    def shown_by(self, progress: "Progress") -> Iterator[None]:
        """While inside, reports advance a task of `progress`, which opens with the first one: only
        then is the step known from which a resumed run goes on."""
        tick: Callable[..., None] | None = None
        done = 0
        with ExitStack() as stack:

            def show(report: "StepReport") -> None:
                nonlocal tick, done
                if tick is None:
                    task = progress.task("train", report.total, "steps", already=report.step)
                    tick, done = stack.enter_context(task), report.step
                tick(report.step - done, **report.numbers())
                done = report.step

            self._show = show
            yield

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[Mapping[str, Any]]:
        """See PipesMessageReader.read_messages."""
        from posterpipe.core.dreambooth.guards import trains_in, wait_until_none_trains
        from posterpipe.core.dreambooth.launch import STOPPING_SECONDS

        watched = cast(dg.PipesMessageHandler, _Watched(handler, self._read))
        already = trains_in(self._work_dir)
        with (
            tempfile.TemporaryDirectory() as folder,
            WholeLines(os.path.join(folder, "messages")).read_messages(watched) as params,
        ):
            try:
                yield params
            except DagsterExecutionInterruptedError:
                # Pipes has waited for the launcher, and accelerate's launcher of one process ends
                # at once: the training process still saves, talks to this reader and has the GPU.
                wait_until_none_trains(self._work_dir, STOPPING_SECONDS, besides=already)
                raise

    def _read(self, message: dict[str, Any]) -> bool:
        """Whether the message was a report and is done with."""
        from posterpipe.core.dreambooth.reports import StepReport

        params = message.get("params") or {}
        # Of several processes the first that fails tells why; the others only miss it.
        if message["method"] == "closed" and params.get("exception") and not self.last_words:
            self.last_words = str(params["exception"].get("message") or "").strip()
        if message["method"] != "report_custom_message":
            return False
        try:
            report = StepReport(**(params.get("payload") or {}))
        except TypeError:  # somebody else's
            return False
        self._show(report)
        return True


class WholeLines(dg.PipesFileMessageReader):
    """Dagster's reader of a file, but for lines of which a part is written yet: it takes them for
    whole ones on a busy machine, and then reads no further message, and no last words either."""

    def _reader_thread(self, handler: dg.PipesMessageHandler, is_resource_complete: Event) -> None:
        try:
            with open(self._path, encoding="utf-8") as file:
                line, ended = "", False
                while not ended:
                    # Asked before reading, so that what was written until then is read.
                    ended = is_resource_complete.wait(_LOOK_SECONDS)
                    while piece := file.readline():
                        line += piece
                        if line.endswith("\n"):
                            handler.handle_message(json.loads(line))
                            line = ""
        except BaseException:
            handler.report_pipes_framework_exception("WholeLines reader thread", sys.exc_info())
            raise


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
