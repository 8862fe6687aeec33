"""`captions.csv`: the file as people and spreadsheets write it.

What belongs here: its bytes and text, its records, which poster a record names, and the file with a
caption put in or taken out. What does not: which caption counts (`people`) and saving the file
(`edits`).

It has the columns file_name (path inside the landing folder) and caption; other columns are left
alone.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import posixpath
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path


class CaptionsFileError(Exception):
    """`captions.csv` cannot be used. The message names file and line, and says what to do."""


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
    return CaptionsCsv(path, read_bytes(path))


def read_bytes(path: Path) -> bytes | None:
    """The bytes of a file of captions, None where there is none. Raises CaptionsFileError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CaptionsFileError(
            f"{path}: cannot be read ({error.strerror}); make it a readable file, or set "
            "POSTERPIPE_CAPTIONS to another one"
        ) from error


def decode_text(data: bytes) -> tuple[str, str]:
    """The text and the encoding that gives the same bytes back. Raises UnicodeDecodeError."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16"), "utf-16"  # what some editors call "Unicode"
    encoding = "utf-8-sig" if data.startswith(codecs.BOM_UTF8) else "utf-8"
    return data.decode(encoding), encoding


# -- names ----------------------------------------------------------------------------------------


def composed(name: str) -> str:
    """macOS hands out file names decomposed, while people type them composed."""
    return unicodedata.normalize("NFC", name)


class PosterNames:
    """Names of posters, found as people type them."""

    def __init__(self, posters: Sequence[str]) -> None:
        self._exact = frozenset(posters)
        self._composed = {composed(name): name for name in posters}
        self._loose = {name.casefold(): poster for name, poster in self._composed.items()}
        self._last = {posixpath.basename(name): name for name in posters}

    def find(self, written: str) -> str | None:
        """The poster of that name; spaces around it, `./` and `\\` for `/` are allowed."""
        if written in self._exact:
            return written
        plain = composed(written.strip())
        path = plain.replace("\\", "/").removeprefix("./")
        return self._composed.get(plain) or self._composed.get(path)

    def hint(self, written: str) -> str:
        """What may have been meant, for the end of a sentence."""
        plain = composed(written.strip())
        meant = self._loose.get(plain.casefold()) or self._last.get(posixpath.basename(plain))
        return f"; is it {meant}?" if meant else "; correct it, or put the poster in"


# -- records --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One record of the CSV: the line on which it starts (from 1), as it is written, its cells."""

    line: int
    raw: str
    cells: list[str]


@dataclass(frozen=True)
class Sheet:
    """The whole CSV; the heading is the first of the records that are not blank."""

    records: list[Record]
    encoding: str
    separator: str
    width: int
    name_column: int
    caption_column: int

    def rows(self) -> list[Record]:
        """The records below the heading."""
        return [record for record in self.records if record.cells][1:]

    def name(self, record: Record) -> str:
        """The file name that a record gives, "" for none."""
        return record.cells[self.name_column] if len(record.cells) > self.name_column else ""


def parse(path: Path, data: bytes) -> Sheet:
    """Raises CaptionsFileError where the file is no such CSV."""
    try:
        text, encoding = decode_text(data)
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
    return Sheet(records, encoding, separator, len(names), *columns)


_NAMED_SEPARATOR = re.compile(r"\s*sep=([^\s\"]|\t)\s*", re.IGNORECASE)
"""The line with which Excel is told how a file is separated."""


def _separator(text: str) -> str:
    """Comma; or semicolon or tab, which Excel writes in many languages, where the heading has them
    and no comma."""
    heading = next((line for line in io.StringIO(text) if line.strip()), "")
    if named := _NAMED_SEPARATOR.fullmatch(heading):
        return named[1]
    return next((mark for mark in ",;\t" if mark in heading), ",")


def _records(path: Path, text: str, separator: str) -> list[Record]:
    # Not str.splitlines: it also splits at characters that are no line ends in a CSV.
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, strict=True, delimiter=separator)
    records = []
    start = 0
    try:
        for cells in reader:
            raw = "".join(lines[start : reader.line_num])
            blank = not any(cell.strip() for cell in cells) or _NAMED_SEPARATOR.fullmatch(raw)
            records.append(Record(start + 1, raw, [] if blank else cells))
            start = reader.line_num
    except csv.Error as error:
        raise CaptionsFileError(
            f"{path}:{start + 1}: {error}; put cells with commas or quotes into double quotes, and "
            "write quotes inside them twice"
        ) from error
    return records


# -- another CSV ----------------------------------------------------------------------------------


def with_caption(given: CaptionsCsv, names: PosterNames, name: str, caption: str) -> bytes:
    """The CSV with the caption of that poster in its first row for it, or in a row at the end.
    Raises CaptionsFileError."""
    if given.data is None or not given.data.strip():
        heading = Record(1, "file_name,caption\n", ["file_name", "caption"])
        sheet = Sheet([heading], "utf-8", ",", 2, 0, 1)
    else:
        sheet = parse(given.path, given.data)
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


def _line(sheet: Sheet, cells: Sequence[str], name: str, caption: str, line_end: str) -> str:
    filled = [*cells, *[""] * (sheet.width - len(cells))]
    filled[sheet.name_column] = filled[sheet.name_column] or name
    filled[sheet.caption_column] = caption
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=sheet.separator, lineterminator=line_end).writerow(filled)
    return buffer.getvalue()


def without_lines(given: CaptionsCsv, lines: Collection[int]) -> bytes:
    """The CSV, which has to be there, without the records that start on these lines. Raises
    CaptionsFileError."""
    assert given.data is not None
    sheet = parse(given.path, given.data)
    kept = "".join(record.raw for record in sheet.records if record.line not in lines)
    return kept.encode(sheet.encoding)
