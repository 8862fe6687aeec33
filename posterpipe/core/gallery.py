"""Pictures for people to look at: contact sheets, grids, thumbnails.

What belongs here: arranging images with labels, and the small inline images that Dagster's pages
show. What does not: training images (`images`) and plots of numbers (`thesis`,
`dreambooth.reports`).
"""

from __future__ import annotations

import base64
import bisect
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, ImageOps

from posterpipe.core.images import open_image, upright
from posterpipe.core.parallel import parallel_map
from posterpipe.core.variants import BASE_VARIANTS, DELAYED_VARIANTS, TUNED_VARIANTS

if TYPE_CHECKING:
    import pandas as pd

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
_HEADING_LINES = 2
"""Of a column's name that is wider than the column."""
INLINE_BYTES = 60_000
"""Of an image in Dagster's event log."""
_QUALITIES = (82, 65)
"""Of inline images: a little less detail is better than fewer pixels."""


def contact_sheet(
    images: Sequence[tuple[Picture, str]],
    *,
    columns: int = 8,
    cell: tuple[int, int] = (120, 180),
    label_lines: int = 1,
) -> Image.Image:
    """Images with their labels in rows of `columns`.

    `cell`: width and height in pixels into which each image is fitted, aspect kept. `label_lines`:
    lines that a label wraps to at most. A file that cannot be read shows as missing. With no
    images, a sheet that says so.
    """
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    label_height = label_lines * _line_height(LABEL_SIZE)
    step = (cell[0] + GAP, cell[1] + label_height + GAP)
    sheet = _canvas(columns * step[0] + GAP, max(rows, 1) * step[1] + GAP)
    draw = ImageDraw.Draw(sheet)
    if not images:
        _write(draw, (GAP, GAP), "no images", LABEL_SIZE, sheet.width - 2 * GAP)
    thumbnails = parallel_map(lambda image: _thumbnail(image[0], cell), images)
    for index, ((_, label), thumbnail) in enumerate(zip(images, thumbnails, strict=True)):
        left = GAP + index % columns * step[0]
        top = GAP + index // columns * step[1]
        _place(sheet, thumbnail, (left, top), cell)
        _write(draw, (left, top + cell[1] + 2), label, LABEL_SIZE, cell[0], label_lines)
    return sheet


def without_shared_ends(texts: Sequence[str]) -> list[str]:
    """Texts with an ellipsis for the words that all of them begin or end with, which would leave no
    room in a small cell for what tells them apart. Texts that are all the same stay as they are."""
    if len(set(texts)) < 2:
        return list(texts)
    words = [text.split() for text in texts]
    start = _shared(words)
    words = [each[start:] for each in words]
    end = _shared([each[::-1] for each in words])
    before, after = ["…"] * bool(start), ["…"] * bool(end)
    return [" ".join([*before, *each[: len(each) - end], *after]) for each in words]


def _shared(texts: Sequence[Sequence[str]]) -> int:
    """How many words all of these begin with."""
    places = zip(*texts, strict=False)
    return sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, places))


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
    width and height in pixels; `heading_width`: pixels for the rows' headings, which wrap, as do
    the `subtitle` and the columns' headings (a name's underscores are shown as spaces). `notes`: a
    line below some cells. `blocks`: the rows are dealt to so many blocks beside each other, so that
    many rows still make a picture that fits a screen.
    """
    title_height = _title_height(title)
    if subtitle:
        title_height += _SUBTITLE_LINES * _line_height(LABEL_SIZE + 2) + GAP
    titles = [column.replace("_", " ") for column in columns]
    wide = any(_font(LABEL_SIZE + 2).getlength(text) > cell[0] for text in titles)
    head_lines = _HEADING_LINES if wide else 1
    head = head_lines * _line_height(LABEL_SIZE + 2) + GAP
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
        for index, text in enumerate(titles):
            place = (start + index * step[0], title_height + GAP)
            _write(draw, place, text, LABEL_SIZE + 2, cell[0], lines=head_lines)
        for number, row in enumerate(rows[block * deep : (block + 1) * deep]):
            top = title_height + head + number * step[1]
            heading = (left + GAP, top)
            _write(draw, heading, row, LABEL_SIZE + 2, heading_width, lines=cell[1] // 18)
            for index, column in enumerate(columns):
                place = (start + index * step[0], top)
                _place(sheet, _thumbnail(cells.get((row, column)), cell), place, cell)
                note = (notes or {}).get((row, column), "")
                if note:
                    _write(draw, (place[0], top + cell[1] + 2), note, LABEL_SIZE, cell[0])
    return sheet


def suite_sheet(suite: pd.DataFrame, generations: pd.DataFrame, store_root: Path) -> Image.Image:
    """The suite in one picture: a row a prompt, a column a variant, always the prompt's first seed.

    `suite`: the table `prompt_suite`; `generations` (`generations.COLUMNS`): of all models; their
    images lie below `store_root`. One that was not drawn shows as missing.
    """
    seeds = _first_seeds(suite)
    prompts = dict(zip(suite["prompt_id"], suite["prompt"], strict=True))
    headings = {name: f"{prompts[name]} · seed {seeds[name]}" for name in prompts}
    drawn = set(generations["variant"])
    late_on_base, late_on_tuned = ([name] if name in drawn else [] for name in DELAYED_VARIANTS)
    shown = of_first_seed(suite, generations)
    places = zip(shown["prompt_id"], shown["variant"], shown["image_path"], strict=True)
    return grid(
        list(headings.values()),
        [*BASE_VARIANTS, *late_on_base, *TUNED_VARIANTS, *late_on_tuned],
        {(headings[name], variant): store_root / path for name, variant, path in places if path},
        cell=(108, 162),
        heading_width=200,
        title="First seed of each prompt; the same noise in every column",
        blocks=3,
    )


def of_first_seed(suite: pd.DataFrame, generations: pd.DataFrame) -> pd.DataFrame:
    """The generations that `suite_sheet` shows."""
    return generations[generations["seed"] == generations["prompt_id"].map(_first_seeds(suite))]


def _first_seeds(suite: pd.DataFrame) -> dict[str, int]:
    return {
        str(name): int(json.loads(seeds)[0])
        for name, seeds in zip(suite["prompt_id"], suite["seeds"], strict=True)
    }


def data_uri(image: Picture) -> str:
    """An image as a `data:` address of at most INLINE_BYTES characters: coarser and smaller until
    it fits.

    Dagster keeps such addresses in its event log, so they must stay small.
    """
    picture = _read(image).convert("RGB")
    while True:
        for quality in _QUALITIES:
            buffer = io.BytesIO()
            # Above 2 it takes twice as long for 3 % fewer bytes.
            picture.save(buffer, format="WEBP", quality=quality, method=2)
            uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
            if len(uri) <= INLINE_BYTES or max(picture.size) <= 16:
                return uri
        # Bytes grow about with the area.
        scale = min(0.9, (INLINE_BYTES / len(uri)) ** 0.5)
        size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)


def markdown_image(image: Picture, alt: str) -> str:
    """Markdown that shows an image inline; `alt` is what it shows, in words."""
    safe = " ".join(alt.split()).translate({ord(mark): f"\\{mark}" for mark in "\\[]"})
    return f"![{safe}]({data_uri(image)})"


def _canvas(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), BACKGROUND)


def _read(picture: Picture, enough: tuple[int, int] | None = None) -> Image.Image:
    """A picture, upright. `enough`: width and height that it need not exceed by much: JPEGs are
    then decoded at a fraction of their size, in a fraction of the time."""
    if isinstance(picture, Image.Image):
        return picture
    image = open_image(picture.read_bytes(), max_pixels=sys.maxsize)  # it was let in before
    if enough:
        # Twice as much, so that shrinking the rest is smooth; square, as it may be turned.
        image.draft(None, (2 * max(enough), 2 * max(enough)))
    image.load()
    return upright(image)


def _thumbnail(picture: Picture | None, cell: tuple[int, int]) -> Image.Image | None:
    """A picture that fits into the cell; None for one that is not there or cannot be read."""
    try:
        image = None if picture is None else _read(picture, cell).convert("RGB")
    except Exception:  # damaged files make Pillow raise nearly anything
        return None
    return image and ImageOps.contain(image, cell, Image.Resampling.LANCZOS)


def _place(
    sheet: Image.Image,
    thumbnail: Image.Image | None,
    place: tuple[int, int],
    cell: tuple[int, int],
) -> None:
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

    def fits(shown: str) -> bool:
        return draw.textlength(shown, font=font) <= width

    words = text.split()
    for line in range(lines):
        last = line == lines - 1
        taken = len(words) if last else _most(words, " ", "", fits)
        shown, words = " ".join(words[:taken]), words[taken:]
        if not fits(shown):
            shown = shown[: _most(shown, "", "…", fits)].rstrip() + "…"
        draw.text((place[0], place[1] + line * _line_height(size)), shown, fill=INK, font=font)
        if not words:
            return


def _most(pieces: Sequence[str], glue: str, end: str, fits: Callable[[str], bool]) -> int:
    """How many of the first pieces fit with what follows them; 1 where none does."""

    def too_wide(count: int) -> bool:
        return not fits(glue.join(pieces[:count]) + end)

    return max(1, bisect.bisect_left(range(1, len(pieces) + 1), True, key=too_wide))
