"""The history that the warehouse keeps beside its scores.

What belongs here: who drew the images, what their checkpoints were made from, and what code and
packages were at work, from the store's records into the warehouse. What does not: writing the
store's records (`provenance`), and reading both for one image (`trace`).

Scores stay when `posterpipe gc` removes the files behind them, and so does this.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence

import duckdb
import pandas as pd

from posterpipe.core.generations import GENERATION
from posterpipe.core.provenance.checkpoints import CHECKPOINT
from posterpipe.core.provenance.environments import ENVIRONMENT, record_environment
from posterpipe.core.store import Store
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.core.warehouse.rows import fill_checkpoints, insert


def record_history(
    store: Store, warehouse: Warehouse, generations: pd.DataFrame, *, run_id: str
) -> None:
    """Adds to the warehouse what the store knows of some generations that it has scores of.

    Who drew them, what their checkpoints were made from, and what code and packages were at work;
    `run_id` is the run that scored them now. Adding it twice changes nothing. Raises WarehouseBusy.
    """
    pixel_keys = list(dict.fromkeys(generations["pixel_key"].astype(str)))
    drawn = store.results(GENERATION, pixel_keys)
    drawings = pd.DataFrame(
        [
            {
                "pixel_key": key,
                "run_id": row["run_id"],
                "environment_id": row.get("environment"),
                "drawn_at": moment(row.get("drawn_at")),
            }
            for key, row in drawn.items()
            if row.get("run_id")
        ]
    )
    checkpoints = store.results(CHECKPOINT, generations["checkpoint_id"].astype(str))
    facts = pd.DataFrame(
        [
            {
                "checkpoint_id": checkpoint_id,
                "base_model": row.get("base_model"),
                "training_set_version": row.get("training_set"),
                "settings": json.dumps(row.get("settings") or {}, sort_keys=True),
                "trained_at": moment(row.get("recorded_at")),
                "run_id": row.get("run_id"),
            }
            for checkpoint_id, row in checkpoints.items()
        ]
    )
    runs = [(run_id, record_environment(store))]
    runs += [(row["run_id"], row["environment"]) for row in checkpoints.values()]
    seen = [environment for _, environment in runs]
    seen += [str(row["environment"]) for row in drawn.values() if row.get("environment")]
    with warehouse.write() as connection:
        insert(connection, "fct_drawing", drawings)
        if not facts.empty:
            fill_checkpoints(connection, facts)
        _insert_runs(connection, runs)
        insert(connection, "dim_environment", _environments(store, seen))


def _insert_runs(connection: duckdb.DuckDBPyConnection, runs: Sequence[tuple[str, str]]) -> None:
    """Only of runs that left rows: one that found everything done changes nothing."""
    frame = pd.DataFrame(runs, columns=["run_id", "environment_id"]).drop_duplicates()
    connection.register("candidates", frame)
    connection.execute(
        """
        INSERT INTO run_environment BY NAME
        SELECT run_id, environment_id
        FROM candidates
        WHERE run_id IN (
            SELECT run_id FROM fct_score
            UNION SELECT run_id FROM fct_image
            UNION SELECT run_id FROM dim_checkpoint
        )
        ON CONFLICT DO NOTHING
        """
    )
    connection.unregister("candidates")


def _environments(store: Store, environment_ids: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "environment_id": environment_id,
                "posterpipe": values["posterpipe"],
                "source": values["source"],
                "commit_id": values["commit"],
                "python": values["python"],
                "platform": values["platform"],
                "packages": json.dumps(values["packages"], sort_keys=True),
            }
            for environment_id, values in store.results(ENVIRONMENT, environment_ids).items()
        ]
    )


def moment(text: object) -> dt.datetime | None:
    """A time as records have it, in UTC and without zone; None where there is none."""
    return dt.datetime.fromisoformat(str(text)).replace(tzinfo=None) if text else None
