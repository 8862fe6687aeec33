"""Writing scores: what comes back is what the warehouse holds, read or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from posterpipe.core.metrics import base
from posterpipe.core.metrics.base import SCORE_COLUMNS, record_scores, summary
from posterpipe.core.warehouse.database import Warehouse
from posterpipe_tests import study

IMAGES = study.generations(study.BASE, ["sd"], 3, 1)
METRICS = [study.metric(study.HEADLINE, "CLIP-T"), study.metric(study.PAD, "CLIP-T", "pad")]


def scores(values: Sequence[float | str], metric_id: str = study.HEADLINE) -> pd.DataFrame:
    """SCORE_COLUMNS of the first images: a number, or the status of one without."""
    rows = [
        (key, metric_id, np.nan, value, "why")
        if isinstance(value, str)
        else (key, metric_id, value, "ok", "")
        for key, value in zip(IMAGES["generation_key"], values, strict=False)
    ]
    return pd.DataFrame(rows, columns=list(SCORE_COLUMNS)).astype({"value": "float64"})


def written(warehouse: Warehouse, rows: pd.DataFrame) -> pd.DataFrame:
    """What `record_scores` returns, after a look at what a fresh reader finds."""
    returned = record_scores(warehouse, IMAGES, METRICS, rows, run_id="run", step="step")
    fresh = warehouse.scores(study.HEADLINE, IMAGES["generation_key"], with_failed=True)
    first, second = (
        found.sort_values("generation_key", ignore_index=True) for found in (returned, fresh)
    )
    pd.testing.assert_frame_equal(first, second)
    return returned.set_index("generation_key")


def test_what_comes_back_of_scores_is_what_a_fresh_reader_finds(tmp_path: Path) -> None:
    nan = np.nan
    cases: dict[str, tuple[list[pd.DataFrame], list[float], list[str]]] = {
        "all new": (
            [scores([0.1, "blocked", "failed"])], [0.1, nan, nan], ["ok", "blocked", "failed"]
        ),
        "one known": ([scores([0.1]), scores([0.9, 0.2, 0.3])], [0.1, 0.2, 0.3], ["ok"] * 3),
        "only the rest": (
            [scores([0.1, 0.2]), scores([0.9, 0.9, "failed"])[2:]], [0.1, 0.2, nan],
            ["ok", "ok", "failed"],
        ),
        "failed ones replaced": (
            [scores(["failed"] * 3), scores([0.1, 0.2, "blocked"])], [0.1, 0.2, nan],
            ["ok", "ok", "blocked"],
        ),
        "failed again": (
            [scores(["failed", 0.2, 0.3]), scores(["failed"])], [nan, 0.2, 0.3],
            ["failed", "ok", "ok"],
        ),
        "a key twice": (
            [pd.concat([scores(["failed", 0.2, 0.3]), scores([0.1])])], [0.1, 0.2, 0.3], ["ok"] * 3
        ),
        "another metric beside it": (
            [pd.concat([scores([0.7] * 3, study.PAD), scores([0.1, 0.2, 0.3])])], [0.1, 0.2, 0.3],
            ["ok"] * 3,
        ),
        "nothing to write": ([scores([0.1, 0.2, 0.3]), scores([])], [0.1, 0.2, 0.3], ["ok"] * 3),
    }  # fmt: skip
    for name, (steps, values, statuses) in cases.items():
        warehouse = Warehouse(tmp_path / f"{name}.duckdb")
        *before, last = steps
        for rows in before:
            written(warehouse, rows)
        found = written(warehouse, last).loc[IMAGES["generation_key"]]
        np.testing.assert_array_equal(found["value"], values, err_msg=name)
        assert found["status"].tolist() == statuses, name


def test_scores_that_are_all_new_are_not_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> pd.DataFrame:
        raise AssertionError("the table of all scores was read")

    monkeypatch.setattr(base, "read_scores", refuse)
    assert len(written(Warehouse(tmp_path / "w.duckdb"), scores([0.1, "blocked", 0.3]))) == 3


def test_a_summary_counts_images_without_a_score_and_leaves_them_out_of_the_mean() -> None:
    rows = pd.DataFrame(
        {"variant": ["sd", "sd", "sd", "dreambooth"], "value": [1.0, 3.0, np.nan, np.nan]}
    )
    means = summary(rows, "value", "variant")
    assert means["variant"].tolist() == ["sd", "dreambooth"]
    assert means["images"].tolist() == [3, 1]
    assert means["mean"].tolist() == pytest.approx([2, np.nan], nan_ok=True)
    assert means["deviation"].tolist() == pytest.approx([2**0.5, np.nan], nan_ok=True)
