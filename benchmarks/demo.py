"""`demo`: wall time of the whole chain from an empty store, by stage, and of a second run.

There is no peer: nobody else's pipeline does this work. Our bound: 8 minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.rows import Row


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "POSTERPIPE_STORE": str(Path(folder) / "store"),
            "DAGSTER_HOME": str(Path(folder) / "dagster"),
        }
        timings = Path(folder) / "timings.json"
        command = [sys.executable, "-m", "posterpipe.cli", "demo", "--timings", str(timings)]
        seconds = []
        stages: dict[str, float] = {}
        for _ in ("cold", "unchanged"):
            started = time.perf_counter()
            subprocess.run(command, env=environment, check=True)
            seconds.append(time.perf_counter() - started)
            stages = stages or json.loads(timings.read_text(encoding="utf-8"))["stages"]
    rows = [Row(f"demo.{stage}", "s", round(value, 1)) for stage, value in stages.items()]
    rows.append(Row("demo.total", "s", round(seconds[0], 1), required="at most 480 s"))
    rows.append(Row("demo.unchanged", "s", round(seconds[1], 1)))
    return rows
