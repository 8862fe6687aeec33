"""A warehouse with everything that reports look at, filled through the functions of `core`.

What belongs here: one small study whose numbers come from a seeded generator. What does not: images
(only their paths are kept), and any expected result.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from posterpipe.core.champion.decisions import pin, unpin
from posterpipe.core.metrics.base import Metric, record_scores
from posterpipe.core.metrics.titles_read import record_readings, record_titles
from posterpipe.core.store import content_key
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.core.warehouse.rows import fill_checkpoints, insert, replace_posters

NOW = dt.datetime(2026, 1, 2, 3, 4, 5)
BASE, OLD, NEW = "base1", "tuned1", "tuned2"
VARIANTS = ("sd", "sd_negative", "dreambooth", "dreambooth_negative")
HEADLINE = "clip_t.crop.scorer.abc.v1"
PAD = "clip_t.pad.scorer.abc.v1"
HOLDOUT = "similarity.holdout.h1.scorer.abc.v1"
TRAINING = "similarity.training.t1.scorer.abc.v1"
GAP = "overfit_gap.g1.scorer.abc.v1"
NEAREST = "nearest.training.t1.scorer.abc.v1"
SPECIFIC = "clip_specific.s1.crop.scorer.abc.v1"
CONTROL = "clip_control.s1.crop.scorer.abc.v1"
DIVERSITY = "diversity.d1.crop.scorer.abc.v1"
RANK = "clip_rank.s1.crop.scorer.abc.v1"
EFFECTS = {"sd": 0.0, "sd_negative": 0.004, "dreambooth": 0.02, "dreambooth_negative": 0.03}


def metric(metric_id: str, name: str, preprocessing: str = "crop") -> Metric:
    return Metric(metric_id, name, "scorer", "abc", preprocessing, 1, "-1 to 1")


def generations(
    checkpoint: str, variants: Sequence[str], prompts: int, seeds: int, *, blocked: int = 0
) -> pd.DataFrame:
    """`generations.COLUMNS`; the first `blocked` images are."""
    rows: list[dict[str, Any]] = []
    for prompt in range(prompts):
        for seed in range(seeds):
            for variant in variants:
                key = content_key(checkpoint, variant, prompt, seed)
                status = "blocked" if len(rows) < blocked else "ok"
                rows.append(
                    {
                        "generation_key": key,
                        "pixel_key": f"pixels {key}",
                        "variant": variant,
                        "prompt_id": f"prompt-{prompt:02}",
                        "prompt": f"a poster of thing {prompt}",
                        "score_text": f"thing {prompt}",
                        "negative_prompt": "busy" if variant.endswith("negative") else "",
                        "title": f"Thing {prompt}" if prompt % 2 else "",
                        "seed": 11 + seed,
                        "checkpoint_id": checkpoint,
                        "image": content_key("image", key),
                        "image_path": f"blobs/{key[:2]}/{key}.png",
                        "status": status,
                        "reason": "" if status == "ok" else "all black",
                        "width": 64,
                        "height": 96,
                        "settings": "{}",
                    }
                )
    return pd.DataFrame(rows)


def values(
    images: pd.DataFrame, metric_id: str, rng: np.random.Generator, *, mean: float, spread: float
) -> pd.DataFrame:
    """SCORE_COLUMNS: prompts differ, seeds differ less, variants by EFFECTS."""
    prompts = {name: rng.normal(0, spread) for name in sorted(images["prompt_id"].unique())}
    own = {
        (name, variant): rng.normal(0, spread / 3)
        for name in prompts
        for variant in sorted(images["variant"].unique())
    }
    rows = []
    for row in images.itertuples(index=False):
        value = mean + prompts[row.prompt_id] + own[row.prompt_id, row.variant]
        value += EFFECTS[str(row.variant)] + rng.normal(0, spread / 3)
        if row.status != "ok":
            rows.append((row.generation_key, metric_id, np.nan, row.status, row.reason))
        else:
            rows.append((row.generation_key, metric_id, value, "ok", ""))
    names = ["generation_key", "metric_id", "value", "status", "reason"]
    return pd.DataFrame(rows, columns=names).astype({"value": "float64"})


def diversities(images: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """SCORE_COLUMNS: prompts differ by orders of magnitude."""
    table = values(images, DIVERSITY, rng, mean=-4, spread=1.5)
    return table.assign(value=np.exp(table["value"]))


def posters() -> pd.DataFrame:
    """Columns of current_poster."""
    rows = []
    for number in range(8):
        status = "ok" if number < 5 else "rejected" if number < 7 else "duplicate"
        usable = status == "ok"
        rows.append(
            {
                "poster_id": f"poster{number}",
                "source_name": f"poster {number}.png",
                "status": status,
                "reason": "" if usable else "why",
                "format": "PNG",
                "width": 100,
                "height": 150,
                "size_bytes": 1000 + number,
                "near_duplicate_of": "poster0" if number == 1 else "",
                "image": f"resized{number}" if usable else None,
                "image_path": f"blobs/re/resized{number}.png" if usable else None,
                "caption": f"a thing {number}" if usable else None,
                "caption_source": ("human" if number == 0 else "model") if usable else None,
                "caption_status": "ok" if usable else None,
                "caption_reason": ("repeats itself" if number == 4 else "") if usable else None,
                "in_training_set": usable and number != 4,
                "recorded_at": NOW,
                "run_id": "posters run",
            }
        )
    return pd.DataFrame(rows)


def fill(
    path: Path,
    *,
    prompts: int = 6,
    seeds: int = 3,
    blocked: int = 2,
    seed: int = 7,
) -> Warehouse:
    """A study of a base model, a checkpoint of before, and the newest one."""
    rng = np.random.default_rng(seed)
    warehouse = Warehouse(path)
    base = generations(BASE, VARIANTS[:2], prompts, seeds, blocked=blocked)
    old = generations(OLD, VARIANTS[2:], prompts, seeds)
    new = generations(NEW, VARIANTS[2:], prompts, seeds, blocked=1)
    headline, pad = metric(HEADLINE, "CLIP-T"), metric(PAD, "CLIP-T", "pad")
    fidelity = [
        metric(HOLDOUT, "CLIP-I holdout"),
        metric(TRAINING, "CLIP-I training"),
        metric(GAP, "CLIP-I overfit gap"),
        metric(NEAREST, "CLIP-I nearest training poster"),
    ]
    apart = [
        metric(SPECIFIC, "CLIP-T specific"),
        metric(CONTROL, "CLIP-T control"),
        metric(RANK, "CLIP-T rank"),
    ]
    diversity = metric(DIVERSITY, "diversity")
    diversity_rng = np.random.default_rng(seed + 2)
    apart_rng = np.random.default_rng(seed + 1)  # what comes after keeps its numbers
    for tuned in (old, new):
        current = pd.concat([base, tuned], ignore_index=True)
        record_scores(
            warehouse, current, [headline],
            values(current, HEADLINE, rng, mean=0.25, spread=0.03),
            run_id="run", step="clip_scores", make_current=True,
        )  # fmt: skip
        judged = [
            values(current, m.metric_id, rng, mean=0.5, spread=0.05) for m in [pad, *fidelity]
        ]
        judged += [values(current, m.metric_id, apart_rng, mean=0.1, spread=0.01) for m in apart]
        judged.append(diversities(current, diversity_rng))
        record_scores(
            warehouse, current, [headline, pad, *fidelity, *apart, diversity], pd.concat(judged),
            run_id="run", step="fidelity_scores",
        )  # fmt: skip
        drawn = current[current["status"] == "ok"]
        nearest = pd.DataFrame(
            {
                "generation_key": drawn["generation_key"],
                "metric_id": NEAREST,
                "nearest_poster": "resized1",
                "similarity": rng.uniform(0.4, 0.9, len(drawn)),
                "similarity_threshold": 0.85,
                "copy_sensitivity": 0.72,
                "hash_poster": "resized2",
                "hash_distance": rng.integers(5, 40, len(drawn)),
                "hash_threshold": 9,
                "measured_at": NOW,
                "run_id": "run",
            }
        )
        nearest["copied"] = (nearest["similarity"] > 0.85) | (nearest["hash_distance"] <= 9)
        with warehouse.write() as connection:
            insert(connection, "fct_nearest", nearest)
        titled = current[current["title"] != ""]
        record_titles(
            warehouse,
            titled.assign(
                image_path="titled/" + titled["image_path"], style="grotesque", cap_height=12,
                contrast=5.0, scrim=False, covered=0.1,
            ),
            current["generation_key"],
            run_id="run",
        )  # fmt: skip
        for lettering, chance in (("drawn", 0.1), ("set", 0.9)):
            _read(warehouse, titled, lettering, chance, rng)
    facts = [
        {
            "checkpoint_id": name,
            "base_model": BASE,
            "training_set_version": f"training set of {name}",
            "settings": "{}",
            "trained_at": NOW + dt.timedelta(days=day),
            "run_id": f"training {name}",
        }
        for day, name in enumerate((OLD, NEW))
    ]
    with warehouse.write() as connection:
        fill_checkpoints(connection, pd.DataFrame(facts))
        replace_posters(connection, posters())
        insert(connection, "fct_promotion", decisions())
    return warehouse


def _read(
    warehouse: Warehouse,
    titled: pd.DataFrame,
    lettering: str,
    chance: float,
    rng: np.random.Generator,
) -> None:
    tail = f"{lettering}.reader.v1"
    drawn = titled[titled["status"] == "ok"]
    exact = rng.random(len(drawn)) < chance
    read = pd.DataFrame(
        {
            "generation_key": drawn["generation_key"],
            "title": drawn["title"],
            "read": np.where(exact, drawn["title"].str.upper(), "XYZ"),
            "distance": np.where(exact, 0.0, rng.uniform(0.3, 1, len(drawn))),
            "exact": exact,
        }
    )
    scores = []
    metrics = []
    for start, column in (("title_distance", "distance"), ("title_exact", "exact")):
        name = f"{start}.{tail}"
        metrics.append(metric(name, f"{start}, {lettering}"))
        rows = titled[["generation_key", "status", "reason"]].merge(
            read[["generation_key", column]], on="generation_key", how="left"
        )
        rows = rows.rename(columns={column: "value"}).assign(metric_id=name)
        scores.append(rows.astype({"value": "float64"}))
    record_scores(
        warehouse, titled, metrics, pd.concat(scores), run_id="run",
        step=f"legibility_scores {lettering}",
    )  # fmt: skip
    record_readings(warehouse, read, lettering, run_id="run")


def decisions() -> pd.DataFrame:
    """The gate held the first checkpoint, a person pinned it and let go, the second is promoted,
    with PickScore, which was not measured before."""
    checks = [
        {"name": "complete", "outcome": "pass", "value": 0.0, "low": None, "high": None,
         "limit": 0.0, "reason": "36 of 36 cells have a score"},
        {"name": "CLIP-T", "outcome": "open", "value": 0.01, "low": -0.02, "high": 0.04,
         "limit": -0.01, "detectable": 0.042, "reason": "may be lower"},
    ]  # fmt: skip
    rows = pd.DataFrame([_decision("hold", OLD, BASE, checks, 1)])
    pinned = pin(rows, OLD, BASE, who="ada", why="looks fine",
                 decided_at=NOW + dt.timedelta(hours=2))  # fmt: skip
    rows = pd.concat([rows, pinned], ignore_index=True)
    free = unpin(rows, BASE, who="ada", why="enough", decided_at=NOW + dt.timedelta(hours=3))
    passed = [{**check, "outcome": "pass"} for check in checks]
    preferred = {"estimate": 0.4, "low": 0.1, "high": 0.7, "prompts": 24, "win_rate": 0.875,
                 "win_low": 0.69, "win_high": 0.957}  # fmt: skip
    beside = {"sensitivity": 0.72, "lost": 0, "preference": preferred,
              "specific": preferred | {"estimate": -0.01, "low": -0.02, "high": 0.003}}  # fmt: skip
    promoted = pd.DataFrame([_decision("promote", NEW, BASE, passed, 30, **beside)])
    return pd.concat([rows, free, promoted], ignore_index=True)


def _decision(
    verdict: str, checkpoint: str, before: str, checks: list[dict], hours: int, **beside: object
) -> dict[str, object]:
    numbers = {"checks": checks, "expected": 36, "missing": 0, "blocked": 1, "copies": 2,
               "compared": 35, **beside}  # fmt: skip
    return {
        "decision_id": content_key(verdict, checkpoint, hours),
        "decided_at": NOW + dt.timedelta(hours=hours),
        "checkpoint_id": checkpoint,
        "champion_before": before,
        "decision": verdict,
        "reason": f"{verdict}: because",
        "numbers": json.dumps(numbers),
        "decided_by": "gate",
        "run_id": "gate run",
        "base_model": BASE,
    }
