"""The training loop, to be read from top to bottom.

What belongs here: one run from its config to the finished checkpoint: inputs, init or resume, loop,
end. What does not: the models and what moves them (`learner`), the formulas (`objective`,
`schedule`), random numbers (`draws`), files (`data`, `saves`, `checkpoint`), the command line
(`__main__`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

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
from posterpipe.core.dreambooth.checkpoint import (
    exports_folder,
    read_result,
    try_output,
    write_checkpoint,
    write_export,
)
from posterpipe.core.dreambooth.config import (
    RunConfig,
    Versions,
    checkpoint_id,
    measure_versions,
)
from posterpipe.core.dreambooth.data import read_training_set
from posterpipe.core.dreambooth.draws import positions, step_seed
from posterpipe.core.dreambooth.effects import remarks
from posterpipe.core.dreambooth.errors import TrainingDiverged, TrainingError, TrainingStopped
from posterpipe.core.dreambooth.guards import only_run_in, only_writer_of, stop_signal, writing
from posterpipe.core.dreambooth.holdout import holdout_loss, lowest, stopped_falling
from posterpipe.core.dreambooth.inputs import read_inputs
from posterpipe.core.dreambooth.learner import Learner
from posterpipe.core.dreambooth.memory import InParts, memory_hint, peak_memory_gib
from posterpipe.core.dreambooth.pace import SavePace
from posterpipe.core.dreambooth.reports import HoldoutLoss, Journal, StepReport, TrainResult, finite
from posterpipe.core.dreambooth.saves import (
    Save,
    keep_only,
    newest_save,
    other_runs,
    remove_saves,
    save_of_step,
    saved_steps,
    write_save,
)
from posterpipe.core.dreambooth.schedule import learning_rate
from posterpipe.core.memory import doubt, is_out_of_memory
from posterpipe.training_settings import TrainingSettings

_SAVES, _LOWEST = "saves", "lowest"
_AGREE_EVERY_STEPS = 10

# Processes wait for the first one while it waits for its lock, encodes all posters, draws samples
# or writes the checkpoint. NCCL's ten minutes would end them; and if one dies, the
# launcher ends all.
_PROCESSES_WAIT = timedelta(days=7)

# Under fp16 a step whose gradients overflow is left out, and the scale of the loss is halved. After
# so many in a row little is left of any scale that training can use: something else is wrong.
_SKIPPED_IN_A_ROW_AT_MOST = 20


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
    versions = config.versions or measure_versions(config)
    accelerator = Accelerator(
        mixed_precision="no",  # `learner` deals with precision
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=_PROCESSES_WAIT),
            # Else each process holds all gradients twice: its own, and those that travel.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    run = checkpoint_id(config, versions, accelerator.num_processes)
    main = accelerator.is_main_process
    say = log if main else lambda line: None
    for remark in remarks(config.training):
        say(remark)
    try:
        with only_run_in(config.work_dir, say) if main else contextlib.nullcontext():
            result = read_result(config, run) if main else None
            if main and result is None:
                with _only_writer(config, say):
                    result = read_result(config, run)
                    if result is None:  # what cannot be written is told before the first step
                        try_output(config)
            if _agree(accelerator, result is not None):
                say(f"{config.output_dir} is there already, complete")
                resumed_from = 0
                if main:  # left by a run that was killed after it had finished
                    _remove_saves(config, run)
            else:
                with memory_hint(config, accelerator.device, accelerator.num_processes):
                    resumed_from = _train(config, versions, run, accelerator, report, say)
            accelerator.wait_for_everyone()
        result = read_result(config, run)
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
    run: str,
    accelerator: Accelerator,
    report: Callable[[StepReport], None],
    log: Callable[[str], None],
) -> int:
    """The run itself; returns the step it was resumed from."""
    settings = config.training
    main, device = accelerator.is_main_process, accelerator.device
    total = settings.max_train_steps
    inputs = read_inputs(config, run, accelerator, log)
    learner = Learner(config, accelerator, inputs.texts, log)

    # ---- init or resume -----------------------------------------------------------------------
    save_folder, lowest_folder = config.work_dir / _SAVES / run, config.work_dir / _LOWEST / run
    first_step, journal = 0, Journal()
    questions = {  # what a held-out loss is the answer to, beside all that the run's id tells
        "holdout_set": versions.holdout_set,
        "holdout_timesteps": settings.holdout_timesteps,
    }
    saved = newest_save(save_folder, run=run, log=log)
    others = other_runs(save_folder)
    if others:
        log(
            f"{save_folder.parent}: the saves of other runs are kept ({', '.join(others)}); remove "
            "their folders when those are not to go on"
        )
    if saved is not None:
        learner.restore(saved)
        first_step, journal = saved.step, Journal.from_json(saved.state["journal"])
        log(f"goes on from step {first_step} of {total}, saved in {saved.folder.name}")
        # Older saves did not tell; with early stopping the run would be another one.
        if journal.holdout and saved.state.get("questions", questions) != questions:
            journal.forget_holdout()
            log(
                "the held-out loss was measured before on other posters or at other timesteps: "
                "those measurements are dropped, since their curve would not go on"
            )
    exports = exports_folder(config, run)
    if main:  # steps that are made again may turn out otherwise on a GPU, and need not all be made
        keep_only(exports, {step for step in saved_steps(exports) if step <= first_step})

    # With early stopping: the step and the weights of the lowest held-out loss since the last save.
    # A run that is killed makes them again; on the disk each would take as long as a save.
    lowest_unsaved: tuple[int, dict[str, dict[str, Tensor]]] | None = None

    def save(step: int) -> None:
        """Everything from which the run can go on. Its random numbers, and the place in the
        stream of samples, are functions of the step."""
        nonlocal lowest_unsaved
        tensors, state = learner.state()
        state |= {"journal": journal.to_json(), "questions": questions}
        if lowest_unsaved is not None:  # before the save, whose journal tells of them
            at = lowest_unsaved[0]
            with writing(f"the save of step {at}", lowest_folder):
                write_save(
                    lowest_folder,
                    step=at,
                    run=run,
                    tensors=lowest_unsaved[1],
                    state={},
                    keep=None,
                )
            lowest_unsaved = None
        if main:
            with writing(f"the save of step {step}", save_folder):
                write_save(
                    save_folder,
                    step=step,
                    run=run,
                    tensors=tensors,
                    state=state,
                    keep=settings.keep_saves,
                )
                keep_lowest()

    def keep_lowest() -> None:
        """Removes the weights that early stopping cannot ask for any more, neither as the run goes
        on nor where it is taken up at a save: on a GPU it may then not get as low again."""
        ends = [math.inf, *saved_steps(save_folder)]
        keep_only(lowest_folder, {_lowest_step(journal, until) for until in ends})

    questions_in_parts = InParts(log, "held-out posters")
    samples_in_parts = InParts(log, "samples")

    def errors_of(batch: Batch) -> Tensor:
        return questions_in_parts(
            len(batch.texts), lambda part: learner.errors_of(batch.part(part))
        )

    def predict(latents: Tensor, timestep: Tensor, texts: Sequence[str]) -> Tensor:
        return samples_in_parts(
            len(texts), lambda part: learner.predict(latents[part], timestep, texts[part])
        )

    def measure_holdout(step: int) -> None:
        """Adds the held-out loss to the journal; with early stopping, keeps the best weights."""
        nonlocal lowest_unsaved
        with learner.as_finished():
            share = holdout_loss(
                inputs.questions,
                errors_of,
                process=accelerator.process_index,
                processes=accelerator.num_processes,
            )
            loss = float(accelerator.reduce(share.to(device), "sum"))
            if not math.isfinite(loss):  # the model overflows there; while training it may not
                log(f"the held-out loss at step {step} is no number, and is left out")
                return
            journal.holdout.append(HoldoutLoss(step, loss))
            if settings.early_stop_patience is not None and _lowest_step(journal) == step and main:
                lowest_unsaved = None  # gone before the others are there
                lowest_unsaved = step, learner.weights()

    def draw_samples(step: int) -> None:
        if inputs.drawer is None or not main:
            return
        try:
            with learner.as_finished(), writing(f"the samples of step {step}", config.work_dir):
                inputs.drawer.draw(step, predict)
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            words = doubt(error)
        # Outside the handler, where nothing holds the memory of the failed try any more.
        give_memory_back()
        log(f"the samples of step {step} are left out: out of memory{words}")

    def due(step: int, every: int | None) -> bool:
        return every is not None and step % every == 0

    # ---- loop ---------------------------------------------------------------------------------
    # On the device: reading a loss at every step would make it wait.
    loss_sum = torch.tensor(journal.loss_sum, device=device)
    loss_steps = torch.tensor(float(journal.loss_steps), device=device)
    first_bad_step = torch.tensor(math.inf, device=device)
    pace, save_waits = SavePace(log), False
    split = 1  # parts in which each batch goes through the models; more where memory ran out
    seconds_before = journal.seconds
    started = reported_at = settled = time.perf_counter()
    reported_step = first_step
    if first_step == 0:
        if inputs.questions:
            measure_holdout(0)
        draw_samples(0)
    give_memory_back()  # of the VAE and the text encoder, which have encoded everything
    with stop_signal() as asked_to_stop:
        for step in range(first_step, total):
            if journal.ended_by:
                break
            torch.manual_seed(step_seed(settings.seed, step, accelerator.process_index))
            try:
                loss, split = _add_gradients(learner, inputs.feed, accelerator, step, split, log)
            except TrainingError as error:
                if not asked_to_stop():
                    raise
                # Ctrl-C ends the compiler as well, which then is not what is wrong.
                last = _last_save(save_folder, run)
                raise TrainingStopped(
                    f"asked to stop while the models were compiled for step {step + 1}: "
                    f"{last}; start the same run again and it goes on from there"
                ) from error
            rates = [_rate(settings, step, peak) for peak in learner.peak_rates]
            norm, norm_is_good = learner.make_step(step, rates)

            done = step + 1
            is_number = torch.isfinite(loss)
            good = norm_is_good & (is_number | learner.leaves_out_overflows)
            first_bad_step = torch.where(good, first_bad_step, first_bad_step.clamp(max=done))
            loss_sum += torch.where(is_number, loss, 0.0)
            loss_steps += is_number
            journal.seconds = seconds_before + time.perf_counter() - started

            # ---- what is due after this step: processes have to agree on it
            stop = False
            agrees = accelerator.num_processes == 1 or done % _AGREE_EVERY_STEPS == 0
            if agrees:
                stop = _agree(accelerator, asked_to_stop())
                limit = (settings.time_limit_minutes or math.inf) * 60
                if _agree(accelerator, journal.seconds > limit):
                    journal.ended_by = "time_limit"
            if done == total:
                journal.ended_by = "max_train_steps"
            ends = bool(journal.ended_by)
            measures = bool(inputs.questions) and (ends or due(done, settings.holdout_every_steps))
            saves = ends or stop
            save_due = due(done, settings.save_every_steps)
            save_waits = save_waits or save_due
            if not saves and (save_due or (save_waits and agrees)):
                saves = _agree(accelerator, main and pace.allows_save())
            reports = ends or measures or done == 1 or due(done, settings.log_every_steps)

            if reports or saves:
                # Of all processes: each goes on from it where the run is taken up again.
                journal.loss_sum = float(accelerator.reduce(loss_sum.clone(), "mean"))
                journal.loss_steps = float(accelerator.reduce(loss_steps.clone(), "mean"))
                mean_loss = journal.loss_sum / journal.loss_steps if journal.loss_steps else None
                bad_step = float(accelerator.gather(first_bad_step).min())
                skipped, in_a_row = learner.skipped_steps()
                stuck = in_a_row >= _SKIPPED_IN_A_ROW_AT_MOST or learner.scale() < 1
                if math.isfinite(bad_step):
                    what = f"the loss or its gradient is no number at step {int(bad_step)}"
                    raise _diverged(settings, what, save_folder, run)
                if stuck or (ends and mean_loss is None and not journal.smoothed.weight):
                    what = (
                        f"fp16 overflows: {skipped} of the first {done} steps were left out, the "
                        f"last {in_a_row} in a row, and nothing is learnt any more"
                    )
                    raise _diverged(settings, what, save_folder, run)
            if measures:
                measure_holdout(done)
                if not ends and _stops_early(settings, journal):
                    journal.ended_by, ends, saves = "early_stop", True, True
            if ends or due(done, settings.sample_every_steps):
                draw_samples(done)
            if main and due(done, settings.export_every_steps):
                with learner.as_finished(), writing(f"the model of step {done}", exports):
                    write_export(config, run, done, learner.models)
            if reports:
                now = time.perf_counter()
                row = StepReport(
                    step=done,
                    total=total,
                    loss=mean_loss,
                    smoothed_loss=journal.smoothed.add(mean_loss, journal.loss_steps),
                    holdout_loss=journal.holdout[-1].loss if journal.holdout else None,
                    lr=rates[0],
                    text_encoder_lr=rates[1] if learner.trains_text_encoder(step) else None,
                    grad_norm=finite(float(norm)),
                    steps_per_second=(done - reported_step) / max(now - reported_at, 1e-9),
                    seconds_left=_seconds_left(now - settled, done - first_step - 1, total - done),
                    memory_gib=peak_memory_gib(device),
                    skipped_steps=skipped,
                )
                journal.reports.append(row)
                reported_at, reported_step = now, done
                loss_sum.zero_()
                loss_steps.zero_()
                journal.loss_sum, journal.loss_steps = 0.0, 0.0
                if main:
                    report(row)
            if stop and not ends:
                log(f"asked to stop: saves step {done} and ends; Ctrl-C now ends it without")
            if saves:
                with pace.saving():
                    save(done)
                save_waits = False
            if stop and not ends:
                raise TrainingStopped(
                    f"asked to stop: saved at step {done} of {total} in {save_folder}; start the "
                    "same run again and it goes on from there"
                )
            if step == first_step:  # in which models were compiled and convolutions tried
                settled = time.perf_counter()

    if main:
        with _only_writer(config, log):
            if read_result(config, run) is None:  # or another run was quicker
                _finish(config, versions, run, accelerator.num_processes, learner, journal, log)
        _remove_saves(config, run)
    return first_step


def _finish(
    config: RunConfig,
    versions: Versions,
    run: str,
    processes: int,
    learner: Learner,
    journal: Journal,
    log: Callable[[str], None],
) -> None:
    """Writes the finished model: the last weights, or with early stopping the best of them."""
    made = steps = journal.reports[-1].step
    lost = None
    learner.finish()
    if config.training.early_stop_patience is not None:
        best = _best_save(journal, config.work_dir / _LOWEST / run, run, log)
        if best is not None:
            learner.restore_weights(best)
            steps = best.step
        at = _lowest_step(journal)
        if at is None:
            log(f"the finished model has the weights of the last step, {made}")
        elif steps != at:
            lost = at
            log(
                f"the weights of step {lost}, where the held-out loss was lowest, are lost; "
                f"the finished model has those of step {steps} of {made}"
            )
    write_checkpoint(
        config,
        versions,
        run,
        trained=learner.models,
        journal=journal,
        steps=steps,
        lost=lost,
        processes=processes,
    )


@contextlib.contextmanager
def _only_writer(config: RunConfig, log: Callable[[str], None]) -> Iterator[None]:
    """While inside, no run with another work folder writes the finished model."""
    with (
        writing("the finished model", config.output_dir),
        only_writer_of(config.output_dir, log),
    ):
        yield


def _remove_saves(config: RunConfig, run: str) -> None:
    """Of a run that has finished."""
    for kind in (_SAVES, _LOWEST):
        remove_saves(config.work_dir / kind / run)
    remove_saves(exports_folder(config, run))


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


def _add_gradients(
    learner: Learner,
    feed: Feed,
    accelerator: Accelerator,
    step: int,
    split: int,
    log: Callable[[str], None],
) -> tuple[Tensor, int]:
    """Adds up the gradients of one step; its loss, and in how many parts each batch went through.

    These are more than `split` where memory ran out and may be had that way.
    """
    settings = learner.settings
    while True:
        batches = _batches(feed, accelerator, settings, step, split)
        try:
            return learner.add_gradients(step, batches), split
        except (RuntimeError, MemoryError) as error:
            split *= _further_split(error, settings, accelerator, split)
        # Outside the handler, where nothing holds the memory of the failed try any more.
        learner.forget_gradients()
        give_memory_back()
        log(
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


def _seconds_left(seconds: float, steps: int, steps_left: int) -> float | None:
    """What is left, at the mean speed of the steps so far; None before there is one."""
    return seconds / steps * steps_left if steps else None


def _further_split(
    error: Exception, settings: TrainingSettings, accelerator: Accelerator, split: int
) -> int:
    """Into how many parts a batch is divided that did not fit into memory: 2 for an even one.

    Raises `error` where it says something else, or nothing is left to divide. One of several
    processes cannot do it alone: the others wait for its gradients.
    """
    batch = settings.train_batch_size // split
    allowed = settings.halve_batch_on_out_of_memory and accelerator.num_processes == 1
    if not (allowed and batch > 1 and is_out_of_memory(error)):
        raise error
    return next(parts for parts in range(2, batch + 1) if batch % parts == 0)


def _stops_early(settings: TrainingSettings, journal: Journal) -> bool:
    losses = [measured.loss for measured in journal.holdout]
    patience, min_gain = settings.early_stop_patience, settings.early_stop_min_gain
    return patience is not None and stopped_falling(losses, patience=patience, min_gain=min_gain)


def _lowest_step(journal: Journal, until: float = math.inf) -> int | None:
    """After which step the held-out loss was lowest, of those up to `until`; None before it was
    measured. What counts as too small a gain decides when a run ends, not which weights it keeps.
    """
    place = lowest([measured.loss for measured in journal.holdout if measured.step <= until], 0.0)
    return None if place < 0 else journal.holdout[place].step


def _best_save(journal: Journal, folder: Path, run: str, log: Callable[[str], None]) -> Save | None:
    """Of the weights that were kept, those with the lowest held-out loss that are whole; None where
    those of the last step are better, or nothing is left."""
    kept, last = saved_steps(folder), journal.reports[-1].step
    for measured in sorted(journal.holdout, key=lambda one: one.loss):  # of equal ones the first
        if measured.step == last:
            return None
        if measured.step in kept:
            save = save_of_step(folder, measured.step, run=run, log=log)
            if save is not None:
                return save
    return None


def _agree(accelerator: Accelerator, flag: bool) -> bool:
    """True in every process as soon as it is in one."""
    if accelerator.num_processes == 1:
        return flag
    value = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(value, "sum") > 0)


def _diverged(
    settings: TrainingSettings, what: str, save_folder: Path, run: str
) -> TrainingDiverged:
    return TrainingDiverged(
        f"{what}; {_last_save(save_folder, run)}. Lower "
        f"training.learning_rate (now {settings.learning_rate:g}), or raise the precision "
        f"(training.mixed_precision, now {settings.mixed_precision})"
    )


def _last_save(save_folder: Path, run: str) -> str:
    saved = newest_save(save_folder, run=run, log=lambda line: None)
    return f"the last good save is {saved.folder}" if saved else "there is no save yet"


def _quiet() -> None:
    """Keeps the libraries' bars for loading weights, and their advice, out of the log."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
