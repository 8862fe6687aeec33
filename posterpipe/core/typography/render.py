"""A title set in type on an image.

What belongs here: `set_title`, from image and title to the titled image and its `Layout`. What does
not: the table of titled posters (`titled`).
"""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from posterpipe.core.typography.colour import Colour
from posterpipe.core.typography.fonts import (
    Lettering,
    TitleImpossible,
    choose_style,
    font_at,
    lettering,
    what_can_be_set,
)
from posterpipe.core.typography.ground import choose_ink, clear_ground, least_contrast, veil_ground
from posterpipe.core.typography.layout import Block, candidates
from posterpipe.core.typography.lines import ZERO_WIDTH_SPACE, measure, pen_places, pieces
from posterpipe.core.typography.saliency import look
from posterpipe.core.typography.signs import capitals
from posterpipe.settings import LetteringSettings


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
    left_out: str = ""
    """Pictographs of the title that no font has."""


def set_title(
    image: Image.Image, title: str, settings: LetteringSettings
) -> tuple[Image.Image, Layout]:
    """The image with its title set in type, RGB, and where it went.

    Images narrower than `settings.min_width` are enlarged by a whole factor first, since letters
    need pixels. The contrast of letters and ground is at least `settings.contrast` everywhere
    around the letters; the ground is touched only where it would be less, or where marks of the
    model stand in the way. Pictographs that no font has are left out of the title. Raises
    TitleImpossible.
    """
    title = " ".join(unicodedata.normalize("NFC", title).split())
    if not any(sign.isalnum() for sign in title):
        raise TitleImpossible(f"the title {title!r} has no letters; give one in the prompt suite")
    # Where lines may break does not decide how they look.
    style = choose_style(title.replace(ZERO_WIDTH_SPACE, ""), settings.style)
    title, left_out = what_can_be_set(title, style)
    letters = lettering(title, style)
    if letters.capitals:
        title = capitals(title)
    canvas = enlarged(image.convert("RGB"), settings.min_width)
    scene = look(canvas)
    block = candidates(scene, title, letters, canvas.size)[0]
    mask, box = _letters(letters, block, canvas.size)
    around = _around(mask, block.cap)
    canvas, cleared = clear_ground(canvas, scene, box, around, block.cap)
    colour = choose_ink(canvas, scene, around, settings.contrast)
    canvas, veiled = veil_ground(canvas, box, around, colour, block.cap, settings.contrast)
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
        contrast=least_contrast(canvas, around, colour),
        scrim=cleared or veiled,
        left_out=left_out,
    )
    return titled, layout


def enlarged(image: Image.Image, min_width: int) -> Image.Image:
    """An image enlarged by the least whole factor that makes it `min_width` pixels wide."""
    factor = math.ceil(min_width / image.width)
    if factor <= 1:
        return image
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.BICUBIC)


def _letters(
    letters: Lettering, block: Block, size: tuple[int, int]
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The letters as a mask of the image's size, and the box of their ink."""
    font = font_at(letters.package, letters.path, block.size)
    measured = measure(letters, block.lines, block.size)
    pitch = measured.pitch(letters.leading)
    mask = Image.new("L", size, 0)
    draw = ImageDraw.Draw(mask)
    middle = size[0] / 2
    for index, line in enumerate(block.lines):
        start = middle - measured.widths[index] / 2 - measured.starts[index]
        baseline = block.box[1] + measured.above + index * pitch
        for piece, x in zip(pieces(letters, line), pen_places(letters, font, line), strict=True):
            draw.text((start + x, baseline), piece, fill=255, font=font, anchor="ls")
    ink = mask.getbbox()
    assert ink is not None, "a font that has the letters draws them"
    return mask, ink


def _around(mask: Image.Image, cap: float) -> np.ndarray:
    """bool (height, width): the letters and a rim of about a sixth of a capital around them."""
    blurred = mask.filter(ImageFilter.GaussianBlur(cap / 9))
    return np.asarray(blurred) > 10
