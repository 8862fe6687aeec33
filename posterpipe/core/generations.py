"""The images of a prompt suite: what each is known by, and their table.

What belongs here: the keys that name the pixels of an image, the table of generations over the
store, and the PNGs, which record how they were made. What does not: the suite (`prompts`), the
model that draws (`sampler`), scoring (`metrics`), titles set in type.

The four variants of the thesis differ in the model (base or tuned) and in the negative prompt; an
image's noise depends on its seed alone, so that variants can be compared in pairs. A suite may hold
one variant more of each model: the negative prompt delayed. What is to be left out has no shape in
the first steps, and pushing away from its words then can draw it in; later it is there to be
removed (Ban et al. 2024, arXiv:2406.02965).
"""

from __future__ import annotations

import datetime as dt
import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from posterpipe.core.devices import (
    DeviceGone,
    best_device,
    give_memory_back,
    noticing_a_gone_device,
    usable_precision,
)
from posterpipe.core.errors import named_line
from posterpipe.core.memory import TOO_LITTLE_MEMORY, doubt, is_out_of_memory
from posterpipe.core.parallel import cores
from posterpipe.core.progress import Progress
from posterpipe.core.prompts import Prompt, too_late
from posterpipe.core.provenance.environments import record_environment
from posterpipe.core.sampler import (
    FP32_VERSION,
    SAMPLER_VERSION,
    SHORT_LORA_VERSION,
    ImageRequest,
    Sampler,
    SamplerError,
    lora_weights,
)
from posterpipe.core.store import Store, compute_missing, content_key
from posterpipe.core.variants import DELAYED_VARIANTS, VARIANTS
from posterpipe.settings import SAMPLING_SPEED, SamplerSettings

COLUMNS = (
    "generation_key", "pixel_key", "variant", "prompt_id", "prompt", "score_text",
    "negative_prompt", "title", "seed", "checkpoint_id", "image", "image_path", "status", "reason",
    "width", "height", "settings",
)  # fmt: skip
"""Columns of the table of generations; status is ok, blocked (drawn, but black or of one colour)
or failed (not drawn: `image` and `image_path` are empty)."""

GENERATION = "generation"
"""Kind of the drawn images among the store's results, by pixel key."""

_A1111_NEGATIVE = "Negative prompt:"

_A1111_SAMPLERS = {"dpmsolver++": "DPM++ 2M", "ddim": "DDIM", "euler": "Euler"}

_WRITERS = 4
"""Threads that write PNGs: one takes a tenth of a second for 512 pixels, as a fast GPU does."""

_SAMPLER = "the sampler"


def pixel_key(
    model_id: str, request: ImageRequest, settings: SamplerSettings, *, lora: bool = False
) -> str:
    """Key of everything that decides an image's pixels, the batch it is drawn in left out.

    `lora`: whether the model is LoRA weights that are added to another one.
    """
    short = usable_precision(settings.precision) != "fp32"
    delayed = request.negative and request.negative_from > 0
    return content_key(
        "pixels",
        SAMPLER_VERSION,
        model_id,
        request.prompt,
        request.negative,
        request.seed,
        pixel_settings(settings),
        *([request.negative_from] if delayed else []),
        *([SHORT_LORA_VERSION] if short and lora else []),
        *([] if short else [FP32_VERSION]),
    )


def pixel_settings(settings: SamplerSettings) -> dict[str, Any]:
    """The settings that decide pixels, with the precision that this machine uses; when the negative
    prompt acts is a matter of each request."""
    values = settings.model_dump(mode="json", exclude={*SAMPLING_SPEED, "negative_from"})
    return {**values, "precision": usable_precision(settings.precision)}


def generation_key(
    pixel_key: str, variant: str, prompt_id: str, score_text: str, title: str
) -> str:
    """Key of an image in its place in the suite: one row of the table of generations."""
    return content_key("generation", pixel_key, variant, prompt_id, score_text, title)


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


def png_with_parameters(image: Image.Image, parameters: str) -> bytes:
    """PNG with `parameters` as the text chunk that viewers of generated images read."""
    info = PngInfo()
    info.add_text("parameters", parameters)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def parameters_text(request: ImageRequest, settings: SamplerSettings, model_id: str) -> str:
    """How an image was made, in the form of AUTOMATIC1111's web UI. Nothing of the machine.

    Prompt and negative prompt are a line each, as programs that read this form expect.
    """
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
    if request.negative and request.negative_from > 0:
        values["Negative from"] = f"{request.negative_from:g}"
    prompt = " ".join(request.prompt.split())
    if prompt.startswith(_A1111_NEGATIVE):
        # Readers would take it for the other line, which they know by this very spelling. In small
        # letters it is the same prompt, since CLIP reads no capitals.
        prompt = prompt[0].lower() + prompt[1:]
    lines = [prompt]
    if request.negative:
        lines.append(f"{_A1111_NEGATIVE} {' '.join(request.negative.split())}")
    lines.append(", ".join(f"{name}: {value}" for name, value in values.items()))
    return "\n".join(lines)


def generate(
    store: Store,
    suite: Sequence[Prompt],
    variants: Sequence[str],
    model_dir: Path,
    model_id: str,
    settings: SamplerSettings,
    progress: Progress,
    *,
    run_id: str,
    base_dir: Path | None = None,
) -> pd.DataFrame:
    """The table of generations (COLUMNS): every prompt, seed and variant, drawn where missing.

    `variants` are those of VARIANTS and DELAYED_VARIANTS that this model serves, the latter for
    prompts that hold them; `base_dir` is the model behind LoRA weights (see `Sampler`); `model_id`
    is the model's fingerprint or the checkpoint's id, under which its images are kept. The model is
    loaded only if something is missing. Finished images are kept when a run is stopped; the next
    one draws the others to the same bytes, unless the batch has another size then, since it was
    found by trial or memory ran out: that rounds pixels otherwise. A batch that fails is drawn
    again one by one; an image that still fails is a row with status failed and is tried again next
    time. One whose negative prompt would never act, since the sampler makes fewer steps than when
    the suite was read, is such a row and is not drawn. Raises SamplerError when there is no image
    at all then, DeviceGone where no further one can be drawn, and ModelMissing.
    """
    known = (*VARIANTS, *DELAYED_VARIANTS)
    unknown = sorted(set(variants) - set(known))
    if unknown:
        raise ValueError(f"unknown variants {unknown}; choose from {', '.join(known)}")
    cells = [
        (prompt, variant, _request(prompt, variant, seed, settings))
        for prompt in suite
        for seed in prompt.seeds
        for variant in variants
        if variant not in DELAYED_VARIANTS or prompt.negative_from is not None
    ]
    # An empty negative prompt asks for the very image of the variant without: drawn once.
    lora = lora_weights(model_dir) is not None
    keys = {request: pixel_key(model_id, request, settings, lora=lora) for _, _, request in cells}
    drawing = _Drawing(store, model_dir, model_id, settings, progress, run_id, base_dir)
    # Refused here as well: a suite is not read again when the sampler's steps change.
    late = {
        keys[request]: f"the prompt {prompt.prompt_id} of the suite: {why}"
        for prompt, _, request in cells
        if request.negative and (why := too_late(request.negative_from, settings))
    }
    requests = {key: request for request, key in keys.items() if key not in late}
    drawn = compute_missing(
        store,
        GENERATION,
        list(requests),
        lambda missing: drawing.draw({key: requests[key] for key in missing}),
        save_every=1,  # an image costs a hundred times as much as saving its row
        usable=lambda row: store.has(row["image"], ".png"),
    )
    if drawing.failed and not drawn:
        raise SamplerError(
            f"{model_dir}: not one of {len(requests)} images could be drawn "
            f"({next(iter(drawing.failed.values()))}); mend the model or POSTERPIPE_SAMPLER__*"
        )
    rows = []
    for prompt, variant, request in cells:
        key = keys[request]
        image = drawn.get(key) or {
            "image": "",
            "status": "failed",
            "reason": late.get(key) or drawing.failed.get(key, "not drawn; materialize again"),
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
                "image_path": store.relative(blob, ".png") if blob else "",
                "status": image["status"],
                "reason": image["reason"],
                "width": settings.width,
                "height": settings.height,
                "settings": _recorded_settings(request, settings),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _request(prompt: Prompt, variant: str, seed: int, settings: SamplerSettings) -> ImageRequest:
    if "_negative" not in variant or not prompt.negative:
        return ImageRequest(prompt.prompt, "", seed)
    start = prompt.negative_from if variant in DELAYED_VARIANTS else settings.negative_from
    return ImageRequest(prompt.prompt, prompt.negative, seed, start or 0.0)


def _recorded_settings(request: ImageRequest, settings: SamplerSettings) -> str:
    """What decided the pixels beside model, texts and seed, as JSON."""
    values = pixel_settings(settings)
    if request.negative and request.negative_from > 0:
        values["negative_from"] = request.negative_from
    return json.dumps(values, sort_keys=True)


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
        base_dir: Path | None,
    ) -> None:
        self.store = store
        self.model_dir = model_dir
        self.model_id = model_id
        self.settings = settings
        self.progress = progress
        self.run_id = run_id
        self.base_dir = base_dir
        self.environment = ""
        self.failed: dict[str, str] = {}

    def draw(self, missing: dict[str, ImageRequest]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(pixel key, result) as images are done; PNGs are written while the next are drawn."""
        keys = list(missing)
        with noticing_a_gone_device(_SAMPLER, best_device()):
            sampler = Sampler(
                self.model_dir, self.settings, model_id=self.model_id, base_dir=self.base_dir
            )
            sampler.settle_batch_size(len(keys))
        self.environment = record_environment(self.store)
        description = f"Drawing {len(keys)} images"
        writing: list[Future[tuple[str, dict[str, Any]]]] = []
        with (
            self.progress.task(description, total=len(keys), unit="images") as tick,
            ThreadPoolExecutor(min(_WRITERS, cores())) as pool,
        ):
            while keys:
                batch, keys = keys[: sampler.batch_size], keys[sampler.batch_size :]
                before, writing = writing, []
                try:
                    for key, image in self._try(sampler, {key: missing[key] for key in batch}):
                        writing.append(pool.submit(self._keep, key, missing[key], image))
                except BaseException:  # stopped by a person, perhaps: what is done is kept
                    for future in (*before, *writing):
                        yield future.result()
                    raise
                for future in before:
                    yield future.result()
                tick(len(batch))
            for future in writing:
                yield future.result()
        del sampler
        give_memory_back()

    def _try(
        self, sampler: Sampler, requests: dict[str, ImageRequest]
    ) -> Iterator[tuple[str, Image.Image]]:
        """(pixel key, image) of those that can be drawn. Raises DeviceGone."""
        try:
            with noticing_a_gone_device(_SAMPLER, sampler.device):
                images = sampler(list(requests.values()))
        except DeviceGone:
            raise
        except Exception as error:
            if len(requests) == 1:
                self.failed[next(iter(requests))] = _why_not_drawn(error)
                return
        else:
            yield from zip(requests, images, strict=True)
            return
        # One of them is the culprit; the others need not suffer. Each is drawn alone, not beside
        # copies of itself: a whole batch may be what fails, in words that nobody knew.
        size, sampler.batch_size = sampler.batch_size, 1
        for key, request in requests.items():
            yield from self._try(sampler, {key: request})
        sampler.batch_size = size

    def _keep(
        self, key: str, request: ImageRequest, image: Image.Image
    ) -> tuple[str, dict[str, Any]]:
        text = parameters_text(request, self.settings, self.model_id)
        reason = blocked_reason(image)
        row = {
            "image": self.store.put(png_with_parameters(image, text), ".png"),
            "status": "blocked" if reason else "ok",
            "reason": reason,
            "run_id": self.run_id,
            "environment": self.environment,
            "drawn_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        }
        return key, row


def _why_not_drawn(error: Exception) -> str:
    """In words that are the same each time that it fails."""
    if is_out_of_memory(error) and not isinstance(error, SamplerError):  # it may quote such words
        return TOO_LITTLE_MEMORY + doubt(error)
    return named_line(error)
