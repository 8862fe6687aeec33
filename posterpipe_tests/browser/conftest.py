"""The browser of the tests in this folder, and how a page's accessibility is judged.

What belongs here: fixtures for any page. What does not: the servers behind the pages (the tests
that look at them).

The browser is the machine's Chromium (Debian's package `chromium`), else the one that
`playwright install chromium` brings; `POSTERPIPE_TEST_BROWSER` names another. Without any, these
tests are skipped, except under CI.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page

ARGUMENTS = (
    "--no-sandbox",  # containers run as root and lack the sandbox's system calls
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_MS = 60_000
"""How long Playwright waits for what a test expects; two busy cores are slow."""

Violations = Callable[["Page"], list[str]]


def executable() -> str | None:
    """The browser to use; None for Playwright's own."""
    installed = next(filter(None, map(shutil.which, NAMES)), None)
    return os.environ.get("POSTERPIPE_TEST_BROWSER") or installed


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One browser for all tests of this folder.

    Of the package and not of the session: while it runs, this thread has a running event loop, with
    which Dagster's own `asyncio.run` in the tests of other folders would fail. For the same reason
    tests in this folder start Dagster in processes of its own.
    """
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=executable(), args=list(ARGUMENTS))
        except Error as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no Chromium ({str(error).splitlines()[0]}): install the package chromium")
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A visit of its own: no cookies, no storage, nothing shared with other tests."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-GB")
    context.set_default_timeout(PATIENCE_MS)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page; the test fails if a script of the page does."""
    errors: list[str] = []
    page = watched(context, errors)
    yield page
    assert not errors, "errors in the page:\n" + "\n".join(errors)


@pytest.fixture
def new_page(context: BrowserContext) -> Iterator[Callable[..., Page]]:
    """Makes pages, watched as `page` is: with options of `Browser.new_context`, such as
    `java_script_enabled=False`, `color_scheme="dark"` or a phone's viewport, each in its own visit.
    """
    errors: list[str] = []
    contexts: list[BrowserContext] = []
    browser = context.browser
    assert browser is not None

    def make(**options: Any) -> Page:
        another = browser.new_context(**({"locale": "en-GB"} | options))
        another.set_default_timeout(PATIENCE_MS)
        contexts.append(another)
        return watched(another, errors)

    yield make
    for another in contexts:
        another.close()
    assert not errors, "errors in the page:\n" + "\n".join(errors)


def watched(context: BrowserContext, errors: list[str]) -> Page:
    """A page whose uncaught errors are written down."""
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(f"{page.url}: {error.stack or error}"))

    def said(message: ConsoleMessage) -> None:
        if message.type == "error" and "Uncaught" in message.text:
            errors.append(f"{page.url}: {message.text}")

    page.on("console", said)
    return page


@pytest.fixture(scope="session")
def serious_violations() -> Violations:
    """Judges a page with axe-core: its serious and critical violations, each with the elements."""
    from axe_playwright_python.sync_playwright import Axe

    axe = Axe()

    def judge(page: Page) -> list[str]:
        found = axe.run(page).response["violations"]
        return [
            f"{violation['impact']}: {violation['id']}: {violation['help']}: "
            + "; ".join(str(node["target"][0]) for node in violation["nodes"][:5])
            for violation in found
            if violation["impact"] in ("serious", "critical")
        ]

    return judge
