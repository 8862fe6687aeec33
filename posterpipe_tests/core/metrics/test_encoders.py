"""Embeddings against plain transformers, and that no image is encoded twice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from posterpipe.core import devices
from posterpipe.core.devices import DeviceGone
from posterpipe.core.metrics import encoders as encoders_module
from posterpipe.core.metrics.clip import clip_t_id
from posterpipe.core.metrics.encoders import (
    ClipEncoder,
    DinoEncoder,
    encoder_id,
    image_encoder,
    kept_embeddings,
)
from posterpipe.core.models import ModelMissing
from posterpipe.core.progress import NoProgress
from posterpipe.core.store import Store
from posterpipe.settings import ModelRef, ScorerSettings, load_settings
from posterpipe_tests.core.drawing import tf32_switches
from posterpipe_tests.core.metrics.tiny import build_tiny_clip, build_tiny_dino, some_images


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    build_tiny_clip(folder / "models" / "clip")
    build_tiny_dino(folder / "models" / "dinov2", version=2)
    build_tiny_dino(folder / "models" / "dino", version=1)
    return folder


def settings(model: str, **changes: object) -> ScorerSettings:
    values = {"model": ModelRef(id=f"models/{model}", revision=None), "batch_size": 2, **changes}
    return ScorerSettings(**values)


@pytest.mark.parametrize("model", ["dino", "dinov2"])
def test_dino_is_the_class_token_of_plain_transformers(root: Path, model: str) -> None:
    import torch
    from transformers import AutoImageProcessor, AutoModel

    folder = root / "models" / model
    images = some_images()
    encoder = image_encoder(settings(model), root)
    assert isinstance(encoder, DinoEncoder)
    features = encoder.image_features(images)
    plain = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    for image, vector in zip(images, features, strict=True):
        with torch.no_grad():
            token = plain(**processor(image, return_tensors="pt")).last_hidden_state[0, 0]
        expected = (token / token.norm()).numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    assert features.dtype == np.float32 and features.shape == (5, 32)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)


def test_embeddings_have_length_1_in_fp32_also_where_a_model_computes_in_a_short_precision() -> (
    None
):
    import torch

    features = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    vectors = encoders_module.unit(features)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_clip_images_are_those_of_plain_transformers(root: Path) -> None:
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel

    folder = root / "models" / "clip"
    encoder = image_encoder(settings("clip"), root)
    assert isinstance(encoder, ClipEncoder)
    plain = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    for image, vector in zip(some_images(), encoder.image_features(some_images()), strict=True):
        with torch.no_grad():
            output = plain.vision_model(**processor(image, return_tensors="pt")).pooler_output
            expected = plain.visual_projection(output)[0]
        np.testing.assert_allclose(vector, (expected / expected.norm()).numpy(), atol=1e-5)


def test_the_id_names_preprocessing_model_weights_and_precision(root: Path) -> None:
    exact = encoder_id(settings("dinov2"), root)
    preprocessing, model, weights = exact.split(".")
    assert (preprocessing, model, len(weights)) == ("crop", "dinov2", 8)
    ids = {
        exact,
        encoder_id(settings("dinov2", preprocessing="pad"), root),
        encoder_id(settings("dinov2", precision="bf16"), root),
        encoder_id(settings("dino"), root),
    }
    assert len(ids) == 4


def test_the_id_names_the_precision_that_is_computed_in(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 is computed in fp32 on a CPU, and such numbers are not those of a GPU."""
    import torch

    half, exact = settings("dinov2", precision="fp16"), settings("dinov2")
    scorer = settings("clip", precision="fp16")
    for module in (devices, encoders_module):
        monkeypatch.setattr(module, "best_device", lambda: torch.device("cpu"))
    assert image_encoder(half, root).encoder_id == encoder_id(exact, root)
    assert clip_t_id(scorer, root) == clip_t_id(settings("clip"), root)
    monkeypatch.setattr(devices, "best_device", lambda: torch.device("cuda"))
    assert encoder_id(half, root) == f"{encoder_id(exact, root)}.fp16"
    assert clip_t_id(scorer, root) == f"{clip_t_id(settings('clip'), root)}.fp16"


@pytest.mark.parametrize("model", ["clip", "dinov2"])
def test_fp32_is_encoded_in_whole_fp32_and_the_switches_are_set_back(
    root: Path, model: str
) -> None:
    """cuDNN takes TF32 for it otherwise, on a GPU, under the id of a CPU's embeddings."""
    before = tf32_switches()
    inside: list[tuple[bool, bool]] = []
    encoder: Any = image_encoder(settings(model), root)
    towers = [encoder.model] if model == "dinov2" else [
        encoder.model.vision_model, encoder.model.text_model
    ]  # fmt: skip
    for tower in towers:
        tower.embeddings.register_forward_hook(lambda *_: inside.append(tf32_switches()))
    encoder.image_features(some_images()[:1])
    if model == "clip":
        encoder.text_features(["a red rocket"])
    assert inside == [(False, False)] * len(towers)
    assert tf32_switches() == before == (True, False)


def test_a_padded_poster_is_seen_to_its_edges_by_a_model_that_cuts(root: Path) -> None:
    """DINOv2's own preprocessing resizes to 256 and cuts 224 out; here it is 40 and 32."""
    encoder = image_encoder(settings("dinov2", preprocessing="pad"), root)
    poster = Image.new("RGB", (64, 96), (200, 40, 40))
    framed = poster.copy()
    framed.paste((255, 255, 255), (0, 0, 64, 6))
    assert abs(encoder.prepare(framed)[:, 0].astype(int) - encoder.prepare(poster)[:, 0]).max() > 99
    assert encoder.prepare(poster).shape == (3, 32, 32)
    far = float(encoder.image_features([framed])[0] @ encoder.image_features([poster])[0])
    assert far < 1 - 1e-4


def test_a_model_of_another_kind_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "models" / "bert"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "bert"}', "utf-8")
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelMissing, match=r"the kind 'bert'") as caught:
        image_encoder(settings("bert"), tmp_path)
    told = re.search(r"(POSTERPIPE_EVIDENCE__IMAGE_ENCODERS)='(.+)'", str(caught.value))
    assert told is not None
    monkeypatch.setenv(told[1], told[2])
    assert load_settings("starter").evidence.image_encoders[0].id == "facebook/dinov2-base"


def files(folder: Path, count: int = 5) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    found = {}
    for number, image in enumerate(some_images(count)):
        path = folder / f"{number}.png"
        image.save(path)
        found[f"hash{number}"] = path
    return found


def test_an_image_is_encoded_once_and_comes_back_to_the_bit(
    store: Store, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = files(tmp_path / "images")
    first = kept_embeddings(store, settings("clip"), root, images, NoProgress())
    expected = first.rows(list(images))
    direct = image_encoder(settings("clip"), root).image_features(some_images())
    np.testing.assert_allclose(expected, direct, atol=1e-6)

    def no_model(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(encoders_module, "image_encoder", no_model)
    again = kept_embeddings(store, settings("clip", batch_size=5), root, images, NoProgress())
    np.testing.assert_array_equal(again.rows(list(images)), expected)
    assert again.rows([]).shape == (0, 0)
    # Another preprocessing is another embedding.
    with pytest.raises(AssertionError, match="the model was loaded"):
        kept_embeddings(store, settings("clip", preprocessing="pad"), root, images, NoProgress())


def test_an_embedding_is_the_same_to_the_bit_whatever_was_missing_beside_it() -> None:
    starter = load_settings("starter")
    images = [image.resize((64, 96)) for image in some_images()] * 5
    texts = [
        f"a poster of a {name}" + " and a moon" * n for n, name in enumerate(["cat", "sea"] * 9)
    ]
    encoder = image_encoder(starter.scorer, starter.root)
    assert isinstance(encoder, ClipEncoder)
    seen, read = encoder.image_features(images), encoder.text_features(texts)
    for start, end in [(0, 1), (1, 3), (7, 12), (4, 18)]:
        some = encoder.image_features(images[start:end])
        np.testing.assert_array_equal(some, seen[start:end])
        another = image_encoder(starter.scorer, starter.root)  # that has read nothing yet
        assert isinstance(another, ClipEncoder)
        np.testing.assert_array_equal(another.text_features(texts[start:end]), read[start:end])


def test_one_unreadable_image_does_not_stop_the_others(
    store: Store, root: Path, tmp_path: Path
) -> None:
    images = files(tmp_path / "images", 3)
    images["hash1"].write_bytes(images["hash1"].read_bytes()[:60])
    images["gone"] = tmp_path / "gone.png"
    found = kept_embeddings(store, settings("clip"), root, images, NoProgress())
    assert sorted(found.vectors) == ["hash0", "hash2"]
    assert sorted(found.unreadable) == ["gone", "hash1"]
    assert "gone.png: cannot be read" in found.unreadable["gone"]
    some_images()[1].save(images["hash1"])
    healed = kept_embeddings(store, settings("clip"), root, images, NoProgress())
    assert "hash1" in healed.vectors and sorted(healed.unreadable) == ["gone"]


def test_a_device_that_is_gone_is_told_as_such(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ClipEncoder(settings("clip"), root)

    def gone(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nmore")

    monkeypatch.setattr(encoder.model, "get_image_features", gone)
    monkeypatch.setattr(encoder.model, "get_text_features", gone)
    with pytest.raises(DeviceGone, match=r"encoder.*unspecified launch failure\)"):
        encoder.image_features(some_images())
    with pytest.raises(DeviceGone, match=r"encoder.*unspecified launch failure\)"):
        encoder.text_features(["a text"])


def test_numbers_that_are_not_finite_are_told_and_not_kept(
    store: Store, root: Path, tmp_path: Path
) -> None:
    class Broken(ClipEncoder):
        def prepared_features(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
            return np.array([[np.nan, 1.0]] + [[1.0, 0.0]] * (len(prepared) - 1), np.float32)

    broken = Broken(settings("clip"), root)
    images = files(tmp_path / "images", 2)
    found = kept_embeddings(store, settings("clip"), root, images, NoProgress(), encoder=broken)
    assert "no finite number" in found.unreadable["hash0"] and sorted(found.vectors) == ["hash1"]
