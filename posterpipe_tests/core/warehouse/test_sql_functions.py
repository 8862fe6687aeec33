"""What DuckDB answers, against what Python computes."""

from __future__ import annotations

from collections.abc import Iterator

import duckdb
import numpy as np
import pytest

from posterpipe.core.statistics import bootstrap_interval, student_quantile
from posterpipe.core.warehouse.sql_functions import register


@pytest.fixture
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        register(connection)
        yield connection


def test_sql_gives_the_interval_that_python_gives(database: duckdb.DuckDBPyConnection) -> None:
    rng = np.random.default_rng(1)
    samples = [rng.normal(0.3, 0.05, n).tolist() for n in (2, 3, 11, 12, 24, 24, 130)]
    found = database.execute(
        "select ends.low, ends.high from (select bootstrap_interval(unnest(?)) as ends)",
        [[[*sample, None] for sample in samples]],
    ).fetchall()
    expected = [bootstrap_interval(np.array(sample)) for sample in samples]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_many_samples_of_several_sizes_keep_their_places(
    database: duckdb.DuckDBPyConnection,
) -> None:
    found = database.execute(
        """
        select bootstrap_interval([i, i + 1, if(i % 2 = 0, i + 2, null)]) as ends, i
        from range(1100) as numbers(i)
        """
    ).fetchall()
    assert len(found) == 1100
    for ends, i in found:
        width = ends["high"] - ends["low"]
        assert ends["low"] < i < i + 1 < ends["high"]
        assert width == pytest.approx(2 * (4.302653 / 3**0.5 if i % 2 == 0 else 12.706205 / 2))


def test_a_sample_without_spread_has_no_interval(database: duckdb.DuckDBPyConnection) -> None:
    for values in ("[]", "[0.3]", "[0.3, null]", "null", "[0.1 + 0.2, 0.3, 0.3]", "[1, 1, 1, 1]"):
        found = database.sql(f"select bootstrap_interval({values})").fetchall()
        assert found == [(None,)], values


def test_sql_gives_the_quantile_that_python_gives(database: duckdb.DuckDBPyConnection) -> None:
    for probability in (0.975, 0.8, 1 - 0.025 / 112):
        for degrees in (1, 2, 23, 119):
            ((found,),) = database.execute(
                "select student_quantile(?, ?)", [probability, degrees]
            ).fetchall()
            assert found == student_quantile(probability, degrees)
    assert database.sql(
        "select student_quantile(0.8, 0), student_quantile(0.8, null)"
    ).fetchall() == [(None, None)]


def test_the_same_values_give_the_same_digits(database: duckdb.DuckDBPyConnection) -> None:
    query = """
        select bootstrap_interval(list(sin(i * g) order by i)) from range(40) as a(i),
        range(1, 60) as b(g) group by g order by g
    """
    first = database.execute(query).fetchall()
    with duckdb.connect() as another:
        register(another)
        assert another.execute(query).fetchall() == first
