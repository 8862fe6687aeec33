"""Where a title goes and how large: candidate blocks and their scores.

What belongs here: the candidates and what makes one better than another. What does not: drawing
them (`render`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posterpipe.core.typography.fonts import Lettering, TitleImpossible
from posterpipe.core.typography.lines import line_breaks, measure
from posterpipe.core.typography.saliency import Scene

_NO_END = frozenset(
    ("a", "an", "and", "at", "by", "das", "der", "die", "for", "from", "in", "la", "le", "of",
     "on", "or", "the", "to", "und", "with")
)  # fmt: skip
"""Words that belong to the next one: a line should not end with them."""

_MEASURE = 200
"""Font size at which text is measured before its size is known."""


@dataclass(frozen=True)
class Block:
    """A candidate: lines at a size in a place."""

    lines: tuple[str, ...]
    size: int
    cap: float
    box: tuple[int, int, int, int]
    score: float
    covered: float
    marked: float


MARGIN = 0.115
"""Least distance of ink from the sides, in widths: inside of a frame line, and clear of it."""

_MARGIN_ENDS = 0.135
"""Least distance of ink from the upper and the lower edge, in widths: what stands near an end needs
more air than what stands near a side."""

_WIDTHS = (0.77, 0.69, 0.60, 0.48)
"""Widths that a block may fill, in widths of the image."""


def candidates(scene: Scene, title: str, letters: Lettering, size: tuple[int, int]) -> list[Block]:
    """Blocks in the order of their scores, the best first."""
    width, height = size
    objects, shape = _integral(scene.object_), _integral(scene.shape)
    marks = _integral(scene.marks)
    cells = scene.object_.shape
    # Lettering that a model draws takes about a thirtieth of a poster; a few crumbs are no title.
    least_marks = max(0.012 * scene.marks.size, float(scene.marks.sum()))
    blocks: list[Block] = []
    for lines in line_breaks(title):
        base = measure(letters, lines, _MEASURE)
        tallest = (0.1 if len(lines) == 1 else 0.078) * height * letters.tallness
        for share in _WIDTHS:
            scale = share * width / max(base.widths)
            scale = min(scale, (0.5 - MARGIN) * width / base.reach)
            font_size = int(_MEASURE * min(scale, tallest / base.cap))
            if font_size * base.cap / _MEASURE < 0.022 * height:
                continue
            factor = font_size / _MEASURE
            pitch = base.pitch(letters.leading)
            block_height = (base.above + base.below + pitch * (len(lines) - 1)) * factor
            block_width = max(base.widths) * factor
            if block_height > 0.3 * height:
                continue
            cap = base.cap * factor
            left = (width - block_width) / 2
            low, high = _MARGIN_ENDS * width, height - _MARGIN_ENDS * width - block_height
            for top in np.linspace(low, high, 61):
                box = (left, float(top), left + block_width, float(top) + block_height)
                covered = _inside(objects, _cells(box, size, cells, 0.25 * cap))
                around = _cells(box, size, cells, 0.6 * cap)
                crowded = _inside(shape, around) / _area(around)
                marked = _inside(marks, around) / least_marks
                score = _score(box, height, cap, lines, covered, crowded, marked)
                whole = (round(box[0]), round(box[1]), round(box[2]), round(box[3]))
                blocks.append(Block(lines, font_size, cap, whole, score, covered, marked))
    if not blocks:
        raise TitleImpossible(
            f"the title {title!r} is too long for an image of {width}x{height} pixels; shorten it"
        )
    return sorted(blocks, key=lambda block: -block.score)


def _score(
    box: tuple[float, float, float, float],
    height: int,
    cap: float,
    lines: Sequence[str],
    covered: float,
    crowded: float,
    marked: float,
) -> float:
    """Higher is better. The weights say how much one is worth in another: a sixteenth of the object
    covered is as bad as letters of half the size. `crowded` is the object's share of the block with
    some air around it."""
    middle = (box[1] + box[3]) / 2 / height
    large = math.log2(cap / (0.07 * height))
    # Titles stand at a sixth of the height from either end; further in they part the picture.
    place = min(abs(middle - 0.15), abs(middle - 0.84)) / 0.2
    clumsy = sum(line.split()[-1].casefold() in _NO_END for line in lines[:-1])
    lengths = [len(line) for line in lines]
    uneven = 1 - min(lengths) / max(lengths)
    return (
        0.35 * large - 6 * covered - 1.5 * crowded + 1.2 * marked - 0.45 * place**2 - 0.4 * clumsy
        - 0.12 * uneven - 0.05 * len(lines)
    )  # fmt: skip


def _integral(values: np.ndarray) -> np.ndarray:
    padded = np.zeros((values.shape[0] + 1, values.shape[1] + 1), np.float64)
    padded[1:, 1:] = values.cumsum(axis=0).cumsum(axis=1)
    return padded


def _cells(
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    cells: tuple[int, ...],
    pad: float,
) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of a padded box on the grid of a Scene."""
    rows, columns = cells
    across, down = columns / size[0], rows / size[1]
    return (
        max(0, math.floor((box[1] - pad) * down)),
        max(0, math.floor((box[0] - pad) * across)),
        min(rows, math.ceil((box[3] + pad) * down)),
        min(columns, math.ceil((box[2] + pad) * across)),
    )


def _area(cells: tuple[int, int, int, int]) -> int:
    top, left, bottom, right = cells
    return max(1, (bottom - top) * (right - left))


def _inside(integral: np.ndarray, cells: tuple[int, int, int, int]) -> float:
    top, left, bottom, right = cells
    return float(
        integral[bottom, right] - integral[top, right] - integral[bottom, left]
        + integral[top, left]
    )  # fmt: skip
