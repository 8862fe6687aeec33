"""The held-out posters as the trainer reads them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from posterpipe.core.dreambooth.data import read_training_set
from posterpipe.core.holdout_set import build_holdout_set
from posterpipe.core.progress import NoProgress
from posterpipe.core.store import Store
from posterpipe.settings import Settings, load_settings
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


def test_posters_are_resized_captioned_and_worded_like_those_trained_on(tmp_path: Path) -> None:
    (tmp_path / "holdout").mkdir()
    for name, colour in (("one.png", "red"), ("two.png", "blue")):
        Image.new("RGB", (80, 120), colour).save(tmp_path / "holdout" / name)
    (tmp_path / "holdout" / "one.txt").write_text("a red square")
    build_tiny_blip(tmp_path / "captioner")
    store = Store(tmp_path / "store")
    folder, version = build_holdout_set(store, settings_for(tmp_path), NoProgress())
    assert folder is not None
    examples = read_training_set(folder)
    assert len(examples) == 2
    captions = {example.caption for example in examples}
    assert "in our style, a red square" in captions
    assert all(caption.startswith("in our style, ") for caption in captions)
    with Image.open(examples[0].image) as image:
        assert image.size == (32, 48)
    assert build_holdout_set(store, settings_for(tmp_path), NoProgress()) == (folder, version)


def test_without_held_out_posters_there_is_no_set(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert build_holdout_set(store, settings_for(tmp_path), NoProgress()) == (None, "")
    (tmp_path / "holdout").mkdir()
    (tmp_path / "holdout" / "notes.png").write_text("no picture")
    assert build_holdout_set(store, settings_for(tmp_path), NoProgress()) == (None, "")
