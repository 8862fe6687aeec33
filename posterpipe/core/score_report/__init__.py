"""The score report: one static folder that opens from disk or from any web server.

What belongs here: `write_report`, which puts the parts together: `data` reads the published
database, `pictures` and `fonts` bring files, `charts` and `pages` make HTML, `folder` swaps the
whole in. What does not: the asset (`defs.score_report`) and the numbers themselves (the marts).

The folder needs no network and no script: scripts add the viewer, sorting and the theme switch.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from posterpipe.core.progress import NO_PROGRESS, Progress
from posterpipe.core.score_report.data import Published, read_published
from posterpipe.core.score_report.folder import replaced_folder
from posterpipe.core.score_report.fonts import write_fonts
from posterpipe.core.score_report.pages import render
from posterpipe.core.score_report.pictures import Source, add_pictures
from posterpipe.core.score_report.results_page import first_words
from posterpipe.core.store import content_key

INDEX = "index.html"


@dataclass(frozen=True)
class Written:
    """What was written."""

    index: Path
    """The page to open."""
    pages: int
    images: int
    """Of the gallery, those without a picture included."""
    missing: int
    """Images that were drawn and whose file is gone from the store."""
    made: int
    """Small images that the previous report did not have."""
    bytes: int
    """Of all files, as if no full image was a link."""
    summary: str
    """What the report says first, in two sentences."""
    digest: str
    """Of everything that a reader sees; the same database and images give the same."""


def write_report(
    published: Path,
    store_root: Path,
    folder: Path,
    *,
    progress: Progress = NO_PROGRESS,
) -> Written:
    """Write the report of a published database into `folder`, in place of the previous one.

    `store_root` is where its images lie. On any error, and until the new report is complete, the
    old one stays. Raises WarehouseMissing where nothing was published.
    """
    data = read_published(published)
    folder = Path(folder)
    with replaced_folder(folder) as new:
        wanted = list(_sources(data, Path(store_root)))
        pictures = add_pictures(wanted, new, folder, progress)
        pages = render(data, pictures)
        made = sum(not (folder / picture.small).exists() for picture in pictures.values())
        assets = new / "assets"
        shutil.copytree(Path(__file__).parent / "static", assets)
        write_fonts(assets, folder / "assets")
        for name, html in pages.items():
            (new / name).write_text(html, "utf-8")
        size = sum(file.stat().st_size for file in new.rglob("*") if file.is_file())
    drawn = {shot.image.blob for _, shot in data.shots if shot.image}
    return Written(
        index=folder / INDEX,
        pages=len(pages),
        images=len(data.shots),
        missing=len(drawn - set(pictures)),
        made=made,
        bytes=size,
        summary=" — ".join(first_words(data)),
        digest=content_key(pages, sorted(pictures)),
    )


def _sources(data: Published, store_root: Path) -> list[Source]:
    stored = []
    for _, shot in data.shots:
        stored += [shot.image, shot.titled]
        # Other nearest posters are not shown: a report is passed on more freely than posters.
        if shot.nearest and shot.nearest.copied:
            stored.append(shot.nearest.poster)
    return [
        Source(one.blob, store_root / one.path)
        for one in stored
        # A path of the database must not bring another file of this machine into a public folder.
        if one and not (PurePosixPath(one.path).is_absolute() or ".." in one.path)
    ]
