"""The score warehouse: a private DuckDB file with one writer, and the copy that analysts read.

What belongs here: opening and writing it (`database`), its tables (`schema`) and rows (`rows`),
what it remembers beside scores (`history`), the copy (`publication`), and what the SQL of the
reports needs: its estimates (`sql_functions`) and where its columns come from (`column_lineage`).
What does not: what the numbers mean (`metrics`), and the marts (`dbt_like_reports`).
"""
