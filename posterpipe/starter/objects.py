"""Vector drawings of the object kinds and of the small scattered things.

What belongs here: outlines in unit coordinates, the ink roles of their parts, and how roles become
colours. What does not: where a drawing stands, how large it is, or anything else of a scene
(`world`), and putting ink on pixels (`render`).

Outlines are written as paths in a small subset of SVG's (absolute M, L, C, Q and Z) in hundredths;
x points right and y down. Curves are flattened once, on import, so that drawing is only an affine
map of points. Every drawing is centred on its bounding box, and scaled so that wide and tall ones
look equally large at the same size.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

Colour = tuple[int, int, int]
"""sRGB, 0 to 255 each."""

CREAM: Colour = (249, 238, 214)
DARK: Colour = (34, 31, 40)

_CURVE_STEPS = 16
"""Chords a Bezier segment is flattened to; more cannot be seen even at 1000 px wide."""


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Blend two colours; `share` in 0..1 is how much of `b`."""
    return (
        round(a[0] + (b[0] - a[0]) * share),
        round(a[1] + (b[1] - a[1]) * share),
        round(a[2] + (b[2] - a[2]) * share),
    )


@cache
def lab(colour: Colour) -> tuple[float, float, float]:
    """CIE L*a*b* (D65) of an sRGB colour; L* is 0 (black) to 100 (white)."""
    rgb = np.array(colour) / 255.0
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = to_xyz @ linear / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return (
        float(116 * f[1] - 16),
        float(500 * (f[0] - f[1])),
        float(200 * (f[1] - f[2])),
    )


@cache
def difference(a: Colour, b: Colour) -> float:
    """Colour difference (CIE76 delta E): 0 is equal, about 100 is black against white."""
    return math.dist(lab(a), lab(b))


# --- outlines ----------------------------------------------------------------------------------


def path(text: str) -> np.ndarray:
    """Flatten an SVG-like path (absolute M, L, C, Q, Z) into an array of points, shape (n, 2)."""
    points: list[tuple[float, float]] = []
    for command, body in re.findall(r"([MLCQZ])([^MLCQZ]*)", text):
        numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", body)]
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        if command in "ML":
            points += pairs
            continue
        width = {"C": 3, "Q": 2, "Z": 1}[command]
        for i in range(0, len(pairs), width):
            knots = [points[-1], *pairs[i : i + width]]
            for step in range(1, _CURVE_STEPS + 1):
                points.append(_bezier(knots, step / _CURVE_STEPS))
    return np.array(points)


def _bezier(knots: list[tuple[float, float]], t: float) -> tuple[float, float]:
    """A point of a Bezier curve at t in 0..1, by de Casteljau's construction."""
    while len(knots) > 1:
        knots = [(a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t) for a, b in pairwise(knots)]
    return knots[0]


def ellipse(x: float, y: float, rx: float, ry: float | None = None, steps: int = 28) -> np.ndarray:
    """An ellipse (or, without `ry`, a circle) around (x, y) as a polygon."""
    angle = np.arange(steps) * (2 * np.pi / steps)
    return np.stack([x + rx * np.cos(angle), y + (ry or rx) * np.sin(angle)], axis=1)


def box(x0: float, y0: float, x1: float, y1: float, radius: float = 0.0) -> np.ndarray:
    """A rectangle, its corners rounded by `radius`."""
    if radius <= 0:
        return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    corners = [(x1, y1, 0), (x0, y1, 1), (x0, y0, 2), (x1, y0, 3)]
    points = []
    for x, y, quarter in corners:
        cx = x - radius if x == x1 else x + radius
        cy = y - radius if y == y1 else y + radius
        for step in range(7):
            angle = (quarter + step / 6) * math.pi / 2
            points.append((cx + radius * math.cos(angle), cy + radius * math.sin(angle)))
    return np.array(points)


def bar(x0: float, y0: float, x1: float, y1: float, width: float) -> np.ndarray:
    """A straight stroke from (x0, y0) to (x1, y1), `width` thick."""
    length = math.hypot(x1 - x0, y1 - y0)
    nx, ny = (y0 - y1) / length * width / 2, (x1 - x0) / length * width / 2
    return np.array(
        [(x0 + nx, y0 + ny), (x1 + nx, y1 + ny), (x1 - nx, y1 - ny), (x0 - nx, y0 - ny)]
    )


def mirror(points: np.ndarray) -> np.ndarray:
    """The outline mirrored left to right."""
    return points * (-1.0, 1.0)


def turn(points: np.ndarray, degrees: float) -> np.ndarray:
    """The outline turned clockwise (as seen, y down) about the origin."""
    a = math.radians(degrees)
    return points @ np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])


# --- drawings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """A kind's shapes, back to front, around their bounding box's centre.

    `points` holds all outlines one after the other (float32, shape (n, 2)); outline i spans
    `bounds[i]:bounds[i + 1]` and is filled with the ink of `roles[i]`. The half extents are in
    units of the drawing's size.
    """

    roles: tuple[str, ...]
    points: np.ndarray
    bounds: tuple[int, ...]
    half_width: float
    half_height: float


Part = tuple[str, np.ndarray]


def _drawing(parts: Iterable[Part], area: float = 0.86) -> Drawing:
    """Centre and scale parts: the box's geometric mean side is `area`, its sides are bounded."""
    parts = list(parts)
    points = np.concatenate([outline for _, outline in parts])
    low, high = points.min(axis=0), points.max(axis=0)
    width, height = high - low
    scale = min(area / math.sqrt(width * height), 1.08 / width, 1.24 / height)
    ends = np.cumsum([0, *(len(outline) for _, outline in parts)])
    return Drawing(
        roles=tuple(role for role, _ in parts),
        points=((points - (low + high) / 2) * scale).astype(np.float32),
        bounds=tuple(int(end) for end in ends),
        half_width=float(width * scale / 2),
        half_height=float(height * scale / 2),
    )


def _both(role: str, outline: np.ndarray) -> list[Part]:
    """A part and its mirror image."""
    return [(role, outline), (role, mirror(outline))]


def _rocket() -> list[Part]:
    return [
        ("flame", path("M -15 28 C -22 46 -6 56 0 70 C 6 56 22 46 15 28 Z")),
        ("spark", path("M -8 28 C -11 40 -3 46 0 54 C 3 46 11 40 8 28 Z")),
        *_both("shade", path("M -18 -4 C -40 6 -46 28 -43 50 C -36 38 -28 33 -12 31 Z")),
        ("body", path("M 0 -66 C 25 -46 31 -14 18 34 L -18 34 C -31 -14 -25 -46 0 -66 Z")),
        (
            "cap",
            path("M 0 -66 C 9 -59 16 -50 20 -41 C 8 -36 -8 -36 -20 -41 C -16 -50 -9 -59 0 -66 Z"),
        ),
        ("light", ellipse(0, -13, 14)),
        ("glass", ellipse(0, -13, 9.5)),
        ("shade", box(-3.5, 8, 3.5, 44, 3)),
    ]


def _sailboat() -> list[Part]:
    return [
        ("trim", box(-2.5, -66, 2.5, 32)),
        ("body", path("M 6 -60 C 32 -36 46 -6 48 20 L 6 20 Z")),
        ("shade", path("M 6 -8 C 20 -6 32 -4 45 4 C 47 9 48 15 48 20 L 6 20 Z")),
        ("tint", path("M -6 -50 C -14 -22 -28 2 -44 20 L -6 20 Z")),
        ("trim", path("M -56 28 L 58 28 C 52 44 44 53 34 56 L -30 56 C -42 54 -51 44 -56 28 Z")),
        ("light", path("M -55 31 L 57 31 L 54 38 L -52 38 Z")),
    ]


def _whale() -> list[Part]:
    drop = path(
        "M -22 -36 C -24 -46 -28 -50 -36 -52 C -44 -54 -47 -46 -41 -41 C -38 -50 -30 -46 -27 -35 Z"
    )
    return [
        ("spray", drop),
        ("spray", mirror(drop) - np.array((49.0, 0.0))),
        (
            "body",
            path(
                "M -58 8 C -58 -18 -38 -34 -12 -34 C 18 -34 26 -2 38 -6 C 42 -8 42 -14 41 -20"
                " C 30 -21 22 -28 21 -42 C 32 -43 41 -39 45 -31 C 48 -41 57 -47 69 -45"
                " C 69 -32 62 -23 53 -20 C 60 12 36 38 -8 38 C -40 38 -58 28 -58 8 Z"
            ),
        ),
        (
            "cap",
            path("M -58 9 C -40 22 -8 16 14 35.5 C 7 37.5 0 38 -8 38 C -40 38 -57.5 28 -58 9 Z"),
        ),
        ("shade", path("M -12 12 C -8 24 0 34 12 36 C 16 26 10 14 2 8 Z")),
        ("dark", ellipse(-36, -2, 4.2)),
    ]


def _battlement(x0: float, x1: float, top: float, bottom: float, teeth: int) -> np.ndarray:
    """A wall from `top` to `bottom` whose upper edge has `teeth` merlons."""
    notch = 8.0
    step = (x1 - x0) / (2 * teeth - 1)
    edge = []
    for i in range(2 * teeth - 1):
        y = top if i % 2 == 0 else top + notch
        edge += [(x0 + i * step, y), (x0 + (i + 1) * step, y)]
    return np.array([*edge, (x1, bottom), (x0, bottom)])


def _castle() -> list[Part]:
    return [
        ("trim", box(-1.5, -74, 1.5, -44)),
        ("flag", path("M 1.5 -74 L 26 -66 L 1.5 -57 Z")),
        ("shade", _battlement(-17, 17, -48, 20, 3)),
        ("body", _battlement(-36, 36, -12, 52, 5)),
        *_both("body", _battlement(-58, -30, -34, 52, 3)),
        *_both("shade", box(-30, -4, -27, 52)),
        *_both("dark", box(-47.5, -14, -40.5, 4, 3.5)),
        ("dark", box(-4.5, -34, 4.5, -18, 4)),
        ("dark", path("M -13 52 L -13 26 C -13 8 13 8 13 26 L 13 52 Z")),
    ]


def _tree() -> list[Part]:
    return [
        ("wood", box(-7, 40, 7, 68)),
        ("body", path("M 0 -12 L 47 46 C 24 53 -24 53 -47 46 Z")),
        ("shade", path("M 0 -6 L 34 14 C 30 26 -30 26 -34 14 Z")),
        ("body", path("M 0 -40 L 38 13 C 18 19 -18 19 -38 13 Z")),
        ("shade", path("M 0 -30 L 26 -18 C 22 -6 -22 -6 -26 -18 Z")),
        ("body", path("M 0 -70 L 29 -19 C 14 -13 -14 -13 -29 -19 Z")),
    ]


def _balloon() -> list[Part]:
    envelope = (
        "M 0 -66 C 34 -66 50 -44 48 -22 C 46 0 26 16 14 34"
        " L -14 34 C -26 16 -46 0 -48 -22 C -50 -44 -34 -66 0 -66 Z"
    )
    gore = (
        "M 0 -66 C 9 -62 16 -42 15 -22 C 14 0 8 16 5 34"
        " L -5 34 C -8 16 -14 0 -15 -22 C -16 -42 -9 -62 0 -66 Z"
    )
    side = (
        "M 0 -66 C 26 -62 34 -42 32 -22 C 30 0 18 16 10 34"
        " L 14 34 C 26 16 46 0 48 -22 C 50 -44 34 -66 0 -66 Z"
    )
    return [
        *_both("trim", bar(-13, 34, -10, 52, 2.4)),
        ("body", path(envelope)),
        ("light", path(gore)),
        *_both("shade", path(side)),
        ("wood", path("M -13 50 L 13 50 L 11 70 L -11 70 Z")),
        ("trim", box(-14, 48, 14, 53, 2)),
    ]


def _umbrella() -> list[Part]:
    dome = (
        "M 0 -52 C 36 -52 60 -26 62 4 C 56 -6 46 -6 41 4 C 34 -7 20 -7 14 4"
        " C 8 -7 -8 -7 -14 4 C -20 -7 -34 -7 -41 4 C -46 -6 -56 -6 -62 4 C -60 -26 -36 -52 0 -52 Z"
    )
    panel = "M 0 -52 C 22 -46 38 -22 41 4 C 34 -7 20 -7 14 4 C 13 -22 8 -44 0 -52 Z"
    handle = (
        "M -3 -10 L 3 -10 L 3 46 C 3 64 -25 64 -25 46 C -25 41 -18 41 -18 46 C -18 55 -3 55 -3 46 Z"
    )
    return [
        ("trim", path(handle)),
        ("trim", box(-2, -60, 2, -48, 2)),
        ("body", path(dome)),
        *_both("shade", path(panel)),
    ]


def _mushroom() -> list[Part]:
    cap = "M -58 6 C -60 -36 -30 -56 0 -56 C 30 -56 60 -36 58 6 C 58 14 -58 14 -58 6 Z"
    return [
        ("pale", path("M -17 4 C -15 24 -20 38 -26 50 C -20 60 20 60 26 50 C 20 38 15 24 17 4 Z")),
        ("bark", path("M -17 8 C -8 20 8 20 17 8 L 17 4 L -17 4 Z")),
        ("body", path(cap)),
        ("light", ellipse(-4, -32, 13, 11)),
        ("light", ellipse(-34, -12, 9, 9)),
        ("light", ellipse(30, -18, 11, 10)),
        ("light", ellipse(4, -4, 7, 5)),
    ]


def _robot() -> list[Part]:
    return [
        ("trim", box(-2, -70, 2, -52)),
        ("flag", ellipse(0, -70, 6)),
        *_both("trim", box(-37, -36, -29, -20, 2)),
        *_both("shade", box(-50, -6, -36, 34, 6)),
        *_both("trim", box(-49, 28, -37, 40, 6)),
        *_both("shade", box(-25, 38, -8, 64, 2)),
        *_both("trim", box(-30, 58, -6, 70, 5)),
        ("trim", box(-9, -16, 9, -4)),
        ("body", box(-33, -56, 33, -10, 8)),
        ("body", box(-38, -6, 38, 44, 7)),
        *_both("light", ellipse(-15, -36, 9.5)),
        *_both("dark", ellipse(-15, -36, 4.5)),
        ("dark", box(-15, -22, 15, -17, 2)),
        ("light", box(-22, 6, 22, 28, 3)),
        ("flag", ellipse(-11, 17, 5)),
        ("dark", ellipse(8, 17, 5)),
    ]


def _cat() -> list[Part]:
    tail = (
        "M 14 60 C 46 66 62 46 54 24 C 50 12 58 4 62 -4 C 56 -12 42 -4 41 12 C 40 28 46 44 22 46 Z"
    )
    head = (
        "M -33 -62 C -24 -58 -16 -51 -11 -46 C -4 -48 4 -48 11 -46 C 16 -51 24 -58 33 -62"
        " C 38 -46 38 -32 33 -22 C 26 -8 -26 -8 -33 -22 C -38 -32 -38 -46 -33 -62 Z"
    )
    return [
        ("shade", path(tail)),
        (
            "body",
            path("M -18 -18 C -34 6 -38 34 -33 56 C -32 64 32 64 33 56 C 38 34 34 6 18 -18 Z"),
        ),
        ("light", path("M -9 -10 C -15 4 -14 20 0 28 C 14 20 15 4 9 -10 Z")),
        ("body", path(head)),
        *_both(
            "shade",
            path("M -29 -54 C -24 -51 -20 -48 -17 -44 L -28 -37 C -31 -43 -31 -48 -29 -54 Z"),
        ),
        *_both("light", ellipse(-14, -31, 6.6, 7.2)),
        *_both("dark", ellipse(-13.5, -31, 3.2, 6)),
        ("dark", path("M -5 -21 L 5 -21 L 0 -15 Z")),
        ("shade", box(-1.4, 36, 1.4, 61)),
    ]


def _car() -> list[Part]:
    body = (
        "M -62 14 C -63 2 -56 -3 -42 -6 C -36 -26 -22 -34 0 -34 C 22 -34 34 -22 40 -6"
        " C 54 -4 62 2 62 14 C 62 19 59 21 55 21 L -55 21 C -60 21 -62 19 -62 14 Z"
    )
    return [
        ("trim", box(-66, 11, 66, 20, 4)),
        ("body", path(body)),
        ("glass", path("M -33 -7 C -29 -21 -20 -26 -4 -26 L -4 -7 Z")),
        ("glass", path("M 3 -7 L 3 -26 C 19 -26 26 -19 31 -7 Z")),
        ("shade", box(-58, 4, 60, 8)),
        ("light", ellipse(-55, 5, 5)),
        ("trim", ellipse(-34, 20, 17)),
        ("trim", ellipse(35, 20, 17)),
        ("light", ellipse(-34, 20, 7.5)),
        ("light", ellipse(35, 20, 7.5)),
    ]


def _guitar() -> list[Part]:
    body = (
        "M 0 -8 C 16 -10 26 0 25 12 C 24 21 24 24 30 32 C 42 48 32 72 0 72"
        " C -32 72 -42 48 -30 32 C -24 24 -24 21 -25 12 C -26 0 -16 -10 0 -8 Z"
    )
    parts: list[Part] = [
        ("wood", box(-5, -66, 5, 24)),
        ("trim", path("M -7 -62 L -10 -88 L 10 -88 L 7 -62 Z")),
        *_both("trim", box(-15, -84, -9, -79, 2)),
        *_both("trim", box(-14.5, -73, -8, -68, 2)),
        ("body", path(body)),
        (
            "shade",
            path(
                "M 25 12 C 24 21 24 24 30 32 C 42 48 32 72 0 72"
                " C 24 66 32 48 22 34 C 16 25 18 18 25 12 Z"
            ),
        ),
        ("wood", box(-5, -20, 5, 16)),
        ("light", ellipse(0, 22, 13.5)),
        ("dark", ellipse(0, 22, 10)),
        ("trim", box(-14, 49, 14, 56, 2)),
    ]
    return [(role, turn(outline, 24)) for role, outline in parts]


DRAWINGS: dict[str, Drawing] = {
    "rocket": _drawing(_rocket()),
    "sailboat": _drawing(_sailboat(), 0.96),
    "whale": _drawing(_whale(), 0.9),
    "castle": _drawing(_castle()),
    "tree": _drawing(_tree()),
    "balloon": _drawing(_balloon()),
    "umbrella": _drawing(_umbrella(), 0.92),
    "mushroom": _drawing(_mushroom(), 0.88),
    "robot": _drawing(_robot()),
    "cat": _drawing(_cat()),
    "car": _drawing(_car(), 0.95),
    "guitar": _drawing(_guitar(), 0.98),
}


def _star() -> np.ndarray:
    angle = np.arange(10) * math.pi / 5 - math.pi / 2
    radius = np.where(np.arange(10) % 2 == 0, 50.0, 21.0)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


SMALL_DRAWINGS: dict[str, Drawing] = {
    "star": _drawing([("body", _star())], 0.95),
    "cloud": _drawing(
        [
            (
                "body",
                path(
                    "M -46 20 C -62 20 -62 -4 -44 -4 C -42 -24 -14 -28 -6 -14"
                    " C 6 -30 32 -24 32 -6 C 58 -8 62 20 44 20 Z"
                ),
            )
        ]
    ),
    "dot": _drawing([("body", ellipse(0, 0, 50, steps=20))], 0.6),
    "moon": _drawing([("body", path("M 14 -46 C -70 -46 -70 46 14 46 C -26 34 -26 -34 14 -46 Z"))]),
    "heart": _drawing([("body", path("M 0 44 C -70 -6 -40 -56 0 -24 C 40 -56 70 -6 0 44 Z"))], 0.9),
    "bird": _drawing(
        [
            (
                "body",
                path(
                    "M -50 -20 C -30 -34 -8 -20 0 4 C 8 -20 30 -34 50 -20"
                    " C 28 -20 14 -4 0 20 C -14 -4 -28 -20 -50 -20 Z"
                ),
            )
        ],
        0.8,
    ),
}

# --- inks --------------------------------------------------------------------------------------

_WOOD: Colour = (140, 88, 56)
_TAN: Colour = (222, 184, 136)
_GLASS: Colour = (188, 224, 236)
_GREY: Colour = (142, 138, 146)
_ORANGE: Colour = (242, 134, 40)
_YELLOW: Colour = (250, 206, 70)
_RED: Colour = (214, 54, 44)


def _apart(candidates: Iterable[Colour], others: Iterable[Colour]) -> Colour:
    """The first candidate clearly different from all others, else the most different one."""
    candidates, others = list(candidates), list(others)
    gaps = [min(difference(c, other) for other in others) for c in candidates]
    for candidate, gap in zip(candidates, gaps, strict=True):
        if gap >= 32:
            return candidate
    return candidates[int(np.argmax(gaps))]


@cache
def inks(body: Colour, backdrops: tuple[Colour, ...]) -> dict[str, Colour]:
    """Colours of the ink roles for a body colour in front of the given backdrop colours.

    `body`, `shade` and `tint` are the object's own colour; `light`, `dark` and `glass` lie inside
    the silhouette, so they are chosen against the body; `trim`, `cap`, `pale`, `wood`, `flame`,
    `spray` and `flag` touch the backdrop, so they are chosen against it too.
    """
    lightness = lab(body)[0]
    around = (body, *backdrops)
    light = CREAM if lightness < 88 else (206, 160, 104)
    shade = mix(body, (255, 255, 255), 0.2) if lightness < 25 else mix(body, (30, 16, 40), 0.26)
    flame = _apart((_ORANGE, _YELLOW, _RED, CREAM), around)
    return {
        "body": body,
        "shade": shade,
        "tint": mix(body, (255, 255, 255), 0.24) if lightness < 80 else mix(body, _WOOD, 0.22),
        "light": light,
        "glass": _GLASS if difference(body, _GLASS) > 36 else (72, 112, 150),
        "dark": DARK if lightness > 25 else (112, 108, 118),
        "trim": _apart((DARK, _GREY, CREAM), around),
        "cap": light if min(difference(light, b) for b in backdrops) >= 30 else shade,
        "pale": _apart((CREAM, _TAN, (255, 255, 255), _WOOD), around),
        "bark": _TAN if _apart((CREAM, _TAN), around) == CREAM else mix(_TAN, _WOOD, 0.6),
        "wood": _apart((_WOOD, (92, 56, 40), _TAN), around),
        "flame": flame,
        "spark": CREAM if flame == _YELLOW else _YELLOW,
        "spray": _apart((_GLASS, (255, 255, 255), (96, 150, 196)), around),
        "flag": _apart((_YELLOW, _RED, CREAM, _ORANGE), around),
    }
