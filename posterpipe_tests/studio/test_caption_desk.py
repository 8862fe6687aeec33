"""Posters with their captions: what is shown, what is flagged, and that no edit is lost."""

from __future__ import annotations

import io
import multiprocessing
import shutil
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from posterpipe.core.captions.edits import CaptionConflict
from posterpipe.core.posters.landing import scan
from posterpipe.core.posters.listing import PlaceMissing, open_place
from posterpipe.core.progress import NoProgress
from posterpipe.core.store import Store
from posterpipe.settings import Settings
from posterpipe.studio import caption_desk
from posterpipe.studio.caption_desk import CaptionDesk, Captioned, small_picture

LONG = "a very long caption of " + " and ".join(f"thing {n}" for n in range(40))


@pytest.fixture(autouse=True)
def looks_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_desk, "LOOKED_SECONDS", 0.0)


def captioned(settings: Settings, source: str = "model", **captions: str) -> None:
    """What the pipeline leaves: the tables of posters and captions."""
    store = Store(settings.path(settings.store))
    posters = scan(open_place(settings.landing), settings.images, store, NoProgress())
    store.write_table("raw_posters", posters)
    rows = [
        {"poster_id": poster_id, "caption": captions[Path(name).stem], "source": source,
         "model": "blip", "revision": "x", "status": "ok", "reason": ""}
        for name, poster_id in zip(posters["source_name"], posters["poster_id"], strict=True)
        if Path(name).stem in captions
    ]  # fmt: skip
    store.write_table("poster_captions", pd.DataFrame(rows))


def by_name(desk: CaptionDesk) -> dict[str, Captioned]:
    return {row.name: row for row in desk.rows()}


def test_before_the_pipeline_ran_every_poster_is_there_without_caption(
    deployment: Settings,
) -> None:
    rows = by_name(CaptionDesk(deployment))
    assert sorted(rows) == ["four.png", "one.png", "three.png", "two.png"]
    assert {row.source for row in rows.values()} == {"none"}
    assert rows["one.png"].flags == ("No caption yet.",)
    assert not deployment.path(deployment.store).exists()


def test_a_persons_caption_stands_before_the_machines_and_what_is_odd_is_flagged(
    deployment: Settings,
) -> None:
    captioned(deployment, one="a red sheet", two="a a a a a a", three="a blue sheet", four=LONG)
    desk = CaptionDesk(deployment)
    assert [row.source for row in desk.rows()] == ["machine"] * 4
    path = desk.save("one.png", "a  blue sheet", seen=None)
    assert path == deployment.path(deployment.captions)
    rows = by_name(desk)
    assert (rows["one.png"].caption, rows["one.png"].source) == ("a blue sheet", "human")
    assert rows["one.png"].machine == "a red sheet" and not rows["one.png"].trained_on
    assert rows["three.png"].trained_on
    assert any("repeats itself" in flag for flag in rows["two.png"].flags)
    assert any("longer than" in flag for flag in rows["four.png"].flags)
    assert "1 other poster has the same caption." in rows["one.png"].flags


def test_a_caption_taken_back_is_the_captioners_again(deployment: Settings) -> None:
    captioned(deployment, one="a red sheet")
    desk = CaptionDesk(deployment)
    desk.save("one.png", "mine", seen=None)
    assert desk.take_back("one.png", seen="mine") is None
    row = by_name(desk)["one.png"]
    assert (row.caption, row.source, row.written) == ("a red sheet", "machine", None)


def test_a_caption_that_the_pipeline_had_taken_up_is_gone_when_it_is_taken_back(
    deployment: Settings,
) -> None:
    landing = Path(str(deployment.landing))
    shutil.copy(landing / "one.png", landing / "copy.png")
    captioned(deployment, source="human", one="mine", copy="mine", two="mine too")
    desk = CaptionDesk(deployment)
    desk.save("one.png", "mine", seen=None)
    desk.save("two.png", "mine too", seen=None)
    assert {by_name(desk)[name].source for name in ("one.png", "copy.png", "two.png")} == {"human"}
    desk.take_back("two.png", seen="mine too")
    rows = by_name(desk)
    assert (rows["two.png"].caption, rows["two.png"].source) == ("", "none")
    assert caption_desk.TAKEN_BACK in rows["two.png"].flags
    # The same poster under another name has its caption still.
    assert (rows["copy.png"].caption, rows["copy.png"].source) == ("mine", "human")


def test_a_sidecar_beside_the_poster_is_where_its_caption_goes(deployment: Settings) -> None:
    sidecar = Path(str(deployment.landing)) / "two.txt"
    sidecar.write_text("a green sheet\n", encoding="utf-8")
    desk = CaptionDesk(deployment)
    assert by_name(desk)["two.png"].written == "a green sheet"
    assert desk.save("two.png", "a greener sheet", seen="a green sheet") == sidecar
    assert sidecar.read_text(encoding="utf-8") == "a greener sheet\n"


def test_the_second_of_two_writers_is_told_what_the_first_wrote(deployment: Settings) -> None:
    first, second = CaptionDesk(deployment), CaptionDesk(deployment)
    first.save("one.png", "the first's words", seen=by_name(first)["one.png"].written)
    with pytest.raises(CaptionConflict) as conflict:
        second.save("one.png", "the second's words", seen=None)
    assert conflict.value.current == "the first's words"
    assert by_name(second)["one.png"].caption == "the first's words"
    second.save("one.png", "the second's words", seen="the first's words")
    assert by_name(first)["one.png"].caption == "the second's words"


def write_often(settings: Settings, writer: str, names: list[str]) -> None:
    """Adds its mark to the caption of each poster, as a careful person does: looks again when told
    of a conflict."""
    desk = CaptionDesk(settings)
    for name in names:
        seen = next(row.written for row in desk.rows() if row.name == name)
        while True:
            try:
                desk.save(name, f"{seen or 'marks'} {writer}", seen=seen)
                break
            except CaptionConflict as conflict:
                seen = conflict.current


def test_of_many_writers_in_processes_and_threads_none_loses_a_word(
    deployment: Settings,
) -> None:
    names = sorted(by_name(CaptionDesk(deployment)))
    fork = multiprocessing.get_context("fork")
    workers: list[Any] = [
        fork.Process(target=write_often, args=(deployment, f"p{n}", names)) for n in range(3)
    ]
    workers += [
        threading.Thread(target=write_often, args=(deployment, f"t{n}", names)) for n in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    for row in CaptionDesk(deployment).rows():
        assert sorted(row.caption.split()) == ["marks", "p0", "p1", "p2", "t0", "t1", "t2"]


def test_a_missing_folder_is_told(deployment: Settings) -> None:
    nowhere = deployment.model_copy(update={"landing": deployment.root / "nowhere"})
    with pytest.raises(PlaceMissing, match="nowhere"):
        CaptionDesk(nowhere).rows()


def test_pictures_are_small_and_what_is_none_is_none(deployment: Settings) -> None:
    desk = CaptionDesk(deployment)
    picture = desk.picture("one.png")
    assert picture is not None and picture.startswith(b"\x89PNG")
    assert desk.picture("gone.png") is None
    assert small_picture(b"\x89PNG not really", 10**6) is None
    assert small_picture((Path(str(deployment.landing)) / "one.png").read_bytes(), 100) is None


def test_a_picture_looks_as_the_training_image_does() -> None:
    turned = Image.new("RGBA", (900, 600), (255, 0, 0, 0))  # nothing of the red is to be seen
    exif = Image.Exif()
    exif[0x0112] = 6
    saved = io.BytesIO()
    turned.save(saved, "PNG", exif=exif)
    small = small_picture(saved.getvalue(), 10**6)
    assert small is not None
    with Image.open(io.BytesIO(small)) as picture:
        assert picture.size == (360, 540)
        assert picture.getextrema() == ((255, 255),) * 3
