"""The table of titled posters.

What belongs here: keys, incremental setting over the store, and the PNGs with what they say about
themselves. What does not: how one title is set (`render`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from importlib.metadata import version as installed_version
from typing import Any
from unicodedata import normalize

import pandas as pd
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from posterpipe.core.images import UNREADABLE
from posterpipe.core.parallel import parallel_map
from posterpipe.core.progress import Progress
from posterpipe.core.store import Store, compute_missing, content_key
from posterpipe.core.typography.fonts import (
    STYLES,
    TitleImpossible,
    choose_style,
    fonts_id,
    layout_engine,
)
from posterpipe.core.typography.lines import ZERO_WIDTH_SPACE
from posterpipe.core.typography.render import Layout, set_title
from posterpipe.core.typography.signs import capitals
from posterpipe.settings import LetteringSettings

TYPOGRAPHY_VERSION = 4
"""Raised when the same image and title would give other pixels."""

GREEK_CAPITALS_VERSION = "without accents"
"""The same for titles in capitals that lose Greek accents, and for these only."""

TITLED_COLUMNS = (
    "generation_key", "untitled_image", "title", "image", "image_path", "style", "lines",
    "left", "top", "right", "bottom", "cap_height", "colour", "contrast", "scrim", "covered",
    "width", "height", "status", "reason",
)  # fmt: skip
"""Columns of the table of titled posters: the block's edges and the letters' height in pixels of
the titled image, `contrast` the least one measured, `covered` the share of the main object below
the letters (0 to 1), status ok, blocked or failed; the reason of one that is ok names what was left
out of the title."""


def lettering_id(settings: LetteringSettings) -> str:
    """8 hex digits of all that decides how a title is set on an image, but for the two."""
    return content_key(
        "lettering", TYPOGRAPHY_VERSION, settings.model_dump(mode="json", exclude={"seeds"}),
        fonts_id(), layout_engine(), installed_version("pillow"), installed_version("uniseg"),
    )[:8]  # fmt: skip


def titled_key(image: str, title: str, settings: LetteringSettings) -> str:
    """Key of what decides a titled image's pixels; `image` is the hash of the untitled one."""
    style = STYLES[choose_style(title.replace(ZERO_WIDTH_SPACE, ""), settings.style)]
    loses_accents = style.capitals and capitals(title) != normalize("NFC", title.upper())
    return content_key(
        "titled", image, title, lettering_id(settings),
        *([GREEK_CAPITALS_VERSION] if loses_accents else []),
    )  # fmt: skip


def set_titles(
    store: Store, generations: pd.DataFrame, settings: LetteringSettings, progress: Progress
) -> pd.DataFrame:
    """The titled posters (TITLED_COLUMNS) of a table of generations (`generations.COLUMNS`).

    One row a generation with a title. Only those that the store lacks are set. Pictographs that no
    font has are left out of the title, and the row's reason says so. A title that cannot
    be set, or an image that cannot be read, is a row with status failed and the reason, and is
    tried again; blocked and failed generations keep their status.
    """
    titled = generations[generations["title"].astype(bool)]
    drawn = titled[titled["status"] == "ok"]
    jobs = {
        titled_key(str(row.image), str(row.title), settings): (
            str(row.image_path), str(row.title),
        )
        for row in drawn.itertuples(index=False)
    }  # fmt: skip
    failures: dict[str, str] = {}

    def one(key: str) -> tuple[str, dict[str, Any] | None]:
        path, title = jobs[key]
        try:
            with Image.open(store.root / path) as image:
                image.load()
                about = str(image.info.get("parameters", ""))
                result, layout = set_title(image, title, settings)
        except TitleImpossible as error:
            failures[key] = str(error)
            return key, None
        except (OSError, SyntaxError) as error:
            failures[key] = (
                f"{store.root / path}: {UNREADABLE} ({error}); materialize the generations again"
            )
            return key, None
        blob = store.put(_png(result, about, title, layout), ".png")
        return key, _recorded(blob, result, layout)

    def compute(missing: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        with progress.task(f"Setting {len(missing)} titles", len(missing), "posters") as tick:
            for key, row in parallel_map(one, missing):
                tick()
                if row is not None:
                    yield key, row

    done = compute_missing(
        store, "titled", list(jobs), compute, usable=lambda row: store.has(row["image"], ".png")
    )
    rows = []
    for row in titled.itertuples(index=False):
        values: dict[str, Any] = {name: None for name in TITLED_COLUMNS}
        values |= {"image": "", "image_path": "", "style": "", "lines": "", "colour": ""}
        values |= {"generation_key": row.generation_key, "untitled_image": row.image,
                   "title": row.title, "status": row.status, "reason": row.reason}  # fmt: skip
        if row.status == "ok":
            key = titled_key(str(row.image), str(row.title), settings)
            if key in done:
                blob = done[key]["image"]
                values |= done[key] | {"image_path": store.relative(blob, ".png")}
            else:
                values |= {"status": "failed", "reason": failures.get(key, "not set")}
        rows.append(values)
    return pd.DataFrame(rows, columns=list(TITLED_COLUMNS))


def _recorded(blob: str, image: Image.Image, layout: Layout) -> dict[str, Any]:
    left, top, right, bottom = layout.box
    return {
        "image": blob,
        "style": layout.style,
        "lines": json.dumps(list(layout.lines), ensure_ascii=False),
        "left": left,
        "top": top,
        "right": right,
        "bottom": bottom,
        "cap_height": layout.cap_height,
        "colour": "#{:02x}{:02x}{:02x}".format(*layout.colour),
        "contrast": round(layout.contrast, 3),
        "scrim": layout.scrim,
        "covered": round(layout.covered, 4),
        "width": image.width,
        "height": image.height,
        "reason": f"set without {layout.left_out}, which no installed font has"
        if layout.left_out
        else "",
    }


def _png(image: Image.Image, about: str, title: str, layout: Layout) -> bytes:
    """PNG that says how the picture was made, as the untitled one does, and how it is lettered."""
    info = PngInfo()
    lettered = f"Title: {json.dumps(title, ensure_ascii=False)}, Lettering: {layout.style}"
    # Latin-1 is all that a tEXt chunk holds; iTXt holds every title.
    info.add_itxt("parameters", f"{about}, {lettered}" if about else lettered)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
