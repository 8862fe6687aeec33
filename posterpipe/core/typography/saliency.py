"""What is on an image: its ground, its main object, and marks that the model meant as lettering.

What belongs here: `look` and the `Scene` that it sees. What does not: what follows from it for the
title (`layout`, `ground`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from posterpipe.core.typography.colour import CREAM, Colour, srgb_to_lab


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
