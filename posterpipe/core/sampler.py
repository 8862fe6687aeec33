"""Drawing with a Stable Diffusion model.

What belongs here: the sampler (prompts and seeds to images), the noise it begins with, its solver,
and LoRA weights that are added to a model. What does not: the images of a suite, their keys and
their table (`generations`), scoring (`metrics`), titles set in type, training.
"""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from posterpipe.core.devices import (
    best_device,
    computing_in,
    memory_layout,
    torch_dtype,
    usable_precision,
)
from posterpipe.core.errors import named_line
from posterpipe.core.memory import doubt, is_out_of_memory
from posterpipe.core.models import ModelMissing, cached_snapshot, is_on_hub, locate, quiet_hub
from posterpipe.core.prompts import TextLimit
from posterpipe.core.weights import load_weights
from posterpipe.settings import ModelRef, SamplerSettings

if TYPE_CHECKING:
    from torch import Tensor

SAMPLER_VERSION = 1
"""Raised when the same settings would give other pixels; part of every pixel key."""

FP32_VERSION = "the same fp32 on every device"
"""Changed when fp32, and no shorter precision, would give other pixels."""

SHORT_LORA_VERSION = "LoRA added in fp32"
"""Changed when LoRA weights would be added otherwise to a model that draws in bf16 or fp16."""

# Steps on latents are cheap; decoding needs about 1 GB for 512 x 512 pixels in fp32, so large
# images are decoded one by one and small ones together.
_DECODED_PIXELS = 512 * 512

_CACHED_TEXTS = 256

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"

ZERO_TERMINAL_SNR = "zero_terminal_snr"
"""In the header of LoRA weights, "true" where they were trained on a noise schedule that ends in
pure noise; there is no scheduler's config beside them that could say so."""

MOST_AT_ONCE = 64
"""Images that a batch found by trial holds at most: beyond, a GPU gains nothing more."""

_WORTH_DOUBLING = 0.95
"""A doubled batch has to bring the time of one image below this share."""


class SamplerError(RuntimeError):
    """Nothing could be drawn. The message names the model or setting and says what to do."""


@dataclass(frozen=True)
class ImageRequest:
    """One image: `negative` may be "", `seed` fixes the noise.

    `negative_from` (0 to 1): the share of the steps before the negative prompt acts; until then
    the empty one stands in its place.
    """

    prompt: str
    negative: str
    seed: int
    negative_from: float = 0.0


def initial_latents(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise, float32 (len(seeds), channels, height, width) on the CPU.

    Each image's noise comes from a generator of its own, so it is the same in every batch, for
    every variant and on every device. `shape` is (channels, height, width) of the latents.
    """
    import torch

    return torch.stack(
        [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    )


def text_limit(model_dir: Path) -> TextLimit:
    """How the model counts tokens, and how many it reads. Raises ModelMissing."""
    from transformers import CLIPTokenizer

    folder = _model(model_dir) / "tokenizer"
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises whatever its readers raise
        raise ModelMissing(
            f"{folder}: the tokenizer cannot be loaded ({named_line(error)}); fetch or train the "
            "model again"
        ) from error
    # What `tokenizer(text)` asks as well; its own bookkeeping takes four times as long. A tokenizer
    # that was saved after use may fill up or cut every text to the model's length.
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()

    def count(text: str) -> int:
        return len(backend.encode(text, add_special_tokens=False))

    return count, int(tokenizer.model_max_length) - 2


def known_text_limit(ref: ModelRef, root: Path) -> TextLimit | None:
    """The `text_limit` of a model that is on this machine; None where it is not, or is not whole,
    which is told by whatever draws with it."""
    try:
        folder = cached_snapshot(ref) if is_on_hub(ref, root) else locate(ref, root)
        return None if folder is None else text_limit(folder)
    except ModelMissing:
        return None


class Sampler:
    """Draws images in batches with the model in a diffusers directory. Made once, called often.

    Works for every `StableDiffusionPipeline` of one text encoder (1.x, 2.x, the starter model); the
    prediction type and the noise schedule come from the model's scheduler config. `model_dir` may
    also hold LoRA weights alone (`pytorch_lora_weights.safetensors`); then `base_dir` is the model
    that they belong to, and they are added to it in fp32 whatever the precision is: what they
    change is often less than the last digit of a short number. Its noise schedule then ends in pure
    noise where their header says so (`ZERO_TERMINAL_SNR`). Only safetensors are read, and no safety
    checker is loaded. `model_id` is the name that goes into the images. Raises ModelMissing.
    """

    def __init__(
        self,
        model_dir: Path,
        settings: SamplerSettings,
        *,
        model_id: str,
        base_dir: Path | None = None,
    ) -> None:
        import torch
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from diffusers.utils import logging as diffusers_logging
        from safetensors import SafetensorError
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils import logging as transformers_logging

        lora = lora_weights(model_dir)
        if lora and base_dir is None:
            raise ModelMissing(
                f"{lora}: LoRA weights alone draw nothing; name the directory of the model that "
                "they were trained on as well"
            )
        folder = _model(base_dir if lora and base_dir else model_dir)
        quiet_hub()
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        self.settings = settings
        self.model_id = model_id
        self.batch_size = settings.batch_size
        """Images drawn at once; 0 until it is found, halved when memory runs out."""
        self.device = best_device()
        self.precision = usable_precision(settings.precision)
        # On a GPU the weights themselves are short; on a CPU autocast keeps the norms exact.
        short = self.precision if self.device.type != "cpu" else "fp32"
        self.dtype = torch_dtype(short)
        added_to = torch.float32 if lora else self.dtype
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
            self.text_encoder: Any = load_weights(
                CLIPTextModel, folder / "text_encoder", dtype=added_to
            )
            self.unet: Any = load_weights(UNet2DConditionModel, folder / "unet", dtype=added_to)
            self.vae: Any = load_weights(AutoencoderKL, folder / "vae", dtype=self.dtype)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelMissing(
                f"{folder}: the model cannot be loaded ({named_line(error)}); it must be a "
                "Stable Diffusion directory with safetensors: fetch or train it again"
            ) from error
        if lora:
            self._merge(lora)
            self.text_encoder.to(self.dtype)
            self.unet.to(self.dtype)
        for model in (self.text_encoder, self.unet, self.vae):
            model.requires_grad_(False).eval().to(self.device)
        self.layout = memory_layout(settings.channels_last, self.device, compiled=settings.compile)
        self.unet.to(memory_format=self.layout)
        self.vae.to(memory_format=self.layout)
        # Compiled at the first call and again for every other shape, minutes each: one shape draws.
        self._predict: Any = (
            torch.compile(self.unet, dynamic=False) if settings.compile else self.unet
        )
        to_noise = lora is not None and _trained_to_pure_noise(lora)
        self.scheduler = make_scheduler(folder, settings.scheduler, zero_terminal_snr=to_noise)
        shrink = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latent_shape = (
            int(self.unet.config.in_channels),
            settings.height // shrink,
            settings.width // shrink,
        )
        # A plain dict: lru_cache around a method would be a cycle of references, and the model's
        # gigabytes would stay until the garbage collector happens to come by.
        self._embeds: dict[str, Tensor] = {}

    def __call__(
        self,
        requests: Sequence[ImageRequest],
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """The images of the requests, RGB of the settings' width and height, in their order.

        Every batch has one shape, the last one filled up, so that an image does not depend on its
        neighbours (with autocast on, not even in its last digits). `on_step(done, total)` is
        called after each step of all batches; what it raises stops the drawing. An image that is
        not finite comes back black. Raises SamplerError when one image does not fit into memory.
        """
        self.settle_batch_size(len(requests))
        images: list[Image.Image] = []
        steps_done = 0
        while len(images) < len(requests):
            size = self.batch_size
            batch = list(requests[len(images) : len(images) + size])
            wanted = len(batch)
            batch += batch[-1:] * (size - wanted)
            batches_left = math.ceil((len(requests) - len(images)) / size)
            try:
                tell = _of_all_batches(on_step, steps_done, batches_left)
                images += self._draw(batch, tell)[:wanted]
                steps_done += len(self.scheduler.timesteps)
            except RuntimeError as error:
                self._shrink(error)
        return images

    def settle_batch_size(self, images: int) -> None:
        """Finds by trial how many of `images` are best drawn at once, where no setting says.

        Times decide, so the next trial may find another size, all the more for fewer images.
        """
        if self.batch_size == 0:
            images = max(1, images)
            most = best_batch_size(self._time_a_step, min(MOST_AT_ONCE, images))
            # As many batches, as small as will do: the last one is padded.
            self.batch_size = math.ceil(images / math.ceil(images / most))

    def _time_a_step(self, size: int) -> float:
        """Seconds of one call of the U-Net for `size` images, not compiled: that is for the size
        which is found."""
        import torch

        embeds = self._text_embeds("")
        halves = 2 if self.settings.guidance_scale > 1 else 1
        x = torch.zeros(halves * size, *self.latent_shape, device=self.device)
        x = x.to(self.dtype, memory_format=self.layout)
        embeds = embeds.expand(halves * size, -1, -1)
        timestep = torch.tensor(500, device=self.device)
        took = math.inf
        with torch.inference_mode(), computing_in(self.precision, self.device):
            for _ in range(3):  # the first one prepares memory and kernels
                started = time.perf_counter()
                out = self.unet(x, timestep, encoder_hidden_states=embeds, return_dict=False)[0]
                float(out.flatten()[0])  # waits for the GPU
                took = min(took, time.perf_counter() - started)
        return took

    def _merge(self, lora: Path) -> None:
        """Adds LoRA weights to those of the U-Net and the text encoder."""
        from diffusers import DDPMScheduler, StableDiffusionPipeline
        from safetensors import SafetensorError

        pipeline: Any = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DDPMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        try:
            pipeline.load_lora_weights(lora.parent, weight_name=lora.name, use_safetensors=True)
            if not pipeline.get_list_adapters():  # diffusers only warns of names that it knows not
                raise ValueError("none of them is for a part of it")
            pipeline.fuse_lora()
        except SafetensorError as error:
            raise ModelMissing(
                f"{lora}: the LoRA weights cannot be read ({named_line(error)}); the file is "
                "damaged: fetch or train it again"
            ) from error
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelMissing(
                f"{lora}: the LoRA weights do not fit the model ({named_line(error)}); name the "
                "model that they were trained on"
            ) from error
        pipeline.unload_lora_weights()

    def _shrink(self, error: RuntimeError) -> None:
        """Halve the batch if `error` says that memory ran out; raise it otherwise."""
        import torch

        if not is_out_of_memory(error):
            raise error
        if self.batch_size == 1:
            raise SamplerError(
                f"one image of {self.settings.width}x{self.settings.height} pixels does not fit "
                f"into memory{doubt(error)}; set POSTERPIPE_SAMPLER__WIDTH and __HEIGHT lower, or "
                "on a GPU POSTERPIPE_SAMPLER__PRECISION=bf16"
            ) from error
        self.batch_size //= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _text_embeds(self, text: str) -> Tensor:
        """As `_encode`, and kept: prompts come again for every seed."""
        if text not in self._embeds:
            if len(self._embeds) >= _CACHED_TEXTS:
                self._embeds.clear()
            self._embeds[text] = self._encode(text)
        return self._embeds[text]

    def _encode(self, text: str) -> Tensor:
        """Hidden states of one text, (tokens, width). One by one: a batch's makeup would show in
        the last digits, and a suite has few texts."""
        ids = self.tokenizer(
            text,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = ids.attention_mask.to(self.device) if masked else None
        return self.text_encoder(ids.input_ids.to(self.device), attention_mask=mask)[0][0]

    def _draw(
        self,
        requests: list[ImageRequest],
        on_step: Callable[[int, int], None],
    ) -> list[Image.Image]:
        import torch

        with torch.inference_mode(), computing_in(self.precision, self.device):
            latents = self._denoise(requests, on_step)
            return to_images(self._decode(latents))

    def _denoise(
        self,
        requests: list[ImageRequest],
        on_step: Callable[[int, int], None],
    ) -> Tensor:
        """Latents float32 (batch, channels, height, width) after all steps.

        Classifier-free guidance (Ho & Salimans 2022) with the negative prompt in the place of the
        empty one; both halves go through the U-Net in one call.
        """
        import torch

        scale = self.settings.guidance_scale
        guided = scale > 1
        self.scheduler.set_timesteps(self.settings.num_inference_steps, device=self.device)
        timesteps = self.scheduler.timesteps
        texts = self._texts_at(requests, 0.0)
        embeds = torch.stack([self._text_embeds(text) for text in texts])
        latents = initial_latents([r.seed for r in requests], self.latent_shape).to(self.device)
        latents = latents * self.scheduler.init_noise_sigma
        for step, timestep in enumerate(timesteps, start=1):
            now = self._texts_at(requests, (step - 1) / len(timesteps))
            if now != texts:
                texts = now
                embeds = torch.stack([self._text_embeds(text) for text in texts])
            x = self.scheduler.scale_model_input(latents, timestep)
            x = torch.cat([x, x]) if guided else x
            x = x.to(self.dtype, memory_format=self.layout)
            predicted = self._predict(x, timestep, encoder_hidden_states=embeds, return_dict=False)[
                0
            ].float()
            if guided:
                without, wanted = predicted.chunk(2)
                predicted = without + scale * (wanted - without)
            # The solver computes in fp32 whatever the U-Net does.
            latents = self.scheduler.step(predicted, timestep, latents, return_dict=False)[0]
            on_step(step, len(timesteps))
        return latents

    def _texts_at(self, requests: Sequence[ImageRequest], done: float) -> list[str]:
        """What the U-Net reads after a share `done` of the steps: negatives, then prompts."""
        texts = [r.prompt for r in requests]
        if self.settings.guidance_scale <= 1:
            return texts
        return [r.negative if done >= r.negative_from else "" for r in requests] + texts

    def _decode(self, latents: Tensor) -> Tensor:
        """Pixels float32 (batch, 3, height, width) in -1..1, or NaN."""
        import torch

        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents = (latents / self.vae.config.scaling_factor + shift).to(
            self.dtype, memory_format=self.layout
        )
        at_once = max(1, _DECODED_PIXELS // (self.settings.width * self.settings.height))
        if self.settings.vae_slicing is not None:
            at_once = 1 if self.settings.vae_slicing else len(latents)
        parts = [self.vae.decode(part, return_dict=False)[0] for part in latents.split(at_once)]
        return torch.cat(parts).float()


def best_batch_size(seconds: Callable[[int], float], most: int) -> int:
    """The batch, doubled from 1 up to `most`, after which doubling saves less than a twentieth.

    `seconds` gives the time of a batch of that size, and may raise what says that memory ran out;
    where it does so for a single image, that is 1: who draws it says what to do.
    """
    best, an_image = 1, math.inf
    size = 1
    while size <= most:
        try:
            each = seconds(size) / size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        if each > _WORTH_DOUBLING * an_image:
            break
        best, an_image = size, each
        size *= 2
    return best


def lora_weights(model_dir: Path) -> Path | None:
    """The LoRA weights of a directory that holds no whole model, else None."""
    weights = Path(model_dir) / LORA_WEIGHTS
    whole = (Path(model_dir) / "model_index.json").is_file()
    return weights if weights.is_file() and not whole else None


def _trained_to_pure_noise(lora: Path) -> bool:
    from safetensors import safe_open

    with safe_open(lora, framework="pt") as file:
        return (file.metadata() or {}).get(ZERO_TERMINAL_SNR) == "true"


def _model(model_dir: Path) -> Path:
    folder = Path(model_dir)
    if not (folder / "model_index.json").is_file():
        raise ModelMissing(
            f"{folder}: no Stable Diffusion model is there (no model_index.json); materialize the "
            "asset that makes it, or set POSTERPIPE_BASE_MODEL__ID to one that exists"
        )
    return folder


def _of_all_batches(
    on_step: Callable[[int, int], None] | None, done: int, batches_left: int
) -> Callable[[int, int], None]:
    """`on_step` for the steps of one batch, told among those of all."""

    def tell(step: int, steps: int) -> None:
        if on_step is not None:
            on_step(done + step, done + steps * batches_left)

    return tell


def make_scheduler(folder: Path, name: str, *, zero_terminal_snr: bool = False) -> Any:
    """The solver, with the noise schedule of the model and the solver's own choice of timesteps.

    What else the model's config says (the spacing of another solver, say) is left out. All of them
    begin at the last timestep, as Lin et al. (2024) ask. `name` is `SamplerSettings.scheduler`;
    `zero_terminal_snr` rescales the schedule as if the config said so. Raises ModelMissing.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

    solvers: dict[str, tuple[Any, dict[str, Any]]] = {
        "dpmsolver++": (DPMSolverMultistepScheduler, {"timestep_spacing": "linspace"}),
        "ddim": (DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False}),
        "euler": (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    }
    solver, own = solvers[name]
    try:
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelMissing(
            f"{folder / 'scheduler' / 'scheduler_config.json'}: cannot be read "
            f"({named_line(error)}); fetch or train the model again"
        ) from error
    schedule = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
                "prediction_type", "rescale_betas_zero_snr")  # fmt: skip
    known = inspect.signature(solver.__init__).parameters
    values = {key: config[key] for key in schedule if key in config and key in known}
    if zero_terminal_snr and "rescale_betas_zero_snr" in known:
        values["rescale_betas_zero_snr"] = True
    if name == "dpmsolver++" and config.get("beta_schedule") == "squaredcos_cap_v2":
        # The cosine schedule ends in pure noise, where the solver's log-SNR is not bounded; this
        # is the bound that diffusers recommends.
        own = {**own, "lambda_min_clipped": -5.1}
    return solver(**values, **own)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Images of pixels (batch, 3, height, width) in -1..1, black where one is not finite."""
    import torch

    finite = torch.isfinite(pixels).flatten(1).all(dim=1)
    pixels = torch.where(finite[:, None, None, None], pixels, -1.0)
    bytes_ = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in bytes_.permute(0, 2, 3, 1).cpu().numpy()]
