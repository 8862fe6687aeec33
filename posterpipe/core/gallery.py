"""Pictures for people to look at: contact sheets, grids, thumbnails.

What belongs here: arranging images with labels, and the small inline images that Dagster's pages
show. What does not: training images (`images`) and plots of numbers (`defs`).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

Picture = Path | Image.Image

BACKGROUND = (246, 245, 242)
INK = (38, 38, 42)
FAINT = (222, 220, 214)
GAP = 10
"""Pixels between cells."""
LABEL_SIZE = 12
TITLE_SIZE = 20
MISSING = "missing"
_SUBTITLE_LINES = 2


def contact_sheet(
    images: Sequence[tuple[Picture, str]],
    *,
    columns: int = 8,
    cell: tuple[int, int] = (120, 180),
    labels: bool = True,
    title: str | None = None,
) -> Image.Image:
    """Images with their labels in rows of `columns`.

    `cell`: width and height in pixels into which each image is fitted, aspect kept. A file that
    cannot be read shows as missing. With no images, a sheet that says so.
    """
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    label_height = _line_height(LABEL_SIZE) if labels else 0
    title_height = _title_height(title)
    step = (cell[0] + GAP, cell[1] + label_height + GAP)
    sheet = _canvas(columns * step[0] + GAP, title_height + max(rows, 1) * step[1] + GAP)
    draw = ImageDraw.Draw(sheet)
    if title:
        _write(draw, (GAP, GAP), title, TITLE_SIZE, sheet.width - 2 * GAP)
    if not images:
        _write(draw, (GAP, title_height + GAP), "no images", LABEL_SIZE, sheet.width - 2 * GAP)
    for index, (picture, label) in enumerate(images):
        left = GAP + index % columns * step[0]
        top = GAP + title_height + index // columns * step[1]
        _place(sheet, picture, (left, top), cell)
        if labels:
            _write(draw, (left, top + cell[1] + 2), label, LABEL_SIZE, cell[0])
    return sheet


def grid(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[str, str], Picture],
    *,
    cell: tuple[int, int] = (128, 192),
    heading_width: int = 220,
    title: str | None = None,
    subtitle: str = "",
    notes: Mapping[tuple[str, str], str] | None = None,
    blocks: int = 1,
) -> Image.Image:
    """Images by row and column, such as prompts by variants, with headings.

    `cells`: by (row, column); one that is not there, or cannot be read, shows as missing. `cell`:
    width and height in pixels; `heading_width`: pixels for the rows' headings, which wrap, as does
    the `subtitle`. `notes`: a line below some cells. `blocks`: the rows are dealt to so many blocks
    beside each other, so that many rows still make a picture that fits a screen.
    """
    title_height = _title_height(title)
    if subtitle:
        title_height += _SUBTITLE_LINES * _line_height(LABEL_SIZE + 2) + GAP
    head = _line_height(LABEL_SIZE + 2) + GAP
    note_height = _line_height(LABEL_SIZE) if notes else 0
    step = (cell[0] + GAP, cell[1] + note_height + GAP)
    blocks = max(1, min(blocks, len(rows)))
    deep = -(-len(rows) // blocks)
    block_width = GAP + heading_width + GAP + len(columns) * step[0]
    apart = (blocks - 1) * 2 * GAP
    sheet = _canvas(blocks * block_width + apart, title_height + head + deep * step[1] + GAP)
    draw = ImageDraw.Draw(sheet)
    if title:
        _write(draw, (GAP, GAP), title, TITLE_SIZE, sheet.width - 2 * GAP)
    if subtitle:
        place, width = (GAP, _title_height(title) + GAP // 2), sheet.width - 2 * GAP
        _write(draw, place, subtitle, LABEL_SIZE + 2, width, lines=_SUBTITLE_LINES)
    for block in range(blocks):
        left = block * (block_width + 2 * GAP)
        start = left + GAP + heading_width + GAP
        for index, column in enumerate(columns):
            place = (start + index * step[0], title_height + GAP)
            _write(draw, place, column, LABEL_SIZE + 2, cell[0])
        for number, row in enumerate(rows[block * deep : (block + 1) * deep]):
            top = title_height + head + number * step[1]
            heading = (left + GAP, top)
            _write(draw, heading, row, LABEL_SIZE + 2, heading_width, lines=cell[1] // 18)
            for index, column in enumerate(columns):
                place = (start + index * step[0], top)
                _place(sheet, cells.get((row, column)), place, cell)
                note = (notes or {}).get((row, column), "")
                if note:
                    _write(draw, (place[0], top + cell[1] + 2), note, LABEL_SIZE, cell[0])
    return sheet


def data_uri(image: Picture, *, max_bytes: int = 60_000) -> str:
    """An image as a `data:` address of at most `max_bytes` characters, made smaller until it fits.

    Dagster keeps such addresses in its event log, so they must stay small.
    """
    picture = _read(image).convert("RGB")
    while True:
        buffer = io.BytesIO()
        picture.save(buffer, format="WEBP", quality=82, method=4)
        uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        if len(uri) <= max_bytes or max(picture.size) <= 16:
            return uri
        # Bytes grow about with the area.
        scale = min(0.9, (max_bytes / len(uri)) ** 0.5)
        size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)


def markdown_image(image: Picture, alt: str, *, max_bytes: int = 60_000) -> str:
    """Markdown that shows an image inline; `alt` is what it shows, in words."""
    safe = " ".join(alt.split()).translate({ord(mark): f"\\{mark}" for mark in "\\[]"})
    return f"![{safe}]({data_uri(image, max_bytes=max_bytes)})"


def _canvas(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), BACKGROUND)


def _read(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    with Image.open(picture) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def _place(
    sheet: Image.Image, picture: Picture | None, place: tuple[int, int], cell: tuple[int, int]
) -> None:
    try:
        thumbnail = None if picture is None else _read(picture).convert("RGB")
    except OSError:
        thumbnail = None
    if thumbnail is None:
        draw = ImageDraw.Draw(sheet)
        corner = (place[0] + cell[0] - 1, place[1] + cell[1] - 1)
        draw.rectangle((*place, *corner), outline=FAINT, width=2)
        draw.text(
            (place[0] + cell[0] / 2, place[1] + cell[1] / 2),
            MISSING,
            fill=INK,
            font=_font(LABEL_SIZE),
            anchor="mm",
        )
        return
    thumbnail = ImageOps.contain(thumbnail, cell, Image.Resampling.LANCZOS)
    left = place[0] + (cell[0] - thumbnail.width) // 2
    top = place[1] + (cell[1] - thumbnail.height) // 2
    sheet.paste(thumbnail, (left, top))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _line_height(size: int) -> int:
    return round(size * 1.5)


def _title_height(title: str | None) -> int:
    return _line_height(TITLE_SIZE) + GAP if title else 0


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    size: int,
    width: int,
    lines: int = 1,
) -> None:
    """Text within a width in pixels, on so many lines at most, cut with an ellipsis."""
    font = _font(size)
    words = text.split()
    for line in range(lines):
        taken = len(words)
        while taken > 1 and draw.textlength(" ".join(words[:taken]), font=font) > width:
            taken -= 1
        shown, words = " ".join(words[:taken]), words[taken:]
        if words and line == lines - 1:
            shown += " …"
        while len(shown) > 1 and draw.textlength(shown, font=font) > width:
            shown = shown.rstrip(" …")[:-1] + "…"
        draw.text((place[0], place[1] + line * _line_height(size)), shown, fill=INK, font=font)
        if not words:
            return
