"""Lines of a title: where it may break, how wide its lines are, where each letter stands.

What belongs here: line breaks, ink boxes, kerning, tracking, hanging signs. What does not: where on
the poster the lines go (`layout`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, groupby, pairwise

from PIL import ImageFont

from posterpipe.core.typography.fonts import Lettering, coverage, font_at

_NO_START = "、。，．・：；？！ー々ゝゞヽヾぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ」』）】》〉"
"""Signs that do not begin a line in Chinese and Japanese."""


def line_breaks(title: str, most: int = 3) -> list[tuple[str, ...]]:
    """The ways to set a title in one to `most` lines, in reading order, the fewest lines first."""
    words = title.split()
    joint = " "
    if len(words) == 1 and _is_east_asian(title) and len(title) > 4:
        words, joint = clusters(title), ""
    found = []
    for count in range(1, min(most, len(words)) + 1):
        for cuts in combinations(range(1, len(words)), count - 1):
            edges = (0, *cuts, len(words))
            lines = tuple(joint.join(words[a:b]) for a, b in pairwise(edges))
            if not any(line[0] in _NO_START for line in lines[1:]):
                found.append(lines)
    if joint == "":
        # Of the many ways to cut characters only the even ones are worth trying.
        found.sort(key=lambda lines: (len(lines), max(map(len, lines)) - min(map(len, lines))))
        found = [next(group) for _, group in groupby(found, key=len)]
    return found


def _is_east_asian(text: str) -> bool:
    return any(unicodedata.east_asian_width(sign) in "WF" for sign in text)


@dataclass(frozen=True)
class Measured:
    """Lines of one font at one size, in pixels."""

    widths: tuple[float, ...]
    """Of each line's ink without the signs that hang into the margin."""
    starts: tuple[float, ...]
    """From the pen's start to that ink."""
    above: float
    """Highest ink above a baseline."""
    below: float
    cap: float
    reach: float
    """How far ink goes from the middle to either side, hanging signs included."""

    def pitch(self, leading: float) -> float:
        """From baseline to baseline; ink of two lines never touches."""
        return max(self.cap * (1 + leading), self.above + self.below + 0.15 * self.cap)


def measure(lettering: Lettering, lines: Sequence[str], size: int) -> Measured:
    font = font_at(lettering.package, lettering.path, size)
    widths, starts, above, below, reach = [], [], 0.0, 0.0, 0.0
    for line in lines:
        boxes = _glyph_boxes(lettering, font, line)
        above = max(above, *(-box[1] for box in boxes))
        below = max(below, *(box[3] for box in boxes))
        core = [box for box, sign in zip(boxes, pieces(lettering, line), strict=True)
                if not _hangs(sign)] or boxes  # fmt: skip
        left, right = min(box[0] for box in core), max(box[2] for box in core)
        widths.append(right - left)
        starts.append(left)
        middle = (left + right) / 2
        reach = max(reach, *(max(middle - box[0], box[2] - middle) for box in boxes))
    has_capitals = {"H"} <= coverage(lettering.package, lettering.path)
    cap = -font.getbbox("H", anchor="ls")[1] if has_capitals else above
    return Measured(tuple(widths), tuple(starts), above, below, float(cap), reach)


def _hangs(piece: str) -> bool:
    return len(piece) == 1 and piece in "\"'“”‘’„«»‹›.,-–—…"


def pieces(lettering: Lettering, line: str) -> list[str]:
    """What is drawn at once: a whole line where letters interact, else letter by letter."""
    return [line] if lettering.shaped else clusters(line)


def clusters(text: str) -> list[str]:
    """The letters of a text, each with the marks that stand on it: what the font places together.

    Alone, a mark is drawn on a dotted circle, or beside its letter.
    """
    letters: list[str] = []
    for sign in text:
        if letters and unicodedata.category(sign) in ("Mn", "Mc", "Me", "Cf"):
            letters[-1] += sign
        else:
            letters.append(sign)
    return letters


def _glyph_boxes(
    lettering: Lettering, font: ImageFont.FreeTypeFont, line: str
) -> list[tuple[float, float, float, float]]:
    """Ink of each piece of a line, from the pen's start on the baseline."""
    boxes = []
    for piece, x in zip(pieces(lettering, line), pen_places(lettering, font, line), strict=True):
        left, top, right, bottom = _ink_box(lettering.package, lettering.path, font.size, piece)
        boxes.append((x + left, top, x + right, bottom))
    return boxes


@lru_cache(maxsize=8192)
def _ink_box(package: str, path: str, size: float, piece: str) -> tuple[float, ...]:
    """Left, top, right, bottom of the ink from the pen's start on the baseline. `getbbox` counts
    the empty space beside a letter in."""
    font = font_at(package, path, int(size))
    mask, (x, y) = font.getmask2(piece, mode="L", anchor="ls")
    ink = mask.getbbox() or (0, 0, 0, 0)
    return (ink[0] + x, ink[1] + y, ink[2] + x, ink[3] + y)


def pen_places(lettering: Lettering, font: ImageFont.FreeTypeFont, line: str) -> list[float]:
    """Where each piece of a line begins. Letters are kerned in pairs, and tracked."""
    if lettering.shaped:
        return [0.0]
    letters = pieces(lettering, line)
    x, places = 0.0, [0.0]
    for letter, following in pairwise(letters):
        x += font.getlength(letter + following) - font.getlength(following)
        x += lettering.tracking * font.size
        places.append(x)
    return places
