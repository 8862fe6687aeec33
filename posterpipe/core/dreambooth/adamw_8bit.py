"""8-bit Adam that does not keep the GPU waiting.

What belongs here: bitsandbytes' AdamW8bit with another loop. What does not: which optimizer is used
(`optimizers`, which imports this only where it is wanted: bitsandbytes takes seconds to load).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from ctypes import c_bool, c_float, c_int32, c_void_p
from dataclasses import dataclass
from typing import Any, cast

import bitsandbytes
import torch
from bitsandbytes.cextension import lib
from bitsandbytes.functional import optimizer_update_32bit
from bitsandbytes.optim import AdamW8bit
from torch import Tensor

_KERNEL_OF = "0.50.2"
"""The version of bitsandbytes whose kernel is called directly: a C function that is given addresses
and checks nothing. Another version is left to call its own."""


class QueuedAdamW8bit(AdamW8bit):
    """bitsandbytes' AdamW8bit: its kernels, its results and its states, of which it reads its own.

    Its `step` waits for the GPU after each parameter, of which Stable Diffusion has some 700 (1,100
    with the text encoder); the GPU has nothing to do while the next kernel is prepared. Nothing
    needs the wait: these kernels are queued on the default stream, and so is everything that torch
    does as long as no other stream is chosen, which nothing here does; what is queued on one stream
    runs in its order. Only paged states, which are not used here, would need it.

    To prepare a kernel takes the CPU longer than the GPU runs it: some 25 µs a parameter, by way of
    torch's dispatcher. More than half of the parameters are so small that their states are kept in
    32 bits, and all of these are updated by one kernel; for each of the others it is called as
    bitsandbytes calls it in the end.
    """

    def __init__(self, *arguments: Any, **values: Any) -> None:
        super().__init__(*arguments, **values)
        self._plans: dict[int, _Plan] = {}
        """How each group is gone through, by its number."""

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Takes up states. See torch.optim.Optimizer.load_state_dict."""
        super().load_state_dict(state_dict, move_to_device)
        self._plans.clear()  # they hold the states of before

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient. See torch.optim.Optimizer.step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for number, group in enumerate(self.param_groups):
            places = [
                n for n, parameter in enumerate(group["params"]) if parameter.grad is not None
            ]
            plan = self._plans.get(number)
            if plan is None or plan.places != places:
                plan = self._plans[number] = self._plan(number, group, places)
            for together in plan.together:
                together.update(self.optimizer_name, group)
            _update_directly(plan.directly, group)
            for place in plan.alone:
                self.update_step(group, group["params"][place], number, place)
        return loss

    def _plan(self, number: int, group: dict[str, Any], places: list[int]) -> _Plan:
        """For the parameters of a group that have a gradient; prepares the states of new ones."""
        small = defaultdict[int, list[Tensor]](list)
        directly, alone = list[_Direct](), list[int]()
        for place in places:
            parameter = group["params"][place]
            if not self.state[parameter]:
                self.init_state(group, parameter, number, place)
            state = self.state[parameter]
            if parameter.dtype == state["state1"].dtype == torch.float32:
                small[state["step"]].append(parameter)
            elif parameter.dtype == torch.float32 and _may_be_direct(parameter):
                directly.append(_Direct(parameter, state))
            else:
                alone.append(place)
        together = [_Together(same, [self.state[p] for p in same]) for same in small.values()]
        return _Plan(places, together, directly, alone)


@dataclass(frozen=True)
class _Plan:
    """How a group is gone through as long as the same of its parameters have gradients.

    places: of those. together: the ones in 32 bits, by how many steps they have made. directly: the
    ones in 8 bits on a GPU. alone: places of the others, which bitsandbytes goes through itself.
    """

    places: list[int]
    together: list[_Together]
    directly: list[_Direct]
    alone: list[int]


class _Together:
    """Parameters that have made the same number of steps and whose states are in 32 bits: one row
    of numbers, each of which is updated by itself.

    The states lie in one tensor, and those of each parameter become views of it, so that they are
    saved and read as ever. Weights and gradients are copied there and back, megabytes: nobody else
    has to know of it, neither the scaler and the clipping, which change gradients before, nor what
    exchanges them between processes.
    """

    def __init__(self, parameters: list[Tensor], states: list[dict[str, Any]]) -> None:
        self._parameters, self._states = parameters, states
        self._weights, self._weights_of_each = self._row()
        self._gradients, self._gradients_of_each = self._row()
        self._state1, self._state1_of_each = self._row()
        self._state2, self._state2_of_each = self._row()
        for name, views in (("state1", self._state1_of_each), ("state2", self._state2_of_each)):
            torch._foreach_copy_(views, [state[name] for state in states])
            for state, view in zip(states, views, strict=True):
                state[name] = view

    def _row(self) -> tuple[Tensor, list[Tensor]]:
        """Room for one number for each of the parameters' elements, and each one's share of it."""
        sizes = [parameter.numel() for parameter in self._parameters]
        row = torch.empty(sum(sizes), device=self._parameters[0].device)
        shares = zip(row.split(sizes), self._parameters, strict=True)
        return row, [share.view(parameter.shape) for share, parameter in shares]

    def update(self, optimizer_name: str, group: Mapping[str, Any]) -> None:
        """One step of the optimizer with that name, by the values of the group."""
        step = self._states[0]["step"] + 1
        for state in self._states:
            state["step"] = step
        torch._foreach_copy_(self._weights_of_each, self._parameters)
        gradients = cast(list[Tensor], [parameter.grad for parameter in self._parameters])
        torch._foreach_copy_(self._gradients_of_each, gradients)
        optimizer_update_32bit(
            optimizer_name,
            self._gradients,
            self._weights,
            self._state1,
            group["betas"][0],
            group["eps"],
            step,
            group["lr"],
            self._state2,
            group["betas"][1],
            weight_decay=group["weight_decay"],
        )
        torch._foreach_copy_(self._parameters, self._weights_of_each)


class _Direct:
    """A parameter in 8 bits, with the addresses of its states."""

    def __init__(self, parameter: Tensor, state: dict[str, Any]) -> None:
        self.parameter, self.state = parameter, state

        def addresses(*names: str) -> list[c_void_p]:
            return [c_void_p(state[name].data_ptr()) for name in names]

        self.states = addresses("state1", "state2")
        self.maps = addresses("qmap1", "qmap2", "absmax1", "absmax2")
        self.size = c_int32(parameter.numel())


def _may_be_direct(parameter: Tensor) -> bool:
    """Whether all holds for a parameter that the kernel takes for granted."""
    return (
        bitsandbytes.__version__ == _KERNEL_OF
        and lib.compiled_with_cuda
        and parameter.is_cuda
        and parameter.device.index == torch.cuda.current_device()
        and parameter.is_contiguous()
    )


def _update_directly(parameters: list[_Direct], group: Mapping[str, Any]) -> None:
    """One step for each, by the values of the group; what `Optimizer2State.update_step` comes to in
    the end, with the numbers that it hands over."""
    kernel = lib.cadam_8bit_blockwise_grad_fp32
    beta1, beta2 = map(c_float, group["betas"])
    eps, rate, decay = (c_float(group[name]) for name in ("eps", "lr", "weight_decay"))
    unused, whole, skip_zeros = c_float(0.0), c_float(1.0), c_bool(False)
    for one in parameters:
        one.state["step"] += 1
        gradient = cast(Tensor, one.parameter.grad).contiguous()
        kernel(
            c_void_p(one.parameter.data_ptr()),
            c_void_p(gradient.data_ptr()),
            *one.states,
            beta1,
            beta2,
            unused,  # the third beta and alpha, of AdEMAMix
            unused,
            eps,
            c_int32(one.state["step"]),
            rate,
            *one.maps,
            decay,
            whole,  # of the gradient
            skip_zeros,
            one.size,
        )
