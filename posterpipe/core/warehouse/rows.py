"""Rows of the warehouse: adding them, replacing those that count no more, reading scores.

What belongs here: what writing does to each table, in a connection that is open. What does not: the
file and its transactions (`database`), and what the columns mean (`schema`).

Rows are only ever added, and adding one twice changes nothing. The exceptions: a row with status
failed, which a later success replaces; the file of an image that was drawn again since its own was
lost, which may differ in the rounding of its pixels; what is not known of a checkpoint (NULL),
which is filled in when it is; scores of titles that turn out to be beyond the OCR, which are
taken back; fct_nearest, fct_title and fct_reading, where the latest measurement
of a key counts, since it also depends on the holdout posters and the lettering, and of which the
last two lose the images that are lettered no more; and the tables current_..., which are replaced
as a whole.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from typing import Any

import duckdb
import pandas as pd

from posterpipe.core.store import content_key
from posterpipe.core.variants import is_tuned

_REPLACES_FAILED = {
    "fct_image": ("generation_key",),
    "fct_score": ("generation_key", "metric_id"),
}
"""Tables whose failed rows a later success replaces, and their keys.

`insert` keeps the keys unique; these two have no index that would. They grow to millions of rows,
and each opening of the file for a few new ones would read and write an index over all of them,
which takes longer than to look for the few, and makes the file five times as large.
"""

_KEEPS_LATEST = {
    "fct_nearest": ("generation_key", "metric_id"),
    "fct_title": ("generation_key",),
    "fct_reading": ("generation_key", "lettering"),
}
"""Tables of which the latest measurement of a key counts, and their keys."""

_WHEN_AND_WHO = ("measured_at", "set_at", "read_at", "run_id")
"""Columns that alone are no reason to replace a row: the same measurement again changes nothing."""


def insert(connection: duckdb.DuckDBPyConnection, table: str, rows: pd.DataFrame) -> int:
    """Add rows by column name; columns that are left out are NULL, keys that exist are left alone.

    In fct_image and fct_score a row that has failed is replaced by one that has not, and a row of
    fct_image names the file of the image that was drawn last; in fct_nearest, fct_title and
    fct_reading a row is replaced by one that says something else. Returns how many of the rows are
    in the table now that were not.
    """
    if rows.empty:
        return 0
    conflict = "ON CONFLICT DO NOTHING"
    if table in _REPLACES_FAILED:
        conflict = ""
        rows = _news(connection, table, rows)
    elif keys := _KEEPS_LATEST.get(table):
        values = [str(name) for name in rows.columns if name not in keys]
        changes = ", ".join(f"{name} = excluded.{name}" for name in values)
        told = [name for name in values if name not in _WHEN_AND_WHO]
        differs = " OR ".join(f"{table}.{n} IS DISTINCT FROM excluded.{n}" for n in told)
        conflict = f"ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {changes} WHERE {differs}"
    connection.register("new_rows", rows)
    written = _single(connection, f"INSERT INTO {table} BY NAME SELECT * FROM new_rows {conflict}")
    connection.unregister("new_rows")
    return int(written)


def _news(connection: duckdb.DuckDBPyConnection, table: str, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that say something new, one a key; failed ones that they replace are deleted."""
    keys = list(_REPLACES_FAILED[table])
    rows = rows.reset_index(drop=True)
    good_first = rows.sort_values("status", key=lambda status: status == "failed", kind="stable")
    rows = rows.loc[good_first.drop_duplicates(keys).index.sort_values()]
    connection.register("new_keys", rows[keys])
    looked_for = " AND ".join(f"{key} IN (SELECT {key} FROM new_keys)" for key in keys)
    image = "image" if table == "fct_image" else "NULL"
    there = connection.execute(
        f"SELECT {', '.join(keys)}, status AS known, {image} AS known_image FROM {table} "
        f"WHERE {looked_for}"
    ).df()
    connection.unregister("new_keys")
    there = there.drop_duplicates(keys)
    held = rows[keys].merge(there, on=keys, how="left")
    known = held["known"].to_numpy()
    if table == "fct_image":
        drawn = ~pd.isna(known) & (known != "failed") & (rows["status"] != "failed").to_numpy()
        again = drawn & (held["known_image"].to_numpy() != rows["image"].to_numpy())
        if again.any():
            _name_files(connection, rows.loc[again, ["generation_key", "image", "image_path"]])
    replaces = (known == "failed") & (rows["status"] != "failed").to_numpy()
    if replaces.any():
        connection.register("replaced", rows.loc[replaces, keys])
        same = " AND ".join(f"{table}.{key} = replaced.{key}" for key in keys)
        connection.execute(f"DELETE FROM {table} USING replaced WHERE {same}")
        connection.unregister("replaced")
    return rows[pd.isna(known) | replaces]


def _name_files(connection: duckdb.DuckDBPyConnection, drawn: pd.DataFrame) -> None:
    """Images (generation_key, image, image_path) that were drawn again: other bytes, same key."""
    connection.register("drawn_again", drawn)
    connection.execute(
        """
        UPDATE fct_image SET image = drawn_again.image, image_path = drawn_again.image_path
        FROM drawn_again
        WHERE fct_image.generation_key = drawn_again.generation_key
        """
    )
    connection.unregister("drawn_again")


HELD_COLUMNS = ("generation_key", "value", "status", "reason")
"""Of the scores that the warehouse holds of a metric: see `Warehouse.scores`."""

NO_SCORES = pd.DataFrame(columns=list(HELD_COLUMNS)).astype({"value": "float64"})
"""What a warehouse without scores answers; to be copied."""


def utc_now() -> dt.datetime:
    """The present moment as the tables have it: UTC, without a time zone. DuckDB shows a TIMESTAMP
    WITH TIME ZONE in the zone of whoever reads it, and a report would name other days elsewhere."""
    return dt.datetime.now(dt.UTC).replace(tzinfo=None)


def read_scores(
    connection: duckdb.DuckDBPyConnection,
    metric_id: str,
    generation_keys: Iterable[str],
    *,
    with_failed: bool = False,
) -> pd.DataFrame:
    """See `Warehouse.scores`: the same in a connection that is open."""
    connection.register("wanted", _key_frame(generation_keys))
    try:
        return connection.execute(
            f"""
            SELECT {", ".join(HELD_COLUMNS)}
            FROM fct_score
            WHERE metric_id = ?
              AND generation_key IN (SELECT generation_key FROM wanted)
              AND (? OR status <> 'failed')
            """,
            [metric_id, with_failed],
        ).df()
    except duckdb.CatalogException as error:
        if "fct_score" not in str(error):
            raise
        return NO_SCORES.copy()  # a file that holds reports only
    finally:
        connection.unregister("wanted")


def prompt_key(prompt_id: str, prompt: str, score_text: str, title: str) -> str:
    """Key of one wording of a prompt."""
    return content_key("prompt", prompt_id, prompt, score_text, title)


def record_generations(
    connection: duckdb.DuckDBPyConnection,
    generations: pd.DataFrame,
    *,
    run_id: str,
    recorded_at: dt.datetime,
) -> None:
    """Adds a table of generations (`generations.COLUMNS`) with its prompts and checkpoints."""
    if generations.empty:
        return
    texts = generations[["prompt_id", "prompt", "score_text", "title"]]
    keys = [prompt_key(*map(str, row)) for row in texts.itertuples(index=False)]
    prompts = texts.assign(prompt_key=keys, first_seen_at=recorded_at).drop_duplicates("prompt_key")
    tuned = is_tuned(generations["variant"])
    checkpoints = pd.DataFrame(
        {
            "checkpoint_id": generations["checkpoint_id"],
            "kind": tuned.map({True: "tuned", False: "base"}),
            "first_seen_at": recorded_at,
            "run_id": run_id,
        }
    ).drop_duplicates("checkpoint_id")
    images = generations.drop(columns=["prompt", "score_text", "title"]).assign(
        prompt_key=keys, run_id=run_id, recorded_at=recorded_at
    )
    insert(connection, "dim_prompt", prompts)
    insert(connection, "dim_checkpoint", checkpoints)
    insert(connection, "fct_image", images.drop_duplicates("generation_key"))


def fill_checkpoints(connection: duckdb.DuckDBPyConnection, facts: pd.DataFrame) -> None:
    """Fills in what dim_checkpoint does not know of its rows.

    `facts`: checkpoint_id, base_model, training_set_version, settings (JSON), trained_at, run_id of
    the training; ids that have no row are passed over. The run of a row that was written without
    them is the one that met the checkpoint first, and is replaced by the one that trained it.
    """
    connection.register("facts", facts)
    connection.execute(
        """
        UPDATE dim_checkpoint SET
            base_model = facts.base_model,
            training_set_version = facts.training_set_version,
            settings = facts.settings,
            trained_at = facts.trained_at,
            run_id = facts.run_id
        FROM facts
        WHERE dim_checkpoint.checkpoint_id = facts.checkpoint_id
          AND dim_checkpoint.training_set_version IS NULL
        """
    )
    connection.unregister("facts")


def replace_current(connection: duckdb.DuckDBPyConnection, generation_keys: Iterable[str]) -> None:
    """Makes these images the current ones, in the transaction of the connection."""
    connection.register("new_current", _key_frame(generation_keys).drop_duplicates())
    connection.execute("DELETE FROM current_generation")
    connection.execute("INSERT INTO current_generation SELECT generation_key FROM new_current")
    connection.unregister("new_current")


def replace_metrics(
    connection: duckdb.DuckDBPyConnection, step: str, metric_ids: Sequence[str]
) -> None:
    """Makes these metrics, in their order, the ones that a scoring step uses."""
    connection.execute("DELETE FROM current_metric WHERE step = ?", [step])
    places = pd.DataFrame({"metric_id": list(dict.fromkeys(metric_ids))})
    insert(connection, "current_metric", places.assign(step=step, place=range(1, len(places) + 1)))


def delete_titles(connection: duckdb.DuckDBPyConnection, generation_keys: Iterable[str]) -> None:
    """Takes out what is known of these images' titles: they are lettered no more."""
    connection.register("untitled", _key_frame(generation_keys))
    for table in ("fct_title", "fct_reading"):
        connection.execute(
            f"DELETE FROM {table} WHERE generation_key IN (SELECT generation_key FROM untitled)"
        )
    connection.unregister("untitled")


def take_back_titles(
    connection: duckdb.DuckDBPyConnection, metric_ids: Sequence[str], reasons: pd.DataFrame
) -> None:
    """Takes back the scores that these metrics gave titles (title, reason) which they cannot
    measure, and what was read of them. Images of earlier checkpoints are among them: their numbers
    would stand in a trend beside none."""
    connection.register("beyond", reasons)
    connection.register("metrics", pd.DataFrame({"metric_id": list(metric_ids)}))
    connection.execute(
        """
        UPDATE fct_score SET value = NULL, status = 'blocked', reason = beyond.reason
        FROM fct_image
        INNER JOIN dim_prompt ON dim_prompt.prompt_key = fct_image.prompt_key
        INNER JOIN beyond ON beyond.title = dim_prompt.title
        WHERE fct_score.generation_key = fct_image.generation_key
          AND fct_score.metric_id IN (SELECT metric_id FROM metrics)
          AND fct_score.status = 'ok'
        """
    )
    connection.execute("DELETE FROM fct_reading WHERE title IN (SELECT title FROM beyond)")
    connection.unregister("metrics")
    connection.unregister("beyond")


def replace_posters(connection: duckdb.DuckDBPyConnection, posters: pd.DataFrame) -> None:
    """Makes these posters (columns of current_poster) the ones that there are.

    The same posters as before change nothing, the time they were recorded at included.
    """
    connection.register("new_posters", posters)
    told = ", ".join(str(name) for name in posters.columns if name not in ("recorded_at", "run_id"))
    changes = _single(
        connection,
        f"""
        SELECT
            (SELECT count(*) FROM
                (SELECT {told} FROM new_posters EXCEPT ALL SELECT {told} FROM current_poster))
            + (SELECT count(*) FROM
                (SELECT {told} FROM current_poster EXCEPT ALL SELECT {told} FROM new_posters))
        """,
    )
    if changes:
        connection.execute("DELETE FROM current_poster")
        connection.execute("INSERT INTO current_poster BY NAME SELECT * FROM new_posters")
    connection.unregister("new_posters")


def _key_frame(generation_keys: Iterable[str]) -> pd.DataFrame:
    # The type by name: an empty column would have none.
    return pd.DataFrame({"generation_key": pd.Series(list(generation_keys), dtype="object")})


def _single(connection: duckdb.DuckDBPyConnection, query: str) -> Any:
    """The one value of a query. All rows are fetched: DuckDB 2 refuses further statements on a
    connection while a result is not read to its end, as `fetchone` leaves it."""
    return connection.execute(query).fetchall()[0][0]
