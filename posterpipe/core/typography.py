"""Titles set in type on generated posters.

What belongs here: type styles, which font can write a title, where a title goes and how large, its
colour and ground, and the table of titled posters. What does not: drawing the picture (`sampler`)
and reading the title back (`metrics.legibility`).

Diffusion models of this size draw shapes like letters and no words, so the title is set afterwards.
The layout is computed: candidate blocks (line breaks, widths, places) are scored by how little of
the main object they cover, how much they cover of what the model meant to be lettering, how large
the letters are, and whether the ground must be helped. Contrast is that of WCAG 2.2 (success
criterion 1.4.3), and what is promised is what is measured on the finished ground.
"""

from __future__ import annotations

import io
import json
import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version as installed_version
from importlib.resources import files
from itertools import combinations, groupby, pairwise
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features
from PIL.PngImagePlugin import PngInfo

from posterpipe.core.parallel import parallel_map
from posterpipe.core.progress import Progress
from posterpipe.core.store import Store, compute_missing, content_key
from posterpipe.settings import LetteringSettings

TYPOGRAPHY_VERSION = 1
"""Raised when the same image and title would give other pixels."""

TITLED_COLUMNS = (
    "generation_key", "untitled_image", "title", "image", "image_path", "style", "lines",
    "left", "top", "right", "bottom", "cap_height", "colour", "contrast", "scrim", "covered",
    "width", "height", "status", "reason",
)  # fmt: skip
"""Columns of the table of titled posters: the block's edges and the letters' height in pixels of
the titled image, `contrast` the least one measured, `covered` the share of the main object below
the letters (0 to 1), status ok, blocked or failed."""

Colour = tuple[int, int, int]

CREAM: Colour = (250, 244, 228)
INK: Colour = (14, 12, 18)


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

_NO_END = frozenset(
    ("a", "an", "and", "at", "by", "das", "der", "die", "for", "from", "in", "la", "le", "of",
     "on", "or", "the", "to", "und", "with")
)  # fmt: skip
"""Words that belong to the next one: a line should not end with them."""

_NO_START = "、。，．・：；？！ー々ゝゞヽヾぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ」』）】》〉"
"""Signs that do not begin a line in Chinese and Japanese."""

_MEASURE = 200
"""Font size at which text is measured before its size is known."""


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


@dataclass(frozen=True)
class Layout:
    """A title's place on an image, in pixels of the titled image."""

    style: str
    lines: tuple[str, ...]
    size: int
    """Of the font."""
    cap_height: int
    box: tuple[int, int, int, int]
    """Left, top, right, bottom of the ink."""
    covered: float
    """Share of the main object below the block, 0 to 1."""
    colour: Colour
    contrast: float
    """The least one of letters and ground that was measured."""
    scrim: bool
    """Whether the ground had to be helped."""


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
    """The font that writes all of a title: the style's own, else Noto's for its script.

    Raises TitleImpossible where no installed font has every letter, or where the letters of its
    script must be shaped and Raqm cannot.
    """
    own = STYLES[style]
    text = title.upper() if own.capitals else title
    shaped = needs_shaping(text)
    if shaped and layout_engine() != "raqm":
        raise TitleImpossible(
            f"the title {title!r} is in a script whose letters join or change places, which needs "
            "the FriBiDi library: install it (Debian: libfribidi0)"
        )
    signs = {sign for sign in text if not sign.isspace() and unicodedata.category(sign) != "Cf"}
    east = [font for font in _EAST_ASIA if _preferred_in_east_asia(text) in font[1]]
    candidates = [(own.package, own.font), *_OTHER_SCRIPTS, *east, *_EAST_ASIA]
    for package, path in candidates:
        if signs <= coverage(package, path):
            latin = (package, path) == candidates[0]
            return Lettering(
                package, path, own.capitals, own.tracking if latin else 0.0,
                own.leading if latin else 0.5, own.tallness if latin else 1.0, shaped,
            )  # fmt: skip
    known = set().union(*(coverage(*font) for font in candidates))
    missing = "".join(sorted(signs - known))
    what = f"no installed font has {missing!r}" if missing else "no one installed font has them all"
    raise TitleImpossible(f"the title {title!r} cannot be written: {what}; reword it")


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


@lru_cache(maxsize=64)
def coverage(package: str, path: str) -> frozenset[str]:
    """The characters that a font has."""
    from fontTools.ttLib import TTFont

    with TTFont(str(files(package) / path), lazy=True) as font:
        return frozenset(map(chr, font.getBestCmap()))


@lru_cache(maxsize=256)
def _font(package: str, path: str, size: int) -> ImageFont.FreeTypeFont:
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


# --- lines ---------------------------------------------------------------------------------------


def line_breaks(title: str, most: int = 3) -> list[tuple[str, ...]]:
    """The ways to set a title in one to `most` lines, in reading order, the fewest lines first."""
    words = title.split()
    joint = " "
    if len(words) == 1 and _is_east_asian(title) and len(title) > 4:
        words, joint = list(title), ""
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
class _Measured:
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


def _measure(lettering: Lettering, lines: Sequence[str], size: int) -> _Measured:
    font = _font(lettering.package, lettering.path, size)
    widths, starts, above, below, reach = [], [], 0.0, 0.0, 0.0
    for line in lines:
        boxes = _glyph_boxes(lettering, font, line)
        above = max(above, *(-box[1] for box in boxes))
        below = max(below, *(box[3] for box in boxes))
        core = [box for box, sign in zip(boxes, _pieces(lettering, line), strict=True)
                if not _hangs(sign)] or boxes  # fmt: skip
        left, right = min(box[0] for box in core), max(box[2] for box in core)
        widths.append(right - left)
        starts.append(left)
        middle = (left + right) / 2
        reach = max(reach, *(max(middle - box[0], box[2] - middle) for box in boxes))
    has_capitals = {"H"} <= coverage(lettering.package, lettering.path)
    cap = -font.getbbox("H", anchor="ls")[1] if has_capitals else above
    return _Measured(tuple(widths), tuple(starts), above, below, float(cap), reach)


def _hangs(piece: str) -> bool:
    return len(piece) == 1 and piece in "\"'“”‘’„«»‹›.,-–—…"


def _pieces(lettering: Lettering, line: str) -> list[str]:
    """What is drawn at once: a whole line where letters interact, else letter by letter."""
    return [line] if lettering.shaped else list(line)


def _glyph_boxes(
    lettering: Lettering, font: ImageFont.FreeTypeFont, line: str
) -> list[tuple[float, float, float, float]]:
    """Ink of each piece of a line, from the pen's start on the baseline."""
    boxes = []
    for piece, x in zip(_pieces(lettering, line), _pen(lettering, font, line), strict=True):
        left, top, right, bottom = _ink_box(lettering.package, lettering.path, font.size, piece)
        boxes.append((x + left, top, x + right, bottom))
    return boxes


@lru_cache(maxsize=8192)
def _ink_box(package: str, path: str, size: float, piece: str) -> tuple[float, ...]:
    """Left, top, right, bottom of the ink from the pen's start on the baseline. `getbbox` counts
    the empty space beside a letter in."""
    font = _font(package, path, int(size))
    mask, (x, y) = font.getmask2(piece, mode="L", anchor="ls")
    ink = mask.getbbox() or (0, 0, 0, 0)
    return (ink[0] + x, ink[1] + y, ink[2] + x, ink[3] + y)


def _pen(lettering: Lettering, font: ImageFont.FreeTypeFont, line: str) -> list[float]:
    """Where each piece of a line begins. Letters are kerned in pairs, and tracked."""
    if lettering.shaped:
        return [0.0]
    x, places = 0.0, []
    for index, sign in enumerate(line):
        places.append(x)
        if index + 1 < len(line):
            following = line[index + 1]
            x += font.getlength(sign + following) - font.getlength(following)
            x += lettering.tracking * font.size
    return places


# --- what is on the image ------------------------------------------------------------------------


def srgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of sRGB 0..255, float32 (..., 3)."""
    linear = _linear(rgb)
    matrix = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32
    )
    xyz = linear @ matrix.T / np.array([0.9505, 1.0, 1.089], np.float32)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


def _linear(rgb: np.ndarray) -> np.ndarray:
    values = np.asarray(rgb, dtype=np.float32) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def relative_luminance(rgb: np.ndarray | Colour) -> np.ndarray:
    """WCAG's relative luminance of sRGB 0..255, float32 (...), 0 to 1."""
    return _linear(np.asarray(rgb)) @ np.array([0.2126, 0.7152, 0.0722], np.float32)


def contrast_ratio(one: np.ndarray | Colour, other: np.ndarray | Colour) -> np.ndarray:
    """WCAG's contrast of sRGB colours, float32 (...), 1 to 21."""
    first, second = relative_luminance(one) + 0.05, relative_luminance(other) + 0.05
    return np.maximum(first, second) / np.minimum(first, second)


@dataclass(frozen=True)
class Scene:
    """What is on an image, on a grid of at most 96 columns."""

    ground: np.ndarray
    """float32 (rows, 3): sRGB of the ground behind everything, by row."""
    object_: np.ndarray
    """float32 (rows, columns): the main object's share in each place; adds up to 1."""
    marks: np.ndarray
    """float32 (rows, columns): what stands out near the ends of the poster, 0 to 1 in each place:
    lettering that the model meant, and crumbs."""
    accent: Colour
    """The colour that the object has most of."""


def look(image: Image.Image) -> Scene:
    """What is the ground, where the main object is, and what else stands out.

    A poster's ground runs past its object on both sides: its colour by row is the median near both
    edges. What differs from it stands out (saliency as colour contrast with the borders, after Zhu
    et al. 2014); what stands out near the middle is the object.
    """
    columns = min(96, image.width)
    rows = max(8, round(image.height * columns / image.width))
    small = image.convert("RGB").resize((columns, rows), Image.Resampling.BOX)
    rgb = np.asarray(small, dtype=np.float32)
    # Inside of a frame line, where there is one.
    strip = max(1, columns // 16)
    left, right = rgb[:, strip : 3 * strip], rgb[:, columns - 3 * strip : columns - strip]
    ground = _smooth_rows(np.median(np.concatenate([left, right], axis=1), axis=1))
    lab = srgb_to_lab(rgb)
    apart = np.linalg.norm(lab - srgb_to_lab(ground)[:, None, :], axis=2)
    # Below 8 is what compression and gradients make; 40 is another colour to everyone.
    apart = np.clip((apart - 8) / 32, 0, 1)
    inset = max(1, round(0.07 * columns))
    apart[:, :inset] = apart[:, -inset:] = 0
    apart[:inset] = apart[-inset:] = 0
    y, x = np.mgrid[0:rows, 0:columns]
    x, y = (x + 0.5) / columns - 0.5, (y + 0.5) / rows - 0.5
    central = np.exp(-0.5 * ((x / 0.25) ** 2 + (y / 0.2) ** 2))
    weight = apart * central
    if weight.sum() > 0:  # once more around where it is, since objects stand high or low
        middle = float((weight * y).sum() / weight.sum())
        central = np.exp(-0.5 * ((x / 0.3) ** 2 + ((y - middle) / 0.18) ** 2))
        weight = apart * central
    total = float(weight.sum())
    object_ = weight / total if total > 0 else weight
    marks = apart * (1 - central)
    return Scene(ground, object_.astype(np.float32), marks.astype(np.float32), _accent(rgb, weight))


def _smooth_rows(ground: np.ndarray) -> np.ndarray:
    """Running median over a tenth of the height: single marks at the edges do not count."""
    reach = max(1, len(ground) // 20)
    padded = np.pad(ground, ((reach, reach), (0, 0)), mode="edge")
    windows = np.stack([padded[i : i + len(ground)] for i in range(2 * reach + 1)])
    return np.median(windows, axis=0).astype(np.float32)


def _accent(rgb: np.ndarray, weight: np.ndarray) -> Colour:
    if weight.sum() <= 0:
        return CREAM
    # The most frequent coarse colour, then the mean of what falls into it.
    coarse = (rgb // 48).astype(int)
    codes = coarse[..., 0] * 36 + coarse[..., 1] * 6 + coarse[..., 2]
    mass = np.bincount(codes.ravel(), weights=weight.ravel(), minlength=216)
    chosen = codes == int(mass.argmax())
    mean = (rgb[chosen] * weight[chosen][:, None]).sum(axis=0) / weight[chosen].sum()
    r, g, b = (round(float(v)) for v in mean)
    return (r, g, b)


# --- layout --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """A candidate: lines at a size in a place."""

    lines: tuple[str, ...]
    size: int
    cap: float
    box: tuple[int, int, int, int]
    score: float
    covered: float
    marked: float


_MARGIN = 0.085
"""Least distance of ink from the edges, in widths: inside of a frame line."""

_WIDTHS = (0.80, 0.70, 0.60, 0.48)
"""Widths that a block may fill, in widths of the image."""


def _candidates(
    scene: Scene, title: str, letters: Lettering, size: tuple[int, int]
) -> list[_Block]:
    """Blocks in the order of their scores, the best first."""
    width, height = size
    objects, marks = _integral(scene.object_), _integral(scene.marks)
    cells = scene.object_.shape
    blocks: list[_Block] = []
    for lines in line_breaks(title):
        base = _measure(letters, lines, _MEASURE)
        tallest = (0.1 if len(lines) == 1 else 0.078) * height * letters.tallness
        for share in _WIDTHS:
            scale = share * width / max(base.widths)
            scale = min(scale, (0.5 - _MARGIN) * width / base.reach)
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
            low, high = _MARGIN * width, height - _MARGIN * width - block_height
            for top in np.linspace(low, high, 61):
                box = (left, float(top), left + block_width, float(top) + block_height)
                covered = _inside(objects, _cells(box, size, cells, 0.25 * cap))
                around = _cells(box, size, cells, 0.5 * cap)
                marked = _inside(marks, around) / max(1.0, float(scene.marks.sum()))
                score = _score(box, height, cap, lines, covered, marked)
                whole = (round(box[0]), round(box[1]), round(box[2]), round(box[3]))
                blocks.append(_Block(lines, font_size, cap, whole, score, covered, marked))
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
    marked: float,
) -> float:
    """Higher is better. The weights say how much one is worth in another: a sixteenth of the object
    covered is as bad as letters of half the size."""
    middle = (box[1] + box[3]) / 2 / height
    large = math.log2(cap / (0.07 * height))
    # Titles stand at a sixth of the height from either end; further in they part the picture.
    place = min(abs(middle - 0.15), abs(middle - 0.84)) / 0.2
    clumsy = sum(line.split()[-1].casefold() in _NO_END for line in lines[:-1])
    lengths = [len(line) for line in lines]
    uneven = 1 - min(lengths) / max(lengths)
    return (
        0.35 * large - 6 * covered + 1.2 * marked - 0.45 * place**2 - 0.4 * clumsy
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


def _inside(integral: np.ndarray, cells: tuple[int, int, int, int]) -> float:
    top, left, bottom, right = cells
    return float(
        integral[bottom, right] - integral[top, right] - integral[bottom, left]
        + integral[top, left]
    )  # fmt: skip


# --- ink and ground ------------------------------------------------------------------------------


def set_title(
    image: Image.Image, title: str, settings: LetteringSettings
) -> tuple[Image.Image, Layout]:
    """The image with its title set in type, RGB, and where it went.

    Images narrower than `settings.min_width` are enlarged by a whole factor first, since letters
    need pixels. The contrast of letters and ground is at least `settings.contrast` everywhere
    around the letters; the ground is touched only where it would be less, or where marks of the
    model stand in the way. Raises TitleImpossible.
    """
    title = " ".join(unicodedata.normalize("NFC", title).split())
    if not any(sign.isalnum() for sign in title):
        raise TitleImpossible(f"the title {title!r} has no letters; give one in the prompt suite")
    style = choose_style(title, settings.style)
    letters = lettering(title, style)
    if letters.capitals:
        title = title.upper()
    canvas = _enlarged(image.convert("RGB"), settings.min_width)
    scene = look(canvas)
    block = _candidates(scene, title, letters, canvas.size)[0]
    mask, box = _letters(letters, block, canvas.size)
    around = _around(mask, block.cap)
    canvas, cleared = _clear(canvas, scene, box, around, block.cap)
    colour = _ink(canvas, scene, around, settings.contrast)
    canvas, veiled = _veil(canvas, box, around, colour, block.cap, settings.contrast)
    titled = canvas.copy()
    titled.paste(Image.new("RGB", titled.size, colour), mask=mask)
    layout = Layout(
        style=style,
        lines=block.lines,
        size=block.size,
        cap_height=round(block.cap),
        box=box,
        covered=block.covered,
        colour=colour,
        contrast=_least_contrast(canvas, around, colour),
        scrim=cleared or veiled,
    )
    return titled, layout


def _enlarged(image: Image.Image, min_width: int) -> Image.Image:
    factor = math.ceil(min_width / image.width)
    if factor <= 1:
        return image
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.BICUBIC)


def _letters(
    letters: Lettering, block: _Block, size: tuple[int, int]
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The letters as a mask of the image's size, and the box of their ink."""
    font = _font(letters.package, letters.path, block.size)
    measured = _measure(letters, block.lines, block.size)
    pitch = measured.pitch(letters.leading)
    mask = Image.new("L", size, 0)
    draw = ImageDraw.Draw(mask)
    middle = size[0] / 2
    for index, line in enumerate(block.lines):
        start = middle - measured.widths[index] / 2 - measured.starts[index]
        baseline = block.box[1] + measured.above + index * pitch
        for piece, x in zip(_pieces(letters, line), _pen(letters, font, line), strict=True):
            draw.text((start + x, baseline), piece, fill=255, font=font, anchor="ls")
    ink = mask.getbbox()
    assert ink is not None, "a font that has the letters draws them"
    return mask, ink


def _around(mask: Image.Image, cap: float) -> np.ndarray:
    """bool (height, width): the letters and a rim of about a sixth of a capital around them."""
    blurred = mask.filter(ImageFilter.GaussianBlur(cap / 9))
    return np.asarray(blurred) > 10


def _least_contrast(canvas: Image.Image, around: np.ndarray, colour: Colour) -> float:
    """The least contrast of a colour with the ground around the letters."""
    return float(contrast_ratio(np.asarray(canvas)[around], colour).min())


def _strip(canvas: Image.Image, box: tuple[int, int, int, int], cap: float) -> slice:
    """The rows of an image that a title may touch."""
    reach = round(2.5 * cap)
    return slice(max(0, box[1] - reach), min(canvas.height, box[3] + reach))


def _with_rows(canvas: Image.Image, rows: slice, values: np.ndarray) -> Image.Image:
    """The image with these rows in place of its own; values (rows, width, 3), 0 to 255."""
    changed = canvas.copy()
    strip = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    changed.paste(Image.fromarray(strip), (0, rows.start))
    return changed


def _fade(
    size: tuple[int, int], rows: slice, box: tuple[float, float, float, float], soft: float
) -> np.ndarray:
    """float32 (rows, width): 1 in the box, falling smoothly to 0 at `soft` pixels from it."""
    y, x = np.ogrid[rows.start : rows.stop, 0 : size[0]]
    across = np.maximum(np.maximum(box[0] - x, x - box[2]), 0)
    down = np.maximum(np.maximum(box[1] - y, y - box[3]), 0)
    t = np.clip(np.hypot(across, down) / soft, 0, 1)
    return (1 - t * t * (3 - 2 * t)).astype(np.float32)


def _bare_ground(canvas: Image.Image, scene: Scene) -> np.ndarray:
    """float32 (height, width, 3): the image without what stands out from its ground.

    What is hidden is filled in from the ground around it, near places counting most (normalised
    convolution, Knutsson & Westin 1993).
    """
    rows, columns = scene.object_.shape
    small = canvas.resize((columns, rows), Image.Resampling.BOX)
    rgb = np.asarray(small, dtype=np.float32)
    apart = np.linalg.norm(srgb_to_lab(rgb) - srgb_to_lab(scene.ground)[:, None, :], axis=2)
    # A little weight for the ground by row, so that there is an answer everywhere.
    trust = np.exp(-((apart / 12) ** 2))[..., None]
    total = _blurred(rgb * trust, 5) + 0.02 * scene.ground[:, None, :]
    filled = total / (_blurred(trust, 5) + 0.02)
    channels = [
        np.asarray(Image.fromarray(filled[..., i]).resize(canvas.size, Image.Resampling.BICUBIC))
        for i in range(3)
    ]
    return np.clip(np.stack(channels, axis=-1), 0, 255)


def _blurred(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of (rows, columns, channels), the edges repeated."""
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        pads = [(reach, reach) if i == axis else (0, 0) for i in range(values.ndim)]
        padded = np.pad(values, pads, mode="edge")
        values = np.apply_along_axis(np.convolve, axis, padded, kernel, mode="valid")
    return values


def _clear(
    canvas: Image.Image,
    scene: Scene,
    box: tuple[int, int, int, int],
    around: np.ndarray,
    cap: float,
) -> tuple[Image.Image, bool]:
    """The image with bare ground below the title, where marks stand in its way.

    The main object stays as it is but for a rim around the letters, and so does a frame line.
    """
    rows = _strip(canvas, box, cap)
    ground = _bare_ground(canvas, scene)[rows]
    shown, near = np.asarray(canvas, dtype=np.float32)[rows], around[rows]
    apart = np.linalg.norm(srgb_to_lab(shown[near]) - srgb_to_lab(ground[near]), axis=1)
    if (apart > _DISTURBING).mean() < 0.04:
        return canvas, False
    left, top, right, bottom = _inside_frame(canvas.size)
    pad = 0.3 * cap
    inner = (
        max(left, box[0] - pad), max(top, box[1] - pad),
        min(right, box[2] + pad), min(bottom, box[3] + pad),
    )  # fmt: skip
    strength = np.clip(3 * scene.object_ / max(float(scene.object_.max()), 1e-9) - 0.5, 0, 1)
    keep = np.asarray(Image.fromarray(strength).resize(canvas.size, Image.Resampling.BICUBIC))
    alpha = _fade(canvas.size, rows, inner, 0.9 * cap) * (1 - np.clip(keep[rows], 0, 1))
    alpha *= _fade(canvas.size, rows, (left, top, right, bottom), 0.015 * canvas.width)
    # Right around the letters the ground has to be bare whatever is there.
    rim = Image.fromarray(near).convert("L").filter(ImageFilter.GaussianBlur(cap / 12))
    alpha = np.maximum(alpha, np.clip(np.asarray(rim, dtype=np.float32) / 128, 0, 1))
    return _with_rows(canvas, rows, shown + (ground - shown) * alpha[..., None]), True


_DISTURBING = 20
"""Difference from the ground (CIE76) from which something behind letters disturbs them."""

_FRAME = 0.085
"""Share of the width from the edges where a frame line may run."""


def _inside_frame(size: tuple[int, int]) -> tuple[float, float, float, float]:
    edge = _FRAME * size[0]
    return (edge, edge, size[0] - edge, size[1] - edge)


def _ink(canvas: Image.Image, scene: Scene, around: np.ndarray, target: float) -> Colour:
    """The letters' colour: the object's where it can be read well, else pale or dark.

    Dark is the ground's own hue made deep, which belongs to the picture more than black does.
    """
    ground = np.asarray(canvas)[around]

    def usual(colour: Colour) -> float:
        return float(np.quantile(contrast_ratio(ground, colour), 0.25))

    if float(contrast_ratio(ground, scene.accent).min()) >= target:
        return scene.accent
    mean = ground.mean(axis=0)
    depths = [_mixed(mean, INK, share) for share in (0.8, 0.88, 0.96)]
    deep = next((colour for colour in depths if usual(colour) >= target * 1.15), INK)
    return max((CREAM, deep), key=usual)


def _mixed(one: np.ndarray | Colour, other: np.ndarray | Colour, share: float) -> Colour:
    first, second = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    r, g, b = (round(float(v)) for v in first + (second - first) * share)
    return (r, g, b)


def _veil(
    canvas: Image.Image,
    box: tuple[int, int, int, int],
    around: np.ndarray,
    colour: Colour,
    cap: float,
    target: float,
) -> tuple[Image.Image, bool]:
    """The image with its ground drawn towards dark or light just as far as the contrast needs.

    The veil runs across the whole width and fades out up and down, so that it has no edge.
    """
    if _least_contrast(canvas, around, colour) >= target:
        return canvas, False
    veil = np.array(_veil_colour(np.asarray(canvas)[around], colour, target), dtype=np.float32)
    band = (0, box[1] - 0.3 * cap, canvas.width, box[3] + 0.3 * cap)
    rows = _strip(canvas, box, cap)
    fade = np.repeat(_fade(canvas.size, rows, band, 1.6 * cap)[..., None], 3, axis=2)
    shown, near = np.asarray(canvas, dtype=np.float32)[rows], around[rows]

    def carries(strength: float) -> bool:
        ground = shown[near] + (veil - shown[near]) * fade[near] * strength
        return float(contrast_ratio(np.rint(ground), colour).min()) >= target

    low, high = 0.0, 1.0
    for _ in range(7):
        middle = (low + high) / 2
        if carries(middle):
            high = middle
        else:
            low = middle
    return _with_rows(canvas, rows, shown + (veil - shown) * fade * high), True


def _veil_colour(ground: np.ndarray, colour: Colour, target: float) -> Colour:
    """The ground's own hue, made dark or light enough to carry the letters."""
    own = ground.mean(axis=0)
    # Less or more of every channel keeps the hue; a mixture with grey would be mud.
    if float(relative_luminance(colour)) > 0.18:
        steps = [own * (1 - share) for share in np.linspace(0, 1, 41)]
    else:
        bright = own * 255 / max(float(own.max()), 1.0)
        steps = [own + (bright - own) * share for share in np.linspace(0, 1, 21)]
        steps += [bright + (255 - bright) * share for share in np.linspace(0, 1, 41)]
    found = [_mixed(step, step, 0) for step in steps]
    enough = (c for c in found if float(contrast_ratio(c, colour)) >= target * 1.08)
    return next(enough, found[-1])


# --- the table -----------------------------------------------------------------------------------


def titled_key(image: str, title: str, settings: LetteringSettings) -> str:
    """Key of what decides a titled image's pixels; `image` is the hash of the untitled one."""
    return content_key("titled", TYPOGRAPHY_VERSION, image, title, settings, fonts_id(),
                       layout_engine(), installed_version("pillow"))  # fmt: skip


def set_titles(
    store: Store, generations: pd.DataFrame, settings: LetteringSettings, progress: Progress
) -> pd.DataFrame:
    """The titled posters (TITLED_COLUMNS) of a table of generations (`sampler.COLUMNS`).

    One row a generation with a title. Only those that the store lacks are set. A title that cannot
    be set, or an image that cannot be read, is a row with status failed and the reason, and is
    tried again; blocked and failed generations keep their status.
    """
    titled = generations[generations["title"].astype(bool)]
    drawn = titled[titled["status"] == "ok"]
    jobs = {
        titled_key(str(row.image), str(row.title), settings): (
            str(row.image_path), str(row.title),
        )
        for row in drawn.itertuples(index=False)
    }  # fmt: skip
    failures: dict[str, str] = {}

    def one(key: str) -> tuple[str, dict[str, Any] | None]:
        path, title = jobs[key]
        try:
            with Image.open(store.root / path) as image:
                image.load()
                about = str(image.info.get("parameters", ""))
                result, layout = set_title(image, title, settings)
        except TitleImpossible as error:
            failures[key] = str(error)
            return key, None
        except (OSError, SyntaxError) as error:
            failures[key] = (
                f"{store.root / path}: cannot be read ({error}); materialize the generations again"
            )
            return key, None
        blob = store.put(_png(result, about, title, layout), ".png")
        return key, _recorded(blob, result, layout)

    def compute(missing: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        with progress.task(f"Setting {len(missing)} titles", len(missing), "posters") as tick:
            for key, row in parallel_map(one, missing):
                tick()
                if row is not None:
                    yield key, row

    done = compute_missing(
        store, "titled", list(jobs), compute, usable=lambda row: store.has(row["image"], ".png")
    )
    rows = []
    for row in titled.itertuples(index=False):
        values: dict[str, Any] = {name: None for name in TITLED_COLUMNS}
        values |= {"image": "", "image_path": "", "style": "", "lines": "", "colour": ""}
        values |= {"generation_key": row.generation_key, "untitled_image": row.image,
                   "title": row.title, "status": row.status, "reason": row.reason}  # fmt: skip
        if row.status == "ok":
            key = titled_key(str(row.image), str(row.title), settings)
            if key in done:
                blob = done[key]["image"]
                path = store.path(blob, ".png").relative_to(store.root).as_posix()
                values |= done[key] | {"image_path": path}
            else:
                values |= {"status": "failed", "reason": failures.get(key, "not set")}
        rows.append(values)
    return pd.DataFrame(rows, columns=list(TITLED_COLUMNS))


def _recorded(blob: str, image: Image.Image, layout: Layout) -> dict[str, Any]:
    left, top, right, bottom = layout.box
    return {
        "image": blob,
        "style": layout.style,
        "lines": json.dumps(list(layout.lines), ensure_ascii=False),
        "left": left,
        "top": top,
        "right": right,
        "bottom": bottom,
        "cap_height": layout.cap_height,
        "colour": "#{:02x}{:02x}{:02x}".format(*layout.colour),
        "contrast": round(layout.contrast, 3),
        "scrim": layout.scrim,
        "covered": round(layout.covered, 4),
        "width": image.width,
        "height": image.height,
    }


def _png(image: Image.Image, about: str, title: str, layout: Layout) -> bytes:
    """PNG that says how the picture was made, as the untitled one does, and how it is lettered."""
    info = PngInfo()
    lettered = f"Title: {json.dumps(title, ensure_ascii=False)}, Lettering: {layout.style}"
    # Latin-1 is all that a tEXt chunk holds; iTXt holds every title.
    info.add_itxt("parameters", f"{about}, {lettered}" if about else lettered)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
