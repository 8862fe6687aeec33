"""What moves the weights, whatever their memory layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from posterpipe.core.dreambooth.optimizers import InMemoryOrder, MovingAverage, make_optimizer
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
