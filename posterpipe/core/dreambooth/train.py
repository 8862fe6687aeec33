"""The training loop, to be read from top to bottom.

What belongs here: one run from its config to the finished checkpoint: models, data, init or resume,
optimizer, loop. What does not: the formulas (`objective`, `schedule`), the files (`data`, `saves`,
`checkpoint`), the command line (`__main__`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from posterpipe.core.dreambooth import objective
from posterpipe.core.dreambooth.checkpoint import (
    check_base_model,
    load_noise_schedule,
    load_text_encoder,
    load_tokenizer,
    load_unet,
    load_vae,
    read_result,
    write_checkpoint,
)
from posterpipe.core.dreambooth.config import (
    RunConfig,
    Versions,
    checkpoint_id,
    measure_versions,
)
from posterpipe.core.dreambooth.data import (
    Example,
    cached_latents,
    draw,
    positions,
    read_training_set,
    step_seed,
    tokenize,
)
from posterpipe.core.dreambooth.errors import TrainingDiverged, TrainingError, TrainingStopped
from posterpipe.core.dreambooth.reports import SmoothedLoss, StepReport, TrainResult
from posterpipe.core.dreambooth.saves import (
    newest_save,
    pack,
    remove_saves,
    restore_layout,
    unpack,
    write_save,
)
from posterpipe.core.dreambooth.schedule import learning_rate
from posterpipe.settings import Precision, TrainingSettings

_SAVES = "saves"
_LATENTS = "latents"
_WAITING_LINE_EVERY_SECONDS = 60.0


def train(
    config: RunConfig,
    report: Callable[[StepReport], None] = lambda report: None,
    *,
    log: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Trains, or goes on with a run that was stopped, and leaves a complete diffusers directory.

    report: called after the first step, then every `log_every_steps`, and after the last. log: gets
    a line about everything else, such as a resume. Both are called in the main process only.

    A run that has finished before returns its result at once; one that another process is busy
    with is waited for. On CPU, a run that was killed at any moment and started again ends with the
    same bits as one that was not (same machine, same number of threads).

    Raises TrainingError with what to do: TrainingSetError, BaseModelError, TrainingDiverged when
    the loss is no number, TrainingStopped after SIGTERM.
    """
    _quiet()
    check_base_model(config.base_model)
    examples = read_training_set(config.training_set)
    versions = config.versions or measure_versions(config)
    run = checkpoint_id(config, versions)
    accelerator = _accelerator(config.training.mixed_precision)
    main = accelerator.is_main_process
    say = log if main else lambda line: None
    try:
        with _only_run_in(config.work_dir, say) if main else contextlib.nullcontext():
            result = read_result(config, run) if main else None
            if _agree(accelerator, result is not None):
                say(f"{config.output_dir} is there already, complete")
                resumed_from = 0
            else:
                with _memory_hint(config.training):
                    resumed_from = _train(config, versions, run, examples, accelerator, report, say)
            accelerator.wait_for_everyone()
        result = read_result(config, run)
        if result is None:
            raise TrainingError(f"{config.output_dir}: the finished checkpoint has been removed")
        return dataclasses.replace(result, resumed_from=resumed_from)
    finally:
        # The state is global in accelerate; without this, the next run in this process could not
        # have another precision.
        AcceleratorState._reset_state(reset_partial_state=accelerator.num_processes == 1)


def _train(
    config: RunConfig,
    versions: Versions,
    run: str,
    examples: list[Example],
    accelerator: Accelerator,
    report: Callable[[StepReport], None],
    log: Callable[[str], None],
) -> int:
    """The run itself; returns the step it was resumed from."""
    settings = config.training
    device, main = accelerator.device, accelerator.is_main_process
    total = settings.max_train_steps
    # Another number of processes reads the stream of samples differently: a save of one is foreign
    # to the other.
    run_of_saves = f"{run}-{accelerator.num_processes}"

    # ---- data: latents and captions, each image through the VAE once --------------------------
    noise_schedule = load_noise_schedule(config.base_model)
    kind = objective.prediction_type(noise_schedule.config["prediction_type"])
    alphas_bar: Tensor = noise_schedule.alphas_cumprod
    with accelerator.main_process_first():
        latents = cached_latents(
            config.work_dir / _LATENTS,
            examples,
            config.base_model,
            lambda: load_vae(config.base_model).to(device),
            width=config.width,
            height=config.height,
            log=log,
        )
    text_encoder = load_text_encoder(config.base_model)
    tokenizer = load_tokenizer(config.base_model)
    longest = text_encoder.config.max_position_embeddings
    token_ids = tokenize(tokenizer, examples, min(tokenizer.model_max_length, longest))
    embeddings: Tensor | None = None
    if not settings.train_text_encoder:  # then its answers never change
        embeddings = _embed(text_encoder.to(device).eval(), token_ids)

    # ---- models and optimizer -----------------------------------------------------------------
    unet = load_unet(config.base_model).to(device).train()
    trained: dict[str, nn.Module] = {"unet": unet}
    peaks = [settings.learning_rate]
    if settings.train_text_encoder:
        trained["text_encoder"] = text_encoder.to(device).train()
        peaks.append(settings.text_encoder_learning_rate or settings.learning_rate)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        text_encoder.gradient_checkpointing_enable()
    optimizer = _optimizer(settings, trained, peaks)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # For several processes: copies that average their gradients. For one: the same models, in
    # mixed precision.
    *prepared, stepper = accelerator.prepare(*trained.values(), optimizer)
    predict, encode_text = prepared[0], prepared[-1]

    # ---- init or resume -----------------------------------------------------------------------
    first_step, seconds_before = 0, 0.0
    reports: list[StepReport] = []
    smoothed = SmoothedLoss()
    loss_sum, loss_steps = torch.zeros((), device=device), 0
    save_folder = config.work_dir / _SAVES
    saved = newest_save(save_folder, run=run_of_saves, log=log)
    if saved is not None:
        for name, model in trained.items():
            model.load_state_dict(saved.tensors(name))
        optimizer.load_state_dict(unpack(saved.state["optimizer"], saved.tensors("optimizer")))
        restore_layout(optimizer)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved.state["scaler"])
        first_step, seconds_before = saved.step, saved.state["seconds"]
        reports = [StepReport(**row) for row in saved.state["reports"]]
        smoothed = SmoothedLoss(**saved.state["smoothed"])
        loss_sum += saved.state["loss_sum"]
        loss_steps = saved.state["loss_steps"]
        log(f"goes on from step {first_step} of {total}, saved in {saved.folder.name}")

    def save(step: int) -> None:
        if not main:
            return
        packed, tensors = pack(optimizer.state_dict())
        scaler = accelerator.scaler
        write_save(
            save_folder,
            step=step,
            run=run_of_saves,
            tensors={
                **{name: model.state_dict() for name, model in trained.items()},
                "optimizer": tensors,
            },
            state={
                "optimizer": packed,
                "scaler": None if scaler is None else scaler.state_dict(),
                "seconds": seconds_before + time.perf_counter() - started,
                "reports": [dataclasses.asdict(row) for row in reports],
                "smoothed": dataclasses.asdict(smoothed),
                "loss_sum": float(loss_sum),
                "loss_steps": loss_steps,
            },
            keep=settings.keep_saves,
        )

    # ---- loop ---------------------------------------------------------------------------------
    started = reported_at = time.perf_counter()
    reported_step = first_step
    micro_steps = settings.gradient_accumulation_steps
    with _stop_signal() as asked_to_stop:
        for step in range(first_step, total):
            torch.manual_seed(step_seed(settings.seed, step, accelerator.process_index))
            rates = [
                learning_rate(
                    step,
                    peak=peak,
                    schedule=settings.lr_scheduler,
                    warmup_steps=settings.lr_warmup_steps,
                    total_steps=total,
                )
                for peak in peaks
            ]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

            for micro_step in range(micro_steps):
                draws = [
                    draw(
                        settings.seed,
                        position,
                        images=len(examples),
                        timesteps=len(alphas_bar),
                        shape=latents.mean.shape[1:],
                    )
                    for position in positions(
                        step,
                        micro_step=micro_step,
                        micro_steps=micro_steps,
                        process=accelerator.process_index,
                        processes=accelerator.num_processes,
                        batch=settings.train_batch_size,
                    )
                ]
                index = [d.index for d in draws]
                timesteps = torch.tensor([d.timestep for d in draws])
                noise = torch.stack([d.noise for d in draws])
                clean = latents.sample(index, torch.stack([d.latent_noise for d in draws]))
                alpha_bar = alphas_bar[timesteps]
                noisy = objective.add_noise(clean, noise, alpha_bar).to(device)
                wanted = objective.target(kind, clean, noise, alpha_bar).to(device)

                with contextlib.ExitStack() as stack:
                    if micro_step < micro_steps - 1:  # gradients travel with the last one
                        for model in prepared:
                            stack.enter_context(accelerator.no_sync(model))
                    if embeddings is None:
                        prompt_embeds = encode_text(token_ids[index].to(device))[0]
                    else:
                        prompt_embeds = embeddings[index].to(device)
                    prediction = predict(
                        noisy, timesteps.to(device), prompt_embeds, return_dict=False
                    )[0]
                    losses = objective.squared_errors(prediction, wanted)
                    if settings.snr_gamma is not None:
                        losses = losses * objective.min_snr_weights(
                            kind, alpha_bar, settings.snr_gamma
                        ).to(device)
                    loss = losses.mean() / micro_steps
                    accelerator.backward(loss)
                # A sum on the device: reading it would make the device wait at every step.
                loss_sum += loss.detach()

            accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
            stepper.step()
            stepper.zero_grad(set_to_none=True)
            loss_steps += 1

            done = step + 1
            stop = _agree(accelerator, asked_to_stop()) if _may_stop(accelerator, done) else False
            log_now = done in (1, total) or done % settings.log_every_steps == 0
            save_now = done == total or done % settings.save_every_steps == 0 or stop
            if log_now or save_now:
                mean_loss = float(accelerator.reduce(loss_sum.clone(), "mean")) / loss_steps
                if not math.isfinite(mean_loss):
                    raise _diverged(config, done, mean_loss, save_folder, run_of_saves)
            if log_now:
                now = time.perf_counter()
                row = StepReport(
                    step=done,
                    total=total,
                    loss=mean_loss,
                    smoothed_loss=smoothed.add(mean_loss, loss_steps),
                    lr=rates[0],
                    steps_per_second=(done - reported_step) / max(now - reported_at, 1e-9),
                    seconds_left=(now - started) / (done - first_step) * (total - done),
                    memory_gib=_peak_memory_gib(device),
                )
                reports.append(row)
                reported_at, reported_step = now, done
                loss_sum.zero_()
                loss_steps = 0
                if main:
                    report(row)
            if save_now:
                save(done)
            if stop and done < total:
                raise TrainingStopped(
                    f"asked to stop: saved at step {done} of {total} in {save_folder}; start the "
                    "same run again and it goes on from there"
                )

    # ---- the finished model -------------------------------------------------------------------
    if main:
        write_checkpoint(
            config,
            versions,
            run,
            unet=unet,
            text_encoder=text_encoder if settings.train_text_encoder else None,
            reports=reports,
            seconds=seconds_before + time.perf_counter() - started,
        )
        remove_saves(save_folder)
    return first_step


def _accelerator(precision: Precision) -> Accelerator:
    accelerator_precision = "no" if precision == "fp32" else precision
    on_cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    if precision == "fp16" and (on_cpu or os.environ.get("ACCELERATE_USE_CPU") == "true"):
        raise TrainingError(
            "training.mixed_precision: fp16 needs a GPU and there is none; set it to bf16 or fp32 "
            "(POSTERPIPE_TRAINING__MIXED_PRECISION=bf16)"
        )
    return Accelerator(mixed_precision=accelerator_precision)


def _optimizer(
    settings: TrainingSettings, trained: dict[str, nn.Module], peaks: list[float]
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), one group a model."""
    groups: list[dict[str, Any]] = [
        {"params": list(model.parameters()), "lr": peak}
        for model, peak in zip(trained.values(), peaks, strict=True)
    ]
    betas = (settings.adam_beta1, settings.adam_beta2)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            groups,
            betas=betas,
            weight_decay=settings.adam_weight_decay,
            eps=settings.adam_epsilon,
            fused=True,
        )
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(
        groups,
        betas=betas,
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
    )


@torch.no_grad()
def _embed(text_encoder: nn.Module, token_ids: Tensor) -> Tensor:
    """float32 (images, tokens, width), on the CPU."""
    device = next(text_encoder.parameters()).device
    return torch.cat([text_encoder(ids.to(device))[0].cpu() for ids in token_ids.split(16)])


def _agree(accelerator: Accelerator, flag: bool) -> bool:
    """True in every process as soon as it is in one."""
    if accelerator.num_processes == 1:
        return flag
    value = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(value, "sum") > 0)


def _may_stop(accelerator: Accelerator, done: int) -> bool:
    # Processes have to stop at the same step, and to agree on one costs a wait.
    return accelerator.num_processes == 1 or done % 10 == 0


def _diverged(
    config: RunConfig, step: int, loss: float, folder: Path, run: str
) -> TrainingDiverged:
    saved = newest_save(folder, run=run, log=lambda line: None)
    kept = f"the last good save is {saved.folder}" if saved else "there is no save yet"
    return TrainingDiverged(
        f"the loss is {loss} at step {step}; {kept}. Lower training.learning_rate (now "
        f"{config.training.learning_rate:g}), or raise the precision (training.mixed_precision, "
        f"now {config.training.mixed_precision})"
    )


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@contextlib.contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """SIGTERM becomes a question the loop can ask between steps."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # Python delivers signals to the main thread only
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _only_run_in(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of a work folder. The system lets go of it when the process dies.

    Waits for another process rather than failing: it may be the same training, orphaned by a
    killed parent, and then its result is used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spoken = -math.inf
    with open(folder / "lock", "a+", encoding="utf-8") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - spoken > _WAITING_LINE_EVERY_SECONDS:
                    lock.seek(0)
                    log(f"{folder}: waiting for process {lock.read().strip()}, which trains here")
                    spoken = time.monotonic()
                time.sleep(0.5)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextlib.contextmanager
def _memory_hint(settings: TrainingSettings) -> Iterator[None]:
    """Out of memory becomes a sentence with the settings that need less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and (
            "can't allocate memory" not in str(error)
        ):
            raise
        remedies = []
        if settings.train_batch_size > 1:
            half = settings.train_batch_size // 2
            remedies.append(
                f"training.train_batch_size = {half} with gradient_accumulation_steps = "
                f"{settings.gradient_accumulation_steps * 2}"
            )
        if not settings.gradient_checkpointing:
            remedies.append("training.gradient_checkpointing = true")
        if settings.optimizer != "adamw_8bit":
            remedies.append('training.optimizer = "adamw_8bit"')
        if settings.train_text_encoder:
            remedies.append("training.train_text_encoder = false")
        raise TrainingError(
            f"out of memory; each of these needs less: {'; '.join(remedies) or 'smaller images'}"
        ) from error


def _quiet() -> None:
    """Keeps the libraries' bars for loading weights, and their advice, out of the log."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
