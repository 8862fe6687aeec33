"""The estimates that the SQL of the reports calls: those of `statistics`, not a second set of them.

What belongs here: functions of DuckDB over `statistics`, and the plugin by which dbt loads them
(`dbt_like_reports/profiles.yml`). What does not: the estimates themselves, and what SQL can say.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from dbt.adapters.duckdb.plugins import BasePlugin
from duckdb.func import FunctionNullHandling, PythonUDFType

from posterpipe.core.statistics import bootstrap_intervals, has_spread, student_quantile

_ENDS = pa.struct([("low", pa.float64()), ("high", pa.float64())])
_AT_ONCE = 512
"""Samples whose resampled means are held at once: 40 MB."""


class Plugin(BasePlugin):
    """What dbt-duckdb calls with each database that it opens."""

    def configure_connection(self, conn: duckdb.DuckDBPyConnection) -> None:
        """Makes the functions known to it."""
        register(conn)


def register(connection: duckdb.DuckDBPyConnection) -> None:
    """Adds to the database, for as long as it is open:

    `bootstrap_interval(values)`, of DOUBLE[]: the interval of their mean as STRUCT(low DOUBLE, high
    DOUBLE), as `statistics.bootstrap_interval` gives it. NULL among the values is passed over; the
    result is NULL with fewer than two, or where all are the same. The order of the values counts in
    the last digits, so give it: `list(mean order by prompt_id)`.

    `student_quantile(probability, degrees)`: that of Student's t; NULL below one degree of freedom.
    """
    connection.create_function(
        "bootstrap_interval",
        _intervals,
        ["DOUBLE[]"],
        "STRUCT(low DOUBLE, high DOUBLE)",
        type=PythonUDFType.ARROW,
        null_handling=FunctionNullHandling.SPECIAL,
    )
    connection.create_function(
        "student_quantile",
        _quantile,
        ["DOUBLE", "BIGINT"],
        "DOUBLE",
        null_handling=FunctionNullHandling.SPECIAL,
    )


def _quantile(probability: float | None, degrees: int | None) -> float | None:
    if probability is None or degrees is None or degrees < 1:
        return None
    return student_quantile(probability, degrees)


def _intervals(column: Any) -> pa.Array:
    """Samples of one size share their draws, so they are answered together."""
    by_size: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)
    rows = column.to_pylist()
    for place, values in enumerate(rows):
        sample = np.array([value for value in values or [] if value is not None], dtype=float)
        if has_spread(sample):
            by_size[len(sample)].append((place, sample))
    ends: list[dict[str, float] | None] = [None] * len(rows)
    for samples in by_size.values():
        for start in range(0, len(samples), _AT_ONCE):
            part = samples[start : start + _AT_ONCE]
            found = bootstrap_intervals(np.stack([sample for _, sample in part]))
            for (place, _), (low, high) in zip(part, found, strict=True):
                ends[place] = {"low": float(low), "high": float(high)}
    return pa.array(ends, _ENDS)
