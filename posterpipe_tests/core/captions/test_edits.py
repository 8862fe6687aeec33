"""Captions by people, saved and taken back without losses."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path

import pytest

from posterpipe.core.captions import edits as module
from posterpipe.core.captions.csv_file import CaptionsFileError
from posterpipe.core.captions.edits import CaptionConflict, write_human_caption
from posterpipe.core.captions.people import CaptionRejected
from posterpipe.core.posters.listing import Folder
from posterpipe_tests.core.captions.test_people import Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_the_first_caption_creates_the_csv(project: Project) -> None:
    assert project.write("cat.png", 'a "fat", grey\ncat', None) == project.csv.resolve()
    assert project.csv.read_bytes() == b'file_name,caption\ncat.png,"a ""fat"", grey cat"\n'
    assert project.accepted() == {"cat.png": 'a "fat", grey cat'}


def test_all_else_in_the_csv_stays_byte_for_byte(project: Project) -> None:
    before = (
        "\ufefffile_name,caption,by\r\n"
        "dog.png,gone but kept,me\r\n"
        "\r\n"
        'rocket.png,"a rocket,\nred",me\r\n'
        " cat.png ,old,you\r\n"
        "tree.jpg,too, many, cells\r\n"
        "cat.png,second row,them"
    )
    project.csv.write_bytes(before.encode())
    project.csv.chmod(0o640)
    project.write("cat.png", "new", "old")
    after = project.csv.read_bytes().decode()
    assert after == before.replace(" cat.png ,old,you", " cat.png ,new,you")
    project.write("tree.jpg", "a tree", None)
    assert project.csv.read_bytes().decode() == after + "\r\ntree.jpg,a tree,\r\n"
    assert project.accepted() == {
        "cat.png": "new",
        "rocket.png": "a rocket, red",
        "tree.jpg": "a tree",
    }
    assert project.csv.stat().st_mode & 0o777 == 0o640


def test_an_empty_row_is_filled_where_it_stands(project: Project) -> None:
    project.csv.write_text("caption,file_name\n,cat.png\nx,tree.jpg\n", "utf-8")
    project.write("cat.png", "a cat", None)
    assert project.csv.read_text("utf-8") == "caption,file_name\na cat,cat.png\nx,tree.jpg\n"


def test_a_caption_that_stands_in_a_sidecar_is_changed_there(project: Project) -> None:
    project.sidecar("cat.txt", "old")
    assert project.write("cat.png", "new", "old") == project.landing / "cat.txt"
    assert (project.landing / "cat.txt").read_text("utf-8") == "new\n"
    assert not project.csv.exists()


def test_a_sidecar_that_several_posters_share_is_left_to_the_others(project: Project) -> None:
    project.poster("cat.jpg")
    project.sidecar("cat.txt", "both")
    project.write("cat.png", "only this", "both")
    assert project.accepted() == {"cat.jpg": "both", "cat.png": "only this"}


@pytest.mark.parametrize("name", ["back\\slash.png", " spaces .png", "new\nline.png", '"q",.png'])
def test_what_is_written_for_a_name_is_read_for_that_name(project: Project, name: str) -> None:
    project.poster(name)
    project.poster(name.strip())
    project.write(name, "odd", None)
    project.write(name, "odder", "odd")
    assert project.accepted() == {name: "odder"}
    assert len(project.csv.read_text("utf-8").split("odd")) == 2


@pytest.mark.parametrize("seen", [None, "older"])
def test_a_caption_changed_meanwhile_is_not_overwritten(project: Project, seen: str | None) -> None:
    project.write("cat.png", "theirs", None)
    before = project.csv.read_bytes()
    with pytest.raises(CaptionConflict, match="theirs") as caught:
        project.write("cat.png", "mine", seen)
    assert caught.value.current == "theirs"
    assert project.csv.read_bytes() == before
    project.write("cat.png", "mine", caught.value.current)
    assert project.accepted() == {"cat.png": "mine"}


def test_a_caption_removed_meanwhile_is_a_conflict_too(project: Project) -> None:
    with pytest.raises(CaptionConflict, match="it is gone") as caught:
        project.write("cat.png", "mine", "theirs")
    assert caught.value.current is None


def test_a_row_that_an_editor_saves_in_the_same_instant_is_kept(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.csv.write_text("file_name,caption\n", "utf-8")
    replace = module._replace
    saved: list[Path] = []

    def editor_first(path: Path, before: bytes | None, after: bytes | None) -> bool:
        if not saved:
            saved.append(path)
            project.csv.write_text("file_name,caption\ntree.jpg,by editor\n", "utf-8")
        return replace(path, before, after)

    monkeypatch.setattr(module, "_replace", editor_first)
    project.write("cat.png", "a cat", None)
    assert project.accepted() == {"cat.png": "a cat", "tree.jpg": "by editor"}


@pytest.mark.parametrize(("name", "caption"), [("dog.png", "a dog"), ("cat.png", "  ")])
def test_an_unknown_poster_and_an_empty_caption_are_refused(
    project: Project, name: str, caption: str
) -> None:
    with pytest.raises(CaptionRejected):
        project.write(name, caption, None)
    assert not project.csv.exists()


def test_a_damaged_csv_is_not_written(project: Project) -> None:
    project.csv.write_bytes(b"name,words\n")
    with pytest.raises(CaptionsFileError, match=":1: "):
        project.write("cat.png", "a cat", None)
    assert project.csv.read_bytes() == b"name,words\n"


def save_many(root: Path, writer: int, count: int) -> None:
    """What one process of the test below does: its own posters, one after the other."""
    place = Folder(root / "landing")
    for number in range(count):
        name = f"w{writer}-{number}.png"
        write_human_caption(place, root / "captions.csv", name, f"caption of {name}", seen=None)


def test_writers_at_the_same_time_lose_no_row(project: Project, tmp_path: Path) -> None:
    writers, count = 3, 8
    names = [f"w{writer}-{number}.png" for writer in range(writers) for number in range(count)]
    for name in names:
        project.poster(name)
    context = multiprocessing.get_context("spawn")
    workers: list[threading.Thread | multiprocessing.process.BaseProcess] = [
        threading.Thread(target=save_many, args=(tmp_path, 0, count)),
        threading.Thread(target=save_many, args=(tmp_path, 1, count)),
        context.Process(target=save_many, args=(tmp_path, 2, count)),
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert project.accepted() == {name: f"caption of {name}" for name in names}
    assert not list(tmp_path.glob(".*"))


def test_a_caption_taken_back_leaves_all_else_in_the_csv_byte_for_byte(project: Project) -> None:
    kept = ["\ufefffile_name,caption,by\r\n", "rocket.png,a rocket,me\r\n", "\r\n"]
    gone = [" cat.png ,a cat,you\r\n", "cat.png,a  cat,them"]
    project.csv.write_bytes("".join([*kept[:2], gone[0], kept[2], gone[1]]).encode())
    assert project.remove("cat.png", "a cat") is None
    assert project.csv.read_bytes().decode() == "".join(kept)
    assert project.accepted() == {"rocket.png": "a rocket"}
    assert project.remove("rocket.png", "a rocket") is None
    assert project.accepted() == {} and project.rejected() == {}


def test_a_caption_taken_back_goes_from_the_text_file_and_from_the_csv(project: Project) -> None:
    project.sidecar("cat.png.txt", "a cat\n")
    project.csv.write_text("file_name,caption\ncat.png,a cat\n", "utf-8")
    assert project.remove("cat.png", "a cat") is None
    assert not (project.landing / "cat.png.txt").exists()
    assert project.csv.read_text("utf-8") == "file_name,caption\n"


def test_other_words_than_those_taken_back_stay_and_are_told(project: Project) -> None:
    project.sidecar("cat.txt", "a cat")
    project.csv.write_text("file_name,caption\ncat.png,a tomcat\n", "utf-8")
    assert project.remove("cat.png", "a cat") == "a tomcat"
    assert project.accepted() == {"cat.png": "a tomcat"}


def test_what_was_changed_meanwhile_or_is_shared_is_not_taken_back(project: Project) -> None:
    project.poster("cat.jpg")
    project.sidecar("cat.txt", "both")
    with pytest.raises(CaptionConflict) as caught:
        project.remove("cat.png", "older")
    assert caught.value.current == "both"
    with pytest.raises(CaptionRejected, match="which speaks for"):
        project.remove("cat.png", "both")
    assert project.accepted() == {"cat.jpg": "both", "cat.png": "both"}
    project.write("cat.png", "only this", "both")
    assert project.remove("cat.png", "only this") == "both"
    # Nor where a text file of its own says the same words.
    project.write("cat.png", "both", "both")
    project.sidecar("cat.png.txt", "both")
    assert project.remove("cat.png", "both") == "both"
    assert not (project.landing / "cat.png.txt").exists()
