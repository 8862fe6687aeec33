"""Titles in type: contrast measured anew, blocks that spare the object, scripts without boxes."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageFilter

from posterpipe.core.metrics.legibility import TitleReader, plain, title_distance
from posterpipe.core.progress import NoProgress
from posterpipe.core.quality import unset_titles
from posterpipe.core.store import Store, content_key
from posterpipe.core.typography import (
    STYLES,
    TITLED_COLUMNS,
    TitleImpossible,
    choose_style,
    fonts,
    lettering_id,
    set_title,
    set_titles,
    titled,
    titled_key,
)
from posterpipe.core.typography.colour import contrast_ratio, srgb_to_lab
from posterpipe.core.typography.fonts import (
    coverage,
    font_at,
    fonts_id,
    layout_engine,
    lettering,
    needs_shaping,
)
from posterpipe.core.typography.lines import line_breaks, measure, pieces
from posterpipe.core.typography.saliency import components, look
from posterpipe.core.typography.signs import capitals
from posterpipe.settings import LetteringSettings
from posterpipe.starter.posters import RAW, scenes
from posterpipe.starter.render import render
from posterpipe_tests.core.metrics.tiny import generations

SMALL = LetteringSettings(min_width=320, style="geometric")
BLUE, ORANGE, GREEN = (40, 60, 150), (240, 130, 40), (60, 190, 90)


def poster(
    *, ground: tuple[int, int, int] = BLUE, middle: float = 0.5, size: tuple[int, int] = (160, 240)
) -> Image.Image:
    """A disc on a plain ground; `middle` is its height."""
    image = Image.new("RGB", size, ground)
    radius = 0.3 * size[0]
    x, y = size[0] / 2, middle * size[1]
    box = (x - radius, y - radius, x + radius, y + radius)
    ImageDraw.Draw(image).ellipse(box, fill=ORANGE)
    return image


def test_contrast_is_that_of_wcag() -> None:
    assert float(contrast_ratio((255, 255, 255), (0, 0, 0))) == pytest.approx(21)
    assert float(contrast_ratio((119, 119, 119), (255, 255, 255))) == pytest.approx(4.48, abs=0.01)
    assert float(contrast_ratio((10, 20, 30), (10, 20, 30))) == 1


def test_lab_is_that_of_the_tables() -> None:
    np.testing.assert_allclose(srgb_to_lab(np.array([255.0, 0, 0])), [53.2, 80.1, 67.2], atol=0.2)
    np.testing.assert_allclose(srgb_to_lab(np.array([255.0] * 3)), [100, 0, 0], atol=0.1)


def test_titles_break_into_one_to_three_lines_in_order() -> None:
    found = line_breaks("The Ginger Breeze")
    assert found[0] == ("The Ginger Breeze",) and ("The", "Ginger", "Breeze") in found
    assert {" ".join(lines) for lines in found} == {"The Ginger Breeze"} and len(found) == 4
    assert max(map(len, line_breaks("a b c d e f g"))) == 3
    assert line_breaks("Countdown") == [("Countdown",)]
    eastern = line_breaks("星の船はどこへ行く")
    assert [len(lines) for lines in eastern] == [1, 2, 3]
    assert "".join(eastern[1]) == "星の船はどこへ行く"


def test_the_object_and_the_ground_are_told_apart() -> None:
    scene = look(poster(middle=0.4))
    rows, columns = scene.object_.shape
    assert scene.object_.sum() == pytest.approx(1, abs=1e-4)
    heights = (np.arange(rows) + 0.5) / rows
    assert float((scene.object_.sum(axis=1) * heights).sum()) == pytest.approx(0.4, abs=0.03)
    np.testing.assert_allclose(scene.ground, np.tile(BLUE, (rows, 1)), atol=2)
    assert np.abs(np.array(scene.accent) - ORANGE).max() < 12
    assert look(Image.new("RGB", (64, 96), BLUE)).object_.sum() == 0
    assert columns == 96


def test_connected_shapes_are_told_apart() -> None:
    grid = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], bool)
    labels = components(grid)
    assert ((labels > 0) == grid).all() and labels.max() == 3
    assert (
        labels[0, 0] == labels[1, 1] and labels[0, 3] == labels[1, 3] and len(set(labels[3])) == 2
    )
    assert components(np.ones((3, 3), bool)).min() == 1
    assert not components(np.zeros((3, 3), bool)).any()


def test_what_belongs_to_the_object_is_seen_as_it_and_lettering_is_not() -> None:
    image = poster(middle=0.4, size=(320, 480))
    draw = ImageDraw.Draw(image)
    draw.rectangle((110, 186, 210, 194), fill=BLUE)  # a stripe of the ground's colour across it
    for x in range(80, 240, 14):
        draw.rectangle((x, 400, x + 9, 418), fill=GREEN)
    scene = look(image)
    rows = len(scene.shape)
    heights = np.nonzero(scene.shape.any(axis=1))[0] / rows
    assert heights.min() == pytest.approx(0.2, abs=0.03)
    assert heights.max() == pytest.approx(0.6, abs=0.03)
    assert scene.marks[round(0.8 * rows) :].sum() > 0.9 * scene.marks.sum() > 0


def test_an_object_beside_the_title_is_not_dissolved() -> None:
    """What stands in the title's way is cleared, and not what the picture is about."""
    for middle in (0.35, 0.45, 0.55, 0.65):
        image = poster(middle=middle, size=(320, 480))
        draw = ImageDraw.Draw(image)
        for y in (0.1, 0.87):  # crumbs at both ends
            for x in range(70, 250, 22):
                draw.ellipse((x, y * 480, x + 8, y * 480 + 8), fill=GREEN)
        titled, layout = set_title(image, "Plum Countdown", SMALL)
        disc = np.abs(np.asarray(image).astype(int) - ORANGE).sum(axis=2) < 9
        kept = np.abs(np.asarray(titled).astype(int) - ORANGE).sum(axis=2) < 9
        assert layout.covered < 0.01 and (disc & ~kept).sum() < 0.02 * disc.sum()


@pytest.mark.parametrize("middle", [0.3, 0.5, 0.7])
def test_the_title_spares_the_object(middle: float) -> None:
    _, layout = set_title(poster(middle=middle), "Plum Countdown", SMALL)
    assert layout.covered < 0.02
    above = layout.box[3] / 480 < middle
    assert above == (middle > 0.5) or middle == 0.5


def measured_contrast(untitled: Image.Image, titled: Image.Image) -> float:
    """Between the letters' colour and what is around them in the titled image, found anew."""
    before, after = np.asarray(untitled).astype(int), np.asarray(titled).astype(int)
    changed = np.abs(before - after).sum(axis=2) > 0
    colours, counts = np.unique(after[changed], axis=0, return_counts=True)
    letters = colours[counts.argmax()]
    ys, xs = np.nonzero((after == letters).all(axis=2) & changed)
    box = after[ys.min() : ys.max(), xs.min() : xs.max()]
    ground = box[np.abs(box - letters).sum(axis=2) > 90]
    # Smoothed edges of letters lie between both; the ground is what most of the rest is.
    return float(np.quantile(contrast_ratio(ground, tuple(letters)), 0.2))


def test_letters_can_be_read_on_any_plain_ground_without_touching_it() -> None:
    for ground in ((40, 60, 150), (128, 128, 128), (250, 240, 220), (20, 20, 25), (235, 60, 50)):
        titled, layout = set_title(poster(ground=ground), "Comet", SMALL)
        assert layout.contrast >= 4.5 and not layout.scrim
        untitled = poster(ground=ground).resize(titled.size, Image.Resampling.BICUBIC)
        assert measured_contrast(untitled, titled) >= 4.4
        outside = np.asarray(titled).copy()
        left, top, right, bottom = layout.box
        outside[top:bottom, left:right] = np.asarray(untitled)[top:bottom, left:right]
        assert (outside == np.asarray(untitled)).all()


def noise(seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((320, 480), Image.Resampling.BICUBIC)


def test_a_restless_ground_gets_a_scrim_that_carries_the_letters() -> None:
    for seed in range(3):
        titled, layout = set_title(noise(seed), "Comet", SMALL)
        assert layout.scrim and layout.contrast >= 4.5
        _, top, _, bottom = layout.box
        # Right beside the letters, but for the pixel over which their edges are smoothed.
        shown = np.asarray(titled.crop(layout.box))
        letters = (np.abs(shown.astype(int) - layout.colour).sum(axis=2) < 9) * 255
        mask = Image.fromarray(letters.astype(np.uint8))
        wide, near = (np.asarray(mask.filter(ImageFilter.MaxFilter(size))) for size in (9, 5))
        ground = shown[(wide > 0) & (near == 0)]
        assert np.quantile(contrast_ratio(ground, layout.colour), 0.02) >= 4.5
        far = np.asarray(titled)[: top - 120] if top > 240 else np.asarray(titled)[bottom + 120 :]
        own = np.asarray(noise(seed))
        own = own[: top - 120] if top > 240 else own[bottom + 120 :]
        assert (far == own).all()  # only where it is needed


def test_the_contrast_that_is_asked_for_is_kept() -> None:
    strict = SMALL.model_copy(update={"contrast": 9.0})
    _, layout = set_title(poster(ground=(128, 128, 128)), "Comet", strict)
    assert layout.contrast >= 9.0 and layout.scrim


def test_marks_of_the_model_give_way_to_the_title() -> None:
    drawn = poster(middle=0.42, size=(320, 480))
    draw = ImageDraw.Draw(drawn)
    for y in (392, 412):
        for x in range(70, 250, 14):
            draw.rectangle((x, y, x + 9, y + 11), fill=GREEN)
    titled, layout = set_title(drawn, "Plum Countdown", SMALL)
    assert layout.box[1] < 412 and layout.box[3] > 392 and layout.scrim
    shown = np.asarray(titled).astype(int)
    assert (np.abs(shown - layout.colour).sum(axis=2) < 9).any()
    assert not (np.abs(shown - GREEN).sum(axis=2) < 60).any()  # nor beside the title


def test_ink_stands_in_the_middle_and_inside_the_margins() -> None:
    for style in STYLES:
        settings = SMALL.model_copy(update={"style": style})
        titled, layout = set_title(poster(), "“Up, Jay.”", settings)
        left, _, right, _ = layout.box
        assert left >= 0.06 * titled.width and right <= 0.94 * titled.width
    # Quotation marks hang: without them the letters stand where they stood.
    _, bare = set_title(poster(), "Havana", SMALL)
    _, quoted = set_title(poster(), "Havana.", SMALL)
    assert bare.box[0] + bare.box[2] == pytest.approx(320, abs=2)
    if bare.size == quoted.size:
        assert abs(quoted.box[0] - bare.box[0]) <= 1 and quoted.box[2] > bare.box[2]


def test_the_size_follows_the_width() -> None:
    _, short = set_title(poster(), "Moon", SMALL)
    _, long_ = set_title(poster(), "Nightingales Everywhere Tonight", SMALL)
    assert short.cap_height > 1.2 * long_.cap_height and len(long_.lines) >= 2
    assert len(set_title(poster(), "The Long Way Home To Nowhere", SMALL)[1].lines) <= 3


def test_small_images_are_enlarged_by_whole_factors() -> None:
    titled, _ = set_title(poster(size=(64, 96)), "Comet", LetteringSettings(min_width=300))
    assert titled.size == (320, 480)
    titled, _ = set_title(poster(size=(512, 512)), "Comet", LetteringSettings(min_width=300))
    assert titled.size == (512, 512)


SCRIPTS = ["Звёздный путь", "Ωμέγα", "星の船", "별빛", "星际之船", "سفينة", "ספינה", "जहाज", "নৌকা",
           "கப்பல்", "ఓడ", "เรือ", "ເຮືອ", "នាវា", "သင်္ဘော", "Đường Băng", "Åsgård"]  # fmt: skip


@pytest.mark.parametrize("title", SCRIPTS)
def test_no_script_turns_into_boxes(title: str) -> None:
    if needs_shaping(title) and layout_engine() != "raqm":
        pytest.skip("FriBiDi is not installed")
    letters = lettering(title, "geometric")
    signs = {sign for sign in (title.upper() if letters.capitals else title) if sign != " "}
    assert signs <= coverage(letters.package, letters.path)
    titled, layout = set_title(poster(), title, SMALL)
    box = np.asarray(titled.crop(layout.box)).astype(int)
    inked = (np.abs(box - layout.colour).sum(axis=2) < 90).mean()
    assert 0.1 < inked < 0.9


def test_letters_that_join_are_joined() -> None:
    if layout_engine() != "raqm":
        pytest.skip("FriBiDi is not installed")
    letters = lettering("سفينة", "geometric")
    assert letters.shaped and "arabic" in letters.path
    font = font_at(letters.package, letters.path, 100)
    apart = sum(font.getlength(sign) for sign in "سفينة")
    assert font.getlength("سفينة") < 0.9 * apart
    assert pieces(letters, "سفينة") == ["سفينة"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("marked", "plain"), [("Ọ̀ra", "Ọra"), ("q̃ua", "qua"), ("X̌en", "Xen")])
def test_a_mark_stands_above_its_letter_and_takes_no_room(
    marked: str, plain: str, style: str
) -> None:
    if layout_engine() != "raqm":
        pytest.skip("FriBiDi is not installed")
    letters = lettering(marked, style)
    with_mark, without = (
        measure(letters, [capitals(title) if letters.capitals else title], 200)
        for title in (marked, plain)
    )
    assert with_mark.widths[0] == pytest.approx(without.widths[0], abs=0.02 * 200)
    assert with_mark.above > without.above
    assert set_title(poster(), marked, SMALL)[1].lines == (capitals(marked),)


def test_chinese_and_japanese_break_between_letters_and_never_before_a_mark() -> None:
    broken = line_breaks("ギグガ\u3099ゲゴ")
    assert [len(lines) for lines in broken] == [1, 2, 3]
    assert not any(line.startswith("\u3099") for lines in broken for line in lines)


@pytest.mark.parametrize(
    ("title", "two"),
    [
        ("ゴジラVSコング", ("ゴジラ", "VSコング")),
        ("2001年宇宙の旅", ("2001年", "宇宙の旅")),
        ("「もののけ姫」の物語", ("「もののけ姫」", "の物語")),
        ("スター・ウォーズ", ("スター・", "ウォーズ")),
        ("AC/DCの旅のはじまり", ("AC/DCの", "旅のはじまり")),
        ("臥虎藏龍2：青冥寶劍", ("臥虎藏龍2：", "青冥寶劍")),
        ("《红高粱》的故事", ("《红高粱》", "的故事")),
        ("ロッキー!?最終章(完全版)", ("ロッキー!?", "最終章(完全版)")),
    ],
)
def test_words_numbers_and_brackets_stay_together_in_chinese_and_japanese(
    title: str, two: tuple[str, str]
) -> None:
    broken = line_breaks(title)
    assert broken[1] == two
    for lines in broken:
        assert "".join(lines) == title
        for before, after in pairwise(lines):
            assert before[-1] not in "「『（(《〈【“"
            assert after[0] not in "」』）)》〉】”!?：、。・ー"
            # No word or number of other letters is parted.
            assert not (before[-1].isascii() and after[0].isascii())


@pytest.mark.parametrize(
    ("title", "lines"),
    [
        ("ต้มยำ\u200bกุ้ง", ("ต้มยำ", "กุ้ง")),
        ("នាវា\u200bថ្មី", ("នាវា", "ថ្មី")),
        ("Count\u200bdown", ("Count", "down")),
        ("千と千尋の\u200b神隠し", ("千と千尋の", "神隠し")),
    ],
)
def test_a_zero_width_space_says_where_a_line_may_break_and_is_never_drawn_nor_read(
    title: str, lines: tuple[str, ...]
) -> None:
    whole = title.replace("\u200b", "")
    assert line_breaks(title) == [(whole,), lines]
    assert line_breaks(f"\u200b{whole}\u200b") == line_breaks(whole)
    assert plain(title) == plain(whole)
    if not needs_shaping(title) or layout_engine() == "raqm":
        small = SMALL.model_copy(update={"style": "auto"})
        _, layout = set_title(poster(), title, small)
        assert not any("\u200b" in line for line in layout.lines)
        assert layout.style == set_title(poster(), whole, small)[1].style


def test_a_space_and_a_zero_width_space_keep_what_they_are_on_a_line() -> None:
    assert line_breaks("The Big\u200bBang") == [
        ("The BigBang",), ("The", "BigBang"), ("The Big", "Bang"), ("The", "Big", "Bang"),
    ]  # fmt: skip


def test_what_no_font_has_is_refused_with_the_letters() -> None:
    with pytest.raises(TitleImpossible, match=r"no installed font has '𓀀'.*reword"):
        set_title(poster(), "Bird 𓀀", SMALL)
    with pytest.raises(TitleImpossible, match="has no letters"):
        set_title(poster(), " … ", SMALL)
    with pytest.raises(TitleImpossible, match="too long"):
        set_title(poster(), "Donaudampfschifffahrtsgesellschaftskapitän" * 2, SMALL)


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Αλέξανδρος", "ΑΛΕΞΑΝΔΡΟΣ"),
        ("ΑΛΈΞΑΝΔΡΟΣ", "ΑΛΕΞΑΝΔΡΟΣ"),
        ("Αυτό που μένει", "ΑΥΤΟ ΠΟΥ ΜΕΝΕΙ"),
        ("Ευφυΐα", "ΕΥΦΥΪΑ"),  # the dialytika stays
        ("Μάιος, άυλος, Ρωμέικα", "ΜΑΪΟΣ, ΑΫΛΟΣ, ΡΩΜΕΪΚΑ"),  # and comes where the accent parted two
        ("Η ζωή ή ο θάνατος", "Η ΖΩΗ Ή Ο ΘΑΝΑΤΟΣ"),  # η is "the", and ή is "or"
        ("Ἑλλάς, ᾠδή", "ΕΛΛΑΣ, ΩΙΔΗ"),
        ("Amélie, été", "AMÉLIE, ÉTÉ"),  # of Greek letters only
    ],
)
def test_greek_capitals_carry_no_accents(title: str, expected: str) -> None:
    assert capitals(title) == expected
    assert capitals(unicodedata.normalize("NFD", title)) == expected
    if title[0] != "A":
        assert " ".join(set_title(poster(), title, SMALL)[1].lines) == expected


@pytest.mark.parametrize(
    ("title", "lines", "left_out"),
    [
        ("Up 🎈", "UP", "🎈"),
        ("🎬 Movie", "MOVIE", "🎬"),
        ("The 👨\u200d👩\u200d👧 Three", "THE THREE", "👨\u200d👩\u200d👧"),
        ("🏃\u200d♀\ufe0f Run", "RUN", "🏃\u200d♀"),  # no sign of it stays behind
        ("Ok 👍🏽 Go 🇫🇷", "OK GO", "👍🏽🇫🇷"),
        ("1\ufe0f\u20e3 Team", "1 TEAM", ""),
        ("I ♥\ufe0f Movies 🎈", "I ♥ MOVIES", "🎈"),  # one font has the heart
        ("Pop™", "POP™", ""),
    ],
)
def test_pictographs_that_no_font_has_are_left_out_of_the_title(
    title: str, lines: str, left_out: str
) -> None:
    layout = set_title(poster(), title, SMALL)[1]
    assert (" ".join(layout.lines), layout.left_out) == (lines, left_out)


def test_a_title_of_pictographs_only_is_refused() -> None:
    with pytest.raises(TitleImpossible, match="has no letters"):
        set_title(poster(), "🎈 🎬", SMALL)
    with pytest.raises(TitleImpossible, match=r"no installed font has '𓀀'"):
        set_title(poster(), "Bird 𓀀 🎈", SMALL)


def test_scripts_that_need_shaping_are_refused_where_nothing_shapes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fonts, "layout_engine", lambda: "basic")
    with pytest.raises(TitleImpossible, match="FriBiDi"):
        lettering("سفينة", "geometric")
    with pytest.raises(TitleImpossible, match="FriBiDi"):
        lettering("q̃uy", "geometric")
    assert not lettering("星の船", "geometric").shaped
    assert lettering("Ångström", "geometric").package == STYLES["geometric"].package


def test_a_title_always_has_the_same_style() -> None:
    titles = [f"Title {number}" for number in range(60)]
    assert {choose_style(title, "auto") for title in titles} == set(STYLES)
    assert choose_style("Comet", "auto") == "serif"
    assert choose_style("Comet", "geometric") == "geometric"


TITLES = {
    "rounded": "Plum Countdown",
    "geometric": "The Velvet Regatta",
    "grotesque": "Mellow Fathom",
    "bold": "Saffron Deep",
    "serif": "Thistle Keep",
    "handmade": "Lantern Turret",
}
QUICK = ("serif", "handmade")


@pytest.mark.parametrize(
    "style",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in STYLES],
)
def test_a_title_is_read_as_it_is_set(style: str) -> None:
    title, middle = TITLES[style], 0.3 + 0.08 * list(STYLES).index(style)
    titled, _ = set_title(poster(middle=middle), title, LetteringSettings(style=style))
    (lines,) = TitleReader()([titled])
    assert title_distance([line.text for line in lines], title) == 0, lines


@pytest.mark.slow
def test_titles_on_fifty_starter_posters_are_read_exactly() -> None:
    reader = TitleReader()
    read = {"untitled": 0, "titled": 0}
    for scene in scenes(RAW):
        assert scene.title
        # As large as the starter model draws.
        untitled = render(replace(scene, title=None), 64, 96, supersample=4)
        titled, layout = set_title(untitled, scene.title, LetteringSettings())
        assert layout.contrast >= 4.5 and layout.covered < 0.02
        for name, image in {"untitled": untitled, "titled": titled}.items():
            (lines,) = reader([image])
            read[name] += title_distance([line.text for line in lines], scene.title) == 0
    assert read["untitled"] == 0 and read["titled"] >= 0.95 * len(RAW)


# --- the table


def lettered(store: Store, table: pd.DataFrame) -> pd.DataFrame:
    return set_titles(store, table, SMALL, NoProgress())


def test_every_generation_with_a_title_has_a_row(store: Store) -> None:
    images = [poster(), poster(middle=0.3), poster(), poster(), None]
    titles = ["Comet", "Bird 𓀀", "", "Moon", "Star"]
    statuses = ["ok", "ok", "ok", "blocked", "failed"]
    table = generations(store, images, titles=titles, statuses=statuses)
    titled = lettered(store, table)
    assert list(titled.columns) == list(TITLED_COLUMNS)
    assert titled.title.tolist() == ["Comet", "Bird 𓀀", "Moon", "Star"]
    assert titled.status.tolist() == ["ok", "failed", "blocked", "failed"]
    assert "no installed font" in titled.reason[1] and titled.reason[2] == "it is blocked"
    row = titled.iloc[0]
    with Image.open(store.root / row.image_path) as image:
        assert image.size == (row.width, row.height) == (320, 480)
        assert image.info["parameters"].endswith('Title: "Comet", Lettering: geometric')
    assert json.loads(row.lines) == ["COMET"] and row.contrast >= 4.5
    assert row.untitled_image == table.image[0]


def test_the_row_says_what_was_left_out_of_its_title(store: Store) -> None:
    table = generations(store, [poster(), poster(middle=0.3)], titles=["Up 🎈", "Moon"])
    for table_set in (lettered(store, table), lettered(store, table)):  # from the store as well
        assert table_set.status.tolist() == ["ok", "ok"]
        assert table_set.reason.tolist() == ["set without 🎈, which no installed font has", ""]
        assert json.loads(table_set.lines[0]) == ["UP"] and table_set.title[0] == "Up 🎈"
    finding = unset_titles(table_set)
    assert finding.passed and "2 of 2 titles are set, 1 of them without" in finding.summary


def test_only_what_is_new_is_set(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    table = generations(store, [poster(), poster(middle=0.3)], titles=["Comet", "Moon"])
    first = lettered(store, table)
    asked: list[str] = []
    original = titled.set_title

    def spy(image: Image.Image, title: str, settings: LetteringSettings) -> object:
        asked.append(title)
        return original(image, title, settings)

    monkeypatch.setattr(titled, "set_title", spy)
    pd.testing.assert_frame_equal(lettered(store, table), first)
    assert asked == []
    renamed = lettered(store, table.assign(title=["Comet", "Star"]))
    assert asked == ["Star"] and renamed.image[0] == first.image[0]


def test_keys_hold_what_decides_pixels() -> None:
    key = titled_key("hash", "Comet", SMALL)
    assert key == titled_key("hash", "Comet", SMALL)
    bold = SMALL.model_copy(update={"style": "bold"})
    assert len({key, titled_key("hash", "Moon", SMALL), titled_key("hash", "Comet", bold)}) == 3
    fewer = SMALL.model_copy(update={"seeds": 1})
    assert titled_key("hash", "Comet", fewer) == key, "no title is set anew"


def test_of_titles_that_were_set_only_those_with_greek_accents_are_set_anew() -> None:
    serif = SMALL.model_copy(update={"style": "serif"})  # in small letters, as it is written
    for title, settings, anew in (
        ("Αλέξανδρος", SMALL, True), ("Αλέξανδρος", serif, False), ("ΖΟΡΜΠΑΣ", SMALL, False),
        ("Amélie", SMALL, False), ("기생충", SMALL, False), ("Up 🎈", SMALL, False),
    ):  # fmt: skip
        before = content_key("titled", "hash", title, lettering_id(settings))
        assert (titled_key("hash", title, settings) != before) == anew, title
    assert "font_manrope=" in fonts_id() and "justmytype_intl_cjk=" in fonts_id()
