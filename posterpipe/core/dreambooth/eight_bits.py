"""8-bit Adam that does not wait for the GPU.

What belongs here: bitsandbytes' AdamW8bit with another loop. What does not: which optimizer is used
(`optimizers`, which imports this only where it is wanted: bitsandbytes takes seconds to load).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit


class QueuedAdamW8bit(AdamW8bit):
    """bitsandbytes' AdamW8bit: its kernels, its results and its states, of which it reads its own.

    Its `step` waits for the GPU after each parameter, of which Stable Diffusion has some 700 (1,100
    with the text encoder); the GPU has nothing to do while the next kernel is prepared. Nothing
    needs the wait: these kernels are queued on the default stream, and so is everything that torch
    does as long as no other stream is chosen, which nothing here does; what is queued on one stream
    runs in its order. Only paged states, which are not used here, would need it.
    """

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
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, number, place)
                self.update_step(group, parameter, number, place)
        return loss
