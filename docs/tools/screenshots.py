"""Takes the pictures of README and guides: `python -m docs.tools.screenshots`.

What belongs here: which views are shown, and how they are cut. What does not: the views.

It shows what `make demo` made last, so that pictures and figures go together: the Dagster UI with
its runs, the score report, the studio. Nothing is faked and nothing chosen by hand. The Dagster UI
runs without its daemon meanwhile, so that nothing is made while it is looked at.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import httpx
from PIL import Image

from posterpipe.core.variants import VARIANTS
from posterpipe.defs.resources import Deployment
from posterpipe.settings import load_settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FloatRect, Page

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"
LARGEST = 390_000
"""Bytes of a picture; pages with larger ones are slow to read."""

COLOURS = (256, 128, 64)
"""How many a picture has that is too large with all of its colours."""

OPENED = ("ingest", "dataset", "training", "generation", "scoring")
"""Groups that the graph shows opened; with the reports it would be too small to read."""

PAPER = "#f6f4f0"
PATIENCE_MS = 120_000

Take = Callable[["Browser", Deployment], "Iterator[tuple[str, bytes]]"]


# ---- what was drawn


def sheets(_: Browser, deployment: Deployment) -> Iterator[tuple[str, bytes]]:
    """The first prompts by all variants, and posters before and after their title is set: always
    the first prompts and their first seed."""
    from posterpipe.core.gallery import grid

    with duckdb.connect(str(deployment.published_path), read_only=True) as connection:
        firsts = connection.execute(
            """
            select prompt, seed, variant, image_path, titled_image_path
            from prompt_drilldown
            where image_path is not null
            qualify row_number() over (partition by prompt_id, variant order by seed) = 1
            order by seed
            """
        ).fetchall()
    store = deployment.store_root
    rows = list(dict.fromkeys(f"{prompt} · seed {seed}" for prompt, seed, *_ in firsts))
    cells = {
        (f"{prompt} · seed {seed}", variant): store / path
        for prompt, seed, variant, path, _ in firsts
    }
    sheet = grid(rows[:4], VARIANTS, cells, cell=(150, 225))
    yield "contact-sheet", as_png(sheet)

    pairs = [
        (path, titled)
        for *_, variant, path, titled in firsts
        if variant == VARIANTS[-1] and titled is not None
    ][:8]
    if not pairs:
        return
    width, height, gap = 190, 285, 10
    sheet = Image.new("RGB", (gap + len(pairs) * (width + gap), 2 * (height + gap) + gap), PAPER)
    for column, pair in enumerate(pairs):
        for row, path in enumerate(pair):
            with Image.open(store / path) as image:
                poster = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(poster, (gap + column * (width + gap), gap + row * (height + gap)))
    yield "titled-posters", as_png(sheet)


# ---- the Dagster UI


def dagster(browser: Browser, deployment: Deployment) -> Iterator[tuple[str, bytes]]:
    """The graph, assets with their pictures, checks, what runs by itself, the launchpad."""
    command = [
        sys.executable,
        "-m",
        "dagster_webserver",
        "--workspace",
        str(ROOT / "workspace.yaml"),
    ]
    with served([*command, "--host", "127.0.0.1", "--port"]) as url:
        page = window(browser, 1500, 1420)
        # From top to bottom it is half as wide, so that names are twice as large.
        page.add_init_script("localStorage.setItem('asset-graph-direction', '\"vertical\"')")
        expanded = ",".join(f"global@global:{group}" for group in OPENED)
        page.goto(f"{url}/asset-groups")
        page.locator("foreignObject", has_text="ingest").first.wait_for()
        page.get_by_text("Hide navigation").click()  # which the UI remembers
        page.goto(f"{url}/asset-groups?expanded={expanded}")
        page.locator("foreignObject", has_text="training_csv").first.wait_for()
        # The button has no name: it stands beside the field of the list that it closes.
        page.locator("button:right-of([placeholder^='Jump to'])").first.click()
        canvas = page.locator("[data-svg-viewport]").bounding_box()
        assert canvas is not None
        # In an empty corner, which lets the graph fill the place.
        page.mouse.dblclick(canvas["x"] + 20, canvas["y"] + canvas["height"] - 20)
        page.wait_for_timeout(6000)  # the graph moves into its place, and its states come in
        yield "dagster-graph", page.screenshot(clip=around(page, "foreignObject"))
        page.close()

        page = window(browser, 1400, 1000)
        for name, asset, entry in (
            ("dagster-captions", "poster_captions", "contact_sheet"),
            ("dagster-training", "dreambooth_checkpoint", "loss_curve"),
        ):
            page.goto(f"{url}/assets/{asset}")
            row = page.locator("tr", has_text=entry).first
            row.scroll_into_view_if_needed()
            row.get_by_text("Show").first.click()
            page.get_by_role("dialog").locator("img").wait_for()
            page.wait_for_timeout(800)
            yield name, page.screenshot(clip={"x": 0, "y": 0, "width": 1400, "height": 800})
        page.goto(f"{url}/assets/raw_posters?view=checks")
        page.get_by_text("enough_usable_posters").first.click()
        page.get_by_text("expected", exact=True).first.wait_for()
        page.wait_for_timeout(1500)
        yield "dagster-checks", page.screenshot(clip={"x": 0, "y": 0, "width": 1400, "height": 700})
        page.goto(f"{url}/automation")
        page.locator("a[href$='/arrivals']").first.wait_for()
        page.wait_for_timeout(4000)
        yield (
            "dagster-automation",
            page.screenshot(clip={"x": 0, "y": 0, "width": 1400, "height": 560}),
        )
        page.goto(f"{url}/locations/posterpipe/jobs/retrain/playground")
        page.get_by_role("button", name="Launch Run").wait_for()
        page.locator(".CodeMirror-lines").first.click()
        page.keyboard.press("Control+A")
        page.keyboard.insert_text(
            "ops:\n  dreambooth_checkpoint:\n    config:\n      max_train_steps: 1200\n"
            "      learning_rate: 1.0e-4\n"
        )
        page.keyboard.press("ArrowUp")
        page.keyboard.press("End")
        page.get_by_text("Must be at least 1").first.wait_for()
        page.wait_for_timeout(1500)
        yield (
            "dagster-launchpad",
            page.screenshot(clip={"x": 0, "y": 0, "width": 1400, "height": 760}),
        )
        page.close()


# ---- the report


def report(browser: Browser, deployment: Deployment) -> Iterator[tuple[str, bytes]]:
    """Results by day and by night, and the gallery."""
    index = deployment.report_path
    for name, scheme in (("report-light", "light"), ("report-dark", "dark")):
        page = window(browser, 1280, 1100, scheme)
        page.goto(index.as_uri())
        page.locator("h1").first.wait_for()
        page.wait_for_timeout(1000)
        yield name, page.screenshot()
        page.close()
    page = window(browser, 1280, 1000)
    page.goto(index.with_name("gallery.html").as_uri())
    top = page.locator(".prompt").first.bounding_box()
    assert top is not None
    page.mouse.wheel(0, top["y"] - 80)  # below the bar at the top
    page.wait_for_timeout(2500)
    yield "report-gallery", page.screenshot()
    page.close()


# ---- the studio


def studio(browser: Browser, deployment: Deployment) -> Iterator[tuple[str, bytes]]:
    """The first example as the tuned model draws it, with its title, and the desk of captions."""
    with served([sys.executable, "-m", "posterpipe.cli", "studio", "--port"]) as url:
        page = window(browser, 1200, 1080)
        page.goto(url)
        page.get_by_role("heading", level=1).wait_for()
        page.locator(".st-key-do-example-0 button").click()  # puts in words and title
        page.get_by_text("Title, lettering, seed, model").click()
        page.wait_for_timeout(2000)  # drawn anew with the example, the page closes an open list
        page.get_by_label("Model", exact=True).click()
        page.get_by_role("option", name=re.compile("^(Champion|Checkpoint) ")).first.click()
        page.get_by_role("button", name="Generate").click()
        page.get_by_role("button", name="Save Poster").first.wait_for()
        page.get_by_role("button", name="Cancel").wait_for(state="detached")
        page.mouse.move(0, 0)
        page.wait_for_timeout(2000)
        yield "studio-make", page.screenshot()
        page.goto(f"{url}/captions")
        page.get_by_role("heading", level=1).wait_for()
        page.locator("img").nth(2).wait_for()
        page.locator("[data-testid=stStatusWidget]").wait_for(state="detached")
        page.wait_for_timeout(2000)
        yield "studio-captions", page.screenshot()
        page.close()


# ---- how pictures are taken

TAKES: dict[str, Take] = {"sheets": sheets, "dagster": dagster, "report": report, "studio": studio}


def window(browser: Browser, width: int, height: int, scheme: str = "light") -> Page:
    """A page of this size, as a first visitor sees it."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        locale="en-GB",
        reduced_motion="reduce",
    )
    context.set_default_timeout(PATIENCE_MS)
    return context.new_page()


def around(page: Page, selector: str, margin: int = 12) -> FloatRect:
    """The part of a page that shows all these elements."""
    boxes = [box for each in page.locator(selector).all() if (box := each.bounding_box())]
    left = min(box["x"] for box in boxes) - margin
    top = min(box["y"] for box in boxes) - margin
    right = max(box["x"] + box["width"] for box in boxes) + margin
    bottom = max(box["y"] + box["height"] for box in boxes) + margin
    return {"x": left, "y": top, "width": right - left, "height": bottom - top}


@contextmanager
def served(command: list[str]) -> Iterator[str]:
    """The address of a server, started with a free port as its last argument."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [*command, str(port)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while True:
            try:
                httpx.get(url, timeout=5)
                break
            except httpx.TransportError:
                if process.poll() is not None or time.monotonic() > deadline:
                    said = process.stderr.read().decode() if process.stderr else ""
                    raise SystemExit(f"{' '.join(command[1:4])}: did not start\n{said}") from None
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def as_png(image: Image.Image) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def small(png: bytes) -> bytes:
    """The picture with as many colours as its size allows."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in (None, *COLOURS):
        buffer = io.BytesIO()
        made = image if colours is None else image.quantize(colours)
        made.save(buffer, "PNG", optimize=True)
        if buffer.tell() <= LARGEST:
            break
    return buffer.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=TAKES, help="one part; all when left out")
    only = parser.parse_args().only
    deployment = Deployment(load_settings())
    if not deployment.published_path.exists() or not deployment.report_path.exists():
        print(f"There is nothing to show in {deployment.store_root}: run make demo first.")
        return 1
    os.environ.setdefault("DAGSTER_HOME", str(ROOT / ".dagster"))
    os.environ["DAGSTER_DISABLE_TELEMETRY"] = "1"
    from playwright.sync_api import sync_playwright

    from posterpipe_tests.browser.conftest import ARGUMENTS, executable

    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=list(ARGUMENTS))
        for name, take in TAKES.items():
            if only not in (None, name):
                continue
            for picture, png in take(browser, deployment):
                path = PICTURES / f"{picture}.png"
                path.write_bytes(small(png))
                print(f"{path.relative_to(ROOT)}  {path.stat().st_size // 1000} kB", flush=True)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
