"""What moves the weights, whatever their memory layout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from posterpipe.core.dreambooth.optimizers import InMemoryOrder, MovingAverage, make_optimizer
from posterpipe.core.dreambooth.saves import pack, unpack
from posterpipe.settings import TrainingSettings


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


def eight_bit_steps(optimizer: Any, model: nn.Module, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def test_eight_bit_adam_that_does_not_wait_has_the_weights_and_states_of_bitsandbytes() -> None:
    from bitsandbytes.optim import AdamW8bit

    from posterpipe.core.dreambooth.eight_bits import QueuedAdamW8bit

    torch.manual_seed(0)
    # Of more and of fewer weights than are kept in 8 bits.
    theirs = nn.Sequential(nn.Linear(80, 70), nn.Linear(70, 9))
    ours = copy.deepcopy(theirs)
    values: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.99), "weight_decay": 0.1, "eps": 1e-7}
    peer = AdamW8bit(theirs.parameters(), **values)
    own = QueuedAdamW8bit(ours.parameters(), **values)
    eight_bit_steps(peer, theirs, range(3))
    eight_bit_steps(own, ours, range(3))
    packed, tensors = pack(peer.state_dict())
    own_packed, own_tensors = pack(own.state_dict())
    assert own_packed == packed and own_tensors.keys() == tensors.keys()
    assert all(torch.equal(own_tensors[name], tensors[name]) for name in tensors)
    # A save of either is one of the other.
    resumed = QueuedAdamW8bit(ours.parameters(), **values)
    resumed.load_state_dict(unpack(packed, tensors))
    eight_bit_steps(peer, theirs, range(3, 5))
    eight_bit_steps(resumed, ours, range(3, 5))
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, other)


def test_eight_bit_adam_never_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.optim import AdamW8bit, optimizer

    waits: list[Any] = []
    monkeypatch.setattr(optimizer, "sync_gpu", waits.append)
    trained("adamw_8bit", channels_last=True)
    assert not waits
    model = nn.Linear(9, 9)
    eight_bit_steps(AdamW8bit(model.parameters()), model, range(1))
    assert len(waits) == 2  # bitsandbytes' own waits once a parameter, and by this very function


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
