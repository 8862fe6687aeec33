"""Captions by people: read whatever they wrote, and said what counts."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pandas as pd
import pytest

from posterpipe.core.captions.csv_file import CaptionsFileError, read_csv
from posterpipe.core.captions.edits import remove_human_caption, write_human_caption
from posterpipe.core.captions.people import (
    COLUMNS,
    CaptionRejected,
    captions_by_poster,
    read_human_captions,
    unread_count,
)
from posterpipe.core.posters.listing import Entry, Folder, PlaceMissing, open_place
from posterpipe.core.store import Store


class Project:
    """A landing folder with three posters, and a CSV that is not there yet."""

    def __init__(self, root: Path) -> None:
        self.landing = root / "landing"
        self.csv = root / "captions.csv"
        self.landing.mkdir()
        for name in ("cat.png", "rocket.png", "tree.jpg"):
            self.poster(name)

    @property
    def place(self) -> Folder:
        return Folder(self.landing)

    def poster(self, name: str) -> None:
        # Only names matter here; whether the bytes are a picture is asked elsewhere.
        path = self.landing / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")

    def sidecar(self, name: str, text: str) -> None:
        (self.landing / name).write_text(text, "utf-8")

    def read(self, store: Store | None = None) -> pd.DataFrame:
        return read_human_captions(self.place, read_csv(self.csv), store)

    def accepted(self) -> dict[str, str]:
        table = self.read()
        ok = table[table["status"] == "ok"]
        assert ok["source_name"].is_unique
        assert set(ok["reason"]) <= {""}
        return dict(zip(ok["source_name"], ok["caption"], strict=True))

    def rejected(self) -> dict[str, str]:
        table = self.read()
        bad = table[table["status"] == "rejected"]
        return dict(zip(bad["source_name"], bad["reason"], strict=True))

    def write(self, name: str, caption: str, seen: str | None) -> Path:
        return write_human_caption(self.place, self.csv, name, caption, seen=seen)

    def remove(self, name: str, seen: str) -> str | None:
        return remove_human_caption(self.place, self.csv, name, seen=seen)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


# -- reading --------------------------------------------------------------------------------------


def test_none_give_an_empty_table(project: Project) -> None:
    table = project.read()
    assert list(table.columns) == COLUMNS
    assert table.empty


def test_sidecars_and_rows_of_the_csv_become_captions(project: Project) -> None:
    project.sidecar("rocket.txt", "  a red\nrocket \n")
    project.sidecar("cat.png.txt", "a cat")
    project.csv.write_text('file_name,caption\ntree.jpg,"a tree, bare"\n', "utf-8")
    table = project.read().set_index("source_name")
    assert table["caption"].to_dict() == {
        "cat.png": "a cat",
        "rocket.png": "a red rocket",
        "tree.jpg": "a tree, bare",
    }
    assert table["origin"].tolist() == ["sidecar", "sidecar", "captions.csv"]
    assert set(table["status"]) == {"ok"}


def test_a_sidecar_wins_over_the_csv_which_is_said(project: Project) -> None:
    project.sidecar("rocket.txt", "from the sidecar")
    project.csv.write_text("file_name,caption\nrocket.png,from the csv\n", "utf-8")
    assert project.accepted() == {"rocket.png": "from the sidecar"}
    assert "captions.csv, line 2" in project.rejected()["rocket.png"]
    assert "rocket.txt, which counts" in project.rejected()["rocket.png"]
    assert project.read()["status"].tolist() == ["rejected", "ok"]  # the one that counts comes last


@pytest.mark.parametrize(
    ("winner", "loser", "poster"),
    [
        ("rocket.txt", "rocket.TXT", "rocket.png"),
        ("caf\u00e9.txt", "cafe\u0301.txt", "caf\u00e9.png"),
        ("rocket.TXT", "rocket.TxT", "rocket.png"),
    ],
)
def test_of_text_files_that_come_to_one_name_one_counts_and_the_others_are_said(
    project: Project, winner: str, loser: str, poster: str
) -> None:
    project.poster(poster)
    project.sidecar(loser, "old words")
    project.sidecar(winner, "new words")
    entries = project.place.entries()
    for order in (entries, entries[::-1]):
        table = read_human_captions(project.place, read_csv(project.csv), entries=order)
        assert table[["source_name", "caption", "status"]].to_numpy().tolist() == [
            [poster, "", "rejected"],
            [poster, "new words", "ok"],
        ]
        assert table["reason"][0].startswith(f"{loser}: beside {winner}, which counts")


def test_text_files_of_one_name_without_a_poster_are_all_said(project: Project) -> None:
    for name in ("none.txt", "none.TXT"):
        project.sidecar(name, "words")
    assert set(project.rejected()) == {"none.txt", "none.TXT"}


@pytest.mark.parametrize("text", ["\u200b", "\ufeff\ufeff", "\u202e \u2066", "\u200d", "\u00ad"])
def test_text_that_nobody_sees_is_no_caption(project: Project, text: str) -> None:
    project.sidecar("cat.txt", text)
    assert project.accepted() == {}
    assert "no words in it" in project.rejected()["cat.png"]


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("\ufeff\ufeffa cat", "a cat"),
        ("\u202eabc\u202c", "abc"),
        ("a \u200bcat\u200d", "a cat"),
        ("cafe\u200b\u0301", "caf\u00e9"),
        ("\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", None),
        ("an astronaut \U0001f469\u200d\U0001f680", None),
    ],
)
def test_what_nobody_sees_is_left_out_but_for_what_joins_letters(
    project: Project, text: str, caption: str | None
) -> None:
    project.sidecar("cat.txt", text)
    assert project.accepted() == {"cat.png": caption or text}


def test_the_longer_sidecar_name_wins_and_the_shorter_speaks_for_all_of_its_stem(
    project: Project,
) -> None:
    project.poster("rocket.jpg")
    project.sidecar("rocket.txt", "some rocket")
    project.sidecar("rocket.png.txt", "the PNG rocket")
    assert project.accepted() == {"rocket.jpg": "some rocket", "rocket.png": "the PNG rocket"}


@pytest.mark.parametrize("name", ["deep/er/rocket.png", "a b.png", "tür.png", "-x.png", "a.b.png"])
def test_names_of_every_kind_find_their_captions(project: Project, name: str) -> None:
    project.poster(name)
    project.csv.write_text(f'file_name,caption\n"{name}",by csv\n', "utf-8")
    assert project.accepted() == {name: "by csv"}
    project.csv.unlink()
    project.sidecar(f"{name.rpartition('.')[0]}.txt", "by sidecar")
    assert project.accepted() == {name: "by sidecar"}


def test_names_match_however_accents_are_stored_and_paths_are_written(project: Project) -> None:
    stored = unicodedata.normalize("NFD", "tür/café.png")
    project.poster(stored)
    typed = unicodedata.normalize("NFC", ".\\tür\\café.png")
    project.csv.write_text(f"file_name,caption\n {typed} ,a door\n", "utf-8")
    assert project.accepted() == {stored: "a door"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends_that_programs_write(
    project: Project, encoding: str, line_end: str
) -> None:
    lines = ["file_name,caption", 'rocket.png,"eine ""rote"" Rakete, groß"', "", 'cat.png,"a', 'b"']
    project.csv.write_bytes(line_end.join(lines).encode(encoding))
    (project.landing / "tree.txt").write_bytes("ein grüner Baum".encode(encoding))
    assert project.accepted() == {
        "rocket.png": 'eine "rote" Rakete, groß',
        "cat.png": "a b",
        "tree.jpg": "ein grüner Baum",
    }


def test_other_columns_and_their_order_do_not_matter(project: Project) -> None:
    project.csv.write_text("note,Caption,by, FILE_NAME\nx,a cat,me,cat.png\n", "utf-8")
    assert project.accepted() == {"cat.png": "a cat"}


@pytest.mark.parametrize(
    ("row", "source_name", "reason"),
    [
        ("dog.png,a dog", "dog.png", "line 2: no poster of that name"),
        ("Cat.PNG,a cat", "Cat.PNG", "is it cat.png?"),
        ("elsewhere/cat.png,a cat", "elsewhere/cat.png", "is it cat.png?"),
        ("cat.png,", "cat.png", "line 2: no words"),
        ("cat.png", "cat.png", "line 2: no caption"),
        (",a cat", "", "line 2: no file_name"),
        ("cat.png,a cat, sitting", "cat.png", "line 2: 3 cells below 2 headings"),
        (f"cat.png,{'x' * 2001}", "cat.png", "2001 characters"),
        ("cat.png,a\x00cat", "cat.png", "control characters"),
    ],
)
def test_a_bad_row_is_a_row_with_a_reason_and_the_others_count(
    project: Project, row: str, source_name: str, reason: str
) -> None:
    project.csv.write_text(f"file_name,caption\n{row}\nrocket.png,a rocket\n", "utf-8")
    assert project.accepted() == {"rocket.png": "a rocket"}
    assert list(project.rejected()) == [source_name]
    assert reason in project.rejected()[source_name]


def test_of_two_rows_for_one_poster_the_first_counts_and_the_other_is_said(
    project: Project,
) -> None:
    project.csv.write_text("file_name,caption\ncat.png,one\ncat.png,two\ncat.png,one\n", "utf-8")
    assert project.accepted() == {"cat.png": "one"}
    table = project.read()
    assert table["caption"].tolist() == ["two", "one"]
    assert "line 3: another caption than captions.csv, line 2" in table["reason"][0]


def test_a_rejected_sidecar_leaves_the_word_to_the_csv(project: Project) -> None:
    project.sidecar("cat.txt", " \n ")
    project.csv.write_text("file_name,caption\ncat.png,a cat\n", "utf-8")
    assert project.accepted() == {"cat.png": "a cat"}
    assert "cat.txt: no words" in project.rejected()["cat.png"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no words"),
        (b"caf\xe9", "not UTF-8"),
        (b"\x00\x01\x02", "control characters"),
        (b"x" * 20_001, "20001 bytes"),
    ],
)
def test_a_bad_sidecar_is_a_row_with_a_reason(project: Project, data: bytes, reason: str) -> None:
    (project.landing / "cat.txt").write_bytes(data)
    assert project.accepted() == {}
    assert reason in project.rejected()["cat.png"]


def test_a_sidecar_that_cannot_be_read_is_counted_and_read_when_it_can(
    project: Project, tmp_path: Path
) -> None:
    project.sidecar("cat.txt", "a cat")
    store = Store(tmp_path / "store")

    class Failing(Folder):
        def read(self, entry: Entry) -> bytes:
            raise PermissionError(13, "Permission denied")

    table = read_human_captions(Failing(project.landing), read_csv(project.csv), store)
    assert table["status"].tolist() == ["rejected"]
    assert "cat.txt: cannot be read (Permission denied)" in table["reason"][0]
    assert unread_count(table) == 1
    table = project.read(store)
    assert table["caption"].tolist() == ["a cat"]
    assert unread_count(table) == unread_count(table[:0]) == 0


def test_a_sidecar_without_a_poster_is_said(project: Project) -> None:
    project.sidecar("dog.txt", "a dog")
    assert "no poster of that name beside it" in project.rejected()["dog.txt"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", ":1: empty"),
        (b"name,caption\ncat.png,a cat\n", ":1: its columns are name, caption"),
        (b"\nfile_name|caption\ncat.png|a cat\n", ":2: .*separated by commas"),
        (b"file_name,caption,caption\n", ":1: "),
        (b"file_name,caption\ncat.png,caf\xe9\n", ":2: not UTF-8"),
        (b'file_name,caption\ncat.png,a cat\nrocket.png,"a rocket\n', ":3: .*double quotes"),
        (b'file_name,caption\ncat.png,"a "fat" cat"\n', ":2: .*double quotes"),
    ],
)
def test_a_csv_that_cannot_be_read_is_an_error_with_file_and_line(
    project: Project, data: bytes, message: str
) -> None:
    project.csv.write_bytes(data)
    with pytest.raises(CaptionsFileError, match=f"captions.csv{message}"):
        project.read()


def test_a_line_that_names_no_separator_is_none(project: Project) -> None:
    project.csv.write_text("sep=\r\nfile_name,caption\r\ncat.png,a cat\r\n", newline="")
    with pytest.raises(CaptionsFileError, match="its columns are sep="):
        project.read()


@pytest.mark.parametrize("beginning", ["", "sep={}\r\n"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_as_spreadsheets_write_it_is_read_and_keeps_its_form(
    project: Project, separator: str, beginning: str
) -> None:
    start = beginning.format(separator)
    heading = f"file_name{separator}caption\r\n"
    project.csv.write_text(f"{start}{heading}cat.png{separator}a cat\r\n", newline="")
    assert project.accepted() == {"cat.png": "a cat"}
    project.write("cat.png", "a cat, asleep; purring", "a cat")
    assert project.accepted() == {"cat.png": "a cat, asleep; purring"}
    assert project.csv.read_bytes().startswith(f"{start}{heading}cat.png{separator}".encode())


def test_a_folder_in_the_place_of_the_csv_is_an_error(project: Project) -> None:
    project.csv.mkdir()
    with pytest.raises(CaptionsFileError, match="POSTERPIPE_CAPTIONS"):
        project.read()


def test_captions_that_cannot_be_seen_are_not_taken_for_removed_ones(project: Project) -> None:
    with pytest.raises(PlaceMissing):
        read_human_captions(Folder(project.landing / "gone"), read_csv(project.csv))


def test_unchanged_sidecars_are_not_read_again(project: Project, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    project.sidecar("cat.txt", "a cat")
    project.sidecar("tree.txt", "a tree")
    first = project.read(store)
    read: list[str] = []

    class Watched(Folder):
        def read(self, entry: Entry) -> bytes:
            read.append(entry.name)
            return super().read(entry)

    project.sidecar("tree.txt", "an old tree")
    second = read_human_captions(Watched(project.landing), read_csv(project.csv), store)
    assert read == ["tree.txt"]
    assert first["caption"].tolist() == ["a cat", "a tree"]
    assert second["caption"].tolist() == ["a cat", "an old tree"]


@pytest.mark.parametrize("changed", ["time", "inode"])
def test_a_sidecar_of_the_same_size_is_read_again(
    project: Project, tmp_path: Path, changed: str
) -> None:
    store = Store(tmp_path / "store")
    sidecar = project.landing / "cat.txt"
    project.sidecar("cat.txt", "a cat")
    before = sidecar.stat()
    assert project.read(store)["caption"].tolist() == ["a cat"]
    if changed == "time":
        project.sidecar("cat.txt", "a dog")
        later = before.st_mtime_ns + 1
        os.utime(sidecar, ns=(later, later))
    else:
        other = tmp_path / "other.txt"
        other.write_text("a dog", "utf-8")
        os.utime(other, ns=(before.st_mtime_ns, before.st_mtime_ns))
        os.replace(other, sidecar)
    now = sidecar.stat()
    same = (now.st_ino == before.st_ino, now.st_mtime_ns == before.st_mtime_ns)
    assert same == (changed == "time", changed == "inode") and now.st_size == before.st_size
    assert project.read(store)["caption"].tolist() == ["a dog"]


def test_sidecars_in_a_bucket_are_read(project: Project) -> None:
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    files.pipe("/captions-test/cat.png", b"")
    files.pipe("/captions-test/cat.txt", b"a cat in a bucket")
    try:
        place = open_place("memory://captions-test")
        table = read_human_captions(place, read_csv(project.csv))
        assert table["caption"].tolist() == ["a cat in a bucket"]
        with pytest.raises(CaptionRejected, match=r"change cat\.txt there"):
            write_human_caption(place, project.csv, "cat.png", "mine", seen="a cat in a bucket")
    finally:
        files.rm("/captions-test", recursive=True)


# -- posters --------------------------------------------------------------------------------------


def human(**captions: str) -> pd.DataFrame:
    rows = [
        {"source_name": name.replace("_", "."), "caption": text} for name, text in captions.items()
    ]
    return pd.DataFrame(rows, columns=["source_name", "caption"]).assign(status="ok")


def raw(*rows: tuple[str, str, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["source_name", "poster_id", "status"])


def test_a_caption_of_any_name_of_a_poster_counts() -> None:
    posters = raw(("a.png", "1", "ok"), ("b.png", "1", "duplicate"), ("c.png", "2", "ok"))
    found = captions_by_poster(posters, human(b_png="a twin"))
    assert {name: found[name].caption for name in found} == {"1": "a twin"}
    assert found["1"].note == ""


def test_where_names_of_a_poster_disagree_the_first_counts_with_a_note() -> None:
    posters = raw(("b.png", "1", "duplicate"), ("a.png", "1", "ok"), ("c.png", "1", "duplicate"))
    found = captions_by_poster(posters, human(c_png="three", b_png="two", a_png="two"))
    assert found["1"].caption == "two"
    assert found["1"].note == "the caption of a.png; c.png, the same poster, has another"


def test_captions_of_rejected_posters_and_rejected_captions_do_not_count() -> None:
    posters = raw(("a.png", "1", "rejected"), ("b.png", "", "rejected"), ("c.png", "3", "ok"))
    written = human(a_png="one", b_png="two", c_png="three")
    written.loc[2, "status"] = "rejected"
    assert captions_by_poster(posters, written) == {}


def test_tables_without_rows_give_no_captions() -> None:
    empty = pd.DataFrame(columns=COLUMNS)
    assert captions_by_poster(raw(), empty) == {}
    assert captions_by_poster(raw(("a.png", "1", "ok")), empty) == {}
