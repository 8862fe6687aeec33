"""What steps share: the deployment they work in, and how tables travel between them.

What belongs here: resources and the IO manager. What does not: assets, what is told of them in the
UI (`metadata`), and anything that computes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from posterpipe.defs.metadata import DATA_VERSION, INPUTS_READ, TABLE_VERSION, WAREHOUSE
from posterpipe.settings import Settings

if TYPE_CHECKING:
    from pandas import DataFrame as Table

    from posterpipe.core.progress import Progress
    from posterpipe.core.store import Store
    from posterpipe.core.warehouse.database import Warehouse
else:
    # Dagster looks at annotations when the definitions load; pandas is loaded by the steps.
    Table = Any

# Said at every step otherwise. Dagster is pinned exactly, so that nothing changes behind our back.
warnings.filterwarnings("ignore", "Parameter `data_version`", dg.BetaWarning)

TABLES = "tables"
"""Resource key of the IO manager for tables."""

_VERSIONS = 50
"""Materializations of a table looked at to find the one whose table was read."""


class Deployment:
    """The settings of this deployment, and what they name, opened when a step needs it.

    `progress` is where long steps report; without it they write into the log of their run.
    """

    def __init__(self, settings: Settings, progress: Progress | None = None) -> None:
        self.settings = settings
        self._progress = progress

    @property
    def store(self) -> Store:
        """Everything computed. Raises StoreError when its folder cannot be created."""
        from posterpipe.core.store import Store

        return Store(self.store_root)

    @property
    def store_root(self) -> Path:
        """The folder of the store, present or not."""
        return self.settings.path(self.settings.store)

    @property
    def warehouse_path(self) -> Path:
        """The database that only the pipeline opens."""
        return self.settings.warehouse_path

    @property
    def published_path(self) -> Path:
        """The analysts' copy of the database."""
        return self.settings.published_path

    @property
    def published_parquet_path(self) -> Path:
        """Its tables as Parquet files."""
        return self.published_path.with_name("parquet")

    @property
    def contact_sheet_path(self) -> Path:
        """The picture of all prompts and variants."""
        return self.settings.public_path / "contact_sheet.png"

    @property
    def report_path(self) -> Path:
        """The first page of the score report."""
        return self.settings.public_path / "report" / "index.html"

    @property
    def thesis_path(self) -> Path:
        """The folder of the thesis's chart and table."""
        return self.settings.public_path / "thesis"

    @property
    def warehouse(self) -> Warehouse:
        """The score warehouse; write to it only in steps of the pool `warehouse`."""
        from posterpipe.core.warehouse.database import Warehouse

        return Warehouse(self.warehouse_path)

    def progress(
        self, context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext
    ) -> Progress:
        """Where this step reports how far it is."""
        from posterpipe.core.progress import LogProgress

        return self._progress or LogProgress(context.log.info)


@contextmanager
def naming_the_asset(context: dg.AssetExecutionContext) -> Iterator[None]:
    """Raises DeviceGone with the name of the asset being made, when the accelerator goes inside."""
    from posterpipe.core.devices import DeviceGone

    try:
        yield
    except DeviceGone as error:
        raise DeviceGone(f"{context.asset_key.to_user_string()}: {error}") from error


class StoreIOManager(dg.IOManager):
    """Keeps each asset's table in the store, under the asset's name, and who made it from what."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._read: dict[str, dict[str, str]] = {}
        """Versions of the tables that each step has read."""
        self._data_versions: dict[str, dict[str, str]] = {}
        """Data versions of the same."""

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        """Write the table and make it the current one."""
        from posterpipe.core.provenance.records import record_table

        store = self._deployment.store
        name = context.asset_key.path[-1]
        known = context.output_metadata.get(TABLE_VERSION)
        computed = known.value if isinstance(known, dg.TextMetadataValue) else None
        version = store.write_table(name, obj, version=computed)
        record_table(
            store,
            name,
            version,
            run_id=context.run_id,
            code_version=context.asset_spec.code_version or "",
            inputs=self._read.get(context.step_key, {}),
        )
        metadata: dict[str, Any] = {TABLE_VERSION: version} if computed is None else {}
        context.add_output_metadata({**metadata, **self.inputs_read(context.step_key)})

    def inputs_read(self, step_key: str) -> dict[str, Any]:
        """The metadata entry INPUTS_READ of a step, as far as it has read."""
        versions = self._data_versions.get(step_key)
        return {INPUTS_READ: dg.MetadataValue.json(versions)} if versions else {}

    def load_input(self, context: dg.InputContext) -> Any:
        """The current table of the upstream asset. Raises TableMissing."""
        store = self._deployment.store
        name = context.asset_key.path[-1]
        version = store.table_version(name)
        table = store.read_table(name, version)
        step_key = _step_key(context)
        if version is not None:
            self._read.setdefault(step_key, {})[name] = version
        if version is not None and step_key:
            found = _data_version(context.step_context.instance, context.asset_key, version)
            read = self._data_versions.setdefault(step_key, {})
            read[context.asset_key.to_user_string()] = found
        return table


def _data_version(instance: dg.DagsterInstance, key: dg.AssetKey, version: str) -> str:
    """The data version of an asset when its table had this version.

    One that is not recorded yet, as between writing a table and telling of it, counts as that of
    the table, which it is for most assets; for the others, what was made from it is made again.
    """
    for limit in (1, _VERSIONS):  # the latest, as a rule
        for record in instance.fetch_materializations(key, limit=limit).records:
            made = record.asset_materialization
            kept = made.metadata.get(TABLE_VERSION) if made else None
            if made and kept and kept.value == version:
                return (made.tags or {}).get(DATA_VERSION, version)
    return version


def _step_key(context: dg.InputContext) -> str:
    try:
        return context.step_context.step.key
    except dg.DagsterInvariantViolationError:
        return ""  # read by hand, in no step


def store_tables(deployment: Deployment) -> dg.IOManagerDefinition:
    """The IO manager of a deployment. The steps that use it hold a lease on the store, so that
    `posterpipe gc` leaves alone what they work with, and end with the process of their run."""

    @dg.io_manager  # type: ignore[arg-type]  # a generator is closed when the step ends
    def tables() -> Iterator[StoreIOManager]:
        _end_with_the_run()
        with deployment.store.lease():
            yield StoreIOManager(deployment)

    return tables


def _end_with_the_run() -> None:
    """Asks this process to stop, as when its run is cancelled, once the process that started it is
    gone: the run counts as failed then, its place in the pool is free, and the step is started
    again beside this one. Does nothing where the step runs in the process of its run."""
    run = multiprocessing.parent_process()
    if run is None:
        return

    def wait() -> None:
        # On a pipe between the two, whoever forked this process: Linux could tell of that one.
        run.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="end-with-the-run", daemon=True).start()


def table_output(
    table: Table,
    metadata: Mapping[str, Any],
    *,
    data_version: str | None = None,
    warehouse: str = "",
) -> dg.Output[Table]:
    """A table as a step gives it back: with its content hash as data version and its row count.

    `warehouse`: identity of the file that the step fills, as it was before the first row: what is
    lost meanwhile is missed then. It is part of the data version, since whoever reads that file
    reads something else when it is another one, with the same table or not.
    """
    from posterpipe.core.store import table_version

    version = table_version(table)
    filled = {WAREHOUSE: warehouse} if warehouse else {}
    data_version = data_version or (f"{version}-{warehouse}" if warehouse else version)
    return dg.Output(
        table,
        data_version=dg.DataVersion(data_version),
        metadata={"dagster/row_count": len(table), **metadata, **filled, TABLE_VERSION: version},
    )
