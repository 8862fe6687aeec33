"""A pass through a model and back, recorded on a GPU once and replayed from then on.

What belongs here: when a pass is recorded, the memory that it reads and leaves, gradients that add
up. What does not: what the pass computes (`learner`).

A pass through Stable Diffusion's U-Net starts thousands of kernels, and a processor may need longer
to start them than the GPU to compute them. A recording starts all of them at once: the same
kernels in the same order, and so the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from posterpipe.core.errors import first_line
from posterpipe.core.memory import is_out_of_memory
from posterpipe.training_settings import TrainingSettings

Passed = tuple[Tensor, tuple[Tensor | None, ...]]
"""A loss, and the gradients of the parameters and of those inputs that have any."""
Record = Callable[[Callable[[], Passed]], tuple[Callable[[], object], Passed]]
"""A pass that has been made before -> what makes it anew, and where its answers are after that."""


def hindrance(
    settings: TrainingSettings, device: torch.device, *, processes: int, one_shape: bool
) -> str | None:
    """Why a run's passes are not recorded, whatever memory there is; None where they may be.

    one_shape: of all images. Each other shape would be recorded anew.
    """
    if settings.cuda_graphs is False:
        return "cuda_graphs = false"
    if device.type != "cuda":
        return f"device {device.type}"
    if processes > 1:
        return f"{processes} processes"
    if not one_shape:
        return "buckets"
    if settings.gradient_checkpointing:  # it reads the state of random numbers
        return "gradient_checkpointing"
    if settings.compile and settings.cuda_graphs is None:
        return "compile"
    return None


def has_ample_memory(device: torch.device) -> bool:
    """Whether as much of a GPU's memory is free as torch holds. A pass takes no more than that, and
    what it computes in is its own: held-out posters and samples need theirs beside it."""
    free, _ = torch.cuda.mem_get_info(device)
    return free >= torch.cuda.memory_reserved(device)


def record(make_pass: Callable[[], Passed]) -> tuple[Callable[[], object], Passed]:
    """Records a pass as a CUDA graph, see `Record`. Nothing is computed meanwhile.

    torch is asked for memory for the whole pass, and is given back what the passes before left.
    """
    graph = torch.cuda.CUDAGraph()
    # The outer one comes back to the stream of now also where a recording that failed does not: the
    # optimizer's kernels are on it.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        answers = make_pass()
    return graph.replay, answers


class RecordedPass:
    """Forward and backward pass: recorded when inputs of one shape come for the second time.

    loss_of: inputs -> loss, a scalar. scaled: loss -> what to go back from. parameters: get the
    gradients, as from `backward()`: what they have already is added to, for which a replay needs
    memory for all of them once more. ample: asked before the first recording whether there is
    memory for one; not asked where None. Where it cannot be recorded, the pass is made anew each
    time.

    What `loss_of` reads beside its inputs has to stay where it is in memory; when a parameter has
    been moved, the pass is recorded anew.
    """

    def __init__(
        self,
        loss_of: Callable[..., Tensor],
        parameters: Sequence[Tensor],
        *,
        scaled: Callable[[Tensor], Tensor],
        ample: Callable[[], bool] | None,
        log: Callable[[str], None],
        record: Record = record,
    ) -> None:
        self._loss_of = loss_of
        self._scaled = scaled
        self._parameters = tuple(parameters)
        self._ample = ample
        self._log = log
        self._record = record
        self._may_record = True
        self.forget()

    def forget(self) -> None:
        """Lets go of the recording and of the memory in which it computes."""
        self._inputs: tuple[Tensor, ...] = ()
        self._answers: Passed | None = None
        self._replay: Callable[[], object] = _nothing
        self._places: list[int] = []

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The loss, and a gradient for each input, None for one that wants none.

        Both lie where the next call writes its own.
        """
        if self._fits(inputs):
            if self._answers is None and self._may_record:
                self._try_to_record()
        else:
            self.forget()
            # Inputs of their own: those of the next call take their place, and those of this one
            # may be part of a graph that leads on, as a text encoder's answers are.
            self._inputs = tuple(
                value.detach().clone().requires_grad_(value.requires_grad) for value in inputs
            )
        with torch.no_grad():
            torch._foreach_copy_(list(self._inputs), list(inputs))
        if self._answers is None:
            return self._pass_as_it_is()
        self._keep_gradients()
        self._replay()
        loss, gradients = self._answers
        self._add(gradients)
        of_inputs = iter(gradients[len(self._parameters) :])
        return loss, tuple(next(of_inputs) if value.requires_grad else None for value in inputs)

    def stop_recording(self) -> bool:
        """Never records again; whether there was a recording to let go of."""
        had = self._answers is not None
        self._may_record = False
        self.forget()
        return had

    def _fits(self, inputs: Sequence[Tensor]) -> bool:
        def kind(values: Sequence[Tensor]) -> list[Any]:
            return [(value.shape, value.dtype, value.requires_grad) for value in values]

        moved = self._answers is not None and self._places != self._addresses()
        return kind(inputs) == kind(self._inputs) and not moved

    def _addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._parameters]

    def _loss(self) -> Tensor:
        # Views, which are no leaves: of a leaf autocast keeps one short copy for all that read it,
        # whose gradients would then add up in that precision.
        return self._loss_of(*(value.view_as(value) for value in self._inputs))

    def _leaves(self) -> list[Tensor]:
        return [*self._parameters, *(value for value in self._inputs if value.requires_grad)]

    def _pass_as_it_is(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        loss = self._loss()
        torch.autograd.backward(self._scaled(loss), inputs=self._leaves())
        gradients = tuple(value.grad for value in self._inputs)
        for value in self._inputs:
            value.grad = None
        return loss.detach(), gradients

    def _pass_to_record(self) -> Passed:
        loss, leaves = self._loss(), self._leaves()
        gradients = torch.autograd.grad(self._scaled(loss), leaves, allow_unused=True)
        # As `backward()` leaves them: in the layout of what they are of.
        return loss.detach(), tuple(map(_in_layout_of, leaves, gradients))

    def _try_to_record(self) -> None:
        if self._ample is not None and not self._ample():
            self._may_record = False
            self._log("training.cuda_graphs: no step is recorded, since memory is not ample")
            return
        self._ample = None  # the next recording takes the place of this one
        try:
            self._replay, self._answers = self._record(self._pass_to_record)
            self._places = self._addresses()
        except RuntimeError as error:
            self._may_record = False
            reason = "not enough memory" if is_out_of_memory(error) else first_line(error)
            self._log(
                f"training.cuda_graphs: a step cannot be recorded ({reason}): goes on without"
            )

    def _keep_gradients(self) -> None:
        """Gives gradients that lie where the recording writes a place of their own."""
        assert self._answers is not None
        for parameter, written in zip(self._parameters, self._answers[1], strict=False):
            if written is not None and parameter.grad is written:
                parameter.grad = written.clone()

    def _add(self, gradients: Sequence[Tensor | None]) -> None:
        sums, summands = [], []
        for parameter, gradient in zip(self._parameters, gradients, strict=False):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                sums.append(parameter.grad)
                summands.append(gradient)
        if sums:
            torch._foreach_add_(sums, summands)


def _nothing() -> None:
    """In place of a recording."""


def _in_layout_of(leaf: Tensor, gradient: Tensor | None) -> Tensor | None:
    if gradient is None or gradient.stride() == leaf.stride():
        return gradient
    return torch.empty_like(leaf).copy_(gradient)
