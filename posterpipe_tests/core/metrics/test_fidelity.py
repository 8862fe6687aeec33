"""Similarity to posters and copy detection, against plain sums and copies made for the purpose."""

from __future__ import annotations

import io
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from posterpipe.core.images import hash_distance, perceptual_hash, png_bytes
from posterpipe.core.metrics import fidelity
from posterpipe.core.metrics.encoders import image_encoder
from posterpipe.core.metrics.fidelity import (
    HASH_POSTERS,
    CopyCalibration,
    Fidelity,
    NearestPoster,
    Posters,
    SetSimilarity,
    altered,
    are_strangers,
    compare_with_posters,
    evidence_encoders,
    hash_threshold,
    never_trained_on,
    suspicious_bits,
)
from posterpipe.core.progress import NoProgress
from posterpipe.core.store import Store
from posterpipe.settings import EvidenceSettings, ModelRef, ScorerSettings
from posterpipe_tests.core.metrics.tiny import (
    build_tiny_clip,
    build_tiny_dino,
    generations,
    posters,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    build_tiny_clip(folder / "models" / "clip")
    build_tiny_dino(folder / "models" / "dinov2", version=2)
    return folder


def pictures(count: int, seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(rng.integers(0, 256, (9, 6, 3), dtype=np.uint8)).resize((64, 96))
        for _ in range(count)
    ]


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_similarity_to_a_set_is_the_mean_cosine_with_each() -> None:
    rng = np.random.default_rng(0)
    some, others = unit(rng.normal(size=(5, 8))), unit(rng.normal(size=(7, 8)))
    expected = [np.mean([float(a @ b) for b in others]) for a in some]
    np.testing.assert_allclose(SetSimilarity(others)(some), expected, atol=1e-6)
    assert SetSimilarity(some[:1])(some[:1])[0] == pytest.approx(1, abs=1e-6)


def test_the_nearest_poster_is_found_with_its_similarity() -> None:
    rng = np.random.default_rng(1)
    some, others = unit(rng.normal(size=(5, 8))), unit(rng.normal(size=(7, 8)))
    similarities, indices = NearestPoster(others)(some)
    for image, similarity, index in zip(some, similarities, indices, strict=True):
        cosines = [float(image @ other) for other in others]
        assert index == int(np.argmax(cosines))
        assert similarity == pytest.approx(max(cosines), abs=1e-6)


def test_the_threshold_lets_one_new_poster_in_a_hundred_through() -> None:
    """Simulated: how near posters come is drawn from one law, 16 of them calibrate."""
    rng = np.random.default_rng(2)
    alarms = []
    for _ in range(400):
        places = rng.normal(1.5, 0.4, 16 + 50)
        cosines = 1 - np.exp(-places)
        calibration = CopyCalibration(tuple(cosines[:16]), alarm=0.01)
        alarms.append(calibration.is_copy(cosines[16:]).mean())
    assert 0.005 <= np.mean(alarms) <= 0.015


def test_a_training_poster_left_among_the_holdout_posters_does_not_lift_the_bound() -> None:
    rng = np.random.default_rng(3)
    cosines = 1 - np.exp(-rng.normal(2.5, 0.8, 16))
    clean = CopyCalibration(tuple(cosines), alarm=0.01).threshold
    for copy in (0.9995, 0.9999, 1.0):
        mixed = np.append(cosines, copy)
        told = are_strangers(mixed, 0.01)
        assert told.tolist() == [True] * 16 + [False]
        assert CopyCalibration(tuple(mixed[told]), alarm=0.01).threshold == clean
    assert CopyCalibration((*cosines, 0.9999), alarm=0.01).threshold > clean + 0.003


@pytest.mark.parametrize("posters", [5, 16])
def test_few_holdout_sets_without_a_copy_lose_a_poster_and_alarms_stay_few(posters: int) -> None:
    rng = np.random.default_rng(posters)
    lost, alarms = [], []
    for _ in range(1000):
        cosines = 1 - np.exp(-rng.normal(1.5, 0.4, posters + 50))
        told = are_strangers(cosines[:posters], 0.01)
        calibration = CopyCalibration(tuple(cosines[:posters][told]), alarm=0.01)
        lost.append(not told.all())
        alarms.append(calibration.is_copy(cosines[posters:]).mean())
    assert np.mean(lost) <= 0.02 and np.mean(alarms) <= 0.016


def test_whether_copies_would_be_found_is_measured_on_copies() -> None:
    control = (0.98, 0.995, 0.999, 0.9995)
    assert CopyCalibration((0.5, 0.6, 0.7, 0.8, 0.6), 0.01, control).sensitivity == 1
    # Three that lie apart allow everything.
    apart = CopyCalibration((0.2, 0.9, 0.97), 0.01, control)
    assert apart.threshold > 0.9995 and apart.sensitivity == 0
    assert math.isnan(CopyCalibration((0.5, 0.6), 0.01, control).sensitivity)
    assert math.isnan(CopyCalibration((0.5, 0.6, 0.7), 0.01).sensitivity)


def test_training_posters_are_altered_and_looked_for(store: Store, root: Path) -> None:
    seen, unseen = pictures(6, 80), pictures(5, 81)
    training, holdout = posters(store, "training", seen), posters(store, "holdout", unseen)
    result = compared(store, root, generations(store, pictures(2, 82)), training, holdout)
    settings = ScorerSettings(model=ModelRef(id="models/clip", revision=None), preprocessing="pad")
    encode = image_encoder(settings, root).image_features
    expected = (encode([altered(poster) for poster in seen]) @ encode(seen).T).max(axis=1)
    (calibration,) = result.calibrations.values()
    np.testing.assert_allclose(sorted(calibration.control), sorted(expected), atol=1e-5)
    share = np.mean(expected > calibration.threshold)
    assert (result.nearest.copy_sensitivity == share).all() and calibration.sensitivity == share
    one = altered(seen[0])
    assert one.size == seen[0].size and one.mode == "RGB"
    assert np.abs(np.asarray(one, float) - np.asarray(seen[0], float)).mean() > 1


def test_a_copy_is_one_whatever_the_calibration() -> None:
    wide = CopyCalibration((0.2, 0.999, 0.5), alarm=0.01)
    assert wide.is_copy(np.array([1.0, 0.5])).tolist() == [True, False]
    unknown = CopyCalibration((0.9, 0.8), alarm=0.01)
    assert math.isnan(unknown.threshold)
    assert unknown.is_copy(np.array([1.0, 0.99])).tolist() == [True, False]


def test_the_hash_threshold_stays_below_posters_that_are_no_copies() -> None:
    many = [24] * (HASH_POSTERS - 2)
    assert hash_threshold([*many, 30, 18]) == 10
    assert hash_threshold([*many, 6, 18]) == 5


@pytest.mark.parametrize("count", [0, 1, HASH_POSTERS - 1])
def test_few_holdout_posters_leave_near_hashes_open(count: int) -> None:
    assert hash_threshold([24] * count) == 2
    assert suspicious_bits([24] * count) == 10 and suspicious_bits([24, 6]) == 5


def test_a_near_hash_makes_a_copy_only_where_enough_holdout_posters_say_so(
    store: Store, root: Path
) -> None:
    seen = pictures(8, 20)
    training = posters(store, "training", seen)
    # Near enough for a copy, and too far for the same picture; without colours, so that the cosine
    # says nothing. The last one has the hash of its poster.
    near, same = altered(seen[5]).convert("L").convert("RGB"), seen[3].convert("L").convert("RGB")
    drawn = generations(store, [near, same])
    assert 2 < hash_distance(perceptual_hash(seen[5]), perceptual_hash(near)) <= 10
    told = {}
    for count in (0, HASH_POSTERS - 1, HASH_POSTERS):
        held = posters(store, "holdout", pictures(count, 24))
        found = compared(store, root, drawn, training, held)
        told[count] = found.nearest
        assert found.nearest.copied_by.iloc[1] == "hash" and not found.nearest.copy_unsure.iloc[1]
        ids = [metric.metric_id for metric in found.metrics]
        assert f"nearest.training.{training.digest}" in " ".join(ids)
    for count in (0, HASH_POSTERS - 1):
        assert told[count].hash_threshold.iloc[0] == 2
        assert not told[count].copied.iloc[0] and told[count].copy_unsure.iloc[0]
    calibrated = told[HASH_POSTERS].iloc[0]
    assert calibrated.copied and calibrated.copied_by == "hash" and not calibrated.copy_unsure
    assert told[0].metric_id.tolist() == told[HASH_POSTERS].metric_id.tolist(), "nothing anew"


def test_posters_that_were_trained_on_are_no_holdout_posters(store: Store, root: Path) -> None:
    seen, unseen = pictures(6, 70), pictures(6, 71)
    squeezed = io.BytesIO()
    seen[2].save(squeezed, "JPEG", quality=85)
    leaked = [seen[0], Image.open(squeezed).convert("RGB")]
    drawn = generations(store, [seen[1], *pictures(3, 72)])
    training = posters(store, "training", seen)
    clean = posters(store, "holdout", unseen)
    mixed = posters(store, "holdout", [*unseen, *leaked])

    def new(holdout: Posters, same_bits: int = 4) -> Posters:
        return never_trained_on(
            store, holdout, [posters(store, "training", []), training], NoProgress(),
            same_bits=same_bits,
        )  # fmt: skip

    assert new(clean) == clean == new(mixed)
    by_content = new(mixed, same_bits=-1).files.keys()
    assert by_content == mixed.files.keys() - training.files.keys() and len(by_content) == 7
    result = compared(store, root, drawn, training, new(mixed))
    assert result.nearest.copied.tolist() == [True, False, False, False]
    only = compared(store, root, drawn, training, new(posters(store, "holdout", leaked)))
    assert only.nearest.similarity_threshold.isna().all()


def compared(
    store: Store, root: Path, table: pd.DataFrame, training: Posters, holdout: Posters,
    encoders: list[ScorerSettings] | None = None,
) -> Fidelity:  # fmt: skip
    settings = EvidenceSettings(image_encoders=(ModelRef(id="models/clip", revision=None),))
    return compare_with_posters(
        store, table, training, holdout,
        encoders or evidence_encoders(settings, ModelRef(id="unused", revision=None)),
        root, NoProgress(), alarm=0.01,
    )  # fmt: skip


def of(result: Fidelity, name: str) -> pd.DataFrame:
    ids = [metric.metric_id for metric in result.metrics if metric.name == name]
    assert len(ids) == 1
    return result.scores[result.scores["metric_id"] == ids[0]].reset_index(drop=True)


def test_scores_are_those_of_plain_sums(store: Store, root: Path) -> None:
    seen, unseen, drawn = pictures(6, 10), pictures(4, 11), pictures(3, 12)
    training, holdout = posters(store, "training", seen), posters(store, "holdout", unseen)
    table = generations(store, drawn)
    result = compared(store, root, table, training, holdout)
    settings = ScorerSettings(model=ModelRef(id="models/clip", revision=None), preprocessing="pad")
    encode = image_encoder(settings, root).image_features
    near = encode(drawn) @ encode(seen).T
    far = encode(drawn) @ encode(unseen).T
    np.testing.assert_allclose(of(result, "CLIP-I training").value, near.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(of(result, "CLIP-I holdout").value, far.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(
        of(result, "CLIP-I overfit gap").value, near.mean(axis=1) - far.mean(axis=1), atol=1e-5
    )
    np.testing.assert_allclose(
        of(result, "CLIP-I nearest training poster").value, near.max(axis=1), atol=1e-5
    )
    nearest = [list(training.files)[index] for index in near.argmax(axis=1)]
    assert result.nearest.nearest_poster.tolist() == nearest
    assert (result.scores.status == "ok").all() and len(result.scores) == 5 * 3
    (calibration,) = result.calibrations.values()
    expected = (encode(unseen) @ encode(seen).T).max(axis=1)
    np.testing.assert_allclose(calibration.similarities, expected, atol=1e-5)


def test_copies_are_found_and_new_images_are_not(store: Store, root: Path) -> None:
    seen = pictures(8, 20)
    squeezed = io.BytesIO()
    seen[3].save(squeezed, "JPEG", quality=85)
    brighter = seen[5].point(lambda value: min(255, value + 6))
    drawn = [seen[0], Image.open(squeezed), brighter, *pictures(3, 21)]
    result = compared(
        store, root, generations(store, drawn), posters(store, "training", seen),
        posters(store, "holdout", pictures(8, 22)),
    )  # fmt: skip
    assert result.nearest.copied.tolist() == [True, True, True, False, False, False]
    bits = of(result, "perceptual hash distance").value
    assert bits[0] == 0 and (bits[:3] <= 4).all() and (bits[3:] > 10).all()
    own = perceptual_hash(drawn[4])
    expected = min(hash_distance(own, perceptual_hash(poster)) for poster in seen)
    assert bits[4] == expected == result.nearest.hash_distance[4]


def test_an_altered_training_poster_among_the_holdout_posters_leaves_the_bound_of_hashes(
    store: Store, root: Path
) -> None:
    seen, unseen = pictures(8, 20), pictures(HASH_POSTERS, 22)
    training = posters(store, "training", seen)
    drawn = generations(store, pictures(1, 23))
    # Too far from its poster for one that was trained on, too near for a bound of the others.
    leaked = altered(seen[5])
    assert 4 < hash_distance(perceptual_hash(seen[5]), perceptual_hash(leaked)) <= 10
    thresholds = []
    for held in (unseen, [*unseen, leaked]):
        result = compared(store, root, drawn, training, posters(store, "holdout", held))
        thresholds += result.nearest.hash_threshold.tolist()
    assert thresholds == [10, 10]


def test_ids_change_with_the_posters_and_nothing_else(store: Store, root: Path) -> None:
    seen, unseen = pictures(4, 30), pictures(3, 31)
    table = generations(store, pictures(2, 32))
    training, holdout = posters(store, "training", seen), posters(store, "holdout", unseen)
    ids = [metric.metric_id for metric in compared(store, root, table, training, holdout).metrics]
    turned = Posters("training", dict(reversed(list(training.files.items()))))
    again = compared(store, root, table, turned, holdout)
    assert [metric.metric_id for metric in again.metrics] == ids
    fewer = compared(store, root, table, posters(store, "training", seen[1:]), holdout)
    changed = [metric.metric_id for metric in fewer.metrics]
    same = {"CLIP-I holdout"}
    for metric, before, after in zip(again.metrics, ids, changed, strict=True):
        assert (before == after) == (metric.name in same)
        assert f".{training.digest}." in before or "overfit" in before or "holdout" in before


def test_an_encoder_of_each_kind_and_rows_for_what_cannot_be_compared(
    store: Store, root: Path
) -> None:
    drawn = pictures(4, 40)
    table = generations(store, [*drawn, None], statuses=["ok", "ok", "blocked", "ok", "failed"])
    (store.root / str(table.image_path[1])).unlink()
    encoders = evidence_encoders(
        EvidenceSettings(
            image_encoders=(
                ModelRef(id="models/clip", revision=None),
                ModelRef(id="models/own", revision=None),
            )
        ),
        ModelRef(id="unused", revision=None),
    )
    # Its folder's name does not tell that it is a DINO.
    shutil.copytree(root / "models" / "dinov2", root / "models" / "own", dirs_exist_ok=True)
    result = compared(
        store, root, table, posters(store, "training", pictures(3, 41)),
        posters(store, "holdout", pictures(3, 42)), encoders,
    )  # fmt: skip
    assert [metric.name for metric in result.metrics][4] == "DINO holdout"
    for metric in result.metrics:
        rows = result.scores[result.scores["metric_id"] == metric.metric_id]
        assert rows.generation_key.tolist() == table.generation_key.tolist()
        assert rows.status.tolist() == ["ok", "failed", "blocked", "ok", "failed"]
        assert rows.value.notna().tolist() == [True, False, False, True, False]
        assert rows.reason.iloc[2] == "it is blocked" and "read" in rows.reason.iloc[1]
    assert len(result.nearest) == 4  # two images, two encoders


def test_what_the_gate_reads_is_named_whatever_the_order_of_the_metrics(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measures = fidelity._measures
    monkeypatch.setattr(
        fidelity, "_measures", lambda *asked: dict(reversed(measures(*asked).items()))
    )
    table = generations(store, pictures(1, 45))
    result = compared(
        store, root, table, posters(store, "training", pictures(3, 46)),
        posters(store, "holdout", pictures(3, 47)),
    )  # fmt: skip
    names = {metric.metric_id: metric.name for metric in result.metrics}
    assert {role: names[metric_id] for metric_id, role in result.roles.items()} == {
        "fidelity": "CLIP-I holdout", "copies": "CLIP-I nearest training poster",
    }  # fmt: skip
    assert names[result.nearest_id] == "CLIP-I nearest training poster"


def test_without_holdout_posters_the_reason_says_so(store: Store, root: Path) -> None:
    table = generations(store, pictures(1, 50))
    result = compared(
        store, root, table, posters(store, "training", pictures(2, 51)), Posters("holdout", {})
    )
    (row,) = of(result, "CLIP-I holdout").itertuples()
    assert row.status == "failed" and "no readable holdout poster" in str(row.reason)
    assert of(result, "CLIP-I training").status.tolist() == ["ok"]


def test_training_posters_that_cannot_be_read_are_counted(store: Store, root: Path) -> None:
    table, seen = generations(store, pictures(1, 50)), posters(store, "training", pictures(3, 51))
    holdout = posters(store, "holdout", pictures(3, 52))
    paths = list(seen.files.values())
    paths[0].unlink()
    result = compared(store, root, table, seen, holdout)
    assert result.lost == 1 and len(result.nearest) == 1
    unknown = compared(store, root, table, Posters("training", {}), holdout)
    assert unknown.lost == 0 and unknown.nearest.empty
    (row,) = of(unknown, "CLIP-I nearest training poster").itertuples()
    assert row.status == "failed" and "is not known" in str(row.reason)
    assert of(unknown, "CLIP-I holdout").status.tolist() == ["ok"]


@pytest.mark.parametrize("lacking", ["training", "holdout"])
def test_numbers_without_a_poster_that_cannot_be_read_do_not_stay_when_it_is_put_back(
    store: Store, root: Path, lacking: str
) -> None:
    table = generations(store, pictures(2, 55))
    sets = {
        name: posters(store, name, pictures(3, seed))
        for name, seed in (("training", 56), ("holdout", 57))
    }
    path = next(iter(sets[lacking].files.values()))
    whole = path.read_bytes()
    path.unlink()
    without = compared(store, root, table, sets["training"], sets["holdout"])
    store.put(whole, ".png")
    result = compared(store, root, table, sets["training"], sets["holdout"])
    named = {metric.name: metric.metric_id for metric in result.metrics}
    before = {metric.name: metric.metric_id for metric in without.metrics}
    changed = {name for name, metric_id in named.items() if before[name] != metric_id}
    of_training = {"CLIP-I training", "CLIP-I nearest training poster", "perceptual hash distance"}
    assert changed == {
        "CLIP-I overfit gap", *(of_training if lacking == "training" else {"CLIP-I holdout"})
    }  # fmt: skip
    fewer = Posters(lacking, dict(list(sets[lacking].files.items())[1:]))
    sets[lacking] = fewer
    alone = compared(store, root, table, sets["training"], sets["holdout"])
    assert {metric.metric_id for metric in alone.metrics} == set(before.values())
    pd.testing.assert_frame_equal(without.scores, alone.scores)


def test_the_scorer_serves_where_no_encoder_is_configured() -> None:
    scorer = ModelRef(id="data/models/starter/scorer", revision=None)
    (only,) = evidence_encoders(EvidenceSettings(), scorer)
    assert only.model == scorer and only.preprocessing == "pad"


def test_posters_are_known_by_their_content(store: Store) -> None:
    blob = store.put(png_bytes(pictures(1, 60)[0]), ".png")
    one = Posters("holdout", {blob: Path("a.png")})
    assert one.digest == Posters("holdout", {blob: Path("elsewhere.png")}).digest
