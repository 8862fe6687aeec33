"""What models compute in, and that nothing of it is left behind."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from posterpipe.core.devices import (
    give_memory_back,
    memory_layout,
    usable_precision,
    whole_fp32,
)
from posterpipe_tests.core.drawing import tf32_switches


def _given_back() -> float:
    """Bytes that the system has again, of 400 MB that are free in pieces between others."""
    import torch

    def held() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    block = torch.ones(8_000_000)
    del block  # glibc learns from it: blocks of less come from the heap from now on
    between = [(torch.ones(2_500_000), torch.ones(50_000)) for _ in range(40)]
    kept = [small for _, small in between]
    del between
    before = held()
    give_memory_back()
    assert len(kept) == 40
    return before - held()


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system as Linux answers")
def test_memory_goes_back_to_the_system() -> None:
    # In a process of its own: what others have freed before would be counted as well.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        assert process.submit(_given_back).result() > 200e6


def test_whole_fp32_is_left_as_it_was_found_also_after_an_error_and_with_others_inside() -> None:
    before = tf32_switches()
    assert before == (True, False)
    first, second = whole_fp32(), whole_fp32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert tf32_switches() == (False, False), "the second one is still inside"
    second.__exit__(None, None, None)
    assert tf32_switches() == before
    with pytest.raises(ZeroDivisionError), whole_fp32():
        assert tf32_switches() == (False, False)
        raise ZeroDivisionError
    assert tf32_switches() == before


def test_the_precision_is_one_that_the_device_is_good_at(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for has_amx, has_bf16, expected in (
        (True, True, ("bf16", "bf16")),
        (False, False, ("fp32", "fp16")),
    ):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has_amx: has)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda has=has_bf16, including_emulation=True: has
        )
        assert (usable_precision("auto", cpu), usable_precision("auto", gpu)) == expected
    assert usable_precision("auto", torch.device("mps")) == "fp32"
    assert usable_precision("fp16", cpu) == "fp32"
    assert usable_precision("fp16", gpu) == "fp16"
    assert usable_precision("bf16", cpu) == "bf16"


def test_the_layout_is_the_one_set_or_the_one_that_the_device_is_quicker_with() -> None:
    import torch

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    last, first = torch.channels_last, torch.contiguous_format
    assert memory_layout(None, cpu, compiled=False) == last
    assert memory_layout(None, gpu, compiled=False) == first
    assert memory_layout(None, gpu, compiled=True) == last
    assert memory_layout(True, gpu, compiled=False) == last
    assert memory_layout(False, cpu, compiled=True) == first
