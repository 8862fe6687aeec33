"""The signs of a title: its capitals, and its pictographs.

What belongs here: what Unicode and the rules of spelling say of signs, whatever the font. What does
not: which font has them (`fonts`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator

_TONOS, _DIALYTIKA, _IOTA_BELOW = "\u0301", "\u0308", "\u0345"
_GREEK_ACCENTS = frozenset("\u0300\u0301\u0302\u0303\u0311\u0342")
_GREEK_VOWELS = frozenset("ΑΕΗΙΟΥΩ")

_SELECTORS = dict.fromkeys((0xFE0E, 0xFE0F, 0x20E3))
_JOINER = "\u200d"
"""What says of the sign before that it is a picture or is not, and the frame of a key (1️⃣)."""


def capitals(title: str) -> str:
    """A title in capitals, letters with their marks as one sign where Unicode has one.

    Greek capitals carry no accents or breathings, and keep the dialytika.
    """
    has_greek = any(_is_greek(sign) for sign in title)
    return unicodedata.normalize("NFC", _greek_capitals(title) if has_greek else title.upper())


def _greek_capitals(title: str) -> str:
    """By the rules of Unicode's CLDR (`el-Upper`): an accent that goes from a vowel leaves a
    dialytika on the ι or υ after it, which it told apart (άυλος, ΑΫΛΟΣ); the word ή, "or", keeps
    its own, which tells it from the article η."""
    capital: list[str] = []
    letters = list(_with_marks(unicodedata.normalize("NFD", title)))
    alone = [not base.isalpha() for base, _ in letters]
    parted = False
    for place, (base, marks) in enumerate(letters):
        if not _is_greek(base):
            capital.append((base + marks).upper())
            parted = False
            continue
        upper, accented = base.upper(), not _GREEK_ACCENTS.isdisjoint(marks)
        by_itself = all(alone[max(0, place - 1) : place]) and all(alone[place + 1 : place + 2])
        if upper == "Η" and accented and _IOTA_BELOW not in marks and by_itself:
            capital.append(upper + _TONOS)
            parted = False
            continue
        dialytika = _DIALYTIKA in marks or (parted and upper in ("Ι", "Υ"))
        below = _IOTA_BELOW.upper() if _IOTA_BELOW in marks else ""
        capital.append(upper + (_DIALYTIKA if dialytika else "") + below)
        parted = upper in _GREEK_VOWELS and accented and not dialytika
    return "".join(capital)


def _with_marks(text: str) -> Iterator[tuple[str, str]]:
    """Each sign of a decomposed text with the marks on it."""
    base, marks = "", ""
    for sign in text:
        if base and unicodedata.category(sign) == "Mn":
            marks += sign
            continue
        if base:
            yield base, marks
        base, marks = sign, ""
    if base:
        yield base, marks


def _is_greek(sign: str) -> bool:
    return unicodedata.name(sign, "").startswith("GREEK ")


def without_selectors(text: str) -> str:
    """A text without the invisible signs that make others pictures."""
    return text.translate(_SELECTORS)


def without_pictographs(text: str, leave_out: Callable[[str], bool]) -> tuple[str, str]:
    """A text without its pictographs for which `leave_out` says so, and what was left out.

    What belongs to a pictograph goes with it: colours of skin, what joins several into one, and
    what says that they are pictures.
    """
    kept: list[str] = []
    left: list[str] = []
    inside = joins = False
    for sign in text:
        picture = _is_pictograph(sign)
        inside = (inside and (_belongs_to_pictograph(sign) or (joins and picture))) or (
            picture and leave_out(sign)
        )
        joins = sign == _JOINER
        (left if inside else kept).append(sign)
    return " ".join("".join(kept).split()), "".join(left)


def _is_pictograph(sign: str) -> bool:
    from uniseg.emoji import extended_pictographic

    code = ord(sign)
    flag, skin = 0x1F1E6 <= code <= 0x1F1FF, 0x1F3FB <= code <= 0x1F3FF
    return flag or skin or (extended_pictographic(sign) and not sign.isalnum())


def _belongs_to_pictograph(sign: str) -> bool:
    code = ord(sign)
    return code in _SELECTORS or sign == _JOINER or 0xE0020 <= code <= 0xE007F
