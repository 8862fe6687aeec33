"""What only a GPU can show: training and drawing there, by the starter models in their precisions.

Every case has a twin that runs the same lines on a CPU, with a tiny model, where there is no GPU:
so they are known to run before a GPU is paid for. `python -m pytest posterpipe_tests/test_cuda.py`
on a machine with one takes a few minutes, most of it for torch.compile.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from bitsandbytes.cextension import lib
from bitsandbytes.optim import AdamW8bit
from diffusers.models import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel

from posterpipe.core.devices import give_memory_back
from posterpipe.core.dreambooth import learner as learners
from posterpipe.core.dreambooth import lora, objective
from posterpipe.core.dreambooth.adamw_8bit import QueuedAdamW8bit
from posterpipe.core.dreambooth.base_model import load_vae
from posterpipe.core.dreambooth.batches import Batch
from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.cuda_graphs import Passed, RecordedPass, record
from posterpipe.core.dreambooth.data import load_pixels
from posterpipe.core.dreambooth.inputs import Inputs, read_inputs
from posterpipe.core.dreambooth.latents import encode
from posterpipe.core.dreambooth.learner import Learner
from posterpipe.core.dreambooth.reports import StepReport, TrainResult
from posterpipe.core.dreambooth.saves import Save, newest_save, write_save
from posterpipe.core.dreambooth.train import train
from posterpipe.core.generations import blocked_reason
from posterpipe.core.sampler import ImageRequest, Sampler
from posterpipe.settings import SamplerSettings, default_root
from posterpipe.training_settings import TrainingSettings
from posterpipe_tests.core.dreambooth.conftest import losses, unet_weights, write_training_set
from posterpipe_tests.core.dreambooth.test_cuda_graphs import record_on_cpu, recorded_on_cpu
from posterpipe_tests.core.dreambooth.test_optimizers import (
    assert_same_bits,
    eight_bit_steps,
    two_groups,
)
from posterpipe_tests.core.dreambooth.test_train import out_of_memory_above
from posterpipe_tests.models import TINY_HEIGHT, TINY_WIDTH, build_tiny_stable_diffusion

HAS_GPU = torch.cuda.is_available()
COMPILES_ON_CPU = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
]


def on_devices(*, compiles: bool = False, shown_by: str = "") -> pytest.MarkDecorator:
    """A case for the GPU, and its twin for the CPU where there is none: a slow one where other
    tests, `shown_by`, show the same of a CPU."""
    cpu = [pytest.mark.skipif(HAS_GPU, reason="there is a GPU, and it runs this case")]
    if shown_by:
        cpu.append(pytest.mark.slow)
    gpu = [pytest.mark.skipif(not HAS_GPU, reason="there is no CUDA device")]
    return pytest.mark.parametrize(
        "device",
        [
            pytest.param("cuda", marks=gpu),
            pytest.param("cpu", marks=cpu + (COMPILES_ON_CPU if compiles else [])),
        ],
    )


@pytest.fixture
def world(device: str, tmp_path: Path) -> RunConfig:
    """Six fast steps, of the starter model on a GPU and of a tiny one on a CPU."""
    base = default_root() / "data" / "models" / "starter" / "base"
    return RunConfig(
        base_model=base if device == "cuda" else build_tiny_stable_diffusion(tmp_path / "base"),
        training_set=write_training_set(tmp_path / "set"),
        output_dir=tmp_path / "run" / "out",
        work_dir=tmp_path / "run" / "work",
        cache_dir=tmp_path / "cache",
        width=TINY_WIDTH,
        height=TINY_HEIGHT,
        training=TrainingSettings(
            max_train_steps=6,
            train_batch_size=2,
            learning_rate=1e-4,
            lr_warmup_steps=0,
            log_every_steps=1,
            mixed_precision="fp32",
            optimizer="adamw_fused",
        ),
        sampler=SamplerSettings(num_inference_steps=2),
    )


def changed(world: RunConfig, name: str, **training: Any) -> RunConfig:
    """The same run under another name, with other settings."""
    folder = world.work_dir.parents[1] / name
    return world.model_copy(
        update={
            "output_dir": folder / "out",
            "work_dir": folder / "work",
            "training": world.training.model_copy(update=training),
        }
    )


def assert_learnt(config: RunConfig, result: TrainResult) -> None:
    """The run ended with finite losses and weights that moved; on a GPU if there is one."""
    assert all(math.isfinite(loss) for loss in losses(result))
    before, after = unet_weights(config.base_model), unet_weights(config.output_dir)
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert not HAS_GPU or torch.cuda.max_memory_allocated() > 2**20


@contextmanager
def learning(config: RunConfig) -> Iterator[tuple[Learner, Inputs]]:
    """A run's models and inputs, without its loop."""
    accelerator = Accelerator(mixed_precision="no")
    try:
        inputs = read_inputs(config, "run", accelerator, print)
        yield Learner(config, accelerator, inputs.texts, print), inputs
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def make_step(learner: Learner, inputs: Inputs, step: int) -> None:
    """One optimizer step, of two images for each batch that is accumulated."""
    learner.add_gradients(step, batches_of(learner, inputs, step))
    learner.make_step(step, learner.peak_rates)


def batches_of(learner: Learner, inputs: Inputs, step: int) -> list[Batch]:
    """What a step learns from: two images for each batch that is accumulated."""
    parts = learner.settings.gradient_accumulation_steps
    return [
        batch
        for first in range(2 * step * parts, 2 * (step + 1) * parts, 2)
        for batch in inputs.feed.batches([first, first + 1], parts=parts)
    ]


def saved_in(folder: Path) -> Save:
    """The newest save in a folder, of whatever run it is."""
    newest = max(folder.glob("step-*"))
    checkpoint_id = json.loads((newest / "manifest.json").read_text())["run"]
    saved = newest_save(folder, checkpoint_id=checkpoint_id, log=print)
    assert saved is not None
    return saved


@on_devices(shown_by="dreambooth/test_train.py")
def test_fp16_with_its_scaler_and_fused_adam_follows_fp32(world: RunConfig) -> None:
    exact = train(changed(world, "exact"))
    config = changed(world, "short", mixed_precision="fp16")
    result = train(config)
    assert_learnt(config, result)
    assert result.reports[-1].skipped_steps < 6
    # The first loss is of the same weights, noise and timesteps.
    assert losses(result)[0] == pytest.approx(losses(exact)[0], rel=0.02)


@on_devices(shown_by="dreambooth/test_train.py")
def test_bf16_with_eight_bit_adam_goes_on_from_a_save_with_the_same_bits(world: RunConfig) -> None:
    settings = {"mixed_precision": "bf16", "optimizer": "adamw_8bit", "save_every_steps": 2}
    settings |= {"ema_decay": 0.9, "train_text_encoder": False}
    whole, cut = changed(world, "whole", **settings), changed(world, "cut", **settings)
    uninterrupted = train(whole)
    assert_learnt(whole, uninterrupted)

    def interrupt(report: StepReport) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cut, interrupt)
    with learning(cut) as (learner, _):
        (folder,) = (cut.work_dir / "saves").iterdir()
        saved = saved_in(folder)
        assert saved.step == 4
        learner.restore(saved)
        tensors, state = learner.state()
        for name, values in tensors.items():
            kept = saved.tensors(name)
            assert kept.keys() == values.keys()
            for key, value in values.items():
                assert torch.equal(value.cpu(), kept[key]), (name, key)
        assert state["optimizer"] == saved.state["optimizer"]
    resumed = train(cut)
    assert resumed.resumed_from == 4
    # A GPU adds up in another order each time; a CPU does not.
    tolerance = 0.02 if HAS_GPU else 0.0
    assert losses(resumed) == pytest.approx(losses(uninterrupted), rel=tolerance, abs=0)


@on_devices()
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_fused", "adamw_8bit"])
def test_a_run_that_is_taken_up_makes_the_step_that_it_would_have_made(
    world: RunConfig, tmp_path: Path, device: str, optimizer: str
) -> None:
    config = changed(world, "run", optimizer=optimizer, mixed_precision="bf16")

    def moved_by_step(learner: Learner, inputs: Inputs, step: int) -> Tensor:
        before = [parameter.detach().clone() for parameter in learner.parameters]
        make_step(learner, inputs, step)
        pairs = zip(learner.parameters, before, strict=True)
        return torch.cat([(now.detach() - then).flatten() for now, then in pairs])

    with learning(config) as (learner, inputs):
        for step in range(4):
            make_step(learner, inputs, step)
        tensors, state = learner.state()
        write_save(
            tmp_path / "saves", step=4, checkpoint_id="run", tensors=tensors, state=state, keep=None
        )
        moved = moved_by_step(learner, inputs, 4)
    with learning(config) as (learner, inputs):
        learner.restore(saved_in(tmp_path / "saves"))
        states = [s for s in learner._optimizer.state.values() if s]
        assert len(states) == len(learner.parameters)
        for name, value in ((name, v) for s in states for name, v in s.items()):
            # torch counts plain AdamW's steps on the CPU.
            assert name == "step" or value.device.type == device, name
        moved_again = moved_by_step(learner, inputs, 4)
    # A GPU adds up in another order each time; with forgotten states they would be a step apart.
    tolerance = 0.1 if HAS_GPU else 0.0
    assert (moved_again - moved).norm() <= tolerance * moved.norm()


@on_devices()
def test_eight_bit_adam_has_the_bits_of_bitsandbytes_own_loop(device: str) -> None:
    peer, own = AdamW8bit(two_groups(device)), QueuedAdamW8bit(two_groups(device))
    for step in range(12):
        eight_bit_steps(peer, range(step, step + 1))
        eight_bit_steps(own, range(step, step + 1))
        assert_same_bits(own, peer)
    # On a GPU the kernel was called directly.
    assert bool(own._plans[0].directly) == lib.compiled_with_cuda


def recordings(device: str, monkeypatch: pytest.MonkeyPatch) -> list[Passed]:
    """The answers of each recording that is made from now on; on a CPU as if it were a GPU."""
    if device == "cpu":
        return recorded_on_cpu(monkeypatch)
    found: list[Passed] = []

    def counted(make_pass: Callable[[], Passed]) -> tuple[Callable[[], object], Passed]:
        replay, answers = record(make_pass)
        found.append(answers)
        return replay, answers

    monkeypatch.setattr(learners, "RecordedPass", partial(RecordedPass, record=counted))
    return found


@on_devices(shown_by="dreambooth/test_cuda_graphs.py")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"optimizer": "adamw_8bit", "mixed_precision": "bf16", "train_text_encoder": False}, 1),
        ({"mixed_precision": "fp16", "gradient_accumulation_steps": 2}, 1),
        ({"mixed_precision": "bf16", "method": "lora", "ema_decay": 0.9}, 1),
        ({"text_encoder_stop_step": 4, "channels_last": True}, 2),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_of_a_replayed_step_the_gradients_are_those_of_one_that_is_made(
    world: RunConfig,
    device: str,
    settings: dict[str, Any],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def learnt(config: RunConfig) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each model after some steps: the gradients of the last one, and what has moved."""
        found = {}
        with learning(config) as (learner, inputs):
            before = learner.weights()
            for step in range(6):
                make_step(learner, inputs, step)
            learner.add_gradients(6, batches_of(learner, inputs, 6))
            after = learner.weights()
            for name, group in learner.named.items():
                gradients = [p.grad.flatten().cpu() for p in group.values() if p.grad is not None]
                moved = [(after[name][key] - before[name][key]).flatten() for key in group]
                found[name] = (torch.cat([*gradients, torch.zeros(1)]), torch.cat(moved))
        return found

    plain = learnt(changed(world, "plain", cuda_graphs=False, **settings))
    recorded = recordings(device, monkeypatch)
    replayed = learnt(changed(world, "replayed", **settings))
    assert len(recorded) == expected
    # Kernels of a GPU may add up in another order each time; a CPU's do not.
    tolerance = 0.02 if HAS_GPU else 0.0
    for name, values in plain.items():
        for one, other in zip(values, replayed[name], strict=True):
            assert (one - other).norm() <= tolerance * one.norm(), name


@on_devices(shown_by="dreambooth/test_cuda_graphs.py")
def test_a_step_that_fails_while_it_is_recorded_is_made_as_it_is(
    world: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(make_pass: Callable[[], Passed]) -> tuple[Callable[[], object], Passed]:
        def fail() -> Passed:
            make_pass()
            raise torch.OutOfMemoryError("CUDA out of memory")

        return (record if HAS_GPU else record_on_cpu)(fail)

    plain = train(changed(world, "plain", cuda_graphs=False))
    if not HAS_GPU:
        recorded_on_cpu(monkeypatch)
    monkeypatch.setattr(learners, "RecordedPass", partial(RecordedPass, record=broken))
    log: list[str] = []
    result = train(changed(world, "broken"), log=log.append)
    assert [line for line in log if "cannot be recorded (not enough memory)" in line]
    assert losses(result) == pytest.approx(losses(plain), rel=0.02 if HAS_GPU else 0.0, abs=0.0)


@on_devices(compiles=True)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_compiled_with_a_moving_average_the_losses_are_those_of_the_plain_model(
    world: RunConfig, method: str, blocks: bool
) -> None:
    settings = {"method": method, "ema_decay": 0.9, "max_train_steps": 3}
    plain = train(changed(world, "plain", **settings))
    graphs = HAS_GPU and method == "full"
    values: dict[str, Any] = {"compile": True, "compile_blocks": blocks, "cuda_graphs": graphs}
    config = changed(world, "compiled", **settings, **values)
    log: list[str] = []
    result = train(config, log=log.append)
    assert_learnt(config, result)
    assert losses(result) == pytest.approx(losses(plain), rel=0.02 if HAS_GPU else 1e-3)
    assert not [line for line in log if "cannot be recorded" in line]
    torch._dynamo.reset()


@on_devices(shown_by="dreambooth/test_optimizers.py")
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_fused", "adamw_8bit"])
def test_the_layout_changes_no_loss(world: RunConfig, optimizer: str) -> None:
    last = changed(world, "last", channels_last=True, optimizer=optimizer)
    first = changed(world, "first", channels_last=False, optimizer=optimizer)
    result = train(last)
    assert_learnt(last, result)
    # On a GPU fp32 convolutions may be TF32, whose products have ten bits.
    assert losses(result) == pytest.approx(losses(train(first)), rel=0.02 if HAS_GPU else 1e-3)


@on_devices(shown_by="dreambooth/test_train.py")
def test_accumulated_over_buckets_the_losses_are_those_of_the_larger_batch(
    world: RunConfig, tmp_path: Path
) -> None:
    sizes = [(TINY_WIDTH, TINY_HEIGHT), (TINY_HEIGHT, TINY_WIDTH)] * 4
    mixed = write_training_set(tmp_path / "mixed", sizes=sizes)
    buckets = world.model_copy(update={"training_set": mixed, "buckets": True})
    large = changed(buckets, "large", train_batch_size=4)
    parts = changed(buckets, "parts", train_batch_size=2, gradient_accumulation_steps=2)
    result = train(parts)
    assert_learnt(parts, result)
    assert losses(result) == pytest.approx(losses(train(large)), rel=0.02 if HAS_GPU else 1e-3)


def peaks(config: RunConfig) -> tuple[int, int]:
    """Bytes of the GPU that a run has in use, and bytes that torch reserves for it; at most."""
    give_memory_back()
    torch.cuda.reset_peak_memory_stats()
    train(config)
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


@contextmanager
def memory_between(
    fits: RunConfig, larger: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """While inside, there is memory for the batch of one run and not for that of the other. On a
    CPU, where none can be taken away, it is said to run out."""
    if not HAS_GPU:
        with monkeypatch.context() as patched:
            out_of_memory_above(fits.training.train_batch_size, patched)
            yield
        return
    needed, _ = peaks(larger)
    _, enough = peaks(fits)
    assert enough < needed
    give_memory_back()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((enough + needed) / 2 / whole)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@on_devices(shown_by="dreambooth/test_train.py")
def test_a_batch_that_does_not_fit_into_memory_is_halved_and_the_losses_stay(
    world: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a GPU large enough that images take far more memory than the model.
    side, batch = (256, 32) if HAS_GPU else (TINY_WIDTH, 4)
    images = write_training_set(tmp_path / "square", sizes=[(side, side)] * 5)
    # With buckets cuDNN tries no algorithms, for which it takes far more memory than it uses then.
    square = world.model_copy(
        update={"training_set": images, "width": side, "height": side, "buckets": True}
    )
    whole = changed(square, "whole", train_batch_size=batch, max_train_steps=3)
    half = changed(square, "half", train_batch_size=batch // 2, max_train_steps=3)
    halved = changed(
        square,
        "halved",
        train_batch_size=batch,
        max_train_steps=3,
        halve_batch_on_out_of_memory=True,
    )
    said: list[str] = []
    with memory_between(half, whole, monkeypatch):
        result = train(halved, log=said.append)
    tried = [line for line in said if "out of memory" in line]
    assert len(tried) == 1
    assert f"{batch // 2} images at once, accumulated 2 times" in tried[0]
    # Done before on a GPU, and then read from there.
    assert losses(result) == pytest.approx(losses(train(whole)), rel=0.02 if HAS_GPU else 1e-3)


@on_devices()
def test_in_tf32_steps_are_nearly_the_same_and_what_is_computed_once_is_whole(
    world: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"method": "lora", "train_text_encoder": False}
    whole = train(changed(world, "whole", **settings))
    seen: dict[str, set[bool]] = {}

    def watch(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watched(*arguments: Any, **values: Any) -> Any:
            seen.setdefault(name, set()).add(torch.backends.cuda.matmul.allow_tf32)
            return function(*arguments, **values)

        monkeypatch.setattr(owner, name, watched)

    watch(AutoencoderKL, "encode")
    watch(CLIPTextModel, "forward")
    watch(objective, "squared_errors")
    watch(lora, "lora_deltas")
    config = changed(world, "tf32", **settings, tf32=True)
    result = train(config.model_copy(update={"cache_dir": config.work_dir / "cache"}))
    assert_learnt(config, result)
    assert losses(result) == pytest.approx(losses(whole), rel=0.02 if HAS_GPU else 1e-6)
    assert seen.pop("squared_errors") == {True}
    assert seen == {"encode": {False}, "forward": {False}, "lora_deltas": {False}}


@on_devices()
def test_a_latent_is_computed_in_whole_fp32(world: RunConfig, device: str) -> None:
    vae = load_vae(world.base_model)
    path = min(world.training_set.glob("*.png"))
    pixels = load_pixels(path, world.size)
    expected = encode(vae, pixels)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        latent = encode(vae.to(device), pixels)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    # TF32 would differ in the third digit.
    for name, value in latent.items():
        torch.testing.assert_close(value.cpu(), expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not HAS_GPU, reason="there is no CUDA device")
@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw_8bit"},
        {"optimizer": "adamw"},
        {"optimizer": "adamw_fused"},
        {"optimizer": "adamw_fused", "mixed_precision": "fp16"},
        {"optimizer": "adamw_8bit", "gradient_checkpointing": True},
        {"optimizer": "adamw_8bit", "method": "lora"},
        {"optimizer": "adamw_8bit", "gradient_accumulation_steps": 2},
        # From the second step on each caption goes through the encoder once more, and is kept.
        {"optimizer": "adamw_8bit", "text_encoder_stop_step": 1},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_step_does_not_wait_for_the_gpu(
    world: RunConfig, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(world, "run", **{"mixed_precision": "bf16", "ema_decay": 0.9, **settings})
    waits: list[None] = []
    with learning(config) as (learner, inputs):
        for step in range(6):  # the first ones prepare states and kernels, and see every caption
            make_step(learner, inputs, step)
        torch.cuda.synchronize()
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waits.append(None))
        torch.cuda.set_sync_debug_mode("error")  # what reads a number from the GPU raises
        try:
            for step in range(6, 9):
                make_step(learner, inputs, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not waits


@on_devices(compiles=True)
def test_the_sampler_draws_in_bf16_compiled_what_it_draws_plainly(world: RunConfig) -> None:
    settings = SamplerSettings(
        num_inference_steps=4, width=TINY_WIDTH, height=TINY_HEIGHT, precision="bf16", batch_size=2
    )
    requests = [ImageRequest(prompt="a red rocket", negative="text", seed=n) for n in (1, 2)]
    drawn = {}
    for compiled in (False, True):
        sampler = Sampler(
            world.base_model, settings.model_copy(update={"compile": compiled}), model_id="test"
        )
        drawn[compiled] = sampler(requests)
        assert [blocked_reason(image) for image in drawn[compiled]] == ["", ""]
    torch._dynamo.reset()
    for plain, quick in zip(drawn[False], drawn[True], strict=True):
        # bf16 keeps three digits, and a compiled model rounds less often.
        apart = np.abs(np.asarray(plain, int) - np.asarray(quick, int))
        assert apart.mean() < 8
