"""The report's image files: full images under their hash, and small ones to look through.

What belongs here: bringing images of the store into the report's folder. What does not: which
images are shown (`data`), and contact sheets (`core.gallery`).

Full images are hard links where the file system allows, so that a report costs no second copy of
them; small ones are taken over from the previous report, so that only new images cost work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from posterpipe.core.files import link_or_copy
from posterpipe.core.parallel import parallel_map
from posterpipe.core.progress import Progress

SMALL_WIDTH = 400
"""Pixels: about twice what a column of the gallery is wide, for screens of high density."""

SMALL_QUALITY = 82

SMALL = f"images/small{SMALL_WIDTH}q{SMALL_QUALITY}"
"""Folder of the small images; named by what decides their bytes, since they are taken over."""

FULL = "images/full"


@dataclass(frozen=True)
class Source:
    """An image of the store."""

    blob: str
    """Content hash."""
    path: Path


@dataclass(frozen=True)
class Picture:
    """An image in the report."""

    full: str
    """Path inside the report's folder, with / on every system."""
    small: str
    width: int
    """Of the small one, in pixels."""
    height: int


Pictures = Mapping[str, Picture]
"""By content hash."""


def add_pictures(
    sources: Iterable[Source], folder: Path, before: Path, progress: Progress
) -> dict[str, Picture]:
    """Bring images into `folder`; by blob, without those whose file is gone or no image.

    `before` is the report that is to be replaced, present or not.
    """
    for name in (SMALL, FULL):
        (folder / name).mkdir(parents=True, exist_ok=True)
    unique = list({source.blob: source for source in sources}.values())
    pictures: dict[str, Picture] = {}
    with progress.task("Pictures of the report", len(unique), "images") as tick:
        for source, picture in parallel_map(lambda one: (one, _add(one, folder, before)), unique):
            tick()
            if picture is not None:
                pictures[source.blob] = picture
    return pictures


def _add(source: Source, folder: Path, before: Path) -> Picture | None:
    # Names come from hashes of the warehouse, and must not lead anywhere else.
    if not source.blob.isalnum():
        return None
    full = f"{FULL}/{source.blob}{source.path.suffix.lower()}"
    small = f"{SMALL}/{source.blob}.webp"
    try:
        if not _link(before / small, folder / small):
            _shrink(source.path, folder / small)
        with Image.open(folder / small) as image:
            width, height = image.size
        if not _link(source.path, folder / full):
            return None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        (folder / small).unlink(missing_ok=True)
        return None
    return Picture(full, small, width, height)


def _link(source: Path, target: Path) -> bool:
    """Whether the source is there, which is under both names then."""
    try:
        link_or_copy(source, target)
    except FileNotFoundError:
        return False
    return True


def _shrink(source: Path, target: Path) -> None:
    with Image.open(source) as image:
        image.load()
        small = image.convert("RGB")
    if small.width > SMALL_WIDTH:
        height = max(1, round(small.height * SMALL_WIDTH / small.width))
        small = small.resize((SMALL_WIDTH, height), Image.Resampling.LANCZOS)
    small.save(target, "WEBP", quality=SMALL_QUALITY, method=4)
