"""Memory that runs out is told from every other error, wherever below torch it happens."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from posterpipe.core.memory import doubt, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
        MemoryError(),
    ],
    ids=str,
)
def test_memory_that_ran_out_is_recognised_by_its_words(error: BaseException) -> None:
    assert is_out_of_memory(error)


def test_memory_that_ran_out_on_this_machine_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_words_that_can_mean_something_else_are_quoted() -> None:
    words = "GET was unable to find an engine to execute this computation"
    assert f'"{words}"' in doubt(RuntimeError(f"{words}\nTraceback")) and "precision" in doubt(
        RuntimeError(words)
    )
    assert doubt(RuntimeError("CUDA error: out of memory")) == "" == doubt(MemoryError())


def test_no_other_error_is_taken_for_it() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was found"))
    assert not is_out_of_memory(ValueError("a poster called Out of Memory"))


def test_asking_loads_no_torch() -> None:
    code = (
        "import sys; from posterpipe.core.memory import is_out_of_memory; "
        "assert not is_out_of_memory(ValueError()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
