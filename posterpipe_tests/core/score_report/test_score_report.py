"""The score report: whole pages, nothing from outside, nothing hostile, replaced at once."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import unquote

import duckdb
import pytest

from posterpipe.core.champion.gate import RULE, copy_verdict
from posterpipe.core.score_report import Written, results_page, write_report
from posterpipe.core.score_report.copying_page import copying_context
from posterpipe.core.score_report.data import LATER, Published, read_published
from posterpipe.core.score_report.gallery_pages import IMAGES_A_PAGE, slug_of
from posterpipe.core.score_report.gate_page import gate_context
from posterpipe.core.score_report.headline import board_of, control_context
from posterpipe.core.score_report.pages import PAGES
from posterpipe.core.score_report.results_page import first_words
from posterpipe.core.warehouse.database import Warehouse, WarehouseMissing
from posterpipe.core.warehouse.publication import publish_scores
from posterpipe_tests import study
from posterpipe_tests.report_world import (
    GONE,
    HOSTILE,
    HOSTILE_ID,
    LONG,
    copy_of,
)

VOID = {"meta", "link", "img", "input", "br", "hr"}


class Parsed(HTMLParser):
    """A page: its tags with their attributes, its text, and tags that were not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def parsed(folder: Path) -> dict[str, Parsed]:
    return {file.name: Parsed(file.read_text("utf-8")) for file in sorted(folder.glob("*.html"))}


def assert_whole(folder: Path) -> dict[str, Parsed]:
    """Every page is well-formed, and every link, image and anchor leads somewhere inside."""
    pages = parsed(folder)
    assert set(pages) >= {page.file for page in PAGES}
    anchors = {
        name: {attributes["id"] for _, attributes in page.tags if "id" in attributes}
        for name, page in pages.items()
    }
    for name, page in pages.items():
        assert page.wrong == [] and page.open == [], name
        ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
        assert [one for one, count in ids.items() if count > 1] == [], name
        for tag, attributes in page.tags:
            for attribute in ("href", "src", "data-titled", "data-titled-full"):
                target = attributes.get(attribute)
                if target is None or target == "data:,":
                    continue
                place, _, anchor = target.partition("#")
                assert not re.match(r"[a-z]+:|//|/", place), (name, tag, target)
                file = (folder / unquote(place or name)).resolve()
                assert file.is_relative_to(folder.resolve()) and file.is_file(), (name, target)
                if anchor:
                    assert unquote(anchor) in anchors[file.name], (name, target)
            for attribute in ("aria-labelledby", "for"):
                for label in attributes.get(attribute, "").split():
                    assert label in anchors[name], (name, attribute, label)
    return pages


@pytest.fixture(scope="module")
def world(published_world: Path) -> Path:
    return published_world


@pytest.fixture(scope="module")
def written(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("site") / "report"
    return write_report(world / "public" / "scores.duckdb", world, folder)


@pytest.fixture(scope="module")
def pages(written: Written) -> dict[str, Parsed]:
    return assert_whole(written.index.parent)


def test_every_section_is_there_and_filled(pages: dict[str, Parsed]) -> None:
    index = pages["index.html"]
    assert "Cosine" not in index.words and "Mean" in index.words
    sections = {attributes.get("id") for attributes in index.all("section")}
    assert sections >= {"growth", "control", "leaderboard", "effects", "trend", "extremes"}
    for name, page in pages.items():
        assert "Materialize" not in page.text, name
    assert "Thesis" in index.text and "0.77" in index.text
    assert "promoted" in index.text and "held" in index.text
    assert "Smaller ones may be there unseen" in index.text
    assert "counts as a copy" in pages["copying.html"].text.lower() or (
        "count as copies" in pages["copying.html"].text
    )
    assert "THING 1" in pages["legibility.html"].text
    assert "by ada" in pages["gate.html"].text and "36 of 36 cells" in pages["gate.html"].text
    assert RULE in " ".join(pages["gate.html"].text.split())
    told = "share of 24 prompts; the difference of PickScore is +0.400 (+0.100 to +0.700)"
    assert pages["gate.html"].text.count(told) == 1, "of the decision that has it"
    data = pages["data.html"].text
    assert "resembles another" in data and "This publication" in data and "publishi" in data
    assert "What does 0.30 mean?" in pages["glossary.html"].text


Change = tuple[float, float, float, str]
NONE = math.nan


def changed(world: Path, **changes: Change) -> Published:
    """What was published, had fine-tuning changed metrics so: mean, low, high, finding."""
    published = read_published(world / "public" / "scores.duckdb")
    board = published.marts["leaderboard"].copy()
    effects = published.marts["paired_effects"].copy()
    ids = {"own": study.HEADLINE, "specific": study.SPECIFIC, "control": study.CONTROL}
    for name, metric_id in ids.items():
        *numbers, finding = changes.get(name, (*(math.nan,) * 3, ""))
        rows = (board["metric_id"] == metric_id) & (board["variant"] == "dreambooth")
        board.loc[rows, ["diff_to_sd", "diff_low_95", "diff_high_95"]] = numbers
        asked = effects["comparison"] == "tuned without negative"
        asked &= effects["metric_id"] == metric_id
        effects.loc[asked, ["mean_difference", "low_95", "high_95"]] = numbers
        effects.loc[asked, "finding"] = finding
    marts = {**published.marts, "leaderboard": board, "paired_effects": effects}
    return Published(marts, published.prompts)


def told(world: Path, **changes: Change) -> tuple[str, str]:
    """What the report says first in that case."""
    return first_words(changed(world, **changes))


UP, DOWN = (0.3, 0.2, 0.4, "higher"), (-0.3, -0.4, -0.2, "lower")
OPEN = (0.0, -0.1, 0.1, "not told apart")


def test_a_higher_score_follows_the_prompts_only_where_the_own_text_stands_out_more(
    world: Path,
) -> None:
    title, said = told(world, own=UP, specific=UP, control=OPEN)
    assert title == "Fine-tuning follows the prompts better"
    assert "stands out from them more: +0.300 (+0.200 to +0.400)" in said
    title, said = told(world, own=UP, specific=DOWN, control=UP)
    assert title == "Fine-tuning scores higher, but follows its own prompts less"
    assert "With the texts of the other prompts it changes by +0.300 (+0.200 to +0.400)" in said
    assert "stands out from them less: −0.300 (−0.400 to −0.200)" in said
    title, said = told(world, own=UP, specific=OPEN, control=UP)
    assert "open" in title and "not told apart from zero" in said and "follows" not in title
    title, said = told(world, own=UP)
    assert title == "Fine-tuning scores higher with CLIP" and "was not measured" in said


def test_a_lower_score_and_none_are_told_with_their_control(world: Path) -> None:
    assert told(world, own=DOWN, specific=DOWN, control=OPEN)[0] == (
        "Fine-tuning follows the prompts worse"
    )
    assert "apart better" in told(world, own=DOWN, specific=UP, control=DOWN)[0]
    assert "open" in told(world, own=DOWN, specific=OPEN, control=DOWN)[0]
    assert told(world, own=DOWN)[0] == "Fine-tuning scores lower with CLIP"
    assert "apart less" in told(world, own=OPEN, specific=DOWN, control=UP)[0]
    for changes in ({"specific": OPEN, "control": OPEN}, {}):
        title, said = told(world, own=OPEN, **changes)
        assert title == "No difference that this suite can show" and "holds zero" in said


@pytest.mark.parametrize("own", [UP, DOWN, OPEN])
def test_the_title_claims_nothing_that_the_paired_effects_do_not_find(
    world: Path, own: Change
) -> None:
    claims = ("better", "worse", "apart", "follows")
    # Alone, p = 0.03; among its comparisons nothing.
    for mean, low, high in ((0.02, 0.002, 0.038), (-0.02, -0.038, -0.002)):
        specific = (mean, low, high, "not told apart")
        published = changed(world, own=own, specific=specific, control=OPEN)
        title, said = first_words(published)
        assert not any(claim in title for claim in claims), title
        assert "not told apart from zero, all its comparisons counted" in said
        shown = control_context(published, board_of(published, "clip_t"))["control"]
        assert [row["css"] for row in shown if row["name"] == "Own less others"] == [""]
    found = told(world, own=own, specific=(0.02, 0.002, 0.038, "higher"), control=OPEN)[0]
    assert "better" in found
    # Nothing is claimed either where they have not been computed.
    published = changed(world, own=own, specific=UP, control=OPEN)
    marts = {name: mart for name, mart in published.marts.items() if name != "paired_effects"}
    title, said = first_words(Published(marts, published.prompts))
    assert not any(claim in title for claim in claims) and "was not computed" in said


def on_one_prompt(world: Path, metric_id: str, without: Change, **changes: Change) -> Published:
    """Likewise, had that metric rested on one prompt: `without` it, and the finding."""
    published = changed(world, **changes)
    effects = published.marts["paired_effects"].astype({"rests_on": object})
    row = effects["metric_id"] == metric_id
    row &= effects["comparison"] == "tuned without negative"
    *numbers, finding = without
    effects.loc[row, ["rests_on", "finding"]] = ["prompt-03", finding]
    effects.loc[row, ["mean_without", "low_95_without", "high_95_without"]] = numbers
    return Published({**published.marts, "paired_effects": effects}, published.prompts)


def test_what_rests_on_one_prompt_is_told_so_and_raises_no_score_alone(world: Path) -> None:
    nothing = (0.02, -0.1, 0.1, "not told apart")
    rests = "rests on one prompt, prompt-03; without it "
    published = on_one_prompt(world, study.HEADLINE, nothing, own=UP, specific=OPEN, control=OPEN)
    title, said = first_words(published)
    assert title == "No difference that this suite can show" and "raises" not in said
    assert f"(+0.200 to +0.400; {rests}+0.020 (−0.100 to +0.100))" in said
    # It is the same without that prompt.
    published = on_one_prompt(world, study.HEADLINE, UP, own=UP, specific=OPEN, control=OPEN)
    title, said = first_words(published)
    assert "scores higher" in title and "raises" in said and f"{rests}+0.300" in said
    # With it zero is in the interval.
    published = on_one_prompt(world, study.HEADLINE, nothing, own=OPEN)
    assert f"holds zero. It {rests}+0.020" in first_words(published)[1]
    # The control of the first question likewise, and in the tables.
    published = on_one_prompt(world, study.SPECIFIC, nothing, own=UP, specific=DOWN, control=UP)
    title, said = first_words(published)
    assert "open" in title and f"{rests}+0.020" in said
    own = [row for row in control_context(published, board_of(published, "clip_t"))["control"]]
    assert [row["name"] for row in own if row["rests"]] == ["Own less others"]


def test_the_tables_name_the_prompt_that_a_difference_rests_on(world: Path, tmp_path: Path) -> None:
    store = copy_of(world, tmp_path)
    with duckdb.connect(str(store / "public" / "scores.duckdb")) as connection:
        connection.execute(
            "UPDATE paired_effects SET rests_on = ?, mean_without = -0.5, low_95_without = NULL, "
            "high_95_without = NULL WHERE scale = 'ratio' AND comparison = 'both'",
            [HOSTILE_ID],
        )
    write_report(store / "public" / "scores.duckdb", store, tmp_path / "report")
    index = assert_whole(tmp_path / "report")["index.html"]
    told = f"rests on one prompt, {HOSTILE_ID}; without it × 0.50 (no spread between prompts)"
    assert index.text.count(told) == 1
    assert index.text.count("What rests on one prompt has three fifths") == 1


def test_a_database_of_before_has_its_report_without_what_came_later(
    world: Path, tmp_path: Path
) -> None:
    store = copy_of(world, tmp_path)
    with duckdb.connect(str(store / "public" / "scores.duckdb")) as connection:
        for mart, columns in LATER.items():
            for column in columns:
                connection.execute(f"ALTER TABLE {mart} DROP COLUMN {column}")
    write_report(store / "public" / "scores.duckdb", store, tmp_path / "report")
    pages = assert_whole(tmp_path / "report")
    assert "No checkpoint has been judged" not in pages["gate.html"].text
    assert "Detectable" in pages["gate.html"].text
    assert "Materialize" not in pages["legibility.html"].text
    text = pages["index.html"].text
    assert "by the gate and is served" in text
    assert "Materialize" not in text and "not told apart" in text
    assert "rests on one prompt" not in text


def test_the_leaderboard_has_the_colours_of_what_the_paired_effects_find(world: Path) -> None:
    low = (0.02, 0.002, 0.038, "not told apart")
    colours = []
    for own in (UP, low, DOWN):
        board = results_page._boards(changed(world, own=own))[0]
        (row,) = (row for row in board["rows"] if row["variant"] == "dreambooth")
        colours.append(row["css"])
    assert colours == ["gain", "", "loss"]


def test_single_images_and_prompts_have_no_colour_of_a_gain_or_a_loss(
    written: Written, pages: dict[str, Parsed]
) -> None:
    html = (written.index.parent / "gallery.html").read_text("utf-8")
    coloured = re.findall(r'class="[^"]*\b(?:gain|loss)\b[^"]*">([^<]*)', html)
    assert coloured and all(told.startswith("no score") for told in coloured)
    assert " to base" in pages["gallery.html"].text
    cards = (written.index.parent / "index.html").read_text("utf-8").split('id="extremes"')[1]
    assert re.search(r"<strong>[+−]0\.\d", cards) and "loss" not in cards.split("</section>")[0]


def test_under_an_image_stands_what_of_its_score_is_the_prompts_own(
    world: Path, pages: dict[str, Parsed]
) -> None:
    with duckdb.connect(str(world / "public" / "scores.duckdb"), read_only=True) as connection:
        rows = connection.execute(
            "SELECT clip_cosine, clip_specific FROM prompt_drilldown "
            "WHERE clip_cosine IS NOT NULL AND clip_specific IS NOT NULL"
        ).fetchall()
    text = pages["gallery.html"].text.replace("−", "-")
    assert len(rows) > 80
    for cosine, specific in rows:
        assert f"{cosine:.3f} {specific:+.3f} own less others" in text


def test_the_copying_page_tells_the_gap_less_that_of_the_base_model(
    world: Path, pages: dict[str, Parsed]
) -> None:
    with duckdb.connect(str(world / "public" / "scores.duckdb"), read_only=True) as connection:
        rows = connection.execute(
            "SELECT overfit_gap, gap_diff_to_sd, gap_diff_low_95, gap_diff_high_95 "
            "FROM overfit_and_copy WHERE gap_diff_to_sd IS NOT NULL"
        ).fetchall()
    text = pages["copying.html"].text.replace("−", "-")
    assert len(rows) >= 4 and "its gap is the zero" in text and "with these posters" in text
    for gap, difference, low, high in rows:
        assert f"{gap:.3f} {difference:+.3f} {low:+.3f} to {high:+.3f}" in text
    everything = " ".join(page.text for page in pages.values())
    assert "0 is ideal" not in everything


def test_the_negative_control_stays_where_a_row_of_it_has_no_interval(
    world: Path, tmp_path: Path
) -> None:
    """A good model ranks every image's own text first, before training and after."""
    store = copy_of(world, tmp_path)
    with duckdb.connect(str(store / "public" / "scores.duckdb")) as connection:
        connection.execute(
            "UPDATE leaderboard SET mean = 1, low_95 = NULL, high_95 = NULL, diff_to_sd = 0, "
            "diff_low_95 = NULL, diff_high_95 = NULL WHERE metric_id = ?",
            [study.RANK],
        )
    write_report(store / "public" / "scores.duckdb", store, tmp_path / "report")
    text = assert_whole(tmp_path / "report")["index.html"].text
    assert "have not been held against" not in text and "Own less others" in text
    assert "(chance: 0.5) 1 1 0.000 no spread between prompts" in text
    assert "with the other prompts of the suite by" in text
    # Measured is one thing, not measured another: then the row is not there.
    alone = changed(world, own=UP, specific=UP, control=OPEN)
    board = alone.marts["leaderboard"]
    marts = {**alone.marts, "leaderboard": board[board["metric_id"] != study.RANK]}
    alone = Published(marts, alone.prompts)
    rows = control_context(alone, board_of(alone, "clip_t"))["control"]
    assert [row["name"] for row in rows][-1] == "Own less others"


def test_prompts_that_all_change_by_the_same_are_not_too_few(world: Path) -> None:
    title, said = told(world, own=(0.0, NONE, NONE, "all alike"), specific=OPEN, control=OPEN)
    assert title == "No difference that this suite can show" and "On none of 10 prompts" in said
    title, said = told(world, own=(0.1, NONE, NONE, "higher"), specific=OPEN, control=UP)
    assert title == "Fine-tuning scores higher; whether for the prompts is open"
    assert "On each of 10 prompts" in said and "there is no interval" in said
    alike = (0.1, NONE, NONE, "higher")
    title, said = told(world, own=UP, specific=alike, control=OPEN)
    assert title == "Fine-tuning follows the prompts better"
    assert "more: +0.100 (no spread between prompts)" in said
    one = changed(world, own=(0.1, NONE, NONE, "too few prompts"))
    one.marts["leaderboard"].loc[:, "diff_prompts"] = 1
    title, said = first_words(one)
    assert title == "Too few prompts to tell" and "compared on 1 prompt." in said


def test_a_share_is_under_no_head_of_cosines_and_on_no_axis_beyond_1(world: Path) -> None:
    published = read_published(world / "public" / "scores.duckdb")
    board, trend = (published.marts[name].copy() for name in ("leaderboard", "checkpoint_trend"))
    for mart in (board, trend):
        mart.loc[mart["metric_id"] == study.RANK, ["mean", "low_95", "high_95"]] = 1.0
    marts = {**published.marts, "leaderboard": board, "checkpoint_trend": trend}
    alike = Published(marts, published.prompts)
    (rank,) = (one for one in results_page._boards(alike) if one["metric_id"] == study.RANK)
    (shares,) = (one for one in results_page._trends(alike) if one["name"] == "CLIP-T rank")
    for chart in (rank["axis"], shares["chart"]):
        assert ">1.00<" in chart and "1.10" not in chart and "1.05" not in chart


def test_a_difference_is_told_with_its_own_number_of_prompts(world: Path) -> None:
    published = changed(world, own=UP)
    published.marts["leaderboard"].loc[:, "diff_prompts"] = 7
    assert "a 95 % interval over 7 prompts" in first_words(published)[1]
    tuned = next(
        r for r in results_page._boards(published)[0]["rows"] if r["variant"] == "dreambooth"
    )
    assert tuned["prompts"].endswith(" (7 to base)")


def test_without_a_pair_of_scores_nothing_is_said_of_fine_tuning(world: Path) -> None:
    assert told(world)[0] == "Scores without a comparison"


def test_a_base_model_whose_images_are_all_blocked_breaks_no_page(
    world: Path, tmp_path: Path
) -> None:
    store = copy_of(world, tmp_path)
    with duckdb.connect(str(store / "public" / "scores.duckdb")) as connection:
        connection.execute(
            "UPDATE leaderboard SET mean = NULL, low_95 = NULL, high_95 = NULL, clip_score = NULL, "
            "clip_score_low_95 = NULL, clip_score_high_95 = NULL WHERE variant = 'sd'; "
            "UPDATE leaderboard SET diff_to_sd = NULL, diff_low_95 = NULL, diff_high_95 = NULL; "
            "DELETE FROM paired_effects; "
            "UPDATE checkpoint_trend SET mean = NULL, low_95 = NULL, high_95 = NULL "
            "WHERE variant = 'sd'; "
            "UPDATE prompt_drilldown SET clip_cosine = NULL, status = 'blocked' "
            "WHERE variant = 'sd'; "
            "UPDATE prompt_drilldown SET clip_diff_to_sd = NULL"
        )
    write_report(store / "public" / "scores.duckdb", store, tmp_path / "report")
    pages = assert_whole(tmp_path / "report")
    text = pages["index.html"].text
    assert "Scores without a comparison" in text
    assert "Blocked: 28 of 28 images of the base" in text
    assert "have not been held against" not in text and "Own less others" in text
    assert not re.search(r"\bnan\b", " ".join(page.text for page in pages.values()))


def test_the_control_of_another_model_or_preprocessing_is_not_that_of_the_headline(
    world: Path,
) -> None:
    published = read_published(world / "public" / "scores.duckdb")
    metrics = published.marts["dim_metric"].copy()
    apart = metrics["metric_id"].isin([study.SPECIFIC, study.CONTROL])
    metrics.loc[apart, "preprocessing"] = "pad"
    other = replace(published, marts={**published.marts, "dim_metric": metrics})
    assert "With the texts of the other prompts" in first_words(published)[1]
    assert "With the texts of the other prompts" not in first_words(other)[1]


def test_the_negative_control_stands_beside_the_effects(
    world: Path, pages: dict[str, Parsed]
) -> None:
    with duckdb.connect(str(world / "public" / "scores.duckdb"), read_only=True) as connection:
        rows = connection.execute(
            "SELECT diff_to_sd, diff_low_95, diff_high_95 FROM leaderboard "
            "WHERE variant = 'dreambooth' AND metric_id IN (?, ?, ?, ?)",
            [study.HEADLINE, study.SPECIFIC, study.CONTROL, study.RANK],
        ).fetchall()
        better = connection.execute(
            "SELECT DISTINCT better FROM leaderboard WHERE metric_id = ?", [study.CONTROL]
        ).fetchall()
    text = pages["index.html"].text.replace("−", "-")
    section = text[text.index("Is it the prompt? The texts") : text.index("Leaderboard How near")]
    assert len(rows) == 4 and better == [("neither",)]
    for mean, low, high in rows:
        assert f"{mean:+.3f} {low:+.3f} to {high:+.3f}" in section
    assert "with the other prompts of the suite by" in text


def test_numbers_are_those_of_the_marts(world: Path, pages: dict[str, Parsed]) -> None:
    with duckdb.connect(str(world / "public" / "scores.duckdb"), read_only=True) as connection:
        rows = connection.execute(
            "SELECT mean, low_95, high_95, prompts FROM leaderboard WHERE is_headline"
        ).fetchall()
        effects = connection.execute(
            "SELECT mean_difference FROM paired_effects WHERE is_headline"
        ).fetchall()
    text = pages["index.html"].text
    assert len(rows) == 4 and len(effects) == 8
    for mean, low, high, prompts in rows:
        assert f"{mean:.3f}" in text and f"{low:.3f} to {high:.3f}" in text
        assert str(prompts) in text
    for (difference,) in effects:
        assert f"{difference:+.3f}".replace("-", "−") in text


def test_what_is_compared_by_ratio_is_told_as_one(world: Path, pages: dict[str, Parsed]) -> None:
    with duckdb.connect(str(world / "public" / "scores.duckdb"), read_only=True) as connection:
        rows = connection.execute(
            "SELECT mean_difference, low_95, high_95 FROM paired_effects WHERE scale = 'ratio'"
        ).fetchall()
    text = pages["index.html"].text
    assert len(rows) == 8 and text.count("Told as ratios of geometric means over prompts") == 1
    for mean, low, high in rows:
        assert f"× {1 + mean:.2f} × {1 + low:.2f} to {1 + high:.2f}" in text
    assert "finds ratios from × " in text and "Geometric means over prompts." in text


def test_the_copying_page_tells_which_share_of_copies_would_be_found(
    pages: dict[str, Parsed],
) -> None:
    text = pages["copying.html"].text
    assert "Copy from Would find Copies" in text and "0.850 72 %" in text


def test_a_copy_stands_beside_the_poster_that_it_is_a_copy_of(
    world: Path, pages: dict[str, Parsed]
) -> None:
    with duckdb.connect(str(world / "public" / "scores.duckdb"), read_only=True) as connection:
        copies = connection.execute(
            "SELECT nearest_similarity >= copy_threshold, nearest_poster_path, hash_poster_path, "
            "hash_distance FROM prompt_drilldown WHERE copied"
        ).fetchall()
    published = read_published(world / "public" / "scores.duckdb")
    shown = [
        one.nearest.poster.path
        for _, one in published.shots
        if one.nearest and one.nearest.copied and one.nearest.poster
    ]
    assert Counter(shown) == Counter(
        near if by_cosine else far for by_cosine, near, far, _ in copies
    )
    by_hash = [bits for by_cosine, _, _, bits in copies if not by_cosine]
    assert 0 < len(by_hash) < len(copies)
    for name, said in (("copying.html", "perceptual hash"), ("gallery.html", "Counts as a copy")):
        text = "".join(page.text for file, page in pages.items() if file.startswith(name[:7]))
        assert said in text
        assert text.count("poster 1.png: cosine 0.") == len(copies) - len(by_hash)
        for bits in by_hash:
            assert f"poster 2.png: {bits} of 64 hash bits differ" in text


def test_copies_are_counted_among_images_of_the_tuned_model_and_only_where_they_would_be_found(
    world: Path, pages: dict[str, Parsed], tmp_path: Path
) -> None:
    store = copy_of(world, tmp_path)
    with duckdb.connect(str(store / "public" / "scores.duckdb")) as connection:
        counts = connection.execute(
            "SELECT count(*) FILTER (WHERE copied), count(nearest_similarity) "
            "FROM prompt_drilldown GROUP BY variant LIKE 'sd%' ORDER BY variant LIKE 'sd%'"
        ).fetchall()
    (copies, tuned), (by_chance, base) = counts
    text = pages["copying.html"].text
    assert copies > 1 and by_chance > 1
    assert f"{copies} of {tuned} images of the fine-tuned model count as copies" in text
    assert f"none of these posters, {by_chance} of {base} images would count" in text

    def headline(sensitivity: float) -> str:
        with duckdb.connect(str(store / "public" / "scores.duckdb")) as connection:
            connection.execute(
                "UPDATE prompt_drilldown SET copied = false WHERE copied AND variant NOT LIKE 'sd%'"
            )
            connection.execute("UPDATE overfit_and_copy SET copy_sensitivity = ?", [sensitivity])
        published = read_published(store / "public" / "scores.duckdb")
        return str(copying_context(published, {})["headline"])

    assert headline(0.72) == "No image of the fine-tuned model counts as a copy"
    assert headline(0.2) == "No copy was found, but only 20 % of them would be"


@pytest.mark.parametrize(
    ("numbers", "title", "told"),
    [
        ({"lost": 2}, "No copy was found, but 2 posters trained on cannot be read",
         "2 posters trained on cannot be read any more: copies of such go unseen"),
        ({"unsure": 15}, "No copy was found, but of 15 images that is not sure",
         "15 more may be copies by their perceptual hash"),
        ({}, "No image of the fine-tuned model counts as a copy", ""),
    ],
)  # fmt: skip
def test_the_page_of_copies_passes_nothing_that_the_gate_holds(
    world: Path, tmp_path: Path, numbers: dict[str, int], title: str, told: str
) -> None:
    gate = copy_verdict(
        0, 192, 0.05, has_threshold=True, sensitivity=0.72, lost=numbers.get("lost", 0),
        unsure=numbers.get("unsure", 0),
    )  # fmt: skip
    store = copy_of(world, tmp_path)
    with duckdb.connect(str(store / "public" / "scores.duckdb")) as connection:
        connection.execute(
            "UPDATE prompt_drilldown SET copied = false WHERE copied AND variant NOT LIKE 'sd%'"
        )
        connection.execute(
            "UPDATE gate_decisions SET lost_posters = ?, unsure_images = ? WHERE checkpoint_id = ?",
            [numbers.get("lost", 0), numbers.get("unsure"), study.NEW],
        )
        connection.execute(
            "UPDATE gate_checks SET check_name = 'copies', outcome = ?, reason = ? "
            "WHERE check_name = 'complete' AND checkpoint_id = ?",
            [gate.outcome, gate.sentence, study.NEW],
        )
    context = copying_context(read_published(store / "public" / "scores.duckdb"), {})
    assert context["headline"] == title and told in context["copies_told"]
    # The gate's own word stands beside.
    assert context["gate"]["outcome"] == gate.outcome == ("open" if numbers else "pass")
    write_report(store / "public" / "scores.duckdb", store, tmp_path / "report")
    page = assert_whole(tmp_path / "report")["copying.html"]
    assert f"The gate’s check of them: {gate.outcome} {gate.sentence}" in page.text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("", "Checkpoint tuned2 was promoted by the gate and is served."),
        ("UPDATE gate_decisions SET decision = 'hold', champion_after = 'tuned1' WHERE "
         "checkpoint_id = 'tuned2'",
         "Checkpoint tuned2 was held by the gate; tuned1 is served."),
        ("UPDATE gate_decisions SET decision = 'reject', champion_after = 'base1' WHERE "
         "checkpoint_id = 'tuned2'",
         "Checkpoint tuned2 was rejected by the gate; base1 is served."),
        ("DELETE FROM gate_decisions WHERE checkpoint_id = 'tuned2' OR by_person",
         "Checkpoint tuned2 has not been judged by the gate; base1 is served."),
        ("DELETE FROM gate_decisions",
         "Checkpoint tuned2 has not been judged by the gate; base1 is served."),
        ("UPDATE gate_decisions SET champion_after = 'tuned1' WHERE checkpoint_id = 'tuned2';"
         "UPDATE gate_decisions SET pins = true, checkpoint_id = 'tuned1' WHERE by_person",
         "Checkpoint tuned2 was promoted by the gate; tuned1 is served, pinned by ada."),
        # A pin ends where the gate rejects what is pinned, and comes back by no promotion.
        ("UPDATE gate_decisions SET champion_after = 'tuned2' WHERE checkpoint_id = 'tuned2';"
         "INSERT INTO gate_decisions BY NAME SELECT * REPLACE ('p1' AS decision_id, "
         "'tuned2' AS checkpoint_id, true AS pins) FROM gate_decisions WHERE by_person LIMIT 1;"
         "INSERT INTO gate_decisions BY NAME SELECT * REPLACE ('p2' AS decision_id, 'reject' AS "
         "decision, 'tuned1' AS champion_after) FROM gate_decisions WHERE checkpoint_id = 'tuned2' "
         "AND NOT by_person LIMIT 1;"
         "INSERT INTO gate_decisions BY NAME SELECT * REPLACE ('p3' AS decision_id, 'promote' AS "
         "decision, 'tuned2' AS champion_after) FROM gate_decisions WHERE decision_id = 'p2'",
         "Checkpoint tuned2 was promoted by the gate and is served."),
        ("DROP TABLE gate_decisions", "Checkpoint tuned2 "),
    ],
)  # fmt: skip
def test_the_first_page_says_what_the_gate_said_and_which_checkpoint_is_served(
    world: Path, tmp_path: Path, change: str, told: str
) -> None:
    store = copy_of(world, tmp_path)
    with duckdb.connect(str(store / "public" / "scores.duckdb")) as connection:
        connection.execute(change or "SELECT 1")
    write_report(store / "public" / "scores.duckdb", store, tmp_path / "report")
    index = assert_whole(tmp_path / "report")["index.html"]
    assert told in re.sub(r" (?=[.,;])", "", index.text)
    links = [one["href"] for one in index.all("a") if one.get("class", "").startswith("tag ")]
    assert bool(links) != ("DROP" in change)
    assert all(link.startswith("gate.html") for link in links)


def test_the_gate_page_tells_what_each_check_can_find_and_no_rate(
    pages: dict[str, Parsed], world: Path
) -> None:
    gate = pages["gate.html"]
    assert "-0.010 ± 0.042 may be lower" in gate.text.replace("−", "-")
    assert "of a thousand" not in gate.text
    # Of diversity a ratio, as its value and limit are; nothing of decisions of before it was told.
    published = read_published(world / "public" / "scores.duckdb")
    checks = published.marts["gate_checks"]
    ratio = checks.assign(check_name="diversity", detectable=0.61)
    shown = gate_context(Published({**published.marts, "gate_checks": ratio}, ()))
    assert shown["decisions"][0]["checks"][0]["detectable"] == "× 0.61"
    before = gate_context(
        Published({**published.marts, "gate_checks": checks.assign(detectable=None)}, ())
    )
    assert before["decisions"][0]["checks"][1]["detectable"] == "–"


def test_prompts_without_spread_are_told_in_words_and_not_as_an_interval(
    world: Path, pages: dict[str, Parsed], tmp_path: Path
) -> None:
    store = copy_of(world, tmp_path)
    before = pages["index.html"].text
    with duckdb.connect(str(store / "public" / "scores.duckdb")) as connection:
        connection.execute(
            "UPDATE paired_effects SET low_95 = NULL, high_95 = NULL, detectable_difference = NULL "
            "WHERE is_headline AND comparison <> 'both'"
        )
        connection.execute("UPDATE legibility SET distance_low_95 = NULL, distance_high_95 = NULL")
        ((found,),) = connection.execute(
            "SELECT detectable_difference FROM paired_effects "
            "WHERE is_headline AND comparison = 'both'"
        ).fetchall()
        titles = connection.execute("SELECT prompts FROM legibility").fetchall()
    write_report(store / "public" / "scores.duckdb", store, tmp_path / "report")
    after = assert_whole(tmp_path / "report")
    text = after["index.html"].text
    for words, more in (
        ("no spread between prompts", 7),
        ("differ by the same there is no interval", 1),
    ):
        assert text.count(words) == before.count(words) + more
    assert f"finds differences from {found:.3f} on" in text
    several = sum(prompts > 1 for (prompts,) in titles)
    assert after["legibility.html"].text.count("no spread between prompts") == several > 0


@pytest.mark.parametrize(
    ("titles", "of_it", "told"),
    [
        (1, "unknown_titles = 1", "1 title is in letters that the reader does not know"),
        (3, "unknown_titles = 3", "3 titles are in letters that the reader does not know"),
        (8, "unknown_titles = 8, prompts = 0, images = 0, readable = 0, exact = 0, "
         "exact_share = NULL, exact_low_95 = NULL, exact_high_95 = NULL, mean_distance = NULL, "
         "distance_low_95 = NULL, distance_high_95 = NULL",
         "No title is in letters that the reader knows"),
    ],
)  # fmt: skip
def test_titles_that_the_reader_cannot_judge_are_told_beside_those_that_it_read(
    world: Path, pages: dict[str, Parsed], tmp_path: Path, titles: int, of_it: str, told: str
) -> None:
    assert "reader does not know" not in pages["legibility.html"].text
    store = copy_of(world, tmp_path)
    with duckdb.connect(str(store / "public" / "scores.duckdb")) as connection:
        connection.execute(f"UPDATE legibility SET {of_it}")
    write_report(store / "public" / "scores.duckdb", store, tmp_path / "report")
    text = assert_whole(tmp_path / "report")["legibility.html"].text
    assert told in text and f"{titles} title" in text


def test_the_growth_chart_shows_the_mean_of_clamped_scores(world: Path, tmp_path: Path) -> None:
    store = copy_of(world, tmp_path)
    with duckdb.connect(str(store / "public" / "scores.duckdb")) as connection:
        connection.execute(
            "UPDATE leaderboard SET mean = -0.1, clip_score = 0.4321, clip_score_low_95 = 0.3456, "
            "clip_score_high_95 = 0.5678 WHERE is_headline AND variant = 'sd'"
        )
    write_report(store / "public" / "scores.duckdb", store, tmp_path / "report")
    text = parsed(tmp_path / "report")["index.html"].text
    assert "Base 0.43 0.35 to 0.57 0.35" in text


def test_the_report_says_which_question_was_named_beforehand_and_what_is_corrected(
    pages: dict[str, Parsed],
) -> None:
    text = pages["index.html"].text
    assert text.count("Tuned vs base, no negative prompt *") == 1
    assert "the correction counted" in text
    assert "those of the guards (overfit gap, nearness to training posters, diversity)" in text
    glossary = pages["glossary.html"].text
    assert "decides by its own interval, uncorrected" in glossary
    assert "however many were looked at" not in text + glossary


def test_prompts_without_a_negative_prompt_and_shared_seeds_are_told(
    world: Path, pages: dict[str, Parsed], tmp_path: Path
) -> None:
    # Here all prompts have the same seeds.
    assert "3 seeds serve several prompts each, 11 for instance" in pages["index.html"].text
    assert "no negative prompt: with" not in pages["index.html"].text
    store = copy_of(world, tmp_path)
    with duckdb.connect(str(store / "public" / "scores.duckdb")) as connection:
        connection.execute(
            "UPDATE prompt_drilldown SET negative_prompt = '' "
            "WHERE prompt_id IN ('prompt-00', 'prompt-01')"
        )
        connection.execute(
            "UPDATE prompt_drilldown SET seed = seed + 100 * number FROM (SELECT prompt_id, "
            "row_number() OVER () AS number FROM (SELECT DISTINCT prompt_id FROM prompt_drilldown)"
            ") AS numbered WHERE numbered.prompt_id = prompt_drilldown.prompt_id"
        )
    write_report(store / "public" / "scores.duckdb", store, tmp_path / "report")
    text = parsed(tmp_path / "report")["index.html"].text
    assert "2 of 10 prompts have no negative prompt" in text
    assert "serve several prompts each" not in text


def test_only_what_is_found_has_the_colour_of_a_gain_or_a_loss(world: Path, tmp_path: Path) -> None:
    store = copy_of(world, tmp_path)
    coloured = {}
    for finding in ("higher", "not told apart"):
        with duckdb.connect(str(store / "public" / "scores.duckdb")) as connection:
            connection.execute(
                "UPDATE paired_effects SET low_95 = 0.01, high_95 = 0.02, mean_difference = 0.015, "
                "better = 'higher', finding = ?",
                [finding],
            )
            ((effects,),) = connection.execute("SELECT count(*) FROM paired_effects").fetchall()
        write_report(store / "public" / "scores.duckdb", store, tmp_path / "report")
        page = parsed(tmp_path / "report")["index.html"]
        coloured[finding] = sum("gain" in cell.get("class", "") for cell in page.all("td"))
    assert coloured["not told apart"] == 0
    # Beside the effects, the leaderboards and the control have the same findings.
    assert coloured["higher"] > effects > 0


def test_images_say_what_they_are_and_wait_until_they_are_seen(pages: dict[str, Parsed]) -> None:
    shown = [image for page in pages.values() for image in page.all("img")]
    assert len(shown) > 100
    for image in shown:
        if "src" not in image:  # the two of the viewer
            continue
        assert image["alt"].strip() and len(image["alt"]) < 250
        assert image["loading"] == "lazy"
        assert int(image["width"]) > 0 and int(image["height"]) > 0
        assert image["src"].endswith(".webp")


def test_nothing_hostile_becomes_markup(pages: dict[str, Parsed]) -> None:
    for name, page in pages.items():
        scripts = page.all("script")
        assert [one.get("src") for one in scripts] == ["assets/theme.js", "assets/report.js"], name
        for tag, attributes in page.tags:
            handlers = [attribute for attribute in attributes if attribute.startswith("on")]
            assert handlers == [], (name, tag, handlers)
            assert attributes.get("src") != "x", name
    gallery = pages["gallery.html"]
    # What was written is what is read, letter by letter.
    assert " ".join(HOSTILE.split()) in gallery.text
    assert " ".join(LONG.split()) in gallery.text
    assert HOSTILE_ID in gallery.text
    slug = slug_of(HOSTILE_ID)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", slug) and slug_of("long") == "long"
    assert slug in {one.get("id") for one in gallery.all("article")}


def test_images_without_a_score_are_shown_as_such(written: Written) -> None:
    gallery = (written.index.parent / "gallery.html").read_text("utf-8")
    figures = re.findall(r"<figure.*?</figure>", gallery, flags=re.S)
    blocked = [one for one in figures if ">blocked<" in one]
    assert len(blocked) == 3
    for figure in blocked:
        assert "no score: all black" in Parsed(figure).text
        assert "0.000" not in figure and "to base" not in figure
    failed = [one for one in figures if "Not drawn" in one]
    assert len(failed) == 1 and "<img" not in failed[0]
    gone = [one for one in figures if "The file is gone" in one]
    assert len(gone) == 1 and written.missing == 1
    data = Parsed((written.index.parent / "data.html").read_text("utf-8")).text
    assert f"4 of {written.images} images have no score" in data and "all black" in data


def test_one_file_is_missing_and_the_others_are_not(world: Path, written: Written) -> None:
    with duckdb.connect(str(world / "public" / "scores.duckdb"), read_only=True) as connection:
        (path,) = connection.execute(
            "SELECT image_path FROM prompt_drilldown WHERE (prompt_id, seed, variant) = (?, ?, ?)",
            list(GONE),
        ).fetchall()[0]
    assert not (world / path).exists()
    full = written.index.parent / "images" / "full"
    assert Path(path).name not in {file.name for file in full.iterdir()}


def test_nothing_is_asked_of_the_network(written: Written) -> None:
    for file in written.index.parent.rglob("*"):
        if file.suffix in (".html", ".css", ".js"):
            assert not re.search(r"https?://|url\(\s*[\"']?//", file.read_text("utf-8")), file


def test_writing_again_costs_no_image_and_changes_nothing(world: Path, written: Written) -> None:
    folder = written.index.parent
    again = write_report(world / "public" / "scores.duckdb", world, folder)
    assert written.made == len(list((folder / "images" / "full").iterdir())) > 100
    assert again.made == 0 and again.digest == written.digest
    assert again.bytes == written.bytes
    full = next((folder / "images" / "full").iterdir())
    assert full.stat().st_nlink >= 2  # a link into the store, and no second copy
    assert_whole(folder)


def test_an_error_while_writing_leaves_the_old_report(world: Path, tmp_path: Path) -> None:
    own = copy_of(world, tmp_path / "store")
    folder = own / "public" / "report"
    first = write_report(own / "public" / "scores.duckdb", own, folder)
    before = first.index.read_bytes()
    with duckdb.connect(str(own / "public" / "scores.duckdb")) as connection:
        connection.execute(
            "CREATE OR REPLACE TABLE leaderboard AS SELECT * REPLACE ('?' AS mean) FROM leaderboard"
        )
    with pytest.raises(ValueError):
        write_report(own / "public" / "scores.duckdb", own, folder)
    (own / "public" / "scores.duckdb").unlink()
    with pytest.raises(WarehouseMissing, match="published_scores"):
        write_report(own / "public" / "scores.duckdb", own, folder)
    assert first.index.read_bytes() == before
    assert_whole(folder)
    assert [one.name for one in folder.parent.iterdir()] == ["report"]


def test_a_kill_at_any_moment_leaves_a_whole_report(world: Path, tmp_path: Path) -> None:
    own = copy_of(world, tmp_path / "store")
    folder = own / "public" / "report"
    write_report(own / "public" / "scores.duckdb", own, folder)
    code = (
        "import sys; from pathlib import Path\n"
        "from posterpipe.core.score_report import write_report\n"
        "root = Path(sys.argv[1])\n"
        "while True:\n"
        "    print('again', flush=True)\n"
        "    write_report(root / 'public/scores.duckdb', root, root / 'public/report')\n"
    )
    for pause in (0.0, 0.25, 0.6):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(own)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert_whole(folder)


def test_an_empty_warehouse_gives_readable_pages(tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path / "warehouse.duckdb")
    with warehouse.write():
        pass
    publish_scores(warehouse.path, tmp_path / "public", run_id="run")
    written = write_report(
        tmp_path / "public" / "scores.duckdb", tmp_path, tmp_path / "public" / "report"
    )
    pages = assert_whole(written.index.parent)
    assert written.images == 0
    assert "No scores yet" in pages["index.html"].text
    for name in ("index.html", "gallery.html", "copying.html", "legibility.html", "gate.html"):
        assert "Materialize" in pages[name].text, name


def test_a_report_without_some_marts_says_what_to_materialize(world: Path, tmp_path: Path) -> None:
    own = copy_of(world, tmp_path / "store")
    with duckdb.connect(str(own / "public" / "scores.duckdb")) as connection:
        connection.execute("DROP TABLE paired_effects; DROP TABLE checkpoint_trend")
        connection.execute("ALTER TABLE legibility DROP COLUMN exact_share")
    written = write_report(own / "public" / "scores.duckdb", own, own / "public" / "report")
    pages = assert_whole(written.index.parent)
    assert "Materialize paired_effects" in pages["index.html"].text
    assert "Materialize checkpoint_trend" in pages["index.html"].text
    assert "legibility" in pages["legibility.html"].text
    assert "Materialize" in pages["legibility.html"].text


def test_paths_of_the_database_bring_no_other_file_into_the_report(
    world: Path, tmp_path: Path
) -> None:
    own = copy_of(world, tmp_path / "store")
    secret = tmp_path / "secret.png"
    secret.write_bytes(next((world / "blobs").rglob("*.png")).read_bytes())
    with duckdb.connect(str(own / "public" / "scores.duckdb")) as connection:
        connection.execute(
            "UPDATE prompt_drilldown SET image_path = '../secret.png' WHERE variant = 'sd'"
        )
        connection.execute(
            "UPDATE prompt_drilldown SET image_path = ? WHERE variant = 'dreambooth'", [str(secret)]
        )
    written = write_report(own / "public" / "scores.duckdb", own, own / "public" / "report")
    assert written.missing > 0
    assert all(file.read_bytes() != secret.read_bytes()
               for file in (written.index.parent / "images" / "full").iterdir()
               if file.name.startswith("secret") or file.stat().st_ino == secret.stat().st_ino
               )  # fmt: skip
    assert "The file is gone" in (written.index.parent / "gallery.html").read_text("utf-8")


def enlarged(world: Path, target: Path, times: int) -> Path:
    """A world with so many times the prompts of the study; images are used again."""
    own = copy_of(world, target)
    with duckdb.connect(str(own / "public" / "scores.duckdb")) as connection:
        connection.execute("DELETE FROM prompt_drilldown WHERE prompt_id NOT LIKE 'prompt-%'")
        connection.execute(
            """
            INSERT INTO prompt_drilldown
            SELECT drilldown.* REPLACE (
                prompt_id || '-' || number AS prompt_id, generation_key || number AS generation_key
            )
            FROM prompt_drilldown AS drilldown, range(1, ?) AS numbers (number)
            """,
            [times],
        )
    return own


def test_a_thousand_images_are_one_page_of_bounded_size(world: Path, tmp_path: Path) -> None:
    own = enlarged(world, tmp_path / "store", 11)
    written = write_report(own / "public" / "scores.duckdb", own, own / "public" / "report")
    assert 1_000 <= written.images <= IMAGES_A_PAGE
    gallery = written.index.parent / "gallery.html"
    assert not (written.index.parent / "gallery-2.html").exists()
    assert gallery.stat().st_size < 2_000 * written.images
    smalls = [one["src"] for one in Parsed(gallery.read_text("utf-8")).all("img") if "src" in one]
    assert len(smalls) >= 1_000


def test_more_images_go_to_further_pages(world: Path, tmp_path: Path) -> None:
    own = enlarged(world, tmp_path / "store", 14)
    written = write_report(own / "public" / "scores.duckdb", own, own / "public" / "report")
    assert written.images > IMAGES_A_PAGE
    pages = assert_whole(written.index.parent)
    numbered = [name for name in pages if name.startswith("gallery")]
    assert len(numbered) == 2
    articles = [one["id"] for name in numbered for one in pages[name].all("article")]
    assert len(articles) == len(set(articles)) == written.images // 12


def test_the_best_and_the_worst_are_called_gains_and_losses_only_where_they_are() -> None:
    def told(*effects: float | None) -> str:
        prompts = [SimpleNamespace(effect=effect) for effect in effects]
        return results_page._extremes_told(cast(Any, SimpleNamespace(prompts=prompts)))

    assert told(0.2, -0.1, None) == "Where fine-tuning gained most and lost most"
    assert "no prompt lost" in told(0.2, 0.1) and "lost most" not in told(0.2, 0.1)
    assert "no prompt gained" in told(-0.2, -0.1) and "gained most" not in told(-0.2, -0.1)


def test_a_gain_is_not_shown_among_the_losses() -> None:
    def shown(*effects: float | None) -> list[float | None]:
        prompts = [SimpleNamespace(effect=e, prompt_id=str(n)) for n, e in enumerate(effects)]
        chosen = results_page._most_changed(cast(Any, SimpleNamespace(prompts=prompts)))
        return [prompt.effect for prompt in chosen]

    assert shown(0.1, 0.5, None, 0.3, -0.2, 0.4) == [0.5, 0.4, -0.2]
    assert shown(0.1, 0.5, 0.3, 0.4, 0.2) == [0.5, 0.4, 0.2, 0.1]
    assert shown(-0.1, -0.5, -0.3, 0.4) == [0.4, -0.3, -0.5]
    assert shown(0.1) == [0.1] and shown(0.2, 0.1) == [0.2, 0.1]


def test_what_the_suite_would_find_leaves_out_questions_that_it_cannot_answer() -> None:
    def told(*detectable: float | None) -> str:
        rows = [{"low_95": -0.1, "detectable_difference": d, "prompts": 2} for d in detectable]
        alike = {"low_95": None, "detectable_difference": None, "prompts": 2}
        return results_page._finds([*rows, alike], "difference")

    assert "from 0.200 to 0.400 on" in told(0.4, 0.2) and "of 2 none" not in told(0.4, 0.2)
    assert "from 0.459 on" in told(None, 0.459) and "On 1 question of 2 none" in told(None, 0.459)
    assert told(None) == "" == told()
