"""The sampler, on tiny random models of the real classes."""

from __future__ import annotations

import gc
import re
import shutil
import weakref
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image
from pydantic import ValidationError

from posterpipe.core import sampler as sampler_module
from posterpipe.core.generations import blocked_reason, pixel_key
from posterpipe.core.models import ModelMissing
from posterpipe.core.prompts import PromptSuiteError, load_suite
from posterpipe.core.sampler import (
    ImageRequest,
    Sampler,
    SamplerError,
    best_batch_size,
    initial_latents,
    make_scheduler,
    text_limit,
)
from posterpipe.settings import SamplerSettings
from posterpipe_tests.core.drawing import (
    REQUESTS,
    SETTINGS,
    lora_and_merged,
    pixels,
    tf32_switches,
    with_batch,
)
from posterpipe_tests.models import (
    TINY_HEIGHT,
    TINY_TOKENS,
    TINY_WIDTH,
    build_tiny_stable_diffusion,
)


def test_noise_depends_on_the_seed_alone() -> None:
    seeds = [777, 2, 2**32 - 1, 0, 5, 6, 7, 8]
    together = initial_latents(seeds, (12, 6, 4))
    for size in (1, 3, 8):
        for start in range(0, len(seeds), size):
            part = initial_latents(seeds[start : start + size], (12, 6, 4))
            assert part.equal(together[start : start + size])
    assert not together[0].equal(together[1])
    assert together.dtype.is_floating_point and together.shape == (8, 12, 6, 4)


def test_images_do_not_depend_on_the_batch(model_dir: Path) -> None:
    by_size = {
        size: Sampler(model_dir, with_batch(size), model_id="tiny")(REQUESTS) for size in (1, 3, 8)
    }
    for size in (3, 8):
        for one, other in zip(by_size[1], by_size[size], strict=True):
            assert abs(pixels(one) - pixels(other)).max() <= 1


def test_an_image_is_the_same_to_the_bit_whatever_its_neighbours(model_dir: Path) -> None:
    sampler = Sampler(model_dir, with_batch(3), model_id="tiny")
    together = sampler(REQUESTS)
    for request, image in zip(REQUESTS, together, strict=True):
        assert (pixels(sampler([request])[0]) == pixels(image)).all()
    backwards = sampler(REQUESTS[::-1])[::-1]
    for one, other in zip(together, backwards, strict=True):
        assert (pixels(one) == pixels(other)).all()


def diffusers_image(pipeline: Any, request: ImageRequest) -> Image.Image:
    """What a pipeline of diffusers draws by the settings of these tests."""
    return pipeline(
        request.prompt,
        negative_prompt=request.negative,
        latents=initial_latents([request.seed], (12, TINY_HEIGHT // 8, TINY_WIDTH // 8)),
        height=TINY_HEIGHT,
        width=TINY_WIDTH,
        num_inference_steps=SETTINGS.num_inference_steps,
        guidance_scale=SETTINGS.guidance_scale,
    ).images[0]


def diffusers_pipeline(folder: Path, scheduler: str) -> Any:
    """The pipeline of diffusers with a solver as a user of it would choose it."""
    import diffusers
    import torch

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    solver, own = {
        "dpmsolver++": (
            diffusers.DPMSolverMultistepScheduler,
            {"timestep_spacing": "linspace", "lambda_min_clipped": -5.1},
        ),
        "ddim": (
            diffusers.DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False}
        ),
        "euler": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    }[scheduler]  # fmt: skip
    pipeline.scheduler = solver.from_config(pipeline.scheduler.config, **own)
    return pipeline


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "ddim", "euler"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_images_are_those_of_the_diffusers_pipeline(
    tmp_path: Path, prediction_type: Literal["epsilon", "v_prediction"], scheduler: str
) -> None:
    folder = build_tiny_stable_diffusion(tmp_path / "model", prediction_type=prediction_type)
    pipeline = diffusers_pipeline(folder, scheduler)
    settings = SETTINGS.model_copy(update={"scheduler": scheduler})
    images = Sampler(folder, settings, model_id="tiny")(REQUESTS)
    for request, image in zip(REQUESTS, images, strict=True):
        expected = diffusers_image(pipeline, request)
        assert abs(pixels(image) - pixels(expected)).max() <= 1


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "ddim", "euler"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_scheduler_and_precision_draws_and_is_solved_in_fp32(
    model_dir: Path, scheduler: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS.model_copy(update={"scheduler": scheduler, "precision": precision})
    sampler = Sampler(model_dir, settings, model_id="tiny")
    solver: Any = sampler.scheduler
    solve = solver.step
    solved: list[str] = []

    def step(predicted: Any, timestep: Any, latents: Any, **values: Any) -> Any:
        solved.extend([str(predicted.dtype), str(latents.dtype)])
        return solve(predicted, timestep, latents, **values)

    monkeypatch.setattr(solver, "step", step)
    (image,) = sampler(REQUESTS[:1])
    assert set(solved) == {"torch.float32"}
    assert image.size == (TINY_WIDTH, TINY_HEIGHT) and image.mode == "RGB"
    assert blocked_reason(image) == ""


@pytest.mark.parametrize(("name", "most"), [("dpmsolver++", 995), ("ddim", 1000)])
def test_the_most_steps_that_the_settings_allow_are_those_that_a_solver_can_make(
    model_dir: Path, name: Literal["dpmsolver++", "ddim"], most: int
) -> None:
    def timesteps(steps: int) -> list[int]:
        solver = make_scheduler(model_dir, name)
        solver.set_timesteps(steps)
        return solver.timesteps.tolist()

    SamplerSettings(scheduler=name, num_inference_steps=most)
    assert len(set(timesteps(most))) == most
    with pytest.raises(ValidationError, match=f"{most + 1}, and {re.escape(name)} makes at most"):
        SamplerSettings(scheduler=name, num_inference_steps=most + 1)
    with pytest.raises((ValueError, AssertionError)):
        assert len(set(timesteps(most + 1))) == most + 1


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 7, 25, 49, 995])
def test_the_latest_negative_prompt_acts_in_the_last_step_and_a_later_one_is_refused(
    model_dir: Path, steps: int
) -> None:
    sampler = Sampler(model_dir, SETTINGS, model_id="tiny")
    latest = SamplerSettings(num_inference_steps=steps).latest_negative
    done = (steps - 1) / steps  # as `_denoise` counts before the last step
    for start, acts in ((latest, True), (latest + 1e-9, False)):
        asked = sampler._texts_at([ImageRequest("a", "busy", 1, start)], done)
        assert asked == (["busy", "a"] if acts else ["", "a"])
    SamplerSettings(num_inference_steps=steps, negative_from=latest)
    with pytest.raises(ValidationError, match="would never act; lower it, or raise num_inf"):
        SamplerSettings(num_inference_steps=steps, negative_from=latest + 1e-9)


def test_without_guidance_the_negative_prompt_is_not_asked(model_dir: Path) -> None:
    settings = SETTINGS.model_copy(update={"guidance_scale": 1.0})
    one, other = Sampler(model_dir, settings, model_id="tiny")(REQUESTS[:2])
    # Two images of one batch: the last digits depend on their place in it.
    assert abs(pixels(one) - pixels(other)).max() <= 1


def test_steps_are_told_over_all_batches_and_can_be_stopped(model_dir: Path) -> None:
    told: list[tuple[int, int]] = []
    sampler = Sampler(model_dir, SETTINGS, model_id="tiny")
    sampler(REQUESTS, lambda done, total: told.append((done, total)))
    assert told == [(step, 6) for step in range(1, 7)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler(REQUESTS, stop)


def test_a_batch_that_does_not_fit_is_halved(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    sampler = Sampler(model_dir, with_batch(4), model_id="tiny")
    expected = sampler(REQUESTS)
    draw = sampler._draw

    def small_memory(requests: list[ImageRequest], on_step: object) -> list[Image.Image]:
        if len(requests) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return draw(requests, on_step)  # type: ignore[arg-type]

    monkeypatch.setattr(sampler, "_draw", small_memory)
    images = sampler(REQUESTS)
    assert sampler.batch_size == 1
    for one, other in zip(expected, images, strict=True):
        assert abs(pixels(one) - pixels(other)).max() <= 1


def test_a_batch_that_does_not_fit_in_the_words_of_cublas_is_halved_too(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler(model_dir, with_batch(4), model_id="tiny")
    draw = sampler._draw

    def small_memory(requests: list[ImageRequest], on_step: object) -> list[Image.Image]:
        if len(requests) > 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        return draw(requests, on_step)  # type: ignore[arg-type]

    monkeypatch.setattr(sampler, "_draw", small_memory)
    assert len(sampler(REQUESTS)) == len(REQUESTS)
    assert sampler.batch_size == 2


def test_what_is_drawn_before_memory_runs_out_is_kept(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    sampler = Sampler(model_dir, with_batch(2), model_id="tiny")
    draw = sampler._draw
    asked: list[list[int]] = []

    def memory_goes(requests: list[ImageRequest], on_step: object) -> list[Image.Image]:
        asked.append([request.seed for request in requests])
        if len(asked) > 1 and len(requests) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return draw(requests, on_step)  # type: ignore[arg-type]

    monkeypatch.setattr(sampler, "_draw", memory_goes)
    assert len(sampler(REQUESTS)) == len(REQUESTS)
    seeds = [request.seed for request in REQUESTS]
    assert asked == [seeds[:2], seeds[2:4], *([seed] for seed in seeds[2:])]


def test_each_prompt_and_negative_is_encoded_once(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler(model_dir, with_batch(2), model_id="tiny")
    forward = sampler.text_encoder.forward
    calls = 0

    def counted(*args: object, **values: object) -> object:
        nonlocal calls
        calls += 1
        return forward(*args, **values)

    monkeypatch.setattr(sampler.text_encoder, "forward", counted)
    requests = [ImageRequest(f"poster {n % 2}", "busy", n) for n in range(4)]
    sampler(requests)
    sampler(requests)
    assert calls == 3, "two prompts and one negative, in four batches"


def test_a_delayed_negative_prompt_acts_from_its_step_on(model_dir: Path) -> None:
    """Against the pipeline of diffusers, whose callback changes the texts between steps."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    settings = SETTINGS.model_copy(update={"num_inference_steps": 5})
    pipeline = StableDiffusionPipeline.from_pretrained(
        model_dir, torch_dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="linspace", lambda_min_clipped=-5.1
    )
    _, busy = pipeline.encode_prompt("a red rocket", "cpu", 1, True, negative_prompt="busy")

    def after_step(_: object, step: int, __: object, tensors: dict) -> dict:
        embeds = tensors["prompt_embeds"].clone()
        if step + 1 >= 2:  # two of five steps are 0.4
            embeds[0] = busy[0]
        return {"prompt_embeds": embeds}

    expected = pipeline(
        "a red rocket",
        negative_prompt="",
        latents=initial_latents([1], (12, TINY_HEIGHT // 8, TINY_WIDTH // 8)),
        height=TINY_HEIGHT,
        width=TINY_WIDTH,
        num_inference_steps=5,
        guidance_scale=SETTINGS.guidance_scale,
        callback_on_step_end=after_step,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    ).images[0]
    sampler = Sampler(model_dir, settings, model_id="tiny")
    delayed, at_once, never = sampler(
        [
            ImageRequest("a red rocket", "busy", 1, negative_from=0.4),
            ImageRequest("a red rocket", "busy", 1),
            ImageRequest("a red rocket", "", 1),
        ]
    )
    assert abs(pixels(delayed) - pixels(expected)).max() <= 1
    assert (pixels(delayed) != pixels(at_once)).any() and (pixels(delayed) != pixels(never)).any()


def test_the_batch_is_doubled_while_it_pays() -> None:
    import torch

    def falling(size: int) -> float:  # a second to start, a tenth an image
        return 1 + 0.1 * size

    assert best_batch_size(falling, 64) == 64 and best_batch_size(falling, 10) == 8
    assert best_batch_size(lambda size: float(size), 64) == 1

    def little_memory(size: int) -> float:
        if size > 4:
            raise torch.OutOfMemoryError("out of memory")
        return falling(size)

    assert best_batch_size(little_memory, 64) == 4
    assert best_batch_size(lambda size: little_memory(8 * size), 64) == 1
    with pytest.raises(RuntimeError, match="no such kernel"):
        best_batch_size(lambda size: _raise(RuntimeError("no such kernel")), 64)


def _raise(error: Exception) -> float:
    raise error


@pytest.mark.parametrize(("images", "size"), [(64, 64), (65, 33), (96, 48), (33, 17), (0, 1)])
def test_a_batch_found_by_trial_leaves_little_to_pad(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, images: int, size: int
) -> None:
    monkeypatch.setattr(Sampler, "_time_a_step", lambda self, size: 1 + 0.1 * size)
    sampler = Sampler(model_dir, with_batch(0), model_id="tiny")
    sampler.settle_batch_size(images)
    assert sampler.batch_size == size


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "memory; set POSTER"),
        (
            "FIND was unable to find an engine",
            r'memory .*"FIND was unable .*precision\); set POSTER',
        ),
    ],
)
def test_an_image_that_does_not_fit_is_told_with_the_remedy_also_after_a_trial(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, error: str, told: str
) -> None:
    def little_memory(*_: Any, **__: Any) -> Any:
        raise RuntimeError(error)

    sampler = Sampler(model_dir, with_batch(0), model_id="tiny")
    monkeypatch.setattr(sampler.unet, "forward", little_memory)
    with pytest.raises(SamplerError, match=f"one image .* does not fit into {told}"):
        sampler(REQUESTS)


def test_a_batch_found_by_trial_draws_the_same_images(model_dir: Path) -> None:
    sampler = Sampler(model_dir, with_batch(0), model_id="tiny")
    images = sampler(REQUESTS)
    assert sampler.batch_size in (1, 2, 3)
    for one, other in zip(
        images, Sampler(model_dir, SETTINGS, model_id="t")(REQUESTS), strict=True
    ):
        assert abs(pixels(one) - pixels(other)).max() <= 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fp32_is_drawn_in_whole_fp32_and_the_switches_are_set_back(
    model_dir: Path, precision: str
) -> None:
    """cuDNN takes TF32 for it otherwise, on a GPU, under the keys of a CPU's images."""
    import torch

    before = tf32_switches()
    assert before == (True, False)
    inside: list[tuple[bool, bool]] = []
    settings = with_batch(0).model_copy(update={"precision": precision})
    sampler = Sampler(model_dir, settings, model_id="tiny")
    sampler.unet.register_forward_hook(lambda *_: inside.append(tf32_switches()))
    sampler.vae.decoder.conv_in.register_forward_hook(lambda *_: inside.append(tf32_switches()))
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        sampler(REQUESTS[:2])
        assert tf32_switches() == (True, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert set(inside) == {(False, False) if precision == "fp32" else (True, True)}


def test_layout_and_slicing_change_no_image(model_dir: Path) -> None:
    plain = Sampler(model_dir, SETTINGS, model_id="tiny")(REQUESTS)
    for changes in ({"channels_last": False, "vae_slicing": True}, {"vae_slicing": False}):
        settings = SETTINGS.model_copy(update=changes)
        other = Sampler(model_dir, settings, model_id="tiny")(REQUESTS)
        for one, another in zip(plain, other, strict=True):
            assert abs(pixels(one) - pixels(another)).max() <= 1
        assert pixel_key("m", REQUESTS[0], settings) == pixel_key("m", REQUESTS[0], SETTINGS)


def test_the_model_is_compiled_once_for_the_batch_that_was_found(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile begins anew with every shape, which takes minutes with a real model."""
    import torch

    shapes: list[tuple[int, ...]] = []

    def not_compiled(unet: torch.nn.Module, **how: bool) -> Any:
        def called(x: torch.Tensor, *inputs: Any, **named: Any) -> Any:
            shapes.append(tuple(x.shape))
            return unet(x, *inputs, **named)

        return called

    monkeypatch.setattr(torch, "compile", not_compiled)
    settings = SETTINGS.model_copy(update={"compile": True, "batch_size": 0})
    sampler = Sampler(model_dir, settings, model_id="tiny")
    timed = sampler._time_a_step
    # As on a GPU, where doubling pays: 1, 2 and 4 are tried; five images are two batches then.
    monkeypatch.setattr(sampler, "_time_a_step", lambda size: 1.0 + 0 * timed(size))
    assert len(sampler(REQUESTS)) == len(REQUESTS) and sampler.batch_size == 3
    assert set(shapes) == {(6, 12, TINY_HEIGHT // 8, TINY_WIDTH // 8)}


@pytest.mark.slow
def test_a_compiled_model_draws_the_same_images(model_dir: Path) -> None:
    settings = SETTINGS.model_copy(update={"compile": True})
    compiled = Sampler(model_dir, settings, model_id="tiny")(REQUESTS)
    for one, other in zip(
        compiled, Sampler(model_dir, SETTINGS, model_id="tiny")(REQUESTS), strict=True
    ):
        assert abs(pixels(one) - pixels(other)).max() <= 1


def test_lora_weights_are_added_to_their_model(model_dir: Path, tmp_path: Path) -> None:
    folder, merged = lora_and_merged(model_dir, tmp_path, strength=0.5)
    ours = Sampler(folder, SETTINGS, model_id="tiny", base_dir=model_dir)(REQUESTS[:3])
    whole = Sampler(merged, SETTINGS, model_id="tiny")(REQUESTS[:3])
    pipeline = diffusers_pipeline(model_dir, "dpmsolver++")
    pipeline.load_lora_weights(folder)
    base = Sampler(model_dir, SETTINGS, model_id="tiny")(REQUESTS[:3])
    for request, one, other, without in zip(REQUESTS[:3], ours, whole, base, strict=True):
        assert abs(pixels(one) - pixels(other)).max() <= 1
        assert abs(pixels(one) - pixels(diffusers_image(pipeline, request))).max() <= 1
        assert abs(pixels(one) - pixels(without)).max() > 1
    with pytest.raises(ModelMissing, match="LoRA weights alone draw nothing"):
        Sampler(folder, SETTINGS, model_id="tiny")


def test_what_small_lora_weights_change_is_not_lost_in_a_short_precision(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    folder, merged = lora_and_merged(model_dir, tmp_path, strength=0.02)
    # As on a GPU, where the weights themselves are short.
    monkeypatch.setattr(sampler_module, "torch_dtype", lambda _: torch.bfloat16)
    short = SETTINGS.model_copy(update={"precision": "bf16"})
    ours = Sampler(folder, short, model_id="tiny", base_dir=model_dir)
    whole = Sampler(merged, short, model_id="tiny")
    expected = {
        **{f"unet {name}": value for name, value in whole.unet.state_dict().items()},
        **{f"text {name}": value for name, value in whole.text_encoder.state_dict().items()},
    }
    found = {
        **{f"unet {name}": value for name, value in ours.unet.state_dict().items()},
        **{f"text {name}": value for name, value in ours.text_encoder.state_dict().items()},
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_a_missing_model_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match=r"nowhere.*model_index\.json.*materialize"):
        Sampler(tmp_path / "nowhere", SETTINGS, model_id="x")


def test_a_broken_model_is_named_with_the_remedy(tmp_path: Path) -> None:
    folder = build_tiny_stable_diffusion(tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelMissing, match="cannot be loaded"):
        Sampler(folder, SETTINGS, model_id="x")


def test_the_token_limit_is_the_tokenizers(model_dir: Path, tmp_path: Path) -> None:
    count, most = text_limit(model_dir)
    assert most == TINY_TOKENS - 2
    assert count("a red rocket") == 3
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        f"prompts:\n- {{id: a, prompt: {'red ' * 47}, score_text: b, seeds: [1]}}\n", "utf-8"
    )
    with pytest.raises(PromptSuiteError, match="has 47 tokens and the models read 46"):
        load_suite(suite, limit=(count, most))


def test_padding_that_a_tokenizer_was_saved_with_is_not_counted(
    model_dir: Path, tmp_path: Path
) -> None:
    from transformers import CLIPTokenizer

    folder = shutil.copytree(model_dir, tmp_path / "model") / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer("a", padding="max_length", truncation=True, max_length=TINY_TOKENS)
    tokenizer.save_pretrained(folder)
    count, most = text_limit(folder.parent)
    assert count("a red rocket") == 3
    assert count("red " * 2 * TINY_TOKENS) > most


def test_a_sampler_that_is_let_go_of_gives_its_memory_back_at_once(model_dir: Path) -> None:
    Sampler(model_dir, SETTINGS, model_id="tiny")  # the first one imports, which is not at issue
    gc.collect()
    gc.disable()
    try:
        sampler = Sampler(model_dir, SETTINGS, model_id="tiny")
        sampler(REQUESTS[:1])
        weights = weakref.ref(next(sampler.unet.parameters()))
        del sampler
        assert weights() is None
    finally:
        gc.enable()
