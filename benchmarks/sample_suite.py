"""`sample_suite`: the starter suite on a CPU, against one call of the pipeline an image.

Both sides draw the same images: all prompts and seeds of the suite with their negative prompt,
settings of the profile `starter`. Ours runs as the asset does, from the suite to blobs in the store
and the table over them; loading the model is counted on our side alone. Images are compared: the
largest difference of a pixel, and the share of pixels within 1/255.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.rows import Row
from benchmarks.sampling_runs import Asset, Loop, in_turns
from posterpipe.core.models import locate
from posterpipe.core.prompts import load_suite
from posterpipe.settings import load_settings

REQUIRED = 1.5
LEAST_EQUAL = 0.99
"""Share of pixels within 1/255 below which the two sides do not do the same work."""


def run(prompts: int | None = None) -> list[Row]:
    settings = load_settings("starter")
    model = locate(settings.base_model, settings.root)
    suite = load_suite(settings.path(settings.prompt_suite))[:prompts]
    asset, loop = Asset(model, settings.sampler), Loop(model, settings.sampler)
    with tempfile.TemporaryDirectory() as warm:
        few = [replace(suite[0], seeds=suite[0].seeds[:1])]
        loop(few, Path(warm))
        asset(few, Path(warm) / "store")
    ours, peer, apart = in_turns(suite, asset, loop)
    equal = float(np.mean([(image <= 1).mean() for image in apart]))
    if equal < LEAST_EQUAL:
        raise RuntimeError(
            f"sample_suite: {equal:.1%} of the pixels are equal within 1/255: the two sides do not "
            "do the same work, so their times say nothing"
        )
    images = len(apart)
    return [
        Row(
            "sample_suite", f"s for {images} images", round(ours, 2), round(peer, 2),
            "one pipeline call an image", round(peer / ours, 2),
            f"at least {REQUIRED} times as fast",
        ),
        Row(
            "sample_suite.images_per_second", "images/s", round(images / ours, 2),
            round(images / peer, 2), "one pipeline call an image",
        ),
        Row(
            "sample_suite.equal", "of the pixels within 1/255", round(equal, 5),
            required=f"at least {LEAST_EQUAL}",
        ),
        Row(
            "sample_suite.largest_difference", "of 255",
            float(max(int(image.max()) for image in apart)),
        ),
    ]  # fmt: skip
