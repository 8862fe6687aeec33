"""The whole graph at reduced size: real assets, real training process, real dbt, tiny models."""

from __future__ import annotations

import datetime as dt
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import duckdb
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw
from rich.console import Console

from posterpipe.commands.demo import (
    Watch,
    champion_line,
    control_line,
    leaderboard_table,
    materialize,
)
from posterpipe.core.champion.decisions import (
    GateError,
    pin,
    read_decisions,
    unpin,
    write_decisions,
)
from posterpipe.core.housekeeping.garbage import find_garbage, remove_garbage
from posterpipe.core.models import fingerprint
from posterpipe.core.progress import BarProgress
from posterpipe.core.store import Store
from posterpipe.core.trace import trace
from posterpipe.definitions import build_defs
from posterpipe.defs.arrivals import ROOTS
from posterpipe.defs.metadata import DATA_VERSION
from posterpipe.defs.resources import Deployment
from posterpipe.defs.staleness import stale_assets
from posterpipe.settings import Settings, default_root, load_settings
from posterpipe_tests.core.housekeeping.test_garbage import age
from posterpipe_tests.core.metrics.test_clip import build_tiny_clip
from posterpipe_tests.core.tiny_blip import build_tiny_blip
from posterpipe_tests.models import TINY_HEIGHT, TINY_WIDTH, build_tiny_stable_diffusion
from posterpipe_tests.reference import leaderboard

POSTERS = 6
SUITE = """
prompts:
  - id: rocket
    prompt: animated movie poster 'rocket' only one spaceship in the centre
    score_text: a film poster of one spaceship
    negative: busy, cluttered
    title: Rocket
    seeds: [11, 12]
  - id: cat
    prompt: a minimalist film poster of a blue cat
    score_text: a film poster of a blue cat
    seeds: [15, 16]
  - id: red-one
    prompt: a red poster
    score_text: a red poster
    negative: blue
    seeds: [13, 14]
"""
IMAGES_A_VARIANT = 6


@dataclass
class Pipeline:
    """A deployment in a folder of its own, and what its first run showed."""

    settings: Settings
    deployment: Deployment
    instance: dg.DagsterInstance
    watch: Watch
    output: str

    def run(self) -> Watch:
        """One more `posterpipe demo` on it."""
        watch = Watch()
        console = Console(file=io.StringIO())
        assert materialize(self.deployment, self.instance, console, watch), watch.failures
        return watch

    def latest(self, name: str) -> dg.AssetMaterialization:
        record = self.instance.get_latest_materialization_event(dg.AssetKey(name))
        assert record is not None, name
        assert record.asset_materialization is not None
        return record.asset_materialization

    def versions(self) -> dict[str, str]:
        """Data version of each asset."""
        specs = build_defs(self.settings, self.deployment).resolve_all_asset_specs()
        names = [spec.key.to_user_string() for spec in specs]
        return {name: (self.latest(name).tags or {})[DATA_VERSION] for name in names}


def draw_posters(folder: Path) -> None:
    """Small posters, and files that are none."""
    folder.mkdir()
    for number in range(POSTERS):
        image = Image.new("RGB", (80, 120), (40 * number, 90, 200 - 30 * number))
        left, top = 12 * (number % 3), 60 * (number // 3)  # so that no two look alike
        ImageDraw.Draw(image).ellipse((left, top, left + 40, top + 55), fill=(250, 240, 220))
        image.save(folder / f"poster {number}.png")
    shutil.copyfile(folder / "poster 0.png", folder / "copy of 0.png")
    (folder / "notes.png").write_text("this is no picture")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not for long")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder = tmp_path_factory.mktemp("pipeline")
    draw_posters(folder / "landing")
    (folder / "suite.yaml").write_text(SUITE)
    size = {"width": TINY_WIDTH, "height": TINY_HEIGHT}
    settings = load_settings(
        "starter",
        landing=folder / "landing",
        prompt_suite=folder / "suite.yaml",
        store=folder / "store",
        base_model={"id": str(build_tiny_stable_diffusion(folder / "base"))},
        images=size,
        captioner={
            "model": {"id": str(build_tiny_blip(folder / "captioner"))},
            "num_beams": 1,
            "max_new_tokens": 12,
        },
        # A captioner of random weights has no choice.
        checks={"max_repeated_share": 1, "max_shared_captions": 1},
        training={
            "max_train_steps": 4,
            "train_batch_size": 2,
            "log_every_steps": 2,
            "save_every_steps": 2,
            "mixed_precision": "fp32",
            "optimizer": "adamw",
            "learning_rate": 1e-3,
        },
        sampler={**size, "num_inference_steps": 2, "batch_size": 4},
        scorer={"model": {"id": str(build_tiny_clip(folder / "scorer"))}},
    )
    home = folder / "home"
    home.mkdir()
    shutil.copyfile(default_root() / "deploy" / "dagster.yaml", home / "dagster.yaml")
    screen = io.StringIO()
    console = Console(file=screen, width=120)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        deployment = Deployment(settings, BarProgress(console))
        watch = Watch()
        assert materialize(deployment, instance, console, watch), watch.failures
        yield Pipeline(settings, deployment, instance, watch, screen.getvalue())


def scores(pipeline: Pipeline) -> pd.DataFrame:
    return pipeline.deployment.store.read_table("clip_scores")


def test_every_asset_and_check_ran_and_passed(pipeline: Pipeline) -> None:
    specs = build_defs(pipeline.settings).resolve_all_asset_specs()
    assert len(specs) == 32
    assert set(pipeline.versions()) == {spec.key.to_user_string() for spec in specs}
    made = pipeline.versions()
    assert made.pop("class_images")  # prior preservation is off: there are none
    assert all(len(version) >= 12 for version in made.values())
    assert pipeline.watch.warnings == []
    assert {"raw_posters_checks", "training_csv_checks", "clip_scores_checks"} <= set(
        pipeline.watch.seconds
    )


def test_bad_files_are_rows_with_a_reason_and_the_rest_goes_on(pipeline: Pipeline) -> None:
    store = pipeline.deployment.store
    raw = store.read_table("raw_posters").set_index("source_name")
    assert raw["status"].value_counts().to_dict() == {"ok": POSTERS, "rejected": 2, "duplicate": 1}
    assert raw.loc[["notes.png", "broken.jpg"], "reason"].str.len().min() > 10
    assert len(store.read_table("training_csv")) == POSTERS


def test_the_checkpoint_knows_what_it_was_trained_on(pipeline: Pipeline) -> None:
    row = pipeline.deployment.store.read_table("dreambooth_checkpoint").iloc[0]
    folder = pipeline.deployment.store_root / row["path"]
    assert row["training_set"] == pipeline.versions()["training_csv"]
    assert row["checkpoint_id"] == pipeline.versions()["dreambooth_checkpoint"]
    assert (folder / "model_index.json").exists()
    assert not list(folder.rglob("*.bin"))
    metadata = pipeline.latest("dreambooth_checkpoint").metadata
    assert metadata["steps"].value == 4
    assert metadata["steps_per_second"].value > 0  # type: ignore[operator]
    assert "data:image/" in str(metadata["loss_curve"].value)


def test_all_variants_answer_every_prompt_and_seed(pipeline: Pipeline) -> None:
    counts = scores(pipeline)["variant"].value_counts().to_dict()
    assert counts == dict.fromkeys(
        ["sd", "sd_negative", "dreambooth", "dreambooth_negative"], IMAGES_A_VARIANT
    )


def test_image_assets_show_thumbnails_that_fit_into_the_event_log(pipeline: Pipeline) -> None:
    for name in (
        "raw_posters",
        "resized_posters",
        "poster_captions",
        "training_csv",
        "base_generations",
        "tuned_generations",
        "contact_sheet",
    ):
        shown = str(pipeline.latest(name).metadata["contact_sheet"].value)
        assert shown.startswith("!["), name
        assert "(data:image/" in shown, name
        assert len(shown) < 100_000, name


def test_tables_tell_their_rows_and_columns(pipeline: Pipeline) -> None:
    defs = build_defs(pipeline.settings)
    specs = {spec.key.to_user_string(): spec for spec in defs.resolve_all_asset_specs()}
    store = pipeline.deployment.store
    for name in ("raw_posters", "poster_captions", "prompt_suite", "tuned_generations"):
        table = store.read_table(name)
        assert pipeline.latest(name).metadata["dagster/row_count"].value == len(table)
        schema = specs[name].metadata["dagster/column_schema"]
        assert [column.name for column in schema.columns] == list(table.columns), name


def test_the_published_leaderboard_is_what_the_scores_say(pipeline: Pipeline) -> None:
    with duckdb.connect(str(pipeline.deployment.published_path), read_only=True) as connection:
        boards = connection.execute("select * from leaderboard").df()
        both = connection.execute(
            "select clip_scores.*, image.negative_prompt from clip_scores "
            "join fct_image as image using (generation_key) where is_current"
        ).df()
    # CLIP-T with crop and with pad.
    boards = boards[boards["metric_id"].isin(both["metric_id"])]
    assert sorted(name.split(".")[1] for name in boards["metric_id"].unique()) == ["crop", "pad2"]
    assert boards["is_headline"].tolist() == [True] * 4 + [False] * 4
    for metric_id, rows in both.groupby("metric_id"):
        compare(boards[boards["metric_id"] == metric_id].set_index("variant"), rows)


def compare(board: pd.DataFrame, rows: pd.DataFrame) -> None:
    """The leaderboard of one metric against its scores."""
    expected = leaderboard(rows).set_index("variant")
    assert list(board.index) == list(expected.index)
    assert board["images"].tolist() == [IMAGES_A_VARIANT] * 4
    assert board["prompts"].tolist() == [3] * 4
    np.testing.assert_allclose(board["mean"], expected["mean"], atol=1e-6)
    np.testing.assert_allclose(board["diff_to_sd"], expected["difference"], atol=1e-6)
    # The interval by hand, for one variant: three prompts, so two degrees of freedom.
    means = rows[rows["variant"] == "dreambooth"].groupby("prompt_id")["clip_cosine"].mean()
    half = 4.302653 * means.std() / np.sqrt(3)
    interval = board.loc[["dreambooth"], ["low_95", "high_95"]].to_numpy()
    expected_interval = [[means.mean() - half, means.mean() + half]]
    np.testing.assert_allclose(interval, expected_interval, atol=2e-6)


def test_analysts_may_read_while_the_pipeline_writes(pipeline: Pipeline) -> None:
    published = pipeline.deployment.published_path
    assert published.stat().st_mode & 0o222 == 0
    with (
        duckdb.connect(str(published), read_only=True) as connection,
        pipeline.deployment.warehouse.write(),
    ):
        row = connection.execute("select count(*) from clip_scores").fetchone()
    assert row == (2 * 4 * IMAGES_A_VARIANT,)


def champion_row(pipeline: Pipeline) -> pd.Series:
    return pipeline.deployment.store.read_table("champion").iloc[0]


def test_the_gate_has_judged_the_first_checkpoint_against_the_base_model(
    pipeline: Pipeline,
) -> None:
    row = champion_row(pipeline)
    decisions = read_decisions(pipeline.deployment.warehouse)
    assert decisions["checkpoint_id"].tolist() == [row["challenger"]]
    assert decisions["champion_before"].tolist() == [model_fingerprint(pipeline)]
    # Four steps on six posters prove nothing.
    assert row["decision"] in ("hold", "reject") and row["reason"]
    assert row["kind"] == "base" and row["checkpoint_id"] == model_fingerprint(pipeline)
    metadata = pipeline.latest("champion").metadata
    assert {"checks", "log", "decision", "reason", "champion"} <= metadata.keys()
    assert "champion       the base model" in champion_line(pipeline.deployment)


def model_fingerprint(pipeline: Pipeline) -> str:
    return fingerprint(pipeline.settings.base_model, pipeline.settings.root)


def test_all_evidence_is_in_the_published_database(pipeline: Pipeline) -> None:
    with duckdb.connect(str(pipeline.deployment.published_path), read_only=True) as connection:
        counts = dict(
            connection.execute(
                "select name, count(*) from fct_score join dim_metric using (metric_id) group by 1"
            ).fetchall()
        )
        decided = connection.execute("select count(*) from fct_promotion").fetchall()
    images = 4 * IMAGES_A_VARIANT
    titled = 4 * 1  # one prompt has a title, and the starter profile letters its first seed
    assert counts == {
        "CLIP-T": 2 * images, "CLIP-T specific": images, "CLIP-T control": images,
        "CLIP-T rank": images, "CLIP-I holdout": images, "CLIP-I training": images,
        "CLIP-I overfit gap": images, "CLIP-I nearest training poster": images,
        "perceptual hash distance": images, "diversity": images,
        "title edit distance, drawn": titled, "title exact, drawn": titled,
        "title edit distance, set": titled, "title exact, set": titled,
    }  # fmt: skip
    assert decided == [(1,)]


@pytest.mark.slow
def test_a_pin_makes_the_champion_stale_and_is_followed(pipeline: Pipeline) -> None:
    specs = build_defs(pipeline.settings, pipeline.deployment).resolve_all_asset_specs()
    before = pipeline.versions()
    decisions = read_decisions(pipeline.deployment.warehouse)
    base, challenger = model_fingerprint(pipeline), champion_row(pipeline)["challenger"]
    now = dt.datetime.now(dt.UTC).replace(tzinfo=None)
    if champion_row(pipeline)["decision"] == "reject":
        with pytest.raises(GateError, match="never served"):
            pin(decisions, challenger, base, who="Ida", why="I like it", decided_at=now)
    row = pin(decisions, base, base, who="Ida", why="until the fair", decided_at=now)
    write_decisions(pipeline.deployment.warehouse, lambda *_: row)
    stale = stale_assets(specs, pipeline.instance, pipeline.deployment)
    assert stale == {dg.AssetKey("champion"): "another checkpoint was chosen"}
    watch = pipeline.run()
    assert {"champion", "published_scores"} <= watch.seconds.keys()
    assert "fidelity_scores" not in watch.seconds, "nothing is measured again"
    assert champion_row(pipeline)["pinned"]
    assert pipeline.versions()["published_scores"] != before["published_scores"]
    assert stale_assets(specs, pipeline.instance, pipeline.deployment) == {}
    now = dt.datetime.now(dt.UTC).replace(tzinfo=None)
    free = unpin(
        read_decisions(pipeline.deployment.warehouse), base, who="Ida", why="over", decided_at=now
    )
    write_decisions(pipeline.deployment.warehouse, lambda *_: free)
    pipeline.run()
    assert not champion_row(pipeline)["pinned"]


def test_progress_is_shown_for_the_long_steps(pipeline: Pipeline) -> None:
    for words in ("caption", "train: 4 steps", "Drawing", "Encoding", "✓ dreambooth_checkpoint"):
        assert words in pipeline.output
    table = leaderboard_table(pipeline.deployment)
    assert table.row_count == 4
    assert "over 3 prompts (of differences 2 or more)" in str(table.caption)
    assert "with the texts of the other prompts" in control_line(pipeline.deployment)


def test_a_second_run_computes_nothing(pipeline: Pipeline) -> None:
    before, files = pipeline.versions(), contents(pipeline.deployment.store)
    watch = pipeline.run()
    made = {step for step in watch.seconds if step in watch.groups}
    assert made == set(ROOTS)
    assert pipeline.versions() == before
    assert contents(pipeline.deployment.store) == files


@pytest.mark.slow
def test_rerunning_every_step_gives_the_same_versions_from_the_store(pipeline: Pipeline) -> None:
    before, files = pipeline.versions(), contents(pipeline.deployment.store)
    defs = build_defs(pipeline.settings, pipeline.deployment)
    result = defs.resolve_job_def("everything").execute_in_process(instance=pipeline.instance)
    assert result.success
    assert pipeline.latest("dreambooth_checkpoint").metadata["reused"].value is True
    assert pipeline.latest("clip_scores").metadata["newly_scored"].value == 0
    after = pipeline.versions()
    # The report names the publication it was written from, and this is another one.
    assert before.pop("score_report") and after.pop("score_report")
    assert after == before
    assert contents(pipeline.deployment.store) == files


@pytest.mark.slow
def test_a_changed_prompt_redraws_that_prompt_and_trains_nothing(pipeline: Pipeline) -> None:
    suite = pipeline.settings.prompt_suite
    images = len(contents(pipeline.deployment.store))
    before = pipeline.versions()
    suite.write_text(SUITE.replace("a red poster", "a yellow poster"))
    try:
        watch = pipeline.run()
        after = pipeline.versions()
        assert len(contents(pipeline.deployment.store)) == images + 8
        assert "dreambooth_checkpoint" not in watch.seconds
        assert after["published_scores"] != before["published_scores"]
        assert scores(pipeline)["variant"].value_counts().tolist() == [IMAGES_A_VARIANT] * 4
    finally:
        suite.write_text(SUITE)
    pipeline.run()
    assert pipeline.versions()["clip_scores"] == before["clip_scores"]
    assert pipeline.versions()["leaderboard"] == before["leaderboard"]


def test_what_was_lost_is_stale(pipeline: Pipeline) -> None:
    specs = build_defs(pipeline.settings, pipeline.deployment).resolve_all_asset_specs()
    assert stale_assets(specs, pipeline.instance, pipeline.deployment) == {}
    for path, name in (
        (pipeline.deployment.contact_sheet_path, "contact_sheet"),
        (pipeline.deployment.published_parquet_path, "published_scores"),
        (pipeline.deployment.published_parquet_path.resolve(), "published_scores"),
    ):
        hidden = path.rename(path.with_suffix(".hidden"))
        try:
            stale = stale_assets(specs, pipeline.instance, pipeline.deployment)
        finally:
            hidden.rename(path)
        assert list(stale) == [dg.AssetKey(name)]
        assert "is gone" in stale[dg.AssetKey(name)]


def test_a_score_is_traced_to_the_runs_and_the_posters(pipeline: Pipeline) -> None:
    deployment = pipeline.deployment
    tuned = scores(pipeline).query("variant == 'dreambooth'").iloc[0]
    command = str(pipeline.latest("clip_scores").metadata["trace"].value)
    assert "posterpipe trace" in command
    traced = trace(deployment.store, [deployment.warehouse], tuned["generation_key"][:16])
    runs = {run.run_id for run in pipeline.instance.get_runs()}
    assert traced.scores[0].value == tuned["clip_cosine"]
    assert traced.scores[0].run_id in runs
    assert traced.image.run_id in runs and traced.image.present
    model = traced.model
    assert model.run_id in runs
    assert model.checkpoint_id == tuned["checkpoint_id"]
    assert model.settings["max_train_steps"] == 4
    assert model.training_set is not None
    steps = {step["asset"]: step for step in model.training_set.steps}
    assert {"raw_posters", "resized_posters", "poster_captions", "training_csv"} <= steps.keys()
    assert {step["run_id"] for step in steps.values()} <= runs
    specs = build_defs(pipeline.settings).resolve_all_asset_specs()
    code_versions = {spec.key.to_user_string(): spec.code_version for spec in specs}
    assert all(step["code_version"] == code_versions[name] for name, step in steps.items())
    names = {poster.source_names[0] for poster in model.training_set.posters}
    assert names == {f"poster {number}.png" for number in range(1, POSTERS)} | {"copy of 0.png"}
    both = ["copy of 0.png", "poster 0.png"]
    assert both in [poster.source_names for poster in model.training_set.posters]
    assert {poster.caption_source for poster in model.training_set.posters} == {"model"}
    ids = {traced.image.environment, *model.environments, *traced.scores[0].environments}
    assert ids == traced.environments.keys()
    assert traced.environments[traced.image.environment]["packages"]["torch"]


def test_a_checkpoint_in_the_place_of_another_draws_nothing(pipeline: Pipeline) -> None:
    row = pipeline.deployment.store.read_table("dreambooth_checkpoint").iloc[0]
    file = pipeline.deployment.store_root / row["path"] / "posterpipe.json"
    said = file.read_text("utf-8")
    other = {**json.loads(said), "checkpoint_id": "0" * 16, "training_set": "1" * 64}
    job = build_defs(pipeline.settings, pipeline.deployment).resolve_job_def("everything")
    file.write_text(json.dumps(other))
    try:
        result = job.execute_in_process(
            instance=pipeline.instance,
            asset_selection=[dg.AssetKey("tuned_generations")],
            raise_on_error=False,
        )
    finally:
        file.write_text(said)
    assert not result.success
    (failure,) = [e for e in result.all_events if e.event_type_value == "STEP_FAILURE"]
    message = str(failure.step_failure_data.error)
    assert "trained on the training set 111111111111" in message
    assert "materialize dreambooth_checkpoint again" in message


@pytest.mark.slow
def test_nothing_that_the_pipeline_needs_is_garbage(pipeline: Pipeline) -> None:
    store = pipeline.deployment.store
    version = store.table_version("clip_scores")
    gone = store.put(b"nobody needs this", ".png")
    age(store.root)
    removal = remove_garbage(store, find_garbage(store, keep_versions=1))
    assert f"{gone}.png" in {item.name for item in removal.removed}
    assert removal.problems == []
    defs = build_defs(pipeline.settings, pipeline.deployment)
    result = defs.resolve_job_def("everything").execute_in_process(instance=pipeline.instance)
    assert result.success
    assert store.table_version("clip_scores") == version
    assert pipeline.latest("dreambooth_checkpoint").metadata["reused"].value is True
    assert pipeline.latest("clip_scores").metadata["newly_scored"].value == 0


def test_too_few_posters_stop_the_run_with_the_reason(pipeline: Pipeline, tmp_path: Path) -> None:
    settings = pipeline.settings.model_copy(
        update={
            "store": tmp_path / "store",
            "checks": pipeline.settings.checks.model_copy(update={"min_posters": POSTERS + 1}),
        }
    )
    watch = Watch()
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as instance:
        console = Console(file=io.StringIO())
        assert not materialize(Deployment(settings), instance, console, watch)
    assert any("at least 7 are needed" in warning for warning in watch.warnings)
    assert "resized_posters" not in watch.seconds


def contents(store: Store) -> dict[str, int]:
    """Every blob and finished checkpoint with the file that holds it: written again, another."""
    blobs = {str(path): path.stat().st_ino for path in store.root.glob("blobs/*/*")}
    checkpoints = store.root.glob("checkpoints/*/posterpipe.json")
    trained = {str(path): path.stat().st_ino for path in checkpoints}
    assert all(json.loads(Path(path).read_text("utf-8"))["steps"] for path in trained)
    return blobs | trained
