"""The models in training, with everything that changes while they train.

What belongs here: models, optimizer, scaler and moving average as one thing that takes batches in,
is saved and restored. What does not: what comes when (`train`), the formulas (`objective`), files
(`saves`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn

from posterpipe.core.devices import memory_layout, torch_dtype
from posterpipe.core.dreambooth import objective
from posterpipe.core.dreambooth.base_model import load_text_encoder, load_unet
from posterpipe.core.dreambooth.batches import Batch
from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.cuda_graphs import RecordedPass, has_ample_memory, hindrance
from posterpipe.core.dreambooth.effects import freezes_short_lora
from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.core.dreambooth.lora import add_lora, merge_lora
from posterpipe.core.dreambooth.optimizers import InMemoryOrder, MovingAverage, make_optimizer
from posterpipe.core.dreambooth.saves import Save, pack, unpack
from posterpipe.core.dreambooth.texts import FrozenTexts, Tokens, TrainedTexts, encoder_key
from posterpipe.core.memory import is_out_of_memory

_LONGEST_REASON = 200

TextsOf = Callable[[Sequence[str]], Tensor]
"""Captions in, the text encoder's hidden states out."""


class Learner:
    """The U-Net, and the text encoder if it is trained, in training.

    texts: all captions that will be read, as far as they are known. Trained weights are fp32
    whatever the run's precision; autocast and the gradients' scaler are used here openly rather
    than through accelerate, which knows the device and the other processes.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        texts: Collection[str],
        log: Callable[[str], None],
        saved: Save | None = None,
    ) -> None:
        self.settings = settings = config.training
        self.device = device = accelerator.device
        self._accelerator = accelerator
        self._dtype = torch_dtype(settings.mixed_precision)
        whole = settings.compile and not settings.compile_blocks
        self._layout = memory_layout(settings.channels_last, device, compiled=whole)
        if settings.channels_last is None and saved is not None:
            self._layout = saved_layout(saved) or self._layout  # the optimizer's state is in it
        for remark in precision_remarks(self._dtype, device):
            log(remark)
        # Has an effect on GPUs only: where all images have one size, the quickest convolution is
        # looked for once. It is looked for again with each new shape, and its trials need memory.
        torch.backends.cudnn.benchmark = not config.buckets
        # On GPUs too; cuDNN's convolutions are TF32 unless that is switched off.
        torch.backends.cuda.matmul.allow_tf32 = settings.tf32 and self._dtype == torch.float32

        self.models = self._load_models(config.base_model)
        """By the name of their folder; those that are trained."""
        self._unet = cast(UNet2DConditionModel, self.models["unet"])
        # For several processes: copies that average their gradients. For one: the same models. They
        # come before the optimizer, since making them may move the weights to other memory.
        self._copies = [accelerator.prepare_model(model) for model in self.models.values()]
        self._predict = self._compile() if settings.compile else self._copies[0]

        self.peak_rates = [settings.learning_rate]
        if settings.train_text_encoder:
            rate = settings.text_encoder_learning_rate or settings.learning_rate
            self.peak_rates.append(rate)
        self.named = {
            name: {key: p for key, p in model.named_parameters() if p.requires_grad}
            for name, model in self.models.items()
        }
        groups = [list(group.values()) for group in self.named.values()]
        self.parameters = [parameter for group in groups for parameter in group]
        self._in_order = InMemoryOrder(groups)
        self._optimizer = make_optimizer(settings, self._in_order.groups)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._dtype == torch.float16)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._skipped_in_a_row = self._skipped.clone()
        self._average: MovingAverage | None = None
        if settings.ema_decay is not None:
            self._average = MovingAverage(self.parameters, settings.ema_decay)

        self._recorded = self._make_recorded(one_shape=not config.buckets, log=log)
        self._has_stepped = False

        texts_of = self._make_texts(config, texts, log)
        self._frozen_texts, self._texts_to_learn, self._texts_now = texts_of

    def _load_models(self, base_model: Path) -> dict[str, nn.Module]:
        """The models to train, on the device and in training mode."""
        settings = self.settings
        unet = load_unet(base_model)
        models: dict[str, nn.Module] = {"unet": unet}
        if settings.train_text_encoder:
            models["text_encoder"] = load_text_encoder(base_model)
        if settings.method == "lora":
            torch.manual_seed(settings.seed % 2**64)  # its matrices begin at random
            add_lora(models, settings, self._dtype)
        unet.to(memory_format=self._layout)
        for model in models.values():
            model.to(self.device).train()
        if settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            if "text_encoder" in models:
                # Non-reentrant: with LoRA nothing that goes into a block has a gradient.
                cast(Any, models["text_encoder"]).gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": False}
                )
        return models

    def _compile(self) -> Callable[..., Any]:
        """The U-Net for training, compiled when it is first called."""
        # On a CPU a run that goes on ends with the same bits, so what is compiled for a shape must
        # not depend on the shapes before it; on a GPU, where each takes minutes, it may.
        each_shape = self.device.type == "cpu"
        if not self.settings.compile_blocks:
            return compiled(self._copies[0], each_shape=each_shape)
        compile_blocks(self._unet, each_shape=each_shape)
        return self._copies[0]

    def _make_recorded(self, *, one_shape: bool, log: Callable[[str], None]) -> RecordedPass | None:
        wanted, processes = self.settings.cuda_graphs, self._accelerator.num_processes
        reason = hindrance(self.settings, self.device, processes=processes, one_shape=one_shape)
        if reason is not None:
            if wanted:
                log(f"training.cuda_graphs = true has no effect with {reason}")
            return None
        return RecordedPass(
            self._loss,
            list(self.named["unet"].values()),
            scaled=self._scaler.scale,
            ample=None if wanted else partial(has_ample_memory, self.device),
            log=log,
        )

    def _make_texts(
        self, config: RunConfig, texts: Collection[str], log: Callable[[str], None]
    ) -> tuple[FrozenTexts, TextsOf, TextsOf]:
        """Captions as hidden states: while the text encoder is not trained, while it is, and as it
        is now, to measure and draw."""
        tokens_of = Tokens(config.base_model)
        for remark in length_remarks(tokens_of, texts):
            log(remark)
        # An encoder of its own then says them, which captions that stay the same need but once.
        once = freezes_short_lora(self.settings) and not self.settings.caption_shuffling
        frozen = FrozenTexts(
            lambda: self._text_encoder_in_fp32(config.base_model),
            tokens_of,
            self.device,
            self._dtype,
            expected=sorted({"", *texts}) if once else (),
        )
        if self.settings.train_text_encoder:
            # What is measured and drawn goes through the model itself: copies are for training.
            trained, now = (
                TrainedTexts(encoder, tokens_of, self.device)
                for encoder in (self._copies[-1], self.models["text_encoder"])
            )
            return frozen, trained, now
        if not self.settings.caption_shuffling:  # then each is encoded once, before the first step
            with self._accelerator.main_process_first():
                key = encoder_key(config.base_model)
                frozen.learn(sorted({"", *texts}), config.cache, key, log=log)
        return frozen, frozen, frozen

    def _text_encoder_in_fp32(self, base_model: Path) -> nn.Module:
        """The text encoder as it is now, on the device: that in training, or where LoRA has frozen
        weights of a short precision there, another one that has it merged."""
        trained = self.models.get("text_encoder")
        if trained is not None and not freezes_short_lora(self.settings):
            return trained
        encoder: nn.Module = load_text_encoder(base_model)
        if trained is not None:
            encoder = merge_lora(encoder, trained)
        return encoder.to(self.device)

    # -- learning ---------------------------------------------------------------------------------

    def trains_text_encoder(self, step: int) -> bool:
        """Whether the text encoder learns in this step."""
        stop = self.settings.text_encoder_stop_step
        return self.settings.train_text_encoder and (stop is None or step < stop)

    def add_gradients(self, step: int, batches: Sequence[Batch]) -> Tensor:
        """Adds up the gradients of a step's batches; its loss, a float32 () on the device.

        Raises TrainingError where the models cannot be compiled.
        """
        learns = self.trains_text_encoder(step)
        texts_of = self._texts_to_learn if learns else self._frozen_texts
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, start=1):
            with contextlib.ExitStack() as stack:
                if self.settings.compile:
                    stack.enter_context(_compile_hint())
                if number < len(batches):  # between processes, gradients travel with the last one
                    for copy in self._copies:
                        stack.enter_context(self._accelerator.no_sync(copy))
                loss += self._add_gradients(batch.to(self.device, self._layout), texts_of)
        return loss

    def _add_gradients(self, batch: Batch, texts_of: TextsOf) -> Tensor:
        """Adds up the gradients of a batch; its part of the step's loss."""
        with self._autocast():
            embeds = texts_of(batch.texts)
        inputs = (batch.noisy, batch.timesteps, embeds, batch.target, batch.weights)
        # The first step makes the optimizer's states and tries convolutions: only then is it known
        # what memory is left.
        if self._recorded is None or not self._has_stepped:
            part = self._loss(*inputs)
            self._scaler.scale(part).backward()
            return part.detach()
        part, gradients = self._recorded(*inputs)
        if embeds.requires_grad:
            embeds.backward(gradients[2])
        return part

    def _loss(
        self, noisy: Tensor, timesteps: Tensor, embeds: Tensor, target: Tensor, weights: Tensor
    ) -> Tensor:
        """A batch's part of the step's loss, float32 ()."""
        prediction = self._answer(self._predict, noisy, timesteps, embeds)
        return (objective.squared_errors(prediction, target) * weights).sum()

    def forget_recording(self) -> bool:
        """Gives back the memory of a recorded step, and records none any more; whether there was
        one."""
        return self._recorded is not None and self._recorded.stop_recording()

    def forget_gradients(self) -> None:
        """Leaves the gradients that were added up."""
        self._optimizer.zero_grad(set_to_none=True)
        self._in_order.forget_gradients()

    @property
    def skips_overflows(self) -> bool:
        """Whether a step that overflows moves no weight: in fp16, where it happens now and then.
        When it happens too often is for `skipped_steps` to tell."""
        return self._scaler.is_enabled()

    def make_step(self, step: int, rates: Sequence[float]) -> Tensor:
        """Moves the weights. The gradients' norm before clipping: float32 () on the device, since
        reading it would make it wait."""
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._in_order.take_gradients()
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._has_stepped = True
        self.forget_gradients()
        if self._average is not None:
            self._average.update(step)
        if self.skips_overflows:
            skipped = ~torch.isfinite(norm)
            self._skipped += skipped
            self._skipped_in_a_row = (self._skipped_in_a_row + 1) * skipped
        return norm

    def skipped_steps(self) -> tuple[int, int]:
        """How many steps fp16's scaler left out because gradients overflowed: in all, and now in a
        row. Reading it makes the device wait."""
        return int(self._skipped), int(self._skipped_in_a_row)

    def scale(self) -> float:
        """By what fp16's scaler multiplies the loss now; 1 in other precisions. Reading it makes
        the device wait."""
        return self._scaler.get_scale()

    def _answer(
        self, predict: Callable[..., Any], latents: Tensor, timestep: Tensor, embeds: Tensor
    ) -> Tensor:
        with self._autocast():
            return predict(latents, timestep, embeds, return_dict=False)[0]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32)

    # -- looking ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def as_finished(self) -> Iterator[None]:
        """While inside, the models are as they would be left if the run ended now."""
        for model in self.models.values():
            model.eval()
        try:
            with torch.no_grad(), self._averaged(), self._as_written():
                yield
        finally:
            for model in self.models.values():
                model.train()

    def errors_of(self, batch: Batch) -> Tensor:
        """float32 (batch,): each sample's squared error now."""
        on_device = batch.to(self.device, self._layout)
        with self._autocast():
            embeds = self._texts_now(batch.texts)
        prediction = self._answer(self._unet, on_device.noisy, on_device.timesteps, embeds)
        return objective.squared_errors(prediction, on_device.target)

    def predict(self, latents: Tensor, timestep: Tensor, texts: Sequence[str]) -> Tensor:
        """What the U-Net predicts now, in the shape of the latents (batch, channels, h, w)."""
        with self._autocast():
            embeds = self._texts_now(texts)
        return self._answer(self._unet, latents, timestep, embeds)

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return self._average.applied() if self._average else contextlib.nullcontext()

    def _as_written(self) -> contextlib.AbstractContextManager[Any]:
        """While inside, blocks that are compiled in their place run as if they were not: else they
        would be compiled anew for what is only looked at."""
        in_place = self.settings.compile and self.settings.compile_blocks
        return torch.compiler.set_stance("force_eager") if in_place else contextlib.nullcontext()

    # -- saving -----------------------------------------------------------------------------------

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """A copy of the trained weights as they are now, by model and name, on the CPU."""
        return {
            name: {key: p.detach().to("cpu", copy=True) for key, p in group.items()}
            for name, group in self.named.items()
        }

    def state(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """Tensors by file and name, and JSON values; `restore` is the inverse."""
        optimizer, tensors = pack(self._optimizer.state_dict())
        average = self._average.average if self._average else []
        return (
            {
                **self.named,
                "optimizer": tensors,
                "average": {str(place): value for place, value in enumerate(average)},
            },
            {
                "optimizer": optimizer,
                "scaler": self._scaler.state_dict(),
                "skipped": self.skipped_steps(),
                "channels_last": self._layout == torch.channels_last,
            },
        )

    @torch.no_grad()
    def restore(self, saved: Save, *, of_another_run: bool = False) -> None:
        """Takes up what was saved. Of a run with other settings, what these decide stays."""
        self.restore_weights(saved)
        state = unpack(saved.state["optimizer"], saved.tensors("optimizer"))
        scaler = saved.state["scaler"]
        before = saved_layout(saved)
        if before not in (None, self._layout):
            if self.settings.optimizer == "adamw_8bit":
                raise TrainingError(
                    f"{saved.folder}: 8-bit AdamW's state was saved with training.channels_last = "
                    f"{str(before == torch.channels_last).lower()}; set it so to go on from there"
                )
            self._in_order.reordered(state["state"], cast(torch.memory_format, before))
        if of_another_run:
            state["param_groups"] = self._optimizer.state_dict()["param_groups"]
            scaler = scaler or self._scaler.state_dict()  # empty where it was not in use
        self._optimizer.load_state_dict(state)
        self._scaler.load_state_dict(scaler)
        skipped, in_a_row = saved.state.get("skipped", (0, 0))  # older saves did not count
        self._skipped.fill_(skipped)
        self._skipped_in_a_row.fill_(in_a_row)
        if self._average is not None:
            averages = saved.tensors("average") or self._average.parameters_by_place()
            for place, value in enumerate(self._average.average):
                value.copy_(averages[str(place)])

    @torch.no_grad()
    def restore_weights(self, saved: Save) -> None:
        """Copies saved weights into the parameters, whose memory layout stays."""
        for name, group in self.named.items():
            tensors = saved.tensors(name)
            for key, parameter in group.items():
                parameter.copy_(tensors[key])

    def finish(self) -> None:
        """Leaves the weights as the finished model has them, and what is still to be computed of
        them whole: LoRA is merged once."""
        torch.backends.cuda.matmul.allow_tf32 = False
        if self._average is not None:
            self._average.copy_to_parameters()


def saved_layout(saved: Save) -> torch.memory_format | None:
    """The memory layout of the weights that a save is of; None where an older one does not tell."""
    channels_last = saved.state.get("channels_last")
    if channels_last is None:
        return None
    return torch.channels_last if channels_last else torch.contiguous_format


def length_remarks(tokens_of: Tokens, texts: Collection[str]) -> Iterator[str]:
    """A sentence where the text encoder does not read captions to their end."""
    too_long = tokens_of.too_long(texts)
    if too_long:
        yield (
            f"{len(too_long)} of {len(texts)} captions have more tokens than the "
            f"{tokens_of.length} that the text encoder reads, start and end included, and are "
            f'cut, such as "{shorten(too_long[0], 60)}"'
        )


def precision_remarks(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """A sentence where the device computes slowly in a run's precision."""
    if dtype == torch.float16 and device.type == "cpu":
        yield "fp16 on a CPU is slow; training.mixed_precision = bf16 or fp32 is quicker there"
    emulated = dtype == torch.bfloat16 and device.type == "cuda"
    if emulated and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield (
            "this GPU is older than Ampere and only emulates bf16, which is slow; "
            "training.mixed_precision = fp16 is quicker here"
        )


def compiled(model: Callable[..., Any], *, each_shape: bool) -> Callable[..., Any]:
    """The model, compiled when it is first called.

    each_shape: anew for each shape and size of a batch, however many there are. Otherwise the
    second one has it compiled for all.
    """
    if not each_shape:
        return torch.compile(model)
    _lift_compile_limits()
    return torch.compile(model, dynamic=False)


def compile_blocks(unet: UNet2DConditionModel, *, each_shape: bool) -> None:
    """Has the U-Net's transformer blocks compiled in their place when they are first called; one
    serves all others of its width. each_shape: as in `compiled`."""
    _lift_compile_limits()  # else the last widths would run as they are
    unet.compile_repeated_blocks(dynamic=False if each_shape else None)


def _lift_compile_limits() -> None:
    """They are those of the whole process, and beyond them torch would compile no more."""
    torch._dynamo.config.recompile_limit = sys.maxsize
    torch._dynamo.config.accumulated_recompile_limit = sys.maxsize


@contextlib.contextmanager
def _compile_hint() -> Iterator[None]:
    """What torch.compile cannot do becomes a sentence that names the setting."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        yield
    except (TorchDynamoException, CppCompileError, InvalidCxxCompiler) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TrainingError(
            f"training.compile: the models cannot be compiled ({reason[0][:_LONGEST_REASON]}); "
            "install a C++ compiler (g++), on a GPU with Triton, or set it to false"
        ) from error
