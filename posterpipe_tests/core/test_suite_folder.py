"""Any model answers the suite, in a folder that people look at."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from posterpipe.core import generations
from posterpipe.core.models import ModelMissing
from posterpipe.core.progress import NoProgress
from posterpipe.core.prompts import Prompt
from posterpipe.core.sampler import LORA_WEIGHTS, Sampler
from posterpipe.core.store import Store
from posterpipe.core.suite_folder import FIELDS, INDEX, SHEET, AnyModel, draw_into, find_model
from posterpipe.settings import ModelRef
from posterpipe_tests.core.drawing import REQUESTS, SETTINGS, SUITE, lora_and_merged, pixels


def drawn(folder: Path, store: Store, model: AnyModel, suite: list[Prompt] = SUITE) -> pd.DataFrame:
    return draw_into(folder, store, suite, model, SETTINGS, NoProgress())


def found(model: Path, base: Path) -> AnyModel:
    return find_model(ModelRef(id=str(model)), ModelRef(id=str(base)), model.parent)


def test_the_folder_has_an_image_a_question_an_index_and_a_sheet(
    store: Store, model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "folder"
    delayed = Prompt("whale", "a teal whale", "a whale", "busy", "", (4,), 0.5)
    index = drawn(folder, store, found(model_dir, model_dir), [*SUITE, delayed])
    names = ["rocket/1", "rocket/1_negative", "rocket/2", "rocket/2_negative", "cat/3"]
    names += ["whale/4", "whale/4_negative", "whale/4_negative_delayed"]
    assert sorted(index["file"]) == sorted(f"{name}.png" for name in names)
    kept = pd.read_csv(folder / INDEX, keep_default_na=False)
    assert tuple(kept.columns) == FIELDS and kept["file"].tolist() == index["file"].tolist()
    with Image.open(folder / "rocket" / "1_negative.png") as image:
        assert "Negative prompt: busy" in image.text["parameters"]  # type: ignore[attr-defined]
    with Image.open(folder / SHEET) as sheet:
        assert sheet.width > 400
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == len(names) + 2


def test_what_was_drawn_before_is_taken_from_the_store_and_a_folder_keeps_what_else_it_holds(
    store: Store, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = found(model_dir, model_dir)
    drawn(tmp_path / "one", store, model)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "notes.txt").write_text("mine")
    monkeypatch.setattr(generations, "Sampler", None)  # drawing would fail
    drawn(tmp_path / "two", store, model)
    assert (tmp_path / "two" / "notes.txt").read_text() == "mine"
    for name in ("rocket/2.png", SHEET, INDEX):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    os.chmod(tmp_path / "two" / "rocket" / "2.png", 0o600)  # a copy, which its owner may change
    (tmp_path / "two" / "rocket" / "2.png").write_bytes(b"painted over")
    drawn(tmp_path / "three", store, model)
    assert (tmp_path / "three" / "rocket" / "2.png").read_bytes() != b"painted over"


def test_lora_weights_draw_with_their_base_model_and_are_another_model_with_another_base(
    store: Store, model_dir: Path, tmp_path: Path
) -> None:
    lora, merged = lora_and_merged(model_dir, tmp_path, strength=0.5)
    model = found(lora, model_dir)
    drawn(tmp_path / "images", store, model)
    whole = Sampler(merged, SETTINGS, model_id="tiny")(REQUESTS[:1])[0]
    with Image.open(tmp_path / "images" / "rocket" / "1_negative.png") as image:
        assert abs(pixels(image) - pixels(whole)).max() <= 1
    assert len({model.fingerprint, found(lora, merged).fingerprint}) == 2
    assert model.fingerprint != found(model_dir, model_dir).fingerprint


def test_a_model_that_is_not_there_is_named(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(ModelMissing, match="nowhere"):
        found(tmp_path / "nowhere", model_dir)


def test_lora_weights_for_another_kind_of_model_are_refused(
    store: Store, model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    names = ("lora_A", "lora_B")
    weights = {f"transformer.blocks.0.attn.to_q.{name}.weight": torch.ones(2, 2) for name in names}
    save_file(weights, folder / LORA_WEIGHTS)
    with pytest.raises(ModelMissing, match="the LoRA weights do not fit the model"):
        drawn(tmp_path / "images", store, found(folder, model_dir))


def test_lora_weights_in_kohyas_naming_are_refused_with_the_file_that_is_read(
    tmp_path: Path, model_dir: Path
) -> None:
    folder = tmp_path / "alone"
    folder.mkdir()
    save_file({"lora_unet_x.alpha": torch.ones(())}, folder / "kohya_lora.safetensors")
    with pytest.raises(ModelMissing, match=rf"alone.*kohya.*not read.*{LORA_WEIGHTS}"):
        found(folder, model_dir)


def test_damaged_lora_weights_are_named(store: Store, model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / LORA_WEIGHTS).write_bytes(b"cut off")
    with pytest.raises(ModelMissing, match=r"cut.*cannot be read.*damaged"):
        drawn(tmp_path / "images", store, found(folder, model_dir))


def test_what_stands_in_the_way_of_an_image_is_told_before_one_is_drawn(
    store: Store, model_dir: Path, tmp_path: Path
) -> None:
    place = tmp_path / "images" / SUITE[-1].prompt_id
    place.parent.mkdir()
    place.write_text("mine")
    with pytest.raises(FileExistsError, match=place.name):
        drawn(tmp_path / "images", store, found(model_dir, model_dir))
    assert place.read_text() == "mine" and not list(store.root.rglob("*.png"))
