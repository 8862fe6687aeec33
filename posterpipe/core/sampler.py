"""Drawing a prompt suite with a Stable Diffusion model.

What belongs here: the sampler (prompts and seeds to images), the keys that say which pixels are
meant, and the table of generations over the store. What does not: the suite (`prompts`), scoring
(`metrics`), titles set in type, training.

The four variants of the study differ in the model (base or tuned) and in the negative prompt; an
image's noise depends on its seed alone, so that variants can be compared in pairs.
"""

from __future__ import annotations

import inspect
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from posterpipe.core.models import ModelMissing, best_device, quiet_hub, torch_dtype
from posterpipe.core.progress import Progress
from posterpipe.core.prompts import Prompt, suite_prompts
from posterpipe.core.store import Store, compute_missing, content_key
from posterpipe.settings import Precision, SamplerSettings

if TYPE_CHECKING:
    from torch import Tensor

VARIANTS = ("sd", "sd_negative", "dreambooth", "dreambooth_negative")
"""The base model and the tuned one, each without and with the suite's negative prompts."""

BASE_VARIANTS, TUNED_VARIANTS = VARIANTS[:2], VARIANTS[2:]

SAMPLER_VERSION = 1
"""Raised when the same settings would give other pixels; part of every pixel key."""

COLUMNS = (
    "generation_key", "pixel_key", "variant", "prompt_id", "prompt", "score_text",
    "negative_prompt", "title", "seed", "checkpoint_id", "image", "image_path", "status", "reason",
    "width", "height", "settings",
)  # fmt: skip
"""Columns of the table of generations; status is ok, blocked (drawn, but black or of one colour)
or failed (not drawn: `image` and `image_path` are empty)."""

_A1111_SAMPLERS = {"dpmsolver++": "DPM++ 2M", "ddim": "DDIM", "euler": "Euler"}

# Steps on latents are cheap; decoding needs about 1 GB for 512 x 512 pixels in fp32, so large
# images are decoded one by one and small ones together.
_DECODED_PIXELS = 512 * 512

_CACHED_TEXTS = 256


class SamplerError(RuntimeError):
    """Nothing could be drawn. The message names the model or setting and says what to do."""


@dataclass(frozen=True)
class ImageRequest:
    """One image: `negative` may be "", `seed` fixes the noise."""

    prompt: str
    negative: str
    seed: int


def pixel_key(model_id: str, request: ImageRequest, settings: SamplerSettings) -> str:
    """Key of everything that decides an image's pixels, the batch it is drawn in left out."""
    return content_key(
        "pixels",
        SAMPLER_VERSION,
        model_id,
        request.prompt,
        request.negative,
        request.seed,
        pixel_settings(settings),
    )


def pixel_settings(settings: SamplerSettings) -> dict[str, Any]:
    """The settings that decide pixels, with the precision that this machine uses."""
    values = settings.model_dump(mode="json", exclude={"batch_size"})
    return {**values, "precision": usable_precision(settings.precision)}


def generation_key(
    pixel_key: str, variant: str, prompt_id: str, score_text: str, title: str
) -> str:
    """Key of an image in its place in the study: one row of the table of generations."""
    return content_key("generation", pixel_key, variant, prompt_id, score_text, title)


def usable_precision(precision: Precision) -> Precision:
    """fp16 becomes fp32 where there is no GPU: CPUs compute it slowly, or not at all."""
    if precision != "fp16":
        return precision  # asked first, since importing torch costs seconds
    return "fp32" if best_device().type == "cpu" else "fp16"


def initial_latents(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise, float32 (len(seeds), channels, height, width) on the CPU.

    Each image's noise comes from a generator of its own, so it is the same in every batch, for
    every variant and on every device. `shape` is (channels, height, width) of the latents.
    """
    import torch

    return torch.stack(
        [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    )


def text_limit(model_dir: Path) -> tuple[Callable[[str], int], int]:
    """How the model counts tokens, and how many it reads; both without start and end token.

    Made for `prompts.load_suite(path, count_tokens=..., max_tokens=...)`.
    """
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(_model(model_dir) / "tokenizer")

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    return count, int(tokenizer.model_max_length) - 2


class Sampler:
    """Draws images in batches with the model in a diffusers directory. Made once, called often.

    Works for every `StableDiffusionPipeline` of one text encoder (1.x, 2.x, the starter model); the
    prediction type and the noise schedule come from the model's scheduler config. Only safetensors
    are read, and no safety checker is loaded. `model_id` is the name that goes into the images.
    Raises ModelMissing.
    """

    def __init__(self, model_dir: Path, settings: SamplerSettings, *, model_id: str) -> None:
        import torch
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from diffusers.utils import logging as diffusers_logging
        from safetensors import SafetensorError
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils import logging as transformers_logging

        folder = _model(model_dir)
        quiet_hub()
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        self.settings = settings
        self.model_id = model_id
        self.batch_size = settings.batch_size
        """Images drawn at once; halved when memory runs out."""
        self.device = best_device()
        self.precision = usable_precision(settings.precision)
        # On a GPU the weights themselves are short; on a CPU autocast keeps the norms exact.
        short = self.precision if self.device.type != "cpu" else "fp32"
        self.dtype = torch_dtype(short)
        load: dict[str, Any] = {"dtype": self.dtype, "use_safetensors": True}
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
            self.text_encoder: Any = CLIPTextModel.from_pretrained(
                folder / "text_encoder", dtype=self.dtype, use_safetensors=True
            )
            self.unet: Any = UNet2DConditionModel.from_pretrained(folder / "unet", **load)
            self.vae: Any = AutoencoderKL.from_pretrained(folder / "vae", **load)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelMissing(
                f"{folder}: the model cannot be loaded ({_first_line(error)}); it must be a "
                "Stable Diffusion directory with safetensors: fetch or train it again"
            ) from error
        for model in (self.text_encoder, self.unet, self.vae):
            model.requires_grad_(False).eval().to(self.device)
        # Convolutions over channels-last images are the quicker ones on CPUs and GPUs alike.
        self.unet.to(memory_format=torch.channels_last)
        self.vae.to(memory_format=torch.channels_last)
        self.scheduler = _scheduler(folder, settings.scheduler)
        shrink = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latent_shape = (
            int(self.unet.config.in_channels),
            settings.height // shrink,
            settings.width // shrink,
        )
        self._text_embeds = lru_cache(_CACHED_TEXTS)(self._encode)

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
        images: list[Image.Image] = []
        steps_done = 0
        while len(images) < len(requests):
            size = self.batch_size
            batch = list(requests[len(images) : len(images) + size])
            wanted = len(batch)
            batch += batch[-1:] * (size - wanted)
            batches_left = math.ceil((len(requests) - len(images)) / size)

            def tell(
                step: int, steps: int, left: int = batches_left, done: int = steps_done
            ) -> None:
                if on_step is not None:
                    on_step(done + step, done + steps * left)

            try:
                images += self._draw(batch, tell)[:wanted]
                steps_done += len(self.scheduler.timesteps)
            except RuntimeError as error:
                self._shrink(error)
        return images

    def _shrink(self, error: RuntimeError) -> None:
        """Halve the batch if `error` says that memory ran out; raise it otherwise."""
        import torch

        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise error
        if self.batch_size == 1:
            raise SamplerError(
                f"one image of {self.settings.width}x{self.settings.height} pixels does not fit "
                "into memory; set POSTERPIPE_SAMPLER__WIDTH and __HEIGHT lower, or on a GPU "
                "POSTERPIPE_SAMPLER__PRECISION=bf16"
            ) from error
        self.batch_size //= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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

        with torch.inference_mode(), self._autocast():
            latents = self._denoise(requests, on_step)
            return _to_images(self._decode(latents))

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
        texts = [r.prompt for r in requests]
        if guided:
            texts = [r.negative for r in requests] + texts
        embeds = torch.stack([self._text_embeds(text) for text in texts])
        self.scheduler.set_timesteps(self.settings.num_inference_steps, device=self.device)
        timesteps = self.scheduler.timesteps
        latents = initial_latents([r.seed for r in requests], self.latent_shape).to(self.device)
        latents = latents * self.scheduler.init_noise_sigma
        for step, timestep in enumerate(timesteps, start=1):
            x = self.scheduler.scale_model_input(latents, timestep)
            x = torch.cat([x, x]) if guided else x
            x = x.to(self.dtype, memory_format=torch.channels_last)
            predicted = self.unet(x, timestep, encoder_hidden_states=embeds, return_dict=False)[
                0
            ].float()
            if guided:
                without, wanted = predicted.chunk(2)
                predicted = without + scale * (wanted - without)
            # The solver computes in fp32 whatever the U-Net does.
            latents = self.scheduler.step(predicted, timestep, latents, return_dict=False)[0]
            on_step(step, len(timesteps))
        return latents

    def _decode(self, latents: Tensor) -> Tensor:
        """Pixels float32 (batch, 3, height, width) in -1..1, or NaN."""
        import torch

        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents = (latents / self.vae.config.scaling_factor + shift).to(
            self.dtype, memory_format=torch.channels_last
        )
        at_once = max(1, _DECODED_PIXELS // (self.settings.width * self.settings.height))
        parts = [self.vae.decode(part, return_dict=False)[0] for part in latents.split(at_once)]
        return torch.cat(parts).float()

    def _autocast(self) -> AbstractContextManager[Any]:
        import torch

        if self.device.type == "cpu" and self.precision == "bf16":
            return torch.autocast("cpu", torch.bfloat16)
        return nullcontext()


def _model(model_dir: Path) -> Path:
    folder = Path(model_dir)
    if not (folder / "model_index.json").is_file():
        raise ModelMissing(
            f"{folder}: no Stable Diffusion model is there (no model_index.json); materialize the "
            "asset that makes it, or set POSTERPIPE_BASE_MODEL__ID to one that exists"
        )
    return folder


def _scheduler(folder: Path, name: str) -> Any:
    """The solver, with the noise schedule of the model and the solver's own choice of timesteps.

    What else the model's config says (the spacing of another solver, say) is left out. All of them
    begin at the last timestep, as Lin et al. (2024) ask.
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
            f"({_first_line(error)}); fetch or train the model again"
        ) from error
    schedule = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
                "prediction_type", "rescale_betas_zero_snr")  # fmt: skip
    known = inspect.signature(solver.__init__).parameters
    values = {key: config[key] for key in schedule if key in config and key in known}
    if name == "dpmsolver++" and config.get("beta_schedule") == "squaredcos_cap_v2":
        # The cosine schedule ends in pure noise, where the solver's log-SNR is not bounded; this
        # is the bound that diffusers recommends.
        own = {**own, "lambda_min_clipped": -5.1}
    return solver(**values, **own)


def _to_images(pixels: Tensor) -> list[Image.Image]:
    """Images of pixels (batch, 3, height, width) in -1..1, black where one is not finite."""
    import torch

    finite = torch.isfinite(pixels).flatten(1).all(dim=1)
    pixels = torch.where(finite[:, None, None, None], pixels, -1.0)
    bytes_ = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in bytes_.permute(0, 2, 3, 1).cpu().numpy()]


def blocked_reason(image: Image.Image) -> str:
    """Why an image shows nothing, in words; "" for one that shows something."""
    extrema = image.convert("RGB").getextrema()
    ranges = [(int(low), int(high)) for low, high in extrema]  # type: ignore[misc]
    if all(high <= 4 for _, high in ranges):
        return (
            "black image: the model's numbers overflowed or say nothing; where precision is fp16, "
            "try POSTERPIPE_SAMPLER__PRECISION=bf16 or fp32"
        )
    if all(high - low <= 2 for low, high in ranges):
        return "all pixels have one colour; look at the model's training curve and samples"
    return ""


def png_bytes(image: Image.Image, parameters: str) -> bytes:
    """PNG with `parameters` as the text chunk that viewers of generated images read."""
    info = PngInfo()
    info.add_text("parameters", parameters)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def parameters_text(request: ImageRequest, settings: SamplerSettings, model_id: str) -> str:
    """How an image was made, in the form of AUTOMATIC1111's web UI. Nothing of the machine."""
    values = {
        "Steps": settings.num_inference_steps,
        "Sampler": _A1111_SAMPLERS[settings.scheduler],
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": request.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model hash": model_id[:10],
        "Precision": usable_precision(settings.precision),
        "Version": f"posterpipe sampler {SAMPLER_VERSION}",
    }
    lines = [" ".join(request.prompt.split())]
    if request.negative:
        lines.append(f"Negative prompt: {' '.join(request.negative.split())}")
    lines.append(", ".join(f"{name}: {value}" for name, value in values.items()))
    return "\n".join(lines)


def generate(
    store: Store,
    suite: Sequence[Prompt] | pd.DataFrame,
    variants: Sequence[str],
    model_dir: Path,
    model_id: str,
    settings: SamplerSettings,
    progress: Progress,
    *,
    run_id: str,
) -> pd.DataFrame:
    """The table of generations (COLUMNS): every prompt, seed and variant, drawn where missing.

    `suite` are prompts or their table; `variants` those of VARIANTS that this model serves;
    `model_id` is the model's fingerprint or the checkpoint's id, under which its images are kept.
    The model is loaded only if something is missing. Finished images are kept when a run is
    stopped. A batch that fails is drawn again one by one; an image that still fails is a row with
    status failed and is tried again next time. Raises SamplerError when every image fails, and
    ModelMissing.
    """
    prompts = suite_prompts(suite) if isinstance(suite, pd.DataFrame) else list(suite)
    unknown = sorted(set(variants) - set(VARIANTS))
    if unknown:
        raise ValueError(f"unknown variants {unknown}; choose from {', '.join(VARIANTS)}")
    cells = [
        (prompt, variant, ImageRequest(prompt.prompt, _negative(prompt, variant), seed))
        for prompt in prompts
        for seed in prompt.seeds
        for variant in variants
    ]
    # An empty negative prompt asks for the very image of the variant without: drawn once.
    keys = {request: pixel_key(model_id, request, settings) for _, _, request in cells}
    drawing = _Drawing(store, model_dir, model_id, settings, progress, run_id)
    requests = {key: request for request, key in keys.items()}
    drawn = compute_missing(
        store,
        "generation",
        list(requests),
        lambda missing: drawing.draw({key: requests[key] for key in missing}),
        usable=lambda row: store.has(row["image"], ".png"),
    )
    recorded = json.dumps(pixel_settings(settings), sort_keys=True)
    rows = []
    for prompt, variant, request in cells:
        key = keys[request]
        image = drawn.get(key) or {
            "image": "",
            "status": "failed",
            "reason": drawing.failed.get(key, "not drawn; materialize again"),
        }
        blob = image["image"]
        rows.append(
            {
                "generation_key": generation_key(
                    key, variant, prompt.prompt_id, prompt.score_text, prompt.title
                ),
                "pixel_key": key,
                "variant": variant,
                "prompt_id": prompt.prompt_id,
                "prompt": prompt.prompt,
                "score_text": prompt.score_text,
                "negative_prompt": request.negative,
                "title": prompt.title,
                "seed": request.seed,
                "checkpoint_id": model_id,
                "image": blob,
                "image_path": _relative(store, blob) if blob else "",
                "status": image["status"],
                "reason": image["reason"],
                "width": settings.width,
                "height": settings.height,
                "settings": recorded,
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _negative(prompt: Prompt, variant: str) -> str:
    return prompt.negative if variant.endswith("_negative") else ""


def _relative(store: Store, blob: str) -> str:
    return store.path(blob, ".png").relative_to(store.root).as_posix()


class _Drawing:
    """The missing images of one call of `generate`."""

    def __init__(
        self,
        store: Store,
        model_dir: Path,
        model_id: str,
        settings: SamplerSettings,
        progress: Progress,
        run_id: str,
    ) -> None:
        self.store = store
        self.model_dir = model_dir
        self.model_id = model_id
        self.settings = settings
        self.progress = progress
        self.run_id = run_id
        self.failed: dict[str, str] = {}

    def draw(self, missing: dict[str, ImageRequest]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(pixel key, result) as images are done; PNGs are written while the next are drawn."""
        sampler = Sampler(self.model_dir, self.settings, model_id=self.model_id)
        keys = list(missing)
        description = f"Drawing {len(keys)} images"
        writing: list[Future[tuple[str, dict[str, Any]]]] = []
        with (
            self.progress.task(description, total=len(keys), unit="images") as tick,
            ThreadPoolExecutor(1) as pool,
        ):
            while keys:
                batch, keys = keys[: sampler.batch_size], keys[sampler.batch_size :]
                try:
                    images = self._try(sampler, {key: missing[key] for key in batch})
                finally:
                    # Also when the drawing is stopped: the batch before is done and is kept.
                    for future in writing:
                        yield future.result()
                writing = [
                    pool.submit(self._keep, key, missing[key], image)
                    for key, image in images.items()
                ]
                tick(len(batch))
            for future in writing:
                yield future.result()
        if self.failed and len(self.failed) == len(missing):
            raise SamplerError(
                f"{self.model_dir}: not one of {len(missing)} images could be drawn "
                f"({next(iter(self.failed.values()))}); mend the model or POSTERPIPE_SAMPLER__*"
            )

    def _try(self, sampler: Sampler, requests: dict[str, ImageRequest]) -> dict[str, Image.Image]:
        try:
            return dict(zip(requests, sampler(list(requests.values())), strict=True))
        except Exception as error:
            if len(requests) == 1:
                self.failed[next(iter(requests))] = _first_line(error)
                return {}
        # One of them is the culprit; the others need not suffer.
        images: dict[str, Image.Image] = {}
        for key, request in requests.items():
            images |= self._try(sampler, {key: request})
        return images

    def _keep(
        self, key: str, request: ImageRequest, image: Image.Image
    ) -> tuple[str, dict[str, Any]]:
        text = parameters_text(request, self.settings, self.model_id)
        reason = blocked_reason(image)
        row = {
            "image": self.store.put(png_bytes(image, text), ".png"),
            "status": "blocked" if reason else "ok",
            "reason": reason,
            "run_id": self.run_id,
        }
        return key, row


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"
