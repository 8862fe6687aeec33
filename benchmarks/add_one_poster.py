"""`add_one_poster`: one more poster beside 10,000, and what a row costs as their number grows.

Real runs of the job `refresh_dataset` (raw_posters to training_csv, checks included), in one
process whose libraries are loaded, so that seconds are the steps' own. The peer is the pipeline
itself on an empty store, which is what anyone without incremental assets pays each time. The
profile is `starter` with its own captioner, a small one: with a real BLIP the cold run would be
many times as long, and the bound of 2 % no test. The posters are as big as those of
`prepare_images` and are copied into the store: 15 GB of disk in all. How cost grows with the number
of rows is measured without a captioner, on captions by people.

Between the runs everything in the store is made a day old: what is used again is marked as used
again (see `posterpipe.core.housekeeping.garbage`), which right after a run would cost nothing.
"""

from __future__ import annotations

import csv
import os
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
from PIL import Image

from benchmarks.prepare_images import draw_posters
from benchmarks.rows import Row
from posterpipe.core.parallel import parallel_map
from posterpipe.core.store import Store
from posterpipe.definitions import build_defs
from posterpipe.defs.resources import Deployment
from posterpipe.settings import Settings, load_settings

POSTERS = 10_000
SIZES = (1_000, 10_000, 100_000)
DRAWN = 150
"""Posters of `prepare_images` (JPEG, 1400x2100, grainy) that the 10,000 are put together from."""
SMALL = (64, 96)
"""Of those that only make rows, PNG."""
DAY = 86_400.0


class _Counted:
    """Counts the items that steps worked on, by the task that they report."""

    def __init__(self) -> None:
        self.items: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def task(
        self, description: str, total: int, unit: str = "items", *, already: int = 0
    ) -> Iterator[Callable[..., None]]:
        def tick(n: int = 1, **numbers: Any) -> None:
            with self._lock:
                self.items[description] += n

        yield tick


class _Deployment:
    """A landing folder and a store of their own."""

    def __init__(self, folder: Path) -> None:
        self.landing = folder / "landing"
        self.landing.mkdir(parents=True)
        self.captions = folder / "captions.csv"
        self.cpu_seconds = 0.0
        self.settings: Settings = load_settings(
            "starter",
            landing=self.landing,
            captions=self.captions,
            store=folder / "store",
            # Coloured fields are all the same to the captioner.
            checks={"min_distinct_captions": 0.0, "max_shared_captions": 1.0},
        )

    def refresh(self, instance: dg.DagsterInstance) -> tuple[dict[str, float], Counter[str]]:
        """Wall seconds by step, and items by task; `cpu_seconds` is what all steps took."""
        counted = _Counted()
        defs = build_defs(self.settings, Deployment(self.settings, counted))
        job = defs.resolve_job_def("refresh_dataset")
        began = time.process_time()
        result = job.execute_in_process(instance=instance)
        self.cpu_seconds = time.process_time() - began
        seconds = {
            event.step_key: event.step_success_data.duration_ms / 1000
            for event in result.all_events
            if event.event_type == dg.DagsterEventType.STEP_SUCCESS and event.step_key
        }
        return seconds, counted.items

    def let_a_day_pass(self) -> None:
        """The store was used last a day ago."""
        store = Store(self.settings.store)
        then = time.time() - DAY
        for folder in ("blobs", "tables", "training_sets", "lineages"):
            for parent, _, names in os.walk(store.root / folder, topdown=False):
                for name in names:
                    os.utime(os.path.join(parent, name), (then, then))
                os.utime(parent, (then, then))
        with closing(sqlite3.connect(store.root / "index.sqlite")) as index, index:
            index.execute("UPDATE results SET used_at = ?", [int(then)])


def _draw(path: Path, number: int) -> None:
    """A poster of 8 x 12 coloured fields, unlike every other."""
    fields = np.random.default_rng(number).integers(0, 256, (12, 8, 3), dtype=np.uint8)
    image = Image.fromarray(fields).resize(SMALL, Image.Resampling.NEAREST)
    image.save(path, compress_level=1)


class _Posters:
    """So many different posters as one likes, quickly: each the upper half of a drawn one above
    the lower half of another."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        draw_posters(folder, DRAWN)
        self._drawn = [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]

    def save(self, path: Path, number: int) -> None:
        """Up to 150 x 149 posters; as big a file as the drawn ones."""
        upper, step = number % DRAWN, number // DRAWN + 1
        poster = self._drawn[upper].copy()
        lower = self._drawn[(upper + step) % DRAWN]
        middle = poster.height // 2
        poster.paste(lower.crop((0, middle, *lower.size)), (0, middle))
        poster.save(path, quality=88)


def _one_more(work: Path, instance: dg.DagsterInstance, posters: int, drawn: _Posters) -> list[Row]:
    deployment = _Deployment(work)
    paths = [deployment.landing / f"{number:06}.jpg" for number in range(posters)]
    for _ in parallel_map(lambda number: drawn.save(paths[number], number), range(posters)):
        pass
    cold, cold_items = deployment.refresh(instance)
    cold_cpu = deployment.cpu_seconds
    if min(cold_items["resize posters"], cold_items["caption posters"]) != posters:
        raise RuntimeError(f"the cold run did not do all of the work: {dict(cold_items)}")
    deployment.let_a_day_pass()
    drawn.save(deployment.landing / "one more.jpg", posters)
    warm, items = deployment.refresh(instance)
    total, before = sum(warm.values()), sum(cold.values())
    names = ("read posters", "resize posters", "caption posters")
    rows = [
        Row(
            "add_one_poster.work",
            "items read, resized and captioned",
            float(sum(items[name] for name in names)),
            float(sum(cold_items[name] for name in names)),
            f"cold run with {posters:,}",
            required="at most 3: one read, one resized, one captioned",
        ),
        Row(
            "add_one_poster.time",
            "s",
            round(total, 3),
            round(before, 1),
            f"cold run with {posters:,}",
            round(total / before, 4),
            "ours / peer at most 0.02",
            lower_is_better=True,
        ),
        Row(
            "add_one_poster.cpu",
            "CPU s",
            round(deployment.cpu_seconds, 3),
            round(cold_cpu, 1),
            f"cold run with {posters:,}",
            round(deployment.cpu_seconds / cold_cpu, 4),
            lower_is_better=True,
        ),
    ]
    rows += [
        Row(f"add_one_poster.step.{name}", "s", round(value, 3), round(cold[name], 2), "cold")
        for name, value in sorted(warm.items(), key=lambda item: -item[1])
    ]
    return rows


def _a_row(work: Path, instance: dg.DagsterInstance, rows: int) -> dict[str, float]:
    """Microseconds a row of the run after one more poster, with captions by people: by step."""
    deployment = _Deployment(work)
    names = [f"{number:06}.png" for number in range(rows + 1)]
    for number, name in enumerate(names[:-1]):
        _draw(deployment.landing / name, number)
    with open(deployment.captions, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption"])
        writer.writerows([name, f"fields number {name}"] for name in names)
    deployment.refresh(instance)
    deployment.let_a_day_pass()
    _draw(deployment.landing / names[-1], rows)
    seconds, _ = deployment.refresh(instance)
    return {name: value / rows * 1e6 for name, value in seconds.items()}


def run(posters: int = POSTERS, sizes: tuple[int, ...] = SIZES) -> list[Row]:
    # Dagster's log of each step would be a hundred lines; failures are raised anyway.
    os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        with dg.DagsterInstance.ephemeral(tempdir=folder) as instance:
            drawn = _Posters(work / "drawn")
            _one_more(work / "warm up", instance, 8, drawn)
            rows = _one_more(work / "one more", instance, posters, drawn)
            costs = {size: _a_row(work / f"{size} rows", instance, size) for size in sizes}
    for size, cost in costs.items():
        rows.append(Row(f"add_one_poster.row.{size}", "µs a row", round(sum(cost.values()), 1)))
    small, large = sizes[-2], sizes[-1]
    for name in ("all", *costs[large]):
        ours, peer = (
            sum(costs[size].values()) if name == "all" else costs[size][name]
            for size in (large, small)
        )
        rows.append(
            Row(
                f"add_one_poster.flat.{name}",
                f"µs a row at {large:,}",
                round(ours, 2),
                round(peer, 2),
                f"at {small:,}",
                round(ours / peer, 2),
                "ours / peer at most 1.3" if name == "all" else "",
                lower_is_better=True,
            )
        )
    return rows
