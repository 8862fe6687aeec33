"""Captions: batched, the same every time, and never made twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from posterpipe.core import captioner as module
from posterpipe.core.captioner import COLUMNS, Captioner, caption_posters
from posterpipe.core.images import png_bytes
from posterpipe.core.models import ModelMissing
from posterpipe.core.store import Store
from posterpipe.settings import CaptionerSettings, ModelRef
from posterpipe_tests.core.tiny_blip import WORDS, build_tiny_blip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    build_tiny_blip(root / "captioner")
    return root


SETTINGS = CaptionerSettings(model=ModelRef(id="captioner"), batch_size=2, max_new_tokens=8)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def picture(seed: int, size: tuple[int, int] = (40, 60)) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 3, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def resized(store: Store, seeds: range) -> pd.DataFrame:
    rows = [
        {"poster_id": f"{seed:064}", "image": store.put(png_bytes(picture(seed)), ".png")}
        for seed in seeds
    ]
    return pd.DataFrame(rows, columns=["poster_id", "image"]).assign(status="ok")


def test_captions_are_those_of_plain_transformers(root: Path) -> None:
    from transformers import AutoTokenizer, BlipForConditionalGeneration
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    folder = root / "captioner"
    images = [picture(seed) for seed in range(5)]
    model = BlipForConditionalGeneration.from_pretrained(folder).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = BlipImageProcessorPil.from_pretrained(folder)
    expected = []
    for image in images:
        pixel_values = processor(images=image, return_tensors="pt").pixel_values
        tokens = model.generate(
            pixel_values=pixel_values, num_beams=3, max_new_tokens=8, no_repeat_ngram_size=3
        )
        expected.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    captions = Captioner(SETTINGS, root)(images)
    assert captions == expected
    assert len(set(captions)) > 1
    assert {word for caption in captions for word in caption.split()} <= {*WORDS}


def test_weights_kept_in_fp16_run_in_the_precision_of_the_settings(root: Path) -> None:
    import torch

    assert Captioner(SETTINGS, root).model.dtype == torch.float32
    half = Captioner(SETTINGS.model_copy(update={"precision": "bf16"}), root)
    assert half.model.dtype == torch.bfloat16
    assert len(half([picture(0)])) == 1


def test_images_of_different_sizes_in_one_batch(root: Path) -> None:
    captions = Captioner(SETTINGS, root)([picture(0), picture(1, (64, 64))])
    assert len(captions) == 2


def test_a_batch_of_none(root: Path) -> None:
    assert Captioner(SETTINGS, root)([]) == []


def test_each_usable_image_gets_a_caption(root: Path, store: Store) -> None:
    table = resized(store, range(3))
    table.loc[1, "status"] = "failed"
    captions = caption_posters(store, table, SETTINGS, root)
    assert list(captions.columns) == COLUMNS
    assert captions["poster_id"].tolist() == [f"{n:064}" for n in (0, 2)]
    assert set(captions["source"]) == {"model"}
    assert set(captions["model"]) == {"captioner"}
    assert captions["revision"].str.len().tolist() == [12, 12]
    assert set(captions["status"]) == {"ok"}


def test_only_new_images_are_captioned_and_otherwise_no_model_is_loaded(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    caption_posters(store, resized(store, range(3)), SETTINGS, root)
    sizes: list[int] = []

    class Counting(Captioner):
        def __call__(self, images: list[Image.Image]) -> list[str]:
            sizes.append(len(images))
            return super().__call__(images)

    monkeypatch.setattr(module, "Captioner", Counting)
    first = caption_posters(store, resized(store, range(4)), SETTINGS, root)
    assert sizes == [1]

    def must_not_load(settings: CaptionerSettings, root: Path) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(module, "Captioner", must_not_load)
    other_batches = SETTINGS.model_copy(update={"batch_size": 3})
    again = caption_posters(store, resized(store, range(4)), other_batches, root)
    pd.testing.assert_frame_equal(first, again)


def test_posters_of_the_same_pixels_share_a_caption(root: Path, store: Store) -> None:
    table = pd.concat([resized(store, range(1)), resized(store, range(1)).assign(poster_id="f")])
    captions = caption_posters(store, table, SETTINGS, root)
    assert len(captions) == 2
    assert captions["caption"].nunique() == 1


def test_other_decoding_makes_other_captions(root: Path, store: Store) -> None:
    table = resized(store, range(2))
    long = caption_posters(store, table, SETTINGS, root)
    brief = SETTINGS.model_copy(update={"max_new_tokens": 2})
    short = caption_posters(store, table, brief, root)
    assert all(len(caption.split()) <= 2 for caption in short["caption"])
    assert not short["caption"].equals(long["caption"])


def test_one_damaged_image_fails_alone_and_is_tried_again(root: Path, store: Store) -> None:
    table = resized(store, range(4))
    good = store.path(table["image"][2], ".png").read_bytes()
    store.path(table["image"][2], ".png").write_bytes(good[:40])
    store.path(table["image"][3], ".png").unlink()
    captions = caption_posters(store, table, SETTINGS, root)
    assert captions["status"].tolist() == ["ok", "ok", "failed", "failed"]
    assert captions["reason"][2]
    assert "materialize resized_posters again" in captions["reason"][3]
    store.path(table["image"][2], ".png").write_bytes(good)
    store.put(png_bytes(picture(3)), ".png")
    captions = caption_posters(store, table, SETTINGS, root)
    assert set(captions["status"]) == {"ok"}


def test_no_images_give_an_empty_table(root: Path, store: Store) -> None:
    captions = caption_posters(store, resized(store, range(0)), SETTINGS, root)
    assert list(captions.columns) == COLUMNS
    assert captions.empty


def test_a_missing_captioner_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match="captioner is not there"):
        caption_posters(
            store,
            resized(store, range(1)),
            SETTINGS.model_copy(update={"model": ModelRef(id="data/models/captioner")}),
            tmp_path,
        )
