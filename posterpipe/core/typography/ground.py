"""The letters' colour, and the ground below them where it must be helped.

What belongs here: choosing the ink, clearing marks away, the veil that carries the letters, and the
contrast that is promised. What does not: where the title goes (`layout`).
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageFilter

from posterpipe.core.typography.colour import (
    CREAM,
    INK,
    Colour,
    contrast_ratio,
    mixed,
    relative_luminance,
    srgb_to_lab,
)
from posterpipe.core.typography.saliency import Scene, components, grown


def least_contrast(canvas: Image.Image, around: np.ndarray, colour: Colour) -> float:
    """The least contrast of a colour with the ground around the letters."""
    return float(contrast_ratio(np.asarray(canvas)[around], colour).min())


def _strip(canvas: Image.Image, box: tuple[int, int, int, int], cap: float) -> slice:
    """The rows of an image that a title may touch."""
    reach = round(4 * cap)
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


def clear_ground(
    canvas: Image.Image,
    scene: Scene,
    box: tuple[int, int, int, int],
    around: np.ndarray,
    cap: float,
) -> tuple[Image.Image, bool]:
    """The image with bare ground below the title, where marks stand in its way.

    Lettering that the model meant goes as a whole, also what of it stands out beyond the title. The
    main object stays as it is but for a rim around the letters, and so does a frame line.
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
    alpha = _fade(canvas.size, rows, inner, 0.9 * cap)
    alpha = np.maximum(alpha, _on_canvas(_replaced(scene, box, canvas.size, cap), canvas)[rows])
    alpha *= 1 - _on_canvas(scene.shape, canvas)[rows]
    alpha *= _fade(canvas.size, rows, (left, top, right, bottom), 0.015 * canvas.width)
    # Right around the letters the ground has to be bare whatever is there.
    rim = Image.fromarray(near).convert("L").filter(ImageFilter.GaussianBlur(cap / 12))
    alpha = np.maximum(alpha, np.clip(np.asarray(rim, dtype=np.float32) / 128, 0, 1))
    return _with_rows(canvas, rows, shown + (ground - shown) * alpha[..., None]), True


def _on_canvas(cells: np.ndarray, canvas: Image.Image) -> np.ndarray:
    """float32 (height, width): a grid of 0 to 1 at the image's size, its edges smooth."""
    large = Image.fromarray(cells.astype(np.float32)).resize(canvas.size, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(large), 0, 1)


def _replaced(
    scene: Scene, box: tuple[int, int, int, int], size: tuple[int, int], cap: float
) -> np.ndarray:
    """bool (rows, columns): the marks that the title stands in for, most of which lie around it."""
    labels = components(scene.marks >= 0.15)
    rows, columns = labels.shape
    across, down = columns / size[0], rows / size[1]
    reach = 1.5 * cap
    near = np.zeros(labels.shape, bool)
    near[
        max(0, math.floor((box[1] - reach) * down)) : math.ceil((box[3] + reach) * down),
        max(0, math.floor((box[0] - reach) * across)) : math.ceil((box[2] + reach) * across),
    ] = True
    mass = np.bincount(labels.ravel(), weights=scene.marks.ravel())
    inside = np.bincount(labels.ravel(), weights=(scene.marks * near).ravel())
    chosen = inside > 0.5 * mass
    chosen[0] = False
    return grown(grown(chosen[labels]))


_DISTURBING = 20
"""Difference from the ground (CIE76) from which something behind letters disturbs them."""

_FRAME = 0.085
"""Share of the width from the edges where a frame line may run."""


def _inside_frame(size: tuple[int, int]) -> tuple[float, float, float, float]:
    edge = _FRAME * size[0]
    return (edge, edge, size[0] - edge, size[1] - edge)


def choose_ink(canvas: Image.Image, scene: Scene, around: np.ndarray, target: float) -> Colour:
    """The letters' colour: the object's where it can be read well, else pale or dark.

    Dark is the ground's own hue made deep, which belongs to the picture more than black does.
    """
    ground = np.asarray(canvas)[around]

    def usual(colour: Colour) -> float:
        return float(np.quantile(contrast_ratio(ground, colour), 0.25))

    if float(contrast_ratio(ground, scene.accent).min()) >= target:
        return scene.accent
    mean = ground.mean(axis=0)
    depths = [mixed(mean, INK, share) for share in (0.8, 0.88, 0.96)]
    deep = next((colour for colour in depths if usual(colour) >= target * 1.15), INK)
    return max((CREAM, deep), key=usual)


def veil_ground(
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
    if least_contrast(canvas, around, colour) >= target:
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
    found = [mixed(step, step, 0) for step in steps]
    enough = (c for c in found if float(contrast_ratio(c, colour)) >= target * 1.08)
    return next(enough, found[-1])
