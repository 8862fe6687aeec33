"""A landing folder with everything that people put into one."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from posterpipe.core import landing
from posterpipe.core.landing import LandingEmpty, scan
from posterpipe.core.store import Store
from posterpipe.settings import ImageSettings
from posterpipe_tests.core.test_images import png_bomb

LIMITS = ImageSettings(min_side=64)
RAW_POSTERS = Path(__file__).parents[2] / "data" / "raw_posters"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


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
    table = scan(RAW_POSTERS, LIMITS, store)
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

    table = scan(folder, LIMITS, store)
    assert list(table.columns) == [
        *("poster_id", "source_name", "size_bytes", "format", "width", "height"),
        *("status", "reason"),
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


def test_the_bomb_is_not_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bomb.png").write_bytes(png_bomb(30_000, 30_000))

    def must_not_run(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(landing, "decode", must_not_run)
    assert scan(folder, LIMITS)["status"].tolist() == ["rejected"]


@pytest.mark.parametrize("make", [True, False], ids=["empty", "missing"])
def test_an_empty_or_missing_folder_is_an_error_with_a_remedy(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "posters"
    if make:
        folder.mkdir()
        (folder / "notes.txt").write_text("not a poster")
        (folder / ".hidden.png").write_text("not a poster")
    with pytest.raises(LandingEmpty, match=r"posters: .*put .*POSTERPIPE_LANDING"):
        scan(folder, LIMITS)


def test_hidden_files_and_sidecars_have_no_rows_and_folders_are_entered(folder: Path) -> None:
    poster(folder / "b" / "Zug.PNG")
    poster(folder / "a.png", colour="red")
    (folder / "a.txt").write_text("a caption")
    (folder / "captions.csv").write_text("file_name,caption\n")
    poster(folder / ".thumbnails" / "a.png")
    (folder / ".DS_Store").write_text("")
    os.mkfifo(folder / "pipe.png")
    assert scan(folder, LIMITS)["source_name"].tolist() == ["a.png", "b/Zug.PNG"]


def test_the_format_comes_from_the_content(folder: Path) -> None:
    poster(folder / "a.png").rename(folder / "a.jpg")
    assert scan(folder, LIMITS)["format"].tolist() == ["PNG"]


def test_the_same_bytes_under_two_names_are_one_poster(folder: Path) -> None:
    data = poster(folder / "b.png").read_bytes()
    (folder / "a.png").write_bytes(data)
    table = scan(folder, LIMITS)
    assert table["status"].tolist() == ["ok", "duplicate"]
    assert table["reason"].tolist() == ["", "same bytes as a.png"]


def test_names_that_are_no_utf8_can_be_kept(folder: Path, store: Store) -> None:
    path = poster(folder / "a.png")
    os.rename(path, os.fsencode(folder) + b"/caf\xe9.png")
    table = scan(folder, LIMITS, store)
    assert table["source_name"].tolist() == ["caf\N{REPLACEMENT CHARACTER}.png"]
    store.write_table("raw_posters", table)


@pytest.fixture
def inspected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    inspect = landing._inspect

    def counting(path: Path, limits: ImageSettings, store: Store | None) -> dict:
        names.append(path.name)
        return inspect(path, limits, store)

    monkeypatch.setattr(landing, "_inspect", counting)
    return names


def test_unchanged_files_are_not_read_again(
    folder: Path, store: Store, inspected: list[str]
) -> None:
    poster(folder / "a.png")
    (folder / "bad.png").write_text("text")
    before = scan(folder, LIMITS, store)
    inspected.clear()
    assert scan(folder, LIMITS, store).equals(before)
    assert inspected == []
    # Other limits judge anew without reading anew.
    strict = LIMITS.model_copy(update={"min_side": 100})
    assert "min_side = 100" in row(scan(folder, strict, store), "a.png")["reason"]
    assert inspected == []
    poster(folder / "a.png", colour="red")
    assert row(scan(folder, LIMITS, store), "a.png") != row(before, "a.png")
    assert inspected == ["a.png"]


def test_a_raised_limit_on_pixels_is_applied(
    folder: Path, store: Store, inspected: list[str]
) -> None:
    poster(folder / "a.png", (100, 100))
    low = LIMITS.model_copy(update={"max_pixels": 9_999})
    assert scan(folder, low, store)["status"].tolist() == ["rejected"]
    assert scan(folder, low, store)["status"].tolist() == ["rejected"]
    assert inspected == ["a.png"]
    high = LIMITS.model_copy(update={"max_pixels": 10_000})
    assert scan(folder, high, store)["status"].tolist() == ["ok"]
    assert scan(folder, low, store)["status"].tolist() == ["rejected"]


def test_a_file_that_could_not_be_read_is_tried_again(folder: Path, store: Store) -> None:
    link = folder / "a.png"
    target = folder.parent / "elsewhere.png"
    link.symlink_to(target)
    assert scan(folder, LIMITS, store)["status"].tolist() == ["rejected"]
    poster(target)
    assert scan(folder, LIMITS, store)["status"].tolist() == ["ok"]


def test_lost_bytes_are_copied_into_the_store_again(folder: Path, store: Store) -> None:
    poster(folder / "a.png")
    poster_id = scan(folder, LIMITS, store)["poster_id"][0]
    store.path(poster_id).unlink()
    scan(folder, LIMITS, store)
    assert store.has(poster_id)


def test_a_file_that_is_too_large_is_refused(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landing, "MAX_BYTES", 10)
    poster(folder / "a.png")
    found = row(scan(folder, LIMITS, store), "a.png")
    assert found["status"] == "rejected"
    assert "bytes are more than 10" in found["reason"]
    assert len(found["poster_id"]) == 64
