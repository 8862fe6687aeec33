"""Reading a training set: what is refused, and how it is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from posterpipe.core.dreambooth.data import load_pixels, read_training_set
from posterpipe.core.dreambooth.errors import TrainingSetError


@pytest.fixture
def copied(training_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(training_set, tmp_path / "set"))


def test_rows_come_in_the_order_of_the_csv(training_set: Path) -> None:
    examples = read_training_set(training_set)
    assert [e.image.name for e in examples] == [f"{n:04d}.png" for n in range(5)]
    assert examples[0].caption == "a red rocket on a blue poster"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "training.csv:1"),
        ("file_name,text\n0000.png,a cat\n", "column caption is missing"),
        ("file_name,caption\n", "no rows"),
        ("file_name,caption\n0000.png\n", "training.csv:2"),
        ("file_name,caption\n0000.png,a,cat\n", "training.csv:2"),
        ("file_name,caption\n0000.png,a cat\n0001.png, \n", "training.csv:3: no caption"),
        ("file_name,caption\n../0000.png,a cat\n", "outside the folder"),
        ("file_name,caption\n0000.png,a cat\nnone.png,a dog\n", "none.png missing"),
        (f"file_name,caption\n{'a' * 300}.png,a cat\n", "aaa.png missing"),
        ("file_name,caption\n0000.png,a \0cat\n0\0.png,a dog\n", "0\0.png missing"),
        (
            'file_name,caption\n0000.png,"a\ncat"\n0001.png,"a dog\n0002.png,a cow\n',
            "training.csv:4: a quote is opened there and not closed",
        ),
        (
            f"file_name,caption\n0000.png,a cat\n0001.png,{'a' * 131_073}\n",
            "training.csv:3: a cell has more than 131072 characters, or its quote is not closed",
        ),
        ('file_name,caption\n0000.png,"a" cat\n', "training.csv:2: no row of a CSV ("),
        ('"file_name,caption\n', "training.csv:1: a quote"),
    ],
)
def test_a_broken_csv_is_named_with_its_line(copied: Path, text: str, words: str) -> None:
    (copied / "training.csv").write_text(text, encoding="utf-8")
    with pytest.raises(TrainingSetError) as caught:
        read_training_set(copied)
    assert words in str(caught.value) and "training.csv" in str(caught.value)


def test_a_csv_in_another_encoding_is_named(copied: Path) -> None:
    (copied / "training.csv").write_bytes(
        "file_name,caption\n0000.png,caf\u00e9\n".encode("latin-1")
    )
    with pytest.raises(TrainingSetError, match="not in UTF-8"):
        read_training_set(copied)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingSetError, match=r"nowhere.*No such file"):
        read_training_set(tmp_path / "nowhere")


def test_pixels_lie_between_minus_one_and_one(copied: Path) -> None:
    Image.new("RGB", (32, 48), (255, 0, 51)).save(copied / "flat.png")
    pixels = load_pixels(copied / "flat.png", (32, 48))
    assert pixels.shape == (3, 48, 32)
    assert pixels[:, 0, 0].tolist() == pytest.approx([1, -1, -0.6])


def test_an_image_is_seen_as_people_see_it(copied: Path) -> None:
    Image.new("RGBA", (32, 48), (255, 0, 0, 0)).save(copied / "clear.png")
    assert load_pixels(copied / "clear.png", (32, 48)).unique().tolist() == [1]

    grey = Image.fromarray(np.full((48, 32), 32896, dtype=np.uint16))
    grey.save(copied / "deep.png")
    assert load_pixels(copied / "deep.png", (32, 48)).unique().tolist() == pytest.approx(
        [1 / 255], abs=1e-6
    )

    lying = Image.new("RGB", (48, 32), "red")
    lying.paste("blue", (0, 0, 24, 32))
    lying.save(copied / "lying.png", exif=exif(orientation=6))
    pixels = load_pixels(copied / "lying.png", (32, 48))
    assert pixels[:, 0, 0].tolist() == [-1, -1, 1] and pixels[:, 47, 0].tolist() == [1, -1, -1]
    with pytest.raises(TrainingSetError, match=r"lying\.png: 32x48 pixels.*48x32"):
        load_pixels(copied / "lying.png", (48, 32))


def exif(*, orientation: int) -> Image.Exif:
    values = Image.Exif()
    values[ExifTags.Base.Orientation] = orientation
    return values


def test_an_unreadable_image_and_one_of_another_size_are_named(copied: Path) -> None:
    (copied / "text.png").write_text("not a picture")
    with pytest.raises(TrainingSetError, match=r"text\.png: not a readable image"):
        load_pixels(copied / "text.png", (32, 48))
    with pytest.raises(TrainingSetError, match=r"0000\.png: 32x48 pixels.*64x96"):
        load_pixels(copied / "0000.png", (64, 96))


def test_with_buckets_any_multiple_of_eight_will_do(copied: Path) -> None:
    Image.new("RGB", (40, 64)).save(copied / "tall.png")
    Image.new("RGB", (41, 64)).save(copied / "odd.png")
    assert load_pixels(copied / "tall.png", None).shape == (3, 64, 40)
    with pytest.raises(TrainingSetError, match=r"odd\.png: 41x64 pixels.*multiples of 8"):
        load_pixels(copied / "odd.png", None)
