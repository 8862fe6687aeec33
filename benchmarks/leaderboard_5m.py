"""`leaderboard_5m`: the leaderboard over 5 million scores, against a bare aggregate of them.

Ours is the SQL of the dbt model, as dbt compiles it: means over prompts of means over seeds, with
intervals, and differences to `sd` paired image by image. The peer is the least that DuckDB can be
asked for the same rows: images, mean and deviation by metric and variant, which is what a user
types first. Both find variants and current images by the same joins. One thread, as dbt runs it;
the two take turns, each three times. `.cpu` is the same in CPU seconds, which other work on the
machine changes little.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb

from benchmarks.big_warehouse import build
from benchmarks.rows import Row
from posterpipe.core.warehouse.sql_functions import register
from posterpipe.settings import default_root

SCORES = 5_000_000
ROUNDS = 3
REQUIRED = 2.0

BARE = """
SELECT
    score.metric_id,
    image.variant,
    count(*) AS images,
    avg(score.value) AS mean,
    stddev_samp(score.value) AS deviation
FROM fct_score AS score
JOIN fct_image AS image USING (generation_key)
JOIN current_generation USING (generation_key)
GROUP BY score.metric_id, image.variant
"""
LEAST = (
    "SELECT metric_id, count(*), avg(value), stddev_samp(value) FROM fct_score GROUP BY metric_id"
)
"""Without variant and without a join: what reading the column costs."""


def run(scores: int = SCORES) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Named as the pipeline names it: the compiled model names its database.
        warehouse = build(folder / "warehouse.duckdb", scores=scores, current=True)
        queries = {"ours": compiled(folder, warehouse.path), "bare": BARE, "least": LEAST}
        seconds: dict[str, list[float]] = {side: [] for side in queries}
        cpu: dict[str, list[float]] = {side: [] for side in queries}
        counts: dict[str, int] = {}
        with duckdb.connect(str(warehouse.path), read_only=True) as connection:
            register(connection)
            connection.execute("SET threads = 1")
            for number in range(ROUNDS + 1):
                for side, query in queries.items():
                    started, busy = time.perf_counter(), time.process_time()
                    found = connection.execute(query).df()
                    if number:  # the first one reads the file
                        seconds[side].append(time.perf_counter() - started)
                        cpu[side].append(time.process_time() - busy)
                    if side != "least":
                        counts[side] = int(found["images"].sum())
    if counts["ours"] != counts["bare"] or counts["ours"] != scores:
        raise RuntimeError(
            f"leaderboard_5m: the leaderboard counts {counts['ours']} images, the aggregate "
            f"{counts['bare']}: they are not about the same rows, so their times say nothing"
        )
    took = {side: statistics.median(values) for side, values in seconds.items()}
    busy_for = {side: statistics.median(values) for side, values in cpu.items()}
    return [
        Row(
            "leaderboard_5m", f"s over {scores:,} scores", round(took["ours"], 2),
            round(took["bare"], 2), "bare DuckDB aggregate by metric and variant",
            round(took["ours"] / took["bare"], 2), f"ours / peer at most {REQUIRED:g}",
            lower_is_better=True,
        ),
        Row(
            "leaderboard_5m.cpu", "CPU s", round(busy_for["ours"], 3), round(busy_for["bare"], 3),
            "bare DuckDB aggregate by metric and variant",
            round(busy_for["ours"] / busy_for["bare"], 2), lower_is_better=True,
        ),
        Row(
            "leaderboard_5m.no_join", "s", round(took["ours"], 2), round(took["least"], 2),
            "bare aggregate by metric alone, no join", round(took["ours"] / took["least"], 2),
            lower_is_better=True,
        ),
    ]  # fmt: skip


def compiled(folder: Path, warehouse: Path) -> str:
    """The SQL of the model `leaderboard`, as dbt compiles it for that database."""
    project = default_root() / "dbt_like_reports"
    beside = Path(sys.executable).with_name("dbt")
    command = [
        str(beside) if beside.exists() else "dbt", "--quiet", "compile", "--select", "leaderboard",
        "--project-dir", str(project), "--profiles-dir", str(project),
        "--target-path", str(folder / "target"), "--log-path", str(folder / "logs"),
    ]  # fmt: skip
    environment = os.environ | {
        "POSTERPIPE_WAREHOUSE": str(warehouse),
        "DBT_SEND_ANONYMOUS_USAGE_STATS": "false",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    (file,) = (folder / "target" / "compiled").rglob("marts/leaderboard.sql")
    return file.read_text(encoding="utf-8")
