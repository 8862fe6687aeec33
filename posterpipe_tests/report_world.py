"""A published study with real image files, for the tests of the score report.

What belongs here: filling a store with everything that the report shows, hostile input included.
What does not: expectations about its pages.
"""

from __future__ import annotations

import colorsys
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import duckdb
import pandas as pd
from PIL import Image, ImageDraw

from posterpipe.core.warehouse.database import Warehouse
from posterpipe.core.warehouse.publication import publish_scores
from posterpipe.core.warehouse.rows import insert, record_generations
from posterpipe.settings import default_root
from posterpipe_tests import study

HOSTILE_ID = '"><img src=x onerror=alert(1)>'
HOSTILE = (
    """<script>alert("script")</script> ' onmouseover=alert(2) " & {{ 7 * 7 }} {% raw %} """
    "مرحبا 海报 \u202e rocket 🚀 </textarea><!-- "
)
LONG = "a very long prompt " * 300
PROJECT = default_root() / "dbt_like_reports"

GONE = ("prompt-02", 11, "dreambooth")
"""The image whose file is no longer there."""


def publish_world(folder: Path) -> None:
    """Fills a store with 8 prompts of the study and 2 hostile ones, and publishes it.

    The fixture `published_world` is one that all tests share; `copy_of` gives one to change.
    """
    warehouse = study.fill(folder / "warehouse.duckdb", prompts=8, seeds=3, blocked=2)
    _add_hostile(warehouse)
    dbt = Path(sys.executable).with_name("dbt")
    subprocess.run(
        [dbt if dbt.exists() else "dbt", "--quiet", "--log-path", folder / "log", "run",
         "--project-dir", PROJECT, "--profiles-dir", PROJECT, "--target-path", folder / "target"],
        env={**os.environ, "POSTERPIPE_WAREHOUSE": str(warehouse.path)},
        check=True,
    )  # fmt: skip
    published = publish_scores(warehouse.path, folder / "public", run_id="publishing").database
    with duckdb.connect(str(published), read_only=True) as connection:
        paths = connection.execute(
            """
            SELECT image_path FROM prompt_drilldown
            WHERE image_path IS NOT NULL AND (prompt_id, seed, variant) <> (?, ?, ?)
            UNION SELECT titled_image_path FROM prompt_drilldown WHERE titled_image_path IS NOT NULL
            UNION SELECT image_path FROM current_poster WHERE image_path IS NOT NULL
            """,
            list(GONE),
        ).fetchall()
    draw_images(folder, (path for (path,) in paths))


def copy_of(world: Path, target: Path) -> Path:
    """A world to change: the images are linked, the published database is copied."""
    shutil.copytree(world / "blobs", target / "blobs", copy_function=os.link)
    shutil.copytree(world / "titled", target / "titled", copy_function=os.link)
    published = target / "public" / "scores.duckdb"
    published.parent.mkdir(parents=True)
    shutil.copyfile(world / "public" / "scores.duckdb", published)
    return target


def draw_images(store: Path, paths: Iterable[str]) -> None:
    """A small picture at each path, each another one."""
    for path in paths:
        number = int(hashlib.sha256(path.encode()).hexdigest(), 16)
        ground, thing = (
            tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue / 360, depth, light))
            for hue, depth, light in ((number % 360, 0.4, 0.9), (number // 360 % 360, 0.8, 0.5))
        )
        image = Image.new("RGB", (64, 96), ground)
        draw = ImageDraw.Draw(image)
        draw.ellipse((12 + number % 10, 28, 42 + number % 10, 58), fill=thing)
        draw.rectangle((12, 78, 52, 85), fill=thing)
        file = store / path
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)


def _add_hostile(warehouse: Warehouse) -> None:
    """Prompts, reasons and names as nobody should write them, as current images."""
    images = pd.concat(
        [study.generations(study.BASE, study.VARIANTS[:2], 2, 2),
         study.generations(study.NEW, study.VARIANTS[2:], 2, 2)],
        ignore_index=True,
    )  # fmt: skip
    second = images["prompt_id"] == "prompt-01"
    keys = "hostile" + images["generation_key"]
    images = images.assign(
        generation_key=keys,
        pixel_key="pixels " + keys,
        prompt_id=second.map({True: HOSTILE_ID, False: "long"}),
        prompt=second.map({True: HOSTILE, False: LONG}),
        score_text=second.map({True: HOSTILE, False: LONG}),
        negative_prompt=HOSTILE,
        title=HOSTILE,
        image=images["image"].str.replace("^.", "f", regex=True),
        image_path="blobs/ff/f" + images["image"].str[1:] + ".png",
    )
    failed = second & (images["seed"] == 12) & (images["variant"] == "sd")
    images.loc[failed, ["status", "reason", "image", "image_path"]] = [
        "failed", HOSTILE, "", ""
    ]  # fmt: skip
    scores = pd.DataFrame(
        {
            "generation_key": images["generation_key"],
            "metric_id": study.HEADLINE,
            "value": [0.2 + 0.01 * (n % 7) for n in range(len(images))],
            "status": images["status"],
            "reason": images["reason"],
            "scored_at": study.NOW,
            "run_id": HOSTILE,
        }
    )
    scores.loc[failed.to_numpy(), "value"] = None
    with warehouse.write() as connection:
        record_generations(connection, images, run_id=HOSTILE, recorded_at=study.NOW)
        insert(connection, "fct_score", scores)
        connection.register("added", images[["generation_key"]])
        connection.execute("INSERT INTO current_generation SELECT generation_key FROM added")
        connection.execute("UPDATE fct_promotion SET reason = reason || ?", [HOSTILE])
        connection.execute("UPDATE current_poster SET source_name = ? || source_name", [HOSTILE])
