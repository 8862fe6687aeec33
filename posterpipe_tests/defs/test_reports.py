"""Reports as Dagster assets: built by dbt, tested, published; a new file is a new report."""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import numpy as np
import pandas as pd
import pytest
import yaml
from dagster_dbt import DbtProject

from benchmarks.big_warehouse import build
from benchmarks.leaderboard_5m import compiled
from posterpipe.core import statistics, thesis
from posterpipe.core.champion.decisions import DECISION_COLUMNS, champion_of, verdicts
from posterpipe.core.score_report.data import TO_BASELINE
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.core.warehouse.rows import delete_titles
from posterpipe.core.warehouse.sql_functions import register
from posterpipe.defs import dbt_reports, reports
from posterpipe.defs.alerts import reason_of
from posterpipe.defs.automation import with_policy
from posterpipe.defs.resources import Deployment
from posterpipe.defs.sweep import stale_sweep
from posterpipe.settings import Settings, default_root, load_settings
from posterpipe_tests import study
from posterpipe_tests.reference import holm, leaderboard, smallest_detectable

NEW = "seed_spread"


@dataclass
class World:
    """A copy of the dbt project with one more file, over the warehouse of a study, of which some
    prompts have no negative prompt, one was drawn by the base model with another sampler, and some
    images are lettered no more."""

    settings: Settings
    deployment: Deployment
    instance: dg.DagsterInstance
    assets: list[dg.AssetsDefinition]
    result: dg.ExecuteInProcessResult

    def materialize(self, *names: str) -> dg.ExecuteInProcessResult:
        return run(self.assets, self.deployment, self.instance, names)

    def query(self, sql: str) -> pd.DataFrame:
        with duckdb.connect(str(self.deployment.published_path), read_only=True) as connection:
            return connection.execute(sql).df()


def run(
    assets: list[dg.AssetsDefinition],
    deployment: Deployment,
    instance: dg.DagsterInstance,
    names: tuple[str, ...] = (),
) -> dg.ExecuteInProcessResult:
    project = dbt_reports.dbt_project(deployment.settings)
    return dg.materialize(
        assets,
        instance=instance,
        resources={"deployment": deployment, "dbt": dbt_reports.dbt_resource(project)},
        selection=dg.AssetSelection.assets(*names) if names else None,
        raise_on_error=False,
    )


def the_file_of_the_guide() -> str:
    """What docs/adding_a_report.md tells people to write."""
    page = (default_root() / "docs" / "adding_a_report.md").read_text("utf-8")
    (block,) = re.findall(r"```sql\n(.+?)```", page, flags=re.DOTALL)
    return str(block)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("reports")
    shutil.copytree(
        default_root() / "dbt_like_reports",
        root / "dbt_like_reports",
        ignore=shutil.ignore_patterns("logs"),
    )
    new = root / "dbt_like_reports" / "models" / "marts" / f"{NEW}.sql"
    new.write_text(the_file_of_the_guide(), "utf-8")
    # dbt-duckdb takes what follows a # for no part of a path.
    settings = load_settings("starter", root=root, store=root / "store #1")
    deployment = Deployment(settings)
    study.fill(deployment.warehouse_path)
    with deployment.warehouse.write() as connection:
        connection.execute(
            "update fct_image set negative_prompt = '' "
            "where prompt_id in ('prompt-04', 'prompt-05')"
        )
        connection.execute(
            """
            update fct_image set settings = '{"negative_from": 0.2}'
            where variant like '%negative' and negative_prompt <> ''
            """
        )
        connection.execute(
            """
            update fct_image set settings = '{"guidance_scale": 9}'
            where variant like 'sd%' and prompt_id = 'prompt-02'
            """
        )
        last = connection.execute("select generation_key from fct_image where seed = 13").df()
        delete_titles(connection, last["generation_key"])
    shutil.copyfile(deployment.warehouse_path, root / "without_reports.duckdb")
    assets = with_policy(
        reports.models_and_publication(dbt_reports.dbt_project(settings)), deployment
    )
    (root / "home").mkdir()
    with dg.DagsterInstance.local_temp(str(root / "home")) as instance:
        result = run(assets, deployment, instance)
        assert result.success, [e.message for e in result.all_events if e.is_failure]
        yield World(settings, deployment, instance, assets, result)


def materialization(result: dg.ExecuteInProcessResult, name: str) -> dg.AssetMaterialization:
    (event,) = [
        event.step_materialization_data.materialization
        for event in result.get_asset_materialization_events()
        if event.asset_key == dg.AssetKey(name)
    ]
    return event


def said(result: dg.ExecuteInProcessResult) -> str:
    """Why the step failed, as people are told."""
    (error,) = [e.step_failure_data.error for e in result.all_events if e.is_step_failure]
    return reason_of(error)


def test_one_new_file_is_an_asset_with_the_policy_and_a_published_table(world: World) -> None:
    specs = {spec.key.path[-1]: spec for assets in world.assets for spec in assets.specs}
    spec = specs[NEW]
    assert spec.group_name == "reports" and spec.owners == ["team:analytics"]
    assert {dep.asset_key.path[-1] for dep in spec.deps} == {"prompt_drilldown"}
    assert spec.automation_condition is not None
    assert spec.automation_condition.get_label() == "rebuild when inputs change"
    assert dg.AssetKey(NEW) in {dep.asset_key for dep in specs["published_scores"].deps}
    table = world.query(f"from {NEW}")
    assert len(table) == 6 * 4 and table["spread_over_seeds"].notna().all()
    assert (world.deployment.published_path.parent / "parquet" / f"{NEW}.parquet").exists()
    assert materialization(world.result, NEW).metadata["dagster/row_count"].value == len(table)


def test_a_report_that_is_taken_away_makes_another_publication(world: World) -> None:
    models = world.assets[0]
    there = sorted(models.keys)

    def code_version(*keys: dg.AssetKey) -> str | None:
        (spec,) = reports.publication(keys, sorted(models.check_keys)).specs
        return spec.code_version

    without = [key for key in there if key != dg.AssetKey(NEW)]
    assert code_version(*there) == code_version(*reversed(there)) != code_version(*without)


def test_a_report_is_made_again_when_a_macro_or_a_staging_model_of_it_changes(
    world: World, tmp_path: Path
) -> None:
    project = dbt_reports.dbt_project(world.settings)
    shutil.copytree(project.project_dir, tmp_path / "reports")
    copy = DbtProject(project_dir=tmp_path / "reports")

    def versions() -> dict[str, str | None]:
        return {spec.key.path[-1]: spec.code_version for spec in dbt_reports.dbt_specs(copy)[0]}

    def edit(kind: str, name: str, code: str) -> set[str]:
        """The reports whose code version changes with an edit."""
        before = versions()
        manifest = json.loads(copy.manifest_path.read_bytes())
        (node,) = (node for node in manifest[kind].values() if node["name"] == name)
        node[code] += "\n-- edited"
        copy.manifest_path.write_text(json.dumps(manifest))
        return {name for name, version in versions().items() if version != before[name]}

    assert edit("nodes", "leaderboard", "raw_code") == {"leaderboard"}
    # t_p_value asks no_spread, and freshness neither.
    by_macro = edit("macros", "no_spread", "macro_sql")
    assert "paired_effects" in by_macro and "freshness" not in by_macro
    by_staging = edit("nodes", "stg_current_scores", "raw_code")
    assert "paired_effects" in by_staging and "gate_decisions" not in by_staging


def test_a_report_is_made_again_when_a_variable_that_it_reads_changes(
    world: World, tmp_path: Path
) -> None:
    project = dbt_reports.dbt_project(world.settings)
    shutil.copytree(project.project_dir, tmp_path / "reports")
    copy = DbtProject(project_dir=tmp_path / "reports")
    file = copy.project_dir / "dbt_project.yml"
    written = yaml.safe_load(file.read_text())

    def versions(**variables: Any) -> dict[str, str | None]:
        file.write_text(yaml.safe_dump({**written, "vars": variables}))
        return {spec.key.path[-1]: spec.code_version for spec in dbt_reports.dbt_specs(copy)[0]}

    before = versions(variants=["sd", "dreambooth"], vari=1)
    after = versions(variants=["dreambooth", "sd"], vari=1)
    changed = {name for name, version in after.items() if version != before[name]}
    assert {"leaderboard", "paired_effects"} <= changed
    assert not {"gate_decisions", "freshness"} & changed
    own = {"posterpipe_reports": {"variants": ["sd", "dreambooth"]}}
    assert versions(**own, variants=["dreambooth", "sd"]) != after, "of one project alone"
    assert versions(variants=["dreambooth", "sd"], vari=2) == after, "nobody reads it"


def test_a_report_that_an_older_file_replaces_is_noticed_and_another_date_alone_is_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[DbtProject] = []
    write = dbt_reports._write_manifest

    def counted(project: DbtProject) -> None:
        parsed.append(project)
        write(project)

    monkeypatch.setattr(dbt_reports, "_write_manifest", counted)
    report = world.settings.path(dbt_reports.PROJECT) / "models" / "marts" / "freshness.sql"
    kept = Path(shutil.copy2(report, tmp_path))
    try:
        report.write_text(report.read_text() + "\n-- edited\n", "utf-8")
        edited = code_version(world, "freshness")
        shutil.copy2(kept, report)  # its date is that of before, as `cp -p` and `rsync -t` do it
        assert code_version(world, "freshness") != edited
        assert len(parsed) == 2
        report.touch()
        assert code_version(world, "freshness") != edited
        assert len(parsed) == 2
    finally:
        shutil.copy2(kept, report)


def code_version(world: World, name: str) -> str | None:
    specs, _ = dbt_reports.dbt_specs(dbt_reports.dbt_project(world.settings))
    return next(spec.code_version for spec in specs if spec.key.path[-1] == name)


def test_a_copy_of_before_the_reports_were_made_is_known_for_one(
    world: World, tmp_path: Path
) -> None:
    file = world.deployment.warehouse_path
    shutil.copyfile(file.with_suffix(".json"), tmp_path / f"{file.stem}.json")
    shutil.copyfile(file, tmp_path / file.name)
    assert Warehouse(tmp_path / file.name).identity() == world.deployment.warehouse.identity()
    shutil.copyfile(world.settings.root / "without_reports.duckdb", tmp_path / file.name)
    assert Warehouse(tmp_path / file.name).identity() != world.deployment.warehouse.identity()


def test_every_test_of_dbt_is_a_blocking_check_that_passed(world: World) -> None:
    checks = {
        (e.asset_key.path[-1], e.check_name): e for e in world.result.get_asset_check_evaluations()
    }
    assert len(checks) >= 15
    assert all(check.passed for check in checks.values())
    keys = [key for assets in world.assets for key in assets.check_keys]
    assert {(key.asset_key.path[-1], key.name) for key in keys} == set(checks)
    specs = [spec for assets in world.assets for spec in assets.check_specs]
    assert all(spec.blocking for spec in specs)


def test_numbers_worked_out_by_hand_are_those_of_the_models(world: World) -> None:
    """The unit tests of dbt, which no run of the pipeline includes."""
    tests = yaml.safe_load(
        (
            world.settings.path(dbt_reports.PROJECT) / "models" / "marts" / "_unit_tests.yml"
        ).read_text()
    )["unit_tests"]
    dbt = dbt_reports.dbt_resource(dbt_reports.dbt_project(world.settings))
    with dbt_reports.path_for_dbt(world.deployment.warehouse_path) as database:
        done = subprocess.run(
            [dbt.dbt_executable, "test", "--select", "test_type:unit", "--project-dir",
             dbt.project_dir, "--profiles-dir", dbt.project_dir],
            env=os.environ | {"POSTERPIPE_WAREHOUSE": database},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert f"PASS={len(tests)} " in done.stdout


def test_columns_are_described_in_the_ui(world: World) -> None:
    specs = {spec.key.path[-1]: spec for assets in world.assets for spec in assets.specs}
    for name in specs.keys() - {NEW, "published_scores"}:
        schema = specs[name].metadata["dagster/column_schema"]
        assert all(column.description and column.type for column in schema.columns), name


def test_columns_lead_back_to_what_they_come_from(world: World) -> None:
    def origins(name: str, column: str) -> set[tuple[str, str]]:
        metadata = materialization(world.result, name).metadata["dagster/column_lineage"]
        deps = metadata.value.deps_by_column[column]  # type: ignore[union-attr]
        return {(dep.asset_key.path[-1], dep.column_name) for dep in deps}

    assert ("clip_scores", "value") in origins("leaderboard", "mean")
    assert origins("leaderboard", "variant") == {("clip_scores", "variant")}
    assert origins(NEW, "spread_over_seeds") == {("prompt_drilldown", "clip_cosine")}
    for name in ("nearest_poster_name", "hash_poster_name"):
        assert ("poster_inventory", "source_name") in origins("prompt_drilldown", name)


def test_every_column_of_staging_and_marts_is_described_and_contracts_are_enforced(
    world: World,
) -> None:

    manifest = json.loads(dbt_reports.dbt_project(world.settings).manifest_path.read_bytes())
    models = [node for node in manifest["nodes"].values() if node["resource_type"] == "model"]
    assert len(models) >= 15
    with world.deployment.warehouse.read() as connection:
        for node in models:
            if node["name"] == NEW:
                continue
            described = node["columns"]
            assert all(len(column["description"]) > 4 for column in described.values())
            if node["config"]["materialized"] == "table":
                assert node["config"]["contract"]["enforced"], node["name"]
                rows = connection.execute(
                    "select column_name, comment from duckdb_columns() where table_name = ?",
                    [node["name"]],
                ).fetchall()
                assert [name for name, _ in rows] == list(described), node["name"]
                assert all(comment for _, comment in rows), node["name"]


def scale_of(metric_id: object) -> statistics.Scale:
    return "ratio" if metric_id == study.DIVERSITY else "difference"


def test_the_leaderboard_is_what_python_computes(world: World) -> None:
    board = world.query("from leaderboard")
    rows = current_scores(world)
    assert len(board) == board.groupby("metric_id").size().sum() == 4 * rows["metric_id"].nunique()
    for metric_id, own in board.groupby("metric_id"):
        scores = rows[rows["metric_id"] == metric_id]
        expected = leaderboard(scores, value="value", scale=scale_of(metric_id)).set_index(
            "variant"
        )
        got = own.set_index("variant").loc[expected.index]
        for column, name in (
            ("prompts", "prompts"), ("images", "images"), ("mean", "mean"),
            ("pairs", "pairs"), ("diff_to_sd", "difference"), ("low_95", "low"),
            ("high_95", "high"), ("diff_low_95", "difference_low"),
            ("diff_high_95", "difference_high"),
        ):  # fmt: skip
            wanted = expected[name].astype(float)
            if str(metric_id).startswith("title_") and name in ("low", "high"):
                wanted = wanted.clip(0, 1)
            if str(metric_id).startswith("title_") and name.startswith("difference_"):
                wanted = wanted.clip(-1, 1)
            np.testing.assert_allclose(got[column].astype(float), wanted, atol=1e-6, err_msg=column)
        missing = got["blocked"] + got["failed"]
        assert missing.tolist() == expected["missing"].tolist()


def test_pairs_are_looked_up_in_their_own_prompt_where_prompts_share_their_seeds(
    tmp_path: Path,
) -> None:
    count = 50_000
    warehouse = build(tmp_path / "warehouse.duckdb", scores=count, current=True)
    query = compiled(tmp_path, warehouse.path)
    with duckdb.connect(str(warehouse.path)) as connection:
        register(connection)

        def rows_looked_at() -> int:
            """By the step of the query that has most."""
            explain = f"explain (analyze, format json) {query}"
            ((_, plan),) = connection.execute(explain).fetchall()
            return max(map(int, re.findall(r'"intermediate_rows": (\d+)', plan)))

        assert connection.execute(
            "select count(distinct prompt_id) from fct_image where status = 'blocked'"
        ).fetchall() == [(50,)]
        assert rows_looked_at() == count
        connection.execute(
            """
            update fct_score set value = null, status = 'failed'
            where generation_key in (
                select min(generation_key) from fct_image
                where variant = 'sd' and status = 'ok'
                group by prompt_id
            )
            """
        )
        assert rows_looked_at() == count


def test_the_leaderboard_and_the_growth_chart_tell_the_same_numbers(world: World) -> None:
    board = world.query("from leaderboard where is_headline").set_index("variant")
    scores = current_scores(world).rename(columns={"value": "clip_cosine"})
    own = scores[scores["metric_id"] == study.HEADLINE]
    chart = thesis.growth(own, own.assign(prompt="")).set_index("variant").loc[board.index]
    for column, name in (
        ("mean", "cosine"), ("low_95", "low"), ("high_95", "high"), ("clip_score", "score"),
        ("clip_score_low_95", "score_low"), ("clip_score_high_95", "score_high"),
        ("diff_to_sd", "gain"), ("diff_low_95", "gain_low"), ("diff_high_95", "gain_high"),
    ):  # fmt: skip
        np.testing.assert_allclose(
            board[column].astype(float), chart[name].astype(float), atol=1e-6, err_msg=column
        )
    others = world.query("from leaderboard where metric_id not like 'clip_t.%'")
    assert others["clip_score"].isna().all()


def test_the_leaderboard_differs_from_the_base_model_as_the_paired_effects_do(
    world: World,
) -> None:
    asked = pd.DataFrame(TO_BASELINE.items(), columns=["variant", "comparison"])
    board = world.query("from leaderboard where variant <> 'sd'").merge(asked, on="variant")
    both = board.merge(
        world.query("from paired_effects"), on=["metric_id", "comparison"], suffixes=("", "_effect")
    )
    assert len(both) == len(board) == 3 * board["metric_id"].nunique()
    for column, name in (
        ("diff_to_sd", "mean_difference"), ("diff_low_95", "low_95_effect"),
        ("diff_high_95", "high_95_effect"), ("pairs", "pairs_effect"),
        ("diff_prompts", "prompts_effect"),
    ):  # fmt: skip
        np.testing.assert_allclose(
            both[column].astype(float), both[name].astype(float), atol=2e-6, err_msg=column
        )
    # Two of the six prompts have no negative prompt, and one the base model drew with another
    # sampler; the means count them.
    own = both[both["is_headline"]].set_index("variant")
    assert own["diff_prompts"].to_dict() == {
        "sd_negative": 4, "dreambooth": 5, "dreambooth_negative": 3
    }  # fmt: skip
    assert set(own["prompts"]) == {6}


def test_the_leaderboard_counts_the_titles_that_the_report_on_legibility_counts(
    world: World,
) -> None:
    board = world.query(
        "select split_part(metric_id, '.', 2) as lettering, variant, images, prompts "
        "from leaderboard where metric_id like 'title_exact.%'"
    )
    both = board.merge(
        world.query("from legibility"), on=["lettering", "variant"], suffixes=("", "_read")
    )
    assert len(both) == 8
    # Three prompts with a title, and two of three seeds that are lettered still.
    assert both["images"].tolist() == both["images_read"].tolist() == [6] * 8
    assert both["prompts"].tolist() == both["prompts_read"].tolist()


def test_shares_of_titles_have_wilsons_interval_and_distances_stay_within_0_and_1(
    world: World,
) -> None:
    table = world.query("from legibility")
    assert len(table) == 8
    row: Any
    for row in table.itertuples():
        expected = statistics.wilson_interval(row.exact_share * row.prompts, row.prompts)
        assert (row.exact_low_95, row.exact_high_95) == pytest.approx(expected, abs=2e-6)
        assert row.exact_low_95 < row.exact_high_95
    ends = table[["distance_low_95", "distance_high_95"]].dropna()
    assert len(ends) > 0
    assert (ends >= 0).all().all() and (ends <= 1).all().all()
    assert (ends == 1).any().any() or (ends == 0).any().any(), "one would leave the range"


def test_the_paired_effects_are_what_python_computes(world: World) -> None:
    effects = world.query("from paired_effects")
    rows = current_scores(world)
    drawn = set(study.VARIANTS)
    asked = {name for name, weights in statistics.CONTRASTS.items() if drawn >= set(weights)}
    assert set(effects["comparison"]) == asked and len(asked) == 8
    for metric_id, own in effects.groupby("metric_id"):
        expected = statistics.effects(
            rows[rows["metric_id"] == metric_id], value="value",
            better=str(own["better"].iloc[0]), scale=scale_of(metric_id),
        ).set_index("contrast")  # fmt: skip
        got = own.set_index("comparison").loc[expected.index]
        most = np.array([largest(metric_id, comparison) for comparison in expected.index])
        lowest, highest = (-most, most)
        if scale_of(metric_id) == "ratio":
            lowest, highest = np.expm1(-most), np.expm1(most)
        for name in ("low", "high"):
            expected[name] = expected[name].clip(lowest, highest)
        for column, name in (
            ("mean_difference", "estimate"), ("effect_size", "effect_size"),
            ("win_rate", "win_rate"), ("win_low_95", "win_low"), ("win_high_95", "win_high"),
            ("prompts", "prompts"), ("pairs", "pairs"), ("low_95", "low"), ("high_95", "high"),
        ):  # fmt: skip
            np.testing.assert_allclose(
                got[column].astype(float), expected[name].astype(float), atol=3e-6, err_msg=column
            )
    assert effects.loc[effects["better"].isin(["neither", "nearer 0"]), "win_rate"].isna().all()
    assert effects.loc[effects["better"].isin(["higher", "lower"]), "win_rate"].notna().all()
    assert {"neither", "lower"} < set(effects["better"])


def test_the_prompt_that_an_effect_rests_on_is_the_one_that_python_names(tmp_path: Path) -> None:
    warehouse = study.fill(tmp_path / "warehouse.duckdb", prompts=14)
    with warehouse.write() as connection:
        connection.execute(
            """
            update fct_score set value = value * 20
            where metric_id in (?, ?) and generation_key in (
                select generation_key from fct_image
                where prompt_id = 'prompt-03' and variant = 'dreambooth'
            )
            """,
            [study.SPECIFIC, study.DIVERSITY],
        )
    project = default_root() / "dbt_like_reports"
    beside = Path(sys.executable).with_name("dbt")
    subprocess.run(
        [beside if beside.exists() else "dbt", "--quiet", "--log-path", tmp_path / "log", "run",
         "--select", "paired_effects", "--project-dir", project, "--profiles-dir", project,
         "--target-path", tmp_path / "target"],
        env=os.environ | {"POSTERPIPE_WAREHOUSE": str(warehouse.path)},
        check=True,
    )  # fmt: skip
    with warehouse.read() as connection:
        effects = connection.execute("from paired_effects").df()
        rows = statistics.answers(connection.execute(CURRENT_SCORES).df())
    named: Counter[str] = Counter()
    row: Any
    for row in effects.itertuples():
        found = statistics.one_prompt(by_prompt(rows, row))
        assert row.one_prompt_share == pytest.approx(found.share, abs=2e-6, nan_ok=True)
        numbers = [found.mean, found.low, found.high]
        if found.rests_on is None:
            assert pd.isna(row.rests_on)
        else:
            named[str(row.metric_id)] += row.rests_on == found.rests_on
        if row.scale == "ratio":
            numbers = [math.expm1(number) for number in numbers]
        told = [row.mean_without, row.low_95_without, row.high_95_without]
        assert told == pytest.approx(numbers, rel=1e-5, abs=3e-6, nan_ok=True)
        assert pd.isna(row.mean_without) == (found.rests_on is None)
    assert named[study.SPECIFIC] >= 4 and named[study.HEADLINE] == 0


def test_the_limits_of_one_prompt_are_the_same_in_sql(world: World) -> None:
    macro = macros(world)
    assert float(macro.one_prompt_share()) == statistics.ONE_PROMPT_SHARE
    assert int(macro.one_prompt_among()) == statistics.ONE_PROMPT_AMONG


WIDTHS = {
    "title_": 1.0, "clip_rank.": 1.0, "clip_t.": 2.0, "clip_control.": 2.0, "similarity.": 2.0,
    "nearest.": 2.0, "clip_specific.": 4.0, "overfit_gap.": 4.0, "phash.": 64.0,
    "diversity.": math.log(2 / statistics.RATIO_FLOOR),
}  # fmt: skip
"""From the lowest to the highest value of a metric, by how its id begins; of logarithms where it is
compared by them."""


def largest(metric_id: object, comparison: object) -> float:
    """The most by which a metric can differ; of ratios, before they are told as such."""
    (width,) = (width for start, width in WIDTHS.items() if str(metric_id).startswith(start))
    return width * (2 if comparison == "interaction" else 1)


def by_prompt(rows: pd.DataFrame, effect: Any) -> pd.Series:
    """The differences behind a row of paired_effects, on the scale on which it averages them."""
    weights = statistics.CONTRASTS[str(effect.comparison)]
    cells = rows[rows["metric_id"] == effect.metric_id].pivot_table(
        index=["prompt_id", "seed", "question"], columns="variant", values="value"
    )
    means = cells[list(weights)].dropna().groupby("prompt_id").mean()
    if effect.scale == "ratio":
        means = statistics.logarithms(means)
    return (means * pd.Series(weights)).sum(axis=1)


def test_what_is_detectable_counts_the_questions_of_its_family(world: World) -> None:
    effects = world.query("from paired_effects")
    rows = statistics.answers(current_scores(world))
    (primary,) = effects.loc[effects["is_primary"], ["metric_id", "comparison"]].to_numpy().tolist()
    assert primary == [study.HEADLINE, "tuned without negative"]
    questions = effects.groupby("family")["p_value"].count()
    assert questions["headline"] == questions["specific"] == 8
    assert 8 < questions["guard"] < questions["other"]
    beyond = 0
    row: Any
    for row in effects.itertuples():
        expected = smallest_detectable(
            by_prompt(rows, row).to_numpy(),
            tests=1 if row.is_primary else int(questions[row.family]),
        )
        if expected > largest(row.metric_id, row.comparison):
            expected, beyond = math.nan, beyond + 1
        if row.scale == "ratio":
            expected = math.expm1(expected)
        assert row.detectable_difference == pytest.approx(expected, abs=3e-6, nan_ok=True)
    assert beyond > 0, "two titles show nothing that titles could differ by"


def test_p_values_of_effects_are_students_and_corrected_by_holm(
    world: World,
) -> None:
    effects = world.query("from paired_effects")
    rows = statistics.answers(current_scores(world))
    assert effects["metric_id"].nunique() > 3
    row: Any
    for row in effects.itertuples():
        alone = t_p_value(by_prompt(rows, row))
        assert row.p_value == pytest.approx(alone, abs=2e-6, nan_ok=True)
    for _, asked in effects.groupby("family"):
        expected = holm(asked["p_value"].to_numpy(dtype=float))
        np.testing.assert_allclose(asked["p_adjusted"], expected, atol=1e-9)
    assert (effects["p_adjusted"] > effects["p_value"]).any()
    guards = {study.GAP, study.NEAREST, study.DIVERSITY}
    assert set(effects.loc[effects["family"] == "guard", "metric_id"]) == guards
    # What checks the headline is weakened by no other metric.
    assert set(effects.loc[effects["family"] == "specific", "metric_id"]) == {study.SPECIFIC}


def test_nothing_but_the_primary_question_is_called_higher_or_lower_without_the_correction(
    world: World,
) -> None:
    effects = world.query("from paired_effects")
    side = np.select([effects["low_95"] > 0, effects["high_95"] < 0], ["higher", "lower"], "")
    called = effects["finding"].isin(["higher", "lower"])
    primary = effects["is_primary"]
    assert (called == ((side != "") & (primary | (effects["p_adjusted"] < 0.05)))).all()
    assert (effects["finding"][called] == side[called]).all()
    assert primary.sum() == 1 and (called & primary).any()


def test_who_is_champion_after_each_decision_is_what_the_gate_says(world: World) -> None:
    log = world.query("from gate_decisions order by decided_at")
    with world.deployment.warehouse.read() as connection:
        decisions = connection.execute("from fct_promotion order by decided_at").df()
    expected = [champion_of(decisions.iloc[: end + 1], study.BASE) for end in range(len(decisions))]
    assert log["champion_after"].tolist() == expected
    assert expected == [study.BASE, study.OLD, study.BASE, study.NEW]
    assert log["is_latest"].tolist() == [False, False, False, True]
    assert log["checks_undecided"].tolist() == [1, 0, 0, 0]
    # Decisions of before these numbers were told, and of people, have none.
    told = ["copy_sensitivity", "specific_difference", "preference_difference",
            "preference_low_95", "preference_high_95", "preference_prompts",
            "preference_win_rate", "preference_win_low_95", "preference_win_high_95"]  # fmt: skip
    assert log[told].iloc[:-1].isna().all(axis=None)
    assert log[told].iloc[-1].tolist() == [0.72, -0.01, 0.4, 0.1, 0.7, 24, 0.875, 0.69, 0.957]
    trend = world.query("from checkpoint_trend where is_headline")
    assert set(trend.loc[trend["is_champion"], "checkpoint_id"]) == {study.NEW}
    assert set(trend["checkpoint_id"]) == {study.BASE, study.OLD, study.NEW}


def any_decisions(rng: np.random.Generator, count: int) -> pd.DataFrame:
    """Decisions of gate and people about two base models or an unknown one, against all rules."""
    rows: list[dict[str, Any]] = []
    for place in range(count):
        base = ("base1", "base2", None)[rng.choice(3, p=[0.55, 0.3, 0.15])]
        own = f"{base or 'base1'} {rng.integers(4)}"
        by_gate = rng.random() < 0.65
        verdict = str(rng.choice(["promote", "hold", "reject"]))
        pins = json.dumps({"pinned": bool(rng.random() < 0.7)})
        rows.append(
            {
                "decision_id": str(place), "decided_at": study.NOW + dt.timedelta(hours=place),
                "checkpoint_id": own, "champion_before": "", "reason": "made up",
                "decision": verdict if by_gate else "promote",
                "numbers": "{}" if by_gate else pins,
                "decided_by": "gate" if by_gate else "ada", "run_id": "run", "base_model": base,
            }
        )  # fmt: skip
    return pd.DataFrame(rows, columns=list(DECISION_COLUMNS))


def test_reports_and_gate_agree_on_the_champion_whatever_was_decided() -> None:
    model = default_root() / "dbt_like_reports" / "models" / "staging" / "stg_decisions.sql"
    query = re.sub(r"\{\{ (ref|source)\(.*?'(\w+)'\) \}\}", r"\2", model.read_text("utf-8"))
    rng = np.random.default_rng(5)
    pinned_rejected = 0
    with duckdb.connect() as connection:
        connection.execute(
            "CREATE TABLE stg_current_images AS SELECT 'base1' AS checkpoint_id, 'sd' AS variant"
        )
        for _ in range(60):
            decisions = any_decisions(rng, 14)
            connection.execute("CREATE OR REPLACE TABLE fct_promotion AS SELECT * FROM decisions")
            told = connection.execute(f"{query} ORDER BY place").df()
            expected = [
                champion_of(decisions.iloc[: end + 1], base)
                for end, base in enumerate(decisions["base_model"].fillna("base1"))
            ]
            assert told["champion_after"].tolist() == expected
            of_current = decisions["base_model"].fillna("base1") == "base1"
            assert told["is_of_current_base"].tolist() == of_current.tolist()
            for end, row in enumerate(decisions.itertuples()):
                verdict = verdicts(decisions.iloc[:end]).get(str(row.checkpoint_id))
                pinned_rejected += row.decided_by == "ada" and verdict == "reject"
    assert pinned_rejected > 20


def test_counts_of_posters_copies_and_readings_are_those_of_the_tables(world: World) -> None:
    quality = world.query("from data_quality").set_index(["section", "item"])["items"]
    assert quality["posters"].to_dict() == {"ok": 5, "rejected": 2, "duplicate": 1}
    assert quality["captions"].to_dict() == {"human": 1, "model": 3, "model, to look at": 1}
    assert quality["training set"].to_dict() == {"trained on": 4, "left out": 1}
    assert quality["images of sd"].to_dict() == {"ok": 17, "blocked": 1}
    drill = world.query("from prompt_drilldown")
    assert len(drill) == 72 and drill["clip_cosine"].isna().sum() == 3
    copies = world.query("from overfit_and_copy where is_current")
    assert copies["copies"].sum() == drill["copied"].fillna(False).sum() > 0
    # Those of the newest checkpoint: the study reads the base model's twice, otherwise each time.
    read = world.query("from legibility where lettering = 'set' and variant like 'dreambooth%'")
    newest = drill[drill["variant"].str.startswith("dreambooth")]
    assert read["exact"].sum() == (newest["title_distance_set"] == 0).sum() > 0
    shown = drill[drill["copied"].notna()].iloc[0]
    assert shown["nearest_poster_name"] == "poster 1.png"
    assert shown["hash_poster_name"] == "poster 2.png"
    assert dict(shown["scores"])["CLIP-T crop"] == shown["clip_cosine"]


def test_the_gap_less_that_of_the_base_model_is_the_difference_of_the_leaderboard(
    world: World,
) -> None:
    board = world.query(
        "select variant, diff_to_sd, diff_low_95, diff_high_95, diff_prompts from leaderboard "
        f"where metric_id = '{study.GAP}'"
    ).set_index("variant")
    gaps = world.query("from overfit_and_copy")
    current = gaps[gaps["is_current"]].set_index("variant")
    for name in ("diff_to_sd", "diff_low_95", "diff_high_95"):
        got, expected = current[f"gap_{name}"].loc[board.index], board[name]
        np.testing.assert_allclose(got.astype(float), expected.astype(float), atol=2e-6)
    assert current["gap_diff_to_sd"].isna()["sd"]
    prompts = dict(zip(board.index, board["diff_prompts"], strict=True))
    assert prompts["sd_negative"] < prompts["dreambooth"]
    # An earlier checkpoint as well, here against the same posters.
    assert gaps.loc[~gaps["is_current"], "gap_diff_to_sd"].notna().all()
    assert len(gaps) > len(current)


CURRENT_SCORES = """
    select image.variant, image.prompt_id, image.seed, image.negative_prompt, score.metric_id,
        score.value,
        -- When a negative prompt begins to act is no other question.
        image.prompt_key || replace(image.settings, '"negative_from": 0.2', '') as question
    from fct_score as score
    join fct_image as image using (generation_key)
    semi join current_generation using (generation_key)
    where score.metric_id not like 'title%' or generation_key in (
        select generation_key from fct_title
    )
"""


def current_scores(world: World) -> pd.DataFrame:
    return world.query(CURRENT_SCORES)


def t_p_value(values: pd.Series) -> float:
    """Two-sided, of no mean difference: NaN where all are 0."""
    n, mean, deviation = len(values), values.mean(), values.std(ddof=1)
    if mean == 0:
        return 1.0 if deviation > 0 else math.nan
    t, area = t_areas(n - 1)
    return 2 * (1 - float(np.interp(abs(mean) / deviation * math.sqrt(n), t, area)))


@lru_cache
def t_areas(degrees: int) -> tuple[np.ndarray, np.ndarray]:
    """Student's t from 0 on, and the area below it, by the trapezoidal rule over t = tan(x): no
    table, no series."""
    x = np.linspace(0, math.pi / 2, 400_001)[:-1]
    t = np.tan(x)
    log_density = -(degrees + 1) / 2 * np.log1p(t * t / degrees)
    constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    density = np.exp(log_density + constant) / math.sqrt(degrees * math.pi) * (1 + t * t)
    steps = (density[1:] + density[:-1]) / 2 * np.diff(x)
    return t, 0.5 + np.concatenate([[0.0], np.cumsum(steps)])


def macros(world: World) -> Any:
    from jinja2 import Environment

    macro = (world.settings.path(dbt_reports.PROJECT) / "macros" / "estimates.sql").read_text(
        "utf-8"
    )
    return Environment(extensions=["jinja2.ext.do"]).from_string(macro).module


def test_p_values_of_t_in_sql_are_right_for_few_and_many_prompts(world: World) -> None:
    sql = macros(world).t_p_value("m", "s", "n")
    cases = [(m, 1.0, n) for n in (2, 3, 4, 5, 8, 25, 40, 400) for m in (-2.5, -0.1, 0.02, 0.4)]
    values = ", ".join(f"({m}, {s}, {n})" for m, s, n in cases)
    found = duckdb.execute(f"select m, s, n, {sql} from (values {values}) as t(m, s, n)").fetchall()
    assert len(found) == len(cases)
    for m, s, n, p_value in found:
        t, area = t_areas(n - 1)
        expected = 2 * (1 - np.interp(abs(float(m)) / float(s) * math.sqrt(n), t, area))
        assert p_value == pytest.approx(expected, abs=2e-6), (m, n)
    unknown = duckdb.execute(f"select {sql} from (values (0.3, 0.1, 1)) as t(m, s, n)").fetchall()
    assert unknown == [(None,)]


def test_intervals_end_where_values_and_differences_of_a_metric_do(world: World) -> None:
    """An interval of two prompts reaches 12.7 standard errors to either side."""
    macro = macros(world)
    ranges = {
        study.HEADLINE: (-1, 1), study.CONTROL: (-1, 1), study.NEAREST: (-1, 1),
        study.SPECIFIC: (-2, 2), study.GAP: (-2, 2), study.RANK: (0, 1),
        study.DIVERSITY: (0, 2), "phash.training.x.v1": (0, 64), "title_exact.set.x.v1": (0, 1),
        "pickscore.x.v1": (-147, 147),
    }  # fmt: skip
    for metric_id, (low, high) in ranges.items():
        ends = ", ".join(macro.within_range(n, f"'{metric_id}'") for n in (-147, 147, "null"))
        assert duckdb.execute(f"select {ends}").fetchall() == [(low, high, None)], metric_id
        if metric_id == study.DIVERSITY or metric_id.startswith("pickscore"):
            continue
        ends = ", ".join(
            macro.difference_within_range(n, f"'{metric_id}'", "'difference'", times)
            for n, times in ((-147, 1), (147, 1), (147, 2), ("null", 1))
        )
        width = high - low
        expected = (max(-width, -147), width, min(2 * width, 147), None)
        assert duckdb.execute(f"select {ends}").fetchall() == [expected], metric_id
    # No mean of images is further from another than the highest is from the floor of logarithms.
    most = 2 / statistics.RATIO_FLOOR
    sql = macro.difference_within_range(50, f"'{study.DIVERSITY}'", "'ratio'")
    assert duckdb.execute(f"select {sql}").fetchone() == (pytest.approx(most - 1),)


def test_the_p_value_of_prompts_that_all_differ_by_the_same_is_that_of_their_signs(
    world: World,
) -> None:
    sql = macros(world).t_p_value("m", "s", "n")
    cases = [(0.0, 0.0, 5), (0.2, 0.0, 5), (-0.2, 1e-17, 2), (1e-17, 1e-17, 9), (0.2, 0.0, 24)]
    values = ", ".join(f"({m}, {s}, {n})" for m, s, n in cases)
    found = duckdb.execute(f"select {sql} from (values {values}) as t(m, s, n)").fetchall()
    # Of 2^n patterns of signs, two are all alike; where nothing differs, there is no sign.
    assert [p for (p,) in found] == [None, 2 / 2**5, 2 / 2**2, None, 2 / 2**24]


@pytest.mark.slow
def test_a_failing_test_keeps_the_publication_of_before(world: World) -> None:
    before = world.deployment.published_path.read_bytes()
    test = world.settings.path(dbt_reports.PROJECT) / "tests" / "never_true.sql"
    test.write_text("select * from {{ ref('leaderboard') }}", "utf-8")
    try:
        assets = with_policy(
            reports.models_and_publication(dbt_reports.dbt_project(world.settings)),
            world.deployment,
        )
        result = run(assets, world.deployment, world.instance, ("leaderboard", "published_scores"))
        assert not result.success
        failed = [e for e in result.get_asset_check_evaluations() if not e.passed]
        assert [check.check_name for check in failed] == ["never_true"]
        # Nor when somebody asks for the publication alone.
        alone = run(assets, world.deployment, world.instance, ("published_scores",))
        assert not alone.success
        (message,) = [
            event.event_specific_data.user_failure_data.description  # type: ignore[union-attr]
            for event in alone.all_events
            if event.is_step_failure
        ]
        assert "never_true of leaderboard" in str(message)
    finally:
        test.unlink()
    assert world.deployment.published_path.read_bytes() == before
    assert world.materialize("leaderboard", "published_scores").success


def test_a_file_that_dbt_cannot_read_stops_nothing_else_and_is_told(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = world.settings.path(dbt_reports.PROJECT) / "models" / "marts" / "broken.sql"
    broken.write_text("select {{ ref('leaderboard' }}", "utf-8")
    try:
        project = dbt_reports.dbt_project(world.settings)
        assets = reports.models_and_publication(project)
        # The reports themselves fail with what dbt says; and so that people learn of it before one
        # runs, the sweep and the demo say it first. It is not read again until it is another file.
        assert "Compilation Error in model broken" in said(world.materialize("freshness"))
        mistake = dbt_reports.reports_mistake(world.settings)
        assert "marts/broken.sql" in mistake and "stay as they were" in mistake
        resources = {"deployment": world.deployment, "dbt": dbt_reports.dbt_resource(project)}
        definitions = dg.Definitions(assets, sensors=[stale_sweep], resources=resources)
        context = dg.build_sensor_context(
            world.instance, definitions=definitions, resources={"deployment": world.deployment}
        )
        assert (stale_sweep.evaluate_tick(context).skip_message or "").startswith(mistake)
        with monkeypatch.context() as patch:
            patch.setattr(dbt_reports, "_write_manifest", lambda _: pytest.fail("read again"))
            dbt_reports.dbt_project(world.settings)
    finally:
        broken.unlink()
    assert dbt_reports.reports_mistake(world.settings) == ""
    assert {spec.key for a in assets for spec in a.specs} == {
        spec.key for a in world.assets for spec in a.specs
    }
    assert "dbt cannot read the reports" in caplog.text and "broken" in caplog.text


def test_without_room_for_a_manifest_the_one_before_is_used_or_a_sentence_says_who_can_write_it(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refused)
    new = world.settings.path(dbt_reports.PROJECT) / "models" / "marts" / "new.sql"
    new.write_text("select 1 as one", "utf-8")
    try:
        assert dbt_reports.dbt_project(world.settings).manifest_path.exists()
    finally:
        new.unlink()
    assert "(Read-only file system); the owner of the checkout can" in caplog.text
    (tmp_path / dbt_reports.PROJECT).mkdir()
    for name in ("dbt_project.yml", "profiles.yml"):
        source = world.settings.path(dbt_reports.PROJECT) / name
        shutil.copyfile(source, tmp_path / dbt_reports.PROJECT / name)
    with pytest.raises(dbt_reports.ReportsFailed, match="the owner of the checkout can"):
        dbt_reports.dbt_project(world.settings.model_copy(update={"root": tmp_path}))


def test_where_no_path_leads_dbt_to_the_database_a_sentence_says_so(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "#").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "#"))
    told = said(world.materialize("freshness"))
    assert "store #1/warehouse.duckdb: dbt cannot open" in told and "set TMPDIR" in told


def test_without_a_score_a_report_names_the_asset_that_comes_first(
    world: World, tmp_path: Path
) -> None:
    empty = Deployment(world.settings.model_copy(update={"store": tmp_path / "store"}))
    result = run(world.assets, empty, world.instance, ("leaderboard",))
    assert "materialize the asset `clip_scores` first" in said(result)
    assert not empty.warehouse_path.exists()


# The last one: it leaves a failed test behind.
def test_a_failing_report_keeps_none_of_the_others_from_being_recorded(world: World) -> None:
    asked = ("gate_checks", "gate_decisions", "freshness", "data_quality")
    with world.deployment.warehouse.write() as connection:
        connection.execute("update fct_promotion set numbers = replace(numbers, 'pass', 'odd')")
    result = world.materialize(*asked)
    assert not result.success
    failed = [check for check in result.get_asset_check_evaluations() if not check.passed]
    assert {check.asset_key.path[-1] for check in failed} == {"gate_checks"}
    made = {event.asset_key for event in result.get_asset_materialization_events()}
    assert made == {dg.AssetKey("freshness"), dg.AssetKey("data_quality")}
    assert materialization(result, "freshness").metadata["dagster/row_count"].value == 6
    # What is to be mended is named, and no file that is gone.
    assert f"{failed[0].check_name}: Got 1 result" in said(result)
    assert "/tmp" not in said(result)
