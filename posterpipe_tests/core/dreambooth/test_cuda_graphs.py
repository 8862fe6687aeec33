"""Passes that are recorded once and replayed; what a GPU shows of it is in `test_cuda`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.models import AutoencoderKL
from torch import Tensor, nn

from posterpipe.core.dreambooth import learner as learners
from posterpipe.core.dreambooth.cuda_graphs import (
    Passed,
    Record,
    RecordedPass,
    has_ample_memory,
    hindrance,
)
from posterpipe.core.dreambooth.train import train
from posterpipe.training_settings import TrainingSettings
from posterpipe_tests.core.dreambooth.conftest import (
    MakeConfig,
    equal,
    losses,
    text_weights,
    unet_weights,
)


def record_on_cpu(make_pass: Callable[[], Passed]) -> tuple[Callable[[], object], Passed]:
    """As on a GPU: nothing is computed yet, and each replay writes to the same memory."""
    answers = make_pass()
    loss, gradients = answers
    written = [loss, *(value for value in gradients if value is not None)]
    for value in written:
        value.fill_(torch.nan)

    def replay() -> None:
        loss, gradients = make_pass()
        now = [loss, *(value for value in gradients if value is not None)]
        for place, value in zip(written, now, strict=True):
            place.copy_(value)

    return replay, answers


def recorded_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Passed]:
    """Has steps recorded on a CPU; the list gets the answers of each recording."""
    recordings: list[Passed] = []

    def recorded(loss_of: Any, *arguments: Any, **values: Any) -> RecordedPass:
        models = loss_of.__self__.models

        def places() -> list[int]:
            return [value.data_ptr() for value in models["unet"].state_dict().values()]

        def record(make_pass: Callable[[], Passed]) -> tuple[Callable[[], object], Passed]:
            replay, answers = record_on_cpu(make_pass)
            recordings.append(answers)
            before = places()

            def replay_in_place() -> None:
                assert places() == before, "a GPU would read where nothing is any more"
                replay()

            return replay_in_place, answers

        return RecordedPass(loss_of, *arguments, record=record, **values)

    monkeypatch.setattr(learners, "RecordedPass", recorded)
    monkeypatch.setattr(learners, "has_ample_memory", lambda device: True)
    monkeypatch.setattr(
        learners, "hindrance", lambda settings, _, **rest: hindrance(settings, GPU, **rest)
    )
    return recordings


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("settings", "recordings"),
    [
        ({"optimizer": "adamw_8bit", "ema_decay": 0.9, "train_text_encoder": False}, 1),
        ({"mixed_precision": "bf16", "gradient_accumulation_steps": 3, "channels_last": True}, 1),
        ({"mixed_precision": "fp16"}, 1),
        ({"method": "lora", "train_text_encoder": False}, 1),
        # With gradients for the text encoder, and then without.
        ({"text_encoder_stop_step": 4, "max_grad_norm": 0.01}, 2),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_replayed_steps_end_with_the_bits_of_steps_that_are_made(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    recordings: int,
) -> None:
    plain = make_config("plain", max_train_steps=8, cuda_graphs=False, **settings)
    expected = train(plain)
    found = recorded_on_cpu(monkeypatch)
    replayed = make_config("replayed", max_train_steps=8, **settings)
    result = train(replayed)
    assert len(found) == recordings
    assert losses(result) == losses(expected)
    assert equal(unet_weights(replayed.output_dir), unet_weights(plain.output_dir))
    assert equal(text_weights(replayed.output_dir), text_weights(plain.output_dir))
    assert result.checkpoint_id == expected.checkpoint_id


def square_error(inputs: Tensor, weights: Tensor, model: nn.Module) -> Tensor:
    return (model(inputs).square() * weights).sum()


class Passes:
    """A recorded pass through a small model, beside plain ones. record: as if on a GPU if none is
    given."""

    def __init__(self, record: Record = record_on_cpu) -> None:
        torch.manual_seed(0)
        self.model = nn.Conv2d(2, 3, 3)
        cast(Any, self.model).to(memory_format=torch.channels_last)
        self.log: list[str] = []
        self.recordings = 0

        def counted(make_pass: Callable[[], Passed]) -> tuple[Callable[[], object], Passed]:
            self.recordings += 1
            return record(make_pass)

        self.passes = RecordedPass(
            partial(square_error, model=self.model),
            [*self.model.parameters()],
            scaled=lambda loss: 2 * loss,
            ample=None,
            log=self.log.append,
            record=counted,
        )

    def check(self, *shape: int, added: int = 1) -> None:
        """Some passes add up to what `backward()` gives, for inputs that want a gradient too."""
        images = [torch.randn(*shape, requires_grad=True) for _ in range(added)]
        losses = [self.passes(each, torch.ones(())) for each in images]
        found = [parameter.grad for parameter in self.model.parameters()]
        self.model.zero_grad()
        for each in images:
            loss = square_error(each, torch.ones(()), self.model)
            (2 * loss).backward()
        for parameter, gradient in zip(self.model.parameters(), found, strict=True):
            assert gradient is not None and parameter.grad is not None
            assert torch.equal(parameter.grad, gradient)
            assert parameter.grad.stride() == gradient.stride()
        loss, gradients = losses[-1]
        assert torch.equal(loss, square_error(images[-1], torch.ones(()), self.model))
        image, weight = gradients
        assert image is not None and torch.equal(image, images[-1].grad)  # type: ignore[arg-type]
        assert weight is None
        self.model.zero_grad()


def test_gradients_add_up_over_passes_of_which_some_are_replayed() -> None:
    passes = Passes()
    for added in (1, 2, 3, 1):
        passes.check(2, 2, 8, 8, added=added)
    assert not passes.log


def test_gradients_lie_as_their_parameters_do() -> None:
    weight = nn.Parameter(torch.randn(3, 4))

    def loss_of(inputs: Tensor) -> Tensor:
        return (inputs @ weight.t().contiguous()).square().sum()

    passes = RecordedPass(
        loss_of, [weight], scaled=lambda loss: loss, ample=None, log=print, record=record_on_cpu
    )
    inputs = torch.randn(5, 4)
    (lies,) = torch.autograd.grad(loss_of(inputs), [weight])
    assert lies.stride() != weight.stride()
    for _ in range(3):
        passes(inputs)
        assert weight.grad is not None and torch.equal(weight.grad, lies)
        assert weight.grad.stride() == weight.stride()
        weight.grad = None


def test_for_another_shape_a_pass_is_recorded_anew() -> None:
    passes = Passes()
    for batch in (4, 4, 4, 2, 2, 2):
        passes.check(batch, 2, 8, 8)
    assert passes.recordings == 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 3 GiB"), "not enough memory"),
        (RuntimeError("operation not permitted\nwhen stream is capturing"), "not permitted"),
    ],
)
def test_what_cannot_be_recorded_is_made_each_time_and_it_is_said_once(
    error: Exception, reason: str
) -> None:
    def record(make_pass: Callable[[], Passed]) -> Any:
        make_pass()
        raise error

    passes = Passes(record=record)
    for _ in range(4):
        passes.check(2, 2, 8, 8, added=2)
    assert passes.recordings == len(passes.log) == 1
    assert reason in passes.log[0] and "training.cuda_graphs" in passes.log[0]


def test_where_memory_is_not_ample_nothing_is_recorded_unless_it_is_asked_for(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    found = recorded_on_cpu(monkeypatch)
    monkeypatch.setattr(learners, "has_ample_memory", lambda device: False)
    train(make_config("left", max_train_steps=4), log=log.append)
    assert not found and sum("memory is not ample" in line for line in log) == 1
    train(make_config("asked", max_train_steps=4, cuda_graphs=True), log=log.append)
    assert len(found) == 1


def test_memory_is_ample_where_as_much_is_free_as_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8, 24))
    for held, ample in ((8, True), (9, False)):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, held=held: held)
        assert has_ample_memory(GPU) is ample


def test_whether_memory_is_ample_is_asked_once_and_after_the_first_whole_step(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = recorded_on_cpu(monkeypatch)
    happened: list[str] = []
    real = learners.Learner.make_step

    def make_step(*arguments: Any) -> Tensor:
        happened.append("step")
        return real(*arguments)

    def ample(device: torch.device) -> bool:
        happened.append("asked")
        return True

    monkeypatch.setattr(learners.Learner, "make_step", make_step)
    monkeypatch.setattr(learners, "has_ample_memory", ample)
    settings = {"gradient_accumulation_steps": 3, "text_encoder_stop_step": 3}
    train(make_config("run", max_train_steps=6, **settings))
    assert happened == ["step", "asked", *5 * ["step"]]
    assert len(found) == 2  # with gradients for the text encoder, and without


@pytest.mark.parametrize(
    ("settings", "device", "rest", "expected"),
    [
        ({}, "cuda", {}, None),
        ({}, "cpu", {}, "device cpu"),
        ({"cuda_graphs": False}, "cuda", {}, "cuda_graphs = false"),
        ({"compile": True}, "cuda", {}, "compile"),
        ({"compile": True, "cuda_graphs": True}, "cuda", {}, None),
        ({"gradient_checkpointing": True}, "cuda", {}, "gradient_checkpointing"),
        ({"cuda_graphs": True}, "cuda", {"processes": 2}, "2 processes"),
        ({"cuda_graphs": True}, "cuda", {"one_shape": False}, "buckets"),
    ],
)
def test_steps_are_recorded_on_one_gpu_where_each_is_like_the_one_before(
    settings: dict[str, Any], device: str, rest: dict[str, Any], expected: str | None
) -> None:
    values = {"processes": 1, "one_shape": True, **rest}
    assert hindrance(TrainingSettings(**settings), torch.device(device), **values) == expected


def test_what_keeps_a_run_from_recording_is_said_where_it_was_asked_for(
    make_config: MakeConfig,
) -> None:
    for wanted, said in ((True, 1), (None, 0), (False, 0)):
        log: list[str] = []
        config = make_config(str(wanted), max_train_steps=1, cuda_graphs=wanted)
        train(config, log=log.append)
        lines = [line for line in log if "cuda_graphs" in line]
        assert len(lines) == said
        assert all("training.cuda_graphs = true has no effect with device cpu" in x for x in lines)


def out_of_memory_once(call: int) -> Callable[[], None]:
    """Raises at that call, as where memory has run out."""
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return check


@pytest.mark.parametrize("where", ["the text encoder", "samples", "held-out posters"])
def test_where_memory_runs_out_that_of_the_recording_is_given_back_first(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, other_set: Path, where: str
) -> None:
    settings: dict[str, Any] = {"max_train_steps": 6, "gradient_accumulation_steps": 2}
    settings |= {"holdout_every_steps": 5, "sample_every_steps": 5, "sample_prompts": ("a cat",)}
    parts = {"holdout_set": other_set}
    plain = make_config("plain", parts=parts, **settings)
    expected = train(plain)
    found = recorded_on_cpu(monkeypatch)
    owner, name, check = {
        # In a step: after a batch of it has left gradients already.
        "the text encoder": (learners.TrainedTexts, "__call__", out_of_memory_once(4)),
        "samples": (AutoencoderKL, "decode", out_of_memory_once(2)),
        "held-out posters": (learners.Learner, "errors_of", out_of_memory_once(3)),
    }[where]
    real = getattr(owner, name)

    def checked(*arguments: Any, **values: Any) -> Any:
        if found:
            check()
        return real(*arguments, **values)

    monkeypatch.setattr(owner, name, checked)
    log: list[str] = []
    config = make_config("short", parts=parts, **settings)
    result = train(config, log=log.append)
    said = [line for line in log if "out of memory" in line]
    assert said == ["out of memory: goes on without CUDA graphs"]
    assert len(found) == 1
    assert losses(result) == losses(expected)
    assert [m.loss for m in result.holdout] == [m.loss for m in expected.holdout]
    for one in (config, plain):
        assert len(list((one.output_dir / "samples").glob("*.png"))) == 3


def test_nothing_that_a_run_does_between_steps_moves_what_a_replay_reads(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, other_set: Path
) -> None:
    found = recorded_on_cpu(monkeypatch)
    config = make_config(
        "busy",
        parts={"holdout_set": other_set},
        max_train_steps=6,
        ema_decay=0.9,
        holdout_every_steps=1,
        early_stop_patience=5,
        save_every_steps=2,
        sample_every_steps=2,
        sample_prompts=["a rocket"],
        export_every_steps=3,
    )
    result = train(config)
    assert len(found) == 1 and len(result.holdout) == 7


def test_of_a_weight_that_was_moved_a_pass_is_recorded_anew() -> None:
    passes = Passes()
    for _ in range(3):
        passes.check(2, 2, 8, 8)
    passes.model.weight.data = passes.model.weight.data.clone()
    for _ in range(3):
        passes.check(2, 2, 8, 8)
    assert passes.recordings == 2


def test_a_run_that_was_killed_goes_on_replaying_with_the_same_bits(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {"max_train_steps": 8, "save_every_steps": 4, "ema_decay": 0.9}
    plain = make_config("plain", **settings)
    expected = train(plain)
    found = recorded_on_cpu(monkeypatch)
    cut = make_config("cut", **settings)

    def interrupt(report: Any) -> None:
        if report.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cut, interrupt)
    resumed = train(cut)
    assert resumed.resumed_from == 4 and len(found) == 2
    assert losses(resumed) == losses(expected)
    assert equal(unet_weights(cut.output_dir), unet_weights(plain.output_dir))
