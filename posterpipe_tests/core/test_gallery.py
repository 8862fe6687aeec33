"""Pictures for people: sizes, missing cells, small inline images."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from posterpipe.core.gallery import (
    BACKGROUND,
    GAP,
    INLINE_BYTES,
    Picture,
    contact_sheet,
    data_uri,
    grid,
    markdown_image,
    of_first_seed,
    suite_sheet,
    without_shared_ends,
)


def colour(name: str) -> Image.Image:
    return Image.new("RGB", (60, 90), name)


def has_colour(image: Image.Image, name: str) -> bool:
    wanted = np.array(Image.new("RGB", (1, 1), name).getpixel((0, 0)))
    return bool((np.abs(np.asarray(image).astype(int) - wanted).max(axis=2) < 4).any())


def test_a_contact_sheet_shows_every_image(tmp_path: Path) -> None:
    colour("green").save(tmp_path / "green.png")
    images: list[tuple[Picture, str]] = [
        (colour("red"), "red"),
        (tmp_path / "green.png", "green"),
        (colour("blue"), "x" * 99),
    ]
    sheet = contact_sheet(images, columns=2, cell=(60, 90))
    assert all(has_colour(sheet, name) for name in ("red", "green", "blue"))
    wide = contact_sheet(images, columns=8, cell=(60, 90))
    assert wide.width == 3 * 70 + 10
    assert wide.height < sheet.height


def test_a_damaged_file_does_not_spoil_the_sheet(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no image")
    images: list[tuple[Picture, str]] = [(tmp_path / "bad.png", "bad"), (colour("red"), "red")]
    sheet = contact_sheet(images)
    assert has_colour(sheet, "red")


def test_a_sheet_of_nothing_says_so() -> None:
    assert np.ptp(np.asarray(contact_sheet([]))) > 100


def test_a_grid_shows_missing_cells_as_missing() -> None:
    cells = {("a red thing with a long description", "sd"): colour("red")}
    rows, columns = ["a red thing with a long description", "second"], ["sd", "dreambooth"]
    sheet = grid(rows, columns, cells, cell=(60, 90), heading_width=100, title="Prompts")
    assert has_colour(sheet, "red")
    assert sheet.size == (10 + 100 + 10 + 2 * 70, sheet.height)
    pixels = np.asarray(sheet).astype(int)
    missing = pixels[-95:, -75:]  # last row, last column
    assert (np.abs(missing - np.array(BACKGROUND)).max(axis=2) > 20).any()


def test_a_heading_wider_than_its_column_wraps() -> None:
    def below(column: str) -> np.ndarray:
        sheet = grid(["row"], [column], {}, cell=(90, 90), heading_width=60)
        return np.asarray(sheet)[: sheet.height - 90 - 10, -100:].astype(int)

    narrow, wide = below("dreambooth"), below("dreambooth_negative")
    assert len(wide) == len(narrow) + 21
    second_line = wide[len(narrow) - 6 :]
    assert (np.abs(second_line - np.array(BACKGROUND)).max(axis=2) > 100).any()


def test_many_rows_are_dealt_to_blocks_beside_each_other() -> None:
    rows = [f"row {number}" for number in range(5)]
    cells: dict[tuple[str, str], Picture] = {(rows[0], "sd"): colour("red"),
                                             (rows[4], "sd"): colour("blue")}  # fmt: skip
    tall = grid(rows, ["sd"], cells, cell=(60, 90), heading_width=80)
    wide = grid(rows, ["sd"], cells, cell=(60, 90), heading_width=80, blocks=2)
    assert tall.height - wide.height == 2 * 100, "three rows instead of five"
    assert wide.width == 2 * tall.width + 20
    left, right = wide.crop((0, 0, tall.width, 999)), wide.crop((tall.width, 0, wide.width, 999))
    assert has_colour(left, "red") and not has_colour(left, "blue")
    assert has_colour(right, "blue") and not has_colour(right, "red")


def test_a_note_stands_below_its_cell() -> None:
    cells: dict[tuple[str, str], Picture] = {("one", "sd"): colour("red")}
    bare = grid(["one"], ["sd"], cells, cell=(60, 90))
    noted = grid(["one"], ["sd"], cells, cell=(60, 90), notes={("one", "sd"): "+0.123"})
    assert noted.height == bare.height + 18
    strip = np.asarray(noted)[-26:-10, -70:-10].astype(int)
    assert (np.abs(strip - np.array(BACKGROUND)).max(axis=2) > 100).any()


def test_the_sheet_of_a_suite_shows_the_first_seed_of_each_prompt(tmp_path: Path) -> None:
    suite = pd.DataFrame(
        {"prompt_id": ["cat", "dog"], "prompt": ["a cat", "a dog"], "seeds": ["[7, 1]", "[2]"]}
    )
    cells = [
        ("cat", "sd", 7, "red"),
        ("cat", "sd", 1, "yellow"),
        ("dog", "dreambooth_negative", 2, "blue"),
        ("dog", "sd", 2, ""),
    ]
    for name in ("red", "yellow", "blue"):
        colour(name).save(tmp_path / f"{name}.png")
    generations = pd.DataFrame(cells, columns=["prompt_id", "variant", "seed", "image_path"])
    paths = generations["image_path"]
    generations["image_path"] = paths.where(paths == "", paths + ".png")
    sheet = suite_sheet(suite, generations, tmp_path)
    assert has_colour(sheet, "red") and has_colour(sheet, "blue")
    assert not has_colour(sheet, "yellow")
    assert of_first_seed(suite, generations)["seed"].tolist() == [7, 2, 2]


def test_a_data_uri_stays_small_whatever_the_image() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 400, 3), np.uint8))
    uri = data_uri(noise)
    assert len(uri) <= INLINE_BYTES
    kind, _, body = uri.partition(";base64,")
    assert kind == "data:image/webp"
    shown = Image.open(io.BytesIO(base64.b64decode(body)))
    assert shown.width / shown.height == pytest.approx(400 / 600, rel=0.1)


def test_markdown_escapes_the_description() -> None:
    text = markdown_image(colour("red"), "a [red]\nimage")
    assert text.startswith("![a \\[red\\] image](data:image/webp;base64,")


def _cell_of(sheet: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The pixels of the first cell of a sheet without title."""
    return np.asarray(sheet.crop((GAP, GAP, GAP + size[0], GAP + size[1])), dtype=np.float64)


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_a_large_jpeg_stands_upright_and_looks_as_if_decoded_whole(
    tmp_path: Path, orientation: int
) -> None:
    width, height = (900, 600) if orientation != 1 else (600, 900)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = 127 + 120 * np.sin(25 * x * x + 7 * y)
    pixels = np.stack([255 * x, 255 * y, waves], axis=2).astype(np.uint8)
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture.save(tmp_path / "poster.jpg", quality=95, exif=exif)
    size = (72, 108)
    upright = {1: 0, 6: 270, 8: 90}[orientation]
    expected = picture.rotate(upright, expand=True).resize(size, Image.Resampling.LANCZOS)
    drawn = _cell_of(contact_sheet([(tmp_path / "poster.jpg", "")], cell=size), size)
    error = np.mean((drawn - np.asarray(expected, dtype=np.float64)) ** 2)
    assert 10 * np.log10(255**2 / error) > 38


def test_a_label_wraps_to_as_many_lines_as_it_is_given() -> None:
    picture = Image.new("RGB", (20, 30), "teal")
    images = [(picture, "one word below another")]
    low, high = (contact_sheet(images, cell=(60, 30), label_lines=lines) for lines in (1, 4))

    def inked_rows(sheet: Image.Image) -> int:
        below = np.asarray(sheet.crop((0, GAP + 32, sheet.width, sheet.height)))
        return int((below != BACKGROUND).any(axis=(1, 2)).sum())

    assert high.height > low.height + 40
    assert inked_rows(high) > 2 * inked_rows(low)


@pytest.mark.parametrize(
    ("texts", "shown"),
    [
        (["a film of a cat on teal", "a film of an owl on teal"], ["… a cat …", "… an owl …"]),
        (["one cat", "two owls"], ["one cat", "two owls"]),
        (["a cat", "a cat"], ["a cat", "a cat"]),
        (["a cat", "a cat that sleeps"], ["…", "… that sleeps"]),
        (["cat cat", "cat"], ["… cat", "…"]),
        (["only one"], ["only one"]),
        ([], []),
    ],
)
def test_of_texts_what_tells_them_apart_is_left(texts: list[str], shown: list[str]) -> None:
    assert without_shared_ends(texts) == shown


@given(label=st.text(max_size=300), cell_width=st.integers(30, 120))
@settings(max_examples=30, deadline=None)
def test_a_label_stays_within_its_cell(label: str, cell_width: int) -> None:
    picture = Image.new("RGB", (20, 30), "teal")
    sheet = contact_sheet([(picture, label), (picture, "")], columns=2, cell=(cell_width, 30))
    # Letters may lean over their own width by a pixel or two, not over the gap.
    between = np.asarray(sheet.crop((GAP + cell_width + 3, 0, 2 * GAP + cell_width, sheet.height)))
    assert (between == BACKGROUND).all()


def test_of_a_long_label_as_much_is_kept_as_fits() -> None:
    picture = Image.new("RGB", (20, 30), "teal")

    def ink(label: str) -> int:
        """The last column with ink below the picture."""
        sheet = contact_sheet([(picture, label)], cell=(100, 30))
        below = np.asarray(sheet.crop((0, GAP + 32, sheet.width, sheet.height)))
        return int((below != BACKGROUND).any(axis=(0, 2)).nonzero()[0].max())

    for long in ("i" * 200, "word " * 40, "one " + "w" * 100):
        assert GAP + 100 - 14 < ink(long) <= GAP + 100 + 2, long
