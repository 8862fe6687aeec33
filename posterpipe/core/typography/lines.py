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

ZERO_WIDTH_SPACE = "\u200b"
"""Says where a line may break in scripts that write no spaces, Thai or Khmer for one."""

_NO_START = "、。，．・：；？！ー々ゝゞヽヾぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ」』）】》〉"
"""Signs that do not begin a line in Chinese and Japanese."""


def line_breaks(title: str) -> list[tuple[str, ...]]:
    """The ways to set a title in one to three lines, in reading order, the fewest lines first.

    Lines break at spaces, and in every script where a zero-width space says so, which is not drawn.
    One word of Chinese or Japanese breaks where Unicode's rules allow it.
    """
    words: list[str] = []
    joints: list[str] = []
    for word in title.split():
        for number, part in enumerate(filter(None, word.split(ZERO_WIDTH_SPACE))):
            words.append(part)
            joints.append("" if number else " ")
    even_only = len(words) == 1 and _is_east_asian(words[0]) and len(words[0]) > 4
    if even_only:
        words = _east_asian_units(words[0])
        joints = [""] * len(words)
    found = []
    for count in range(1, min(3, len(words)) + 1):
        for cuts in combinations(range(1, len(words)), count - 1):
            edges = (0, *cuts, len(words))
            lines = tuple(
                words[a] + "".join(joints[i] + words[i] for i in range(a + 1, b))
                for a, b in pairwise(edges)
            )
            if not any(line[0] in _NO_START for line in lines[1:]):
                found.append(lines)
    if even_only:
        # Of the many ways to cut characters only the even ones are worth trying.
        found.sort(key=lambda lines: (len(lines), _clumsiness(lines)))
        found = [next(group) for _, group in groupby(found, key=len)]
    return found


def _east_asian_units(word: str) -> list[str]:
    """What is not to be parted of a word in Chinese or Japanese, by Unicode's line breaking (UAX
    #14). What is beside no East Asian letter stays together: `VS`, `2001`, `AC/DC`."""
    from uniseg.linebreak import line_break_units

    units: list[str] = []
    for unit in line_break_units(word):
        if units and not (_is_east_asian(units[-1][-1:]) or _is_east_asian(unit[:1])):
            units[-1] += unit
        else:
            units.append(unit)
    return units


def _clumsiness(lines: Sequence[str]) -> int:
    """How uneven lines are, in letters, and where they break: inside of brackets or quotes counts
    six, inside of a word in katakana three, between a number and what it counts two; after a sign
    that ends something, three less."""
    clumsy, open_ = max(map(len, lines)) - min(map(len, lines)), 0
    for line, following in pairwise(lines):
        kinds = [unicodedata.category(sign) for sign in line]
        open_ += sum(kind in ("Ps", "Pi") for kind in kinds)
        open_ -= sum(kind in ("Pe", "Pf") for kind in kinds)
        clumsy += 6 * (open_ > 0) + 2 * (kinds[-1] == "Nd")
        clumsy -= 3 * (kinds[-1] in ("Po", "Pe", "Pf"))
        clumsy += 3 * (_is_katakana(line[-1]) and _is_katakana(following[0]))
    return clumsy


def _is_katakana(sign: str) -> bool:
    return unicodedata.name(sign, "").startswith(("KATAKANA LETTER", "KATAKANA-HIRAGANA PROLONGED"))


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
    """What `lines` measure in the lettering's font at `size` pixels an em."""
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
