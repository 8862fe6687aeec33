"""Aspect-ratio buckets: a few sizes of equal area instead of one shape for all.

What belongs here: which sizes there are and which one suits an image. What does not: resizing
(`images`), batches of one size (`dreambooth`).

A poster of 2:3 that is stretched to a square teaches the model thin people; cropped, it loses its
title. In a bucket of nearly its own shape it loses a few percent at one side (NovelAI 2022,
Improvements on Stable Diffusion).
"""

from __future__ import annotations

import math
from functools import lru_cache

MAX_RATIO = 2.0
"""Of the longer side to the shorter; what is longer is cropped."""


@lru_cache(maxsize=64)
def bucket_sizes(width: int, height: int, step: int) -> tuple[tuple[int, int], ...]:
    """All (width, height) in pixels whose sides are multiples of `step`, of at most the area
    `width * height`: for each width the tallest, and for each height the widest.

    At least the given size itself, in whole steps. Sorted by aspect ratio.
    """
    area = width * height
    own = (max(step, width // step * step), max(step, height // step * step))
    sizes = {own}
    for side in range(step, area // step + 1, step):
        other = area // side // step * step
        if other >= step and max(side, other) <= MAX_RATIO * min(side, other):
            sizes |= {(side, other), (other, side)}
    return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))


def bucket_of(
    image_width: float, image_height: float, width: int, height: int, step: int
) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest to the image's; of several the largest."""
    ratio = math.log(image_width / image_height)

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        return round(abs(math.log(size[0] / size[1]) - ratio), 9), -size[0] * size[1]

    return min(bucket_sizes(width, height, step), key=distance)
