"""A folder with every kind of bad file: none stops the batch, and each ends in the right status.

The files are those of `torture`; they are scanned and resized once, together, and each kind is a
test of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from posterpipe.core.gallery import contact_sheet
from posterpipe.core.images import resize_posters
from posterpipe.core.posters.landing import scan
from posterpipe.core.posters.listing import Folder
from posterpipe.core.store import Store
from posterpipe.settings import ImageSettings
from posterpipe_tests.core.torture import (
    MAX_PIXELS,
    MIN_SIDE,
    QUADRANTS,
    Case,
    Colour,
    cases,
    encoded,
    quadrants,
    write_all,
)

SETTINGS = ImageSettings(width=64, height=96, min_side=MIN_SIDE, max_pixels=MAX_PIXELS)
CASES = cases()
REMEDY = re.compile(r"\b(export|copy|remove|make|raise|use|materialize)\b")


@dataclass(frozen=True)
class Batch:
    """What became of all files: rows of `raw_posters` by name, of `resized_posters` by poster."""

    store: Store
    posters: pd.DataFrame
    rows: dict[str, dict[str, Any]]
    resized: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The landing folder with one file of each kind."""
    path = tmp_path_factory.mktemp("torture") / "landing"
    path.mkdir()
    write_all(path, CASES)
    yield path
    for locked in ("locked", "locked/inside.png", "forbidden.png"):
        (path / locked).chmod(0o700)


@pytest.fixture(scope="module")
def batch(folder: Path) -> Batch:
    """One scan and one resizing of all of them."""
    store = Store(folder.parent / "store")
    posters = scan(Folder(folder), SETTINGS, store)
    resized = resize_posters(store, posters, SETTINGS)
    return Batch(store, posters, _by(posters, "source_name"), _by(resized, "poster_id"))


def _by(table: pd.DataFrame, column: str) -> dict[str, dict[str, Any]]:
    return {str(row[column]): row for row in table.to_dict("records")}  # type: ignore[misc]


def _middles(image: Image.Image) -> list[Colour]:
    """The colours in the middle of the four quadrants."""
    width, height = image.size
    places = [(x * width // 4, y * height // 4) for y in (1, 3) for x in (1, 3)]
    return [image.getpixel(place) for place in places]  # type: ignore[misc]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind.replace(" ", "_"))
def test_each_kind_ends_in_the_right_status(batch: Batch, case: Case) -> None:
    row = batch.rows.get(case.source_name)
    if case.status is None:
        assert row is None
        return
    assert row is not None
    assert (row["status"], row["reason"]) == (case.status, row["reason"])
    assert re.search(case.reason, row["reason"], re.DOTALL), row["reason"]
    image = batch.resized.get(row["poster_id"])
    if case.status == "rejected":
        assert REMEDY.search(row["reason"]), row["reason"]
        assert image is None
    if case.status != "ok":
        return
    assert row["reason"] == ""
    assert image is not None
    assert (image["status"], image["reason"]) == ("ok", "")
    with Image.open(batch.store.path(image["image"], ".png")) as training_image:
        assert (training_image.mode, training_image.size) == ("RGB", (64, 96))
        found = _middles(training_image)
    if case.look is not None:
        distance = np.abs(np.array(found, dtype=int) - np.array(case.look)).max()
        assert distance <= case.tolerance, f"{found}, not {case.look}"


def test_there_are_many_kinds_and_no_row_without_one(batch: Batch) -> None:
    assert len(CASES) >= 60
    assert len({case.kind for case in CASES}) == len(CASES)
    assert len({case.path for case in CASES}) == len(CASES)
    assert set(batch.rows) == {case.source_name for case in CASES if case.status is not None}


def test_the_tables_can_be_kept(batch: Batch) -> None:
    version = batch.store.write_table("raw_posters", batch.posters)
    kept = batch.store.read_table("raw_posters", version)
    assert list(kept["source_name"]) == list(batch.posters["source_name"])


def test_what_is_usable_can_be_shown(batch: Batch, tmp_path: Path) -> None:
    missing = contact_sheet([(tmp_path / "gone.png", "")])
    usable = [case for case in CASES if case.status == "ok"]
    for case in usable:
        poster = batch.store.path(batch.rows[case.source_name]["poster_id"])
        assert contact_sheet([(poster, "")]) != missing, case.kind
    assert usable


def test_a_second_scan_says_the_same(folder: Path, batch: Batch) -> None:
    assert scan(Folder(folder), SETTINGS, batch.store).equals(batch.posters)


def test_bytes_that_a_scan_refused_do_not_stop_the_resizing(folder: Path, tmp_path: Path) -> None:
    """Resizing may meet what no scan would let through: a store of an earlier version, say."""
    store = Store(tmp_path)
    bad = {
        store.put((folder / case.path).read_bytes()): case.kind
        for case in CASES
        if case.status == "rejected" and (folder / case.path).is_file()
    }
    good = store.put(encoded(quadrants(), "PNG"))
    table = pd.DataFrame({"poster_id": [*bad, good], "status": "ok"})
    resized = _by(resize_posters(store, table, SETTINGS), "poster_id")
    assert resized[good]["status"] == "ok"
    # Resizing itself knows no smallest side, and takes no notice of extensions.
    unwelcome = re.compile(r"x\d+ pixels$|extension|file called")
    for poster_id, kind in bad.items():
        if not unwelcome.search(kind):
            assert resized[poster_id]["status"] == "failed", kind
            assert REMEDY.search(resized[poster_id]["reason"]), kind


@pytest.mark.skipif(not hasattr(os, "fork"), reason="another user is tried in a forked process")
def test_what_may_not_be_read_is_a_row(batch: Batch) -> None:
    """As root this is tried as the user "nobody", since root may read everything."""
    # Outside of pytest's own folders, which nobody else may enter.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "landing"
        folder.mkdir()
        for number, path in enumerate(("good.png", "forbidden.png", "locked/inside.png")):
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(encoded(quadrants(size=(96 + number, 144)), "PNG"))
        folder.parent.chmod(0o755)
        folder.chmod(0o755)
        (folder / "good.png").chmod(0o644)
        (folder / "forbidden.png").chmod(0)
        (folder / "locked").chmod(0)
        try:
            found = _as_nobody(folder)
        finally:
            (folder / "locked").chmod(0o700)
            shutil.rmtree(folder)
    assert {name: status for name, (status, _) in found.items()} == {
        "good.png": "ok",
        "forbidden.png": "rejected",
        "locked": "rejected",
    }
    for name in ("forbidden.png", "locked"):
        assert "Permission denied" in found[name][1]
        assert "make it readable" in found[name][1]


def _as_nobody(folder: Path) -> dict[str, tuple[str, str]]:
    """Status and reason of each row of a scan that runs without root's rights."""
    if os.geteuid() != 0:
        return _statuses(folder)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.write(writer, json.dumps(_statuses(folder)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    return json.loads(data)


def _statuses(folder: Path) -> dict[str, tuple[str, str]]:
    with tempfile.TemporaryDirectory() as own:  # nobody may write beside the folder
        rows = scan(Folder(folder), SETTINGS, Store(Path(own))).to_dict("records")
    return {str(row["source_name"]): (str(row["status"]), str(row["reason"])) for row in rows}


def test_every_orientation_is_told_from_the_others() -> None:
    """The quadrants are what they are for: no turned or mirrored picture looks like another."""
    pictures = [quadrants(), *(quadrants().transpose(turn) for turn in Image.Transpose)]
    assert len({tuple(_middles(picture)) for picture in pictures}) == 8
    assert _middles(quadrants()) == list(QUADRANTS)
