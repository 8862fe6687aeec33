"""Captions: batched, the same every time, never made twice, and never in a person's place."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from posterpipe.core import captioner as module
from posterpipe.core.captioner import (
    COLUMNS,
    Captioner,
    Description,
    caption_posters,
    retriable_count,
)
from posterpipe.core.captions.people import HumanCaption
from posterpipe.core.devices import DeviceGone
from posterpipe.core.images import png_bytes
from posterpipe.core.memory import TOO_LITTLE_MEMORY
from posterpipe.core.models import ModelMissing
from posterpipe.core.store import Store
from posterpipe.settings import CaptionerSettings, ModelRef, default_root, load_settings
from posterpipe_tests.core.tiny_blip import WORDS, build_tiny_blip

if TYPE_CHECKING:
    import torch


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    build_tiny_blip(root / "captioner")
    return root


SETTINGS = CaptionerSettings(
    model=ModelRef(id="captioner"), batch_size=2, max_new_tokens=8, precision="fp32"
)


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


@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_are_those_of_plain_transformers(root: Path, num_beams: int) -> None:
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
            pixel_values=pixel_values,
            num_beams=num_beams,
            max_new_tokens=8,
            no_repeat_ngram_size=3,
        )
        expected.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    captions = Captioner(SETTINGS.model_copy(update={"num_beams": num_beams}), root)(images)
    assert captions == expected
    assert len(set(captions)) > 1
    assert {word for caption in captions for word in caption.split()} <= {*WORDS}


def test_a_trained_captioner_says_what_it_says_under_plain_transformers() -> None:
    from transformers import BlipForConditionalGeneration

    project = default_root()
    settings = load_settings("starter").captioner
    captioner = Captioner(settings, project)
    model = BlipForConditionalGeneration.from_pretrained(project / settings.model.id).float().eval()
    images = []
    for path in sorted((project / "data/raw_posters").iterdir())[:6]:
        with Image.open(path) as poster:
            images.append(poster.convert("RGB").resize((64, 96)))
    expected = []
    for image in images:
        tokens = model.generate(
            pixel_values=captioner.image_processor(images=image, return_tensors="pt").pixel_values,
            num_beams=settings.num_beams,
            max_new_tokens=settings.max_new_tokens,
            no_repeat_ngram_size=settings.no_repeat_ngram_size,
        )
        expected.append(
            " ".join(captioner.tokenizer.decode(tokens[0], skip_special_tokens=True).split())
        )
    assert captioner(images) == expected
    assert len(set(expected)) > 3


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
        def describe(self, pixels: torch.Tensor) -> list[Description]:
            sizes.append(len(pixels))
            return super().describe(pixels)

    monkeypatch.setattr(module, "Captioner", Counting)
    first = caption_posters(store, resized(store, range(4)), SETTINGS, root)
    assert sizes == [1]

    monkeypatch.setattr(module, "Captioner", must_not_load)
    other_batches = SETTINGS.model_copy(update={"batch_size": 3})
    again = caption_posters(store, resized(store, range(4)), other_batches, root)
    pd.testing.assert_frame_equal(first, again)


def must_not_load(settings: CaptionerSettings, root: Path) -> None:
    raise AssertionError("loaded")


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that any captioner of the test describes."""
    sizes: list[int] = []

    class Counting(Captioner):
        def describe(self, pixels: torch.Tensor) -> list[Description]:
            sizes.append(len(pixels))
            return super().describe(pixels)

    monkeypatch.setattr(module, "Captioner", Counting)
    return sizes


def test_what_a_person_wrote_is_taken_and_the_model_not_asked(
    root: Path, store: Store, described: list[int]
) -> None:
    human = {f"{1:064}": HumanCaption("by hand", "look"), "of no poster here": HumanCaption("x")}
    captions = caption_posters(store, resized(store, range(3)), SETTINGS, root, human=human)
    assert described == [2]
    assert captions["source"].tolist() == ["model", "human", "model"]
    row = captions.iloc[1]
    assert (row["caption"], row["status"], row["reason"]) == ("by hand", "ok", "look")
    assert (row["model"], row["revision"]) == ("", "")


def test_another_captioner_describes_all_but_what_people_wrote(
    root: Path, store: Store, described: list[int]
) -> None:
    table = resized(store, range(4))
    human = {f"{2:064}": HumanCaption("by hand")}
    before = caption_posters(store, table, SETTINGS, root, human=human)
    other = SETTINGS.model_copy(update={"max_new_tokens": 2, "batch_size": 8})
    after = caption_posters(store, table, other, root, human=human)
    assert described == [2, 1, 3]
    same = before["caption"] == after["caption"]
    assert same.tolist() == [False, False, True, False]


def test_a_changed_human_caption_touches_its_row_alone_and_asks_no_model(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = resized(store, range(3))
    plain = caption_posters(store, table, SETTINGS, root)
    monkeypatch.setattr(module, "Captioner", must_not_load)
    for text in ("first words", "other words"):
        human = {f"{1:064}": HumanCaption(text)}
        captions = caption_posters(store, table, SETTINGS, root, human=human)
        assert captions["caption"].tolist() == [plain["caption"][0], text, plain["caption"][2]]
        pd.testing.assert_frame_equal(captions.drop(1), plain.drop(1))
    # Taken away again: what the model had said is still known.
    pd.testing.assert_frame_equal(caption_posters(store, table, SETTINGS, root, human={}), plain)


def test_where_people_wrote_everything_no_model_is_needed(store: Store, tmp_path: Path) -> None:
    human = {f"{0:064}": HumanCaption("by hand")}
    table = resized(store, range(1))
    missing = SETTINGS.model_copy(update={"model": ModelRef(id="models/none/here")})
    captions = caption_posters(store, table, missing, tmp_path, human=human)
    assert captions["caption"].tolist() == ["by hand"]


def test_a_caption_that_reached_its_limit_says_so(root: Path, store: Store) -> None:
    table = resized(store, range(2))
    brief = SETTINGS.model_copy(update={"max_new_tokens": 1})
    captions = caption_posters(store, table, brief, root)
    assert set(captions["status"]) == {"ok"}
    assert all("captioner.max_new_tokens = 1" in reason for reason in captions["reason"])


def test_a_caption_that_ended_by_itself_is_not_called_cut(root: Path) -> None:
    import torch

    captioner = Captioner(SETTINGS, root)
    # A bias on the end token makes the model stop at once, whatever it sees.
    end = captioner.model.config.text_config.sep_token_id
    with torch.no_grad():
        captioner.model.text_decoder.cls.predictions.decoder.bias[end] += 1e4
    pixels = torch.stack([captioner.pixels(picture(0))])
    assert captioner.describe(pixels) == [Description("", cut=False)]


def test_a_batch_that_does_not_fit_is_halved(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = resized(store, range(5))
    expected = caption_posters(store, table, SETTINGS, root)
    sizes: list[int] = []

    class Small(Captioner):
        def describe(self, pixels: torch.Tensor) -> list[Description]:
            sizes.append(len(pixels))
            if len(pixels) > 2:
                raise RuntimeError("can't allocate memory")
            return super().describe(pixels)

    monkeypatch.setattr(module, "Captioner", Small)
    other = Store(store.root / "other")
    resized(other, range(5))
    wide = SETTINGS.model_copy(update={"batch_size": 5})
    captions = caption_posters(other, table, wide, root)
    assert sizes == [5, 2, 3, 1, 2]
    pd.testing.assert_frame_equal(captions, expected)


def test_a_device_that_is_gone_ends_the_captioning_and_what_was_done_is_kept(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = resized(store, range(20))
    expected = caption_posters(Store(store.root / "other"), resized(
        Store(store.root / "other"), range(20)), SETTINGS, root)  # fmt: skip
    calls = 0

    class Breaking(Captioner):
        def describe(self, pixels: torch.Tensor) -> list[Description]:
            nonlocal calls
            calls += 1
            if calls > 2:
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
            return super().describe(pixels)

    monkeypatch.setattr(module, "Captioner", Breaking)
    with pytest.raises(
        DeviceGone, match=r"captioner.*illegal memory access.*what was done is kept"
    ):
        caption_posters(store, table, SETTINGS, root)
    assert calls == 3
    sizes: list[int] = []

    class Whole(Captioner):
        def describe(self, pixels: torch.Tensor) -> list[Description]:
            sizes.append(len(pixels))
            return super().describe(pixels)

    monkeypatch.setattr(module, "Captioner", Whole)
    captions = caption_posters(store, table, SETTINGS, root)
    assert sum(sizes) == 16
    pd.testing.assert_frame_equal(captions, expected)


def test_an_image_that_breaks_the_model_fails_alone(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = resized(store, range(4))
    with Image.open(store.path(table["image"][1], ".png")) as image:
        bad = Captioner(SETTINGS, root).pixels(image.convert("RGB"))

    class Choosy(Captioner):
        def describe(self, pixels: torch.Tensor) -> list[Description]:
            if any(bool((one == bad).all()) for one in pixels):
                raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
            return super().describe(pixels)

    monkeypatch.setattr(module, "Captioner", Choosy)
    captions = caption_posters(store, table, SETTINGS, root)
    assert captions["status"].tolist() == ["ok", "failed", "ok", "ok"]
    assert retriable_count(captions) == 1


def test_the_reason_of_too_little_memory_is_the_same_each_time(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = resized(store, range(1))
    free = iter((20, 30))

    class Full(Captioner):
        def describe(self, pixels: torch.Tensor) -> list[Description]:
            raise RuntimeError(f"CUDA out of memory. {next(free)} MiB are free")

    monkeypatch.setattr(module, "Captioner", Full)
    first = caption_posters(store, table, SETTINGS, root)
    second = caption_posters(store, table, SETTINGS, root)
    assert first["reason"].tolist() == [TOO_LITTLE_MEMORY]
    pd.testing.assert_frame_equal(first, second)

    class WithoutKernel(Captioner):
        def describe(self, pixels: torch.Tensor) -> list[Description]:
            raise RuntimeError("Unable to find a valid cuDNN algorithm to run convolution")

    monkeypatch.setattr(module, "Captioner", WithoutKernel)
    (reason,) = caption_posters(store, table, SETTINGS, root)["reason"]
    assert reason.startswith(TOO_LITTLE_MEMORY) and "valid cuDNN algorithm" in reason


def test_a_device_that_is_gone_before_the_model_is_on_it_is_told_as_such(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(module, "Captioner", gone)
    with pytest.raises(DeviceGone, match="uncorrectable ECC error"):
        caption_posters(store, resized(store, range(1)), SETTINGS, root)


def test_an_image_without_words_is_asked_once_and_not_tried_again(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(Captioner):
        def describe(self, pixels: torch.Tensor) -> list[Description]:
            return [Description("", cut=False)] * len(pixels)

    table = resized(store, range(2))
    monkeypatch.setattr(module, "Captioner", Silent)
    captions = caption_posters(store, table, SETTINGS, root)
    assert captions["status"].tolist() == ["failed", "failed"]
    assert retriable_count(captions) == 0
    monkeypatch.setattr(module, "Captioner", must_not_load)
    pd.testing.assert_frame_equal(caption_posters(store, table, SETTINGS, root), captions)


def test_images_are_decoded_beside_the_model(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    ahead: list[int] = []
    decoded = 0

    class Watched(Captioner):
        def pixels(self, image: Image.Image) -> torch.Tensor:
            nonlocal decoded
            threads.add(threading.current_thread().name)
            pixels = super().pixels(image)
            decoded += 1
            return pixels

        def describe(self, pixels: torch.Tensor) -> list[Description]:
            # More images than this batch holds come while it is being described.
            deadline = threading.Event()
            for _ in range(200):
                if decoded > 2:
                    break
                deadline.wait(0.05)
            ahead.append(decoded)
            return super().describe(pixels)

    monkeypatch.setattr(module, "Captioner", Watched)
    caption_posters(store, resized(store, range(6)), SETTINGS, root)
    assert threading.main_thread().name not in threads
    assert ahead[0] > 2


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
    path = store.path(table["image"][2], ".png")
    path.unlink()  # it may not be written to
    path.write_bytes(good[:40])
    store.path(table["image"][3], ".png").unlink()
    captions = caption_posters(store, table, SETTINGS, root)
    assert captions["status"].tolist() == ["ok", "ok", "failed", "failed"]
    assert captions["reason"][2]
    assert "materialize resized_posters again" in captions["reason"][3]
    path.write_bytes(good)
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
