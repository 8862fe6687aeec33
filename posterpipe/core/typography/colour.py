"""Colours as eyes and WCAG see them.

What belongs here: Lab, luminance, contrast, and the colours that lettering falls back on. What does
not: which colour a title gets (`ground`).
"""

from __future__ import annotations

import numpy as np

Colour = tuple[int, int, int]

CREAM: Colour = (250, 244, 228)
INK: Colour = (14, 12, 18)


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


def mixed(one: np.ndarray | Colour, other: np.ndarray | Colour, share: float) -> Colour:
    """A colour between two of sRGB, 0 to 255: `one` at a share of 0, `other` at 1."""
    first, second = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    r, g, b = (round(float(v)) for v in first + (second - first) * share)
    return (r, g, b)
