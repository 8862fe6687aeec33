"""Posters with their captions, for people to look through and mend.

What belongs here: which poster has which caption, by whom, and what is to be looked at; small
pictures of posters; saving. What does not: captions on disk (`core.captions`), what a conflict is
(`core.captions.edits`), and pages.

The tables of the pipeline tell what BLIP wrote; the files tell what people wrote, also since the
pipeline ran last.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
from PIL import Image

from posterpipe.core.captions.csv_file import read_csv
from posterpipe.core.captions.edits import remove_human_caption, write_human_caption
from posterpipe.core.captions.people import read_human_captions
from posterpipe.core.files import file_signature
from posterpipe.core.images import decode, open_image, png_bytes, upright
from posterpipe.core.posters.landing import EXTENSIONS
from posterpipe.core.posters.listing import (
    Entry,
    SourceChanged,
    listing_digest,
    open_place,
    source_name,
)
from posterpipe.core.prompts import MAX_TEXT_TOKENS, estimate_tokens
from posterpipe.core.quality import repeated_share, words
from posterpipe.core.store import Store, TableMissing
from posterpipe.settings import Settings

Source = Literal["human", "machine", "none"]

TAKEN_BACK = "Its caption was taken back; the captioner describes it when the pipeline runs."

LOOKED_SECONDS = 2.0
"""How long a listing of the folder holds: pages ask at every click."""

THUMBNAIL = (360, 540)
"""Pixels into which small pictures fit."""


@dataclass(frozen=True)
class Captioned:
    """A poster with its caption."""

    name: str
    """Its source_name."""
    caption: str
    """The one that counts, "" for none."""
    source: Source
    written: str | None
    """The caption by a person as it is now, None for none: what `save` is told was seen."""
    machine: str
    """What the captioner wrote, "" where nothing is known."""
    flags: tuple[str, ...]
    """Sentences about what is to be looked at."""
    trained_on: bool
    """Whether the pipeline's table of captions has this caption already."""


class CaptionDesk:
    """The captions of a deployment."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._place = open_place(settings.landing, settings.root)
        self._csv = settings.path(settings.captions)
        self._store_root = settings.path(settings.store)
        self._lock = threading.Lock()
        self._looked = -LOOKED_SECONDS
        self._signature: object = None
        self._rows: list[Captioned] = []
        self._entries: dict[str, Entry] = {}

    @property
    def location(self) -> str:
        """Where the posters lie, for people."""
        return self._place.location

    def rows(self) -> list[Captioned]:
        """Every poster of the landing folder, sorted by name. Raises PlaceMissing and
        CaptionsFileError."""
        with self._lock:
            if time.monotonic() - self._looked < LOOKED_SECONDS:
                return self._rows
            entries = self._place.entries()
            signature = (listing_digest(entries), file_signature(self._csv), self._versions())
            if signature != self._signature:
                self._rows = self._read(entries)
                self._entries = {source_name(entry): entry for entry in entries}
                self._signature = signature
            self._looked = time.monotonic()
            return self._rows

    def save(self, name: str, caption: str, *, seen: str | None) -> Path:
        """Gives a poster a caption by a person; the file that was written.

        `seen` is `Captioned.written` as the writer had it before their eyes. Raises
        CaptionConflict, CaptionRejected, CaptionsFileError and PlaceMissing.
        """
        path = write_human_caption(self._place, self._csv, name, caption, seen=seen)
        self._look_anew()
        return path

    def take_back(self, name: str, *, seen: str) -> str | None:
        """Removes a poster's caption by a person, so that the captioner's counts; the one by a
        person that counts all the same, where another file gives it one.

        `seen` and what is raised: as for `save`.
        """
        left = remove_human_caption(self._place, self._csv, name, seen=seen)
        self._look_anew()
        return left

    def picture(self, name: str) -> bytes | None:
        """A small picture of a poster as PNG, None where it cannot be read."""
        self.rows()
        with self._lock:
            entry = self._entries.get(name)
        if entry is None:
            return None
        try:
            return small_picture(self._place.read(entry), self._settings.images.max_pixels)
        except (OSError, SourceChanged):
            return None

    def stamp(self, name: str) -> tuple[int, int, str]:
        """What changes when the poster's file does."""
        entry = self._entries.get(name)
        return (entry.size, entry.mtime_ns, entry.identity) if entry else (0, 0, "")

    def _look_anew(self) -> None:
        with self._lock:
            self._looked, self._signature = -LOOKED_SECONDS, None

    def _versions(self) -> tuple[str | None, ...]:
        if not self._store_root.exists():
            return ()
        store = Store(self._store_root)
        return store.table_version("raw_posters"), store.table_version("poster_captions")

    def _table(self, name: str) -> pd.DataFrame | None:
        if not self._store_root.exists():
            return None
        try:
            return Store(self._store_root).read_table(name)
        except TableMissing:
            return None

    def _read(self, entries: list[Entry]) -> list[Captioned]:
        human = read_human_captions(self._place, read_csv(self._csv))
        good = human[human["status"] == "ok"]
        written = dict(zip(good["source_name"], good["caption"], strict=True))
        flags: dict[str, list[str]] = {}
        for row in human[human["status"] != "ok"].itertuples(index=False):
            flags.setdefault(str(row.source_name), []).append(f"Not used: {row.reason}.")
        captions = self._pipeline(flags, set(written))
        names = [
            source_name(entry)
            for entry in entries
            if not entry.problem and Path(entry.name).suffix.lower() in EXTENSIONS
        ]
        told = {name: written.get(name) or captions.get(name, ("", ""))[0] for name in names}
        shared = Counter(_wording(text) for text in told.values() if text)
        rows = []
        for name in names:
            table_caption, table_source = captions.get(name, ("", ""))
            caption = told[name]
            own = list(flags.get(name, []))
            own += self._worth_a_look(caption, shared[_wording(caption)] - 1 if caption else 0)
            source: Source = "none"
            if name in written or table_source == "human":
                source = "human"
            elif caption:
                source = "machine"
            rows.append(
                Captioned(
                    name=name,
                    caption=caption,
                    source=source,
                    written=written.get(name),
                    machine=table_caption if table_source == "model" else "",
                    flags=tuple(own),
                    trained_on=bool(caption) and caption == table_caption,
                )
            )
        return rows

    def _pipeline(
        self, flags: dict[str, list[str]], described: set[str]
    ) -> dict[str, tuple[str, str]]:
        """Caption and source by source_name, as of the last run, but for captions by people that
        were taken back since; what it says of posters goes to `flags`.

        `described`: the posters to which people give a caption now.
        """
        posters, captions = self._table("raw_posters"), self._table("poster_captions")
        if posters is None:
            return {}
        by_poster: dict[str, tuple[str, str]] = {}
        reasons: dict[str, str] = {}
        if captions is not None:
            for row in captions.itertuples(index=False):
                by_poster[str(row.poster_id)] = (str(row.caption or ""), str(row.source or ""))
                reasons[str(row.poster_id)] = str(row.reason or "")
        # A person's caption counts for every name of the same poster.
        by_people = set(posters.loc[posters["source_name"].isin(described), "poster_id"])
        found = {}
        for row in posters.itertuples(index=False):
            name, poster_id = str(row.source_name), str(row.poster_id)
            if row.status in ("rejected", "duplicate"):
                flags.setdefault(name, []).append(_capital(f"{row.status}: {row.reason}."))
            near = row.near_duplicate_of
            if isinstance(near, str) and near:
                flags.setdefault(name, []).append(f"Looks nearly like {near}.")
            if reasons.get(poster_id):
                flags.setdefault(name, []).append(_capital(f"{reasons[poster_id]}."))
            if poster_id not in by_poster:
                continue
            if by_poster[poster_id][1] == "human" and poster_id not in by_people:
                flags.setdefault(name, []).append(TAKEN_BACK)
            else:
                found[name] = by_poster[poster_id]
        return found

    def _worth_a_look(self, caption: str, others: int) -> list[str]:
        """What the checks of the pipeline would say of a caption."""
        if not caption:
            return ["No caption yet."]
        found = []
        share = repeated_share(caption)
        if share > self._settings.checks.max_repeated_share:
            found.append(f"It repeats itself: {share:.0%} of its word pairs come twice.")
        if estimate_tokens(caption) > MAX_TEXT_TOKENS:
            found.append(f"It is longer than the {MAX_TEXT_TOKENS} tokens that the model reads.")
        if others:
            found.append(
                f"{others} other poster{'s have' if others > 1 else ' has'} the same caption."
            )
        return found


def small_picture(data: bytes, max_pixels: int) -> bytes | None:
    """A picture as PNG, upright and small; None where it is none, or too large to be opened."""
    try:
        image = open_image(data, max_pixels)
        image.draft(None, THUMBNAIL)  # JPEGs are decoded at a fraction of their size
        decode(image)
        small = upright(image)
    except Exception:  # damaged files fail in every way that a decoder can
        return None
    small.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    return png_bytes(small)


def _wording(caption: str) -> str:
    return " ".join(words(caption))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
