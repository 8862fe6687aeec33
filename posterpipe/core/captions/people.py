"""Captions by people: sidecars beside the posters, and `captions.csv`.

What belongs here: reading them, saying which of several counts, and giving them to posters. What
does not: the CSV as a file (`csv_file`), writing a caption from a page or taking it back
(`edits`), captions by the model (`captioner`) and how captions are worded for training
(`training_set`).

A sidecar is a text file beside its poster: `rocket.png.txt`, or `rocket.txt` for every poster of
that stem. A sidecar wins over a row of the CSV, the longer name over the shorter one, an earlier
row over a later one.
"""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from posterpipe.core.captions.csv_file import CaptionsCsv, PosterNames, composed, decode_text, parse
from posterpipe.core.images import UNREADABLE
from posterpipe.core.parallel import parallel_map
from posterpipe.core.posters.landing import EXTENSIONS, list_place
from posterpipe.core.posters.listing import Entry, Place, SourceChanged, source_name, suffix
from posterpipe.core.posters.rereading import CHANGED, Rehash, forget_changed, reread
from posterpipe.core.progress import NO_PROGRESS, Progress
from posterpipe.core.store import Store, cells, compute_missing, content_key

COLUMNS = ["source_name", "caption", "origin", "status", "reason"]

SIDECAR, CSV = "sidecar", "captions.csv"
SIDECAR_SUFFIX = ".txt"
"""Values of the column `origin`."""

MAX_CHARACTERS = 2_000
"""Longer texts are no captions: what models read, 77 tokens, is about 400 characters."""

MAX_BYTES = 20_000
"""Text files above this are not read."""

READ_VERSION = 3
"""Raise it when sidecars or the CSV are read differently: each is then read again."""

_SIDECARS = "sidecar"
REHASHED_SIDECARS = "sidecars_rehashed"
"""Mark of `rehash_sidecars` (see `rereading.rehashed`)."""


class CaptionRejected(ValueError):
    """A text that can be no caption, or a poster that is not there. The message says why."""


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


def read_human_captions(
    place: Place,
    written: CaptionsCsv | None,
    store: Store | None = None,
    progress: Progress = NO_PROGRESS,
    *,
    entries: Sequence[Entry] | None = None,
) -> pd.DataFrame:
    """Every caption by people: a row each, sorted by source_name, the one that counts last.

    Columns: source_name (of the poster, relative to `place`; what the file says where there is no
    such poster), caption, origin (`sidecar` or `captions.csv`), status (`ok`, at most once for a
    source_name, or `rejected`), reason ("" for ok). With neither sidecars nor CSV the table is
    empty. With a `store`, a sidecar that did not change since is not read again. `entries` is the
    listing of the place, where it was taken before; `written` the CSV; without one, sidecars
    alone count.

    Raises CaptionsFileError when the CSV as a whole cannot be read, and PlaceMissing: captions that
    cannot be seen are not taken for captions that were removed.
    """
    posters, texts = _split_all(place.entries() if entries is None else entries)
    claims: dict[str, list[Claim]] = {}
    sidecars = _sidecar_claims(place, posters, texts, store, progress)
    rows_of_csv = csv_claims(written, posters) if written else ()
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
class Claim:
    """A caption that some file gives a poster; `where` names the file, `problem` why it is none."""

    origin: str
    where: str
    caption: str
    problem: str = ""
    line: int = 0
    """Of the CSV."""


def _rows(name: str, claims: Sequence[Claim]) -> list[dict[str, str]]:
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


def _row(name: str, claim: Claim, status: str, reason: str) -> dict[str, str]:
    values = (name, claim.caption, claim.origin, status, reason)
    return dict(zip(COLUMNS, values, strict=True))


def _winner(claims: Iterable[Claim]) -> Claim | None:
    return next((claim for claim in claims if not claim.problem), None)


def posters_and_texts(entries: Iterable[Entry]) -> tuple[list[str], dict[str, Entry]]:
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
        if name.lower().endswith(SIDECAR_SUFFIX):
            texts.setdefault(composed(name[:-4]), []).append(entry)
        elif suffix(name).lower() in EXTENSIONS:
            posters.append(name)
    for same in texts.values():
        same.sort(key=_rank)
    return posters, texts


def _rank(entry: Entry) -> tuple[bool, bool, str]:
    name = source_name(entry)
    return not name.endswith(SIDECAR_SUFFIX), name != composed(name), name


def sidecars_of(poster: str, texts: Mapping[str, Entry]) -> list[Entry]:
    """The sidecars of a poster, the one that counts first; `texts` as of `posters_and_texts`."""
    name = composed(poster)
    stem = posixpath.splitext(name)[0]
    return [texts[key] for key in (name, stem) if key in texts]


def _sidecar_claims(
    place: Place,
    posters: Sequence[str],
    all_texts: Mapping[str, Sequence[Entry]],
    store: Store | None,
    progress: Progress,
) -> Iterator[tuple[str, Claim]]:
    texts = {name: same[0] for name, same in all_texts.items()}
    others = {source_name(same[0]): same[1:] for same in all_texts.values() if len(same) > 1}
    facts = read_sidecars(place, list(texts.values()), store, progress)
    claims = {
        name: Claim(SIDECAR, name, fact["caption"], fact["problem"]) for name, fact in facts.items()
    }
    lonely = set(claims)
    for poster in posters:
        for entry in sidecars_of(poster, texts):
            name = source_name(entry)
            lonely.discard(name)
            yield poster, claims[name]
            for other in others.get(name, ()):
                problem = f"beside {name}, which counts, and for the same poster; keep one"
                yield poster, Claim(SIDECAR, source_name(other), "", problem)
    for name in sorted(lonely):
        problem = "no poster of that name beside it; name it after its poster, or move it away"
        for lone in (name, *map(source_name, others.get(name, ()))):
            yield lone, Claim(SIDECAR, lone, "", problem)


def rehash_sidecars(place: Place, store: Store, progress: Progress = NO_PROGRESS) -> Rehash:
    """Read every sidecar of a place again and compare it with what is known, as `landing.rehash`
    does with posters. Raises LandingEmpty when the place cannot be listed."""
    _, texts = posters_and_texts(list_place(place))
    by_key = _sidecar_keys(place, texts.values())
    known = store.results(_SIDECARS, by_key)

    def read(entry: Entry) -> str:
        fact = _read_sidecar(place, entry)
        if fact["transient"]:
            raise OSError(fact["problem"])
        return content_key(fact)

    facts = {key: content_key(row) for key, row in known.items() if not row["transient"]}
    with progress.task("read captions again", len(by_key), "files") as tick:
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


def read_sidecars(
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
        text, _ = decode_text(place.read(entry))
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


def csv_claims(given: CaptionsCsv, posters: Sequence[str]) -> Iterator[tuple[str, Claim]]:
    """The claims of the rows of the CSV, each with its poster, or what the row says where there is
    no such poster. Raises CaptionsFileError."""
    if given.data is None:
        return
    path = given.path
    sheet = parse(path, given.data)
    names = PosterNames(posters)
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
        yield poster or written.strip(), Claim(CSV, where, caption, problem, record.line)


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
