"""The sampler and the table of generations, on tiny random models of the real classes."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from posterpipe.core import models
from posterpipe.core import sampler as sampler_module
from posterpipe.core.memory import TOO_LITTLE_MEMORY
from posterpipe.core.models import DeviceGone, ModelMissing
from posterpipe.core.progress import NoProgress
from posterpipe.core.prompts import Prompt, PromptSuiteError, load_suite, suite_table
from posterpipe.core.sampler import (
    COLUMNS,
    LORA_WEIGHTS,
    ImageRequest,
    Sampler,
    SamplerError,
    best_batch_size,
    blocked_reason,
    generate,
    initial_latents,
    parameters_text,
    pixel_key,
    text_limit,
)
from posterpipe.core.store import Store, table_version
from posterpipe.core.variants import DELAYED_VARIANTS, VARIANTS
from posterpipe.settings import SamplerSettings
from posterpipe_tests.models import (
    TINY_HEIGHT,
    TINY_TOKENS,
    TINY_WIDTH,
    build_tiny_stable_diffusion,
)

Images = list[Image.Image]

SETTINGS = SamplerSettings(
    num_inference_steps=3,
    guidance_scale=4.0,
    width=TINY_WIDTH,
    height=TINY_HEIGHT,
    batch_size=3,
    scheduler="dpmsolver++",
)
SUITE = [
    Prompt("rocket", "a red rocket", "a rocket", "busy", "Orbit", (1, 2)),
    Prompt("cat", "a blue cat", "a cat", "", "", (3,)),
]
REQUESTS = [
    ImageRequest("a red rocket", "busy", 1),
    ImageRequest("a red rocket", "", 1),
    ImageRequest("a yellow cat in the centre", "the film", 2),
    ImageRequest("a blue rocket", "", 2**32 - 1),
    ImageRequest("a movie poster", "", 5),
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_stable_diffusion(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def with_batch(size: int) -> SamplerSettings:
    return SETTINGS.model_copy(update={"batch_size": size})


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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_images_are_those_of_the_diffusers_pipeline(tmp_path: Path, prediction_type: str) -> None:
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    folder = build_tiny_stable_diffusion(
        tmp_path / "model",
        prediction_type=prediction_type,  # type: ignore[arg-type]
    )
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="linspace", lambda_min_clipped=-5.1
    )
    images = Sampler(folder, SETTINGS, model_id="tiny")(REQUESTS)
    for request, image in zip(REQUESTS, images, strict=True):
        expected = pipeline(
            request.prompt,
            negative_prompt=request.negative,
            latents=initial_latents([request.seed], (12, TINY_HEIGHT // 8, TINY_WIDTH // 8)),
            height=TINY_HEIGHT,
            width=TINY_WIDTH,
            num_inference_steps=SETTINGS.num_inference_steps,
            guidance_scale=SETTINGS.guidance_scale,
        ).images[0]
        assert abs(pixels(image) - pixels(expected)).max() <= 1


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "ddim", "euler"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_scheduler_and_precision_draws(
    model_dir: Path, scheduler: str, precision: str
) -> None:
    settings = SETTINGS.model_copy(update={"scheduler": scheduler, "precision": precision})
    (image,) = Sampler(model_dir, settings, model_id="tiny")(REQUESTS[:1])
    assert image.size == (TINY_WIDTH, TINY_HEIGHT) and image.mode == "RGB"
    assert blocked_reason(image) == ""


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


def test_a_batch_found_by_trial_draws_the_same_images(model_dir: Path) -> None:
    sampler = Sampler(model_dir, with_batch(0), model_id="tiny")
    images = sampler(REQUESTS)
    assert sampler.batch_size in (1, 2, 3)
    for one, other in zip(
        images, Sampler(model_dir, SETTINGS, model_id="t")(REQUESTS), strict=True
    ):
        assert abs(pixels(one) - pixels(other)).max() <= 1


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


def lora_and_merged(model_dir: Path, folder: Path, strength: float) -> tuple[Path, Path]:
    """A directory of random LoRA weights, and one of the whole model with them added in fp32."""
    import torch
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionPipeline.from_pretrained(
        model_dir, torch_dtype=torch.float32, safety_checker=None
    )
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "lora" in name:
                parameter.normal_(0, strength, generator=torch.Generator().manual_seed(len(name)))
    state = get_peft_model_state_dict(pipeline.unet)
    lora, merged = folder / "lora", folder / "merged"
    StableDiffusionPipeline.save_lora_weights(lora, unet_lora_layers=state)
    assert (lora / LORA_WEIGHTS).is_file()
    pipeline.unet.fuse_lora()
    pipeline.unet.unload_lora()
    pipeline.save_pretrained(merged, safe_serialization=True)
    return lora, merged


def test_lora_weights_are_added_to_their_model(model_dir: Path, tmp_path: Path) -> None:
    folder, merged = lora_and_merged(model_dir, tmp_path, strength=0.5)
    ours = Sampler(folder, SETTINGS, model_id="tiny", base_dir=model_dir)(REQUESTS[:3])
    whole = Sampler(merged, SETTINGS, model_id="tiny")(REQUESTS[:3])
    base = Sampler(model_dir, SETTINGS, model_id="tiny")(REQUESTS[:3])
    for one, other, without in zip(ours, whole, base, strict=True):
        assert abs(pixels(one) - pixels(other)).max() <= 1
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


def test_images_of_short_lora_weights_are_not_taken_for_those_of_a_whole_model() -> None:
    short = SETTINGS.model_copy(update={"precision": "bf16"})
    for settings, same in ((SETTINGS, True), (short, False)):
        one, other = (pixel_key("m", REQUESTS[0], settings, lora=lora) for lora in (False, True))
        assert (one == other) == same


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
        load_suite(suite, count_tokens=count, max_tokens=most)


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


def test_black_and_constant_images_are_blocked() -> None:
    assert "black" in blocked_reason(Image.new("RGB", (8, 8), (3, 2, 0)))
    assert "one colour" in blocked_reason(Image.new("RGB", (8, 8), (200, 100, 5)))
    assert blocked_reason(Image.linear_gradient("L").convert("RGB")) == ""


def test_keys_hold_what_decides_pixels_and_nothing_else() -> None:
    request = REQUESTS[0]
    key = pixel_key("m", request, SETTINGS)
    assert key == pixel_key("m", request, with_batch(8))
    changes = {"num_inference_steps": 4, "guidance_scale": 2.0, "width": 40, "scheduler": "ddim"}
    others = [SETTINGS.model_copy(update={name: value}) for name, value in changes.items()]
    keys = {pixel_key("m", request, settings) for settings in others}
    keys |= {pixel_key("n", request, SETTINGS), pixel_key("m", REQUESTS[1], SETTINGS)}
    assert len(keys | {key}) == 7


def drawn(
    store: Store,
    model_dir: Path,
    suite: Sequence[Prompt] = SUITE,
    variants: Sequence[str] = VARIANTS[:2],
    settings: SamplerSettings = SETTINGS,
) -> pd.DataFrame:
    return generate(
        store, suite, variants, model_dir, "tiny1", settings, NoProgress(), run_id="run"
    )


def test_the_table_has_a_row_for_every_prompt_seed_and_variant(
    store: Store, model_dir: Path
) -> None:
    table = drawn(store, model_dir)
    assert tuple(table.columns) == COLUMNS
    assert len(table) == 6 and table["generation_key"].is_unique
    assert (table["status"] == "ok").all() and (table["checkpoint_id"] == "tiny1").all()
    for row in table.itertuples():
        with Image.open(store.root / str(row.image_path)) as image:
            assert image.size == (row.width, row.height) == (TINY_WIDTH, TINY_HEIGHT)
    assert table_version(table) == table_version(drawn(store, model_dir, suite=SUITE))
    from_table = generate(
        store, suite_table(SUITE), VARIANTS[:2], model_dir, "tiny1", SETTINGS, NoProgress(),
        run_id="another",
    )  # fmt: skip
    assert table_version(from_table) == table_version(table)


def test_an_empty_negative_prompt_changes_nothing_and_a_real_one_does(
    store: Store, model_dir: Path
) -> None:
    table = drawn(store, model_dir).set_index(["prompt_id", "seed", "variant"])
    assert table.image["cat", 3, "sd"] == table.image["cat", 3, "sd_negative"]
    assert table.image["rocket", 1, "sd"] != table.image["rocket", 1, "sd_negative"]
    assert table.negative_prompt["rocket", 1, "sd"] == ""
    assert table.negative_prompt["rocket", 1, "sd_negative"] == "busy"


def test_a_suite_may_hold_delayed_variants(store: Store, model_dir: Path) -> None:
    delayed = Prompt("rocket", "a red rocket", "a rocket", "busy", "Orbit", (1, 2), 0.5)
    variants = ("sd", "sd_negative", DELAYED_VARIANTS[0])
    table = drawn(store, model_dir, [delayed, SUITE[1]], variants)
    assert table.variant.tolist().count("sd_negative_delayed") == 2  # the cat asks for none
    by_cell = table.set_index(["prompt_id", "seed", "variant"])
    images = {by_cell.image["rocket", 1, variant] for variant in variants}
    assert len(images) == 3
    late = table[table["variant"] == "sd_negative_delayed"].iloc[0]
    assert late.negative_prompt == "busy" and json.loads(late.settings)["negative_from"] == 0.5
    with Image.open(store.root / str(late.image_path)) as image:
        assert "Negative from: 0.5" in image.info["parameters"]
    plain = drawn(store, model_dir, SUITE, variants)
    assert set(plain.pixel_key) < set(table.pixel_key) and len(plain) == 6


def test_a_setting_delays_every_negative_prompt(store: Store, model_dir: Path) -> None:
    late = SETTINGS.model_copy(update={"negative_from": 0.5})
    first = drawn(store, model_dir).set_index(["prompt_id", "seed", "variant"])
    second = drawn(store, model_dir, settings=late).set_index(["prompt_id", "seed", "variant"])
    assert first.image["rocket", 1, "sd"] == second.image["rocket", 1, "sd"]
    cell = ("rocket", 1, "sd_negative")
    assert first.image[cell] != second.image[cell]


def test_only_what_is_missing_is_drawn(
    store: Store, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = drawn(store, model_dir)
    asked: list[ImageRequest] = []
    call = Sampler.__call__

    def spy(self: Sampler, requests: Sequence[ImageRequest], on_step: None = None) -> Images:
        asked.extend(requests)
        return call(self, requests, on_step)

    monkeypatch.setattr(Sampler, "__call__", spy)
    reworded = Prompt("rocket", "a red rocket", "one rocket", "busy", "Comet", (1, 2, 4))
    second = drawn(store, model_dir, [reworded, SUITE[1]])
    assert asked == [ImageRequest("a red rocket", "", 4), ImageRequest("a red rocket", "busy", 4)]
    # Another score text or title is another row about the same image.
    assert not set(first.generation_key[:4]) & set(second.generation_key)
    assert set(first.image) < set(second.image)
    (store.root / str(second.image_path[0])).unlink()
    asked.clear()
    again = drawn(store, model_dir, [reworded, SUITE[1]])
    assert len(asked) == 1 and table_version(again) == table_version(second)


def test_nothing_missing_loads_no_model(store: Store, model_dir: Path) -> None:
    first = drawn(store, model_dir)
    second = drawn(store, Path("no/such/model"))
    assert table_version(first) == table_version(second)


def test_one_image_that_fails_leaves_the_others(
    store: Store, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Sampler.__call__

    def fails(self: Sampler, requests: Sequence[ImageRequest], on_step: None = None) -> Images:
        if any(request.seed == 2 for request in requests):
            raise RuntimeError("no such kernel")
        return call(self, requests, on_step)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", fails)
        table = drawn(store, model_dir)
    failed = table[table["seed"] == 2]
    assert (failed.status == "failed").all() and (failed.image == "").all()
    assert failed.reason.str.contains("no such kernel").all()
    assert (table[table["seed"] != 2].status == "ok").all()
    assert (drawn(store, model_dir).status == "ok").all()


def test_a_batch_that_fails_in_unknown_words_is_drawn_image_by_image(
    store: Store, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Sampler._draw

    def small(self: Sampler, requests: list[ImageRequest], on_step: Any) -> Images:
        if len(requests) > 1:
            raise RuntimeError("something that a later driver says when memory runs out")
        return draw(self, requests, on_step)

    monkeypatch.setattr(Sampler, "_draw", small)
    assert (drawn(store, model_dir).status == "ok").all()


def test_a_device_that_is_gone_stops_the_drawing_and_what_was_drawn_is_kept(
    store: Store, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drawn(Store(store.root / "other"), model_dir)
    call = Sampler.__call__
    calls = 0

    def breaks(self: Sampler, requests: Sequence[ImageRequest], on_step: None = None) -> Images:
        nonlocal calls
        calls += 1
        if len(requests) == 2:  # the second batch, in words that nobody knows
            raise RuntimeError("no such kernel")
        if calls > 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        return call(self, requests, on_step)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", breaks)
        with pytest.raises(DeviceGone, match=r"sampler.*illegal memory access.*done is kept"):
            drawn(store, model_dir)
    assert calls == 4
    # Those of the first batch, and the one of the second that was drawn alone.
    assert len(store.results("generation", whole.pixel_key)) == 4
    assert table_version(drawn(store, model_dir)) == table_version(whole)


def test_a_device_that_is_gone_before_the_model_is_on_it_is_told_as_such(
    store: Store, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(Sampler, "settle_batch_size", gone)
    with pytest.raises(DeviceGone, match="uncorrectable ECC error"):
        drawn(store, model_dir)


def test_the_reason_of_too_little_memory_is_the_same_each_time(
    store: Store, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Sampler.__call__
    free = iter(range(100))

    def full(self: Sampler, requests: Sequence[ImageRequest], on_step: None = None) -> Images:
        if any(request.seed == 2 for request in requests):
            raise RuntimeError(f"CUDA out of memory. {next(free)} MiB are free")
        return call(self, requests, on_step)

    monkeypatch.setattr(Sampler, "__call__", full)
    first, second = drawn(store, model_dir), drawn(store, model_dir)
    # The second time nothing but what failed is missing, and that is no reason to fail as a whole.
    assert set(first[first["status"] == "failed"].reason) == {TOO_LITTLE_MEMORY}
    assert table_version(first) == table_version(second)


def test_when_nothing_can_be_drawn_the_error_says_so(
    store: Store, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Sampler, requests: Sequence[ImageRequest], on_step: None = None) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Sampler, "__call__", fails)
    with pytest.raises(SamplerError, match=r"not one of 5 images.*no such kernel"):
        drawn(store, model_dir)


def test_a_stopped_run_keeps_what_is_drawn(
    store: Store, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = drawn(Store(tmp_path / "other"), model_dir)
    call = Sampler.__call__
    calls = 0

    def stops(self: Sampler, requests: Sequence[ImageRequest], on_step: None = None) -> Images:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return call(self, requests, on_step)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", stops)
        with pytest.raises(KeyboardInterrupt):
            drawn(store, model_dir)
    assert len(store.results("generation", uninterrupted.pixel_key)) == 3
    assert table_version(drawn(store, model_dir)) == table_version(uninterrupted)


def test_images_are_written_while_the_next_are_drawn(
    store: Store, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first image's writing waits for the second batch, which would never begin otherwise."""
    call, keep = Sampler.__call__, sampler_module._Drawing._keep
    second_began, calls, in_time = threading.Event(), 0, []

    def counted(self: Sampler, requests: Sequence[ImageRequest], on_step: None = None) -> Images:
        nonlocal calls
        calls += 1
        if calls == 2:
            second_began.set()
        return call(self, requests, on_step)

    def waits(self: Any, *args: Any) -> Any:
        in_time.append(second_began.wait(20))
        return keep(self, *args)

    monkeypatch.setattr(Sampler, "__call__", counted)
    monkeypatch.setattr(sampler_module._Drawing, "_keep", waits)
    assert (drawn(store, model_dir).status == "ok").all()
    assert calls >= 2 and all(in_time)


def test_prompts_of_any_script_are_kept_in_the_image(store: Store, model_dir: Path) -> None:
    """A tEXt chunk holds Latin-1 only."""
    suite = [Prompt("star", "星の船 – a ‘star’", "a star", "", "", (1,))]
    table = drawn(store, model_dir, suite, ("sd",))
    with Image.open(store.root / str(table.image_path[0])) as image:
        assert image.info["parameters"].splitlines()[0] == "星の船 – a ‘star’"


def test_a_model_that_gives_nothing_finite_is_blocked(store: Store, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = build_tiny_stable_diffusion(tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_out.bias"].fill_(float("nan"))
    save_file(state, weights, metadata={"format": "pt"})
    table = drawn(store, folder, SUITE[1:])
    assert (table.status == "blocked").all() and table.reason.str.contains("black image").all()
    assert (table.image != "").all()


def test_pngs_say_how_they_were_made(store: Store, model_dir: Path) -> None:
    table = drawn(store, model_dir, SUITE[:1])
    with Image.open(store.root / str(table.image_path[1])) as image:
        text = image.info["parameters"]
        assert list(image.info) == ["parameters"]
    assert text.splitlines() == [
        "a red rocket",
        "Negative prompt: busy",
        "Steps: 3, Sampler: DPM++ 2M, CFG scale: 4, Seed: 1, Size: 32x48, Model hash: tiny1, "
        "Precision: fp32, Version: posterpipe sampler 1",
    ]
    assert json.loads(table.settings[0])["num_inference_steps"] == 3


def test_a_prompt_is_never_read_as_the_negative_one(model_dir: Path) -> None:
    """AUTOMATIC1111's reader goes by lines, and knows the negative one by how it begins."""
    from transformers import CLIPTokenizer

    request = ImageRequest("Negative prompt: is\n a film", "Negative prompt: cats", 1)
    first, second, _ = parameters_text(request, SETTINGS, "tiny").splitlines()
    assert first == "negative prompt: is a film"
    assert second == "Negative prompt: Negative prompt: cats"
    tokenizer = CLIPTokenizer.from_pretrained(model_dir / "tokenizer")
    assert tokenizer(first).input_ids == tokenizer(request.prompt).input_ids


def test_fp16_without_a_gpu_is_fp32_and_recorded_as_such(
    model_dir: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    for module in (models, sampler_module):
        monkeypatch.setattr(module, "best_device", lambda: torch.device("cpu"))
    half = SETTINGS.model_copy(update={"precision": "fp16"})
    assert pixel_key("m", REQUESTS[0], half) == pixel_key("m", REQUESTS[0], SETTINGS)
    table = drawn(store, model_dir, SUITE[1:], settings=half)
    assert json.loads(table.settings[0])["precision"] == "fp32"


def test_an_unknown_variant_is_refused(store: Store, model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"\['lora'\]; choose from sd, sd_negative"):
        drawn(store, model_dir, variants=("lora",))


_KILLED = """
import sys
from pathlib import Path
from typing import Any
from posterpipe.core.progress import NoProgress
from posterpipe.core.sampler import Sampler, generate
from posterpipe.core.store import Store
from posterpipe_tests.core.test_sampler import SETTINGS, SUITE, VARIANTS
import os, signal
calls = 0
call = Sampler.__call__
def dies(self, requests, on_step=None):
    global calls
    calls += 1
    if calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, requests, on_step)
Sampler.__call__ = dies
generate(Store(Path(sys.argv[1])), SUITE, VARIANTS[:2], Path(sys.argv[2]), "tiny1", SETTINGS,
         NoProgress(), run_id="run")
"""


@pytest.mark.slow
def test_a_killed_run_resumes_and_equals_the_uninterrupted_one(
    store: Store, model_dir: Path, tmp_path: Path
) -> None:
    import signal
    import subprocess
    import sys

    ended = subprocess.run([sys.executable, "-c", _KILLED, str(store.root), str(model_dir)])
    assert ended.returncode == -signal.SIGKILL
    uninterrupted = drawn(Store(tmp_path / "other"), model_dir)
    resumed = drawn(store, model_dir)
    assert table_version(resumed) == table_version(uninterrupted)
    for path in set(resumed.image_path):
        mine, theirs = store.root / str(path), tmp_path / "other" / str(path)
        assert mine.read_bytes() == theirs.read_bytes()


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
