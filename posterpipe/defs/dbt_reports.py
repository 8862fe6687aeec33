"""The dbt project as Dagster sees it.

What belongs here: the manifest and its age, how dbt is called, and its models as assets and its
tests as checks, with content and lineage of their columns. What does not: the models' SQL
(`dbt_like_reports/`), and what is made of the reports (`defs.reports`).
"""

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from dagster_dbt import (
    DagsterDbtTranslator,
    DagsterDbtTranslatorSettings,
    DbtCliInvocation,
    DbtCliResource,
    DbtProject,
)
from dagster_dbt.asset_utils import get_upstream_unique_ids
from dagster_dbt.errors import DagsterDbtCliRuntimeError
from packaging.version import Version

from posterpipe.core.files import sha256_of, write_atomic
from posterpipe.defs.metadata import table_preview
from posterpipe.defs.resources import Deployment
from posterpipe.settings import Settings

PROJECT = Path("dbt_like_reports")
"""Relative to the root."""

_STAMP_NAME = "manifest.of"
"""File beside the manifest: what it was made of."""

_MISTAKE = "manifest.mistake"
"""File beside the manifest, while dbt cannot read the files: what they are, and what dbt says."""


def dbt_project(settings: Settings) -> DbtProject:
    """The dbt project, with the manifest of its files as they are.

    `make install` writes the manifest. Where it is missing or another one's, as after a pull or
    while a report is edited, it is written here, which takes some seconds. A mistake in a report
    must not keep the rest of the pipeline from loading: then the previous manifest stays,
    `reports_mistake` says so, and the next run of the reports fails with dbt's message. It stays as
    well where nothing can be written; raises ReportsFailed where there is none.
    """
    project = DbtProject(project_dir=settings.path(PROJECT))
    if _manifest_is_behind(project) and not reports_mistake(settings):
        try:
            _write_manifest(project)
        except DagsterDbtCliRuntimeError as error:
            if not project.manifest_path.exists():
                raise
            _note_mistake(project, error)
            dg.get_dagster_logger().error(reports_mistake(settings))
        except OSError as error:
            unwritten = (
                f"{project.manifest_path}: dbt's manifest of the reports as they are cannot be "
                f"written ({error.strerror}); the owner of the checkout can write it with "
                "`.venv/bin/python -m posterpipe.defs.dbt_reports`"
            )
            if not project.manifest_path.exists():
                raise ReportsFailed(unwritten) from error
            dg.get_dagster_logger().warning(f"{unwritten}. Until then the previous one is used")
    return project


def reports_mistake(settings: Settings) -> str:
    """What to tell people while dbt cannot read the reports as they are; "" when it can.

    Nothing runs because of a report that does not exist for dbt, so no run says it.
    """
    project = DbtProject(project_dir=settings.path(PROJECT))
    try:
        noted = json.loads((project.manifest_path.parent / _MISTAKE).read_text("utf-8"))
    except FileNotFoundError:
        return ""
    if noted["sources"] != _sources(project) or not project.manifest_path.exists():
        return ""
    return (
        f"{PROJECT}: dbt cannot read the reports, so they stay as they were before the last edit: "
        f"{noted['said']}. Mend the file and load the code location again"
    )


def _note_mistake(project: DbtProject, error: Exception) -> None:
    note = {"sources": _sources(project), "said": _parse_errors(error)}
    write_atomic(project.manifest_path.parent / _MISTAKE, json.dumps(note).encode())


def _parse_errors(error: Exception) -> str:
    """On one line."""
    said = str(error).partition("Errors parsed from dbt logs:")[2] or str(error)
    return " ".join(said.split()).removeprefix("Encountered an error: ")


def _manifest_is_behind(project: DbtProject) -> bool:
    # By content: a file that is put back keeps its date, which may be older than the manifest's.
    try:
        return (project.manifest_path.parent / _STAMP_NAME).read_text() != _manifest_stamp(
            _sources(project), project.manifest_path
        )
    except FileNotFoundError:
        return True


def _sources(project: DbtProject) -> str:
    """Digest of the project's files."""
    files = [project.project_dir / "dbt_project.yml", project.project_dir / "profiles.yml"]
    for folder in ("models", "macros", "tests", "seeds", "snapshots"):
        files += [path for path in (project.project_dir / folder).rglob("*") if path.is_file()]
    named = {path.relative_to(project.project_dir).as_posix(): sha256_of(path) for path in files}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _manifest_stamp(sources: str, manifest: Path) -> str:
    """What is kept beside a manifest: dbt, called by hand, writes others of other files."""
    return f"{sources} {sha256_of(manifest)}"


def _write_manifest(project: DbtProject) -> None:
    target = project.manifest_path.parent
    target.mkdir(exist_ok=True)
    sources = _sources(project)  # before: what changes meanwhile is noticed the next time
    # Renamed into place: another process may be reading it, or parsing as well.
    with tempfile.TemporaryDirectory(dir=target) as folder:
        # In full: partial parsing takes a file for unchanged that has the date that it knows.
        parse = ["parse", "--quiet", "--no-partial-parse"]
        dbt_resource(project).cli(parse, target_path=Path(folder)).wait()
        of = _manifest_stamp(sources, Path(folder, project.manifest_path.name))
        for name in ("partial_parse.msgpack", project.manifest_path.name):
            os.replace(Path(folder, name), target / name)
    write_atomic(target / _STAMP_NAME, of.encode())
    (target / _MISTAKE).unlink(missing_ok=True)


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
        self._variables: dict[Path, Mapping[str, Any]] = {}
        self._specs: dict[tuple[int, str], dg.AssetSpec] = {}

    def get_asset_spec(
        self, manifest: Mapping[str, Any], unique_id: str, project: DbtProject | None
    ) -> dg.AssetSpec:
        # Asked again for each dependency of each model.
        known = (id(manifest), unique_id)
        if known not in self._specs:
            self._specs[known] = self._asset_spec(manifest, unique_id, project)
        return self._specs[known]

    def _asset_spec(
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
            code_version=_code_version(manifest, unique_id, self._variables_of(project)),
        )

    def _variables_of(self, project: DbtProject | None) -> Mapping[str, Any]:
        """What dbt_project.yml has under `vars`; it is not in the manifest."""
        if project is None:
            return {}
        folder = Path(project.project_dir)
        if folder not in self._variables:
            written = yaml.safe_load((folder / "dbt_project.yml").read_bytes()) or {}
            self._variables[folder] = written.get("vars") or {}
        return self._variables[folder]

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


def _code_version(manifest: Mapping[str, Any], unique_id: str, variables: Mapping[str, Any]) -> str:
    """Of everything of the project that a table is made by.

    dagster-dbt takes the model's own file. What it reads without a table between (ephemeral models)
    and its macros decide the table just as much, and so do the variables that these ask for, and
    the estimates that they call.
    """
    code: dict[str, Any] = {"estimates": _ESTIMATES_VERSION}
    ahead = [unique_id]
    while ahead:
        name = ahead.pop()
        node = manifest["nodes"].get(name) or manifest["macros"].get(name)
        if name in code or node is None or node["package_name"] in _OF_DBT:
            continue
        if name != unique_id and node.get("config", {}).get("materialized", "") not in _WITHIN:
            continue
        text = node.get("raw_code") or node.get("macro_sql") or node["checksum"]["checksum"]
        asked = _variable_values(_VARIABLE.findall(text), variables, node["package_name"])
        code[name] = [text, asked] if asked else text
        needs = node["depends_on"]
        ahead += [*needs.get("macros", ()), *needs.get("nodes", ())]
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()[:16]


def _variable_values(names: list[str], variables: Mapping[str, Any], package: str) -> list[Any]:
    """What variables of these names are for a package; all where a name is not written out ("")."""
    if "" in names:
        return [variables]
    own = variables.get(package)
    scopes = [own if isinstance(own, Mapping) else {}, variables]
    return [[name, *(scope.get(name) for scope in scopes)] for name in sorted({*names})]


_VARIABLE = re.compile(r"""\bvar\(\s*(?:['"](\w+)['"])?""")
"""A use of a variable of the project, and its name; "" where that is worked out."""

_ESTIMATES_VERSION = "1"
"""Raise it when `core.warehouse.sql_functions` gives other intervals: dbt's manifest has it not."""

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


class ReportsFailed(Exception):
    """dbt failed, or a test did. The message names models and tests, or the file in the way, and
    says what to do."""


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
        with deployment.warehouse.read():
            pass  # raises where nothing was written yet: dbt would make a file without tables
        with deployment.warehouse.write():
            pass  # notes what the file is before dbt writes; adds what a newer schema has
        outputs: dict[str, dg.Output[Any]] = {}
        queries: dict[str, str] = {}
        total = len(context.selected_asset_keys) + len(context.selected_asset_check_keys)
        with (
            # dbt's logs and artifacts of a run are in Dagster's log; kept, they would pile up.
            tempfile.TemporaryDirectory() as target,
            path_for_dbt(deployment.warehouse_path) as database,
            _environment(POSTERPIPE_WAREHOUSE=database),
            deployment.progress(context).task("build reports", total, "models and tests") as tick,
        ):
            build = dbt.cli(
                ["build", "--exclude-resource-type", "unit_test"],
                context=context,
                target_path=Path(target),
                raise_on_error=False,
            )
            failed: set[str] = set()
            for event in build.stream():
                tick()
                if isinstance(event, dg.Output):
                    # Held back until dbt has closed the database, so that the table can be read.
                    outputs[event.output_name] = event
                    continue
                if (
                    isinstance(event, dg.AssetCheckResult)
                    and event.asset_key is not None
                    and event.severity == dg.AssetCheckSeverity.ERROR
                    and not event.passed
                ):
                    failed.add(event.asset_key.to_python_identifier())
                yield event
            for file in Path(target, "compiled").rglob("models/**/*.sql"):
                queries[file.stem] = file.read_text("utf-8")
            problem = _problem(build).replace(database, str(deployment.warehouse_path))
        deployment.warehouse.prepare()  # notes what dbt wrote: an earlier copy lacks it
        for name, output in outputs.items():
            if name not in failed:
                yield _with_content(output, deployment, asset_of, queries.get(name, ""))
        if problem:
            raise ReportsFailed(problem)

    return models


@contextmanager
def path_for_dbt(database: Path) -> Iterator[str]:
    """A path to the database without #, after which dbt-duckdb reads no further. It leads through a
    link to the folder, so that DuckDB's other files lie beside the database."""
    if "#" not in str(database):
        yield str(database)
        return
    with tempfile.TemporaryDirectory() as folder:
        if {"#", "?"} & {*folder}:
            raise ReportsFailed(
                f"{database}: dbt cannot open a path with #, nor a link to it below {folder}: set "
                "TMPDIR, or POSTERPIPE_STORE, to a folder without # and ?"
            )
        link = Path(folder, "store")
        link.symlink_to(database.parent.absolute(), target_is_directory=True)
        yield str(link / database.name)


def _problem(build: DbtCliInvocation) -> str:
    """What went wrong, in words; "" where nothing did. Reads what dbt left in its target folder."""
    error = build.get_error()
    if error is None:
        return ""
    try:
        results = build.get_artifact("run_results.json")["results"]
    except FileNotFoundError:  # it ended before the first model
        results = []
    said = [
        f"{result['unique_id'].split('.')[2]}: {result['message']}"
        for result in results
        if result["status"] in ("error", "fail")
    ] or [_parse_errors(error)]
    return (
        f"{' '.join('; '.join(said).split())}. Mend it, and materialize the report again; those "
        "that are well are recorded. All that dbt said is in the step's stdout in the UI"
    )


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
        table: translator.get_asset_key(translator.get_resource_props(manifest, name))
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
    from posterpipe.core.store import table_version
    from posterpipe.core.warehouse.column_lineage import column_origins

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


if __name__ == "__main__":
    from posterpipe.settings import load_settings

    dbt_project(load_settings("starter"))
