"""The training loop, to be read from top to bottom.

What belongs here: one run from its config to the finished checkpoint: the lock, init or resume, the
steps, what comes after each, the end. What does not: how those things are done (`run`), the models
and what moves them (`learner`), the formulas (`objective`, `schedule`), random numbers (`draws`),
the command line (`__main__`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from datetime import timedelta

import diffusers.utils.logging
import torch
import transformers.utils.logging
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from posterpipe.core.devices import give_memory_back
from posterpipe.core.dreambooth.base_model import check_base_model
from posterpipe.core.dreambooth.batches import Batch, Feed
from posterpipe.core.dreambooth.checkpoint import only_writer, read_result, try_output
from posterpipe.core.dreambooth.config import RunConfig, Versions, measure_versions
from posterpipe.core.dreambooth.continuing import with_continued
from posterpipe.core.dreambooth.data import read_training_set
from posterpipe.core.dreambooth.draws import positions, step_seed
from posterpipe.core.dreambooth.effects import remarks
from posterpipe.core.dreambooth.errors import TrainingError, TrainingStopped
from posterpipe.core.dreambooth.guards import only_run_in, stop_signal
from posterpipe.core.dreambooth.memory import memory_hint
from posterpipe.core.dreambooth.reports import StepReport, TrainResult
from posterpipe.core.dreambooth.run import Run, agree, remove_all_saves
from posterpipe.core.dreambooth.schedule import learning_rate
from posterpipe.core.memory import is_out_of_memory
from posterpipe.training_settings import TrainingSettings

# Processes wait for the first one while it waits for its lock, encodes all posters, draws samples
# or writes the checkpoint. NCCL's ten minutes would end them; if one dies, the launcher ends all.
_PROCESSES_WAIT = timedelta(days=7)


def train(
    config: RunConfig,
    report: Callable[[StepReport], None] = lambda report: None,
    *,
    log: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Trains, or goes on with a run that was stopped, and leaves a complete diffusers directory.

    report: called after the first step, then every `log_every_steps`, whenever the held-out loss
    was measured, and after the last. log: gets a line about everything else, such as a resume. Both
    are called in the main process only.

    A run that has finished before returns its result at once; one that another process is busy
    with is waited for. On CPU, a run that was killed at any moment and started again ends with the
    same bits as one that was not (same machine, same number of threads).

    Raises TrainingError with what to do: TrainingSetError, BaseModelError, TrainingDiverged when
    the loss is no number, TrainingStopped after SIGTERM or Ctrl-C.
    """
    _quiet()
    check_base_model(config.base_model)
    read_training_set(config.training_set)
    versions = with_continued(config.versions or measure_versions(config), config)
    accelerator = Accelerator(
        mixed_precision="no",  # `learner` deals with precision
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=_PROCESSES_WAIT),
            # Else each process holds all gradients twice: its own, and those that travel.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    checkpoint_id = config.checkpoint_id(versions, accelerator.num_processes)
    main = accelerator.is_main_process
    say = log if main else lambda line: None
    for remark in remarks(config.training):
        say(remark)
    try:
        with only_run_in(config.work_dir, say) if main else contextlib.nullcontext():
            result = read_result(config, checkpoint_id) if main else None
            if main and result is None:
                with only_writer(config, say):
                    result = read_result(config, checkpoint_id)
                    if result is None:  # what cannot be written fails before the first step
                        try_output(config)
            if agree(accelerator, result is not None):
                say(f"{config.output_dir} is there already, complete")
                resumed_from = 0
                if main:  # left by a run that was killed after it had finished
                    remove_all_saves(config, checkpoint_id)
            else:
                with memory_hint(config, accelerator.device, accelerator.num_processes):
                    resumed_from = _train(config, versions, checkpoint_id, accelerator, report, say)
            accelerator.wait_for_everyone()
        result = read_result(config, checkpoint_id)
        if result is None:
            raise TrainingError(f"{config.output_dir}: the finished checkpoint has been removed")
        return dataclasses.replace(result, resumed_from=resumed_from)
    finally:
        # The state is global in accelerate; without this, the next run in this process would
        # inherit it.
        AcceleratorState._reset_state(reset_partial_state=accelerator.num_processes == 1)


def _train(
    config: RunConfig,
    versions: Versions,
    checkpoint_id: str,
    accelerator: Accelerator,
    report: Callable[[StepReport], None],
    log: Callable[[str], None],
) -> int:
    """The run itself; returns the step it was resumed from."""
    settings = config.training
    run = Run(config, versions, checkpoint_id, accelerator, log)
    learner = run.learner
    if run.first_step == 0:
        run.measure_holdout(0)
        run.draw_samples(0)
    elif run.continued and settings.early_stop_patience is not None:
        run.measure_holdout(run.first_step)  # the weights that it begins with may stay the best
    give_memory_back()  # of the VAE and the text encoder, which have encoded everything
    split = 1  # parts in which each batch goes through the models; more where memory ran out
    with stop_signal() as asked_to_stop:
        for step in range(run.first_step, settings.max_train_steps):
            if run.ended:
                break
            torch.manual_seed(step_seed(settings.seed, step, accelerator.process_index))
            try:
                loss, split = _add_gradients(run, step, split)
            except TrainingError as error:
                if not asked_to_stop():
                    raise
                # Ctrl-C ends the compiler as well, which then is not what is wrong.
                raise TrainingStopped(
                    f"asked to stop while the models were compiled for step {step + 1}: "
                    f"{run.last_save()}; start the same run again and it goes on from there"
                ) from error
            rates = [_rate(settings, step, peak) for peak in learner.peak_rates]
            norm = learner.make_step(step, rates)

            done = step + 1
            run.loss.add(done, loss, norm)
            due = run.due(done, asked_to_stop)
            if due.report or due.save or due.samples or due.export:
                run.check_loss(done)
            if due.holdout:
                run.measure_holdout(done)  # which may end the run
            if due.samples or run.ended:
                run.draw_samples(done)
            if due.export:
                run.export(done)
            if due.report:
                row = run.report(done, rates, norm)
                if accelerator.is_main_process:
                    report(row)
            if due.stop and not run.ended:
                run.stop(done)
            if due.save or run.ended:
                run.save(done)
            if step == run.first_step:
                run.warmed_up()
    run.finish()
    return run.first_step


def _batches(
    feed: Feed, accelerator: Accelerator, settings: TrainingSettings, step: int, split: int
) -> list[Batch]:
    """All batches of one optimizer step in this process, each divided into `split` parts."""
    parts = settings.gradient_accumulation_steps * split
    return [
        batch
        for micro_step in range(parts)
        for batch in feed.batches(
            positions(
                step,
                micro_step=micro_step,
                micro_steps=parts,
                process=accelerator.process_index,
                processes=accelerator.num_processes,
                batch=settings.train_batch_size // split,
            ),
            parts=parts,
        )
    ]


def _add_gradients(run: Run, step: int, split: int) -> tuple[Tensor, int]:
    """Adds up the gradients of one step; its loss, and in how many parts each batch went through.

    These are more than `split` where memory ran out and may be had that way.
    """
    settings, learner = run.settings, run.learner
    while True:
        batches = _batches(run.inputs.feed, run.accelerator, settings, step, split)
        try:
            return learner.add_gradients(step, batches), split
        except (RuntimeError, MemoryError) as error:
            roomier = is_out_of_memory(error) and run.give_recording_back()
            if not roomier:
                split *= _further_split(error, settings, run.accelerator, split)
        # Outside the handler, where nothing holds the memory of the failed try any more.
        learner.forget_gradients()
        give_memory_back()
        if not roomier:
            run.log(
                f"out of memory at step {step + 1}: goes on with "
                f"{settings.train_batch_size // split} images at once, accumulated "
                f"{split * settings.gradient_accumulation_steps} times"
            )


def _rate(settings: TrainingSettings, step: int, peak: float) -> float:
    return learning_rate(
        step,
        peak=peak,
        schedule=settings.lr_scheduler,
        warmup_steps=settings.lr_warmup_steps,
        total_steps=settings.max_train_steps,
    )


def _further_split(
    error: Exception, settings: TrainingSettings, accelerator: Accelerator, split: int
) -> int:
    """Into how many parts a batch is divided that did not fit into memory: 2 for an even one.

    Raises `error` where it has another cause, or nothing is left to divide. One of several
    processes cannot do it alone: the others wait for its gradients.
    """
    batch = settings.train_batch_size // split
    allowed = settings.halve_batch_on_out_of_memory and accelerator.num_processes == 1
    if not (allowed and batch > 1 and is_out_of_memory(error)):
        raise error
    return next(parts for parts in range(2, batch + 1) if batch % parts == 0)


def _quiet() -> None:
    """Keeps the libraries' bars for loading weights, and their advice, out of the log."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
