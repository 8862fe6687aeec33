"""The studio as people meet it: real server, real (starter) models, real browser."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pandas as pd
import pytest
from PIL import Image

from posterpipe.core.store import Store
from posterpipe.settings import default_root
from posterpipe_tests.browser.conftest import Violations
from posterpipe_tests.studio.serving import served
from posterpipe_tests.studio.test_published import publication

if TYPE_CHECKING:
    from playwright.sync_api import Page

PAGES = ("", "compare", "captions", "scores")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
HOSTILE = "<img src=x onerror='window.hacked=1'> **bold** $x^2$ :smile: [a](http://b)"
MACHINES = "a poster of a thing"
TRIGGER = "in the style of our studio,"
SERVER_MS = 60_000
"""For what a click does: the page is made anew by a server that shares two busy cores."""

LONG_MS = 240_000
"""For posters, the first of which has its model loaded."""


class Studio:
    """A running studio."""

    def __init__(self, address: str, folder: Path, server: int) -> None:
        self.address = address
        self.folder = folder
        self._server = server

    @contextmanager
    def model_held(self) -> Iterator[None]:
        """The model's process stands still meanwhile: what waits for it is seen waiting."""
        tasks = Path(f"/proc/{self._server}/task").glob("*/children")
        (model,) = {int(child) for task in tasks for child in task.read_text().split()}
        os.kill(model, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(model, signal.SIGCONT)

    def open(self, page: Page, path: str = "") -> Page:
        """A page of it, loaded."""
        page.set_default_timeout(SERVER_MS)
        page.goto(f"{self.address}/{path}")
        page.get_by_role("heading", level=1).wait_for()
        page.wait_for_timeout(300)
        return page


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """Served by the command, with the starter models, three posters, the last of them captioned by
    the machine, and published scores."""
    folder = tmp_path_factory.mktemp("studio")
    (folder / "posters").mkdir()
    for path in sorted((default_root() / "data" / "raw_posters").iterdir())[:3]:
        shutil.copy(path, folder / "posters")
    publication(folder / "store", 0.25)
    last = max(path.name for path in (folder / "posters").iterdir())
    poster = {"source_name": last, "poster_id": "p", "status": "ok", "reason": ""}
    caption = {"poster_id": "p", "caption": MACHINES, "source": "model", "reason": ""}
    store = Store(folder / "store")
    store.write_table("raw_posters", pd.DataFrame([{**poster, "near_duplicate_of": ""}]))
    store.write_table("poster_captions", pd.DataFrame([caption]))
    (folder / "store" / "blobs").mkdir(exist_ok=True)
    Image.new("RGB", (64, 96), "teal").save(folder / "store" / "blobs" / "i.png")
    places = {"LANDING": "posters", "CAPTIONS": "captions.csv", "STORE": "store"}
    own = {f"POSTERPIPE_{name}": str(folder / value) for name, value in places.items()}
    own["POSTERPIPE_SAMPLER__NUM_INFERENCE_STEPS"] = "8"
    own["POSTERPIPE_CAPTIONER__TRIGGER"] = TRIGGER
    with served(folder, env=own) as (port, server):
        yield Studio(f"http://127.0.0.1:{port}", folder, server)


def describe(page: Page, words: str) -> None:
    """Types a description and asks for the poster."""
    page.get_by_label("Describe the poster").fill(words)
    page.get_by_role("button", name="Generate").click()


def made(page: Page) -> Any:
    """The button that saves the poster, which is there when the poster is."""
    return page.get_by_role("button", name="Save Poster").first


def test_a_poster_is_made_and_saved_and_nothing_is_asked_of_the_network(
    studio: Studio, page: Page, tmp_path: Path
) -> None:
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    studio.open(page)
    describe(page, "a minimalist film poster of a red rocket")
    page.get_by_role("progressbar").first.wait_for()
    page.get_by_role("button", name="Cancel").wait_for()
    made(page).wait_for(timeout=LONG_MS)
    page.get_by_role("button", name="Cancel").wait_for(state="detached", timeout=LONG_MS)
    shown = page.get_by_role("img", name="Poster drawn from: a minimalist film poster").first
    assert shown.evaluate("image => image.naturalWidth") == 768
    with page.expect_download() as download:
        made(page).click()
    saved = tmp_path / download.value.suggested_filename
    download.value.save_as(saved)
    assert saved.name.startswith("a-minimalist-film-poster-of-a-red-rocket-")
    with Image.open(saved) as image:
        assert image.size == (768, 1152)
        about = image.info["parameters"]
    assert about.startswith("a minimalist film poster of a red rocket\n")
    seed = saved.stem.rpartition("-")[2]
    assert f"Seed: {seed}," in about
    page.get_by_role("heading", name="This visit").wait_for()
    page.get_by_role("button", name="Same seed, other words").click()
    page.get_by_text(f"Seed {seed} is kept").wait_for()
    assert hosts == {urlsplit(studio.address).netloc}


def test_a_request_is_cancelled_and_the_next_one_is_drawn(studio: Studio, page: Page) -> None:
    studio.open(page)
    page.get_by_text("Title, lettering, seed, model").click()
    page.get_by_label("Posters", exact=True).fill("12")
    page.get_by_label("Posters", exact=True).press("Enter")
    describe(page, "a blue whale")
    page.get_by_role("button", name="Cancel").click(timeout=LONG_MS)
    page.get_by_text("Cancelled").wait_for(timeout=LONG_MS)
    page.get_by_label("Posters", exact=True).fill("1")
    page.get_by_label("Posters", exact=True).press("Enter")
    describe(page, "a green cat")
    page.get_by_role("img", name="Poster drawn from: a green cat").first.wait_for(timeout=LONG_MS)


@pytest.mark.slow
def test_a_second_user_waits_in_line_and_both_get_their_posters(
    studio: Studio, new_page: Callable[..., Page]
) -> None:
    first, second = studio.open(new_page()), studio.open(new_page())
    describe(first, "a green boat")
    made(first).wait_for(timeout=LONG_MS)  # the model is loaded
    first.get_by_role("button", name="Cancel").wait_for(state="detached")
    with studio.model_held():
        describe(first, "a red car")
        first.get_by_role("button", name="Cancel").wait_for()
        describe(second, "a yellow guitar")
        second.get_by_text("1 before you").wait_for()
    for page, words in ((first, "a red car"), (second, "a yellow guitar")):
        mine = page.get_by_role("img", name=f"Poster drawn from: {words}")
        mine.first.wait_for(timeout=LONG_MS)
    assert second.get_by_role("img", name="Poster drawn from: a red car").count() == 0


def test_two_people_edit_one_caption_and_the_second_is_shown_both_texts(
    studio: Studio, new_page: Callable[..., Page]
) -> None:
    first, second = studio.open(new_page(), "captions"), studio.open(new_page(), "captions")
    for page, words in ((first, HOSTILE), (second, "the second's words")):
        page.get_by_label("Caption", exact=True).first.fill(words)
        page.get_by_role("button", name="Save", exact=True).first.click()
        if page is first:
            page.get_by_text("Saved in captions.csv").wait_for()
    second.get_by_text("Nothing was overwritten").wait_for()
    # As it was typed: no image, no bold, no formula, no emoji, no link.
    second.get_by_text(HOSTILE, exact=True).wait_for()
    assert second.evaluate("window.hacked") is None
    assert (
        second.locator("img[src=x], main strong, main .katex, main a[href='http://b']").count() == 0
    )
    assert HOSTILE in (studio.folder / "captions.csv").read_text(encoding="utf-8")
    second.get_by_role("button", name="Save mine instead").click()
    second.get_by_text("Saved in captions.csv").wait_for()
    written = (studio.folder / "captions.csv").read_text(encoding="utf-8")
    assert "the second's words" in written and "onerror" not in written


def test_words_typed_over_the_captioners_are_saved_with_one_click_and_can_be_taken_back(
    studio: Studio, page: Page
) -> None:
    from playwright.sync_api import expect

    studio.open(page, "captions")
    field = page.get_by_label("Caption", exact=True).last
    expect(field).to_have_value(MACHINES)  # the field is there before its text
    field.press("End")
    page.keyboard.type(", and a star")
    # The click ends the typing, which gives the button its other name.
    page.get_by_role("button", name="Confirm").click()
    page.get_by_text("Saved in captions.csv").wait_for()
    words = f"{MACHINES}, and a star"
    assert words in (studio.folder / "captions.csv").read_text(encoding="utf-8")
    page.get_by_role("button", name="Use the captioner's again").last.click()
    page.get_by_text("Taken back.").wait_for()
    page.get_by_role("button", name="Confirm").wait_for()
    expect(field).to_have_value(MACHINES)
    assert words not in (studio.folder / "captions.csv").read_text(encoding="utf-8")


def test_what_was_just_typed_is_called_by_the_phrase_of_the_tuned_look(
    studio: Studio, page: Page
) -> None:
    studio.open(page)
    field = page.get_by_label("Describe the poster")
    field.fill("a red rocket")
    page.get_by_role("button", name="Insert it").click()
    page.get_by_role("button", name="Insert it", disabled=True).wait_for()
    assert field.input_value() == f"{TRIGGER} a red rocket"


def test_what_is_typed_is_never_run_or_rendered(studio: Studio, page: Page) -> None:
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    studio.open(page)
    page.get_by_text("Title, lettering, seed, model").click()
    page.get_by_label("Title, set in type on the poster").fill(f"{HOSTILE[:60]}")
    describe(page, f"{HOSTILE} <script>alert(1)</script>")
    made(page).wait_for(timeout=LONG_MS)
    assert page.evaluate("window.hacked") is None
    assert (
        page.locator("img[src=x], main strong, main .katex, main a[href='http://b']").count() == 0
    )
    shown = page.get_by_role("img", name="Poster drawn from: <img").first
    assert "<script>alert(1)</script>" in (shown.get_attribute("alt") or "")


def test_a_new_publication_appears_without_a_touch(studio: Studio, page: Page) -> None:
    studio.open(page, "scores")
    page.get_by_text("0.250 · seed 7").wait_for()
    publication(studio.folder / "store", 0.375)
    page.get_by_text("0.375 · seed 7").wait_for()


def test_on_a_phone_nothing_is_wider_than_the_screen(
    studio: Studio, new_page: Callable[..., Page]
) -> None:
    page = new_page(**PHONE, color_scheme="dark")
    for path in PAGES:
        studio.open(page, path)
        if path == "":
            describe(page, "w" * 300)
            made(page).wait_for(timeout=LONG_MS)
        widest = page.evaluate(
            "[...document.querySelectorAll('html, [data-testid=stMain]')]"
            ".map(place => place.scrollWidth - place.clientWidth)"
        )
        assert widest == [0, 0], path


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_the_pages_have_no_serious_accessibility_violations(
    studio: Studio,
    new_page: Callable[..., Page],
    serious_violations: Violations,
    scheme: str,
) -> None:
    page = new_page(color_scheme=scheme, viewport={"width": 1280, "height": 900})
    found = {}
    for path in PAGES:
        studio.open(page, path)
        if path == "":
            page.get_by_text("Title, lettering, seed, model").click()
            describe(page, "a red rocket")
            made(page).wait_for(timeout=LONG_MS)
            page.get_by_role("button", name="Cancel").wait_for(state="detached")
            with studio.model_held():
                describe(page, "a blue boat")
                page.get_by_role("button", name="Cancel").wait_for()
                if violations := serious_violations(page):
                    found["make, while drawing"] = violations
            page.get_by_role("img", name="Poster drawn from: a blue boat").first.wait_for()
        if violations := serious_violations(page):
            found[path or "make"] = violations
    assert found == {}
