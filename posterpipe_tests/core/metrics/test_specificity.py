"""The own prompt beside the others of the suite, against plain transformers and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from posterpipe.core.metrics import encoders
from posterpipe.core.metrics.clip import cosines
from posterpipe.core.metrics.specificity import (
    PromptSpecificity,
    measure_specificity,
    specificity_metrics,
    suite_texts,
)
from posterpipe.core.progress import NoProgress
from posterpipe.core.statistics import CONTRASTS, effect
from posterpipe.core.store import Store
from posterpipe.settings import ModelRef, ScorerSettings
from posterpipe_tests.core.metrics.tiny import build_tiny_clip, generations, some_images

SETTINGS = ScorerSettings(model=ModelRef(id="models/clip", revision=None), batch_size=4)
TEXTS = ["a minimalist film poster of a red rocket", "a blue cat", "a green whale", "the centre"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    build_tiny_clip(folder / "models" / "clip")
    return folder


def drawn(
    store: Store, images: list[Image.Image | None], texts: list[str], **changes: object
) -> pd.DataFrame:
    table = generations(store, images, seeds_a_prompt=1, **changes)  # type: ignore[arg-type]
    return table.assign(score_text=texts[: len(table)])


def measured(store: Store, root: Path, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    found = measure_specificity(store, table, SETTINGS, root, NoProgress())
    return {
        role: found.scores[found.scores["metric_id"] == metric_id].reset_index(drop=True)
        for metric_id, role in found.roles.items()
    }


def plain_cosines(folder: Path, images: list[Image.Image], texts: list[str]) -> np.ndarray:
    """All images by all texts, as the documentation of transformers does it."""
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(
        [image.convert("RGB") for image in images], return_tensors="pt"
    )
    tokens = CLIPTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**pixels, **tokens)
        return (output.logits_per_image / model.logit_scale.exp()).numpy().astype(float)


def test_the_numbers_are_those_of_plain_transformers(store: Store, root: Path) -> None:
    images = some_images(4)
    found = measured(store, root, drawn(store, [*images], TEXTS))
    cosines = plain_cosines(root / "models" / "clip", images, TEXTS)
    for number in range(4):
        own = cosines[number, number]
        others = np.delete(cosines[number], number)
        assert found["specific"].value[number] == pytest.approx(own - others.mean(), abs=1e-5)
        assert found["control"].value[number] == pytest.approx(others.mean(), abs=1e-5)
        assert found["rank"].value[number] == pytest.approx((others < own).mean())


def test_a_look_that_all_prompts_share_raises_the_score_and_the_control_alike() -> None:
    """Of two models, one draws what is asked, the other what all prompts of the suite share."""
    rng = np.random.default_rng(7)

    def unit(vectors: np.ndarray) -> np.ndarray:
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    look, things = unit(rng.normal(size=64)), unit(rng.normal(size=(24, 64)))
    texts = unit(look + things)
    noise = unit(rng.normal(size=(24, 64)))
    worker, own = PromptSpecificity(texts), np.arange(24)
    before = worker(unit(0.2 * things + noise), own)
    styled = worker(unit(0.2 * things + noise + look), own)
    better = worker(unit(1.0 * things + noise), own)
    for after in (styled, better):
        gain = (after.specific + after.control) - (before.specific + before.control)
        assert gain.mean() > 0.25, "CLIP-T itself cannot tell the two"
    assert (styled.control - before.control).mean() > 0.3
    assert (styled.specific - before.specific).mean() < 0
    assert (better.specific - before.specific).mean() > 0.2
    assert better.rank.mean() == 1 > before.rank.mean() > 0.9


def test_the_negative_control_shows_no_effect_of_following_prompts() -> None:
    """Images of the tuned model follow their own prompts more closely, and no others."""
    rng = np.random.default_rng(7)

    def unit(vectors: np.ndarray) -> np.ndarray:
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    texts = unit(rng.normal(size=(24, 64)))
    worker, own = PromptSpecificity(texts), np.repeat(np.arange(24), 4)
    parts = []
    for variant, follows in {"sd": 0.2, "dreambooth": 0.5}.items():
        images = unit(follows * texts[own] + 0.7 * unit(rng.normal(size=(96, 64))))
        found = worker(images, own)
        cells = {"variant": variant, "prompt_id": own, "seed": np.tile(np.arange(4), 24)}
        parts.append(pd.DataFrame({**cells, "control": found.control, "own": found.specific}))
    weights = CONTRASTS["tuned without negative"]
    control, specific = (
        effect(pd.concat(parts), name, weights, value=name) for name in ("control", "own")
    )
    assert specific.low > 0.1
    assert control.low < 0 < control.high


def test_with_the_prompts_permuted_a_planted_effect_is_gone() -> None:
    """The negative control of the statistics: images are scored with another prompt's text."""
    rng = np.random.default_rng(11)
    prompts, seeds, studies = 24, 4, 200
    own = np.repeat(np.arange(prompts), seeds)
    called = {"own": 0, "permuted": 0}

    def unit(vectors: np.ndarray) -> np.ndarray:
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    for _ in range(studies):
        texts = unit(rng.normal(size=(prompts, 64)))
        # Along one random circle, so that none keeps its own.
        circle = rng.permutation(prompts)
        permuted = np.empty(prompts, dtype=int)
        permuted[circle] = np.roll(circle, 1)
        images = {
            variant: unit(follows * texts[own] + unit(rng.normal(size=(prompts * seeds, 64))))
            for variant, follows in {"sd": 0.3, "dreambooth": 0.5}.items()
        }
        for name, asked in (("own", own), ("permuted", permuted[own])):
            scores = [
                pd.DataFrame(
                    {"variant": variant, "prompt_id": own, "seed": np.arange(len(own)),
                     "clip_cosine": cosines(drawn, texts[asked])}
                )
                for variant, drawn in images.items()
            ]  # fmt: skip
            found = effect(pd.concat(scores), name, CONTRASTS["tuned without negative"])
            called[name] += not found.low < 0 < found.high
    assert called["own"] == studies
    # As often as 95 % intervals miss a truth of 0.
    assert 0.02 * studies <= called["permuted"] <= 0.08 * studies, called


def test_a_text_that_fits_as_well_counts_half() -> None:
    texts = np.array([[1, 0], [1, 0], [0, 1], [-1, 0]], np.float32)
    found = PromptSpecificity(texts)(np.array([[1, 0], [0, 1]], np.float32), np.array([0, 3]))
    assert found.rank.tolist() == [pytest.approx(2.5 / 3), pytest.approx(1 / 3)]
    assert found.control.tolist() == [0, pytest.approx(1 / 3)]
    assert found.specific.tolist() == [1, pytest.approx(-1 / 3)]
    with pytest.raises(ValueError, match="two or more"):
        PromptSpecificity(texts[:1])


def test_no_image_and_no_text_is_encoded_twice(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = drawn(store, [*some_images(4)], TEXTS)
    first = measured(store, root, table)
    asked: list[str] = []
    encode = encoders.ClipEncoder._encode

    def spy(self: encoders.ClipEncoder, texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return encode(self, texts)

    def no_images(*_: object) -> np.ndarray:
        raise AssertionError("an image was encoded")

    monkeypatch.setattr(encoders.ClipEncoder, "_encode", spy)
    monkeypatch.setattr(encoders.ClipEncoder, "prepared_features", no_images)
    reworded = table.assign(score_text=[*TEXTS[:3], "a yellow robot"])
    assert measured(store, root, reworded)["specific"].value.notna().all()
    assert asked == ["a yellow robot"]
    monkeypatch.setattr(encoders, "ClipEncoder", no_images)
    again = measured(store, root, table)
    pd.testing.assert_frame_equal(again["specific"], first["specific"])


def test_a_blocked_image_has_no_number_and_changes_no_others(store: Store, root: Path) -> None:
    images: list[Image.Image | None] = [*some_images(3), None]
    whole = measured(store, root, drawn(store, [*some_images(4)], TEXTS))
    table = drawn(store, images, TEXTS, statuses=["ok", "ok", "blocked", "failed"])
    for name, scores in measured(store, root, table).items():
        assert scores.status.tolist() == ["ok", "ok", "blocked", "failed"]
        assert scores.value[2:].isna().all() and "it is blocked" in scores.reason[2]
        np.testing.assert_allclose(scores.value[:2], whole[name].value[:2])
    (store.root / str(table.image_path[0])).write_bytes(b"no image")
    other = Store(store.root.with_name("other"))
    table["image_path"] = [str(store.root / path) if path else "" for path in table.image_path]
    gone = measured(other, root, table)["control"]
    assert gone.status[0] == "failed" and "cannot be read" in gone.reason[0]


def test_the_id_names_the_texts_of_the_suite(store: Store, root: Path) -> None:
    table = drawn(store, [*some_images(4)], TEXTS)
    texts = suite_texts(table.sample(frac=1, random_state=1))
    metrics = specificity_metrics(texts, SETTINGS, root)
    assert metrics == specificity_metrics(suite_texts(table), SETTINGS, root)
    kinds = [metric.metric_id.split(".") for metric in metrics]
    assert [kind for kind, *_ in kinds] == ["clip_specific", "clip_control", "clip_rank"]
    assert {tuple(rest) for _, suite, *rest in kinds} == {tuple(kinds[0][2:])}
    assert kinds[0][2:4] == ["crop", "clip"] and kinds[0][-1] == "v1"
    fewer = specificity_metrics(suite_texts(table.iloc[:3]), SETTINGS, root)
    assert not {m.metric_id for m in fewer} & {m.metric_id for m in metrics}


def test_a_text_of_several_prompts_counts_once_and_one_alone_is_not_measured(
    store: Store, root: Path
) -> None:
    table = drawn(store, [*some_images(4)], [*TEXTS[:3], TEXTS[0]])
    assert suite_texts(table) == sorted(TEXTS[:3])
    cosines = plain_cosines(root / "models" / "clip", some_images(4), TEXTS[:3])
    control = measured(store, root, table)["control"]
    np.testing.assert_allclose(control.value[3], cosines[3, 1:].mean(), atol=1e-5)
    alone = measure_specificity(
        store, table.assign(score_text="a cat"), SETTINGS, root, NoProgress()
    )
    assert alone.metrics == [] and alone.scores.empty and not alone.roles
