"""One run: its state, and what it does between its steps.

What belongs here: resuming from a save, what is due after a step and doing it: held-out loss,
samples, exports, reports, saves; the finished model. What does not: the steps, and the order of
what follows each (`train`), the models (`learner`), how files are written (`saves`, `checkpoint`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor

from posterpipe.core.devices import give_memory_back
from posterpipe.core.dreambooth.batches import Batch
from posterpipe.core.dreambooth.checkpoint import (
    exports_folder,
    only_writer,
    read_result,
    write_checkpoint,
    write_export,
)
from posterpipe.core.dreambooth.config import LOWEST_NAME, SAVES_NAME, RunConfig, Versions
from posterpipe.core.dreambooth.continuing import describe, save_to_continue
from posterpipe.core.dreambooth.early_stop import LowestWeights, lowest_step, stops_early
from posterpipe.core.dreambooth.errors import TrainingDiverged, TrainingStopped
from posterpipe.core.dreambooth.guards import writing
from posterpipe.core.dreambooth.holdout import holdout_loss
from posterpipe.core.dreambooth.inputs import read_inputs
from posterpipe.core.dreambooth.learner import Learner
from posterpipe.core.dreambooth.memory import InParts, peak_memory_gib
from posterpipe.core.dreambooth.pace import SavePace
from posterpipe.core.dreambooth.reports import HoldoutLoss, Journal, StepReport, finite
from posterpipe.core.dreambooth.running_loss import RunningLoss
from posterpipe.core.dreambooth.saves import (
    Save,
    keep_newest,
    keep_only,
    newest_save,
    other_runs,
    remove_saves,
    save_path,
    saved_steps,
    write_save,
)
from posterpipe.core.memory import doubt, is_out_of_memory

_AGREE_EVERY_STEPS = 10


@dataclass(frozen=True)
class Due:
    """What comes after a step, in this order; the same in all processes. Where the run ends
    (`Run.ended`), the samples and the save come as well."""

    holdout: bool
    samples: bool
    export: bool
    report: bool
    save: bool
    stop: bool


class Run:
    """A run that is in memory, resumed from its newest save where there is one.

    checkpoint_id: of the checkpoint that it makes.
    """

    def __init__(
        self,
        config: RunConfig,
        versions: Versions,
        checkpoint_id: str,
        accelerator: Accelerator,
        log: Callable[[str], None],
    ) -> None:
        self.config, self.settings = config, config.training
        self.accelerator = accelerator
        self.log = log
        self._versions = versions
        self._checkpoint_id = checkpoint_id
        self._main = accelerator.is_main_process
        self.inputs = read_inputs(config, checkpoint_id, accelerator, log)
        self._folder = config.work_dir / SAVES_NAME / checkpoint_id
        self._lowest = LowestWeights(
            config.work_dir / LOWEST_NAME / checkpoint_id, checkpoint_id, log
        )
        self._measured_on = {  # the held-out loss, beside all that the checkpoint's id tells
            "holdout_set": versions.holdout_set,
            "holdout_timesteps": self.settings.holdout_timesteps,
        }
        saved = newest_save(self._folder, checkpoint_id=checkpoint_id, log=log)
        self.continued = None if saved else save_to_continue(config, versions)
        """The save of another run that this one begins with."""
        saved = saved or self.continued
        self.learner = Learner(config, accelerator, self.inputs.texts, log, saved)
        self.first_step, self.journal = self._resume(saved)
        self.loss = RunningLoss(accelerator, self.learner, self.journal)
        self._holdout_in_parts = InParts(log, "held-out posters", self.give_recording_back)
        self._samples_in_parts = InParts(log, "samples", self.give_recording_back)
        self._pace, self._save_waits = SavePace(log), False
        self._seconds_before = self.journal.seconds
        self._started = self._reported_at = self._warm_since = time.perf_counter()
        self._reported_step = self.first_step

    def _resume(self, saved: Save | None) -> tuple[int, Journal]:
        """Restores a save; its step and journal, or those of a run that begins."""
        first_step, journal = 0, Journal()
        others = other_runs(self._folder)
        if others and self.config.continue_from is None:
            self.log(
                f"{self._folder.parent}: the saves of other runs are kept ({', '.join(others)}); "
                "remove their folders when those are not to go on"
            )
        continued = self.continued is not None
        if saved is not None:
            self.learner.restore(saved, of_another_run=continued)
            first_step, journal = saved.step, Journal.from_json(saved.state["journal"])
            total = self.settings.max_train_steps
            place = saved.folder if continued else saved.folder.name
            self.log(f"goes on from step {first_step} of {total}, saved in {place}")
            # Older saves did not record it; with early stopping the run would be another one.
            before = saved.state.get("questions", self._measured_on)
            if journal.holdout and before != self._measured_on:
                journal.forget_holdout()
                self.log(
                    "the held-out loss was measured before on other posters or at other timesteps: "
                    "those measurements are dropped, since their curve would not go on"
                )
            if continued:
                journal.ended_by, journal.seconds = "", 0.0  # a limit on time is this run's alone
                if self.settings.early_stop_patience is not None:
                    journal.forget_holdout()  # the weights of its lowest point are the other run's
        if self._main:  # steps made again may turn out otherwise on a GPU, and may be fewer
            exports = exports_folder(self.config, self._checkpoint_id)
            keep_only(exports, {step for step in saved_steps(exports) if step <= first_step})
        return first_step, journal

    @property
    def ended(self) -> bool:
        """Whether no more steps are made."""
        return bool(self.journal.ended_by)

    # -- what comes after a step ------------------------------------------------------------------

    def due(self, step: int, asked_to_stop: Callable[[], bool]) -> Due:
        """Decides in all processes what comes after `step`, and whether the run ends with it."""
        settings = self.settings
        self.journal.seconds = self._seconds_before + time.perf_counter() - self._started
        agrees = self.accelerator.num_processes == 1 or step % _AGREE_EVERY_STEPS == 0
        stop = False
        if agrees:
            stop = agree(self.accelerator, asked_to_stop())
            limit = (settings.time_limit_minutes or math.inf) * 60
            if agree(self.accelerator, self.journal.seconds > limit):
                self.journal.ended_by = "time_limit"
        if step == settings.max_train_steps:
            self.journal.ended_by = "max_train_steps"
        save_due = _every(settings.save_every_steps, step)
        self._save_waits = self._save_waits or save_due
        save = self.ended or stop
        if not save and self._save_waits and (save_due or agrees):
            save = agree(self.accelerator, self._main and self._pace.allows_save())
        holdout = bool(self.inputs.holdout_batches) and (
            self.ended or _every(settings.holdout_every_steps, step)
        )
        return Due(
            holdout=holdout,
            samples=_every(settings.sample_every_steps, step),
            export=_every(settings.export_every_steps, step),
            report=self.ended or holdout or step == 1 or _every(settings.log_every_steps, step),
            save=save,
            stop=stop,
        )

    def check_loss(self, step: int) -> None:
        """Reads the loss since the last report into the journal. Raises TrainingDiverged."""
        self.loss.read_into(self.journal)
        divergence = self.loss.divergence(self.journal, step)
        if divergence is not None:
            raise TrainingDiverged(
                f"{divergence}; {self.last_save()}. Lower "
                f"training.learning_rate (now {self.settings.learning_rate:g}), or raise the "
                f"precision (training.mixed_precision, now {self.settings.mixed_precision}). Such "
                "a run begins anew or, started by hand, goes on from the save that `continue_from` "
                "names"
            )

    def measure_holdout(self, step: int) -> None:
        """Adds the held-out loss to the journal, where there are held-out posters. With early
        stopping, keeps the weights if they are the best, and ends the run where it fell no more."""
        if not self.inputs.holdout_batches:
            return
        with self.learner.as_finished():
            share = holdout_loss(
                self.inputs.holdout_batches,
                self._errors_of,
                process=self.accelerator.process_index,
                processes=self.accelerator.num_processes,
            )
            loss = float(self.accelerator.reduce(share.to(self.accelerator.device), "sum"))
            if math.isfinite(loss):
                self.journal.holdout.append(HoldoutLoss(step, loss))
                keeps = self._main and self.settings.early_stop_patience is not None
                if keeps and lowest_step(self.journal) == step:
                    self._lowest.keep(step, self.learner.weights)
            else:  # the model overflows there; while training it may not
                self.log(f"the held-out loss at step {step} is no number, and is left out")
        if not self.ended and stops_early(self.settings, self.journal):
            self.journal.ended_by = "early_stop"

    def draw_samples(self, step: int) -> None:
        """Draws the samples in the main process, where the settings ask for any; where memory runs
        out they are left out."""
        if self.inputs.drawer is None or not self._main:
            return
        again = True
        while again:
            try:
                what = writing(f"the samples of step {step}", self.config.work_dir)
                with self.learner.as_finished(), what:
                    self.inputs.drawer.draw(step, self._predict)
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                words = doubt(error)
            # Outside the handler, where nothing holds the memory of the failed try any more.
            again = self.give_recording_back()
            give_memory_back()
        self.log(f"the samples of step {step} are left out: out of memory{words}")

    def give_recording_back(self) -> bool:
        """For when memory has run out: lets go of the recorded step. Whether there was one."""
        had = self.learner.forget_recording()
        if had:
            self.log("out of memory: goes on without CUDA graphs")
        return had

    def export(self, step: int) -> None:
        """Writes the model as it is now beside the saves."""
        if self._main:
            exports = exports_folder(self.config, self._checkpoint_id)
            with self.learner.as_finished(), writing(f"the model of step {step}", exports):
                write_export(self.config, self._checkpoint_id, step, self.learner.models)

    def report(self, step: int, rates: Sequence[float], norm: Tensor) -> StepReport:
        """Adds a report to the journal, whose loss was read, and begins a new sum of losses."""
        journal, now = self.journal, time.perf_counter()
        warm_steps = step - self.first_step - 1
        left = self.settings.max_train_steps - step
        row = StepReport(
            step=step,
            total=self.settings.max_train_steps,
            loss=journal.mean_loss,
            smoothed_loss=journal.smoothed.add(journal.mean_loss, journal.loss_steps),
            holdout_loss=journal.holdout[-1].loss if journal.holdout else None,
            lr=rates[0],
            text_encoder_lr=rates[1] if self.learner.trains_text_encoder(step - 1) else None,
            grad_norm=finite(float(norm)),
            steps_per_second=(step - self._reported_step) / max(now - self._reported_at, 1e-9),
            seconds_left=(now - self._warm_since) / warm_steps * left if warm_steps else None,
            memory_gib=peak_memory_gib(self.accelerator.device),
            skipped_steps=self.learner.skipped_steps()[0],
        )
        journal.reports.append(row)
        self._reported_at, self._reported_step = now, step
        self.loss.clear(journal)
        return row

    def warmed_up(self) -> None:
        """To be called after the first step, in which models were compiled and convolutions tried:
        the speed of those after it tells how much time is left."""
        self._warm_since = time.perf_counter()

    def save(self, step: int) -> None:
        """Writes everything from which the run can go on. Its random numbers, and the place in the
        stream of samples, are functions of the step."""
        with self._pace.saving():
            self._lowest.write()
            if self._main:
                tensors, state = self.learner.state()
                # "questions" is what older saves call it.
                state |= {"journal": self.journal.to_json(), "questions": self._measured_on}
                state |= {"run": describe(self.config, self._versions)}
                with writing(f"the save of step {step}", self._folder):
                    write_save(
                        self._folder,
                        step=step,
                        checkpoint_id=self._checkpoint_id,
                        tensors=tensors,
                        state=state,
                        keep=self.settings.keep_saves,
                    )
                    self._lowest.tidy(self.journal, saved_steps(self._folder))
        self._save_waits = False

    def stop(self, step: int) -> NoReturn:
        """Saves and raises TrainingStopped."""
        self.log(f"asked to stop: saves step {step} and ends; Ctrl-C now ends it without")
        self.save(step)
        raise TrainingStopped(
            f"asked to stop: saved at step {step} of {self.settings.max_train_steps} in "
            f"{self._folder}; start the same run again and it goes on from there"
        )

    def last_save(self) -> str:
        """In words, from what the run can go on."""
        saved = newest_save(self._folder, checkpoint_id=self._checkpoint_id, log=lambda line: None)
        return f"the last good save is {saved.folder}" if saved else "there is no save yet"

    def _errors_of(self, batch: Batch) -> Tensor:
        return self._holdout_in_parts(
            len(batch.texts), lambda part: self.learner.errors_of(batch.part(part))
        )

    def _predict(self, latents: Tensor, timestep: Tensor, texts: Sequence[str]) -> Tensor:
        return self._samples_in_parts(
            len(texts), lambda part: self.learner.predict(latents[part], timestep, texts[part])
        )

    # -- the end ----------------------------------------------------------------------------------

    def finish(self) -> None:
        """Leaves the finished model and nothing else of the run, in the main process."""
        if self._main:
            with only_writer(self.config, self.log):
                if read_result(self.config, self._checkpoint_id) is None:  # no other was quicker
                    self._write_finished()
            remove_all_saves(self.config, self._checkpoint_id)
            if self.config.keep_last_save:
                kept = save_path(self._folder, self.journal.reports[-1].step)
                self.log(f"the last save is kept in {kept}")

    def _write_finished(self) -> None:
        """The last weights, or with early stopping the best ones."""
        made = steps = self.journal.reports[-1].step
        lost = None
        self.learner.finish()
        if self.settings.early_stop_patience is not None:
            best = self._lowest.best(self.journal)
            if best is not None:
                self.learner.restore_weights(best)
                steps = best.step
            at = lowest_step(self.journal)
            if at is None:
                self.log(f"the finished model has the weights of the last step, {made}")
            elif steps != at:
                lost = at
                self.log(
                    f"the weights of step {lost}, where the held-out loss was lowest, are lost; "
                    f"the finished model has those of step {steps} of {made}"
                )
        write_checkpoint(
            self.config,
            self._versions,
            self._checkpoint_id,
            trained=self.learner.models,
            journal=self.journal,
            steps=steps,
            lost=lost,
            processes=self.accelerator.num_processes,
        )


def remove_all_saves(config: RunConfig, checkpoint_id: str) -> None:
    """Removes the saves, kept weights and exports of a run that has finished; not the last save
    where `config.keep_last_save` says so."""
    if config.keep_last_save:
        keep_newest(config.work_dir / SAVES_NAME / checkpoint_id)
    else:
        remove_saves(config.work_dir / SAVES_NAME / checkpoint_id)
    remove_saves(config.work_dir / LOWEST_NAME / checkpoint_id)
    remove_saves(exports_folder(config, checkpoint_id))


def agree(accelerator: Accelerator, flag: bool) -> bool:
    """True in every process as soon as it is in one."""
    if accelerator.num_processes == 1:
        return flag
    value = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(value, "sum") > 0)


def _every(steps: int | None, step: int) -> bool:
    return steps is not None and step % steps == 0
