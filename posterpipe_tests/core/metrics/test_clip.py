"""CLIP-T against a plain transformers computation, and scoring into a warehouse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from posterpipe.core.generations import COLUMNS, generation_key
from posterpipe.core.metrics import clip as clip_module
from posterpipe.core.metrics.clip import (
    ClipTextSimilarity,
    Scored,
    clip_t_id,
    score_generations,
)
from posterpipe.core.metrics.pixels import letterbox
from posterpipe.core.models import ModelMissing
from posterpipe.core.progress import NoProgress
from posterpipe.core.store import Store, table_version
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.settings import ModelRef, ScorerSettings
from posterpipe_tests.core.metrics.tiny import build_tiny_clip, some_images

TEXTS = [
    "a minimalist film poster of a red rocket",
    "a blue cat",
    "a minimalist film poster of a red rocket",
    "the centre " * 60,
    "",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    build_tiny_clip(folder / "models" / "scorer")
    build_tiny_clip(folder / "models" / "whole", whole_processor=True)
    return folder


def scorer(**changes: object) -> ScorerSettings:
    values = {"model": ModelRef(id="models/scorer", revision=None), "batch_size": 2, **changes}
    return ScorerSettings(**values)


def plain_cosines(
    folder: Path, images: list[Image.Image], texts: list[str], *, max_length: int = 48
) -> list[float]:
    """One by one, as the documentation of transformers does it."""
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = CLIPProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(folder),
        tokenizer=CLIPTokenizer.from_pretrained(folder),
    )
    cosines = []
    for image, text in zip(images, texts, strict=True):
        inputs = processor(
            text=[text], images=image, return_tensors="pt", truncation=True, max_length=max_length
        )
        with torch.no_grad():
            output = model(**inputs)
        cosines.append(float(output.logits_per_image / model.logit_scale.exp()))
    return cosines


@pytest.mark.parametrize("layout", ["scorer", "whole"])
def test_cosines_are_those_of_plain_transformers(root: Path, layout: str) -> None:
    settings = scorer(model=ModelRef(id=f"models/{layout}", revision=None))
    images = some_images()
    cosines = ClipTextSimilarity(settings, root)(images, TEXTS)
    assert cosines.dtype == np.float32 and cosines.shape == (5,)
    expected = plain_cosines(root / "models" / layout, images, TEXTS)
    np.testing.assert_allclose(cosines, expected, atol=1e-4)
    assert len(set(expected)) == 5 and (abs(cosines) <= 1).all()


def test_padding_shows_the_whole_poster(root: Path) -> None:
    images = some_images()
    cosines = ClipTextSimilarity(scorer(preprocessing="pad"), root)(images, TEXTS)
    grey = (round(0.48145466 * 255), round(0.4578275 * 255), round(0.40821073 * 255))
    squares = []
    for image in images:
        square = Image.new("RGB", (max(image.size), max(image.size)), grey)
        square.paste(
            image, ((square.width - image.width) // 2, (square.height - image.height) // 2)
        )
        squares.append(square)
    expected = plain_cosines(root / "models" / "scorer", squares, TEXTS)
    np.testing.assert_allclose(cosines, expected, atol=1e-4)
    assert letterbox(images[0], (0, 0, 0)).size == (96, 96)


def test_a_score_does_not_depend_on_the_batch(root: Path) -> None:
    images = some_images()
    one = ClipTextSimilarity(scorer(batch_size=1), root)(images, TEXTS)
    many = ClipTextSimilarity(scorer(batch_size=64), root)(images, TEXTS)
    np.testing.assert_allclose(one, many, atol=1e-5)


def test_bf16_is_near_and_has_its_own_metric_id(root: Path) -> None:
    exact, short = scorer(), scorer(precision="bf16")
    images = some_images()
    np.testing.assert_allclose(
        ClipTextSimilarity(exact, root)(images, TEXTS),
        ClipTextSimilarity(short, root)(images, TEXTS),
        atol=0.05,
    )
    assert clip_t_id(short, root) == f"{clip_t_id(exact, root)}.bf16"


def test_the_metric_id_names_encoder_weights_and_preprocessing(root: Path) -> None:
    name = clip_t_id(scorer(), root)
    kind, crop, model, weights, version = name.split(".")
    assert (kind, crop, model, version) == ("clip_t", "crop", "scorer", "v1")
    assert len(weights) == 8
    hub = ModelRef(id="openai/clip-vit-large-patch14", revision="0123456789" * 4)
    hub_name = clip_t_id(scorer(model=hub, preprocessing="pad"), root)
    assert hub_name.startswith("clip_t.pad2.clip-vit-large-patch14.")
    assert ClipTextSimilarity(scorer(), root).metric_id == name


def test_each_text_is_encoded_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = ClipTextSimilarity(scorer(batch_size=2), root)
    encoded: list[str] = []
    encode = metric._encode

    def spy(texts: list[str]) -> np.ndarray:
        encoded.extend(texts)
        return encode(texts)

    monkeypatch.setattr(metric, "_encode", spy)
    metric(some_images(), TEXTS)
    metric(some_images(), TEXTS)
    assert encoded == list(dict.fromkeys(TEXTS))


def test_nothing_gives_nothing_and_unequal_lengths_are_refused(root: Path) -> None:
    metric = ClipTextSimilarity(scorer(), root)
    assert metric([], []).shape == (0,)
    with pytest.raises(ValueError, match="1 images and 2 texts"):
        metric(some_images(1), ["a", "b"])


def test_a_broken_scorer_is_named_with_the_remedy(tmp_path: Path) -> None:
    folder = build_tiny_clip(tmp_path / "models" / "scorer")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelMissing, match=r"cannot be loaded.*POSTERPIPE_SCORER__MODEL__ID"):
        ClipTextSimilarity(scorer(), tmp_path)


@pytest.fixture
def warehouse(store: Store) -> Warehouse:
    return Warehouse(store.root / "warehouse" / "scores.duckdb", busy_seconds=5)


def generations(
    store: Store, statuses: tuple[str, ...] = ("ok", "ok", "blocked", "failed")
) -> pd.DataFrame:
    rows = []
    for number, (status, image) in enumerate(zip(statuses, some_images(), strict=False)):
        blob = ""
        if status != "failed":
            path = store.folder("drawn") / f"{number}.png"
            image.save(path)
            blob = store.put(path.read_bytes(), ".png")
        texts = {"prompt": f"{TEXTS[number]} now", "score_text": TEXTS[number], "title": ""}
        rows.append(
            {
                "generation_key": generation_key(
                    str(number), "sd", f"p{number}", TEXTS[number], ""
                ),
                "pixel_key": str(number),
                "variant": ("sd", "dreambooth")[number % 2],
                "prompt_id": f"p{number}",
                **texts,
                "negative_prompt": "",
                "seed": number,
                "checkpoint_id": ("base", "tuned")[number % 2],
                "image": blob,
                "image_path": store.path(blob, ".png").relative_to(store.root).as_posix()
                if blob
                else "",
                "status": status,
                "reason": "" if status == "ok" else f"it is {status}",
                "width": 64,
                "height": 96,
                "settings": "{}",
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def score(
    store: Store,
    warehouse: Warehouse,
    table: pd.DataFrame,
    root: Path,
    settings: ScorerSettings | None = None,
) -> Scored:
    return score_generations(
        store, warehouse, table, settings or scorer(), root, NoProgress(), run_id="run"
    )


def test_the_warehouse_holds_the_cosines_of_plain_transformers(
    store: Store, warehouse: Warehouse, root: Path
) -> None:
    table = generations(store)
    scored = score(store, warehouse, table, root)
    assert scored.added == 4 and list(scored.scores.generation_key) == list(table.generation_key)
    expected = plain_cosines(root / "models" / "scorer", some_images()[:2], TEXTS[:2])
    np.testing.assert_allclose(scored.scores.clip_cosine[:2], expected, atol=1e-4)
    assert scored.scores.clip_cosine[2:].isna().all()
    assert list(scored.scores.status) == ["ok", "ok", "blocked", "failed"]
    assert list(scored.scores.reason) == ["", "", "it is blocked", "it is failed"]
    with warehouse.read() as connection:
        view = connection.execute("SELECT * FROM clip_scores ORDER BY seed").df()
        kinds = connection.execute("SELECT kind FROM dim_checkpoint ORDER BY ALL").fetchall()
        metric = connection.execute("SELECT metric_id, name, encoder FROM dim_metric").fetchall()
    np.testing.assert_allclose(view.clip_cosine[:2], expected, atol=1e-4)
    assert view.is_current.all() and len(view) == 4
    assert kinds == [("base",), ("tuned",)]
    assert metric == [(scored.metric_id, "CLIP-T", "models/scorer")]


def test_nothing_new_loads_no_model_and_changes_nothing(
    store: Store, warehouse: Warehouse, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = generations(store, ("ok", "ok", "blocked"))
    first = score(store, warehouse, table, root)

    def no_model(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(clip_module, "ClipTextSimilarity", no_model)
    second = score(store, warehouse, table, root)
    assert second.added == 0
    assert table_version(second.scores) == table_version(first.scores)
    # A lost warehouse is filled again from the store.
    other = Warehouse(warehouse.path.with_name("other.duckdb"))
    again = score(store, other, table, root)
    assert again.added == 3 and table_version(again.scores) == table_version(first.scores)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images were encoded, call by call."""
    seen: list[int] = []
    call = ClipTextSimilarity.prepared_features

    def spy(self: ClipTextSimilarity, prepared: list[np.ndarray]) -> np.ndarray:
        seen.append(len(prepared))
        return call(self, prepared)

    monkeypatch.setattr(ClipTextSimilarity, "prepared_features", spy)
    return seen


def test_only_new_images_are_scored(
    store: Store, warehouse: Warehouse, root: Path, encoded: list[int]
) -> None:
    score(store, warehouse, generations(store, ("ok", "ok")), root)
    encoded.clear()
    scored = score(store, warehouse, generations(store, ("ok", "ok", "ok")), root)
    assert encoded == [1] and scored.added == 1 and scored.scores.clip_cosine.notna().all()
    padded = score(store, warehouse, generations(store, ("ok",)), root, scorer(preprocessing="pad"))
    assert padded.added == 1
    with warehouse.read() as connection:
        rows = connection.execute("SELECT count(*) FROM fct_score").fetchall()
    assert rows == [(4,)]


def test_a_new_text_encodes_no_image(
    store: Store, warehouse: Warehouse, root: Path, encoded: list[int]
) -> None:
    table = generations(store, ("ok", "ok"))
    score(store, warehouse, table, root)
    encoded.clear()
    reworded = table.assign(
        score_text=["a green whale", "a whale"], generation_key=["reworded 1", "reworded 2"]
    )
    scored = score(store, warehouse, reworded, root)
    assert encoded == [] and scored.added == 2
    expected = plain_cosines(
        root / "models" / "scorer", some_images()[:2], ["a green whale", "a whale"]
    )
    np.testing.assert_allclose(scored.scores.clip_cosine, expected, atol=1e-4)


def test_an_image_that_cannot_be_read_is_a_row_and_heals(
    store: Store, warehouse: Warehouse, root: Path
) -> None:
    table = generations(store, ("ok", "ok", "ok"))
    gone, torn = (store.root / str(path) for path in table.image_path[:2])
    kept = torn.read_bytes()
    gone.unlink()
    torn.write_bytes(kept[: len(kept) // 2])
    scored = score(store, warehouse, table, root)
    assert list(scored.scores.status) == ["failed", "failed", "ok"]
    assert scored.scores.reason.str.contains("materialize the assets that make it")[:2].all()
    torn.write_bytes(kept)
    healed = score(store, warehouse, generations(store, ("ok", "ok", "ok")), root)
    assert list(healed.scores.status) == ["ok", "ok", "ok"]


def test_no_generations_at_all(store: Store, warehouse: Warehouse, root: Path) -> None:
    scored = score(store, warehouse, generations(store, ()), root)
    assert scored.scores.empty and scored.added == 0
