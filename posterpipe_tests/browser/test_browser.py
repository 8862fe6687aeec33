"""The fixtures of this folder notice what they are for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from posterpipe_tests.browser.conftest import Violations, watched

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page


def test_an_uncaught_error_in_a_page_is_noticed(context: BrowserContext) -> None:
    errors: list[str] = []
    page = watched(context, errors)
    page.set_content("<script>nothing.at.all</script>")
    page.wait_for_timeout(200)
    assert "nothing is not defined" in "".join(errors)


def test_violations_name_the_rule_and_the_element(
    page: Page, serious_violations: Violations
) -> None:
    head = "<html lang='en'><head><title>t</title></head>"
    page.set_content(f"{head}<main><h1>A poster</h1><img id='poster' src='data:,'></main>")
    (violation,) = serious_violations(page)
    assert "image-alt" in violation and "#poster" in violation
    page.set_content(f"{head}<main><h1>A poster</h1><img alt='a rocket' src='data:,'></main>")
    assert serious_violations(page) == []


def test_pages_can_be_made_without_scripts(new_page: Callable[..., Page]) -> None:
    page = new_page(java_script_enabled=False)
    page.set_content("<p>plain</p><script>document.body.textContent = 'changed'</script>")
    assert page.inner_text("p") == "plain"
