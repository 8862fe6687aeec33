"""The graph as Dagster loads it.

After a change of the graph, look at the difference that the failing test prints, and write the new
snapshot with `python -m posterpipe_tests.test_definitions`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import AssetSpec, AutomationConditionSensorDefinition
from dagster_dbt import dbt_assets

from posterpipe.definitions import build_defs, defs
from posterpipe.defs import dbt_reports
from posterpipe.defs.arrivals import REASON_TAG, ROOTS
from posterpipe.defs.overview import OVERVIEW
from posterpipe.defs.staleness import _LIMITS
from posterpipe.defs.timing import SOURCES
from posterpipe.settings import Settings, default_root, load_settings

SNAPSHOT = Path(__file__).parent / "graph.txt"
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "pandas", "duckdb", "matplotlib",
         "streamlit")  # fmt: skip


def describe_graph() -> str:
    """Key, inputs, group, kinds, owners, pool and checks of every asset, in one text."""
    graph = defs.resolve_asset_graph()
    checks: dict[str, list[str]] = {}
    for check in graph.asset_check_keys:
        blocking = " (blocking)" if graph.get_check_spec(check).blocking else ""
        checks.setdefault(check.asset_key.to_user_string(), []).append(check.name + blocking)
    lines = []
    for spec in sorted(defs.resolve_all_asset_specs(), key=lambda spec: spec.key):
        name = spec.key.to_user_string()
        pools = graph.get(spec.key).pools or set()
        lines += [
            name,
            f"  reads   {', '.join(sorted(dep.asset_key.to_user_string() for dep in spec.deps))}",
            f"  group   {spec.group_name}",
            f"  kinds   {', '.join(sorted(spec.kinds))}",
            f"  owners  {', '.join(spec.owners)}",
            f"  pool    {', '.join(sorted(pools))}",
            f"  checks  {', '.join(sorted(checks.get(name, [])))}",
        ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def test_graph_is_as_recorded() -> None:
    assert describe_graph() == SNAPSHOT.read_text("utf-8"), (
        "the graph is another one; where that is meant, write it anew and look at the difference: "
        ".venv/bin/python -m posterpipe_tests.test_definitions"
    )


def test_loading_the_definitions_loads_nothing_heavy_and_ends_without_complaints() -> None:
    # DuckDB's bindings tell at the end of what is left of them, on the screen; what was imported
    # before counts. Out of sight it would be imported once more.
    code = (
        "import sys, duckdb; connection = duckdb.connect(); del sys.modules['duckdb']; "
        "import posterpipe.definitions; "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)


def test_base_generations_do_not_depend_on_the_checkpoint() -> None:
    reads = {
        spec.key.to_user_string(): {dep.asset_key.to_user_string() for dep in spec.deps}
        for spec in defs.resolve_all_asset_specs()
    }
    found, upstream = set(), {"base_generations"}
    while upstream:
        found |= upstream
        upstream = set().union(*(reads[name] for name in upstream)) - found
    assert found == {"base_generations", "prompt_suite"}


def test_every_asset_is_described_for_newcomers() -> None:
    for spec in defs.resolve_all_asset_specs():
        name = spec.key.to_user_string()
        described, timing, _ = (spec.description or "").partition("**When it runs:**")
        assert len(described) > 80, name
        assert timing, name
        assert spec.owners, name
        assert spec.kinds, name
        assert spec.code_version, name


def test_what_reads_the_outside_world_says_which_change_makes_it_due() -> None:
    assert set(SOURCES) == set(ROOTS)
    specs = {spec.key.to_user_string(): spec for spec in defs.resolve_all_asset_specs()}
    for name, source in SOURCES.items():
        _, _, timing = (specs[name].description or "").partition("**When it runs:**")
        assert f"soon after {source} changed; the sensor `arrivals` looks" in timing


def test_jobs_sensors_and_schedules_are_described_for_newcomers() -> None:
    repository = defs.get_repository_def()
    jobs = [job for job in repository.get_all_jobs() if not job.name.startswith("__")]
    assert {job.name for job in jobs} >= {"refresh_dataset", "retrain", "evaluate", "everything"}
    everything: list[Any] = [*jobs, *repository.sensor_defs, *repository.schedule_defs]
    for each in everything:
        assert len(each.description or "") > 50, each.name
    # What the overview names is there.
    known = {each.name for each in everything}
    for spec in defs.resolve_all_asset_specs():
        known |= {spec.key.to_user_string(), spec.group_name}
    assert set(re.findall("`([a-z_]+)`", OVERVIEW)) <= known


def test_runs_say_why_they_were_started() -> None:
    for job in defs.get_repository_def().get_all_jobs():
        assert job.name.startswith("__") or REASON_TAG in job.tags, job.name
    sensor = defs.resolve_sensor_def("automation")
    assert isinstance(sensor, AutomationConditionSensorDefinition)
    assert REASON_TAG in sensor.run_tags


def other_versions(**changed: object) -> set[str]:
    """The assets that other settings give another code version."""

    def versions(of: Settings) -> dict[str, str | None]:
        specs = build_defs(of).resolve_all_asset_specs()
        return {spec.key.to_user_string(): spec.code_version for spec in specs}

    settings = load_settings("starter")
    before, after = versions(settings), versions(settings.model_copy(update=changed))
    return {name for name in before if before[name] != after[name]}


def test_a_setting_changes_the_code_version_of_what_it_decides_and_of_nothing_else() -> None:
    settings = load_settings("starter")
    warmer = settings.sampler.model_copy(update={"guidance_scale": 9.0, "batch_size": 1})
    slower = settings.training.model_copy(update={"log_every_steps": 77})
    differing = other_versions(sampler=warmer, training=slower)
    assert differing == {"base_generations", "tuned_generations", "champion_generations"}


def test_another_public_address_writes_the_report_with_other_links() -> None:
    assert other_versions(public_url="https://posters.example.org") == {"score_report"}


def test_a_limit_changes_the_code_version_of_what_is_checked_against_it() -> None:
    checks = load_settings("starter").checks
    unlike = {
        name: 0.123 if field.annotation is not int else 7
        for name, field in type(checks).model_fields.items()
        if name != "freshness_cron"
    }
    # Which holdout posters calibrate what a copy is, holdout_distance says as well.
    expected = {*_LIMITS, "fidelity_scores"}
    assert other_versions(checks=checks.model_copy(update=unlike)) == expected
    assert set(unlike) == {name for limits in _LIMITS.values() for name in limits}


def test_another_limit_on_copies_checks_the_images_again() -> None:
    gate = load_settings("starter").gate.model_copy(update={"copy_limit": 0.123})
    assert other_versions(gate=gate) == {"fidelity_scores", "champion"}


def test_another_base_model_judges_the_texts_again_that_its_text_encoder_reads() -> None:
    other = load_settings("starter").base_model.model_copy(update={"revision": "another"})
    differing = other_versions(base_model=other)
    assert differing >= {"prompt_suite", "training_csv", "dreambooth_checkpoint"}
    assert "base_generations" in differing
    assert not differing & {"resized_posters", "poster_captions", "poster_inventory"}


def test_dbt_models_are_what_dagster_dbt_makes_of_them() -> None:
    project = dbt_reports.dbt_project(load_settings("starter"))

    @dbt_assets(
        manifest=project.manifest_path,
        project=project,
        dagster_dbt_translator=dbt_reports._Translator(),
    )
    def peer(context):  # type: ignore[no-untyped-def] # Dagster takes no annotation as text
        ...

    def facts(spec: AssetSpec) -> tuple[object, ...]:
        deps = {dep.asset_key for dep in spec.deps}
        return deps, spec.code_version, spec.group_name, spec.description, spec.kinds

    specs, check_specs = dbt_reports.dbt_specs(project)
    described = {spec.key: facts(spec) for spec in specs}
    assert described == {spec.key: facts(spec) for spec in peer.specs}
    assert described
    assert {check.key: check.blocking for check in check_specs} == {
        check.key: check.blocking for check in peer.check_specs
    }
    assert len(check_specs) >= 2
    ours = dbt_reports.dbt_models(project)
    for key, metadata in peer.metadata_by_key.items():
        assert metadata.keys() <= ours.metadata_by_key[key].keys()


def test_dg_and_workspace_name_the_same_module() -> None:
    root = default_root()
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["dg"]["project"]
    workspace = yaml.safe_load((root / "workspace.yaml").read_text("utf-8"))
    location = workspace["load_from"][0]["python_module"]
    assert location["module_name"] == project["code_location_target_module"]
    assert location["location_name"] == project["code_location_name"]


@pytest.mark.parametrize("name", ["refresh_dataset", "retrain", "evaluate", "everything"])
def test_jobs_resolve(name: str) -> None:
    assert defs.resolve_job_def(name).asset_layer.executable_asset_keys


if __name__ == "__main__":
    SNAPSHOT.write_text(describe_graph(), "utf-8")
