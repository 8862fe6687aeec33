"""The keys and the table of generations, on tiny random models of the real classes."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from posterpipe.core import devices, generations
from posterpipe.core import sampler as sampler_module
from posterpipe.core.devices import DeviceGone
from posterpipe.core.generations import (
    COLUMNS,
    blocked_reason,
    generate,
    parameters_text,
    pixel_key,
)
from posterpipe.core.memory import TOO_LITTLE_MEMORY
from posterpipe.core.progress import NoProgress
from posterpipe.core.prompts import Prompt, suite_prompts, suite_table
from posterpipe.core.sampler import ImageRequest, Sampler, SamplerError
from posterpipe.core.store import Store, table_version
from posterpipe.core.variants import DELAYED_VARIANTS, VARIANTS
from posterpipe.settings import SamplerSettings
from posterpipe_tests.core.drawing import REQUESTS, SETTINGS, SUITE, Images, with_batch
from posterpipe_tests.models import TINY_HEIGHT, TINY_WIDTH, build_tiny_stable_diffusion


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


def test_images_of_short_lora_weights_are_not_taken_for_those_of_a_whole_model() -> None:
    short = SETTINGS.model_copy(update={"precision": "bf16"})
    for settings, same in ((SETTINGS, True), (short, False)):
        one, other = (pixel_key("m", REQUESTS[0], settings, lora=lora) for lora in (False, True))
        assert (one == other) == same


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
        store, suite_prompts(suite_table(SUITE)), VARIANTS[:2], model_dir, "tiny1", SETTINGS,
        NoProgress(), run_id="another",
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


def test_a_negative_prompt_that_would_never_act_is_a_row_that_says_so_and_is_not_drawn(
    store: Store, model_dir: Path
) -> None:
    """The image would be that of no negative prompt, and compared as that of a late one."""
    late = Prompt("rocket", "a red rocket", "a rocket", "busy", "Orbit", (1,), 0.99)
    last = Prompt("fish", "a teal fish", "a fish", "busy", "Tide", (2,), 2 / 3)
    variants = ("sd", DELAYED_VARIANTS[0])
    table = drawn(store, model_dir, [late, last], variants)
    assert table.status.tolist() == ["ok", "failed", "ok", "ok"]
    image, reason = table.image.tolist(), str(table.reason[1])
    assert image[1] == "" and image[2] != image[3], "a step is left for the fish"
    assert "the prompt rocket of the suite" in reason
    assert "last of 3 steps begins after 0.6667" in reason
    assert "write at most 0.66, or raise POSTERPIPE_SAMPLER__NUM_INFERENCE_STEPS" in reason


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
    # One was drawn alone, whose pixels may differ in the last digit from those of a batch.
    pixels = ["image", "image_path"]
    again = drawn(store, model_dir)
    assert table_version(again.drop(columns=pixels)) == table_version(whole.drop(columns=pixels))


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

    def without_kernel(
        self: Sampler, requests: Sequence[ImageRequest], on_step: None = None
    ) -> None:
        raise SamplerError('it does not fit ("GET was unable to find an engine"); set a precision')

    monkeypatch.setattr(Sampler, "__call__", without_kernel)
    third = drawn(store, model_dir)
    (reason,) = set(third[third["status"] == "failed"].reason)
    assert "unable to find an engine" in reason and "set a precision" in reason


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
    call, keep = Sampler.__call__, generations._Drawing._keep
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
    monkeypatch.setattr(generations._Drawing, "_keep", waits)
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

    for module in (devices, generations, sampler_module):
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
from posterpipe.core.generations import generate
from posterpipe.core.sampler import Sampler
from posterpipe.core.store import Store
from posterpipe.core.variants import VARIANTS
from posterpipe_tests.core.drawing import SETTINGS, SUITE
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
