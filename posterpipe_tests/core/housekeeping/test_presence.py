"""What was lost from the store is found, and looking for it costs next to nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import time

import pandas as pd
import pytest
from PIL import Image

from posterpipe.core.housekeeping.presence import lost_part
from posterpipe.core.images import png_bytes
from posterpipe.core.store import Store
from posterpipe.core.training.training_set import build_training_set


def resized(store: Store, count: int = 3) -> pd.DataFrame:
    rows = [
        {
            "poster_id": f"{number:064}",
            "image": store.put(png_bytes(Image.new("RGB", (8, 8), (number, 0, 0))), ".png"),
            "status": "ok",
        }
        for number in range(count)
    ]
    return pd.DataFrame([*rows, {"poster_id": "f" * 64, "image": "", "status": "failed"}])


def test_a_table_whose_file_is_gone_is_lost(store: Store) -> None:
    assert lost_part(store, "prompt_suite") == "the table prompt_suite is gone"
    version = store.write_table("prompt_suite", pd.DataFrame({"prompt_id": ["a"]}))
    assert lost_part(store, "prompt_suite") == ""
    path = store.root / "tables" / "prompt_suite" / f"{version}.parquet"
    path.unlink()
    assert lost_part(store, "prompt_suite") == f"{path} is gone"


@pytest.mark.parametrize("name", ["resized_posters", "human_captions"])
def test_a_table_that_cannot_be_read_is_told_and_stops_nothing(store: Store, name: str) -> None:
    version = store.write_table(name, resized(store))
    path = store.root / "tables" / name / f"{version}.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    assert lost_part(store, name).startswith(f"{path} cannot be read")


def test_lost_images_are_named_and_rows_without_bytes_are_not_missed(store: Store) -> None:
    table = resized(store)
    store.write_table("resized_posters", table)
    assert lost_part(store, "resized_posters") == ""
    path = store.path(table["image"][0], ".png")
    path.unlink()
    assert lost_part(store, "resized_posters") == f"{path} is gone"
    shutil.rmtree(store.root / "blobs")
    assert "and 2 more are gone" in lost_part(store, "resized_posters")


def test_of_posters_only_those_are_missed_that_were_kept(store: Store) -> None:
    kept = store.put(b"poster")
    rows = [(kept, "ok"), (kept, "duplicate"), ("a" * 64, "rejected"), ("", "rejected")]
    store.write_table("raw_posters", pd.DataFrame(rows, columns=["poster_id", "status"]))
    assert lost_part(store, "raw_posters") == ""
    store.path(kept).unlink()
    assert lost_part(store, "raw_posters") == f"{store.path(kept)} is gone"


@pytest.mark.parametrize("lost", ["train", "training.csv"])
def test_a_training_set_without_its_files_is_lost(store: Store, lost: str) -> None:
    images = resized(store)
    captions = images.assign(caption="a poster", source="model")
    frame, folder, version = build_training_set(store, images, captions)
    store.write_table("training_csv", frame.assign(training_set=version))
    assert lost_part(store, "training_csv") == ""
    (folder / lost).rename(folder / "elsewhere")
    assert str(folder / lost) in lost_part(store, "training_csv")


def test_looking_after_ten_thousand_posters_takes_a_moment_and_marks_nothing(
    store: Store,
) -> None:
    ids = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(10_000)]
    for poster_id in ids:
        path = store.path(poster_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    os.utime(path, (1, 1))
    store.write_table("raw_posters", pd.DataFrame({"poster_id": ids, "status": "ok"}))
    started = time.process_time()
    assert lost_part(store, "raw_posters") == ""
    assert time.process_time() - started < 0.5
    assert path.stat().st_mtime == 1
