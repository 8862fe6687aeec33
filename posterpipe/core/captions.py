"""Captions by people: sidecars beside the posters, and `captions.csv`.

What belongs here: reading them, saying which of several counts, giving them to posters, and writing
one from a page or taking it back. What does not: captions by the model (`captioner`) and how
captions are worded for training (`training_set`).

A sidecar is a text file beside its poster: `rocket.png.txt`, or `rocket.txt` for every poster of
that stem. `captions.csv` has the columns file_name (path inside the landing folder) and caption;
other columns are left alone. A sidecar wins over a row of the CSV, the longer name over the shorter
one, an earlier row over a later one.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from posterpipe.core.files import write_atomic
from posterpipe.core.landing import (
    CHANGED,
    EXTENSIONS,
    UNREADABLE,
    Rehash,
    forget_changed,
    list_place,
    reread,
)
from posterpipe.core.listing import Entry, Folder, Place, SourceChanged, source_name, suffix
from posterpipe.core.parallel import parallel_map
from posterpipe.core.progress import NoProgress, Progress
from posterpipe.core.store import Store, cells, compute_missing, content_key

COLUMNS = ["source_name", "caption", "origin", "status", "reason"]

SIDECAR, CSV = "sidecar", "captions.csv"
"""Values of the column `origin`."""

MAX_CHARACTERS = 2_000
"""Longer texts are no captions: what models read, 77 tokens, is about 400 characters."""

MAX_BYTES = 20_000
"""Text files above this are not read."""

READ_VERSION = 3
"""Raise it when sidecars or the CSV are read differently: each is then read again."""

_SIDECARS = "sidecar"
REHASHED_SIDECARS = "sidecars_rehashed"
"""Mark of `rehash_sidecars` (see `landing.rehashed`)."""

_ATTEMPTS = 20


class CaptionRejected(ValueError):
    """A text that can be no caption, or a poster that is not there. The message says why."""


class CaptionsFileError(Exception):
    """`captions.csv` cannot be used. The message names file and line, and says what to do."""


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


@dataclass(frozen=True)
class HumanCaption:
    """The caption of a poster; `note` tells of others that it wins over, else ""."""

    caption: str
    note: str = ""


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""Unicode's category Cc."""


_JOINERS = "\u200c\u200d"
"""Persian and Indian scripts, and emoji, need them inside words; elsewhere they do nothing."""


def _visible(text: str) -> str:
    """The text without what is only invisible (Unicode's category Cf): byte order marks, marks of
    direction, zero-width spaces."""
    kept = "".join(
        letter for letter in text if letter in _JOINERS or unicodedata.category(letter) != "Cf"
    )
    return re.sub(f"(?<![^\\s{_JOINERS}])[{_JOINERS}]+|[{_JOINERS}]+(?=\\s|$)", "", kept)


def clean_caption(text: str) -> str:
    """One line in Unicode's composed form, spaces collapsed, nothing invisible. Raises
    CaptionRejected."""
    caption = " ".join(unicodedata.normalize("NFC", _visible(text)).split())
    if not caption:
        raise CaptionRejected("no words in it; write the caption")
    if len(caption) > MAX_CHARACTERS:
        raise CaptionRejected(
            f"{len(caption)} characters are more than {MAX_CHARACTERS}; a caption is a sentence"
        )
    if _CONTROL.search(caption):
        raise CaptionRejected("control characters in it; save it as plain text")
    return caption


# -- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionsCsv:
    """The CSV as it was read at one moment."""

    path: Path
    data: bytes | None
    """None where there was none."""

    @property
    def digest(self) -> str:
        """sha256 (hex) of its bytes; "" where there was none."""
        return "" if self.data is None else hashlib.sha256(self.data).hexdigest()


def read_csv(path: Path) -> CaptionsCsv:
    """The CSV as it is now, present or not. Raises CaptionsFileError."""
    return CaptionsCsv(path, _read_bytes(path))


def read_human_captions(
    place: Place,
    written: Path | CaptionsCsv | None,
    store: Store | None = None,
    progress: Progress | None = None,
    *,
    entries: Sequence[Entry] | None = None,
) -> pd.DataFrame:
    """Every caption by people: a row each, sorted by source_name, the one that counts last.

    Columns: source_name (of the poster, relative to `place`; what the file says where there is no
    such poster), caption, origin (`sidecar` or `captions.csv`), status (`ok`, at most once for a
    source_name, or `rejected`), reason ("" for ok). With neither sidecars nor CSV the table is
    empty. With a `store`, a sidecar that did not change since is not read again. `entries` is the
    listing of the place, where it was taken before; `written` the CSV, read now or before. Without
    one, sidecars alone count.

    Raises CaptionsFileError when the CSV as a whole cannot be read, and PlaceMissing: captions that
    cannot be seen are not taken for captions that were removed.
    """
    posters, texts = _split_all(place.entries() if entries is None else entries)
    claims: dict[str, list[_Claim]] = {}
    sidecars = _sidecar_claims(place, posters, texts, store, progress or NoProgress())
    sheet = read_csv(written) if isinstance(written, Path) else written
    rows_of_csv = _csv_claims(sheet, posters) if sheet else ()
    for name, claim in [*sidecars, *rows_of_csv]:
        claims.setdefault(name, []).append(claim)
    rows = [row for name in sorted(claims) for row in _rows(name, claims[name])]
    return pd.DataFrame(rows, columns=COLUMNS)


def unread_count(table: pd.DataFrame) -> int:
    """How many sidecars of the table above could not be read, which may pass by itself."""
    problem = table["reason"].astype(str).str
    unread = problem.contains(f": {CHANGED}") | problem.contains(f": {UNREADABLE}")
    return int((unread & (table["origin"] == SIDECAR)).sum())


@dataclass(frozen=True)
class _Claim:
    """A caption that some file gives a poster; `where` names the file, `problem` why it is none."""

    origin: str
    where: str
    caption: str
    problem: str = ""
    line: int = 0
    """Of the CSV."""


def _rows(name: str, claims: Sequence[_Claim]) -> list[dict[str, str]]:
    winner = _winner(claims)
    rows = []
    for claim in claims:
        if claim is winner:
            continue
        reason = f"{claim.where}: {claim.problem}"
        if winner and not claim.problem:
            if claim.caption == winner.caption:
                continue
            reason = f"{claim.where}: another caption than {winner.where}, which counts; keep one"
        rows.append(_row(name, claim, "rejected", reason))
    return rows + ([_row(name, winner, "ok", "")] if winner else [])


def _row(name: str, claim: _Claim, status: str, reason: str) -> dict[str, str]:
    values = (name, claim.caption, claim.origin, status, reason)
    return dict(zip(COLUMNS, values, strict=True))


def _winner(claims: Iterable[_Claim]) -> _Claim | None:
    return next((claim for claim in claims if not claim.problem), None)


def _split(entries: Iterable[Entry]) -> tuple[list[str], dict[str, Entry]]:
    """Names of the posters, and the text files by their name without `.txt`, composed."""
    posters, texts = _split_all(entries)
    return posters, {name: same[0] for name, same in texts.items()}


def _split_all(entries: Iterable[Entry]) -> tuple[list[str], dict[str, list[Entry]]]:
    """The same with all text files that come to one name, `1.TXT` and `1.txt`, say; the one that
    counts first: with a small extension, then composed, then by name."""
    posters: list[str] = []
    texts: dict[str, list[Entry]] = {}
    for entry in entries:
        name = source_name(entry)
        if entry.problem:
            continue
        if name.lower().endswith(".txt"):
            texts.setdefault(_composed(name[:-4]), []).append(entry)
        elif suffix(name).lower() in EXTENSIONS:
            posters.append(name)
    for same in texts.values():
        same.sort(key=_rank)
    return posters, texts


def _rank(entry: Entry) -> tuple[bool, bool, str]:
    name = source_name(entry)
    return not name.endswith(".txt"), name != _composed(name), name


def _composed(name: str) -> str:
    """macOS hands out file names decomposed, while people type them composed."""
    return unicodedata.normalize("NFC", name)


def _candidates(poster: str, texts: Mapping[str, Entry]) -> list[Entry]:
    """The sidecars of a poster, the one that counts first."""
    name = _composed(poster)
    stem = posixpath.splitext(name)[0]
    return [texts[key] for key in (name, stem) if key in texts]


def _sidecar_claims(
    place: Place,
    posters: Sequence[str],
    all_texts: Mapping[str, Sequence[Entry]],
    store: Store | None,
    progress: Progress,
) -> Iterator[tuple[str, _Claim]]:
    texts = {name: same[0] for name, same in all_texts.items()}
    others = {source_name(same[0]): same[1:] for same in all_texts.values() if len(same) > 1}
    facts = _read_sidecars(place, list(texts.values()), store, progress)
    claims = {
        name: _Claim(SIDECAR, name, fact["caption"], fact["problem"])
        for name, fact in facts.items()
    }
    lonely = set(claims)
    for poster in posters:
        for entry in _candidates(poster, texts):
            name = source_name(entry)
            lonely.discard(name)
            yield poster, claims[name]
            for other in others.get(name, ()):
                problem = f"beside {name}, which counts, and for the same poster; keep one"
                yield poster, _Claim(SIDECAR, source_name(other), "", problem)
    for name in sorted(lonely):
        problem = "no poster of that name beside it; name it after its poster, or move it away"
        for lone in (name, *map(source_name, others.get(name, ()))):
            yield lone, _Claim(SIDECAR, lone, "", problem)


def rehash_sidecars(place: Place, store: Store, progress: Progress | None = None) -> Rehash:
    """Read every sidecar of a place again and compare it with what is known, as `landing.rehash`
    does with posters. Raises LandingEmpty when the place cannot be listed."""
    _, texts = _split(list_place(place))
    by_key = _sidecar_keys(place, texts.values())
    known = store.results(_SIDECARS, by_key)

    def read(entry: Entry) -> str:
        fact = _read_sidecar(place, entry)
        if fact["transient"]:
            raise OSError(fact["problem"])
        return content_key(fact)

    facts = {key: content_key(row) for key, row in known.items() if not row["transient"]}
    with (progress or NoProgress()).task("read captions again", len(by_key), "files") as tick:
        found, changed = reread(by_key, facts, read, place.threads, tick)
    forget_changed(store, _SIDECARS, known, changed, REHASHED_SIDECARS)
    return found


def _sidecar_keys(place: Place, entries: Iterable[Entry]) -> dict[str, Entry]:
    return {
        content_key(
            _SIDECARS, READ_VERSION, place.key(entry), entry.size, entry.mtime_ns, entry.identity
        ): entry
        for entry in entries
    }


def _read_sidecars(
    place: Place, entries: Sequence[Entry], store: Store | None, progress: Progress
) -> dict[str, dict[str, Any]]:
    """By name: caption, problem, and whether the problem may pass by itself (`transient`)."""
    by_key = _sidecar_keys(place, entries)

    def compute(keys: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        with progress.task("read captions", len(keys), "files") as tick:
            read = parallel_map(
                lambda key: _read_sidecar(place, by_key[key]), keys, threads=place.threads
            )
            for key, fact in zip(keys, read, strict=True):
                yield key, fact
                tick()

    if store is None:
        facts = dict(compute(list(by_key)))
    else:
        facts = compute_missing(
            store, _SIDECARS, list(by_key), compute, usable=lambda fact: not fact["transient"]
        )
    return {source_name(by_key[key]): fact for key, fact in facts.items()}


def _read_sidecar(place: Place, entry: Entry) -> dict[str, Any]:
    fact: dict[str, Any] = {"caption": "", "problem": "", "transient": False}
    if entry.size > MAX_BYTES:
        problem = f"{entry.size} bytes are more than {MAX_BYTES}; a caption is a sentence"
        return {**fact, "problem": problem}
    try:
        text, _ = _decode(place.read(entry))
        return {**fact, "caption": clean_caption(text)}
    except CaptionRejected as error:
        return {**fact, "problem": str(error)}
    except UnicodeDecodeError:
        return {**fact, "problem": "not UTF-8; save it as UTF-8"}
    except SourceChanged:
        problem = f"{CHANGED}; materialize human_captions again"
        return {**fact, "problem": problem, "transient": True}
    except OSError as error:
        problem = f"{UNREADABLE} ({error.strerror or error}); make it readable"
        return {**fact, "problem": problem, "transient": True}


def _decode(data: bytes) -> tuple[str, str]:
    """The text and the encoding that gives the same bytes back. Raises UnicodeDecodeError."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16"), "utf-16"  # what some editors call "Unicode"
    encoding = "utf-8-sig" if data.startswith(codecs.BOM_UTF8) else "utf-8"
    return data.decode(encoding), encoding


# -- captions.csv ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """One record of the CSV: the line on which it starts (from 1), as it is written, its cells."""

    line: int
    raw: str
    cells: list[str]


@dataclass(frozen=True)
class _Sheet:
    """The whole CSV; the heading is the first of the records that are not blank."""

    records: list[_Record]
    encoding: str
    separator: str
    width: int
    name_column: int
    caption_column: int

    def rows(self) -> list[_Record]:
        """The records below the heading."""
        return [record for record in self.records if record.cells][1:]

    def name(self, record: _Record) -> str:
        """The file name that a record gives, "" for none."""
        return record.cells[self.name_column] if len(record.cells) > self.name_column else ""


def _csv_claims(given: CaptionsCsv, posters: Sequence[str]) -> Iterator[tuple[str, _Claim]]:
    if given.data is None:
        return
    path = given.path
    sheet = _parse(path, given.data)
    names = _Names(posters)
    for record in sheet.rows():
        where = f"{path.name}, line {record.line}"
        written = sheet.name(record)
        poster = names.find(written)
        caption, problem = "", ""
        if len(record.cells) > sheet.width:
            problem = (
                f"{len(record.cells)} cells below {sheet.width} headings; put a caption with "
                "commas into double quotes"
            )
        elif not written.strip():
            problem = "no file_name; write which poster it describes"
        elif len(record.cells) <= sheet.caption_column:
            problem = "no caption; write it or delete the line"
        else:
            try:
                caption = clean_caption(record.cells[sheet.caption_column])
            except CaptionRejected as error:
                problem = str(error)
        if poster is None and not problem:
            problem = f"no poster of that name{names.hint(written)}"
        yield poster or written.strip(), _Claim(CSV, where, caption, problem, record.line)


class _Names:
    """Names of posters, found as people type them."""

    def __init__(self, posters: Sequence[str]) -> None:
        self._exact = frozenset(posters)
        self._composed = {_composed(name): name for name in posters}
        self._loose = {name.casefold(): poster for name, poster in self._composed.items()}
        self._last = {posixpath.basename(name): name for name in posters}

    def find(self, written: str) -> str | None:
        """The poster of that name; spaces around it, `./` and `\\` for `/` are allowed."""
        if written in self._exact:
            return written
        plain = _composed(written.strip())
        path = plain.replace("\\", "/").removeprefix("./")
        return self._composed.get(plain) or self._composed.get(path)

    def hint(self, written: str) -> str:
        """What may have been meant, for the end of a sentence."""
        plain = _composed(written.strip())
        meant = self._loose.get(plain.casefold()) or self._last.get(posixpath.basename(plain))
        return f"; is it {meant}?" if meant else "; correct it, or put the poster in"


def _read_bytes(path: Path) -> bytes | None:
    """The bytes of the CSV, None where there is none. Raises CaptionsFileError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CaptionsFileError(
            f"{path}: cannot be read ({error.strerror}); make it a readable file, or set "
            "POSTERPIPE_CAPTIONS to another one"
        ) from error


def _parse(path: Path, data: bytes) -> _Sheet:
    """Raises CaptionsFileError where the file is no such CSV."""
    try:
        text, encoding = _decode(data)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise CaptionsFileError(
            f"{path}:{line}: not UTF-8; save it as CSV in UTF-8 (Excel: CSV UTF-8)"
        ) from error
    separator = _separator(text)
    records = _records(path, text, separator)
    heading = next((record for record in records if record.cells), None)
    wanted = "the first line must name the columns: file_name,caption"
    if heading is None:
        raise CaptionsFileError(f"{path}:1: empty; {wanted}")
    names = [cell.strip().casefold() for cell in heading.cells]
    if names.count("file_name") != 1 or names.count("caption") != 1:
        separated = ", separated by commas" if len(names) == 1 else ""
        raise CaptionsFileError(
            f"{path}:{heading.line}: its columns are {', '.join(heading.cells)}; "
            f"{wanted}{separated}"
        )
    columns = (names.index("file_name"), names.index("caption"))
    return _Sheet(records, encoding, separator, len(names), *columns)


_NAMED_SEPARATOR = re.compile(r"\s*sep=([^\s\"]|\t)\s*", re.IGNORECASE)
"""The line with which Excel is told how a file is separated."""


def _separator(text: str) -> str:
    """Comma; or semicolon or tab, which Excel writes in many languages, where the heading has them
    and no comma."""
    heading = next((line for line in io.StringIO(text) if line.strip()), "")
    if named := _NAMED_SEPARATOR.fullmatch(heading):
        return named[1]
    return next((mark for mark in ",;\t" if mark in heading), ",")


def _records(path: Path, text: str, separator: str) -> list[_Record]:
    # Not str.splitlines: it also splits at characters that are no line ends in a CSV.
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, strict=True, delimiter=separator)
    records = []
    start = 0
    try:
        for cells in reader:
            raw = "".join(lines[start : reader.line_num])
            blank = not any(cell.strip() for cell in cells) or _NAMED_SEPARATOR.fullmatch(raw)
            records.append(_Record(start + 1, raw, [] if blank else cells))
            start = reader.line_num
    except csv.Error as error:
        raise CaptionsFileError(
            f"{path}:{start + 1}: {error}; put cells with commas or quotes into double quotes, and "
            "write quotes inside them twice"
        ) from error
    return records


# -- posters --------------------------------------------------------------------------------------


def captions_by_poster(posters: pd.DataFrame, human: pd.DataFrame) -> dict[str, HumanCaption]:
    """The caption that a person gave each poster, by poster_id.

    `posters`: the table of `landing.scan`; `human`: that of `read_human_captions`. A poster that
    lies in the folder under several names has the caption of any of them; where they differ, that
    of the first name, with a note.
    """
    accepted = human[human["status"] == "ok"]
    captions = dict(cells(accepted, "source_name", "caption"))
    usable = posters[posters["status"].isin(["ok", "duplicate"]) & (posters["poster_id"] != "")]
    given: dict[str, list[tuple[str, str]]] = {}
    for name, poster_id in sorted(cells(usable, "source_name", "poster_id")):
        if name in captions:
            given.setdefault(poster_id, []).append((name, captions[name]))
    found = {}
    for poster_id, named in given.items():
        first, caption = named[0]
        others = [name for name, other in named if other != caption]
        note = (
            f"the caption of {first}; {', '.join(others)}, the same poster, has another"
            if others
            else ""
        )
        found[poster_id] = HumanCaption(caption, note)
    return found


# -- writing --------------------------------------------------------------------------------------


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
    sheet: bytes | None
    """The CSV."""
    lines: frozenset[int]
    """Of the rows that give this poster this caption."""


def _standing(place: Place, csv_path: Path, name: str) -> _Standing:
    posters, texts = _split(place.entries())
    if name not in posters:
        raise CaptionRejected(f"{name}: no poster of that name in {place.location}")
    sidecars = _candidates(name, texts)
    facts = _read_sidecars(place, sidecars, None, NoProgress())
    sidecar = next((e for e in sidecars if not facts[source_name(e)]["problem"]), None)
    sheet = _read_bytes(csv_path)
    if sidecar is not None:
        caption = facts[source_name(sidecar)]["caption"]
        owners = [poster for poster in posters if sidecar in _candidates(poster, texts)]
        sharing = tuple(poster for poster in owners if poster != name)
        return _Standing(caption, sidecar, sharing, posters, sheet, frozenset())
    rows = [
        claim
        for poster, claim in _csv_claims(CaptionsCsv(csv_path, sheet), posters)
        if poster == name and not claim.problem
    ]
    caption = rows[0].caption if rows else None
    lines = frozenset(row.line for row in rows if row.caption == caption)
    return _Standing(caption, None, (), posters, sheet, lines)


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
        after = _with_row(csv_path, now.sheet, _Names(now.posters), name, caption)
        return csv_path if _replace(csv_path, now.sheet, after) else None
    folder = _folder(place, name, now.sidecar)
    if now.sharing:
        # The shorter name speaks for other posters as well; they keep it.
        path = folder / f"{name}.txt"
        return path if _replace(path, _read_bytes(path), f"{caption}\n".encode()) else None
    path = folder / now.sidecar.name
    try:
        old = place.read(now.sidecar)
    except SourceChanged:
        return None
    _, encoding = _decode(old)
    return path if _replace(path, old, f"{caption}\n".encode(encoding)) else None


def _try_remove(place: Place, csv_path: Path, name: str, now: _Standing) -> bool:
    """Whether the caption was removed from where it counts; not so where that was changed between
    reading and writing."""
    if now.sidecar is None:
        assert now.sheet is not None
        sheet = _parse(csv_path, now.sheet)
        kept = "".join(record.raw for record in sheet.records if record.line not in now.lines)
        return _replace(csv_path, now.sheet, kept.encode(sheet.encoding))
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


def _with_row(path: Path, data: bytes | None, names: _Names, name: str, caption: str) -> bytes:
    """The CSV with the caption of that poster in its first row for it, or in a row at the end."""
    if data is None or not data.strip():
        heading = _Record(1, "file_name,caption\n", ["file_name", "caption"])
        sheet = _Sheet([heading], "utf-8", ",", 2, 0, 1)
    else:
        sheet = _parse(path, data)
    line_end = "\r\n" if "\r\n" in sheet.records[0].raw else "\n"
    parts = []
    done = False
    rows = {record.line for record in sheet.rows()}
    for record in sheet.records:
        # A row with too many cells does not tell where its caption ends: it stays, and is said.
        fits = record.line in rows and len(record.cells) <= sheet.width
        if not done and fits and names.find(sheet.name(record)) == name:
            parts.append(_line(sheet, record.cells, name, caption, line_end))
            done = True
        else:
            parts.append(record.raw)
    if not done:
        if not parts[-1].endswith(("\n", "\r")):
            parts.append(line_end)
        parts.append(_line(sheet, [], name, caption, line_end))
    return "".join(parts).encode(sheet.encoding)


def _line(sheet: _Sheet, cells: Sequence[str], name: str, caption: str, line_end: str) -> str:
    filled = [*cells, *[""] * (sheet.width - len(cells))]
    filled[sheet.name_column] = filled[sheet.name_column] or name
    filled[sheet.caption_column] = caption
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=sheet.separator, lineterminator=line_end).writerow(filled)
    return buffer.getvalue()


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
    try:
        import fcntl
    except ImportError:  # Windows: `_replace` still notices most of what another one wrote
        yield
        return
    handle = os.open(folder, os.O_RDONLY)  # the folder itself, so that no lock file lies about
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
