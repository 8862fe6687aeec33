"""`load_code_location`: importing the definitions against a bare `import dagster, dagster_dbt`.

Both sides start a fresh interpreter; they take turns, so that noise meets both alike. The first
figure is what the process takes from its start to its end, `.import` the import alone.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.rows import Row

ROUNDS = 9
SIDES = {"ours": "import posterpipe.definitions", "peer": "import dagster, dagster_dbt"}
TIMED = "import time; began = time.perf_counter(); {}; print(time.perf_counter() - began)"


def _seconds(code: str) -> tuple[float, float]:
    """Of the whole process, and of the import."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", TIMED.format(code)], check=True, capture_output=True, text=True
    )
    return time.perf_counter() - started, float(done.stdout)


def run() -> list[Row]:
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for _ in range(ROUNDS + 1):
        for side, code in SIDES.items():
            taken[side].append(_seconds(code))
    rows = []
    for place, name in enumerate(("load_code_location", "load_code_location.import")):
        # The first round warms the file cache and is not counted.
        ours, peer = (statistics.median(t[place] for t in taken[side][1:]) for side in SIDES)
        rows.append(
            Row(
                name, "s", round(ours, 3), round(peer, 3), SIDES["peer"], round(ours / peer, 3),
                "ours / peer at most 1.2", lower_is_better=True,
            )
        )  # fmt: skip
    return rows
