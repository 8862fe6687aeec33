"""Captions by people, written from a page or taken back.

What belongs here: where the caption of a poster stands now, changing it there, and not losing what
others write meanwhile. What does not: which caption counts (`people`), the form of the CSV
(`csv_file`), and pages.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from posterpipe.core.captions.csv_file import (
    CaptionsCsv,
    CaptionsFileError,
    PosterNames,
    decode_text,
    read_bytes,
    read_csv,
    with_caption,
    without_lines,
)
from posterpipe.core.captions.people import (
    CaptionRejected,
    clean_caption,
    csv_claims,
    posters_and_texts,
    read_sidecars,
    sidecars_of,
)
from posterpipe.core.files import write_atomic
from posterpipe.core.posters.listing import Entry, Folder, Place, SourceChanged, source_name
from posterpipe.core.progress import NO_PROGRESS

_ATTEMPTS = 20


class CaptionConflict(Exception):
    """Someone else changed the caption meanwhile; nothing was written.

    `current` is the caption by a person as it is now, None where there is none any more.
    """

    def __init__(self, name: str, current: str | None) -> None:
        self.current = current
        now = f"it is now {current!r}" if current is not None else "it is gone"
        super().__init__(
            f"{name}: the caption was changed meanwhile, and {now}; look at it and save again"
        )


def write_human_caption(
    place: Place, csv_path: Path, name: str, caption: str, *, seen: str | None
) -> Path:
    """Give the poster `name` a caption by a person; the file that was written.

    `name`: the poster's source_name. `seen`: the caption by a person that the writer had before
    their eyes, None where there was none; when it is another by now, CaptionConflict is raised and
    nothing changes. The caption goes where the one that counts stands, else into the CSV, which is
    created when missing; everything else in it stays as it is, byte for byte. Writers of this
    program wait for each other; one that saves with an editor in the same instant is noticed too.

    Raises CaptionRejected (unknown poster, no caption), CaptionsFileError and PlaceMissing.
    """
    caption = clean_caption(caption)
    csv_path = csv_path.resolve()
    with _locked(csv_path.parent):
        for _ in range(_ATTEMPTS):
            path = _try_write(place, csv_path, name, caption, seen)
            if path is not None:
                return path
    raise CaptionsFileError(f"{csv_path}: another program keeps writing it; close it there")


def remove_human_caption(place: Place, csv_path: Path, name: str, *, seen: str) -> str | None:
    """Take back the caption that people gave the poster `name`; the one by a person that counts
    from then on, None where there is none.

    `seen`: as for `write_human_caption`, whose care for other writers this has too. The poster's
    text file goes, and so do the rows of the CSV that say the same; what says something else stays.

    Raises CaptionRejected (unknown poster, a text file of several posters or one in a bucket),
    CaptionConflict, CaptionsFileError and PlaceMissing.
    """
    csv_path = csv_path.resolve()
    removed = False
    with _locked(csv_path.parent):
        for _ in range(_ATTEMPTS):
            now = _standing(place, csv_path, name)
            if now.caption != seen:
                if not removed:
                    raise CaptionConflict(name, now.caption)
                return now.caption
            if removed and now.sharing:  # the same words for several posters: they stay
                return now.caption
            removed = _try_remove(place, csv_path, name, now) or removed
    raise CaptionsFileError(f"{csv_path}: another program keeps writing it; close it there")


@dataclass(frozen=True)
class _Standing:
    """The caption by a person that counts for a poster at one moment, and where it stands."""

    caption: str | None
    sidecar: Entry | None
    """None where it stands in the CSV, or nowhere."""
    sharing: tuple[str, ...]
    """Other posters that the sidecar speaks for."""
    posters: list[str]
    csv: CaptionsCsv
    lines: frozenset[int]
    """Of the rows that give this poster this caption."""


def _standing(place: Place, csv_path: Path, name: str) -> _Standing:
    posters, texts = posters_and_texts(place.entries())
    if name not in posters:
        raise CaptionRejected(f"{name}: no poster of that name in {place.location}")
    sidecars = sidecars_of(name, texts)
    facts = read_sidecars(place, sidecars, None, NO_PROGRESS)
    sidecar = next((e for e in sidecars if not facts[source_name(e)]["problem"]), None)
    csv = read_csv(csv_path)
    if sidecar is not None:
        caption = facts[source_name(sidecar)]["caption"]
        owners = [poster for poster in posters if sidecar in sidecars_of(poster, texts)]
        sharing = tuple(poster for poster in owners if poster != name)
        return _Standing(caption, sidecar, sharing, posters, csv, frozenset())
    rows = [
        claim for poster, claim in csv_claims(csv, posters) if poster == name and not claim.problem
    ]
    caption = rows[0].caption if rows else None
    lines = frozenset(row.line for row in rows if row.caption == caption)
    return _Standing(caption, None, (), posters, csv, lines)


def _folder(place: Place, name: str, sidecar: Entry) -> Path:
    """Where the sidecars lie that are written here. Raises CaptionRejected for a bucket."""
    if not isinstance(place, Folder):
        raise CaptionRejected(
            f"{name}: its caption lies beside it in {place.location}; change {sidecar.name} there"
        )
    return Path(place.location)


def _try_write(
    place: Place, csv_path: Path, name: str, caption: str, seen: str | None
) -> Path | None:
    """The file written; None where it was changed between reading and writing."""
    now = _standing(place, csv_path, name)
    if now.caption != seen:
        raise CaptionConflict(name, now.caption)
    if now.sidecar is None:
        after = with_caption(now.csv, PosterNames(now.posters), name, caption)
        return csv_path if _replace(csv_path, now.csv.data, after) else None
    folder = _folder(place, name, now.sidecar)
    if now.sharing:
        # The shorter name speaks for other posters as well; they keep it.
        path = folder / f"{name}.txt"
        return path if _replace(path, read_bytes(path), f"{caption}\n".encode()) else None
    path = folder / now.sidecar.name
    try:
        old = place.read(now.sidecar)
    except SourceChanged:
        return None
    _, encoding = decode_text(old)
    return path if _replace(path, old, f"{caption}\n".encode(encoding)) else None


def _try_remove(place: Place, csv_path: Path, name: str, now: _Standing) -> bool:
    """Whether the caption was removed from where it counts; not so where that was changed between
    reading and writing."""
    if now.sidecar is None:
        return _replace(csv_path, now.csv.data, without_lines(now.csv, now.lines))
    folder = _folder(place, name, now.sidecar)
    if now.sharing:
        raise CaptionRejected(
            f"{name}: its caption lies in {now.sidecar.name}, which speaks for "
            f"{', '.join(now.sharing)} too; change that file, or write a caption for this poster"
        )
    try:
        old = place.read(now.sidecar)
    except SourceChanged:
        return False
    return _replace(folder / now.sidecar.name, old, None)


def _replace(path: Path, before: bytes | None, after: bytes | None) -> bool:
    """Write the file, or remove it for None, unless it is not any more what was read."""
    try:
        now = path.read_bytes() if path.exists() else None
        if now != before:
            return False
        if after is None:
            path.unlink(missing_ok=True)
            return True
        mode = path.stat().st_mode & 0o777 if now is not None else None
        write_atomic(path, after)
        if mode is not None:
            os.chmod(path, mode)
    except OSError as error:
        raise CaptionsFileError(
            f"{path}: cannot be written ({error.strerror}); make it writable"
        ) from error
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time, among processes and threads; the lock ends with its holder."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # the folder itself, so that no lock file lies about
    try:
        with suppress(OSError):  # without locks `_replace` still notices most of what others wrote
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
