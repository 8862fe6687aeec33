"""Legibility: whether a reader finds the title on the poster.

What belongs here: reading images (OCR), keeping what was read, and how far that is from the title.
What does not: setting titles in type (`typography`).

The reader is PP-OCRv6 small as RapidOCR packs it, a real pretrained OCR whose weights lie in the
package. What it reads is compared without regard to capitals, signs and spaces, since a title is
set in capitals and broken into lines as the design asks.

It writes Latin letters, digits, Chinese and Japanese, and no others. Of a title in other letters it
would read something else, however well that is set: such a title has no score, and the reason.
"""

from __future__ import annotations

import hashlib
import re
import threading
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from posterpipe.core.images import UNREADABLE
from posterpipe.core.metrics.base import Measurement, Metric, image_files, score_rows
from posterpipe.core.parallel import parallel_map
from posterpipe.core.progress import Progress
from posterpipe.core.store import Store, compute_missing
from posterpipe.core.typography.signs import without_selectors

LEGIBILITY_VERSION = 2
"""Raised when the same image would give other numbers."""

READER_VERSION = 2
"""Raised when the same weights would read otherwise."""

_SIDE = 512
"""Pixels of an image's shorter side when it is read. The detector's own 736 takes twice as long and
reads no title that this misses: letters that can be read from afar are large."""

_DETECTOR, _RECOGNISER = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"

_LONGEST_RUN = 4
"""Lines that a title may be spread over."""

_GREEK = re.compile("[\u0370-\u03e1\u03f0-\u03ff\u1f00-\u1fff]")

_GREEK_READ = "δλω"
"""Of Greek, which the model has for formulas, what it reads in a title set in capitals: others come
out as Latin letters that look like them (Κ as K, Σ as M), or not at all (Π)."""

_LETTERS_NAMED = 12
"""Of those that the reader does not know, in a reason."""


@dataclass(frozen=True)
class Line:
    """One line of text that was read."""

    text: str
    confidence: float
    """0 to 1."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom as shares of width and height."""


class TitleReader:
    """Reads all text on images. Made once, called on batches; needs no network."""

    def __init__(self) -> None:
        self.reader_id = reader_id()
        self._engines = threading.local()

    def __call__(self, images: Iterable[Image.Image]) -> Iterator[list[Line]]:
        """The lines of each image, from top to bottom and from left to right, as they are read; as
        many images at the same time as there are cores."""
        return parallel_map(self._read, images)

    def _engine(self) -> Any:
        """The engine of this thread. One core an image is quicker than all cores for each."""
        if not hasattr(self._engines, "own"):
            from rapidocr import RapidOCR

            runtime = "EngineConfig.onnxruntime"
            self._engines.own = RapidOCR(
                params={
                    "Global.log_level": "critical",
                    # Posters stand upright: a classifier of upside-down lines could only err.
                    "Global.use_cls": False,
                    "Det.limit_type": "min",
                    "Det.limit_side_len": _SIDE,
                    f"{runtime}.intra_op_num_threads": 1,
                    f"{runtime}.inter_op_num_threads": 1,
                }
            )
        return self._engines.own

    def _read(self, image: Image.Image) -> list[Line]:
        rgb = image.convert("RGB")
        factor = _SIDE / min(rgb.size)
        if factor != 1:
            size = (round(rgb.width * factor), round(rgb.height * factor))
            how = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS
            rgb = rgb.resize(size, how)
        pixels = np.ascontiguousarray(np.asarray(rgb)[:, :, ::-1])  # BGR, as OpenCV
        result = self._engine()(pixels)
        if result.txts is None or result.boxes is None:
            return []
        lines = []
        for text, score, corners in zip(result.txts, result.scores, result.boxes, strict=True):
            xs = np.asarray(corners)[:, 0] / rgb.width
            ys = np.asarray(corners)[:, 1] / rgb.height
            box = (float(xs.min()), float(ys.min()), float(xs.max()), float(ys.max()))
            lines.append(Line(str(text), float(score), box))
        return _in_reading_order(lines)


@lru_cache(maxsize=1)
def reader_id() -> str:
    """`rapidocr-<version>.<hash of the weights>`: names reader and weights; loads neither."""
    import rapidocr

    folder = Path(rapidocr.__file__).parent / "models"
    digest = hashlib.sha256()
    for name in (_DETECTOR, _RECOGNISER):
        with open(folder / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"rapidocr-{installed_version('rapidocr')}.{digest.hexdigest()[:8]}"


def _in_reading_order(lines: list[Line]) -> list[Line]:
    """From top to bottom; pieces whose middles lie on one height from left to right."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: (line.box[1] + line.box[3]) / 2):
        middle = (line.box[1] + line.box[3]) / 2
        if rows and rows[-1][0].box[1] < middle < rows[-1][0].box[3]:
            rows[-1].append(line)
        else:
            rows.append([line])
    return [line for row in rows for line in sorted(row, key=lambda line: line.box[0])]


def plain(text: str) -> str:
    """A text as it is compared: compatibility forms and capitals folded, letters and digits only.

    Marks stay where they make other letters (й, が), and go where Latin ones carry accents, which
    small lettering loses.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept: list[str] = []
    for sign in unicodedata.normalize("NFD", without_selectors(folded)):
        kind = unicodedata.category(sign)[0]
        accent = kind == "M" and bool(kept) and kept[-1].isascii()
        if kind in "LN" or (kind == "M" and not accent):
            kept.append(sign)
    return unicodedata.normalize("NFC", "".join(kept))


@lru_cache(maxsize=1)
def reader_letters() -> frozenset[str]:
    """The letters, digits and marks that the reader can write, in their `plain` form: what its
    model names as its own. Reads a file of 20 MB, a tenth of a second."""
    import rapidocr
    from onnxruntime import InferenceSession

    model = Path(rapidocr.__file__).parent / "models" / _RECOGNISER
    session = InferenceSession(str(model), providers=["CPUExecutionProvider"])
    written = session.get_modelmeta().custom_metadata_map["character"].splitlines()
    return frozenset("".join(map(plain, written)))


def unknown_letters(title: str) -> str:
    """The letters of a title that the reader cannot write, in their `plain` form, each once, in
    the order of the title; "" where it can write them all."""
    known = reader_letters()
    letters = plain(title)
    greek = _GREEK.findall(letters)
    unknown = [
        sign
        for sign in letters
        # In a word, too, those that it reads alone come out as Latin.
        if sign not in known or (sign in greek and (len(greek) > 1 or sign not in _GREEK_READ))
    ]
    return "".join(dict.fromkeys(unknown))


def _why_not_measurable(title: str) -> str:
    """Why the reader cannot say whether a title is legible; "" where it can."""
    letters = unknown_letters(title)
    if not letters:
        return ""
    # The first word of a letter's name is its script: HEBREW LETTER SHIN.
    names = (unicodedata.name(sign, "OTHER").split()[0].split("-")[0] for sign in letters)
    scripts = [name if name == "CJK" else name.capitalize() for name in dict.fromkeys(names)]
    shown = letters if len(letters) <= _LETTERS_NAMED else f"{letters[:_LETTERS_NAMED]}…"
    return (
        f"the reader does not know the {' and '.join(scripts)} letters {shown}, so it cannot say "
        "whether the title is legible; look at the poster"
    )


def edit_distance(read: str, title: str) -> float:
    """Normalised edit distance of two texts in their plain form, 0 (equal) to 1.

    Levenshtein's distance over the length of the longer text.
    """
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_distance(plain(read), plain(title)))


def title_distance(lines: Sequence[str], title: str) -> float:
    """Distance of a title from where it is read best, 0 (it stands there) to 1 (nothing like it).

    Lines come in reading order; the title may be one of them or run over up to four that follow
    each other, so that credits and other lines do not count against it. Raises ValueError for a
    title without letters or digits.
    """
    if not plain(title):
        raise ValueError(f"the title {title!r} has no letters to read; give one that has")
    best = 1.0
    for start in range(len(lines)):
        for stop in range(start + 1, min(start + _LONGEST_RUN, len(lines)) + 1):
            best = min(best, edit_distance("".join(lines[start:stop]), title))
    return best


def legibility_metrics(where: str, lettering: str = "") -> tuple[Metric, Metric]:
    """Edit distance and exact match. `where`: `drawn` for images as the model drew them, `set` for
    those with the title set in type.

    `lettering`: `typography.lettering_id` of titles that are set. A generation's key does not know
    how its title is set, and a score of another setting is another number.
    """
    if (where == "set") != bool(lettering):
        raise ValueError(f"where is {where!r} and lettering {lettering!r}: give it with 'set' only")
    told = {"drawn": "as the model drew it", "set": "with the title set in type"}[where]
    how = f".{lettering}" if lettering else ""
    tail = f"{where}.{reader_id()}{how}.v{LEGIBILITY_VERSION}"
    shared = {
        "encoder": "PP-OCRv6 small",
        "revision": reader_id(),
        "preprocessing": f"shorter side of {_SIDE} pixels",
        "version": LEGIBILITY_VERSION,
    }
    return (
        Metric(
            metric_id=f"title_distance.{tail}",
            name=f"title edit distance, {where}",
            description=f"normalised edit distance of what is read {told} from the expected title, "
            "0 to 1; 0 is the title",
            **shared,  # type: ignore[arg-type]
        ),
        Metric(
            metric_id=f"title_exact.{tail}",
            name=f"title exact, {where}",
            description=f"1 where the expected title is read {told}, else 0",
            **shared,  # type: ignore[arg-type]
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Legibility(Measurement):
    """What reading the titles of images gave."""

    read: pd.DataFrame
    """One row a scored image: generation_key, title, read (lines, joined by " / "), distance,
    exact."""
    unknown: dict[str, str]
    """Why the reader cannot say whether a title is legible, by title."""


def measure_legibility(
    store: Store, images: pd.DataFrame, where: str, progress: Progress, *, lettering: str = ""
) -> Legibility:
    """Edit distance and exact match of the titles of `images`.

    `images` has the columns generation_key, image (content hash), image_path (in the store), title,
    status and reason: the table of generations, or of titled posters. `where` and `lettering` as
    for `legibility_metrics`. Rows without a title have no score; those whose title has letters that
    the reader does not know are blocked, with the reason, and are not read. What was read is kept,
    so that another title reads no image again.
    """
    distance_metric, exact_metric = metrics = legibility_metrics(where, lettering)
    titled = _titled(images)
    unknown = _not_measurable(titled)
    hidden = (titled["status"] == "ok") & titled["title"].isin(unknown)
    titled = titled.assign(
        status=titled["status"].mask(hidden, "blocked"),
        reason=titled["reason"].mask(hidden, titled["title"].map(unknown)),
    )
    drawn = titled[titled["status"] == "ok"]
    read, unreadable = _readings(store, image_files(store, drawn), progress)
    distances: dict[str, float] = {}
    failures: dict[str, str] = {}
    rows = []
    for row in drawn.itertuples(index=False):
        key, image, title = str(row.generation_key), str(row.image), str(row.title)
        if image not in read:
            failures[key] = unreadable.get(image, "not read")
            continue
        distances[key] = title_distance(read[image], title)
        rows.append((key, title, " / ".join(read[image]), distances[key], distances[key] == 0))
    exact = {key: float(value == 0) for key, value in distances.items()}
    scores = pd.concat(
        [
            score_rows(titled, distance_metric.metric_id, distances, failures),
            score_rows(titled, exact_metric.metric_id, exact, failures),
        ],
        ignore_index=True,
    )
    columns = ["generation_key", "title", "read", "distance", "exact"]
    return Legibility(
        metrics=list(metrics),
        scores=scores,
        read=pd.DataFrame(rows, columns=columns),
        unknown=unknown,
    )


def of_all_titles(images: pd.DataFrame, read: pd.DataFrame) -> pd.DataFrame:
    """What was read of every image with a title, so that shares are of all of them.

    `images` as `measure_legibility` takes them, `read` as of `Legibility`. One row an image:
    generation_key, title, status (ok, blocked or failed), read, distance, exact, and measurable:
    whether the reader knows the title's letters. One that was not read has no distance and is not
    exact.
    """
    titled = _titled(images)[["generation_key", "title", "status"]]
    measurable = ~titled["title"].isin(_not_measurable(titled))
    hidden = (titled["status"] == "ok") & ~measurable
    titled = titled.assign(
        status=titled["status"].mask(hidden, "blocked"), measurable=measurable.astype(bool)
    )
    table = titled.merge(read.drop(columns="title"), on="generation_key", how="left")
    unread = table["read"].isna()
    return table.assign(
        status=table["status"].mask(unread & (table["status"] == "ok"), "failed"),
        read=table["read"].fillna(""),
        distance=table["distance"].astype(float),
        exact=table["exact"].eq(True),
    )


def _titled(images: pd.DataFrame) -> pd.DataFrame:
    # As booleans also where there is no row: no rows of another type would be read as column names.
    return images[images["title"].map(lambda title: bool(plain(str(title)))).astype(bool)]


def _not_measurable(titled: pd.DataFrame) -> dict[str, str]:
    """Why the reader cannot say whether a title is legible, by title."""
    reasons = {title: _why_not_measurable(str(title)) for title in titled["title"].unique()}
    return {title: reason for title, reason in reasons.items() if reason}


def _readings(
    store: Store, files: dict[str, Path], progress: Progress
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Lines by content hash, and why an image has none."""
    unreadable: dict[str, str] = {}

    def compute(missing: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        reader = TitleReader()

        keys: deque[str] = deque()

        def opened() -> Iterator[Image.Image]:
            for key in missing:
                try:
                    with Image.open(files[key]) as image:
                        image.load()
                except (OSError, SyntaxError) as error:
                    unreadable[key] = (
                        f"{files[key]}: {UNREADABLE} ({error}); materialize the assets that "
                        "make it again"
                    )
                    tick()
                else:
                    keys.append(key)
                    yield image

        with progress.task(f"Reading {len(missing)} images", len(missing), "images") as tick:
            for lines in reader(opened()):
                yield keys.popleft(), {"lines": [[line.text, line.confidence] for line in lines]}
                tick()

    kind = f"ocr.{reader_id()}.v{READER_VERSION}"
    rows = compute_missing(store, kind, list(files), compute)
    return {key: [str(text) for text, _ in row["lines"]] for key, row in rows.items()}, unreadable
