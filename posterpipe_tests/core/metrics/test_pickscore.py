"""PickScore against plain transformers, on a tiny CLIP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from posterpipe.core.metrics.pickscore import PickScore, measure_pickscore, pickscore_settings
from posterpipe.core.progress import NoProgress
from posterpipe.core.store import Store
from posterpipe.settings import EvidenceSettings, ModelRef
from posterpipe_tests.core.metrics.tiny import build_tiny_clip, generations, some_images


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("root")
    whole = build_tiny_clip(folder / "models" / "pick")
    weights = load_file(whole / "model.safetensors")
    weights["logit_scale"] = torch.tensor(1.5, dtype=torch.float16)
    save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
    # The published weights come without a processor: that of the model they began with serves.
    (folder / "models" / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "models" / "bare" / name).write_bytes((whole / name).read_bytes())
    return folder


EVIDENCE = EvidenceSettings(
    pickscore=ModelRef(id="models/bare", revision=None),
    pickscore_processor=ModelRef(id="models/pick", revision=None),
    batch_size=2,
)


def test_scores_are_the_scaled_cosines_of_plain_transformers(root: Path, tmp_path: Path) -> None:
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    store = Store(tmp_path / "store")
    images: list[Image.Image | None] = [*some_images(3)]
    table = generations(store, images, statuses=["ok", "blocked", "ok"])
    measured = measure_pickscore(store, table, EVIDENCE, root, NoProgress())
    assert measured is not None
    (metric,), scores = measured.metrics, measured.scores
    folder = root / "models" / "pick"
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = CLIPProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(folder),
        tokenizer=CLIPTokenizer.from_pretrained(folder),
    )
    for value, status, text, image in zip(
        scores.value, scores.status, table.score_text, images, strict=True
    ):
        if status != "ok":
            assert np.isnan(value)
            continue
        with torch.no_grad():
            output = model(**processor(text=[text], images=image, return_tensors="pt"))
        assert value == pytest.approx(float(output.logits_per_image), abs=1e-3)
    assert scores.status.tolist() == ["ok", "blocked", "ok"]
    assert metric.metric_id.startswith("pickscore.crop.bare.") and metric.name == "PickScore"


def test_the_worker_and_the_table_agree(root: Path) -> None:
    settings = pickscore_settings(EVIDENCE)
    assert settings is not None
    worker = PickScore(settings, root, processor=EVIDENCE.pickscore_processor)
    texts = ["a red rocket", "a blue cat", "a cat"]
    whole = worker(some_images(3), texts)
    np.testing.assert_allclose(
        whole, worker.scores(worker.image_features(some_images(3)), texts), atol=1e-5
    )
    with pytest.raises(ValueError, match="3 images and 1 texts"):
        worker(some_images(3), ["a"])


def test_another_processor_is_another_metric_with_embeddings_of_its_own(
    root: Path, tmp_path: Path
) -> None:
    other = root / "models" / "other"
    shutil.copytree(root / "models" / "pick", other)
    config = json.loads((other / "preprocessor_config.json").read_text())
    mean = {"image_mean": [0.9, 0.1, 0.1]}
    (other / "preprocessor_config.json").write_text(json.dumps({**config, **mean}))
    store = Store(tmp_path / "store")
    table = generations(store, [*some_images(2)])
    changed = EVIDENCE.model_copy(update={"pickscore_processor": ModelRef(id="models/other")})
    measured = [
        measure_pickscore(store, table, evidence, root, NoProgress())
        for evidence in (EVIDENCE, changed)
    ]
    one, another = (found for found in measured if found is not None)
    assert one.metrics[0].metric_id != another.metrics[0].metric_id
    assert (one.scores.value != another.scores.value).all(), (
        "nothing is taken from the first one's embeddings"
    )


def test_it_is_measured_only_where_it_is_configured(root: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    table = generations(store, some_images(1))
    assert measure_pickscore(store, table, EvidenceSettings(), root, NoProgress()) is None
