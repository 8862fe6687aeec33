"""Where models compute, and in what precision.

What belongs here: the accelerator of this machine, what it computes in, its loss, and giving memory
back to the system. What does not: where models lie (`models`), and what computes with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from posterpipe.core.errors import first_line
from posterpipe.setting_types import Precision

if TYPE_CHECKING:
    import torch


def best_device() -> torch.device:
    """The accelerator of this machine, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def usable_precision(
    precision: Precision | Literal["auto"], device: torch.device | None = None
) -> Precision:
    """The precision in which a device computes, the best one of this machine where none is named.

    fp16 becomes fp32 on CPUs, which compute it slowly, or not at all. `auto`: bf16 where the
    hardware has units for it, fp16 on GPUs without, else fp32. Of x86 CPUs those with AMX count.
    AVX-512's bf16 instructions alone do not: on a Xeon with them and without AMX, BLIP-sized
    products took as long in bf16 as in fp32, or longer.
    """
    if precision == "fp32" or precision == "bf16":
        return precision  # asked first, since importing torch costs seconds
    import torch

    device = device or best_device()
    if precision == "fp16":
        return "fp32" if device.type == "cpu" else "fp16"
    if device.type == "cpu":
        return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"


# Errors after which CUDA answers every call of the process with the same error, and ROCm's.
_DEVICE_IS_GONE = re.compile(
    r"illegal memory access|illegal instruction|illegal address|misaligned address"
    r"|invalid program counter|device-side assert|unspecified launch failure|launch timed out"
    r"|hardware stack error|uncorrectable|device is lost|fallen off the bus",
    re.IGNORECASE,
)


def device_is_gone(error: BaseException, device: torch.device) -> bool:
    """Whether nothing can be computed on a device any more in this process, after `error`.

    Too little memory does not count: less at once may fit.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, RuntimeError) and _DEVICE_IS_GONE.search(str(error)):
        return True
    if device.type == "cpu":
        return False
    try:
        return float(torch.ones(1, device=device).sum()) != 1.0
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as asked:
        return "out of memory" not in str(asked)


class DeviceGone(Exception):
    """The accelerator can no longer be used by this process. What was done by then is kept."""


@contextlib.contextmanager
def noticing_a_gone_device(user: str, device: torch.device) -> Iterator[None]:
    """While inside, an error after which a device is gone comes out as DeviceGone; others as they
    are. `user`: what computes on the device, for people."""
    try:
        yield
    except DeviceGone:
        raise
    except Exception as error:
        if not device_is_gone(error, device):
            raise
        raise DeviceGone(
            f"{user} can no longer use its device ({first_line(error)}); what was done is kept: "
            "start it again, in a new process, and look at the machine where that fails as well"
        ) from error


def memory_layout(
    channels_last: bool | None, device: torch.device, *, compiled: bool
) -> torch.memory_format:
    """The layout of a U-Net's and a VAE's images: the one that is set, else the quicker one.

    Convolutions are quicker over channels-last images. On a GPU though torch's GroupNorm answers in
    the other layout, so that each convolution turns its images around first: on an H200, Stable
    Diffusion 2.1 trained 1.2 times as fast without it. A U-Net that is compiled as a whole has no
    such GroupNorm.
    """
    import torch

    if channels_last is None:
        channels_last = compiled or device.type != "cuda"
    return torch.channels_last if channels_last else torch.contiguous_format


def torch_dtype(precision: Precision) -> torch.dtype:
    """The torch type of a precision setting."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def computing_in(
    precision: Precision, device: torch.device
) -> contextlib.AbstractContextManager[Any]:
    """What a model is called in. On a CPU the weights are fp32 whatever the precision is, and bf16
    is what is computed in while inside; on a GPU the weights themselves are short. fp32 is fp32 on
    both."""
    import torch

    if precision == "fp32":
        return whole_fp32()
    if device.type == "cpu" and precision == "bf16":
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def whole_fp32() -> Iterator[None]:
    """While inside, convolutions and products on a GPU are fp32 as it is called, and the same each
    time. From Ampere on, cuDNN takes TF32 of ten bits for it unless it is told otherwise, and the
    rest does where the setting `tf32` asks for it.

    The switches are those of the process: of several threads inside, the last one to leave sets
    them back.
    """
    import torch

    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    with _switching:
        _before.append(
            (cudnn.allow_tf32, products.allow_tf32, cudnn.deterministic, cudnn.benchmark)
        )
        cudnn.allow_tf32 = products.allow_tf32 = False
        cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        with _switching:
            before = _before.pop()  # of the last one to leave it is the first one's
            if not _before:
                cudnn.allow_tf32, products.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


_switching = threading.Lock()
_before: list[tuple[bool, bool, bool, bool]] = []
"""What the switches were when each of those inside came in."""


def give_memory_back(freed: weakref.ref[Any] | None = None) -> None:
    """Returns to the system what models took that are no longer needed.

    Python's collector counts objects and not gigabytes, so a model in a cycle of references stays
    for long; and weights that were freed stay with the C library in pieces, 6 GB of them after
    Stable Diffusion 2.1 had drawn in fp32, or with CUDA's allocator. What runs next, a training
    process for one, needs them.

    `freed`: what should be gone by now. The collector looks at every object of the process, so it
    is not asked where this is gone indeed.
    """
    if freed is None or freed() is not None:
        gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
