"""What analysts and designers look at.

What belongs here: the dbt models as assets, the published database, the contact sheet. What does
not: the models' SQL (`dbt_like_reports/`), copying the database (`core.warehouse`) and arranging
pictures (`core.gallery`).
"""

import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus
from dagster_dbt import (
    DagsterDbtTranslator,
    DagsterDbtTranslatorSettings,
    DbtCliResource,
    DbtProject,
)
from dagster_dbt.asset_utils import get_upstream_unique_ids
from dagster_dbt.errors import DagsterDbtCliRuntimeError
from packaging.version import Version

from posterpipe.core.variants import BASE_VARIANTS, DELAYED_VARIANTS, TUNED_VARIANTS
from posterpipe.defs.resources import (
    TABLES,
    Deployment,
    StoreIOManager,
    Table,
    columns,
    counts,
    rows,
    table_output,
    table_preview,
)
from posterpipe.settings import Settings

PROJECT = Path("dbt_like_reports")
"""Relative to the root."""

WRITERS = (
    "clip_scores",
    "fidelity_scores",
    "legibility_scores",
    "champion",
    "poster_inventory",
)
"""Assets that fill the warehouse: what is published is of all of them."""


def dbt_project(settings: Settings) -> DbtProject:
    """The dbt project, with a manifest that is not older than its files.

    `make install` writes the manifest. Where it is missing or behind, as after a pull or while a
    report is edited, it is written here, which takes some seconds. A mistake in a report must not
    keep the rest of the pipeline from loading: then the manifest of before stays, and the next run
    of the reports fails with dbt's message.
    """
    project = DbtProject(project_dir=settings.path(PROJECT))
    if _manifest_is_behind(project):
        try:
            _write_manifest(project)
        except DagsterDbtCliRuntimeError as error:
            if not project.manifest_path.exists():
                raise
            dg.get_dagster_logger().error(
                f"{project.project_dir}: dbt cannot read the reports, so they stay as they were "
                f"before the last edit. {error}"
            )
    return project


def _manifest_is_behind(project: DbtProject) -> bool:
    try:
        written = project.manifest_path.stat().st_mtime
    except FileNotFoundError:
        return True
    sources = [
        path
        for folder in ("models", "macros", "tests", "seeds", "snapshots")
        for path in (project.project_dir / folder).rglob("*")
    ]
    sources += [project.project_dir / "dbt_project.yml", project.project_dir / "profiles.yml"]
    return any(path.stat().st_mtime > written for path in sources)


def _write_manifest(project: DbtProject) -> None:
    target = project.manifest_path.parent
    target.mkdir(exist_ok=True)
    # Renamed into place: another process may be reading it, or parsing as well.
    with tempfile.TemporaryDirectory(dir=target) as folder:
        dbt_resource(project).cli(["parse", "--quiet"], target_path=Path(folder)).wait()
        for name in ("partial_parse.msgpack", project.manifest_path.name):
            os.replace(Path(folder, name), target / name)


class _Dbt(DbtCliResource):
    """dbt as it is installed beside this Python, whether or not that environment is activated."""

    # dagster-dbt would ask `dbt --version`, which takes two seconds and asks the package index.
    @cached_property
    def _cli_version(self) -> Version:
        return Version(installed_version("dbt-core"))


def dbt_resource(project: DbtProject) -> DbtCliResource:
    """How steps call dbt."""
    beside = Path(sys.executable).with_name("dbt")
    return _Dbt(
        project_dir=os.fspath(project.project_dir),
        dbt_executable=str(beside) if beside.exists() else "dbt",
    )


class _Translator(DagsterDbtTranslator):
    """Reports belong to the analysts, and their sources are the assets that write the warehouse."""

    def __init__(self) -> None:
        # Every table of the warehouse is written by the one asset that its source names.
        super().__init__(DagsterDbtTranslatorSettings(enable_duplicate_source_asset_keys=True))

    def get_asset_spec(
        self, manifest: Mapping[str, Any], unique_id: str, project: DbtProject | None
    ) -> dg.AssetSpec:
        spec = super().get_asset_spec(manifest, unique_id, project)
        writers = {key: dg.AssetDep(key) for key in self._other_writers(manifest, unique_id)}
        for dep in spec.deps:
            writers.pop(dep.asset_key, None)
        return spec.replace_attributes(
            group_name="reports",
            owners=["team:analytics"],
            deps=[*spec.deps, *writers.values()],
            code_version=_code_version(manifest, unique_id),
        )

    def _other_writers(self, manifest: Mapping[str, Any], unique_id: str) -> list[dg.AssetKey]:
        """Assets that add rows to a source of the model, beside the one that dagster-dbt knows."""
        if unique_id.startswith("source."):
            return []
        node = self.get_resource_props(manifest, unique_id)
        return [
            dg.AssetKey(name)
            for upstream in sorted(get_upstream_unique_ids(manifest, node))
            if upstream.startswith("source.")
            for name in manifest["sources"][upstream]["meta"].get("also_written_by", [])
        ]


def _code_version(manifest: Mapping[str, Any], unique_id: str) -> str:
    """Of everything of the project that a table is made by.

    dagster-dbt takes the model's own file. What it reads without a table between (ephemeral models)
    and its macros decide the table just as much, and so do the estimates that they call.
    """
    code = {"estimates": _ESTIMATES_VERSION}
    ahead = [unique_id]
    while ahead:
        name = ahead.pop()
        node = manifest["nodes"].get(name) or manifest["macros"].get(name)
        if name in code or node is None or node["package_name"] in _OF_DBT:
            continue
        if name != unique_id and node.get("config", {}).get("materialized", "") not in _WITHIN:
            continue
        code[name] = node.get("raw_code") or node.get("macro_sql") or node["checksum"]["checksum"]
        needs = node["depends_on"]
        ahead += [*needs.get("macros", ()), *needs.get("nodes", ())]
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()[:16]


_ESTIMATES_VERSION = "1"
"""Raise it when `core.sql_functions` gives other intervals: it is not in dbt's manifest."""

_OF_DBT = ("dbt", "dbt_duckdb")
"""Packages of macros that come with dbt, which is pinned."""

_WITHIN = ("", "ephemeral")
"""How macros and models are materialized that are part of those that read them."""


def dbt_specs(project: DbtProject) -> tuple[list[dg.AssetSpec], list[dg.AssetCheckSpec]]:
    """Every model, seed and snapshot of the manifest as an asset, every test of one as a check.

    The same as `dagster_dbt.dbt_assets` makes of everything. That asks dbt's selection engine what
    everything is, whose import would be a quarter of the time that the code location takes to load.
    """
    manifest = json.loads(project.manifest_path.read_bytes())
    translator = _Translator()
    specs: list[dg.AssetSpec] = []
    check_specs: list[dg.AssetCheckSpec] = []
    for unique_id, node in manifest["nodes"].items():
        ephemeral = node["config"].get("materialized") == "ephemeral"
        if node["resource_type"] not in ("model", "seed", "snapshot") or ephemeral:
            continue
        spec = translator.get_asset_spec(manifest, unique_id, project)
        specs.append(spec)
        for child in manifest["child_map"].get(unique_id, []):
            if child.startswith("test."):
                # None for tests of several models, which belong to one of them.
                check = translator.get_asset_check_spec(spec, manifest, child, project)
                check_specs += [check] if check else []
    return specs, check_specs


def dbt_models(project: DbtProject) -> dg.AssetsDefinition:
    """The dbt models as assets, their tests as checks."""
    specs, check_specs = dbt_specs(project)
    asset_of = _assets_of_tables(project)

    @dg.multi_asset(
        name="dbt_models",
        specs=specs,
        check_specs=check_specs,
        can_subset=True,
        pool="warehouse",
    )
    def models(
        context: dg.AssetExecutionContext,
        dbt: DbtCliResource,
        deployment: dg.ResourceParam[Deployment],
    ) -> Iterator[Any]:
        if deployment.warehouse_path.exists():
            with deployment.warehouse.write():
                pass  # adds what a newer posterpipe has and this file lacks
        outputs: list[dg.Output[Any]] = []
        queries: dict[str, str] = {}
        total = len(context.selected_asset_keys) + len(context.selected_asset_check_keys)
        with (
            # dbt's logs and artifacts of a run are in Dagster's log; kept, they would pile up.
            tempfile.TemporaryDirectory() as target,
            _environment(POSTERPIPE_WAREHOUSE=str(deployment.warehouse_path)),
            deployment.progress(context).task("build reports", total, "models and tests") as tick,
        ):
            build = dbt.cli(
                ["build", "--exclude-resource-type", "unit_test"],
                context=context,
                target_path=Path(target),
            )
            for event in build.stream():
                tick()
                if isinstance(event, dg.Output):
                    # Held back until dbt has closed the database, so that the table can be read.
                    outputs.append(event)
                else:
                    yield event
            for file in Path(target, "compiled").rglob("models/**/*.sql"):
                queries[file.stem] = file.read_text("utf-8")
        deployment.warehouse.prepare()  # notes what dbt wrote: a copy of before lacks it
        for output in outputs:
            query = queries.get(output.output_name, "")
            yield _with_content(output, deployment, asset_of, query)

    return models


def _assets_of_tables(project: DbtProject) -> dict[str, dg.AssetKey]:
    """The asset that makes each table that a model may read."""
    manifest = json.loads(project.manifest_path.read_bytes())
    translator = _Translator()
    tables = {node["identifier"]: name for name, node in manifest["sources"].items()}
    tables |= {
        node["alias"]: name
        for name, node in manifest["nodes"].items()
        if node["resource_type"] in ("model", "seed", "snapshot")
    }
    return {
        table: translator.get_asset_spec(manifest, name, project).key
        for table, name in tables.items()
    }


def _with_content(
    output: dg.Output[Any],
    deployment: Deployment,
    asset_of: Mapping[str, dg.AssetKey],
    query: str,
) -> dg.Output[Any]:
    """dbt's output of a model with the hash of the table as data version, its first rows, and where
    its columns come from."""
    from posterpipe.core.column_lineage import column_origins
    from posterpipe.core.store import table_version

    with deployment.warehouse.read() as connection:
        table = connection.sql(f'select * from "{output.output_name}"').df()
        types: dict[str, dict[str, str]] = {}
        for name, column, kind in connection.execute(
            "select table_name, column_name, data_type from duckdb_columns() where not internal"
        ).fetchall():
            types.setdefault(name, {})[column] = kind
    lineage = {}
    for column, origins in column_origins(query, types).items():
        # Several tables belong to one asset.
        keys = dict.fromkeys(
            (asset_of[name], origin) for name, origin in origins if name in asset_of
        )
        lineage[column] = [dg.TableColumnDep(key, origin) for key, origin in keys]
    return dg.Output(
        output.value,
        output_name=output.output_name,
        data_version=dg.DataVersion(table_version(table)),
        metadata={
            **output.metadata,
            "dagster/row_count": len(table),
            "dagster/column_lineage": dg.TableColumnLineage(lineage),
            "table": table_preview(table),
        },
    )


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for processes started inside: profiles.yml reads nothing else."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def dbt_reports(project: DbtProject) -> list[dg.AssetsDefinition]:
    """The dbt models, and the publication of them all: a new model is published without a word
    elsewhere."""
    models = dbt_models(project)
    return [models, publication(sorted(models.keys), sorted(models.check_keys))]


def publication(
    reports: Sequence[dg.AssetKey], tests: Sequence[dg.AssetCheckKey]
) -> dg.AssetsDefinition:
    """The asset that publishes these reports, unless one of their tests failed, with the tables
    they are made from."""

    @dg.asset(
        group_name="reports",
        kinds={"python", "duckdb"},
        owners=["team:analytics"],
        code_version="2",
        deps=[*WRITERS, *reports],
        pool="warehouse",
    )
    def published_scores(
        context: dg.AssetExecutionContext, deployment: dg.ResourceParam[Deployment]
    ) -> dg.MaterializeResult:
        """The analysts' copy of the warehouse: `data/store/public/scores.duckdb`.

        Read-only and replaced in one step, so that it can be queried at any time, also while a
        retraining writes; only after the tests of all reports passed. Readable with DuckDB 1.5 and
        later. To see a newer copy, close your connections and open it again. The same tables are in
        `parquet/` beside it, the last few publications in `snapshots/`.
        """
        import duckdb

        from posterpipe.core.publication import PUBLICATION_TABLE, publish_scores

        _require_passed(context.instance, tests)
        published = publish_scores(
            deployment.warehouse_path,
            deployment.published_path.parent,
            run_id=context.run.run_id,
            reports=[key.path[-1] for key in reports],
        )
        with duckdb.connect(str(published.database), read_only=True) as connection:
            contents = _contents(connection, PUBLICATION_TABLE)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(_digest(contents)),
            metadata={
                "path": dg.MetadataValue.path(published.database),
                "parquet": dg.MetadataValue.path(published.parquet),
                "publication": published.publication_id,
                "bytes": published.database.stat().st_size,
                "dagster/row_count": sum(rows for name, rows, _ in contents if name == "fct_score"),
                "tables": dg.MetadataValue.table(
                    [dg.TableRecord({"table": name, "rows": count}) for name, count, _ in contents]
                ),
            },
        )

    return published_scores


def _require_passed(instance: dg.DagsterInstance, tests: Sequence[dg.AssetCheckKey]) -> None:
    """Also where the publication is materialized by itself, whatever was before."""
    latest = instance.event_log_storage.get_latest_asset_check_execution_by_key(list(tests))
    failed = [
        f"{key.name} of {key.asset_key.to_user_string()}"
        for key, record in latest.items()
        if record.status == AssetCheckExecutionRecordStatus.FAILED
    ]
    if failed:
        raise dg.Failure(
            f"not published, since tests failed: {', '.join(sorted(failed))}; the publication of "
            "the last time stays. Look at the failing check, mend what it names, and materialize "
            "the report again",
            allow_retries=False,
        )


@dg.asset(
    group_name="reports",
    kinds={"python", "duckdb"},
    owners=["team:analytics"],
    code_version="2",
    io_manager_key=TABLES,
    pool="warehouse",
    metadata=columns(
        poster_id="string: sha256 of the file's bytes",
        source_name="string: path inside the landing folder",
        status="string: ok, rejected or duplicate",
        reason="string: why it is not ok",
        format="string: what the content is",
        width="int: pixels, as stored",
        height="int: pixels, as stored",
        size_bytes="int: size of the file",
        near_duplicate_of="string: an earlier poster that it resembles",
        image="string: sha256 of the resized PNG; empty but for usable posters",
        image_path="string: its path inside the store",
        caption="string: what the poster shows, in words",
        caption_source="string: model or human",
        caption_status="string: ok or failed",
        caption_reason="string: why it failed, or what to look at",
        in_training_set="bool: whether it is trained on",
    ),
)
def poster_inventory(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    raw_posters: Table,
    resized_posters: Table,
    poster_captions: Table,
    training_csv: Table,
) -> dg.Output[Table]:
    """What the dataset holds now, put into the warehouse: every poster with its state and caption.

    The reports on data quality count it, and the names of posters that images are near to come
    from it. The same posters as before change nothing there.
    """
    from posterpipe.core.inventory import record_inventory, take_inventory

    warehouse = deployment.warehouse.prepare()
    table = take_inventory(
        deployment.store, raw_posters, resized_posters, poster_captions, training_csv
    )
    record_inventory(deployment.warehouse, table, run_id=context.run.run_id)
    return table_output(
        table,
        {**counts(table, "status"), "in_training_set": int(table["in_training_set"].sum())},
        warehouse=warehouse,
    )


def _contents(connection: Any, left_out: str) -> list[tuple[str, int, str]]:
    """Name, rows and a digest of each table but one, whatever the order of its rows."""
    names = connection.execute(
        "select table_name from duckdb_tables() where not internal and table_name <> ? "
        "order by table_name",
        [left_out],
    ).fetchall()
    contents = []
    for (name,) in names:
        row_count, total = connection.execute(
            f'select count(*), coalesce(sum(hash(t)), 0) from "{name}" as t'
        ).fetchone()
        contents.append((name, row_count, str(total)))
    return contents


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dg.asset(
    group_name="reports",
    kinds={"python", "pillow"},
    owners=["team:analytics"],
    code_version="3",
)
def contact_sheet(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    tables: dg.ResourceParam[StoreIOManager],
    prompt_suite: Table,
    base_generations: Table,
    tuned_generations: Table,
) -> dg.MaterializeResult:
    """One picture of the whole study: a row a prompt, a column a variant, the same noise in a row.

    Always the first seed of each prompt, never chosen by hand; written to
    `data/store/public/contact_sheet.png`.
    """
    import pandas as pd

    from posterpipe.core.gallery import grid, markdown_image
    from posterpipe.core.store import write_atomic

    generations = pd.concat([base_generations, tuned_generations], ignore_index=True)
    seeds = {row.prompt_id: json.loads(row.seeds)[0] for row in rows(prompt_suite)}
    prompts = dict(zip(prompt_suite["prompt_id"], prompt_suite["prompt"], strict=True))
    shown = generations[generations["seed"] == generations["prompt_id"].map(seeds)]
    headings = {name: f"{prompts[name]} · seed {seeds[name]}" for name in prompts}
    drawn = set(generations["variant"])
    late_on_base, late_on_tuned = ([name] if name in drawn else [] for name in DELAYED_VARIANTS)
    columns = [*BASE_VARIANTS, *late_on_base, *TUNED_VARIANTS, *late_on_tuned]
    sheet = grid(
        list(headings.values()),
        columns,
        {
            (headings[row.prompt_id], row.variant): deployment.store_root / row.image_path
            for row in rows(shown)
            if row.image_path
        },
        cell=(108, 162),
        heading_width=200,
        title="First seed of each prompt; the same noise in every column",
        blocks=3,
    )
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    path = deployment.contact_sheet_path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
    return dg.MaterializeResult(
        data_version=dg.DataVersion(hashlib.sha256(buffer.getvalue()).hexdigest()),
        metadata={
            "contact_sheet": dg.MetadataValue.md(markdown_image(sheet, "prompts by variants")),
            "path": dg.MetadataValue.path(path),
            "images": len(shown),
            **tables.inputs_read(context.get_step_execution_context().step.key),
        },
    )


@dg.asset(
    group_name="reports",
    kinds={"python", "pillow"},
    owners=["team:analytics"],
    code_version="5",
)
def growth_chart(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    tables: dg.ResourceParam[StoreIOManager],
    base_generations: Table,
    tuned_generations: Table,
    clip_scores: Table,
    fidelity_scores: Table,
) -> dg.MaterializeResult:
    """The study's result from today's scores: its chart of the four variants, with intervals.

    Its table beside the study's four numbers, what their scales are, what fine-tuning and the
    negative prompt each do (bootstrap over prompts), the same with the texts of other prompts (the
    negative control), and the prompts that gained most and lost most, chosen by rule. Pictures,
    `growth.csv`, `effects.csv`, `control.csv` and `growth.json` lie in
    `data/store/public/thesis/`. Which effects are more than chance, all questions counted, the
    report `paired_effects` says.
    """
    import pandas as pd

    from posterpipe.core import thesis
    from posterpipe.core.gallery import markdown_image

    generations = pd.concat([base_generations, tuned_generations], ignore_index=True)
    report = thesis.report(clip_scores, generations, fidelity_scores, deployment.store_root)
    folder = deployment.thesis_path
    report.write(folder)
    pictures = {
        name: dg.MetadataValue.md(markdown_image(picture, report.captions[name]))
        for name, picture in report.pictures.items()
    }
    return dg.MaterializeResult(
        data_version=dg.DataVersion(report.digest),
        metadata={
            **pictures,
            "table": table_preview(report.table),
            "effects": table_preview(report.effects),
            "control": table_preview(report.control),
            "scales": dg.MetadataValue.md(thesis.SCALES),
            "metric": report.metric_id,
            "path": dg.MetadataValue.path(folder),
            **tables.inputs_read(context.get_step_execution_context().step.key),
        },
    )
