"""`load_code_location`: importing the definitions against a bare `import dagster, dagster_dbt`.

Both sides start a fresh interpreter; they take turns, so that noise meets both alike.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.rows import Row

ROUNDS = 9


def _seconds(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - started


def run() -> list[Row]:
    ours, peer = [], []
    for _ in range(ROUNDS + 1):
        ours.append(_seconds("import posterpipe.definitions"))
        peer.append(_seconds("import dagster, dagster_dbt"))
    # The first round warms the file cache and is not counted.
    ours_median, peer_median = statistics.median(ours[1:]), statistics.median(peer[1:])
    return [
        Row(
            "load_code_location",
            "s",
            round(ours_median, 3),
            round(peer_median, 3),
            "import dagster, dagster_dbt",
            round(ours_median / peer_median, 3),
            "ours / peer at most 1.2",
        )
    ]
