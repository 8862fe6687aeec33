"""A landing folder with everything that people put into one."""

from __future__ import annotations

import io
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from io import BufferedReader
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from posterpipe.core.images import hash_distance
from posterpipe.core.memory import TOO_LITTLE_MEMORY
from posterpipe.core.posters import landing
from posterpipe.core.posters.arrivals import holdout_entries
from posterpipe.core.posters.landing import (
    LandingEmpty,
    landing_digest,
    rehash,
    scan,
    unread_count,
)
from posterpipe.core.posters.listing import HOLDOUT, Bucket, Entry, Folder, PlaceMissing
from posterpipe.core.store import Store
from posterpipe.settings import ImageSettings
from posterpipe_tests.core.test_images import png_bomb

LIMITS = ImageSettings(min_side=64)
RAW_POSTERS = Path(__file__).parents[3] / "data" / "raw_posters"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "landing"
    path.mkdir()
    return path


def poster(path: Path, size: tuple[int, int] = (80, 120), colour: str = "teal") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def row(table: object, source_name: str) -> dict:
    frame = table[table["source_name"] == source_name]  # type: ignore[index]
    assert len(frame) == 1
    return frame.iloc[0].to_dict()


def test_the_starter_posters_are_all_usable(store: Store) -> None:
    table = scan(Folder(RAW_POSTERS), LIMITS, store)
    assert len(table) == 50
    assert set(table["status"]) == {"ok"}
    assert list(table["source_name"]) == sorted(table["source_name"])
    assert set(table["format"]) == {"PNG", "JPEG"}
    first = table.iloc[0]
    data = (RAW_POSTERS / first["source_name"]).read_bytes()
    assert store.path(first["poster_id"]).read_bytes() == data
    assert first["size_bytes"] == len(data)


def test_bad_files_become_rows_with_reasons_and_the_rest_is_processed(
    folder: Path, store: Store
) -> None:
    poster(folder / "good.png")
    (folder / "text.png").write_text("I am not an image")
    (folder / "empty.jpg").touch()
    whole = io.BytesIO()
    Image.effect_noise((200, 300), 80).save(whole, "JPEG")
    (folder / "truncated.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    poster(folder / "pixel.png", (1, 1))
    (folder / "bomb.png").write_bytes(png_bomb(30_000, 30_000))
    frames = [Image.new("RGB", (80, 120), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    (folder / "layers.psd").write_bytes(b"8BPS")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")

    table = scan(Folder(folder), LIMITS, store)
    assert list(table.columns) == [
        *("poster_id", "source_name", "size_bytes", "format", "width", "height"),
        *("perceptual_hash", "status", "reason", "near_duplicate_of"),
    ]
    expected = {
        "good.png": "",
        "animated.gif": "",
        "text.png": "no image in it",
        "empty.jpg": "the file is empty",
        "truncated.jpg": "cannot be decoded",
        "pixel.png": "1x1 pixels: a side is below images.min_side = 64",
        "bomb.png": "30000x30000 pixels are more than images.max_pixels",
        "layers.psd": ".psd: not one of .png",
        "gone.png": "cannot be read (No such file or directory)",
    }
    assert set(table["source_name"]) == set(expected)
    for name, reason in expected.items():
        found = row(table, name)
        assert found["status"] == ("rejected" if reason else "ok"), name
        assert found["reason"].startswith(reason), name
        assert bool(found["reason"]) == bool(reason), name
    assert row(table, "bomb.png")["width"] == 30_000
    assert row(table, "animated.gif")["format"] == "GIF"
    assert not store.has(row(table, "bomb.png")["poster_id"])


def test_the_bomb_is_not_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    (folder / "bomb.png").write_bytes(png_bomb(30_000, 30_000))

    def must_not_run(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(landing, "decode_for_looks", must_not_run)
    assert scan(Folder(folder), LIMITS, store)["status"].tolist() == ["rejected"]


@pytest.mark.parametrize("make", [True, False], ids=["empty", "missing"])
def test_an_empty_or_missing_folder_is_an_error_with_a_remedy(
    tmp_path: Path, make: bool, store: Store
) -> None:
    folder = tmp_path / "posters"
    if make:
        folder.mkdir()
        (folder / "notes.txt").write_text("not a poster")
        (folder / ".hidden.png").write_text("not a poster")
    with pytest.raises(LandingEmpty, match=r"posters: .*put .*POSTERPIPE_LANDING"):
        scan(Folder(folder), LIMITS, store)


def test_a_holdout_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(PlaceMissing, match=r"/file: this is a file; set POSTERPIPE_HOLDOUT to"):
        holdout_entries(tmp_path / "file")


def test_hidden_files_and_sidecars_have_no_rows_and_folders_are_entered(
    folder: Path, store: Store
) -> None:
    poster(folder / "b" / "Zug.PNG")
    poster(folder / "a.png", colour="red")
    (folder / "a.txt").write_text("a caption")
    (folder / "captions.csv").write_text("file_name,caption\n")
    poster(folder / ".thumbnails" / "a.png")
    (folder / ".DS_Store").write_text("")
    os.mkfifo(folder / "pipe.png")
    assert scan(Folder(folder), LIMITS, store)["source_name"].tolist() == ["a.png", "b/Zug.PNG"]


def test_the_format_comes_from_the_content(folder: Path, store: Store) -> None:
    poster(folder / "a.png").rename(folder / "a.jpg")
    assert scan(Folder(folder), LIMITS, store)["format"].tolist() == ["PNG"]


def test_the_same_bytes_under_two_names_are_one_poster(folder: Path, store: Store) -> None:
    data = poster(folder / "b.png").read_bytes()
    (folder / "a.png").write_bytes(data)
    table = scan(Folder(folder), LIMITS, store)
    assert table["status"].tolist() == ["ok", "duplicate"]
    assert table["reason"].tolist() == ["", "same bytes as a.png"]


def test_names_that_are_no_utf8_can_be_kept(folder: Path, store: Store) -> None:
    path = poster(folder / "a.png")
    os.rename(path, os.fsencode(folder) + b"/caf\xe9.png")
    table = scan(Folder(folder), LIMITS, store)
    assert table["source_name"].tolist() == ["caf\N{REPLACEMENT CHARACTER}.png"]
    store.write_table("raw_posters", table)


def test_the_same_bytes_under_two_names_that_look_alike_are_one_poster(
    folder: Path, store: Store
) -> None:
    path = poster(folder / "a.png")
    for name in (b"caf\xe8.png", b"caf\xe9.png"):
        shutil.copyfile(path, os.fsencode(folder) + b"/" + name)
    path.unlink()
    table = scan(Folder(folder), LIMITS, store)
    assert table["source_name"].nunique() == 1
    assert table["status"].tolist() == ["ok", "duplicate"]


@pytest.fixture
def inspected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were opened."""
    names: list[str] = []
    opening = Folder._open

    def counting(place: Folder, entry: Entry) -> AbstractContextManager[BufferedReader]:
        names.append(entry.name)
        return opening(place, entry)

    monkeypatch.setattr(Folder, "_open", counting)
    return names


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sizes of the images that were decoded."""
    sizes: list[tuple[int, int]] = []
    decode = landing.decode_for_looks

    def counting(image: Image.Image) -> None:
        sizes.append(image.size)
        decode(image)

    monkeypatch.setattr(landing, "decode_for_looks", counting)
    return sizes


def test_unchanged_files_are_not_read_again(
    folder: Path, store: Store, inspected: list[str]
) -> None:
    poster(folder / "a.png")
    (folder / "bad.png").write_text("text")
    before = scan(Folder(folder), LIMITS, store)
    inspected.clear()
    assert scan(Folder(folder), LIMITS, store).equals(before)
    assert inspected == []
    # Other limits judge anew without reading anew.
    strict = LIMITS.model_copy(update={"min_side": 100})
    assert "min_side = 100" in row(scan(Folder(folder), strict, store), "a.png")["reason"]
    assert inspected == []
    poster(folder / "a.png", colour="red")
    assert row(scan(Folder(folder), LIMITS, store), "a.png") != row(before, "a.png")
    assert inspected == ["a.png"]


def test_a_raised_limit_on_pixels_is_applied(
    folder: Path, store: Store, inspected: list[str]
) -> None:
    poster(folder / "a.png", (100, 100))
    low = LIMITS.model_copy(update={"max_pixels": 9_999})
    assert scan(Folder(folder), low, store)["status"].tolist() == ["rejected"]
    assert scan(Folder(folder), low, store)["status"].tolist() == ["rejected"]
    assert inspected == ["a.png"]
    high = LIMITS.model_copy(update={"max_pixels": 10_000})
    assert scan(Folder(folder), high, store)["status"].tolist() == ["ok"]
    assert scan(Folder(folder), low, store)["status"].tolist() == ["rejected"]


def test_a_file_that_could_not_be_read_is_tried_again(folder: Path, store: Store) -> None:
    link = folder / "a.png"
    target = folder.parent / "elsewhere.png"
    link.symlink_to(target)
    assert scan(Folder(folder), LIMITS, store)["status"].tolist() == ["rejected"]
    poster(target)
    assert scan(Folder(folder), LIMITS, store)["status"].tolist() == ["ok"]


@pytest.mark.parametrize("step", ["open_image", "decode_for_looks", "perceptual_hash"])
def test_a_poster_for_which_memory_ran_out_is_no_bad_poster_and_is_tried_again(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    poster(folder / "a.png")

    def run_out(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(landing, step, run_out)
        without = scan(Folder(folder), LIMITS, store)
    assert without["reason"].tolist() == [TOO_LITTLE_MEMORY]
    assert unread_count(without) == 1
    assert scan(Folder(folder), LIMITS, store)["status"].tolist() == ["ok"]


def test_lost_bytes_are_copied_into_the_store_again(folder: Path, store: Store) -> None:
    poster(folder / "a.png")
    poster_id = scan(Folder(folder), LIMITS, store)["poster_id"][0]
    store.path(poster_id).unlink()
    scan(Folder(folder), LIMITS, store)
    assert store.has(poster_id)


def test_a_file_that_another_version_refused_by_its_name_is_looked_at_again(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    poster(folder / "a.png").rename(folder / "a.jfif")
    assert scan(Folder(folder), LIMITS, store)["status"].tolist() == ["rejected"]
    monkeypatch.setattr(landing, "EXTENSIONS", (*landing.EXTENSIONS, ".jfif"))
    assert scan(Folder(folder), LIMITS, store)["status"].tolist() == ["ok"]


def test_a_file_that_is_too_large_is_refused(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landing, "MAX_BYTES", 10)
    poster(folder / "a.png")
    found = row(scan(Folder(folder), LIMITS, store), "a.png")
    assert found["status"] == "rejected"
    assert "bytes are more than 10" in found["reason"]
    assert len(found["poster_id"]) == 64


def test_a_file_that_moved_or_was_touched_is_hashed_but_not_decoded_again(
    folder: Path, store: Store, inspected: list[str], decoded: list[tuple[int, int]]
) -> None:
    poster(folder / "a.png")
    (folder / "bad.png").write_text("text")
    before = scan(Folder(folder), LIMITS, store)
    inspected.clear()
    decoded.clear()
    (folder / "nested").mkdir()
    (folder / "a.png").rename(folder / "nested" / "b.png")
    os.utime(folder / "bad.png", ns=(1, 1))
    after = scan(Folder(folder), LIMITS, store)
    assert sorted(inspected) == ["bad.png", "nested/b.png"]
    assert decoded == []
    renamed = before.replace({"source_name": {"a.png": "nested/b.png"}})
    assert after.sort_values("poster_id").to_dict("records") == renamed.sort_values(
        "poster_id"
    ).to_dict("records")


def test_what_is_taken_away_is_gone_from_the_table_and_comes_back_unread(
    folder: Path, store: Store, inspected: list[str], tmp_path: Path
) -> None:
    for name, colour in [("a.png", "red"), ("b.png", "green"), ("c.png", "blue")]:
        poster(folder / name, colour=colour)
    before = scan(Folder(folder), LIMITS, store)
    (folder / "b.png").rename(tmp_path / "kept.png")
    inspected.clear()
    without = scan(Folder(folder), LIMITS, store)
    assert without["source_name"].tolist() == ["a.png", "c.png"]
    (tmp_path / "kept.png").rename(folder / "b.png")
    assert scan(Folder(folder), LIMITS, store).equals(before)
    assert inspected == []


def test_the_first_of_equal_posters_takes_over_when_the_other_goes(
    folder: Path, store: Store
) -> None:
    data = poster(folder / "a.png").read_bytes()
    (folder / "b.png").write_bytes(data)
    both = scan(Folder(folder), LIMITS, store)
    assert row(both, "b.png")["status"] == "duplicate"
    assert row(both, "b.png")["perceptual_hash"] == ""
    (folder / "a.png").unlink()
    assert row(scan(Folder(folder), LIMITS, store), "b.png")["status"] == "ok"


def test_an_older_file_put_in_place_of_a_listed_one_is_not_taken_for_it(
    folder: Path, store: Store, tmp_path: Path
) -> None:
    poster(folder / "a.png", colour="red")
    place = Folder(folder)
    entries = place.entries()
    (folder / "a.png").rename(tmp_path / "kept.png")
    poster(folder / "a.png", colour="blue")
    found = row(scan(place, LIMITS, store, entries=entries), "a.png")
    assert found["status"] == "rejected"
    assert found["reason"] == "changed while it was read; materialize raw_posters again"
    held = row(scan(Folder(folder, HOLDOUT), LIMITS, store, entries=entries), "a.png")
    assert held["reason"] == "changed while it was read; materialize holdout_posters again"
    os.replace(tmp_path / "kept.png", folder / "a.png")
    red = row(scan(place, LIMITS, store), "a.png")
    assert (red["status"], red["reason"]) == ("ok", "")
    assert Image.open(store.path(red["poster_id"])).getpixel((0, 0)) == (255, 0, 0)


def test_links_to_folders_are_rows_with_a_reason(
    folder: Path, tmp_path: Path, store: Store
) -> None:
    poster(tmp_path / "elsewhere" / "a.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    poster(folder / "b.png")
    table = scan(Folder(folder), LIMITS, store)
    assert table["source_name"].tolist() == ["b.png", "link", "loop"]
    assert table["status"].tolist() == ["ok", "rejected", "rejected"]
    assert "copy the folder here" in row(table, "link")["reason"]


# -- near-duplicates ------------------------------------------------------------------------------


def drawing(seed: int, size: tuple[int, int] = (200, 300)) -> Image.Image:
    """A picture with structure of its own, alike at any size."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def test_near_duplicates_name_the_earlier_poster_and_stay_usable(
    folder: Path, store: Store
) -> None:
    drawing(1).save(folder / "a.png")
    drawing(2).save(folder / "b.png")
    drawing(1, (120, 180)).save(folder / "c smaller.jpg", quality=80)
    table = scan(Folder(folder), LIMITS, store)
    assert table["status"].tolist() == ["ok"] * 3
    assert table["near_duplicate_of"].tolist() == ["", "", "a.png"]
    assert table["perceptual_hash"].str.fullmatch("[0-9a-f]{16}").all()
    a, b, c = table["perceptual_hash"]
    assert hash_distance(a, c) <= LIMITS.near_duplicate_distance < hash_distance(a, b)
    # When the earlier one goes, nothing is resembled any more.
    (folder / "a.png").unlink()
    assert scan(Folder(folder), LIMITS, store)["near_duplicate_of"].tolist() == ["", ""]


def test_the_starter_posters_do_not_resemble_each_other(store: Store) -> None:
    assert set(scan(Folder(RAW_POSTERS), LIMITS, store)["near_duplicate_of"]) == {""}


# -- digest and rehash ----------------------------------------------------------------------------


def digest(folder: Path, store: Store) -> str:
    return landing_digest(Folder(folder).entries(), store)


def test_the_digest_changes_with_posters_and_not_with_what_lies_beside_them(
    folder: Path, store: Store
) -> None:
    poster(folder / "a.png")
    first = digest(folder, store)
    (folder / "a.txt").write_text("a caption")
    assert digest(folder, store) == first
    poster(folder / "b.png")
    assert digest(folder, store) != first
    (folder / "b.png").unlink()
    assert digest(folder, store) == first


def test_a_rehash_finds_what_changed_unnoticed_and_the_next_scan_reads_it(
    folder: Path, store: Store, inspected: list[str]
) -> None:
    path = poster(folder / "a.bmp", colour="red")
    poster(folder / "b.bmp", colour="green")
    scan(Folder(folder), LIMITS, store)
    poster(folder / "new.bmp", colour="yellow")
    stats, before = path.stat(), digest(folder, store)
    data = bytearray(path.read_bytes())
    data[-3:] = b"\xff\x00\x00"
    with open(path, "r+b") as file:  # in place: the same inode and size
        file.write(data)
    os.utime(path, ns=(stats.st_atime_ns, stats.st_mtime_ns))
    assert digest(folder, store) == before

    found = rehash(Folder(folder), store)
    assert (found.same, found.changed, found.new, found.unreadable) == (
        *(1, ["a.bmp"], ["new.bmp"]),
        [],
    )
    assert digest(folder, store) != before
    inspected.clear()
    table = scan(Folder(folder), LIMITS, store)
    assert inspected == ["a.bmp", "new.bmp"]
    assert store.path(row(table, "a.bmp")["poster_id"]).read_bytes() == bytes(data)
    after = digest(folder, store)
    assert rehash(Folder(folder), store).same == 3
    assert digest(folder, store) == after


# -- buckets --------------------------------------------------------------------------------------


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe("/posters/2026/.keep", b"")
    yield Bucket("memory://posters")
    files.rm("/posters", recursive=True)


def upload(name: str, data: bytes) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe(f"/posters/{name}", data)


def upload_drawings(count: int) -> None:
    for number in range(count):
        buffer = io.BytesIO()
        drawing(number).save(buffer, "PNG")
        upload(f"{number}.png", buffer.getvalue())


def test_a_bucket_gives_the_table_of_the_same_folder(
    bucket: Bucket, folder: Path, store: Store
) -> None:
    drawing(1).save(folder / "a.png")
    (folder / "2026").mkdir()
    drawing(2).save(folder / "2026" / "b c.jpg")
    shutil.copyfile(folder / "a.png", folder / "copy.png")
    (folder / "bad.png").write_text("text")
    (folder / "a.txt").write_text("a caption")
    for path in folder.rglob("*.*"):
        upload(path.relative_to(folder).as_posix(), path.read_bytes())
    local, remote = (
        scan(Folder(folder), LIMITS, Store(store.root / "local")),
        scan(bucket, LIMITS, store),
    )
    assert remote.equals(local)
    assert remote["status"].tolist() == ["ok", "ok", "rejected", "duplicate"]


def test_objects_of_a_bucket_are_fetched_once_and_at_the_same_time(
    bucket: Bucket, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_drawings(6)
    # Each fetch waits for the others: one after the other would never end.
    together = threading.Barrier(6, timeout=60)
    read = Bucket.read

    def waiting(place: Bucket, entry: Entry) -> bytes:
        together.wait()
        return read(place, entry)

    monkeypatch.setattr(Bucket, "read", waiting)
    first = scan(bucket, LIMITS, store)
    assert first["status"].tolist() == ["ok"] * 6

    def must_not_run(place: Bucket, entry: Entry) -> bytes:
        raise AssertionError("fetched again")

    monkeypatch.setattr(Bucket, "read", must_not_run)
    assert scan(Bucket("memory://posters"), LIMITS, store).equals(first)


def test_objects_that_are_large_together_are_not_in_memory_together(
    bucket: Bucket, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_drawings(6)
    sizes = sorted(entry.size for entry in bucket.entries())
    allowed = sizes[-1] + sizes[0]  # any two at most
    monkeypatch.setattr(landing, "_reading", landing._Allowance(allowed))
    held: list[int] = []
    most = []
    judge, read = landing._judge, Bucket.read

    def reading(place: Bucket, entry: Entry) -> bytes:
        held.append(entry.size)
        most.append(sum(held))
        return read(place, entry)

    def judging(data: bytes, limits: ImageSettings) -> dict:
        threading.Event().wait(0.02)  # for others to come in meanwhile
        held.remove(len(data))
        return judge(data, limits)

    monkeypatch.setattr(Bucket, "read", reading)
    monkeypatch.setattr(landing, "_judge", judging)
    assert scan(bucket, LIMITS, store)["status"].tolist() == ["ok"] * 6
    assert sizes[-1] < max(most) <= allowed


def test_an_object_that_was_replaced_since_it_was_listed_is_read_later(
    bucket: Bucket, store: Store
) -> None:
    buffer = io.BytesIO()
    drawing(1).save(buffer, "PNG")
    upload("a.png", buffer.getvalue())
    entries = bucket.entries()
    upload("a.png", buffer.getvalue() + b"more")
    found = row(scan(bucket, LIMITS, store, entries=entries), "a.png")
    assert "changed while it was read" in found["reason"]
    assert row(scan(bucket, LIMITS, store), "a.png")["status"] == "ok"


def test_an_empty_bucket_is_an_error_with_a_remedy(store: Store) -> None:
    with pytest.raises(
        LandingEmpty, match=r"memory://nothing/here: no posters.*POSTERPIPE_LANDING"
    ):
        scan(Bucket("memory://nothing/here"), LIMITS, store)
