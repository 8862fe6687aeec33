"""Listings of folders and buckets."""

from __future__ import annotations

import os
import subprocess
import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from posterpipe.core.posters.listing import (
    DEEPEST,
    Bucket,
    Entry,
    Folder,
    Place,
    PlaceMissing,
    SourceChanged,
    _nanoseconds,
    _remote_entry,
    _unopenable,
    entries_within,
    listing_digest,
    open_place,
)


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """An empty place; `put` and `remove` change it."""
    if request.param == "folder":
        yield Folder(tmp_path)
        return
    files = fsspec.filesystem("memory")
    files.mkdir("/listing")
    yield Bucket("memory://listing")
    files.rm("/listing", recursive=True)


def put(place: Place, name: str, data: bytes) -> None:
    if isinstance(place, Folder):
        path = place.path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(data)
    else:
        fsspec.filesystem("memory").pipe(f"/listing/{name}", data)


def remove(place: Place, name: str) -> None:
    if isinstance(place, Folder):
        (place.path / name).unlink()
    else:
        fsspec.filesystem("memory").rm(f"/listing/{name}")


def test_the_folder_that_every_disk_has_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "lost+found" / "#1234.png").write_bytes(b"a")
    assert Folder(tmp_path).entries() == []


def test_nested_files_are_listed_by_name_and_hidden_ones_are_not(place: Place) -> None:
    for name in ("b.png", "a/z.png", "a b.png", ".hidden", ".folder/c.png", "a/.tmp", "ä.txt"):
        put(place, name, name.encode())
    entries = place.entries()
    assert [entry.name for entry in entries] == ["a b.png", "a/z.png", "b.png", "ä.txt"]
    assert [entry.size for entry in entries] == [7, 7, 5, 6]
    assert [place.read(entry) for entry in entries] == [e.name.encode() for e in entries]


@pytest.fixture
def bottomless(tmp_path: Path) -> Iterator[Path]:
    """A folder with a poster and folders nested deeper than Python recurses, and than a path may be
    long. One poster lies as deep as is looked, one below."""
    (tmp_path / "a.png").write_bytes(b"1")
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for depth in range(1, 1501):
            os.mkdir("deep", dir_fd=here)
            inner = os.open("deep", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
            if depth in (DEEPEST, DEEPEST + 1):
                os.close(os.open("in.png", os.O_WRONLY | os.O_CREAT, dir_fd=here))
        yield tmp_path
    finally:
        os.close(here)
        # Python's own removal recurses, as pytest's of its folders does.
        subprocess.run(["rm", "-rf", tmp_path / "deep"], check=True)


def test_folders_nested_without_end_are_a_problem_of_that_name_only(bottomless: Path) -> None:
    entries = Folder(bottomless).entries()
    reached = "deep/" * DEEPEST
    names = ["a.png", f"{reached}deep", f"{reached}in.png"]
    assert [entry.name for entry in entries] == names
    assert [bool(entry.problem) for entry in entries] == [False, True, False]
    assert "move it further up" in entries[1].problem


def test_the_digest_is_stable_and_changes_with_every_kind_of_change(place: Place) -> None:
    put(place, "a.png", b"1")
    put(place, "b.png", b"2")
    digests = [listing_digest(place.entries())]
    assert listing_digest(place.entries()) == digests[0]
    put(place, "b.png", b"3")
    digests.append(listing_digest(place.entries()))
    put(place, "c.png", b"")
    digests.append(listing_digest(place.entries()))
    remove(place, "a.png")
    digests.append(listing_digest(place.entries()))
    assert len(set(digests)) == len(digests)


def test_names_cannot_run_into_each_other_in_the_digest() -> None:
    one = [Entry("a", 1, 2, "3"), Entry("b", 1, 2, "3")]
    other = [Entry("a\n1", 1, 2, "3"), Entry("b", 1, 2, "3")]
    assert listing_digest(one) != listing_digest(other)
    assert listing_digest(one) != listing_digest([Entry("ab", 11, 22, "33")])


def test_a_portable_digest_is_that_of_the_same_files_on_another_host() -> None:
    here = [Entry("a.png", 1, 2, "inode 3", 0o644)]
    there = [Entry("a.png", 1, 2, "inode 4", 0o600)]
    assert listing_digest(here) != listing_digest(there)
    # Either alone is another listing on this one: a file replaced, one that became readable.
    assert listing_digest([replace(here[0], identity="inode 4")]) != listing_digest(here)
    assert listing_digest([replace(here[0], mode=0o600)]) != listing_digest(here)
    assert listing_digest(here, portable=True) == listing_digest(there, portable=True)
    for other in (Entry("b.png", 1, 2, ""), Entry("a.png", 2, 2, ""), Entry("a.png", 1, 3, "")):
        assert listing_digest([other], portable=True) != listing_digest(here, portable=True)


def test_a_file_that_is_not_the_listed_one_any_more_is_refused(place: Place) -> None:
    put(place, "a.png", b"before")
    (entry,) = place.entries()
    assert len(place.sha256(entry)) == 64
    put(place, "a.png", b"longer than before")
    with pytest.raises(SourceChanged, match=r"a\.png"):
        place.read(entry)
    with pytest.raises(SourceChanged):
        place.sha256(entry)
    remove(place, "a.png")
    with pytest.raises(FileNotFoundError):
        place.read(entry)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"before")
    place = Folder(tmp_path)
    (entry,) = place.entries()
    with pytest.raises(SourceChanged, match=r"a\.png"), place._open(entry) as file:
        assert file.read() == b"before"
        path.write_bytes(b"longer than before")


def test_a_file_that_another_of_its_size_and_time_took_the_place_of_is_refused(
    tmp_path: Path,
) -> None:
    landing = tmp_path / "landing"
    landing.mkdir()
    (landing / "a.png").write_bytes(b"before")
    place = Folder(landing)
    (entry,) = place.entries()
    (tmp_path / "b.png").write_bytes(b"other!")
    os.utime(tmp_path / "b.png", ns=(entry.mtime_ns, entry.mtime_ns))
    os.replace(tmp_path / "b.png", landing / "a.png")
    for use in (place.read, place.sha256):
        with pytest.raises(SourceChanged):
            use(entry)
    assert listing_digest(place.entries()) != listing_digest([entry])


def test_a_folder_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PlaceMissing, match=r"nowhere: .*create it.*POSTERPIPE_LANDING"):
        Folder(tmp_path / "nowhere").entries()


def test_a_missing_bucket_is_empty_and_an_unknown_kind_says_what_to_do() -> None:
    assert Bucket("memory://never/made").entries() == []
    with pytest.raises(PlaceMissing, match=r"unheard://a: .*POSTERPIPE_LANDING"):
        Bucket("unheard://a").entries()


class Versioned(MemoryFileSystem):
    """Buckets as s3fs shows them: one that is missing is told, and names may hold versions."""

    protocol = "versioned"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("versioned://").strip("/")

    def split_path(self, path: str) -> list[str | None]:
        bucket, _, key = path.partition("/")
        return [bucket, key.partition("?versionId=")[0], None]  # not asked for versions

    def exists(self, path: str, **options: object) -> bool:
        return any(name.startswith(f"{path}/") for name in self.store)

    def find(self, path: str, **options: object) -> dict:
        if not self.exists(path.partition("/")[0]):
            raise FileNotFoundError("The specified bucket does not exist")
        return {
            name: {"name": name, "type": "file", "size": file.size, "ETag": name}
            for name, file in sorted(self.store.items())
            if name.startswith(f"{path}/")
        }

    def info(self, path: str, **options: object) -> dict:
        return self.find(path.rpartition("/")[0])[path]

    def cat_file(self, path: str, **options: object) -> bytes:
        return self.store[path].getvalue()


@pytest.fixture
def versioned() -> Iterator[type[Versioned]]:
    fsspec.register_implementation("versioned", Versioned, clobber=True)
    yield Versioned
    Versioned.store.clear()


def test_a_bucket_that_is_not_there_is_told_from_one_without_objects(
    versioned: type[Versioned],
) -> None:
    with pytest.raises(PlaceMissing, match=r"versioned://mistyped/posters: this bucket is no"):
        Bucket("versioned://mistyped/posters").entries()
    versioned.store["bucket/other/a.png"] = MemoryFile(data=b"1")
    assert Bucket("versioned://bucket/posters").entries() == []


def test_what_arrives_in_a_bucket_is_seen_by_whoever_has_listed_it(
    versioned: type[Versioned], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = versioned.find

    def find(self: Versioned, path: str, **options: object) -> dict:
        if path not in self.dircache:  # fsspec's, which keeps what a driver was told
            self.dircache[path] = told(self, path, **options)
            return told(self, path, **options)
        return self.dircache[path]

    monkeypatch.setattr(versioned, "find", find)
    place = Bucket("versioned://bucket/posters")
    for name in ("a.png", "b.png"):
        versioned.store[f"bucket/posters/{name}"] = MemoryFile(data=b"1")
        for bucket in (place, Bucket(place.location)):
            assert bucket.entries()[-1].name == name


def test_names_of_objects_may_begin_with_a_slash(versioned: type[Versioned]) -> None:
    for name, data in (("a.png", b"one"), ("/a.png", b"other")):
        versioned.store[f"bucket/posters/{name}"] = MemoryFile(data=data)
    place = Bucket("versioned://bucket/posters")
    entries = place.entries()
    assert [entry.name for entry in entries] == ["/a.png", "a.png"]
    assert [place.read(entry) for entry in entries] == [b"other", b"one"]


def test_an_object_that_its_driver_takes_for_a_version_is_to_be_renamed(
    versioned: type[Versioned],
) -> None:
    versioned.store["bucket/posters/a?versionId=3.png"] = MemoryFile(data=b"1")
    versioned.store["bucket/posters/b?.png"] = MemoryFile(data=b"1")
    entry, other = Bucket("versioned://bucket/posters").entries()
    assert entry.problem.endswith("it cannot be opened; rename it") and not other.problem


def test_the_driver_of_s3_takes_such_a_name_for_a_version_and_no_other() -> None:
    s3fs = pytest.importorskip("s3fs")
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    assert "rename it" in _unopenable(files, "bucket/o/q?versionId=1.png")
    for name in ("o/q?x=1.png", "a b+%20#.png", "/a.png", "x//y.png", "ü[*].png"):
        assert _unopenable(files, f"bucket/{name}") == ""


def test_a_driver_that_fails_at_once_is_told_without_its_text_which_may_hold_a_secret(
    versioned: type[Versioned], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Versioned, *_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(versioned, "__init__", refuse)
    for raised in (ConnectionError("/tokeninfo?access_token=SECRET"), ValueError("SECRET?")):
        told = (
            rf"bucket/posters: cannot be opened \({type(raised).__name__}\); .*POSTERPIPE_LANDING"
        )
        with pytest.raises(PlaceMissing, match=told) as caught:
            entries_within(Bucket("versioned://bucket/posters"), 60)
        assert "SECRET" not in "".join(traceback.format_exception(caught.value))


def test_a_password_in_a_url_opens_the_bucket_and_is_shown_nowhere(
    versioned: type[Versioned], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def refuse(self: Versioned, path: str, **_: object) -> dict:
        opened.append(path)
        raise RuntimeError(f"401 for versioned://{path}/a.png")

    monkeypatch.setattr(versioned, "find", refuse)
    place = Bucket("versioned://ida:p@ss:word@host/posters")
    with pytest.raises(PlaceMissing) as caught:
        place.entries()
    assert opened == ["ida:p@ss:word@host/posters"]
    told = f"{caught.value} {place.location} {place.key(Entry('a', 1, 2, ''))}"
    assert "ss" not in told.replace("posters", "").replace("address", "") and "word" not in told
    assert place.location == "versioned://ida@host/posters"
    assert Bucket("versioned://ida:a/b2:c@host/x@y").location == "versioned://ida@host/x@y"
    for url in ("s3://bucket/a:b@c", "ftp://host:21/a@b", "ftp://[::1]:21/", "https://ida@host/"):
        assert Bucket(url).location == url


@pytest.fixture
def silent(
    versioned: type[Versioned], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[threading.Event, Queue[str]]]:
    """Buckets that tell nothing until an event; and which were asked."""
    answer, asked = threading.Event(), Queue[str]()
    told = versioned.find

    def find(self: Versioned, path: str, **options: object) -> dict:
        asked.put(path)
        answer.wait(60)
        return told(self, path, **options)

    monkeypatch.setattr(versioned, "find", find)
    yield answer, asked
    answer.set()


def test_a_bucket_that_does_not_answer_is_not_waited_for_and_asked_once(
    versioned: type[Versioned], silent: tuple[threading.Event, Queue[str]]
) -> None:
    answer, asked = silent
    versioned.store["bucket/silent/a.png"] = MemoryFile(data=b"1")
    place = "versioned://bucket/silent"
    for _ in range(3):  # each look opens it anew
        with pytest.raises(PlaceMissing, match=r"/silent: did not answer within 0.1 s; .*network"):
            entries_within(Bucket(place), 0.1)
    # What comes of it is taken by the next look, and the one after that asks again.
    answer.set()
    for count in (1, 2):
        (entry,) = entries_within(Bucket(place), 60)
        assert entry.name == "a.png" and asked.qsize() == count


def test_a_bucket_that_never_answers_is_asked_again_after_a_while(
    silent: tuple[threading.Event, Queue[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, asked = silent
    monkeypatch.setattr("posterpipe.core.posters.listing.GIVEN_UP_SECONDS", 0.0)
    for _ in range(2):
        with pytest.raises(PlaceMissing):
            entries_within(Bucket("versioned://bucket/dead"), 0.1)
        assert asked.get(timeout=60) == "bucket/dead"


def test_a_bucket_whose_driver_is_not_installed_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(fsspec.registry, "s3", None) if "s3" in fsspec.registry else None
    with pytest.raises(PlaceMissing, match=r"pip install -e '\.\[cloud\]'"):
        Bucket("s3://bucket/posters").entries()


def test_relative_folders_start_at_the_root_and_urls_stay(tmp_path: Path) -> None:
    assert open_place("data/posters", tmp_path).location == str(tmp_path / "data/posters")
    assert open_place(Path("/abs"), tmp_path).location == "/abs"
    assert open_place(f"file://{tmp_path}/a%20b", Path("/")).location == f"{tmp_path}/a b"
    assert isinstance(open_place("s3://bucket/posters", tmp_path), Bucket)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    place = Folder(tmp_path)
    (entry,) = place.entries()
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(SourceChanged):
        place.read(entry)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
def test_a_nested_folder_that_cannot_be_entered_is_an_entry(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "a.png").write_bytes(b"1")
    entries = Folder(tmp_path).entries()
    assert [entry.name for entry in entries] == ["a.png", "closed"]
    assert "make it readable" in entries[1].problem


# As the drivers of the three large providers and fsspec's own give them.
@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (
            {"size": 3, "ETag": '"abc"', "LastModified": "2026-01-02T03:04:05.678000+00:00"},
            Entry("a", 3, 1_767_323_045_678_000_000, "abc"),
        ),
        (
            {"size": 3, "etag": "CPj=", "md5Hash": "x==", "updated": "2026-01-02T03:04:05.678Z"},
            Entry("a", 3, 1_767_323_045_678_000_000, "CPj="),
        ),
        ({"size": 3, "mtime": 1_767_323_045.5}, Entry("a", 3, 1_767_323_045_500_000_000, "")),
        ({"size": None}, Entry("a", 0, 0, "")),
    ],
    ids=["s3", "gcs", "sftp", "unknown"],
)
def test_what_providers_tell_of_an_object_is_understood(info: dict, expected: Entry) -> None:
    assert _remote_entry("a", info) == expected


def test_times_that_cannot_be_read_count_as_unknown() -> None:
    assert _nanoseconds("yesterday") == 0
    assert _nanoseconds(None) == 0
