"""The model of Stable Diffusion 2.1's size that the GPU's benchmarks share.

What belongs here: making it once, so that several commands need not. What does not: how it is built
(`posterpipe_tests.real_size`).
"""

from __future__ import annotations

import shutil
from pathlib import Path


def stable_diffusion(folder: Path, *, rehearse: bool) -> Path:
    """The directory of the model, fp32 with random weights, made where it is not there; with
    `rehearse` a tiny one."""
    from posterpipe_tests.models import build_tiny_stable_diffusion
    from posterpipe_tests.real_size import build_stable_diffusion

    base = folder / ("tiny" if rehearse else "sd21_base")
    if not base.exists():
        unfinished = base.with_suffix(".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        if rehearse:
            build_tiny_stable_diffusion(unfinished, precision="fp32")
        else:
            build_stable_diffusion(unfinished, base=True, precision="fp32")
        unfinished.rename(base)
    return base
