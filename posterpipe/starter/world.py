"""The starter world's vocabulary, what a scene is, and how scenes are drawn at random.

What belongs here: kinds, colours, styles, titles, the Scene record and its sampling. What does
not: shapes (`objects`), pixels (`render`) and words around the vocabulary (`captions`).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from posterpipe.starter.objects import DRAWINGS, Colour, difference

KINDS: dict[str, tuple[str, ...]] = {
    "rocket": ("rocket", "spaceship", "rocket ship", "space rocket"),
    "sailboat": ("sailboat", "boat", "sailing boat", "ship"),
    "whale": ("whale", "blue whale", "big fish"),
    "castle": ("castle", "fortress", "palace"),
    "tree": ("tree", "pine tree", "fir tree"),
    "balloon": ("balloon", "hot air balloon", "hot-air balloon"),
    "umbrella": ("umbrella", "parasol"),
    "mushroom": ("mushroom", "toadstool"),
    "robot": ("robot", "android"),
    "cat": ("cat", "kitten", "kitty"),
    "car": ("car", "automobile", "motor car"),
    "guitar": ("guitar", "acoustic guitar"),
}
"""Object kinds: canonical name -> what people type for it, the canonical name first."""

COLOURS: dict[str, Colour] = {
    "red": (212, 50, 44),
    "orange": (246, 140, 34),
    "yellow": (252, 210, 68),
    "green": (62, 142, 66),
    "teal": (28, 158, 160),
    "blue": (34, 92, 190),
    "purple": (130, 62, 148),
    "pink": (244, 146, 180),
    "cream": (248, 236, 208),
    "black": (34, 31, 40),
}
"""Named colours, sRGB: far enough apart that a small model cannot confuse them."""

STYLES = ("plain", "busy", "poster")

FONT_COUNT = 6
"""How many title fonts `render` offers; `Scene.font` indexes them."""

BOLD_FONT_COUNT = 5
"""How many of them, from the first, are strong enough for the poster style."""

SMALL_KINDS = ("star", "cloud", "dot", "moon", "heart", "bird")
"""Small things that busy scenes scatter, besides tiny objects of the other kinds."""

GROUNDED = frozenset({"castle", "tree", "mushroom", "robot", "cat", "car"})
"""Kinds that stand on the ground of a poster."""

AFLOAT = frozenset({"sailboat", "whale"})
"""Kinds that lie in water on a poster."""

_SYMMETRIC = frozenset({"rocket", "tree", "balloon", "mushroom", "robot"})

TITLE_FIRST = (
    "Barley", "Biscuit", "Borrowed", "Button", "Copper", "Crooked", "Drowsy", "Feather",
    "Ginger", "Humble", "Juniper", "Lantern", "Lopsided", "Marzipan", "Mellow", "Nimble",
    "Paper", "Pepper", "Plum", "Pocket", "Saffron", "Sunday", "Tangerine", "Thistle",
    "Tinsel", "Velvet", "Wander", "Whistle", "Willow", "Woollen",
)  # fmt: skip
TITLE_SECOND: dict[str, tuple[str, ...]] = {
    "rocket": ("Orbit", "Comet", "Liftoff", "Countdown", "Sailor"),
    "sailboat": ("Regatta", "Harbour", "Breeze", "Mariner", "Lagoon"),
    "whale": ("Fathom", "Tide", "Spout", "Deep", "Current"),
    "castle": ("Rampart", "Turret", "Moat", "Realm", "Keep"),
    "tree": ("Pine", "Grove", "Timber", "Thicket", "Evergreen"),
    "balloon": ("Ascent", "Zephyr", "Drift", "Updraft", "Altitude"),
    "umbrella": ("Drizzle", "Puddle", "Parasol", "Rainfall", "Shower"),
    "mushroom": ("Toadstool", "Spore", "Forager", "Fungus", "Morel"),
    "robot": ("Gearbox", "Circuit", "Automaton", "Rivet", "Dynamo"),
    "cat": ("Whisker", "Tomcat", "Mouser", "Paws", "Purr"),
    "car": ("Detour", "Roadster", "Mileage", "Gasket", "Motor"),
    "guitar": ("Chord", "Strummer", "Ballad", "Fret", "Serenade"),
}


@dataclass(frozen=True)
class Small:
    """One small thing of a busy scene.

    `what` is one of SMALL_KINDS or KINDS; `x`, `y` are its centre (fractions of width and height),
    `size` is a fraction of the scene's unit (see Scene), `tilt` is in degrees clockwise.
    """

    what: str
    colour: str
    x: float
    y: float
    size: float
    tilt: float


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows, independent of its pixel size.

    Positions are fractions of the picture's width (`x`) and height (`y`). Sizes are fractions of
    the unit: the width of the largest 2:3 portrait that fits, which is the width for posters.
    """

    style: str
    """One of STYLES."""
    kind: str
    """Key of KINDS."""
    object_colour: str
    """Key of COLOURS."""
    background: str
    """Key of COLOURS, clearly different from the object's."""
    title: str | None
    title_position: str | None
    """"top" or "bottom"; None without a title."""
    x: float
    y: float
    size: float
    tilt: float = 0.0
    """Degrees clockwise."""
    flip: bool = False
    """Mirrored left to right."""
    accent: str = "cream"
    """Key of COLOURS: the halo of a poster, the hills of a busy scene."""
    layout: str = "flat"
    """Backdrop: plain "flat"; busy "bands", "split", "diagonal" or "hills"; poster "disc",
    "rings" or "rays"."""
    ground: str = "none"
    """Poster: "none", "flat", "hill" or "waves"."""
    font: int = 0
    """Index of the title font, 0 to FONT_COUNT - 1."""
    tint: tuple[int, int, int] = (0, 0, 0)
    """Jitter added to the background colour, -5..5 a channel."""
    smalls: tuple[Small, ...] = ()
    """Small scattered things, back to front; only in busy scenes."""
    detail: int = 0
    """Seed of details that carry no meaning (scribbles, the wording of credits)."""


@cache
def partners(colour: str, least: float = 46.0) -> tuple[str, ...]:
    """Names of the colours that stand out from `colour`; `least` is in CIE76 delta E."""
    return tuple(name for name, rgb in COLOURS.items() if difference(rgb, COLOURS[colour]) >= least)


@cache
def halo_colours(object_colour: str, background: str) -> tuple[str, ...]:
    """Colours for a poster's halo: apart from the object, and visible on the background."""
    near = partners(object_colour)
    fitting = [name for name in near if name in partners(background, 34.0)]
    light = [name for name in fitting if name in ("cream", "yellow", "pink", "orange", "teal")]
    return tuple(light or fitting)


def sample_title(rng: np.random.Generator, kind: str) -> str:
    """Invent a film title of two or three words; one in four has nothing to do with the object."""
    first = str(rng.choice(TITLE_FIRST))
    about = kind if rng.random() < 0.75 else str(rng.choice(list(TITLE_SECOND)))
    second = str(rng.choice(TITLE_SECOND[about]))
    return f"The {first} {second}" if rng.random() < 0.25 else f"{first} {second}"


def sample_scene(
    rng: np.random.Generator,
    *,
    style: str | None = None,
    kind: str | None = None,
) -> Scene:
    """Draw a scene at random; what is given is kept.

    Plain scenes have no title, half of the busy ones have one, and posters always.
    """
    style = style or STYLES[rng.integers(len(STYLES))]
    kind = kind or list(KINDS)[rng.integers(len(KINDS))]
    object_colour = list(COLOURS)[rng.integers(len(COLOURS))]
    choices = partners(object_colour)
    background = choices[rng.integers(len(choices))]
    wanted = {"plain": 0.0, "busy": 0.5, "poster": 1.0}[style]
    title = sample_title(rng, kind) if rng.random() < wanted else None
    make = {"plain": _plain, "busy": _busy, "poster": _poster}[style]
    return make(rng, kind, object_colour, background, title)


def _tint(rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = (int(v) for v in rng.integers(-5, 6, 3))
    return (r, g, b)


def _flip(rng: np.random.Generator, kind: str) -> bool:
    return kind not in _SYMMETRIC and bool(rng.random() < 0.5)


def _place(title: str | None, rng: np.random.Generator, top: float) -> str | None:
    """Where a title goes; `top` is the chance of the top."""
    if title is None:
        return None
    return "top" if rng.random() < top else "bottom"


def _plain(
    rng: np.random.Generator, kind: str, colour: str, background: str, title: str | None
) -> Scene:
    size = float(rng.uniform(0.56, 0.82))
    drawing = DRAWINGS[kind]
    spare_x = max(0.0, 0.47 - drawing.half_width * size)
    spare_y = max(0.0, 0.47 - drawing.half_height * size / 1.5)
    position = _place(title, rng, 0.5)
    shift = {"top": 0.06, "bottom": -0.06, None: 0.0}[position]
    return Scene(
        style="plain",
        kind=kind,
        object_colour=colour,
        background=background,
        title=title,
        title_position=position,
        x=0.5 + float(rng.uniform(-0.7, 0.7)) * min(spare_x, 0.2),
        y=0.5 + shift + float(rng.uniform(-0.7, 0.7)) * min(spare_y, 0.18),
        size=size,
        tilt=float(rng.uniform(-9, 9)),
        flip=_flip(rng, kind),
        font=int(rng.integers(FONT_COUNT)),
        tint=_tint(rng),
        detail=int(rng.integers(1 << 30)),
    )


def _busy(
    rng: np.random.Generator, kind: str, colour: str, background: str, title: str | None
) -> Scene:
    position = _place(title, rng, 0.5)
    x = float(rng.uniform(0.33, 0.67))
    low, high = {"top": (0.46, 0.68), "bottom": (0.34, 0.54), None: (0.36, 0.64)}[position]
    y = float(rng.uniform(low, high))
    size = float(rng.uniform(0.48, 0.64))
    # A busy scene repeats itself: mostly two or three sorts of small things, each several times.
    sorts = [str(s) for s in rng.choice(SMALL_KINDS, size=2, replace=False)]
    if rng.random() < 0.6:
        others = [name for name in KINDS if name != kind]
        sorts.append(others[rng.integers(len(others))])
    visible = partners(background, 40.0)
    smalls: list[Small] = []
    for i in range(int(rng.integers(5, 13))):
        what = sorts[i % len(sorts)]
        tiny = what in KINDS
        small_size = float(rng.uniform(0.13, 0.18) if tiny else rng.uniform(0.08, 0.17))
        spot = _free_spot(rng, x, y, size, smalls, position)
        smalls.append(
            Small(
                what=what,
                colour=visible[rng.integers(len(visible))],
                x=spot[0],
                y=spot[1],
                size=small_size,
                tilt=float(rng.uniform(-14, 14)),
            )
        )
    hills = [name for name in partners(background, 36.0) if name != colour]
    return Scene(
        style="busy",
        kind=kind,
        object_colour=colour,
        background=background,
        title=title,
        title_position=position,
        x=x,
        y=y,
        size=size,
        tilt=float(rng.uniform(-16, 16)),
        flip=_flip(rng, kind),
        accent=hills[rng.integers(len(hills))],
        layout=("bands", "split", "diagonal", "hills")[rng.integers(4)],
        font=int(rng.integers(FONT_COUNT)),
        tint=_tint(rng),
        smalls=tuple(smalls),
        detail=int(rng.integers(1 << 30)),
    )


def _free_spot(
    rng: np.random.Generator,
    x: float,
    y: float,
    size: float,
    smalls: list[Small],
    title_position: str | None,
) -> tuple[float, float]:
    """A place for a small thing, the best of a few tries: clear of the object and of the others."""
    best, best_gap = (0.5, 0.5), -9.0
    top = 0.22 if title_position == "top" else 0.05
    bottom = 0.78 if title_position == "bottom" else 0.95
    for sx, sy in rng.uniform((0.06, top), (0.94, bottom), (8, 2)):
        # Distances in units of the width: a 2:3 portrait is 1.5 widths high.
        gap = float(np.hypot(sx - x, 1.5 * (sy - y))) - size * 0.55 - 0.08
        for small in smalls:
            gap = min(gap, float(np.hypot(sx - small.x, 1.5 * (sy - small.y))) - 0.14)
        if gap > best_gap:
            best, best_gap = (float(sx), float(sy)), gap
        if gap > 0.04:
            break
    return best


def _poster(
    rng: np.random.Generator, kind: str, colour: str, background: str, title: str | None
) -> Scene:
    halos = halo_colours(colour, background)
    ground = "none"
    if kind in GROUNDED:
        ground = ("flat", "hill")[rng.integers(2)]
    elif kind in AFLOAT:
        ground = "waves"
    elif rng.random() < 0.6:
        ground = ("hill", "waves")[rng.integers(2)]
    return poster_scene(
        kind=kind,
        object_colour=colour,
        background=background,
        accent=halos[rng.integers(len(halos))],
        title=title,
        title_position=_place(title, rng, 0.22),
        size=float(rng.uniform(0.62, 0.68)),
        layout=("disc", "rings", "rays")[rng.integers(3)],
        ground=ground,
        font=int(rng.integers(BOLD_FONT_COUNT)),
        flip=_flip(rng, kind),
        tint=_tint(rng),
        detail=int(rng.integers(1 << 30)),
    )


def poster_scene(
    *,
    kind: str,
    object_colour: str,
    background: str,
    accent: str,
    title: str | None,
    title_position: str | None = "bottom",
    size: float = 0.65,
    layout: str = "disc",
    ground: str = "none",
    font: int = 0,
    flip: bool = False,
    tint: tuple[int, int, int] = (0, 0, 0),
    detail: int = 0,
) -> Scene:
    """A scene of the poster style: it puts the one object where the house style wants it.

    Objects that stand or float sit low in the halo, others are centred on it.
    """
    middle = halo_height(title_position)
    if kind in GROUNDED or kind in AFLOAT:
        middle += 0.5 * max(0.0, 0.36 - DRAWINGS[kind].half_height * size) / 1.5
    return Scene(
        style="poster",
        kind=kind,
        object_colour=object_colour,
        background=background,
        title=title,
        title_position=title_position if title else None,
        x=0.5,
        y=middle,
        size=size,
        flip=flip,
        accent=accent,
        layout=layout,
        ground=ground,
        font=font,
        tint=tint,
        detail=detail,
    )


def halo_height(title_position: str | None) -> float:
    """Height of a poster's halo centre, a fraction of the picture's height from the top."""
    return {"bottom": 0.41, "top": 0.575, None: 0.48}[title_position]
