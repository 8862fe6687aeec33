"""What steps share: the deployment they work in, and how tables travel between them.

What belongs here: resources, the IO manager, and the forms in which values reach the UI. What does
not: assets, and anything that computes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from posterpipe.settings import Settings

if TYPE_CHECKING:
    from pandas import DataFrame as Table
    from PIL.Image import Image

    from posterpipe.core.progress import Progress
    from posterpipe.core.store import Store
    from posterpipe.core.warehouse import Warehouse
else:
    # Dagster looks at annotations when the definitions load; pandas is loaded by the steps.
    Table = Any

# Said at every step otherwise. Dagster is pinned exactly, so that nothing changes behind our back.
warnings.filterwarnings("ignore", "Parameter `data_version`", dg.BetaWarning)

TABLES = "tables"
"""Resource key of the IO manager for tables."""

DATA_VERSION = "dagster/data_version"
"""Tag of a materialization: its data version."""

TABLE_VERSION = "table_version"
"""Metadata entry of a materialization: under which version the store keeps its table."""

INPUTS_READ = "input_data_versions_read"
"""Metadata entry of a materialization: the data version of each table that its step has read. What
Dagster notes is the version when the step started; another run may have written since."""

MODEL_FINGERPRINT = "model_fingerprint"
"""Metadata entry of a materialization: the model that it was made with."""

WAREHOUSE = "warehouse_identity"
"""Metadata entry of what fills the warehouse: into which file it wrote."""

SOURCE_DIGEST = "source_digest"
"""Metadata entry of a root asset's materialization: digest of what it was made from (the listing of
the posters, the content of a file), by which the arrivals sensor knows what was read already."""

SOURCE_PORTABLE = "source_portable_digest"
"""The same without what another host may see otherwise of the same files: by it the sensor knows
whether a run saw what it was requested for."""

UNREAD = "unread"
"""Metadata entry of a root asset's materialization: files that could not be read this time."""

FAILED_ITEMS = "failed_items"
"""Metadata entry of a materialization: items that failed and may succeed when tried again."""

CHAMPION = "champion"
"""Metadata entry: the checkpoint that is served, or that the newest one has to beat."""

CHALLENGER = "challenger"
"""Metadata entry: the checkpoint that is judged."""

BASE_MODEL = "base_model"
"""Metadata entry: fingerprint of the base model, which is champion before any other."""

LAST_DECISION = "last_decision"
"""Metadata entry of `champion`: the latest decision that it knows of."""

HELD_OUT = "held_out_posters"
"""Metadata entry of a checkpoint whose training they could stop: version of the table of held-out
posters, "" before there was one."""

THUMBNAILS = 32
"""Images of a contact sheet in the UI."""

_CAPTIONED, _CAPTION_LINES = 16, 5
"""Images that are shown with their captions, and lines of these, of about twelve letters: more
images would have to be made smaller for the event log, and their captions illegible."""

_VERSIONS = 50
"""Materializations of a table looked at to find the one whose table was read."""

_ROWS_SHOWN = 100
"""Rows of a table in the UI; every one lies in the event log for ever."""


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
        return self.store_root / "public" / "contact_sheet.png"

    @property
    def report_path(self) -> Path:
        """The first page of the score report."""
        return self.store_root / "public" / "report" / "index.html"

    @property
    def thesis_path(self) -> Path:
        """The folder of the thesis's chart and table."""
        return self.store_root / "public" / "thesis"

    @property
    def warehouse(self) -> Warehouse:
        """The score warehouse; write to it only in steps of the pool `warehouse`."""
        from posterpipe.core.warehouse import Warehouse

        return Warehouse(self.warehouse_path)

    def progress(
        self, context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext
    ) -> Progress:
        """Where this step reports how far it is."""
        from posterpipe.core.progress import LogProgress

        return self._progress or LogProgress(context.log.info)


@contextmanager
def naming_the_asset(context: dg.AssetExecutionContext) -> Iterator[None]:
    """While inside, that the accelerator is gone is told with the name of the asset being made."""
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
        from posterpipe.core.provenance import record_table

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


def columns(**descriptions: str) -> dict[str, dg.TableSchema]:
    """Definition metadata that describes the columns of an asset's table.

    Each argument is `name="type: description"`.
    """
    described = []
    for name, text in descriptions.items():
        kind, _, description = text.partition(": ")
        described.append(dg.TableColumn(name, kind, description))
    return {"dagster/column_schema": dg.TableSchema(columns=described)}


def table_preview(table: Table, names: Sequence[str] | None = None) -> dg.TableMetadataValue:
    """The first rows of a table as the UI shows them."""
    shown = table[list(names)] if names else table
    records = [
        dg.TableRecord({str(name): _cell(value) for name, value in row.items()})
        for row in shown.head(_ROWS_SHOWN).to_dict(orient="records")
    ]
    kinds = {str(name): _kind(shown[name]) for name in shown.columns}
    schema = dg.TableSchema(columns=[dg.TableColumn(name, kind) for name, kind in kinds.items()])
    return dg.MetadataValue.table(records=records, schema=schema)


def rows(table: Table) -> Iterator[Any]:
    """The rows of a table as named tuples."""
    from posterpipe.core.store import cells

    row = namedtuple("row", map(str, table.columns), rename=True)  # type: ignore[misc]
    return starmap(row, cells(table, *table.columns))


def counts(table: Table, column: str) -> dict[str, int]:
    """How often each value of a column occurs, for the numbers that the UI plots over time."""
    return {str(value): int(count) for value, count in table[column].value_counts().items()}


def thumbnails(
    images: Sequence[tuple[Path | Image, str]],
    *,
    total: int | None = None,
    shown: int = THUMBNAILS,
    label_lines: int = 1,
) -> dg.MarkdownMetadataValue:
    """Some images with their labels as one small picture that fits into the event log.

    `total`: how many there are, where `images` are only the first ones. `label_lines`: lines that
    a label wraps to at most.
    """
    from posterpipe.core.gallery import contact_sheet, markdown_image

    if not images:
        return dg.MetadataValue.md("no images")
    sheet = contact_sheet(images[:shown], cell=(72, 108), label_lines=label_lines)
    total = total or len(images)
    alt = f"{total} images" if total <= shown else f"{shown} of {total} images"
    return dg.MetadataValue.md(markdown_image(sheet, alt))


def captioned_thumbnails(
    images: Sequence[tuple[Path | Image, str]], *, total: int
) -> dg.MarkdownMetadataValue:
    """The same of images with captions: these begin alike as a rule, and their ends differ."""
    from posterpipe.core.gallery import without_shared_ends

    images = images[:_CAPTIONED]
    captions = without_shared_ends([caption for _, caption in images])
    labelled = [(image, caption) for (image, _), caption in zip(images, captions, strict=True)]
    return thumbnails(labelled, total=total, shown=_CAPTIONED, label_lines=_CAPTION_LINES)


def _cell(value: Any) -> str | int | float | bool | None:
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return None if value != value else round(value, 6)
    return str(value)


def _kind(column: Any) -> str:
    return {"i": "int", "f": "float", "b": "bool"}.get(column.dtype.kind, "string")
