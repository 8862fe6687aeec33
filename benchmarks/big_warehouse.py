"""A score warehouse of millions of rows, as years of trainings leave it, for benchmarks.

What belongs here: filling the real schema with made-up images and scores. What does not: what is
timed on it (`score_into_5m`, `leaderboard_5m`).
"""

from __future__ import annotations

from pathlib import Path

from posterpipe.core.variants import VARIANTS
from posterpipe.core.warehouse.database import Warehouse

METRICS = (
    "clip_t.crop", "clip_t.pad", "fidelity.holdout", "fidelity.training", "overfit_gap",
    "nearest_training", "diversity", "title_distance.drawn", "title_exact.drawn", "title_exact.set",
)  # fmt: skip
PROMPTS = 50
BLOCKED = f"(i < {4 * PROMPTS} AND i % 4 = 0)"
"""Of the i-th image: the first of `sd` of each prompt."""


def build(path: Path, *, scores: int, current: bool) -> Warehouse:
    """A warehouse with `scores` rows of fct_score: ten metrics of every image, four variants of
    every prompt and seed. Of each prompt, the base model's first image is black, so that its pairs
    have to be looked up. `current`: whether its images are the ones that reports are about."""
    warehouse = Warehouse(path)
    images = scores // len(METRICS)
    with warehouse.write() as connection:
        connection.execute(
            f"""
            INSERT INTO dim_prompt
            SELECT 'prompt ' || i, 'p' || i, 'a poster of thing ' || i, 'a poster of thing ' || i,
                '', TIMESTAMP '2026-01-01'
            FROM range({PROMPTS}) AS numbers(i)
            """
        )
        connection.execute(
            """
            INSERT INTO dim_metric
            SELECT metric_id, metric_id, 'encoder', '', '', 1, '', TIMESTAMP '2026-01-01'
            FROM (SELECT unnest(?) AS metric_id)
            """,
            [[f"{name}.scorer.0.v1" for name in METRICS]],
        )
        # Images in the order in which a suite is drawn: prompts, then seeds, then variants.
        connection.execute(
            f"""
            INSERT INTO fct_image BY NAME
            SELECT
                sha256('image ' || i) AS generation_key,
                sha256('pixels ' || i) AS pixel_key,
                ?[1 + i % 4] AS variant,
                'prompt ' || (i // 4) % {PROMPTS} AS prompt_key,
                'p' || (i // 4) % {PROMPTS} AS prompt_id,
                CASE WHEN variant LIKE '%negative%' THEN 'busy' ELSE '' END AS negative_prompt,
                i // (4 * {PROMPTS}) AS seed,
                'checkpoint ' || i % 2 AS checkpoint_id,
                sha256('blob ' || i) AS image,
                'blobs/' || i || '.png' AS image_path,
                CASE WHEN {BLOCKED} THEN 'blocked' ELSE 'ok' END AS status,
                CASE WHEN {BLOCKED} THEN 'all black' ELSE '' END AS reason,
                64 AS width,
                96 AS height,
                '{{}}' AS settings,
                'run ' || i // 200 AS run_id,
                TIMESTAMP '2026-01-01' + INTERVAL (i // 200) MINUTE AS recorded_at
            FROM range({images}) AS numbers(i)
            """,
            [list(VARIANTS)],
        )
        # Prompts differ, variants differ, and the rest is noise of each image and metric.
        connection.execute(
            f"""
            INSERT INTO fct_score BY NAME
            SELECT
                sha256('image ' || i) AS generation_key,
                metric_id,
                CASE WHEN NOT {BLOCKED} THEN
                    0.25 + 0.02 * sin((i // 4) % {PROMPTS}) + 0.01 * (i % 4)
                    + 0.05 * (hash(i, metric_id) % 1000 / 1000.0 - 0.5)
                END AS value,
                CASE WHEN {BLOCKED} THEN 'blocked' ELSE 'ok' END AS status,
                CASE WHEN {BLOCKED} THEN 'all black' ELSE '' END AS reason,
                TIMESTAMP '2026-01-01' + INTERVAL (i // 200) MINUTE AS scored_at,
                'run ' || i // 200 AS run_id
            FROM range({images}) AS numbers(i)
            CROSS JOIN (SELECT metric_id FROM dim_metric)
            """
        )
        if current:
            connection.execute(
                """
                INSERT INTO fct_title BY NAME
                SELECT generation_key, 'Thing' AS title, image, image_path, 'ok' AS status,
                    '' AS reason, recorded_at AS set_at
                FROM fct_image
                """
            )
            connection.execute(
                "INSERT INTO current_generation SELECT generation_key FROM fct_image"
            )
            connection.execute(
                "INSERT INTO current_metric "
                "SELECT 'benchmark', metric_id, row_number() OVER () FROM dim_metric"
            )
    return warehouse
