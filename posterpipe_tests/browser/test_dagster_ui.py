"""The Dagster UI as a data team meets it, in a real browser, on services with tiny models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from posterpipe_tests.browser.conftest import PATIENCE_MS
from posterpipe_tests.services import POSTERS, Services, build_deployment, started

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = pytest.mark.slow

GROUPS = ("ingest", "dataset", "training", "generation", "scoring", "reports")


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Services that were started on a new folder and left alone, until the posters were
    read and checked, which what follows them waits for."""
    with started(build_deployment(tmp_path_factory.mktemp("deployment"))) as services:
        services.wait("posters are read", lambda assets: "resized_posters" in assets)
        yield services


def test_the_graph_shows_groups_and_every_asset_in_its_group(
    services: Services, page: Page
) -> None:
    page.goto(f"{services.url}/asset-groups")
    for group in GROUPS:
        page.locator("foreignObject", has_text=group).first.wait_for()
    nodes = services.ask("query { assetNodes { groupName assetKey { path } } }")["assetNodes"]
    assert {node["groupName"] for node in nodes} == set(GROUPS)
    assert len(nodes) > 15
    page.goto(f"{services.url}/asset-groups?expanded=global@global:ingest")
    page.locator("foreignObject", has_text="raw_posters").first.wait_for()
    # All of them in lists, since of a graph only what lies within the window is drawn.
    page.set_viewport_size({"width": 1400, "height": 2400})
    for group in GROUPS:
        page.goto(f"{services.url}/locations/posterpipe/asset-groups/{group}/list")
        for node in nodes:
            if node["groupName"] == group:
                # Attached: of long names the list shows a shortened copy.
                name = page.get_by_text(node["assetKey"]["path"][-1], exact=True)
                name.first.wait_for(state="attached")


def test_an_asset_shows_what_it_is_when_it_runs_and_its_pictures(
    services: Services, page: Page
) -> None:
    page.goto(f"{services.url}/assets/raw_posters")
    page.get_by_text("Every file of the landing folder, judged").first.wait_for()
    page.get_by_text("When it runs:").first.wait_for()
    row = page.locator("tr", has_text="contact_sheet").first
    row.get_by_text("Show").click()
    sheet = page.get_by_role("dialog").locator("img")
    sheet.wait_for()
    assert sheet.get_attribute("alt") == f"{POSTERS} images"
    assert sheet.evaluate("image => image.complete && image.naturalWidth") > 200
    page.keyboard.press("Escape")
    page.get_by_text("poster 0.png").first.wait_for()  # the table of posters, too


def test_checks_say_what_they_expected_and_found(services: Services, page: Page) -> None:
    page.goto(f"{services.url}/assets/raw_posters?view=checks")
    page.get_by_text("enough_usable_posters").first.click()
    page.get_by_text("A fine-tuning on fewer posters").first.wait_for()
    page.get_by_text(f"{POSTERS} usable posters; at least 5 are needed").wait_for()
    for entry in ("expected", "actual", "offenders"):
        page.get_by_text(entry, exact=True).first.wait_for()


def test_the_overview_tells_newcomers_what_all_this_is(services: Services, page: Page) -> None:
    page.goto(f"{services.url}/locations/posterpipe/jobs/everything")
    page.get_by_text("turns a folder of movie posters into").first.wait_for()
    page.get_by_text("What runs by itself.").first.wait_for()


def test_the_launchpad_explains_training_settings_and_refuses_wrong_ones(
    services: Services, page: Page
) -> None:
    page.goto(f"{services.url}/locations/posterpipe/jobs/retrain/playground")
    page.get_by_role("button", name="Launch Run").wait_for()
    _write_config(page, "max_train_steps: many")
    page.get_by_text('Value "many" of type').first.wait_for()
    page.get_by_text(re.compile("how long to train")).first.wait_for()
    explained = " ".join(page.inner_text("body").split())
    assert "Unit: optimizer steps. Must be at least 1. Default: 1000" in explained
    assert "Unit: minutes. Must be above 0. Default: none" in explained
    _write_config(page, "max_train_steps: 20")
    page.get_by_text("No errors").wait_for()


def _write_config(page: Page, line: str) -> None:
    page.locator(".CodeMirror-lines").first.click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(f"ops:\n  dreambooth_checkpoint:\n    config:\n      {line}\n")
    page.keyboard.press("ArrowUp")  # what stands beside the editor is about the cursor's line
    page.keyboard.press("End")


def test_what_is_to_run_by_itself_is_on_and_alerts_wait_for_a_receiver(
    services: Services, page: Page
) -> None:
    page.goto(f"{services.url}/automation")
    for name in ("arrivals", "automation", "stale_sweep", "training"):
        expect(_switch(page, name)).to_be_checked(timeout=PATIENCE_MS)
    expect(_switch(page, "failure_alerts")).to_be_enabled()
    expect(_switch(page, "failure_alerts")).not_to_be_checked()


def _switch(page: Page, name: str) -> Locator:
    link = page.locator(f"a[href*='posterpipe'][href$='/{name}']").first
    return link.locator("xpath=following-sibling::*").locator("input[type=checkbox]")


def test_runs_say_who_started_them_and_why(services: Services, page: Page) -> None:
    page.goto(f"{services.url}/runs")
    page.get_by_text("arrivals", exact=True).first.wait_for()
    (run, *_) = (run for run in services.runs() if _tag(run, "posterpipe/arrived") == "raw_posters")
    assert "posters" in _tag(run, "posterpipe/reason")


def _tag(run: dict[str, object], name: str) -> str:
    tags = run["tags"]
    assert isinstance(tags, list)
    return next((tag["value"] for tag in tags if tag["key"] == name), "")
