"""The models in training: which parts of them are compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import UNet2DConditionModel

from posterpipe.core.dreambooth.train import train
from posterpipe_tests.core.dreambooth.conftest import MakeConfig


def test_of_compiled_blocks_the_losses_are_the_same_and_what_is_looked_at_compiles_nothing(
    make_config: MakeConfig, other_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        """In place of a compiler, which takes minutes."""
        learning.append(torch.is_grad_enabled())
        return graph.forward

    real = UNet2DConditionModel.compile_repeated_blocks
    monkeypatch.setattr(
        UNet2DConditionModel,
        "compile_repeated_blocks",
        lambda unet, **values: real(unet, backend=backend, **values),
    )
    settings: dict[str, Any] = {"max_train_steps": 3, "holdout_every_steps": 1, "ema_decay": 0.9}
    parts = {"holdout_set": other_set}
    plain = train(make_config("plain", parts=parts, **settings))
    settings |= {"compile": True, "compile_blocks": True}
    torch._dynamo.reset()
    compiled = train(make_config("compiled", parts=parts, **settings))
    torch._dynamo.reset()
    assert learning and all(learning)
    losses = [report.loss for report in plain.reports]
    assert [report.loss for report in compiled.reports] == pytest.approx(losses, rel=1e-5)
    assert [m.loss for m in compiled.holdout] == pytest.approx([m.loss for m in plain.holdout])
