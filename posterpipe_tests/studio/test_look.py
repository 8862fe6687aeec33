"""What a saved poster is called."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from posterpipe.studio.engine import take_order
from posterpipe.studio.look import file_name
from posterpipe.studio.painter import Poster
from posterpipe.studio.served import Choice


def poster(choice: Choice, *, title: str = "", words: str = "a red rocket") -> Poster:
    order = take_order(description=words, title=title, choices=[choice], seed=7)
    return Poster(Image.new("RGB", (2, 3)), b"", b"", order, title, 7, choice, None, ())


def test_base_and_tuned_posters_of_one_seed_have_names_of_their_own(base: Choice) -> None:
    tuned = replace(base, name="feedfacefeedface", kind="tuned")
    assert file_name(poster(base)) == "a-red-rocket-base-7.png"
    assert file_name(poster(tuned)) == "a-red-rocket-feedface-7.png"


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Grüße, Пегас!", "grüße-пегас"),
        ("Ame\u0301lie", "am\u00e9lie"),
        ("ゴジラ VS コング", "ゴジラ-vs-コング"),
        ("हिन्दी फ़िल्म", "हिन्दी-फ़िल्म"),
        ("../../etc/passwd", "etc-passwd"),
        ("a" * 80, "a" * 48),
    ],
)
def test_letters_of_every_script_stay_in_the_name_and_nothing_else(
    base: Choice, title: str, name: str
) -> None:
    assert file_name(poster(base, title=title)) == f"{name}-base-7.png"


def test_words_without_letters_are_called_a_poster(base: Choice) -> None:
    assert file_name(poster(base, words="!?")) == "poster-base-7.png"
