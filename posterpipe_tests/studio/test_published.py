"""The published scores as the studio reads them."""

from __future__ import annotations

import os
from pathlib import Path

import duckdb
import pandas as pd
import pytest

from posterpipe.core.warehouse.database import Warehouse
from posterpipe.core.warehouse.publication import publish_scores
from posterpipe.studio.published import Published, PublishedError


def publication(folder: Path, cosine: float) -> Path:
    """A published database of one image with that score."""
    private = folder / "warehouse.duckdb"
    with Warehouse(private).write() as connection:
        for table in ("fct_image", "fct_score", "dim_prompt", "current_generation"):
            connection.execute(f"DELETE FROM {table}")
        connection.execute(
            "INSERT INTO dim_prompt VALUES ('k', 'rocket', 'a <b>rocket</b>', 's', 't', now()::"
            "TIMESTAMP)"
        )
        connection.execute(
            "INSERT INTO fct_image VALUES ('g', 'p', 'sd', 'k', 'rocket', '', 7, 'base', 'i', "
            "'blobs/i.png', 'ok', '', 64, 96, '{}', 'run', now()::TIMESTAMP)"
        )
        connection.execute(
            "INSERT INTO fct_score VALUES ('g', 'clip_t.crop.x', ?, 'ok', '', now()::TIMESTAMP, "
            "'run')",
            [cosine],
        )
        connection.execute("INSERT INTO current_generation VALUES ('g')")
        connection.execute(
            "CREATE OR REPLACE TABLE leaderboard AS SELECT 'clip_t.crop.x' AS metric_id, "
            f"'sd' AS variant, {cosine} AS mean"
        )
    return publish_scores(private, folder / "public", run_id="run").database


def test_before_the_first_publication_there_is_no_signature(tmp_path: Path) -> None:
    published = Published(tmp_path / "scores.duckdb")
    assert published.signature() is None and published.published_at() is None


def test_each_publication_is_seen_and_the_file_is_never_held_open(tmp_path: Path) -> None:
    path = publication(tmp_path, 0.25)
    published = Published(path)
    before = published.signature()
    assert published.clip_metrics() == ["clip_t.crop.x"]
    assert published.images("rocket", "clip_t.crop.x")["clip_cosine"].tolist() == [0.25]
    held = {os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{name}")}  # fmt: skip
    assert not any("scores.duckdb" in target for target in held)
    publication(tmp_path, 0.5)
    assert published.signature() != before
    assert published.images("rocket", "clip_t.crop.x")["clip_cosine"].tolist() == [0.5]
    board = published.leaderboard()
    assert board is not None and board["mean"].astype(float).tolist() == [0.5]
    assert published.prompts()["prompt"].tolist() == ["a <b>rocket</b>"]


def test_titles_of_images_that_are_lettered_no_more_have_no_score(tmp_path: Path) -> None:
    path = publication(tmp_path, 0.25)
    path.chmod(0o644)

    def scores() -> list[float | None]:
        return Published(path).images("rocket", "title_exact.set.r")["clip_cosine"].tolist()

    with duckdb.connect(str(path)) as connection:
        connection.execute(
            "INSERT INTO fct_score VALUES ('g', 'title_exact.set.r', 1, 'ok', '', "
            "now()::TIMESTAMP, 'run')"
        )
        connection.execute(
            "INSERT INTO fct_title BY NAME SELECT 'g' AS generation_key, 'T' AS title, "
            "'' AS image, '' AS image_path, 'ok' AS status, '' AS reason, "
            "now()::TIMESTAMP AS set_at"
        )
    assert scores() == [1.0]
    with duckdb.connect(str(path)) as connection:
        connection.execute("DELETE FROM fct_title")
    assert pd.isna(scores()).tolist() == [True]


def test_a_publication_without_leaderboard_has_none(tmp_path: Path) -> None:
    path = publication(tmp_path, 0.25)
    path.chmod(0o644)
    with duckdb.connect(str(path)) as connection:
        connection.execute("DROP TABLE leaderboard")
    assert Published(path).leaderboard() is None


def test_a_damaged_file_is_told_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "scores.duckdb"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(PublishedError, match="materialize published_scores"):
        Published(path).prompts()
