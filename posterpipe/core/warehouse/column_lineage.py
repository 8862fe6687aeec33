"""Which columns of the database a report's columns come from, read from its SQL.

What belongs here: the analysis of one query. What does not: which asset a table belongs to
(`defs.dbt_reports`).
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlglot import exp, parse_one
from sqlglot.errors import SqlglotError
from sqlglot.lineage import lineage
from sqlglot.optimizer.qualify import qualify
from sqlglot.optimizer.scope import Scope, build_scope

DIALECT = "duckdb"


def column_origins(
    sql: str, columns: Mapping[str, Mapping[str, str]]
) -> dict[str, list[tuple[str, str]]]:
    """(table, column) that each column of the query is computed from, in order.

    `columns`: types by column by table. Columns that are looked up to join or to filter do not
    count. A query that cannot be analysed has no origins: they are for people, and no report fails
    for want of them.
    """
    tables: dict[str, object] = {name: dict(types) for name, types in columns.items()}
    try:
        query = parse_one(sql, dialect=DIALECT)
        for table in query.find_all(exp.Table):
            # dbt names the database and schema, which the types here do not.
            table.set("catalog", None)
            table.set("db", None)
        query = qualify(query, schema=tables, dialect=DIALECT, validate_qualify_columns=False)
        scope = build_scope(query)
        if scope is None or not isinstance(query, exp.Query):
            return {}
        return {
            name: [
                (table, column)
                for table, column in _leaves(name, query, tables, scope)
                if column in columns.get(table, {})
            ]
            for name in query.named_selects
            if name != "*"
        }
    except (SqlglotError, ValueError, RecursionError):
        return {}


def _leaves(
    column: str, query: exp.Query, tables: dict[str, object], scope: Scope
) -> list[tuple[str, str]]:
    node = lineage(column, query, schema=tables, dialect=DIALECT, scope=scope, copy=False)
    return sorted(
        {
            (step.expression.name, step.name.rpartition(".")[2].strip('"'))
            for step in node.walk()
            if isinstance(step.expression, exp.Table)
        }
    )
