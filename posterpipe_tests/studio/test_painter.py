"""From an order to a poster, with real (tiny) models."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from posterpipe.core.generations import generate
from posterpipe.core.metrics.clip import ClipTextSimilarity
from posterpipe.core.models import ModelMissing
from posterpipe.core.progress import NoProgress
from posterpipe.core.prompts import load_suite
from posterpipe.core.sampler import Sampler
from posterpipe.core.store import Store
from posterpipe.settings import Settings
from posterpipe.studio.engine import Engine, Order, take_order
from posterpipe.studio.painter import Painter, Poster, last_read
from posterpipe.studio.served import Models


def order(settings: Settings, words: str = "a red rocket", **values: object) -> Order:
    given: dict[str, object] = {"choices": [Models(settings).served().base], "seed": 7, **values}
    return take_order(description=words, **given)  # type: ignore[arg-type]


def paint(settings: Settings, asked: Order, painter: Painter | None = None) -> Poster:
    painter = painter or Painter(settings)
    return painter.paint(asked, asked.choices[0], asked.seeds[0], lambda step, steps: None)


def test_the_suites_prompt_gives_the_pipelines_image(deployment: Settings) -> None:
    prompts = load_suite(deployment.path(deployment.prompt_suite))
    store = Store(deployment.path(deployment.store))
    base = Models(deployment).served().base
    table = generate(
        store, prompts, ["sd", "sd_negative"], Path(deployment.base_model.id), base.name,
        deployment.sampler, NoProgress(), run_id="test",
    )  # fmt: skip
    painter = Painter(deployment)
    assert len(table) == 4
    for row in table.itertuples(index=False):
        with Image.open(store.root / str(row.image_path)) as image:
            pipelines = np.asarray(image.convert("RGB"), dtype=int)
        asked = order(
            deployment, str(row.prompt), negative=str(row.negative_prompt), seed=int(str(row.seed))
        )
        ours = np.asarray(paint(deployment, asked, painter).image, dtype=int)
        assert np.abs(ours - pipelines).max() <= 1


def test_a_poster_is_saved_large_with_its_settings_inside(deployment: Settings) -> None:
    asked = order(deployment, negative="a cat", title="Grüße, Пегас", style="bold")
    poster = paint(deployment, asked)
    with Image.open(io.BytesIO(poster.png)) as image:
        assert image.format == "PNG"
        assert image.width == 320
        about = image.info["parameters"]
    lines = about.splitlines()
    assert lines[:2] == ["a red rocket", "Negative prompt: a cat"]
    assert "Seed: 7" in lines[2] and "Steps: 3" in lines[2]
    assert 'Title: "Grüße, Пегас", Lettering: bold' in lines[2]
    assert str(deployment.root) not in about


def test_the_score_is_that_of_the_untitled_image(deployment: Settings) -> None:
    titled = paint(deployment, order(deployment, title="Red One"))
    scorer = ClipTextSimilarity(deployment.scorer, deployment.root)
    assert titled.score == pytest.approx(float(scorer([titled.image], ["a red rocket"])[0]))
    assert titled.title == "Red One"


def test_what_the_model_cannot_read_is_told(deployment: Settings) -> None:
    poster = paint(deployment, order(deployment, "rocket " * 60))
    assert any("as far as 'rocket'" in note for note in poster.notes)
    assert paint(deployment, order(deployment)).notes == ()


def test_a_title_that_cannot_be_set_costs_the_title_and_not_the_poster(
    deployment: Settings,
) -> None:
    poster = paint(deployment, order(deployment, title="A\U000102a0\U000102a1"))  # Carian
    assert poster.title == ""
    assert any(note.startswith("The title was left out") for note in poster.notes)
    with Image.open(io.BytesIO(poster.png)) as image:
        assert "Title" not in image.info["parameters"]


def test_a_pictograph_in_a_title_costs_itself_and_is_told(deployment: Settings) -> None:
    poster = paint(deployment, order(deployment, title="Up 🎈"))
    assert poster.title == "Up 🎈"
    assert "No font has 🎈: the title is set without." in poster.notes


def test_without_a_scorer_there_is_a_poster_and_a_note(
    deployment: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = deployment.scorer.model_copy(
        update={"model": deployment.scorer.model.model_copy(update={"id": "data/nowhere/clip"})}
    )
    (deployment.root / "data" / "nowhere").mkdir(parents=True)
    poster = paint(deployment.model_copy(update={"scorer": scorer}), order(deployment))
    assert poster.score is None
    assert any(note.startswith("No scores: ") for note in poster.notes)


def test_where_memory_ran_out_who_draws_is_told_no_settings(
    deployment: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(Sampler, "_draw", no_room)
    engine = Engine(Painter(deployment))
    (told,) = engine.wait(engine.submit(order(deployment), "ann"), 60).problems
    assert "not enough memory" in told and "POSTERPIPE" not in told
    engine.close()


def test_a_checkpoint_that_is_gone_is_told_and_the_base_model_still_draws(
    deployment: Settings,
) -> None:
    base = Models(deployment).served().base
    gone = type(base)("feedfacefeed", "tuned", deployment.root / "store/checkpoints/feedfacefeed")
    engine = Engine(Painter(deployment))
    failed = engine.wait(engine.submit(order(deployment, choices=[gone]), "ann"), 60)
    assert failed.state == "failed" and "no finished checkpoint" in failed.problems[0]
    assert engine.wait(engine.submit(order(deployment), "ann"), 60).state == "done"
    engine.close()


def test_a_missing_base_model_is_told_with_what_to_do(deployment: Settings) -> None:
    model = deployment.base_model.model_copy(update={"id": "data/nowhere/base"})
    (deployment.root / "data" / "nowhere").mkdir(parents=True)
    with pytest.raises(ModelMissing, match="is not there"):
        Models(deployment.model_copy(update={"base_model": model})).served()


def test_two_models_stay_in_memory_and_a_third_takes_the_oldest_place(
    deployment: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posterpipe.studio.painter.require_checkpoint", lambda *a, **k: None)
    base = Models(deployment).served().base
    folder = Path(deployment.base_model.id)
    one, two = (type(base)(name, "tuned", folder) for name in ("one", "two"))
    painter = Painter(deployment)
    for choice in (base, one, base, two):
        painter.prepare(choice)
    assert [painter.ready(choice) for choice in (base, one, two)] == [True, False, True]


def test_the_last_word_that_fits() -> None:
    words = "one two three four"
    assert last_read(words, lambda text: len(text.split()), 2) == "two"
    assert last_read(words, lambda text: len(text.split()), 9) == "four"
