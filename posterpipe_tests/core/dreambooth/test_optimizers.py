"""What moves the weights, whatever their memory layout."""

from __future__ import annotations

import ctypes
import importlib
import tomllib
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import bitsandbytes
import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn

from posterpipe.core.dreambooth import adamw_8bit, objective
from posterpipe.core.dreambooth.adamw_8bit import QueuedAdamW8bit
from posterpipe.core.dreambooth.optimizers import InMemoryOrder, MovingAverage, make_optimizer
from posterpipe.core.dreambooth.reports import StepReport
from posterpipe.core.dreambooth.saves import pack, unpack
from posterpipe.core.dreambooth.train import train
from posterpipe.settings import default_root
from posterpipe.training_settings import TrainingSettings
from posterpipe_tests.core.dreambooth.conftest import MakeConfig


def trained(optimizer: str, *, channels_last: bool) -> nn.Conv2d:
    """A convolution of more weights than 8-bit Adam keeps in 32 bits, after three steps."""
    torch.manual_seed(0)
    model = nn.Conv2d(32, 64, 3, padding=1)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    order = InMemoryOrder([list(model.parameters())])
    settings = TrainingSettings(optimizer=optimizer, learning_rate=1e-2)
    stepper = make_optimizer(settings, order.groups)
    for step in range(3):
        x = torch.randn(2, 32, 6, 6, generator=torch.Generator().manual_seed(step))
        model(x).pow(2).mean().backward()
        order.take_gradients()
        stepper.step()
        stepper.zero_grad(set_to_none=True)
        order.forget_gradients()
        assert model.weight.grad is None
    return model


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_fused", "adamw_8bit"])
def test_the_layout_changes_no_weight_and_stays(optimizer: str) -> None:
    plain = trained(optimizer, channels_last=False)
    other = trained(optimizer, channels_last=True)
    assert other.weight.is_contiguous(memory_format=torch.channels_last)
    # 8-bit Adam rounds blocks of 256 weights together, and other weights are neighbours now.
    tolerance = 4e-3 if optimizer == "adamw_8bit" else 1e-5
    torch.testing.assert_close(plain.weight, other.weight, atol=tolerance, rtol=0)


SHAPES = ((9,), (80, 70), (), (4095,), (1, 3, 5), (4096,), (33,), (64, 65, 2), (7, 40))
"""Of fewer and of more numbers than 8-bit Adam keeps in 32 bits, and no multiples of its blocks."""


def two_groups(device: str = "cpu") -> list[dict[str, Any]]:
    """The same each time."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, device=device)) for shape in SHAPES]
    return [{"params": parameters[:5]}, {"params": parameters[5:]}]


def eight_bit_steps(optimizer: Any, steps: range) -> None:
    """Steps with other gradients and rates each. In some one parameter has no gradient; the second
    group stops learning after six."""
    for step in steps:
        torch.manual_seed(step)
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = 1e-2 / (1 + step + number)
            for place, parameter in enumerate(group["params"]):
                gradient = torch.randn_like(parameter) * 10.0 ** (place - 3)
                learns = (number, place) != (0, step - 2) and (number == 0 or step < 6)
                parameter.grad = gradient if learns else None
        optimizer.step()


def assert_same_bits(optimizer: Any, other: Any) -> None:
    """Their weights, states and saved states are equal."""
    packed, tensors = pack(optimizer.state_dict())
    other_packed, other_tensors = pack(other.state_dict())
    assert packed == other_packed and tensors.keys() == other_tensors.keys()
    assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)
    for group, other_group in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert all(map(torch.equal, group["params"], other_group["params"]))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_eight_bit_adam_that_does_not_wait_has_the_weights_and_states_of_bitsandbytes(
    decay: float,
) -> None:
    values: dict[str, Any] = {"betas": (0.8, 0.99), "weight_decay": decay, "eps": 1e-7}
    peer, own = AdamW8bit(two_groups(), **values), QueuedAdamW8bit(two_groups(), **values)
    for step in range(12):
        eight_bit_steps(peer, range(step, step + 1))
        eight_bit_steps(own, range(step, step + 1))
        assert_same_bits(own, peer)
        if step in (3, 8):  # a save of either is one of the other
            packed, tensors = pack((own if step == 8 else peer).state_dict())
            saved = {name: value.clone() for name, value in tensors.items()}
            own, peer = QueuedAdamW8bit(own.param_groups), AdamW8bit(peer.param_groups)
            own.load_state_dict(unpack(packed, saved))
            peer.load_state_dict(unpack(packed, saved))


def test_what_is_kept_in_32_bits_is_updated_by_one_kernel_a_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels: list[int] = []
    update = bitsandbytes.functional.optimizer_update_32bit

    def counted(name: str, gradient: torch.Tensor, *others: Any, **values: Any) -> None:
        kernels.append(gradient.numel())
        update(name, gradient, *others, **values)

    for module in (bitsandbytes.functional, adamw_8bit):
        monkeypatch.setattr(module, "optimizer_update_32bit", counted)
    optimizer = QueuedAdamW8bit(two_groups())
    eight_bit_steps(optimizer, range(2))
    assert kernels == [9 + 1 + 4095 + 15, 33 + 280] * 2
    kernels.clear()
    eight_bit_steps(optimizer, range(2, 3))  # one of the first group has no gradient
    assert kernels == [1 + 4095 + 15, 33 + 280]
    kernels.clear()
    eight_bit_steps(optimizer, range(7, 8))  # it is a step behind; the second group has stopped
    assert sorted(kernels) == [9, 1 + 4095 + 15]


def kernel_on_the_cpu(*arguments: Any) -> None:
    """What bitsandbytes' kernel does on a GPU, from the same arguments: addresses, numbers and how
    many elements there are."""
    numbers = [argument.value for argument in arguments]
    weights, gradient, state1, state2, *values = numbers[:12]
    qmap1, qmap2, absmax1, absmax2, decay, scale, skip_zeros, size = numbers[11:]

    def at(address: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        memory = (ctypes.c_byte * (count * dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=dtype)

    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        "adam",
        at(gradient, size),
        at(weights, size),
        at(state1, size, torch.uint8),
        at(state2, size, torch.uint8),
        *values[:-1],
        at(qmap1, 256),
        at(qmap2, 256),
        at(absmax1, -(-size // 256)),
        at(absmax2, -(-size // 256)),
        decay,
        scale,
        skip_zeros,
    )


def test_a_kernel_called_directly_is_told_what_bitsandbytes_tells_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The module is for CUDA and asks torch for this when it is imported.
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    cuda = importlib.import_module("bitsandbytes.backends.cuda.ops")
    calls = Mock(side_effect=kernel_on_the_cpu)
    monkeypatch.setitem(cuda.str2optimizer8bit_blockwise, "adam", [calls])
    monkeypatch.setattr(
        bitsandbytes.functional,
        "optimizer_update_8bit_blockwise",
        lambda *values, gnorm_scale, skip_zeros: cuda._optimizer_update_8bit_blockwise_impl(
            *values, gnorm_scale, skip_zeros
        ),
    )
    values: dict[str, Any] = {"betas": (0.8, 0.99), "weight_decay": 0.1, "eps": 1e-7}
    peer, own = AdamW8bit(two_groups(), **values), QueuedAdamW8bit(two_groups(), **values)
    eight_bit_steps(peer, range(9))
    told = [call.args for call in calls.call_args_list]

    direct = Mock(side_effect=kernel_on_the_cpu)
    monkeypatch.setattr(adamw_8bit, "lib", SimpleNamespace(cadam_8bit_blockwise_grad_fp32=direct))
    monkeypatch.setattr(adamw_8bit, "_may_be_direct", lambda parameter: True)
    eight_bit_steps(own, range(4))
    own.load_state_dict(own.state_dict())  # other memory
    eight_bit_steps(own, range(4, 9))
    assert_same_bits(own, peer)
    assert len(direct.call_args_list) == len(told) == len(calls.call_args_list) == 20
    for call, expected in zip(direct.call_args_list, told, strict=True):
        for one, other in zip(call.args, expected, strict=True):
            assert type(one) is type(other)
            assert isinstance(one, ctypes.c_void_p) or one.value == other.value


def test_only_the_version_of_bitsandbytes_that_is_known_has_its_kernel_called_directly() -> None:
    # Both go on together, after a look at its `_optimizer_update_8bit_blockwise_impl`.
    pinned = tomllib.loads((default_root() / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"bitsandbytes=={adamw_8bit._KERNEL_OF}" in pinned["project"]["dependencies"]
    assert not adamw_8bit._may_be_direct(nn.Parameter(torch.zeros(1)))  # on a CPU there is none


def test_a_run_has_the_bits_of_bitsandbytes_own_loop_also_from_its_saves(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"optimizer": "adamw_8bit", "mixed_precision": "fp16"}
    settings |= {"max_train_steps": 12, "save_every_steps": 3, "text_encoder_stop_step": 10}
    settings |= {"max_grad_norm": 0.1, "ema_decay": 0.9, "channels_last": True}
    monkeypatch.setattr(objective, "squared_errors", times_a_hundred)

    def stop(report: StepReport) -> None:
        if report.step == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as one_by_one:
        one_by_one.delattr(QueuedAdamW8bit, "step")
        one_by_one.setattr(QueuedAdamW8bit, "load_state_dict", AdamW8bit.load_state_dict)
        expected = train(make_config("theirs", **settings))
        with pytest.raises(KeyboardInterrupt):
            train(make_config("cut", **settings), stop)
    skipped = [report.skipped_steps for report in expected.reports]
    assert 0 < skipped[-1] < 9 and (expected.reports[-2].grad_norm or 0) > 0.1
    train(make_config("ours", **settings))
    resumed = train(make_config("cut", **settings))
    assert resumed.resumed_from == 6
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        files = [
            (make_config(run).output_dir / f"{name}.safetensors").read_bytes()
            for run in ("theirs", "ours", "cut")
        ]
        assert files[0] == files[1] == files[2]


def times_a_hundred(prediction: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Errors whose gradient, times the scaler's first scales, is more than fp16 holds."""
    return 100 * (prediction.float() - wanted).pow(2).mean(dim=(1, 2, 3))


def test_eight_bit_adam_never_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Any] = []
    monkeypatch.setattr(bitsandbytes.optim.optimizer, "sync_gpu", waits.append)
    trained("adamw_8bit", channels_last=True)
    assert not waits
    eight_bit_steps(AdamW8bit(two_groups()), range(1))
    assert len(waits) == len(SHAPES)  # bitsandbytes' own waits each time, and by this very function


def test_plain_adam_leaves_to_torch_how_it_goes_through_the_parameters() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    plain = make_optimizer(TrainingSettings(optimizer="adamw"), [parameters])
    # torch chooses foreach on a GPU only where both are left to it.
    assert plain.defaults["foreach"] is None and plain.defaults["fused"] is None
    fused = make_optimizer(TrainingSettings(optimizer="adamw_fused"), [parameters])
    assert fused.defaults["fused"] is True


def test_eight_bits_follow_thirty_two() -> None:
    exact = trained("adamw", channels_last=True).weight
    rounded = trained("adamw_8bit", channels_last=True).weight
    torch.manual_seed(0)
    start = nn.Conv2d(32, 64, 3, padding=1)
    moved = (exact - start.weight).norm()
    assert (exact - rounded).norm() < 0.05 * moved


def test_an_average_is_put_in_and_taken_out_again() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    average = MovingAverage([parameter], decay=0.5)
    with torch.no_grad():
        parameter.fill_(1.0)
    average.update(0)  # keeps 1/10 at first
    with average.applied():
        assert parameter.tolist() == pytest.approx([0.9] * 3)
    assert parameter.tolist() == [1.0] * 3
    average.update(100)  # keeps 1/2
    average.copy_to_parameters()
    assert parameter.tolist() == pytest.approx([0.95] * 3)
