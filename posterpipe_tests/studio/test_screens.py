"""The pages without a browser: what they ask, and what comes of it."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

from posterpipe.core.variants import LABELS
from posterpipe.settings import Settings
from posterpipe.studio import caption_desk, rooms
from posterpipe.studio.caption_desk import CaptionDesk
from posterpipe.studio.painter import Painter
from posterpipe_tests.studio.test_published import publication
from posterpipe_tests.studio.test_served import BAD, GOOD, checkpoint, decided

SCREENS = Path(rooms.__file__).with_name("screens")
HOSTILE = "<script>alert(1)</script> **bold** $x^2$ :smile: `id` [a](http://b)"


@pytest.fixture(autouse=True)
def anew(deployment: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rooms of this test's deployment, the model in this process: it has torch loaded already."""
    monkeypatch.setattr(rooms, "RemotePainter", Painter)
    monkeypatch.setattr(caption_desk, "LOOKED_SECONDS", 0.0)
    rooms.rooms.clear()
    yield
    rooms.rooms().engine.close()
    rooms.rooms.clear()


def page(name: str) -> AppTest:
    """The page, loaded."""
    return AppTest.from_file(str(SCREENS / f"{name}.py"), default_timeout=60).run()


def press(at: AppTest, label: str, place: int = 0) -> None:
    """Presses a button, as often as it takes to find it."""
    [button for button in at.button if button.label == label][place].click().run()


def labels(at: AppTest) -> list[str]:
    return [button.label for button in at.button]


def texts(at: AppTest) -> list[str]:
    return [str(text.value) for text in at.text]


def until(at: AppTest, holds: Callable[[], bool]) -> None:
    """Runs the page again, as its timer does, until that is so."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, texts(at)
        time.sleep(0.1)
        at.run()
    assert not at.exception


def made(at: AppTest) -> list[Any]:
    return list(at.session_state["history"]) if "history" in at.session_state else []


def test_a_poster_is_made_with_two_actions_and_can_be_saved() -> None:
    at = page("make")
    assert not at.exception
    assert "Your poster appears here" in [heading.value for heading in at.header]
    assert any("base model will draw it" in text for text in texts(at))
    at.text_area(key="make.description").set_value(HOSTILE)
    press(at, "Generate")
    until(at, lambda: len(made(at)) == 1 and "Cancel" not in labels(at))
    (poster,) = made(at)
    with Image.open(io.BytesIO(poster.png)) as image:
        assert image.info["parameters"].startswith(HOSTILE)
    assert any("CLIP fit" in text and str(poster.seed) in text for text in texts(at))
    assert "Save Poster" in [button.proto.label for button in at.get("download_button")]


def test_what_was_typed_is_in_no_text_that_reads_markdown() -> None:
    at = page("make")
    at.text_area(key="make.description").set_value(HOSTILE)
    at.text_input(key="make.title").set_value("**Bold** :smile:")
    press(at, "Generate")
    until(at, lambda: len(made(at)) == 1)
    for kind in ("markdown", "caption", "header", "subheader", "title", "success", "error", "info"):
        assert not any(":smile:" in str(item.value) for item in getattr(at, kind)), kind
    assert not any(":smile:" in label for label in labels(at))


def test_bad_input_gets_a_sentence_and_nothing_is_drawn() -> None:
    at = page("make")
    press(at, "Generate")
    assert any("Describe the poster first" in text for text in texts(at))
    at.text_area(key="make.description").set_value("a rocket")
    at.text_input(key="make.title").set_value("!!!")
    press(at, "Generate")
    assert any("no letters" in text for text in texts(at))
    assert made(at) == [] and not at.exception


def test_the_same_seed_stays_for_other_words_until_it_is_given_up() -> None:
    at = page("make")
    at.text_area(key="make.description").set_value("a red rocket")
    press(at, "Generate")
    until(at, lambda: len(made(at)) == 1 and "Cancel" not in labels(at))
    seed = made(at)[0].seed
    press(at, "Same seed, other words")
    assert at.number_input(key="make.seed").value == seed
    at.text_area(key="make.description").set_value("a blue cat")
    press(at, "Generate")
    until(at, lambda: len(made(at)) == 2 and "Cancel" not in labels(at))
    assert [poster.seed for poster in made(at)] == [seed, seed]
    press(at, "Any seed")
    assert at.number_input(key="make.seed").value is None


def test_a_rejected_checkpoint_is_marked_and_not_the_default(deployment: Settings) -> None:
    for name in (GOOD, BAD):
        checkpoint(deployment, name)
    decided(deployment, (GOOD, "promote"), (BAD, "reject"))
    at = page("make")
    chosen = at.selectbox(key="make.model")
    assert chosen.value == "champion" and chosen.options[0].startswith(f"Champion {GOOD[:8]}")
    assert any("rejected by the gate" in option for option in chosen.options)
    chosen.set_value(BAD).run()
    assert any("never served" in text for text in texts(at))


def test_compare_says_what_it_waits_for_and_draws_the_base_model_alone() -> None:
    at = page("compare")
    assert any("no fine-tuned checkpoint yet" in text for text in texts(at))
    at.text_area(key="compare.description").set_value("a red rocket")
    press(at, "Draw")
    until(at, lambda: len(made(at)) == 1)


def test_compare_draws_both_from_the_same_seed(
    deployment: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posterpipe.studio.painter.require_checkpoint", lambda *a, **k: None)
    monkeypatch.setattr(
        "posterpipe.studio.painter.model_folder",
        lambda choice, settings: Path(settings.base_model.id),
    )
    checkpoint(deployment, GOOD)
    decided(deployment, (GOOD, "promote"))
    at = page("compare")
    at.text_area(key="compare.description").set_value("a red rocket")
    press(at, "Draw both")
    until(at, lambda: len(made(at)) == 2 and "Cancel" not in labels(at))
    champions, bases = made(at)
    assert (champions.choice.name, bases.choice.kind) == (GOOD, "base")
    assert champions.seed == bases.seed
    assert any("against the base model" in text for text in texts(at))


def test_a_caption_is_saved_as_a_persons(deployment: Settings) -> None:
    at = page("captions")
    assert any("4 of 4 posters; 0 captions by people" in text for text in texts(at))
    at.text_area[0].set_value("a white sheet")
    press(at, "Save")
    assert any("Saved in captions.csv" in text for text in texts(at))
    assert CaptionDesk(deployment).rows()[0].written == "a white sheet"
    at.run()
    at.radio(key="captions.filter").set_value("By people").run()
    assert "four.png" in texts(at) and "one.png" not in texts(at)


def test_an_empty_caption_is_refused_with_a_sentence(deployment: Settings) -> None:
    at = page("captions")
    at.text_area[0].set_value("   ")
    press(at, "Save")
    assert any(text.startswith("Not saved: no words") for text in texts(at))
    assert not deployment.path(deployment.captions).exists()


def test_the_second_writer_is_shown_both_texts_and_chooses(deployment: Settings) -> None:
    mine = page("captions")
    CaptionDesk(deployment).save("four.png", "theirs, $x$ and :smile:", seen=None)
    mine.text_area[0].set_value("mine")
    press(mine, "Save")
    shown = texts(mine)
    assert "theirs, $x$ and :smile:" in shown and "mine" in shown
    assert any("Nothing was overwritten" in text for text in shown)
    assert CaptionDesk(deployment).rows()[0].written == "theirs, $x$ and :smile:"
    press(mine, "Save mine instead")
    assert CaptionDesk(deployment).rows()[0].written == "mine"


def test_their_text_can_be_kept(deployment: Settings) -> None:
    mine = page("captions")
    CaptionDesk(deployment).save("four.png", "theirs", seen=None)
    mine.text_area[0].set_value("mine")
    press(mine, "Save")
    press(mine, "Keep theirs")
    assert mine.text_area[0].value == "theirs"
    assert CaptionDesk(deployment).rows()[0].written == "theirs"


def test_a_field_that_nobody_touched_follows_what_others_write(deployment: Settings) -> None:
    at = page("captions")
    CaptionDesk(deployment).save("four.png", "new words", seen=None)
    at.run()
    assert at.text_area[0].value == "new words"


def test_scores_say_where_they_come_from_before_there_are_any() -> None:
    at = page("scores")
    assert "No scores yet" in [heading.value for heading in at.header]


def test_scores_are_fresh_after_each_publication(deployment: Settings) -> None:
    store = deployment.path(deployment.store)
    publication(store, 0.25)
    at = page("scores")
    assert not at.exception
    assert at.dataframe[0].value["mean"].astype(float).tolist() == [0.25]
    assert at.dataframe[0].value["variant"].tolist() == [LABELS["sd"]]
    assert "a <b>rocket</b>" in texts(at)
    publication(store, 0.5)
    at.run()
    assert at.dataframe[0].value["mean"].astype(float).tolist() == [0.5]


def test_the_frame_shows_the_first_page() -> None:
    at = AppTest.from_file(str(SCREENS.with_name("app.py")), default_timeout=60).run()
    assert not at.exception
    assert [title.value for title in at.title] == ["Make a poster"]
