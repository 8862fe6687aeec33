"""The folder that trainers read: complete, exact, and named by its content."""

from __future__ import annotations

import csv
import hashlib
import os
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from posterpipe.core.images import png_bytes
from posterpipe.core.store import Store
from posterpipe.core.training import training_set
from posterpipe.core.training.training_set import (
    COLUMNS,
    TrainingSetEmpty,
    build_training_set,
    training_caption,
)
from posterpipe.settings import DEFAULT_TEMPLATE
from posterpipe_tests.core.conftest import Disk

CAPTIONS = ['a red rocket, titled "Go"', "a blue\ncastle ", "eine gelbe Tür"]


def tables(store: Store, captions: list[str] = CAPTIONS) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = []
    for number, caption in enumerate(captions):
        image = Image.new("RGB", (8, 8), (number, 0, 0))
        blob = store.put(png_bytes(image), ".png")
        rows.append({"poster_id": f"{number:064}", "image": blob, "caption": caption})
    frame = pd.DataFrame(rows, columns=["poster_id", "image", "caption"]).assign(status="ok")
    return frame.drop(columns="caption"), frame.drop(columns="image").assign(source="model")


def test_the_csv_lies_beside_its_images_and_gives_the_version(store: Store) -> None:
    frame, folder, version = build_training_set(store, *tables(store))
    assert folder == store.root / "training_sets" / version
    data = (folder / "training.csv").read_bytes()
    assert hashlib.sha256(data).hexdigest() == version
    with open(folder / "training.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["caption"] for row in rows] == [
        'a red rocket, titled "Go"',
        "a blue castle",
        "eine gelbe Tür",
    ]
    assert list(rows[0]) == ["file_name", "caption"]
    assert list(frame.columns) == COLUMNS
    for number, row in enumerate(rows):
        assert Image.open(folder / row["file_name"]).getpixel((0, 0)) == (number, 0, 0)


def test_datasets_reads_the_folder_as_imagefolder(store: Store, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    frame, folder, _ = build_training_set(store, *tables(store))
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache")
    )
    assert list(loaded) == ["train"]
    assert list(loaded["train"]["caption"]) == frame["caption"].tolist()
    assert loaded["train"][1]["image"].getpixel((0, 0)) == (1, 0, 0)


def test_the_version_changes_with_an_image_and_with_a_caption(store: Store) -> None:
    resized, captions = tables(store)
    versions = {build_training_set(store, resized, captions)[2]}
    other = resized.copy()
    other.loc[0, "image"] = store.put(png_bytes(Image.new("RGB", (8, 8), "white")), ".png")
    versions.add(build_training_set(store, other, captions)[2])
    versions.add(build_training_set(store, resized, captions.replace(CAPTIONS[2], "a door"))[2])
    versions.add(build_training_set(store, resized[1:], captions)[2])
    assert len(versions) == 4


def test_the_version_does_not_depend_on_the_order_of_rows(store: Store) -> None:
    resized, captions = tables(store)
    version = build_training_set(store, resized, captions)[2]
    assert build_training_set(store, resized[::-1], captions[::-1])[2] == version


def test_posters_without_image_or_words_are_left_out(store: Store) -> None:
    resized, captions = tables(store, ["one", "two", "three", "  "])
    resized.loc[0, "status"] = "failed"
    captions.loc[1, "status"] = "failed"
    frame, _, _ = build_training_set(store, resized, captions)
    assert frame["caption"].tolist() == ["three"]


def test_posters_that_come_to_the_same_image_are_trained_on_once(store: Store) -> None:
    resized, captions = tables(store)
    resized["image"] = resized["image"][0]
    frame, _, _ = build_training_set(store, resized, captions)
    assert frame["caption"].tolist() == [CAPTIONS[0]]


def test_of_copies_of_an_image_the_one_that_a_person_described_is_taken(store: Store) -> None:
    resized, captions = tables(store)
    resized["image"] = resized["image"][0]
    captions.loc[2, "source"] = "human"
    frame, _, _ = build_training_set(store, resized, captions)
    assert frame["caption"].tolist() == [CAPTIONS[2]]


def test_captions_are_worded_by_the_template_and_nothing_else_changes(store: Store) -> None:
    resized, captions = tables(store)
    plain, _, version = build_training_set(store, resized, captions)
    frame, folder, worded = build_training_set(
        store, resized, captions, template="{trigger}, {caption}", trigger="in  our style"
    )
    assert worded != version
    assert frame["caption"].tolist() == [f"in our style, {text}" for text in plain["caption"]]
    pd.testing.assert_frame_equal(frame.drop(columns="caption"), plain.drop(columns="caption"))
    with open(folder / "training.csv", encoding="utf-8", newline="") as file:
        assert [row["caption"] for row in csv.DictReader(file)] == frame["caption"].tolist()
    assert build_training_set(store, resized, captions)[2] == version


@pytest.mark.parametrize(
    ("template", "trigger", "expected"),
    [
        (DEFAULT_TEMPLATE, "", "a {red} rocket"),
        (DEFAULT_TEMPLATE, "sks poster:", "sks poster: a {red} rocket"),
        ("{trigger}, {caption}", "{caption}", "{caption}, a {red} rocket"),
        ("{{x}} {caption}", "", "{x} a {red} rocket"),
    ],
)
def test_braces_in_captions_and_triggers_are_text(
    template: str, trigger: str, expected: str
) -> None:
    assert training_caption("a {red} rocket", template, trigger) == expected


def test_nothing_to_train_on_is_an_error_with_a_remedy(store: Store) -> None:
    resized, captions = tables(store)
    with pytest.raises(TrainingSetEmpty, match="poster_captions"):
        build_training_set(store, resized, captions.assign(status="failed"))


def test_the_folder_appears_only_when_it_is_complete(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    resized, captions = tables(store)
    store.path(resized["image"][2], ".png").unlink()
    with pytest.raises(FileNotFoundError, match="materialize resized_posters again"):
        build_training_set(store, resized, captions)
    assert list((store.root / "training_sets").iterdir()) == []


def test_a_folder_that_is_there_is_left_alone_and_a_torn_one_is_made_again(store: Store) -> None:
    resized, captions = tables(store)
    frame, folder, _ = build_training_set(store, resized, captions)
    os.utime(folder / "training.csv", (1, 1))
    build_training_set(store, resized, captions)
    assert (folder / "training.csv").stat().st_mtime == 1
    (folder / frame["file_name"][0]).unlink()
    build_training_set(store, resized, captions)
    assert (folder / frame["file_name"][0]).is_file()


@pytest.mark.parametrize("name", ["training.csv", "train/metadata.csv"])
def test_a_csv_that_somebody_edited_is_written_again(store: Store, name: str) -> None:
    resized, captions = tables(store)
    _, folder, _ = build_training_set(store, resized, captions)
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(before.replace(b"castle", b"palace"))
    build_training_set(store, resized, captions)
    assert (folder / name).read_bytes() == before


def save_over(path: Path, data: bytes) -> None:
    """In place, as root can and as editors do with files of their owner."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(mode)


@pytest.mark.parametrize("data", [b"", b"another picture"])
def test_an_image_that_was_saved_over_in_a_set_is_no_longer_taken_for_the_one_of_the_store(
    store: Store, data: bytes
) -> None:
    resized, captions = tables(store)
    frame, folder, _ = build_training_set(store, resized, captions)
    right = (folder / frame["file_name"][1]).read_bytes()
    save_over(folder / frame["file_name"][1], data)
    blob = store.path(frame["image"][1], ".png")
    assert blob.read_bytes() == data  # they are one file
    with pytest.raises(FileNotFoundError, match=r"was changed .* materialize resized_posters"):
        build_training_set(store, resized, captions)
    store.put(right, ".png")
    build_training_set(store, resized, captions)
    assert (folder / frame["file_name"][1]).read_bytes() == right


def test_images_of_the_store_cannot_be_written_to_through_a_set(store: Store) -> None:
    frame, folder, _ = build_training_set(store, *tables(store))
    modes = {(folder / name).stat().st_mode & 0o222 for name in frame["file_name"]}
    assert modes == {0}


def test_without_hard_links_images_are_copied(
    store: Store, monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(training_set.os, "link", no_links)
    resized, captions = tables(store)
    frame, folder, _ = build_training_set(store, resized, captions)
    copies = [folder / name for name in frame["file_name"]]
    assert all(copy.stat().st_nlink == 1 for copy in copies)
    # By its time a copy counts as whole: it has to be that on the disk as well.
    assert folder in disk.renamed and disk.half == [] and disk.unnamed == {}
    # A changed copy is no damage to the store.
    before = copies[0].read_bytes()
    save_over(copies[0], b"another picture")
    build_training_set(store, resized, captions)
    assert copies[0].read_bytes() == before
