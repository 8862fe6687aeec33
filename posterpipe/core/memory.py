"""Recognising that memory ran out, on a GPU or in the machine.

What belongs here: telling such an error from all others, and in which words. What does not: what is
done about it (`sampler`, `dreambooth.memory`), and any import of torch before it is asked.
"""

from __future__ import annotations

import re

from posterpipe.core.errors import first_line

# A GPU's memory runs out in several places: torch's own allocator, the driver beneath it, cuBLAS
# and cuDNN when they make their workspaces; each says it in its own words. On a CPU torch says
# "can't allocate memory" or "not enough memory".
_WORDS = re.compile(
    r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED|_ALLOCATION_FAILED",
    re.IGNORECASE,
)

# Of a convolution for which no way is left: because none finds memory for its workspace, or because
# the device has none at all in the precision that was asked for.
_NO_WAY_LEFT = re.compile(
    r"unable to find an engine|unable to find a valid cuDNN algorithm", re.IGNORECASE
)


TOO_LITTLE_MEMORY = "too little memory; it is tried again, or make room on the machine"
"""The reason of an item that failed for want of memory: without the numbers of the moment, which
would make another table of the same failure each time."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, a library below it or Python could not get the memory it asked for."""
    if isinstance(error, MemoryError):
        return True
    # torch.OutOfMemoryError and torch.AcceleratorError are RuntimeErrors.
    words = str(error)
    return isinstance(error, RuntimeError) and bool(
        _WORDS.search(words) or _NO_WAY_LEFT.search(words)
    )


def doubt(error: BaseException) -> str:
    """Where an error that is taken for a lack of memory may be another one: its words, to be put
    behind ours, in brackets and after a space. Else ""."""
    if not _NO_WAY_LEFT.search(str(error)):
        return ""
    return (
        f' ("{first_line(error)}", which can also mean that the device has no such convolution in '
        "this precision)"
    )
