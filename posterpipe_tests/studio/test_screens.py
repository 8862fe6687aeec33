"""The pages without a browser: what they ask, and what comes of it."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from PIL import Image
from streamlit import config
from streamlit.testing.v1 import AppTest

from posterpipe.core.variants import LABELS
from posterpipe.settings import Settings
from posterpipe.studio import caption_desk, rooms
from posterpipe.studio.caption_desk import CaptionDesk
from posterpipe.studio.painter import Painter
from posterpipe_tests.studio.test_caption_desk import captioned
from posterpipe_tests.studio.test_published import publication
from posterpipe_tests.studio.test_served import BAD, GOOD, checkpoint, decided

SCREENS = Path(rooms.__file__).with_name("screens")
HOSTILE = "<script>alert(1)</script> **bold** $x^2$ :smile: `id` [a](http://b)"


@pytest.fixture(autouse=True)
def anew(deployment: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rooms of this test's deployment, the model in this process: it has torch loaded already."""
    # As in the server. With it Python 3.11's parser works on pages, which fails now and then beside
    # a thread that parses too, as logging a traceback does.
    config.set_option("runner.magicEnabled", False)
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


@pytest.fixture
def tuned(deployment: Settings, monkeypatch: pytest.MonkeyPatch) -> str:
    """A champion that draws as the base model does."""
    monkeypatch.setattr("posterpipe.studio.painter.require_checkpoint", lambda *a, **k: None)
    monkeypatch.setattr(
        "posterpipe.studio.painter.model_folder",
        lambda choice, settings: Path(settings.base_model.id),
    )
    checkpoint(deployment, GOOD)
    decided(deployment, (GOOD, "promote"))
    return GOOD


def test_again_gives_the_same_poster_whatever_stood_in_the_fields_meanwhile(tuned: str) -> None:
    at = page("make")
    at.text_area(key="make.description").set_value("a red rocket")
    at.text_area(key="make.negative").set_value("a dog")
    at.selectbox(key="make.style").set_value("bold")
    base = next(name for name in at.selectbox(key="make.model").options if "Base" in name)
    at.selectbox(key="make.model").select(base)
    press(at, "Generate")
    until(at, lambda: len(made(at)) == 1 and "Cancel" not in labels(at))
    at.text_area(key="make.description").set_value("a blue cat")
    at.text_area(key="make.negative").set_value("")
    at.text_input(key="make.title").set_value("Red One")
    at.selectbox(key="make.style").set_value("auto")
    at.selectbox(key="make.model").set_value("champion").run()
    press(at, "Again")
    press(at, "Generate")
    until(at, lambda: len(made(at)) == 2 and "Cancel" not in labels(at))
    second, first = made(at)
    assert (second.png, second.choice) == (first.png, first.choice)
    assert second.order.negative == "a dog" and second.order.style == "bold"


def test_again_says_that_the_model_of_a_poster_is_gone(deployment: Settings, tuned: str) -> None:
    at = page("make")
    at.text_area(key="make.description").set_value("a red rocket")
    press(at, "Generate")
    until(at, lambda: len(made(at)) == 1 and "Cancel" not in labels(at))
    press(at, "Again")
    assert not any("not in the store any more" in text for text in texts(at))
    shutil.rmtree(deployment.path(deployment.store) / "checkpoints" / tuned)
    at.run()
    press(at, "Again")
    assert any(f"{tuned[:8]}, which drew that poster" in text for text in texts(at))
    press(at, "Any seed")
    assert not any("which drew that poster" in text for text in texts(at))


def test_an_example_brings_its_own_negative_prompt() -> None:
    at = page("make")
    at.text_area(key="make.negative").set_value("a dog")
    press(at, "Red rocket")
    assert (
        at.text_area(key="make.description").value == "a minimalist film poster with a red rocket"
    )
    assert at.text_area(key="make.negative").value == "a cat"
    assert at.text_input(key="make.title").value == "Red One"


@pytest.mark.parametrize("name", ["make", "compare"])
def test_the_phrase_of_the_tuned_look_is_told_and_put_in_as_in_training(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = page(name)
    assert "Insert it" not in labels(at)
    monkeypatch.setenv("POSTERPIPE_CAPTIONER__TRIGGER", "in studio $x$ style")
    monkeypatch.setenv("POSTERPIPE_CAPTIONER__TEMPLATE", "{caption}, {trigger}")
    rooms.rooms.clear()
    at = page(name)
    assert "The tuned look is called by: in studio $x$ style" in texts(at)
    press(at, "Insert it")
    assert at.text_area(key=f"{name}.description").value == "in studio $x$ style"
    at.text_area(key=f"{name}.description").set_value("a red rocket").run()
    press(at, "Insert it")
    assert at.text_area(key=f"{name}.description").value == "a red rocket, in studio $x$ style"
    assert next(button for button in at.button if button.label == "Insert it").disabled


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


def test_compare_begins_with_what_stands_on_make_and_keeps_what_was_typed() -> None:
    at = page("compare")
    assert at.text_area(key="compare.negative").value == "a cat"
    at.session_state["make.description"] = "a blue boat"
    at.session_state["make.negative"] = "a dog"
    at.session_state["make.seed"] = 7
    at.run()
    assert at.text_area(key="compare.description").value == "a blue boat"
    assert at.text_area(key="compare.negative").value == "a dog"
    assert at.number_input(key="compare.seed").value == 7
    at.text_area(key="compare.description").set_value("a green boat").run()
    at.session_state["make.description"] = "a white boat"
    at.session_state["make.negative"] = ""
    at.run()
    assert at.text_area(key="compare.description").value == "a green boat"
    assert at.text_area(key="compare.negative").value == ""


def test_compare_draws_both_from_the_same_seed(tuned: str) -> None:
    at = page("compare")
    at.text_area(key="compare.description").set_value("a red rocket")
    press(at, "Draw both")
    until(at, lambda: len(made(at)) == 2 and "Cancel" not in labels(at))
    champions, bases = made(at)
    assert (champions.choice.name, bases.choice.kind) == (tuned, "base")
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


def test_the_captioners_words_become_a_persons_only_where_they_are_confirmed(
    deployment: Settings,
) -> None:
    captioned(deployment, four="a white sheet", one="a red sheet")
    at = page("captions")
    assert "Save" not in labels(at)[:2] and labels(at)[0] == "Confirm"
    at.text_area[0].set_value("a sheet").run()
    assert labels(at)[0] == "Save"
    at.text_area[0].set_value("a white sheet").run()
    press(at, "Confirm")
    rows = {row.name: row for row in CaptionDesk(deployment).rows()}
    assert (rows["four.png"].written, rows["one.png"].written) == ("a white sheet", None)
    assert labels(at)[0] == "Save"


def test_a_persons_caption_gives_way_to_the_captioners_again(deployment: Settings) -> None:
    captioned(deployment, four="a white sheet")
    at = page("captions")
    assert "Use the captioner's again" not in labels(at)
    at.text_area[0].set_value("mine")
    press(at, "Confirm")
    press(at, "Use the captioner's again")
    assert at.text_area[0].value == "a white sheet"
    assert any("by the captioner" in text for text in texts(at))
    assert any(text.startswith("Taken back.") for text in texts(at))
    assert CaptionDesk(deployment).rows()[0].written is None


def test_a_caption_that_someone_changed_meanwhile_is_not_taken_back(deployment: Settings) -> None:
    at = page("captions")
    at.text_area[0].set_value("mine")
    press(at, "Save")
    CaptionDesk(deployment).save("four.png", "theirs", seen="mine")
    press(at, "Use the captioner's again")
    assert any(text.startswith("Not taken back") for text in texts(at))
    assert at.text_area[0].value == "theirs"
    assert CaptionDesk(deployment).rows()[0].written == "theirs"


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


def test_scores_show_a_ratio_for_what_is_compared_by_ratio(deployment: Settings) -> None:
    public = publication(deployment.path(deployment.store), 0.25)
    with duckdb.connect(str(public)) as connection:
        connection.execute(
            "CREATE OR REPLACE TABLE leaderboard AS SELECT 'clip_t.crop.x' AS metric_id, 'ratio' "
            "AS scale, 'sd' AS variant, 0.25 AS mean, -0.25 AS diff_to_sd, -0.5 AS diff_low_95, "
            "0.5 AS diff_high_95"
        )
    at = page("scores")
    told = at.dataframe[0].value[["diff_to_sd", "diff_low_95", "diff_high_95"]]
    assert told.astype(float).to_numpy().tolist() == [[0.75, 0.5, 1.5]]


def test_the_frame_shows_the_first_page() -> None:
    at = AppTest.from_file(str(SCREENS.with_name("app.py")), default_timeout=60).run()
    assert not at.exception
    assert [title.value for title in at.title] == ["Make a poster"]
