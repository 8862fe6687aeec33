"""`score_into_5m`: scoring one new checkpoint beside 5 million scores, against an empty warehouse.

What the asset `clip_scores` runs for the images of a new checkpoint: ask which are scored already,
encode the others, write images, metric and scores, make them the current ones, read them back.
Each side has a store of its own, so that both encode everything; they take turns, each round with
another checkpoint, and in nine rounds, since most of the time is the encoder's, which varies.
`score_into_5m.warehouse` is the same for images that the store knows, where the database is nearly
all of the work, `score_into_5m.ten_metrics` writing ten scores an image, and `score_into_5m.cpu` is
the first in CPU seconds, which other work on the machine changes little.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.big_warehouse import METRICS, build
from benchmarks.rows import Row
from posterpipe.core.generations import COLUMNS, generation_key
from posterpipe.core.images import png_bytes
from posterpipe.core.metrics.base import Metric, record_scores
from posterpipe.core.metrics.clip import score_generations
from posterpipe.core.progress import NoProgress
from posterpipe.core.prompts import Prompt, load_suite
from posterpipe.core.store import Store
from posterpipe.core.variants import TUNED_VARIANTS
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.settings import Settings, load_settings
from posterpipe.starter.render import render
from posterpipe.starter.world import sample_scene

SCORES = 5_000_000
ROUNDS = 9
REQUIRED = 1.2


def run(scores: int = SCORES, rounds: int = ROUNDS) -> list[Row]:
    settings = load_settings("starter")
    suite = load_suite(settings.path(settings.prompt_suite))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides = {
            "full": _Side(folder / "full", scores),
            "empty": _Side(folder / "empty", 0),
        }
        seconds: dict[tuple[str, str], list[float]] = {}
        for number in range(rounds + 1):
            # Either goes first in turn: what follows may find caches and memory in another state.
            for side_name, side in sorted(sides.items(), reverse=bool(number % 2)):
                generations = side.draw(suite, f"checkpoint {number}")
                for what, passed in side.score(generations, settings, number).items():
                    if number:  # the first one loads libraries and reads files
                        seconds.setdefault((side_name, what), []).append(passed)
    took = {key: statistics.median(values) for key, values in seconds.items()}
    rows = []
    for what in ("", ".cpu", ".warehouse", ".ten_metrics"):
        ours, peer = took["full", what], took["empty", what]
        unit = "CPU s" if what == ".cpu" else "s"
        rows.append(
            Row(
                f"score_into_5m{what}",
                f"{unit} for {len(generations)} images", round(ours, 3),
                round(peer, 3), "in an empty warehouse", round(ours / peer, 2),
                "" if what else f"ours / peer at most {REQUIRED:g}",
                lower_is_better=True,
            )
        )  # fmt: skip
    return rows


class _Side:
    """A warehouse and a store."""

    def __init__(self, folder: Path, scores: int) -> None:
        folder.mkdir()
        self.store = Store(folder / "store")
        path = folder / "warehouse.duckdb"
        self.warehouse = build(path, scores=scores, current=True) if scores else Warehouse(path)

    def draw(self, suite: list[Prompt], checkpoint: str) -> pd.DataFrame:
        """A table of generations of two variants of a suite; every image is another one."""
        rows = []
        for prompt in suite:
            for seed in prompt.seeds:
                for variant in TUNED_VARIANTS:
                    key = f"{checkpoint} {variant} {prompt.prompt_id} {seed}"
                    rng = np.random.default_rng([*key.encode()])
                    image = render(sample_scene(rng, style="poster"), 64, 96, supersample=1)
                    blob = self.store.put(png_bytes(image), ".png")
                    path = self.store.path(blob, ".png").relative_to(self.store.root).as_posix()
                    rows.append(
                        {
                            "generation_key": generation_key(
                                key, variant, prompt.prompt_id, prompt.score_text, prompt.title
                            ),
                            "pixel_key": key,
                            "variant": variant,
                            "prompt_id": prompt.prompt_id,
                            "prompt": prompt.prompt,
                            "score_text": prompt.score_text,
                            "negative_prompt": prompt.negative,
                            "title": prompt.title,
                            "seed": seed,
                            "checkpoint_id": checkpoint,
                            "image": blob,
                            "image_path": path,
                            "status": "ok",
                            "reason": "",
                            "width": 64,
                            "height": 96,
                            "settings": "{}",
                        }
                    )
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def score(self, generations: pd.DataFrame, settings: Settings, number: int) -> dict[str, float]:
        """Seconds by what was done."""
        busy = time.process_time()
        took = {"": self._clip(generations, settings, f"run {number}")}
        took[".cpu"] = time.process_time() - busy
        # The same pictures in another study: the store has their cosines, the warehouse no row.
        again = generations.assign(
            generation_key=[f"again {key}" for key in generations["generation_key"]]
        )
        took[".warehouse"] = self._clip(again, settings, f"run {number} again")
        metrics = [Metric(f"{name}.new.v1", name, "", "", "", 1, "") for name in METRICS]
        values = pd.concat(
            [
                pd.DataFrame(
                    {
                        "generation_key": generations["generation_key"],
                        "metric_id": metric.metric_id,
                        "value": 0.5,
                        "status": "ok",
                        "reason": "",
                    }
                )
                for metric in metrics
            ],
            ignore_index=True,
        )
        started = time.perf_counter()
        record_scores(
            self.warehouse, generations, metrics, values, run_id="benchmark", step="fidelity_scores"
        )
        took[".ten_metrics"] = time.perf_counter() - started
        return took

    def _clip(self, generations: pd.DataFrame, settings: Settings, run_id: str) -> float:
        started = time.perf_counter()
        scored = score_generations(
            self.store, self.warehouse, generations, settings.scorer, settings.root, NoProgress(),
            run_id=run_id,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        if scored.added != len(generations) or not (scored.scores["status"] == "ok").all():
            raise RuntimeError(f"score_into_5m: {scored.added} of {len(generations)} were scored")
        return seconds
