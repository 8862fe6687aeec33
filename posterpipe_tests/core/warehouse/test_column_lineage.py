"""Column lineage: what a column is computed from, through everything between."""

from __future__ import annotations

from posterpipe.core.warehouse.column_lineage import column_origins

COLUMNS = {
    "fct_score": {"metric_id": "VARCHAR", "value": "DOUBLE", "generation_key": "VARCHAR"},
    "fct_image": {"generation_key": "VARCHAR", "variant": "VARCHAR", "seed": "BIGINT"},
}


def test_origins_are_found_through_ctes_joins_unions_and_aggregates() -> None:
    sql = """
        with scores as (
            select score.*, image.variant
            from "warehouse"."main"."fct_score" as score
            join "warehouse"."main"."fct_image" as image using (generation_key)
        ),
        means as (
            select variant, avg(value) filter (where metric_id like 'clip%') as mean, count(*) as n
            from scores
            group by variant
        )
        select variant as name, round(mean, 3) as mean, n from means
        union all
        select 'all', avg(value), count(*) from fct_score
    """
    assert column_origins(sql, COLUMNS) == {
        "name": [("fct_image", "variant")],
        "mean": [("fct_score", "metric_id"), ("fct_score", "value")],
        "n": [],
    }


def test_what_cannot_be_analysed_has_no_origins() -> None:
    assert column_origins("select from where (", COLUMNS) == {}
    assert column_origins("select value from unknown_table", COLUMNS) == {"value": []}
