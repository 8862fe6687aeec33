"""The score report in a browser: gallery, flip, seeds, links, themes, no scripts, paper."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from posterpipe.core.score_report import write_report
from posterpipe_tests.browser.conftest import Violations
from posterpipe_tests.core.score_report.test_score_report import enlarged

if TYPE_CHECKING:
    from playwright.sync_api import Page

PAGES = ("index", "gallery", "copying", "legibility", "gate", "data", "glossary")


@pytest.fixture(scope="module")
def report(published_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "report"
    database = published_world / "public" / "scores.duckdb"
    return write_report(database, published_world, folder).index.parent


def address(report: Path, page: str, anchor: str = "") -> str:
    return f"{(report / page).as_uri()}.html{anchor and '#'}{anchor}"


def shown_seed(page: Page, prompt: str) -> str | None:
    panels = page.locator(f"#{prompt} .shots").all()
    seen = [panel.get_attribute("data-seed") for panel in panels if panel.is_visible()]
    assert len(seen) == 1
    return seen[0]


def order(page: Page) -> list[str]:
    return page.locator(".prompt").evaluate_all("all => all.map(one => one.dataset.prompt)")


def until(holds: Callable[[], bool], seconds: float = 15) -> None:
    """Waits; Playwright's own waiting evaluates text, which the pages' policy forbids."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold"
        time.sleep(0.05)


def background(page: Page) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_images_of_the_gallery_come_as_they_are_seen(page: Page, report: Path) -> None:
    page.goto(address(report, "gallery"))
    first = page.locator("#long .shots:visible img").first
    first.scroll_into_view_if_needed()
    until(lambda: first.evaluate("image => image.complete && image.naturalWidth > 0"))
    waiting = page.evaluate(
        "[...document.images].filter(image => image.src && !image.complete).length"
    )
    assert waiting > 0, "images far below have been loaded as well"


def test_the_seed_switch_and_its_link(page: Page, report: Path) -> None:
    page.goto(address(report, "gallery"))
    assert shown_seed(page, "prompt-03") == "11"
    page.locator("#prompt-03 .seeds label", has_text="13").click()
    assert shown_seed(page, "prompt-03") == "13"
    assert page.url.endswith("gallery.html#prompt-03/13")
    page.goto("about:blank")
    page.goto(address(report, "gallery", "prompt-04/12"))
    until(lambda: shown_seed(page, "prompt-04") == "12")
    top = "one => one.getBoundingClientRect().top"
    until(lambda: -50 < page.locator("#prompt-04").evaluate(top) < 450)


def test_flip_between_two(page: Page, report: Path) -> None:
    page.goto(address(report, "gallery"))
    page.locator("#prompt-03 .shots:visible figure[data-variant=dreambooth] a.frame").click()
    viewer = page.locator("dialog.viewer")
    told = viewer.locator(".told")
    visible = viewer.locator(".stage img:visible")
    assert visible.count() == 1
    second = visible.get_attribute("src")
    assert "B: Fine-tuned" in told.inner_text() and "to base" in told.inner_text()
    page.keyboard.press("f")
    first = visible.get_attribute("src")
    assert first != second and "A: Base" in told.inner_text()
    assert (visible.get_attribute("alt") or "").startswith("Base, seed 11")
    page.keyboard.press("Space")
    assert visible.get_attribute("src") == second
    viewer.locator(".stage").click()
    assert visible.get_attribute("src") == first
    # Score and difference are those under the image.
    under = page.locator("#prompt-03 .shots:visible figure[data-variant=sd] .numbers").inner_text()
    assert " ".join(under.split()) in told.inner_text()
    page.keyboard.press("s")
    assert "seed 12" in told.inner_text() and shown_seed(page, "prompt-03") == "12"
    page.keyboard.press("ArrowRight")
    assert "prompt-04" in page.url
    viewer.locator("select").nth(1).select_option("sd_negative")
    assert "Base + negative" in told.inner_text()
    link = page.url
    page.keyboard.press("Escape")
    assert not viewer.is_visible()
    page.goto("about:blank")
    page.goto(link)
    told.filter(has_text="Base + negative").wait_for()
    assert viewer.is_visible()


def test_sorting_by_the_largest_loss_and_finding(page: Page, report: Path) -> None:
    page.goto(address(report, "gallery"))
    names = order(page)
    page.locator("#sort").select_option("loss")
    effects = page.locator(".prompt").evaluate_all("all => all.map(one => one.dataset.effect)")
    known = [float(effect) for effect in effects if effect]
    assert len(known) >= 8 and known == sorted(known) and order(page) != names
    page.locator("#sort").select_option("gain")
    first = page.locator(".prompt").first.get_attribute("data-effect")
    assert float(first or "nan") == max(known)
    page.locator("#sort").select_option("name")
    assert order(page) == names
    page.locator("#find").fill("thing 5")
    assert [one for one in names if page.locator(f"#{one}").is_visible()] == ["prompt-05"]
    assert "1 of" in page.locator(".told-count").inner_text()


def test_titles_set_in_type_are_shown_on_request(page: Page, report: Path) -> None:
    page.goto(address(report, "gallery"))
    image = page.locator("#prompt-01 .shots:visible figure[data-variant=sd] img").first
    plain = image.get_attribute("src")
    page.locator("#titled").check()
    assert image.get_attribute("src") == image.get_attribute("data-titled") != plain
    page.locator("#titled").uncheck()
    assert image.get_attribute("src") == plain


def test_light_and_dark(new_page: Callable[..., Page], report: Path) -> None:
    light = new_page(color_scheme="light")
    light.goto(address(report, "index"))
    paper = background(light)
    light.get_by_role("button", name="Dark theme").click()
    ink = background(light)
    assert ink != paper
    light.goto(address(report, "gate"))
    assert background(light) == ink, "the choice is kept on other pages"
    dark = new_page(color_scheme="dark")
    dark.goto(address(report, "index"))
    assert background(dark) == ink
    dark.get_by_role("button", name="Light theme").click()
    assert background(dark) == paper


def test_readable_without_scripts(new_page: Callable[..., Page], report: Path) -> None:
    page = new_page(java_script_enabled=False)
    for name in PAGES:
        page.goto(address(report, name))
        assert page.locator("h1").is_visible()
        # A button that does nothing is worse than none.
        assert page.locator("button:visible, select:visible").count() == 0, name
    page.goto(address(report, "gallery"))
    assert shown_seed(page, "prompt-03") == "11"
    page.locator("#prompt-03 .seeds label", has_text="12").click()
    assert shown_seed(page, "prompt-03") == "12", "seeds are switched by CSS"
    page.goto("about:blank")
    page.goto(address(report, "gallery", "prompt-03/13"))
    assert shown_seed(page, "prompt-03") == "13"
    page.locator("#prompt-03 .shots:visible a.frame").first.click()
    assert re.search(r"images/full/\w+\.png$", page.url)


def test_keyboard_alone_is_enough(page: Page, report: Path) -> None:
    page.goto(address(report, "gallery"))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("#prompt-03 .seeds input").first.focus()
    page.keyboard.press("ArrowRight")
    assert shown_seed(page, "prompt-03") == "12"
    page.locator("#prompt-03 .shots:visible a.frame").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog.viewer").is_visible()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.className") == "frame", "the focus comes back"


QUICK = ("gallery",)
"""Pages that the fast tests look at."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in PAGES],
)
def test_accessible_in_both_themes(
    new_page: Callable[..., Page], report: Path, serious_violations: Violations, name: str
) -> None:
    for scheme in ("light", "dark"):
        page = new_page(color_scheme=scheme)
        page.goto(address(report, name))
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert serious_violations(page) == [], (name, scheme)
        if name == "gallery":
            page.locator("#prompt-03 .shots:visible a.frame").first.click()
            assert serious_violations(page) == [], ("viewer", scheme)


def test_a_phone_needs_no_sideways_scrolling(new_page: Callable[..., Page], report: Path) -> None:
    page = new_page(viewport={"width": 360, "height": 740})
    for name in PAGES:
        page.goto(address(report, name))
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, name


def test_paper(page: Page, report: Path) -> None:
    page.goto(address(report, "gallery"))
    page.emulate_media(media="print")
    assert not page.locator(".bar").is_visible() and not page.locator(".tools").is_visible()
    assert background(page) == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    there = """[...document.querySelectorAll('.shots')].filter(one => one.offsetParent)
        .flatMap(one => [...one.querySelectorAll('img')])
        .every(image => image.complete && image.naturalWidth > 0)"""
    until(lambda: page.evaluate(there))
    document = page.pdf(format="A4")
    assert document.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", document)) > 2
    assert document.count(b"/Subtype /Image") > 20


def test_nothing_is_fetched_from_elsewhere(page: Page, report: Path) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for name in PAGES:
        page.goto(address(report, name))
    page.wait_for_load_state("networkidle")
    root = report.as_uri()
    assert asked and all(url.startswith((root, "data:")) for url in asked)


@pytest.fixture(scope="module")
def large(published_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of more than a thousand images."""
    own = enlarged(published_world, tmp_path_factory.mktemp("large") / "store", 11)
    written = write_report(own / "public" / "scores.duckdb", own, own / "public" / "report")
    assert written.images >= 1_000
    return written.index.parent


@pytest.mark.parametrize("scripts", [True, False])
def test_a_link_leads_to_its_prompt_however_far_down(
    new_page: Callable[..., Page], large: Path, scripts: bool
) -> None:
    page = new_page(java_script_enabled=scripts, viewport={"width": 1280, "height": 900})
    for prompt in ("prompt-07-9", "prompt-03-4"):
        page.goto("about:blank")
        page.goto(address(large, "gallery", f"{prompt}/12"))
        until(lambda: page.locator(f"#{prompt} .shots[data-seed='12'] img").first.is_visible())  # noqa: B023
        page.wait_for_timeout(300)
        box = page.locator(f"#{prompt}").bounding_box()
        # Without scripts the browser goes to the images of the seed, which stand below the words.
        assert box is not None and -250 < box["y"] < 120, prompt


def test_a_thousand_images_do_not_stall(page: Page, large: Path) -> None:
    page.add_init_script(
        "window.tasks = []; new PerformanceObserver(list => list.getEntries().forEach("
        "one => window.tasks.push(one.duration))).observe({type: 'longtask', buffered: true})"
    )
    start = time.monotonic()
    page.goto(address(large, "gallery"))
    page.locator(".prompt h2").first.wait_for()
    assert time.monotonic() - start < 10
    loaded = "[...document.images].filter(image => image.src && image.complete).length"
    assert page.evaluate(loaded) < 200
    page.locator("#sort").select_option("loss")
    page.evaluate(
        """async () => {
            for (let place = 0; place < document.body.scrollHeight; place += 2000) {
                scrollTo({top: place, behavior: 'instant'});
                await new Promise(requestAnimationFrame);
            }
        }"""
    )
    # Generous, since the machine of the tests does other things too: a stall is seconds.
    assert max(page.evaluate("window.tasks"), default=0) < 2_000
