"""Type styles, and which font can write a title.

What belongs here: the styles, the fonts beyond Latin, what a font covers, and loading fonts. What
does not: where letters stand (`lines`).
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version as installed_version
from importlib.resources import files

from PIL import ImageFont, features

from posterpipe.core.store import content_key
from posterpipe.core.typography.signs import capitals, without_pictographs, without_selectors


class TitleImpossible(ValueError):
    """A title cannot be set. The message says why and what to do."""


@dataclass(frozen=True)
class Style:
    """A way of lettering."""

    package: str
    """Installed package that holds the font."""
    font: str
    """Path of the font file in it."""
    capitals: bool
    tracking: float
    """Space added between letters, in font sizes."""
    leading: float
    """Space between lines, in heights of a capital."""
    tallness: float = 1.0
    """How much taller than others its letters may be: thin and narrow ones have to."""


STYLES: dict[str, Style] = {
    "rounded": Style("font_fredoka_one", "files/FredokaOne-Regular.ttf", True, 0.01, 0.4),
    "geometric": Style("font_manrope", "files/Manrope-ExtraBold.ttf", True, 0.015, 0.42),
    "grotesque": Style("font_hanken_grotesk", "files/HankenGrotesk-Bold.otf", True, 0.03, 0.45),
    "bold": Style("font_roboto", "files/Roboto-Black.ttf", True, 0.0, 0.36),
    "serif": Style("font_source_serif_pro", "files/SourceSerifPro-Black.ttf", False, 0.0, 0.5),
    "handmade": Style("font_amatic_sc", "files/AmaticSC-Bold.ttf", True, 0.02, 0.3, 1.5),
}
"""All under the SIL Open Font License, but Roboto, which is under Apache-2.0."""

_NOTO = "fonts/ofl/{0}/{1}[wdth,wght].ttf"
_CJK = "fonts/ofl/{0}/{1}[wght].ttf"
# Noto, under the SIL Open Font License: for every title that a style's own font cannot write.
_OTHER_SCRIPTS: tuple[tuple[str, str], ...] = (
    ("fontpkg_noto_sans", "files/NotoSans[wdth,wght].ttf"),
    ("justmytype_intl_rtl", _NOTO.format("notosansarabic", "NotoSansArabic")),
    ("justmytype_intl_rtl", _NOTO.format("notosanshebrew", "NotoSansHebrew")),
    ("justmytype_intl_south_asia", _NOTO.format("notosansdevanagari", "NotoSansDevanagari")),
    ("justmytype_intl_south_asia", _NOTO.format("notosansbengali", "NotoSansBengali")),
    ("justmytype_intl_south_asia", _NOTO.format("notosanstamil", "NotoSansTamil")),
    ("justmytype_intl_south_asia", _NOTO.format("notosanstelugu", "NotoSansTelugu")),
    ("justmytype_intl_sea", _NOTO.format("notosansthai", "NotoSansThai")),
    ("justmytype_intl_sea", _NOTO.format("notosanslao", "NotoSansLao")),
    ("justmytype_intl_sea", _NOTO.format("notosanskhmer", "NotoSansKhmer")),
    ("justmytype_intl_sea", _NOTO.format("notosansmyanmar", "NotoSansMyanmar")),
)
# Japanese before Chinese: shared characters then have the forms that go with kana.
_EAST_ASIA: tuple[tuple[str, str], ...] = (
    ("justmytype_intl_cjk", _CJK.format("notosansjp", "NotoSansJP")),
    ("justmytype_intl_cjk", _CJK.format("notosanskr", "NotoSansKR")),
    ("justmytype_intl_cjk", _CJK.format("notosanssc", "NotoSansSC")),
    ("justmytype_intl_cjk", _CJK.format("notosanstc", "NotoSansTC")),
)
_FONT_PACKAGES = sorted(
    {style.package for style in STYLES.values()}
    | {package for package, _ in (*_OTHER_SCRIPTS, *_EAST_ASIA)}
)
_HEAVY = 800
"""Weight of the variable fonts; 900 closes the counters of small letters."""

# Blocks of scripts whose letters change or move beside each other; drawn letter by letter they
# would be wrong. Right-to-left scripts are known by their direction.
_SHAPED = ((0x0900, 0x0DFF), (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF))


@dataclass(frozen=True)
class Lettering:
    """A title with the font that writes it."""

    package: str
    path: str
    capitals: bool
    tracking: float
    leading: float
    tallness: float
    shaped: bool
    """Needs the complex text layout of Raqm."""


def fonts_id() -> str:
    """Names the fonts' packages by version: part of the key of a titled image."""
    return " ".join(
        f"{name}={installed_version(name.replace('_', '-'))}" for name in _FONT_PACKAGES
    )


def layout_engine() -> str:
    """`raqm` where complex scripts and kerning are laid out, else `basic`."""
    return "raqm" if features.check("raqm") else "basic"


def choose_style(title: str, style: str) -> str:
    """The style's name: the one that is asked for, or for `auto` one that depends on the title."""
    if style != "auto":
        return style
    return sorted(STYLES)[int(content_key("style", title)[:8], 16) % len(STYLES)]


def lettering(title: str, style: str) -> Lettering:
    """The font that writes all of a title: the style's own, else Noto's for its script. Noto's for
    letters with marks too (see `has_marks`): the styles' fonts set those of few letters right.

    Raises TitleImpossible where no installed font has every letter, or where letters must be
    shaped, or marks placed on them, and Raqm cannot.
    """
    own = STYLES[style]
    text = capitals(title) if own.capitals else title
    shaped = needs_shaping(text)
    if (shaped or has_marks(text)) and layout_engine() != "raqm":
        raise TitleImpossible(
            f"the title {title!r} has letters that join, change places or carry marks, which needs "
            "the FriBiDi library: install it (Debian: libfribidi0)"
        )
    signs = {sign for sign in text if not sign.isspace() and unicodedata.category(sign) != "Cf"}
    east = [font for font in _EAST_ASIA if _preferred_in_east_asia(text) in font[1]]
    candidates = [*_OTHER_SCRIPTS, *east, *_EAST_ASIA]
    candidates.insert(len(candidates) if has_marks(text) else 0, (own.package, own.font))
    for package, path in candidates:
        if signs <= coverage(package, path):
            latin = (package, path) == (own.package, own.font)
            return Lettering(
                package, path, own.capitals, own.tracking if latin else 0.0,
                own.leading if latin else 0.5, own.tallness if latin else 1.0, shaped,
            )  # fmt: skip
    known = set().union(*(coverage(*font) for font in candidates))
    missing = "".join(sorted(signs - known))
    what = f"no installed font has {missing!r}" if missing else "no one installed font has them all"
    raise TitleImpossible(f"the title {title!r} cannot be written: {what}; reword it")


def what_can_be_set(title: str, style: str) -> tuple[str, str]:
    """A title as the installed fonts can write it, and the pictographs that are left out of it.

    No font has emoji, and a poster does without. Others stay (♥, ☆) where one font has them and the
    letters. Raises TitleImpossible as `lettering` does, for letters.
    """
    plain = without_selectors(title)
    ways = [(title, ""), (plain, "")]
    ways += [without_pictographs(plain, leave_out) for leave_out in (_in_no_font, lambda _: True)]
    for number, (text, left_out) in enumerate(dict.fromkeys(ways), start=1):
        try:
            lettering(text, style)
        except TitleImpossible:
            if number == len(set(ways)):
                raise
        else:
            return text, left_out
    raise AssertionError  # the last way has returned or raised


def _in_no_font(sign: str) -> bool:
    fonts = {(style.package, style.font) for style in STYLES.values()}
    return not any(sign in coverage(*font) for font in (*fonts, *_OTHER_SCRIPTS, *_EAST_ASIA))


def _preferred_in_east_asia(text: str) -> str:
    names = " ".join(unicodedata.name(sign, "") for sign in text)
    if "HANGUL" in names:
        return "NotoSansKR"
    return "NotoSansJP" if "HIRAGANA" in names or "KATAKANA" in names else "NotoSansSC"


def needs_shaping(text: str) -> bool:
    """Whether a text is written from right to left or in a script whose letters interact."""
    return any(
        unicodedata.bidirectional(sign) in ("R", "AL")
        or any(low <= ord(sign) <= high for low, high in _SHAPED)
        for sign in text
    )


def has_marks(text: str) -> bool:
    """Whether a letter carries a mark for which Unicode has no sign of its own with the letter."""
    return any(unicodedata.category(sign).startswith("M") for sign in text)


@lru_cache(maxsize=64)
def coverage(package: str, path: str) -> frozenset[str]:
    """The characters that a font has."""
    from fontTools.ttLib import TTFont

    with TTFont(str(files(package) / path), lazy=True) as font:
        return frozenset(map(chr, font.getBestCmap()))


@lru_cache(maxsize=256)
def font_at(package: str, path: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of a package at `size` pixels an em; a variable one at the weight _HEAVY."""
    engine = ImageFont.Layout.RAQM if layout_engine() == "raqm" else ImageFont.Layout.BASIC
    font = ImageFont.truetype(str(files(package) / path), size, layout_engine=engine)
    if "wght" in path:
        values = []
        for axis in font.get_variation_axes():
            weight = (axis["name"] or b"") == b"Weight"
            wanted = _HEAVY if weight else axis["default"] or 0
            values.append(float(min(wanted, axis["maximum"] or wanted)))
        font.set_variation_by_axes(values)
    return font
