"""The held-out posters as the trainer reads them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pandas as pd
from PIL import Image

from posterpipe.core.dreambooth.data import read_training_set
from posterpipe.core.posters.arrivals import holdout_entries, holdout_source
from posterpipe.core.posters.landing import scan_holdout
from posterpipe.core.posters.listing import HOLDOUT, Folder
from posterpipe.core.progress import NoProgress
from posterpipe.core.store import Store, table_version
from posterpipe.core.training.holdout_set import build_holdout_set, with_captions
from posterpipe.settings import AutomationSettings, Settings, load_settings
from posterpipe_tests.core.tiny_blip import build_tiny_blip


def settings_for(folder: Path) -> Settings:
    return load_settings(
        "starter",
        holdout=folder / "holdout",
        captions=folder / "captions.csv",
        images={"width": 32, "height": 48},
        captioner={
            "model": {"id": str(folder / "captioner")},
            "num_beams": 1,
            "trigger": "in our style,",
        },
    )


def held(folder: Path, store: Store) -> pd.DataFrame:
    """What the asset `holdout_posters` makes of the folder."""
    place = Folder(folder / "holdout")
    entries = holdout_entries(place.path)
    posters = scan_holdout(
        Folder(place.path, HOLDOUT), settings_for(folder).images, store, entries=entries
    )
    table, _ = with_captions(posters, place, entries, store, NoProgress())
    store.write_table("holdout_posters", table)
    return table


def put(folder: Path, *colours: str) -> None:
    (folder / "holdout").mkdir()
    for colour in colours:
        Image.new("RGB", (80, 120), colour).save(folder / "holdout" / f"{colour}.png")
    build_tiny_blip(folder / "captioner")


def test_posters_are_resized_captioned_and_worded_like_those_trained_on(tmp_path: Path) -> None:
    put(tmp_path, "red", "blue")
    (tmp_path / "holdout" / "red.txt").write_text("a red square")
    store = Store(tmp_path / "store")
    table = held(tmp_path, store)
    # As where it is not mounted: bytes and captions are those of the table.
    shutil.rmtree(tmp_path / "holdout")
    folder, version = build_holdout_set(store, table, settings_for(tmp_path), NoProgress())
    assert folder is not None
    examples = read_training_set(folder)
    assert len(examples) == 2
    captions = {example.caption for example in examples}
    assert "in our style, a red square" in captions
    assert all(caption.startswith("in our style, ") for caption in captions)
    with Image.open(examples[0].image) as image:
        assert image.size == (32, 48)
    again = build_holdout_set(store, table, settings_for(tmp_path), NoProgress())
    assert again == (folder, version)


def test_a_row_about_a_poster_of_the_landing_folder_is_about_no_other_of_that_name(
    tmp_path: Path,
) -> None:
    put(tmp_path, "red")
    store = Store(tmp_path / "store")
    before = build_holdout_set(store, held(tmp_path, store), settings_for(tmp_path), NoProgress())
    (tmp_path / "captions.csv").write_text("file_name,caption\nred.png,a row about another\n")
    after = build_holdout_set(store, held(tmp_path, store), settings_for(tmp_path), NoProgress())
    assert after == before


def test_a_text_beside_a_held_out_poster_is_noticed_and_makes_another_table_and_set(
    tmp_path: Path,
) -> None:
    put(tmp_path, "red", "blue")
    store = Store(tmp_path / "store")
    settings = settings_for(tmp_path)

    def state() -> tuple[str, str, str]:
        source = holdout_source(tmp_path / "holdout", store, settings.automation, time.time())
        table = held(tmp_path, store)
        _, version = build_holdout_set(store, table, settings, NoProgress())
        return source.digest, table_version(table), version

    first = state()
    assert state() == first
    (tmp_path / "holdout" / "red.txt").write_text("what a person wrote")
    for one, other in zip(first, state(), strict=True):
        assert one != other


def test_a_text_beside_a_held_out_poster_is_waited_for_while_it_is_written(tmp_path: Path) -> None:
    put(tmp_path, "red")
    (tmp_path / "holdout" / "red.txt").write_text("what a pers")
    store = Store(tmp_path / "store")
    now = time.time()
    source = holdout_source(tmp_path / "holdout", store, AutomationSettings(), now)
    assert "red.txt" in source.young


def test_without_held_out_posters_there_is_no_set(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    settings = settings_for(tmp_path)
    assert build_holdout_set(store, held(tmp_path, store), settings, NoProgress()) == (None, "")
    (tmp_path / "holdout").mkdir()
    (tmp_path / "holdout" / "notes.png").write_text("no picture")
    assert build_holdout_set(store, held(tmp_path, store), settings, NoProgress()) == (None, "")
