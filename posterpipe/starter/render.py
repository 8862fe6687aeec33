"""Turning a scene into pixels: the three styles' layouts, backdrops and title lettering.

What belongs here: everything between a Scene and an image. What does not: object outlines and
their inks (`objects`), choosing what a scene shows (`world`), files (`posters`).

All measures are fractions of the unit, the width of the largest 2:3 portrait in the picture, so
that a scene looks the same at 64x96 and at 1000x1500. Pictures are drawn enlarged without
smoothing and then averaged down: for flat shapes that is the fastest smooth edge.
"""

import math
from functools import lru_cache

import font_amatic_sc
import font_fredoka_one
import font_hanken_grotesk
import font_manrope
import font_roboto
import font_source_serif_pro
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from posterpipe.starter.objects import (
    CREAM,
    DARK,
    DRAWINGS,
    SMALL_DRAWINGS,
    Colour,
    Drawing,
    ellipse,
    inks,
    lab,
    mix,
)
from posterpipe.starter.world import AFLOAT, COLOURS, FONT_COUNT, GROUNDED, Scene, halo_height

_FONTS: tuple[str, ...] = (
    font_fredoka_one.FredokaOne,
    font_manrope.ManropeExtraBold,
    font_roboto.RobotoBlack,
    font_source_serif_pro.SourceSerifProBlack,
    font_hanken_grotesk.HankenGroteskBold,
    font_amatic_sc.AmaticSCBold,
)
assert len(_FONTS) == FONT_COUNT

_CREDITS = (
    "A PAPER LANTERN PICTURE    WRITTEN AND DRAWN BY IDA MOSS",
    "A FILM BY OTTO FERN    MUSIC BY LENA QUILL",
    "TALL PINE STUDIO PRESENTS    A FILM BY NOOR VALE",
    "DIRECTED BY JUNE HOLLIS    A SMALL HOUSE PRODUCTION",
)
_LEAST_LETTERING = 6.0
"""Font size in final pixels below which credits are a bar: letters could not be told apart."""

_CIRCLE = ellipse(0, 0, 1, steps=120).astype(np.float32)


class _Canvas:
    """An enlarged drawing surface with positions in pixels of its own."""

    def __init__(self, width: int, height: int, supersample: int, colour: Colour) -> None:
        self.width = width * supersample
        self.height = height * supersample
        self.supersample = supersample
        self.unit = min(self.width, self.height / 1.5)
        self.image = Image.new("RGB", (self.width, self.height), colour)
        self.draw = ImageDraw.Draw(self.image)

    def polygon(self, points: np.ndarray, colour: Colour) -> None:
        # Pillow takes a float32 buffer as it is, which is far faster than a list of pairs.
        self.draw.polygon(np.ascontiguousarray(points, dtype=np.float32), fill=colour)  # type: ignore[arg-type]

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        self.polygon(_CIRCLE * np.float32(radius) + np.array((x, y), np.float32), colour)

    def stamp(
        self,
        drawing: Drawing,
        colours: dict[str, Colour],
        x: float,
        y: float,
        size: float,
        tilt: float = 0.0,
        flip: bool = False,
    ) -> None:
        """Draw a drawing around (x, y), `size` pixels to its unit, `tilt` degrees clockwise."""
        angle = math.radians(tilt)
        cos, sin = math.cos(angle) * size, math.sin(angle) * size
        mirror = -1.0 if flip else 1.0
        matrix = np.array([[cos * mirror, sin * mirror], [-sin, cos]], np.float32)
        points = drawing.points @ matrix + np.array((x, y), np.float32)
        bounds = drawing.bounds
        for i, role in enumerate(drawing.roles):
            self.draw.polygon(points[bounds[i] : bounds[i + 1]], fill=colours[role])  # type: ignore[arg-type]

    def finish(self) -> Image.Image:
        return self.image if self.supersample == 1 else self.image.reduce(self.supersample)


def render(scene: Scene, width: int, height: int, *, supersample: int = 3) -> Image.Image:
    """Draw a scene as an RGB image of `width` x `height` pixels.

    `supersample` is how many times enlarged it is drawn before averaging: 3 suits thumbnails,
    2 is enough from about 500 pixels on.
    """
    canvas = _Canvas(width, height, supersample, background_colour(scene))
    {"plain": _plain, "busy": _busy, "poster": _poster}[scene.style](canvas, scene)
    return canvas.finish()


def background_colour(scene: Scene) -> Colour:
    """The background's colour with the scene's small tint."""
    r, g, b = (
        min(255, max(0, channel + shift))
        for channel, shift in zip(COLOURS[scene.background], scene.tint, strict=True)
    )
    return (r, g, b)


# --- lettering ---------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def _font(index: int, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout engine gives the same spacing whether or not Raqm is installed.
    return ImageFont.truetype(_FONTS[index], size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=8192)
def _line_width(index: int, line: str) -> float:
    """Width of a line of text, in font sizes."""
    return _font(index, 100).getlength(line) / 100


@lru_cache(maxsize=16)
def _capital_height(index: int) -> float:
    """Height of a capital, in font sizes."""
    return -_font(index, 100).getbbox("H", anchor="ls")[1] / 100


def _lines(title: str) -> list[str]:
    """A title in capitals, on two lines when one would make it small."""
    title = title.upper()
    words = title.split()
    if len(title) <= 10 or len(words) < 2:
        return [title]
    breaks = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(1, len(words))]
    return list(min(breaks, key=lambda pair: max(map(len, pair))))


def _title(
    canvas: _Canvas, scene: Scene, middle: float, colour: Colour, width: float, height: float
) -> None:
    """Letter the title around `middle` (canvas pixels); `width`, `height` bound it, in units."""
    if scene.title is None:
        return
    lines = _lines(scene.title)
    capital = _capital_height(scene.font)
    leading = 1.28
    widest = max(_line_width(scene.font, line) for line in lines)
    size = min(width / widest, height / (capital * (1 + leading * (len(lines) - 1))))
    pixels = max(4, int(size * canvas.unit))
    font = _font(scene.font, pixels)
    cap = capital * pixels
    baseline = middle + cap / 2 - cap * leading * (len(lines) - 1) / 2
    for line in lines:
        canvas.draw.text((canvas.width / 2, baseline), line, fill=colour, font=font, anchor="ms")
        baseline += cap * leading


def _credits(canvas: _Canvas, scene: Scene, baseline: float, colour: Colour) -> None:
    """The small line of credits; a bar of the same weight where letters would be illegible."""
    u = canvas.unit
    size = 0.0195 * u
    middle = canvas.width / 2
    if size / canvas.supersample < _LEAST_LETTERING:
        half = 0.22 * u
        canvas.draw.rectangle(
            (middle - half, baseline - 0.011 * u, middle + half, baseline), fill=colour
        )
        return
    text = _CREDITS[scene.detail % len(_CREDITS)]
    baseline += 0.008 * u
    canvas.draw.text((middle, baseline), text, fill=colour, font=_font(1, int(size)), anchor="ms")


def _legible(colours: tuple[Colour, ...], behind: Colour) -> Colour:
    """The first colour light or dark enough to be read on `behind`, else the best one."""
    gaps = [abs(lab(colour)[0] - lab(behind)[0]) for colour in colours]
    for colour, gap in zip(colours, gaps, strict=True):
        if gap >= 42:
            return colour
    return colours[int(np.argmax(gaps))]


# --- styles ------------------------------------------------------------------------------------


def _object(canvas: _Canvas, scene: Scene, *backdrops: Colour) -> None:
    canvas.stamp(
        DRAWINGS[scene.kind],
        inks(COLOURS[scene.object_colour], backdrops),
        scene.x * canvas.width,
        scene.y * canvas.height,
        scene.size * canvas.unit,
        scene.tilt,
        scene.flip,
    )


def _plain(canvas: _Canvas, scene: Scene) -> None:
    _object(canvas, scene, COLOURS[scene.background])
    if scene.title:
        top = scene.title_position == "top"
        middle = canvas.height * (0.1 if top else 0.9)
        ink = _legible((DARK, CREAM), COLOURS[scene.background])
        _title(canvas, scene, middle, ink, 0.8, 0.13)


def _busy(canvas: _Canvas, scene: Scene) -> None:
    named = COLOURS[scene.background]
    ground = background_colour(scene)
    w, h, u = canvas.width, canvas.height, canvas.unit
    other = _deeper(ground)
    pick = scene.detail
    if scene.layout == "bands":
        count = 5 + pick % 3
        for i in range(0, count, 2):
            canvas.draw.rectangle((0, h * i // count, w, h * (i + 1) // count), fill=other)
    elif scene.layout == "split":
        edge = h * (0.35 + 0.3 * (pick % 97) / 97)
        canvas.draw.rectangle((0, edge, w, h), fill=other)
    elif scene.layout == "diagonal":
        for i in range(-1, 4, 2):
            left = i * 0.34 * w
            canvas.polygon(
                np.array(
                    [(left, 0), (left + 0.34 * w, 0), (left + 1.1 * w, h), (left + 0.76 * w, h)]
                ),
                other,
            )
    else:
        accent = COLOURS[scene.accent]
        lean = 0.25 + 0.5 * (pick % 89) / 89
        canvas.disc(w * lean, h + 0.62 * u, 0.85 * u, mix(accent, ground, 0.25))
        canvas.disc(w * (1.12 - lean), h + 0.6 * u, 0.76 * u, accent)
    for small in scene.smalls:
        colour = COLOURS[small.colour]
        if small.what in SMALL_DRAWINGS:
            drawing, colours = SMALL_DRAWINGS[small.what], {"body": colour}
        else:
            drawing, colours = DRAWINGS[small.what], inks(colour, (named,))
        canvas.stamp(drawing, colours, small.x * w, small.y * h, small.size * u, small.tilt)
    _object(canvas, scene, named)
    if scene.title:
        _title_block(canvas, scene, ground)


def _title_block(canvas: _Canvas, scene: Scene, ground: Colour) -> None:
    """A busy scene's title: lettering over a scribbled line, or on a patch."""
    w, h, u = canvas.width, canvas.height, canvas.unit
    middle = h * (0.11 if scene.title_position == "top" else 0.89)
    ink = _legible((COLOURS[scene.accent], CREAM, DARK), ground)
    on_hills = scene.layout == "hills" and scene.title_position == "bottom"
    if on_hills or scene.detail % 2:
        slant = 0.02 * u
        patch = np.array([(0.07, -0.12), (0.95, -0.1), (0.92, 0.12), (0.05, 0.1)]) * u
        canvas.polygon(patch + np.array(((w - u) / 2, middle + slant / 4)), ink)
        _title(canvas, scene, middle, _legible((CREAM, DARK), ink), 0.76, 0.15)
        return
    xs = np.linspace(0.14, 0.86, 11) * w
    ys = middle + 0.13 * u + np.where(np.arange(11) % 2, 0.014, -0.014) * u
    canvas.draw.line(
        [v for pair in zip(xs, ys, strict=True) for v in pair],
        fill=ink,
        width=max(1, int(0.016 * u)),
    )
    _title(canvas, scene, middle, ink, 0.84, 0.17)


def _deeper(colour: Colour) -> Colour:
    """A second tone of a background, still called by its name."""
    lightness = lab(colour)[0]
    if lightness < 25:
        return mix(colour, (150, 140, 165), 0.2)
    # Darkening weak channels more than strong ones keeps the tone clean instead of grey.
    r, g, b = (round(0.92 * c * (c / 255) ** 0.35) for c in colour)
    return (r, g, b)


def _poster(canvas: _Canvas, scene: Scene) -> None:
    named, halo = COLOURS[scene.background], COLOURS[scene.accent]
    ground = background_colour(scene)
    w, h, u = canvas.width, canvas.height, canvas.unit
    cx, cy = w / 2, h * halo_height(scene.title_position)
    radius = 0.365 * u
    deep = _deeper(ground)
    if scene.layout == "rays":
        soft = mix(ground, deep, 0.55)
        for i in range(12):
            a, b = (math.pi * (i / 6 + d) for d in (-0.04, 0.04))
            far = 1.6 * u
            canvas.polygon(
                np.array(
                    [
                        (cx, cy),
                        (cx + far * math.cos(a), cy + far * math.sin(a)),
                        (cx + far * math.cos(b), cy + far * math.sin(b)),
                    ]
                ),
                soft,
            )
    elif scene.layout == "rings":
        canvas.disc(cx, cy, radius + 0.05 * u, _ring_colour(ground))
    canvas.disc(cx, cy, radius, halo)
    half = DRAWINGS[scene.kind].half_height * scene.size * u
    foot = scene.y * h + half
    standing = scene.kind in GROUNDED
    behind = (named, halo)
    if standing:
        _ground(canvas, scene.ground, foot - 0.035 * u, deep)
    elif scene.kind not in AFLOAT:
        _ground(canvas, scene.ground, max(foot + 0.03 * u, cy + radius - 0.06 * u), deep)
    _object(canvas, scene, *behind)
    if scene.kind in AFLOAT:
        _ground(canvas, scene.ground, foot - 0.035 * u, deep)
    ink = _legible((halo, CREAM, DARK), deep if scene.ground != "none" else ground)
    top = scene.title_position == "top"
    if top:
        ink = _legible((halo, CREAM, DARK), ground)
    _title(canvas, scene, h * (0.155 if top else 0.842), ink, 0.76, 0.19)
    if scene.title:
        low = deep if scene.ground != "none" else ground
        _credits(canvas, scene, h * 0.938, mix(low, _legible((ink, CREAM, DARK), low), 0.6))
    inset, line = round(0.045 * u), max(1, round(0.0115 * u))
    canvas.draw.rectangle((inset, inset, w - 1 - inset, h - 1 - inset), outline=ink, width=line)


def _ring_colour(ground: Colour) -> Colour:
    """The ring around a halo: a paler background, or a deeper one where that is pale already."""
    return mix(ground, CREAM, 0.28) if lab(ground)[0] < 72 else _deeper(ground)


def _ground(canvas: _Canvas, shape: str, top: float, colour: Colour) -> None:
    """Fill the picture below `top` (canvas pixels) with a horizon of the given shape."""
    w, h, u = canvas.width, canvas.height, canvas.unit
    if shape == "flat":
        canvas.draw.rectangle((0, top, w, h), fill=colour)
    elif shape == "hill":
        x = np.linspace(0, w, 25)
        y = top + 0.12 * u * (2 * x / w - 1) ** 2
        canvas.polygon(np.array([*zip(x, y, strict=True), (w, h), (0, h)]), colour)
    elif shape == "waves":
        x = np.linspace(0, w, 73)
        y = top - 0.022 * u * np.abs(np.sin(x / w * math.pi * 6)) + 0.022 * u
        canvas.polygon(np.array([*zip(x, y, strict=True), (w, h), (0, h)]), colour)
