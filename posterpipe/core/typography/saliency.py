"""What is on an image: its ground, its main object, and marks that the model meant as lettering.

What belongs here: `look` and the `Scene` that it sees. What does not: what follows from it for the
title (`layout`, `ground`).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from posterpipe.core.typography.colour import CREAM, Colour, srgb_to_lab

_SOLID = 0.5
"""Share of a clear difference from the ground from which a place belongs to a shape; rays and
gradients stay below."""

_FILLS = 0.5
"""Share of the image above which what is in the middle is no object on a ground, but a scene."""


@dataclass(frozen=True)
class Scene:
    """What is on an image, on a grid of at most 96 columns."""

    ground: np.ndarray
    """float32 (rows, 3): sRGB of the ground behind everything, by row."""
    object_: np.ndarray
    """float32 (rows, columns): the main object's share in each place; adds up to 1."""
    shape: np.ndarray
    """float32 (rows, columns): 1 where the main object is, to be left as it is, else 0."""
    marks: np.ndarray
    """float32 (rows, columns): what else stands out, 0 to 1 in each place: lettering that the model
    meant, and crumbs."""
    accent: Colour
    """The colour that the object has most of."""


def look(image: Image.Image) -> Scene:
    """What is the ground, where the main object is, and what else stands out.

    A poster's ground runs past its object on both sides: its colour by row is the median near both
    edges. What differs from it stands out (saliency as colour contrast with the borders, after Zhu
    et al. 2014). Of the shapes that stand out, the one with most of the middle is the object, with
    what lies within its bounds. Where that would be half the image there is no shape to be told
    apart, and what is nearer the middle counts more.
    """
    columns = min(96, image.width)
    rows = max(8, round(image.height * columns / image.width))
    small = image.convert("RGB").resize((columns, rows), Image.Resampling.BOX)
    rgb = np.asarray(small, dtype=np.float32)
    # Inside of a frame line, where there is one.
    strip, inner = max(1, columns // 16), max(2, columns * 5 // 32)
    left, right = rgb[:, strip:inner], rgb[:, columns - inner : columns - strip]
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
    shape = _main_shape(apart, central)
    weight = apart * shape if shape.mean() <= _FILLS else apart * central
    total = float(weight.sum())
    object_ = weight / total if total > 0 else weight
    marks = apart * (1 - shape) if shape.mean() <= _FILLS else apart * (1 - central)
    return Scene(
        ground, object_.astype(np.float32), shape, marks.astype(np.float32), _accent(rgb, weight)
    )


def _main_shape(apart: np.ndarray, central: np.ndarray) -> np.ndarray:
    """float32 (rows, columns): 1 on the shape that has most of the middle, and a cell around it."""
    labels = components(apart >= _SOLID)
    mass = np.bincount(labels.ravel(), weights=(apart * central).ravel())
    mass[0] = 0  # the ground
    if mass.sum() <= 0:
        return np.zeros(apart.shape, np.float32)
    main = labels == int(mass.argmax())
    ys, xs = np.nonzero(main)
    # Flags, spouts and wheels apart from it: shapes whose middle is within its bounds, and those
    # within a few cells of it, such as a hull below a pale stripe. Lettering stands further off.
    size = np.maximum(np.bincount(labels.ravel(), minlength=len(mass)), 1)
    y, x = np.mgrid[0 : apart.shape[0], 0 : apart.shape[1]]
    middle_y = np.bincount(labels.ravel(), weights=y.ravel(), minlength=len(mass)) / size
    middle_x = np.bincount(labels.ravel(), weights=x.ravel(), minlength=len(mass)) / size
    reach = 0.02 * apart.shape[1]
    belongs = (
        (middle_y >= ys.min() - reach) & (middle_y <= ys.max() + reach)
        & (middle_x >= xs.min() - reach) & (middle_x <= xs.max() + reach)
    )  # fmt: skip
    near = main
    for _ in range(4):
        near = grown(near)
    belongs[np.unique(labels[near])] = True
    belongs[0] = False
    return grown(belongs[labels]).astype(np.float32)


def components(solid: np.ndarray) -> np.ndarray:
    """int32 (rows, columns): the connected shapes of a bool grid, numbered from 1; 0 is none.

    Neighbours are the four sides and the four corners.
    """
    return cv2.connectedComponents(solid.astype(np.uint8), connectivity=8)[1]


def grown(cells: np.ndarray) -> np.ndarray:
    """A bool grid and the cells next to it."""
    return cv2.dilate(cells.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)


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
