"""What moves the weights.

What belongs here: the optimizers by their setting's name, and the moving average of the weights.
What does not: the rates (`schedule`) and when a step is made (`train`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from posterpipe.training_settings import TrainingSettings


def make_optimizer(
    settings: TrainingSettings, groups: Sequence[Sequence[Tensor]]
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), one group of parameters a model.

    None of them waits for the GPU. Only under fp16 `adamw` and `adamw_8bit` do, once a step: the
    scaler has to know whether gradients overflowed before it calls them, and `adamw_fused` asks on
    the GPU itself.
    """
    values: dict[str, Any] = {
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.adam_weight_decay,
        "eps": settings.adam_epsilon,
    }
    parameters: list[dict[str, Any]] = [
        {"params": list(group), "lr": settings.learning_rate} for group in groups
    ]
    if settings.optimizer == "adamw_8bit":
        from posterpipe.core.dreambooth.adamw_8bit import QueuedAdamW8bit

        return QueuedAdamW8bit(parameters, **values)
    # None, not False: only then does torch choose itself, and on a GPU it goes through all
    # parameters at once (foreach) instead of one after the other.
    fused = True if settings.optimizer == "adamw_fused" else None
    return torch.optim.AdamW(parameters, **values, fused=fused)


def memory_axes(tensor: Tensor) -> list[int]:
    """The axes of a tensor in the order in which they lie in memory."""
    if tensor.is_contiguous():  # also where an axis of one element has another stride
        return list(range(tensor.dim()))
    return sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)


class InMemoryOrder:
    """Parameters as an optimizer is given them: the same memory, its axes in the order in which
    they lie.

    bitsandbytes works on bytes in their order and silently makes every parameter contiguous, after
    which channels-last convolutions are slow again. Saved states, too, come back contiguous.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        self._parameters = groups
        self.groups: list[list[Tensor]] = []
        """For the optimizer; a parameter that is contiguous stands for itself."""
        self._views: list[tuple[Tensor, Tensor, list[int]]] = []
        for group in groups:
            self.groups.append([self._ordered(parameter) for parameter in group])

    def _ordered(self, parameter: Tensor) -> Tensor:
        if parameter.is_contiguous():
            return parameter
        axes = memory_axes(parameter)
        view = torch.nn.Parameter(parameter.detach().permute(axes))
        self._views.append((parameter, view, axes))
        return view

    def reordered(self, state: dict[str, Any], before: torch.memory_format) -> None:
        """Brings the moments in the state of an AdamW of 32 bits, saved when weights had another
        memory layout, into the order of this one."""
        parameters = [parameter for group in self._parameters for parameter in group]
        for place, moments in state.items():
            parameter = parameters[int(place)]
            if parameter.dim() != 4:
                continue
            then = memory_axes(torch.empty(parameter.shape, memory_format=before))
            now = memory_axes(parameter)
            for name, moment in moments.items():
                if moment.dim() == 4:
                    plain = moment.permute([then.index(axis) for axis in range(4)])
                    moments[name] = plain.permute(now).contiguous()

    def take_gradients(self) -> None:
        """Shows the optimizer the gradients that the parameters have now.

        Raises RuntimeError for a parameter that has moved to other memory: the optimizer would
        change nothing that is used.
        """
        for parameter, view, axes in self._views:
            if view.data_ptr() != parameter.data_ptr():
                raise RuntimeError("a weight was moved after the optimizer was made")
            view.grad = None if parameter.grad is None else parameter.grad.permute(axes)

    def forget_gradients(self) -> None:
        """Leaves the gradients of the parameters; those of the views are the optimizer's."""
        for parameter, _, _ in self._views:
            parameter.grad = None


class MovingAverage:
    """An exponential moving average of parameters, in fp32 beside them.

    After n updates it keeps min(decay, (1 + n) / (10 + n)) of itself, so that the first, untrained
    weights are soon forgotten (as TensorFlow's ExponentialMovingAverage does).
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self._parameters = list(parameters)
        self._decay = decay
        self.average = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Takes the parameters in; `updates` were made before, this one not counted."""
        kept = min(self._decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self._parameters], 1 - kept)

    def parameters_by_place(self) -> dict[str, Tensor]:
        """The parameters as they are now, by the places of their averages."""
        return {str(place): value.detach() for place, value in enumerate(self._parameters)}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While inside, the parameters have the average's values."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Gives the parameters the average's values for good."""
        torch._foreach_copy_(self._parameters, self.average)

    def _swap(self) -> None:
        # Storages change places, nothing is copied.
        for place, parameter in enumerate(self._parameters):
            parameter.data, self.average[place] = self.average[place], parameter.data
