"""Diversity within a prompt, against plain sums over pairs."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from posterpipe.core.metrics.diversity import Diversity, diversity_metric, measure_diversity
from posterpipe.core.metrics.encoders import image_encoder
from posterpipe.core.progress import NoProgress
from posterpipe.core.store import Store
from posterpipe.settings import ModelRef, ScorerSettings
from posterpipe_tests.core.metrics.tiny import build_tiny_clip, generations, some_images

SETTINGS = ScorerSettings(model=ModelRef(id="models/clip", revision=None), batch_size=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    build_tiny_clip(folder / "models" / "clip")
    return folder


def measured(store: Store, root: Path, table: pd.DataFrame) -> pd.DataFrame:
    return measure_diversity(store, table, [SETTINGS], root, NoProgress()).scores


def test_the_mean_over_images_is_the_mean_over_pairs() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [1 - float(a @ b) for a, b in combinations(vectors, 2)]
    assert Diversity()(vectors).mean() == pytest.approx(np.mean(pairs))
    assert np.isnan(Diversity()(vectors[:1])).all()


def test_each_prompt_is_compared_within_itself(store: Store, root: Path) -> None:
    images = some_images(5)
    table = generations(store, [*images[:4], images[4], images[4]])
    scores = measured(store, root, table)
    features = image_encoder(SETTINGS, root).image_features(images)
    first = 1 - float(features[0] @ features[1])
    second = 1 - float(features[2] @ features[3])
    np.testing.assert_allclose(scores.value[:4], [first, first, second, second], atol=1e-5)
    np.testing.assert_allclose(scores.value[4:], 0, atol=1e-6)  # one picture twice


def test_a_collapsed_model_is_told_from_a_varied_one(store: Store, root: Path) -> None:
    varied = measured(store, root, generations(store, some_images(4), seeds_a_prompt=4))
    image = some_images(1)[0]
    shades = [image.point(lambda value, shift=shift: min(255, value + shift)) for shift in range(4)]
    collapsed = measured(store, root, generations(store, shades, seeds_a_prompt=4))
    assert collapsed.value.max() < 0.1 * varied.value.min()


def test_variants_and_checkpoints_do_not_mix(store: Store, root: Path) -> None:
    images: list[Image.Image | None] = [*some_images(4)]
    one = generations(store, images[:2])
    other = generations(store, images[2:], variant="dreambooth", checkpoint="tuned")
    together = measured(store, root, pd.concat([one, other], ignore_index=True))
    np.testing.assert_allclose(together.value[:2], measured(store, root, one).value)


def test_blocked_images_are_left_out_and_failed_ones_wait(store: Store, root: Path) -> None:
    images: list[Image.Image | None] = [*some_images(5), None]
    statuses = ["ok", "ok", "blocked", "ok", "ok", "failed"]
    table = generations(store, images, seeds_a_prompt=3, statuses=statuses)
    scores = measured(store, root, table)
    assert scores.status.tolist() == ["ok", "ok", "blocked", "failed", "failed", "failed"]
    assert "another image of the prompt is missing" in scores.reason[3]
    alone = generations(store, some_images(1))
    assert "no second image" in measured(store, root, alone).reason[0]


def test_the_id_names_the_prompts_and_seeds(store: Store, root: Path) -> None:
    table = generations(store, some_images(4))
    shuffled = table.sample(frac=1, random_state=1)
    assert diversity_metric(table, SETTINGS, root) == diversity_metric(shuffled, SETTINGS, root)
    fewer = diversity_metric(table.iloc[:3], SETTINGS, root)
    assert fewer.metric_id != diversity_metric(table, SETTINGS, root).metric_id
    others = diversity_metric(table.assign(seed=table["seed"] + 100), SETTINGS, root)
    assert others.metric_id != diversity_metric(table, SETTINGS, root).metric_id
