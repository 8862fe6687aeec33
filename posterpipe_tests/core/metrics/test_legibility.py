"""Reading titles: hand-made images for the reader, an independent Levenshtein for the distance."""

from __future__ import annotations

import random
from importlib.resources import files
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageFont

from posterpipe.core.metrics import legibility as legibility_module
from posterpipe.core.metrics.base import unread_count
from posterpipe.core.metrics.legibility import (
    TitleReader,
    edit_distance,
    legibility_metrics,
    measure_legibility,
    of_all_titles,
    plain,
    reader_id,
    title_distance,
    unknown_letters,
)
from posterpipe.core.progress import NoProgress
from posterpipe.core.store import Store
from posterpipe.core.typography import lettering_id
from posterpipe.settings import LetteringSettings
from posterpipe_tests.core.metrics.tiny import generations

OTHER_SCRIPTS = {
    "Cyrillic": "Ночной дозор", "Hangul": "기생충", "Hebrew": "שלום עולם", "Arabic": "أبطال",
    "Devanagari": "दंगल", "Thai": "องค์บาก", "Greek": "Αλέξανδρος",
}  # fmt: skip


def lettered(*lines: str, size: tuple[int, int] = (400, 600), height: int = 48) -> Image.Image:
    """Dark lines on a light ground, one below the other."""
    image = Image.new("RGB", size, (238, 226, 200))
    draw = ImageDraw.Draw(image)
    font = ImageFont.truetype(str(files("font_roboto") / "files/Roboto-Bold.ttf"), height)
    for number, line in enumerate(lines):
        place = (size[0] / 2, 60 + number * 1.5 * height)
        draw.text(place, line, fill=(40, 30, 60), font=font, anchor="mm")
    return image


def by_hand(one: str, other: str) -> int:
    """Wagner & Fischer 1974."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row, before = [i], row
        for j, b in enumerate(other, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def test_distances_are_those_of_the_textbook() -> None:
    assert edit_distance("kitten", "sitting") == pytest.approx(3 / 7)
    assert edit_distance("", "abc") == 1 and edit_distance("abc", "abc") == 0
    rng = random.Random(3)
    for _ in range(200):
        one = "".join(rng.choices("abcde", k=rng.randint(1, 12)))
        other = "".join(rng.choices("abcde", k=rng.randint(1, 12)))
        expected = by_hand(one, other) / max(len(one), len(other))
        assert edit_distance(one, other) == pytest.approx(expected)


def test_capitals_signs_spaces_and_accents_do_not_count() -> None:
    assert plain("  The Ginger-Breeze!  ") == "thegingerbreeze"
    assert plain("CAFÉ Été") == plain("cafe ete")
    assert plain("ﬁlm №5") == "filmno5" and plain("STRASSE") == plain("Straße")
    assert plain("Йод") != plain("Иод")  # another letter, no accent
    assert plain("♥ …") == ""


def test_a_title_may_run_over_lines_and_stand_among_others() -> None:
    lines = ["A FILM BY OTTO FERN", "PLUM", "COUNT-", "DOWN", "MUSIC BY LENA QUILL"]
    assert title_distance(lines, "Plum Countdown") == 0
    assert title_distance(lines[:2], "Plum Countdown") == pytest.approx(9 / 13)
    assert title_distance([], "Plum Countdown") == 1
    assert title_distance(["DOWN", "PLUM COUNT"], "Plum Countdown") > 0  # the order counts
    with pytest.raises(ValueError, match="no letters to read"):
        title_distance(lines, "…")


@pytest.fixture(scope="module")
def reader() -> TitleReader:
    return TitleReader()


def test_what_is_written_is_read_in_order(reader: TitleReader) -> None:
    (first, blank) = reader([lettered("PLUM", "COUNTDOWN"), Image.new("RGB", (64, 96), "teal")])
    assert [line.text for line in first] == ["PLUM", "COUNTDOWN"]
    assert all(line.confidence > 0.9 for line in first) and first[0].box[1] < first[1].box[1]
    assert blank == []


def test_small_images_and_other_scripts_are_read(reader: TitleReader) -> None:
    small = lettered("COMET", height=80).resize((100, 150), Image.Resampling.LANCZOS)
    font = files("justmytype_intl_cjk") / "fonts/ofl/notosansjp/NotoSansJP[wght].ttf"
    eastern = Image.new("RGB", (500, 300), "white")
    ImageDraw.Draw(eastern).text(
        (250, 150), "星の船", fill="black", font=ImageFont.truetype(str(font), 90), anchor="mm"
    )
    texts = ["".join(line.text for line in lines) for lines in reader([small, eastern])]
    assert title_distance(texts[:1], "Comet") == 0
    assert title_distance(texts[1:], "星の船") == 0


def test_the_reader_is_named_by_version_and_weights() -> None:
    name, weights = reader_id().rsplit(".", 1)
    assert name.startswith("rapidocr-") and len(weights) == 8
    both = (("drawn", ""), ("set", "abc"), ("set", "def"))
    ids = {metric.metric_id for where in both for metric in legibility_metrics(*where)}
    assert len(ids) == 6 and all(reader_id() in metric_id for metric_id in ids)
    assert {name.split(".")[1] for name in ids} == {"drawn", "set"}, "reports go by it"


def test_a_title_that_is_set_otherwise_is_measured_by_another_metric() -> None:
    """Scores are kept for ever, and a generation's key does not know how its title is set."""

    def ids(lettering: LetteringSettings) -> set[str]:
        return {metric.metric_id for metric in legibility_metrics("set", lettering_id(lettering))}

    one = LetteringSettings(style="bold")
    assert ids(one).isdisjoint(ids(LetteringSettings(style="serif")))
    assert ids(one) == ids(LetteringSettings(style="bold", seeds=2)), "which ones, not how"
    with pytest.raises(ValueError, match="'set' only"):
        legibility_metrics("set")


def test_each_image_with_a_title_gets_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    images = [lettered("STAR", "SAILOR"), lettered("STAR TAILOR"), lettered(), lettered("X"), None]
    titles = ["Star Sailor", "Star Sailor", "Star Sailor", "", "Star Sailor"]
    table = generations(store, images, titles=titles)
    found = measure_legibility(store, table, "drawn", NoProgress())
    scores, read = found.scores, found.read
    distance, exact = (
        scores[scores["metric_id"] == metric.metric_id].reset_index(drop=True)
        for metric in found.metrics
    )
    assert distance.value[:3].tolist() == pytest.approx([0, 1 / 10, 1])
    assert exact.value[:3].tolist() == [1, 0, 0]
    assert exact.status.tolist() == ["ok", "ok", "ok", "failed"]  # the untitled one has no row
    assert read.read.tolist()[:2] == ["STAR / SAILOR", "STAR TAILOR"]

    def no_reader(**_: object) -> None:
        raise AssertionError("the reader was loaded")

    monkeypatch.setattr(legibility_module, "TitleReader", no_reader)
    renamed = table.assign(title=["Star Tailor"] * 5)
    again = measure_legibility(store, renamed[:2], "drawn", NoProgress())
    assert again.scores.value.tolist() == pytest.approx([1 / 10, 0, 0, 1])


def test_an_unreadable_image_is_a_row_with_the_reason(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    table = generations(store, [lettered("STAR"), lettered("MOON")], titles=["Star", "Moon"])
    path = store.root / str(table.image_path[0])
    path.unlink()  # it may not be written to
    path.write_bytes(b"no image")
    found = measure_legibility(store, table, "drawn", NoProgress())
    scores, read = found.scores, found.read
    assert scores.status.tolist() == ["failed", "ok", "failed", "ok"]
    assert "cannot be read" in scores.reason[0] and len(read) == 1
    assert unread_count(table, scores) == 1
    assert unread_count(table.assign(status=["failed", "ok"]), scores) == 0
    told = of_all_titles(table, read)
    assert told["status"].tolist() == ["failed", "ok"] and told["exact"].tolist() == [False, True]
    assert isinstance(read, pd.DataFrame)


def test_a_suite_without_titles_has_nothing_to_read(tmp_path: Path) -> None:
    columns = ["generation_key", "image", "image_path", "title", "status", "reason"]
    nothing = pd.DataFrame(columns=columns)
    found = measure_legibility(Store(tmp_path), nothing, "set", NoProgress(), lettering="abc")
    assert len(found.metrics) == 2 and found.scores.empty and found.read.empty
    assert of_all_titles(nothing, found.read).empty


@pytest.mark.parametrize(
    "title",
    ["Plum Orbit", "Amélie", "Straße", "İstanbul", "Việt Nam", "Đường về", "Nǐ hǎo", "Ljóð",
     "8½", "Ⅷ", "ﬁlm", "Up 🎈", "千と千尋の神隠し", "卧虎藏龙", "Ω", "Δ",
     "❤\ufe0f Love", "愛❤\ufe0f", "☎\ufe0f Ring", "7\ufe0f\u20e3"],
)  # fmt: skip
def test_the_reader_knows_the_letters_of_what_it_was_trained_on(title: str) -> None:
    assert unknown_letters(title) == "" == unknown_letters(title.upper())


@pytest.mark.parametrize(("script", "title"), OTHER_SCRIPTS.items())
def test_the_reader_does_not_know_the_letters_that_its_model_cannot_write(
    script: str, title: str
) -> None:
    assert set(unknown_letters(title)) >= {plain(sign) for sign in title if sign.isalpha()}
    assert unknown_letters(f"Star {title}") == unknown_letters(title)


def test_greek_words_are_read_as_what_looks_like_them_in_latin(reader: TitleReader) -> None:
    """Why Greek letters do not count as known, though the model has them: for formulas."""
    for title in ("ΛΑΘΟΣ", "ΖΟΡΜΠΑΣ", "ΣΚΟΝΗ ΚΑΙ ΦΩΣ"):
        ((line,),) = [list(lines) for lines in reader([lettered(title, size=(700, 200))])]
        assert line.confidence > 0.5 and title_distance([line.text], title) > 0.3
        assert unknown_letters(title)


def test_a_title_in_letters_that_the_reader_does_not_know_has_no_score_and_the_reason(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    titles = [*OTHER_SCRIPTS.values(), "Star"]
    images: list[Image.Image | None] = [lettered(title) for title in titles]
    table = generations(store, images, titles=titles)
    found = measure_legibility(store, table, "drawn", NoProgress())
    exact = found.scores[found.scores["metric_id"] == found.metrics[1].metric_id]
    assert exact["status"].tolist() == ["blocked"] * len(OTHER_SCRIPTS) + ["ok"]
    assert exact["value"].isna().tolist() == [True] * len(OTHER_SCRIPTS) + [False]
    for script, reason in zip(OTHER_SCRIPTS, exact["reason"], strict=False):
        assert f"does not know the {script} letters" in reason and "look at the poster" in reason
    assert found.read["title"].tolist() == ["Star"]
    assert list(found.unknown) == list(OTHER_SCRIPTS.values())
    assert unread_count(table, found.scores) == 0, "reading them again would change nothing"
    told = of_all_titles(table, found.read).set_index("title")
    assert told["measurable"].tolist() == [False] * len(OTHER_SCRIPTS) + [True]
    assert told["status"].tolist() == ["blocked"] * len(OTHER_SCRIPTS) + ["ok"]
    gone = measure_legibility(store, table.assign(status="failed"), "drawn", NoProgress())
    assert set(gone.scores["status"]) == {"failed"}, "it comes when the image is drawn"
