"""The checks as Dagster runs them: each fails on a planted fault and names it, and stops what its
blocking promises."""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pandas as pd
import pytest
from dagster._core.definitions.schedule_definition import ScheduleExecutionData
from PIL import Image

from posterpipe.core.champion.decisions import DECISION_COLUMNS, GATE, write_decisions
from posterpipe.core.images import png_bytes, resize_posters
from posterpipe.core.posters.arrivals import holdout_entries
from posterpipe.core.posters.landing import scan, scan_holdout
from posterpipe.core.posters.listing import HOLDOUT, Folder
from posterpipe.core.provenance.checkpoints import CHECKPOINT
from posterpipe.core.store import Store
from posterpipe.core.training.training_set import build_training_set
from posterpipe.core.variants import BASE_VARIANTS, TUNED_VARIANTS
from posterpipe.defs import champion, checks, dataset, generation, ingest, scoring
from posterpipe.defs.arrivals import REASON_TAG
from posterpipe.defs.freshness import score_freshness_schedule
from posterpipe.defs.resources import TABLES, Deployment, store_tables
from posterpipe.defs.staleness import INPUT_DATA_VERSION
from posterpipe.settings import CheckSettings, Settings, default_root, load_settings

POSTERS = (
    "barley_roadster.jpg",
    "biscuit_rampart.png",
    "copper_liftoff.png",
    "drowsy_parasol.png",
    "feather_chord.jpg",
    "plum_spore.png",
)
CAPTIONS = ("a car", "a castle", "a rocket", "an umbrella", "a guitar", "a mushroom")
PROMPTS = ("cat", "sea")
ALL = [
    spec
    for of_an_asset in dg.load_asset_checks_from_modules([checks])
    for spec in of_an_asset.check_specs
]
NAMED = {spec.name: spec for spec in ALL}


@dataclass
class World:
    """A deployment whose tables lie in its store, as if all assets had been materialized."""

    settings: Settings
    store: Store
    instance: dg.DagsterInstance

    @property
    def landing(self) -> Path:
        return Path(self.settings.landing)

    def table(self, name: str) -> pd.DataFrame:
        return self.store.read_table(name)

    def change(self, name: str, row: int, **values: str | float) -> None:
        """Other values in one row of a table."""
        table = self.table(name)
        for column, value in values.items():
            table[column] = table[column].astype(object)
            table.loc[row, column] = value
        self.store.write_table(name, table)

    def drop(self, name: str, row: int) -> None:
        self.store.write_table(name, self.table(name).drop(index=row))

    def ingest(self) -> None:
        """What the assets from the posters to the training set do, with captions by hand."""
        limits = self.settings.images
        posters = scan(Folder(self.landing), limits, self.store)
        resized = resize_posters(self.store, posters, limits)
        words = dict(zip(POSTERS, CAPTIONS, strict=True))
        names = dict(zip(posters["poster_id"], posters["source_name"], strict=True))
        captions = resized[["poster_id", "status", "reason"]].assign(
            caption=[words.get(names[key], f"poster {key}") for key in resized["poster_id"]],
            source="human",
        )
        training, _, version = build_training_set(self.store, resized, captions)
        self.store.write_table("raw_posters", posters)
        self.store.write_table("resized_posters", resized)
        self.store.write_table("poster_captions", captions)
        self.store.write_table("training_csv", training.assign(training_set=version))

    def hold_out(self) -> None:
        """What `holdout_posters` does."""
        limits = self.settings.images
        held = scan_holdout(
            Folder(self.settings.holdout, HOLDOUT),
            limits,
            self.store,
            entries=holdout_entries(self.settings.holdout),
        )
        self.store.write_table("holdout_posters", held)

    def train(self) -> None:
        """What the instance knows after a training on the present posters of the landing folder."""
        self.read_posters(self.landing)
        version = self.table("training_csv")["training_set"].iloc[0]
        tags = {f"{INPUT_DATA_VERSION}training_csv": version}
        self.instance.report_runless_asset_event(
            dg.AssetMaterialization("dreambooth_checkpoint", tags=tags)
        )

    def read_posters(self, folder: Path) -> None:
        """The same after posters were read from a folder."""
        metadata = {"folder": dg.MetadataValue.path(folder)}
        self.instance.report_runless_asset_event(
            dg.AssetMaterialization("raw_posters", metadata=metadata)
        )

    def draw(self) -> None:
        """What the assets from the prompts to the scores do, with one picture for all."""
        with Image.open(self.landing / POSTERS[0]) as image:
            picture = self.store.put(png_bytes(image.convert("RGB").resize((40, 60))), ".png")
        suite = pd.DataFrame({"prompt_id": PROMPTS, "seeds": ["[1, 2]", "[3]"]})
        self.store.write_table("prompt_suite", suite)
        for name, variants in (
            ("base_generations", BASE_VARIANTS),
            ("tuned_generations", TUNED_VARIANTS),
        ):
            cells = [(v, p, s) for v in variants for p, s in (("cat", 1), ("cat", 2), ("sea", 3))]
            drawn = pd.DataFrame(cells, columns=["variant", "prompt_id", "seed"]).assign(
                generation_key=[" ".join(map(str, cell)) for cell in cells],
                checkpoint_id=name,
                image=picture,
                status="ok",
                reason="",
            )
            self.store.write_table(name, drawn)
        self.score()
        self.prove()

    def score(self) -> None:
        both = [self.table(name) for name in ("base_generations", "tuned_generations")]
        scores = pd.concat(both, ignore_index=True).assign(clip_cosine=0.25)
        self.store.write_table("clip_scores", scores)
        for name in ("base_generations", "tuned_generations", "clip_scores"):
            self.instance.report_runless_asset_event(dg.AssetMaterialization(name))

    def prove(self) -> None:
        """What the assets around the champion do."""
        both = [self.table(name) for name in ("base_generations", "tuned_generations")]
        images = pd.concat(both, ignore_index=True)
        titled = images[["generation_key", "status", "reason"]].assign(title="Sea")
        self.store.write_table("titled_posters", titled)
        measured = images.assign(
            metric="nearest",
            checkpoint_id="tuned",
            role="copies",
            value=0.5,
            nearest_poster="ab",
            copied=False,
            copied_by="",
            copied_poster="",
            copy_threshold=0.9,
        )
        self.store.write_table("fidelity_scores", measured)
        read = titled.assign(lettering="set", read="SEA", distance=0.0, exact=True)
        self.store.write_table("legibility_scores", read)
        served = {"checkpoint_id": "base", "path": "", "kind": "base"}
        self.store.write_table("champion", pd.DataFrame([served]))

    def definitions(self, *more: dg.AssetsDefinition) -> dg.Definitions:
        deployment = Deployment(self.settings)
        return dg.Definitions(
            assets=[
                *dg.load_assets_from_modules([ingest, dataset, generation, scoring, champion]),
                dg.AssetSpec("dreambooth_checkpoint"),
                *more,
            ],
            asset_checks=dg.load_asset_checks_from_modules([checks]),
            schedules=[score_freshness_schedule(self.settings)],
            resources={"deployment": deployment, TABLES: store_tables(deployment)},
        )

    def run(
        self, selection: dg.AssetSelection, *more: dg.AssetsDefinition
    ) -> dg.ExecuteInProcessResult:
        defs = self.definitions(*more)
        job = dg.define_asset_job("selected", selection)
        return (
            dg.Definitions.merge(defs, dg.Definitions(jobs=[job]))
            .resolve_job_def("selected")
            .execute_in_process(instance=self.instance, raise_on_error=False)
        )

    def check(self, *specs: dg.AssetCheckSpec) -> dict[str, dg.AssetCheckEvaluation]:
        """Run checks alone; what each said."""
        result = self.run(dg.AssetSelection.checks(*(spec.key for spec in specs)))
        said = {found.check_name: found for found in result.get_asset_check_evaluations()}
        assert set(said) == {spec.name for spec in specs}
        return said


@contextmanager
def world_in(folder: Path) -> Iterator[World]:
    """The world whose posters, store and `dagster_home` lie in a folder."""
    settings = load_settings(
        "starter",
        landing=folder / "landing",
        holdout=folder / "holdout",
        store=folder / "store",
        images={"width": 64, "height": 96},
    )
    with dg.DagsterInstance.from_config(str(folder / "dagster_home")) as instance:
        yield World(settings, Store(folder / "store"), instance)


@pytest.fixture(scope="module")
def good_data(tmp_path_factory: pytest.TempPathFactory, empty_home: Path) -> Path:
    """A world that passes every check: read it only."""
    folder = tmp_path_factory.mktemp("good_data")
    shutil.copytree(empty_home, folder / "dagster_home")
    landing, held = folder / "landing", folder / "holdout"
    landing.mkdir()
    held.mkdir()
    data = default_root() / "data"
    for name in POSTERS:
        shutil.copyfile(data / "raw_posters" / name, landing / name)
    shutil.copyfile(data / "holdout_posters" / "pocket_realm.png", held / "pocket_realm.png")
    with world_in(folder) as world:
        world.ingest()
        world.hold_out()
        world.draw()
    return folder


@pytest.fixture
def world(tmp_path: Path, good_data: Path) -> Iterator[World]:
    shutil.copytree(good_data, tmp_path, dirs_exist_ok=True)
    with world_in(tmp_path) as world:
        yield world


def offenders(evaluation: dg.AssetCheckEvaluation) -> list[str]:
    """The rows of the table that a check shows, as text."""
    shown = evaluation.metadata["offenders"]
    assert isinstance(shown, dg.TableMetadataValue)
    return [" | ".join(map(str, record.data.values())) for record in shown.records]


def test_good_data_passes_every_check_and_each_shows_expected_and_actual(world: World) -> None:
    said = world.check(*ALL)
    for name, evaluation in said.items():
        assert evaluation.passed, (name, evaluation.description)
        assert {"expected", "actual", "offenders"} <= set(evaluation.metadata), name
        assert offenders(evaluation) == [], name
        assert evaluation.description


def test_every_check_says_what_it_protects_and_what_to_do() -> None:
    for spec in ALL:
        description = spec.description or ""
        assert len(description) > 100, spec.name
        assert "hen this" in description or "hen it" in description or "horten" in description
        assert spec.metadata[checks.SEVERITY] in ("WARN", "ERROR"), spec.name


def test_the_documentation_names_every_check_and_every_limit_with_its_default() -> None:
    text = (default_root() / "docs" / "checks.md").read_text("utf-8")
    for spec in ALL:
        assert f"`{spec.name}`" in text, spec.name
    for name, setting in CheckSettings.model_fields.items():
        default = "none" if setting.default is None else str(setting.default)
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert row.split("|")[2].strip().strip("`") == default, name


def test_what_blocks_fails_as_an_error() -> None:
    """Automation counts every failure of a blocking check, so a warning of one would stop it."""
    blocking = {spec.name for spec in ALL if spec.blocking}
    assert blocking == {
        "enough_usable_posters",
        "training_images_show_something",
        "captions_are_diverse",
        "few_images_failed",
        "few_captions_failed",
        "enough_training_rows",
        "few_posters_lost",
        "every_row_has_image_and_caption",
        "captions_fit_the_text_encoder",
        "no_poster_is_held_out",
    }
    for spec in ALL:
        if spec.blocking:
            assert spec.metadata[checks.SEVERITY] == "ERROR", spec.name


# -- planted faults --------------------------------------------------------------------------------


def too_few_posters(world: World) -> None:
    for name in POSTERS[:2]:
        (world.landing / name).write_text("no picture any more")
    world.ingest()


def bad_files(world: World) -> None:
    for number in range(3):
        (world.landing / f"bad {number}.jpg").write_text("no picture")
    world.ingest()


def a_smaller_copy(world: World) -> None:
    with Image.open(world.landing / POSTERS[1]) as image:
        image.convert("RGB").resize((160, 240)).save(world.landing / "z smaller.jpg")
    world.ingest()


def a_black_poster(world: World) -> None:
    Image.new("RGB", (100, 150)).save(world.landing / "night.png")
    world.ingest()


def a_lost_training_image(world: World) -> None:
    image = world.table("resized_posters")["image"][0]
    world.store.path(str(image), ".png").unlink()


def unmade_images(world: World) -> None:
    fail_first(world, "resized_posters", "the disk is full", image="")


def unmade_captions(world: World) -> None:
    fail_first(world, "poster_captions", "the captioner broke", caption="")


def fail_first(world: World, table: str, reason: str, **values: str) -> None:
    """Fail the row of the first poster and one other, of six: more than a fifth."""
    posters = world.table("raw_posters")
    first = posters.loc[posters["source_name"] == POSTERS[0], "poster_id"].iloc[0]
    known = world.table(table)["poster_id"].tolist()
    for row in (known.index(first), known.index(first) - 1):
        world.change(table, row % len(known), status="failed", reason=reason, **values)


def a_stammering_caption(world: World) -> None:
    world.change("poster_captions", 2, caption="a cat cat cat cat")


def one_caption_for_all(world: World) -> None:
    table = world.table("poster_captions")
    world.store.write_table("poster_captions", pd.concat([table] * 3).assign(caption="a poster"))


def lost_rows(world: World) -> None:
    world.store.write_table("training_csv", world.table("training_csv")[:2])


def half_of_what_was_trained_on(world: World) -> None:
    world.train()
    world.store.write_table("training_csv", world.table("training_csv")[3:])


def a_missing_file(world: World) -> None:
    row = world.table("training_csv").iloc[1]
    (world.store.root / "training_sets" / row["training_set"] / row["file_name"]).unlink()


def a_missing_caption(world: World) -> None:
    world.change("training_csv", 1, caption=" ")


def a_long_caption(world: World) -> None:
    world.change("training_csv", 3, caption="a rocket and " * 60)


def a_held_out_copy(world: World) -> None:
    held = Path(world.settings.holdout)
    shutil.copyfile(world.landing / POSTERS[2], held / "another name.png")
    world.hold_out()


def a_held_out_jpeg(world: World) -> None:
    with Image.open(world.landing / POSTERS[2]) as image:
        small = image.convert("RGB").resize((160, 240))
    small.save(Path(world.settings.holdout) / "small.jpg", quality=60)
    world.hold_out()


def no_holdout_folder(world: World) -> None:
    shutil.rmtree(world.settings.holdout)
    world.hold_out()


def a_broken_holdout_poster(world: World) -> None:
    (held,) = Path(world.settings.holdout).iterdir()
    held.write_text("no picture any more")
    world.hold_out()


def an_undrawn_base_image(world: World) -> None:
    world.change("base_generations", 4, status="failed", reason="out of memory", image="")


def a_seed_of_another_prompt(world: World) -> None:
    suite = world.store.read_table("prompt_suite")
    world.store.write_table("prompt_suite", suite.assign(seeds=suite["seeds"].iloc[0]))


def an_undrawn_tuned_image(world: World) -> None:
    world.drop("tuned_generations", 0)


def a_blocked_base_image(world: World) -> None:
    world.change("base_generations", 0, status="blocked", reason="black image")


def a_white_tuned_image(world: World) -> None:
    white = world.store.put(png_bytes(Image.new("RGB", (40, 60), "white")), ".png")
    world.change("tuned_generations", 0, image=white)


def an_impossible_cosine(world: World) -> None:
    world.change("clip_scores", 5, clip_cosine=1.5)


def a_title_in_no_font(world: World) -> None:
    world.change("titled_posters", 2, status="failed", reason="no font has its letters")


def an_unmeasured_image(world: World) -> None:
    world.change("fidelity_scores", 3, status="failed", reason="no poster to compare with")


def a_copy(world: World) -> None:
    world.change("fidelity_scores", 7, copied=True, copied_by="hash", copied_poster="the poster")


def misread_titles(world: World) -> None:
    for row in (4, 5):
        world.change("legibility_scores", row, read="SFA", distance=0.33, exact=False)


def a_lost_champion(world: World) -> None:
    world.change("champion", 0, checkpoint_id="c0ffee", path="checkpoints/c0ffee", kind="tuned")


def a_rejected_champion(world: World) -> None:
    folder = world.store.root / "checkpoints" / "c0ffee"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    a_lost_champion(world)
    row = dict.fromkeys(DECISION_COLUMNS, "{}") | {
        "decision_id": "1", "decided_at": pd.Timestamp("2026-02-03"), "checkpoint_id": "c0ffee",
        "decision": "reject", "decided_by": GATE,
    }  # fmt: skip
    write_decisions(Deployment(world.settings).warehouse, lambda *_: pd.DataFrame([row]))


@pytest.mark.parametrize(
    ("plant", "name", "named"),
    [
        (too_few_posters, "enough_usable_posters", POSTERS[0]),
        (bad_files, "few_rejected_files", "bad 0.jpg"),
        (a_smaller_copy, "few_near_duplicates", f"z smaller.jpg | {POSTERS[1]}"),
        (a_black_poster, "training_images_show_something", "night.png | all black"),
        (a_lost_training_image, "training_images_show_something", "gone from the store"),
        (unmade_images, "few_images_failed", f"{POSTERS[0]} | the disk is full"),
        (unmade_captions, "few_captions_failed", f"{POSTERS[0]} | the captioner broke"),
        (a_stammering_caption, "captions_do_not_repeat", "a cat cat cat cat"),
        (one_caption_for_all, "captions_do_not_repeat", "18 posters have it"),
        (one_caption_for_all, "captions_are_diverse", "a poster | 18"),
        (lost_rows, "enough_training_rows", ".png"),
        (half_of_what_was_trained_on, "few_posters_lost", "train/"),
        (a_missing_file, "every_row_has_image_and_caption", "no image"),
        (a_missing_caption, "every_row_has_image_and_caption", "no caption"),
        (a_long_caption, "captions_fit_the_text_encoder", "a rocket and"),
        (a_held_out_copy, "no_poster_is_held_out", f"{POSTERS[2]} | another name.png"),
        (a_held_out_jpeg, "no_poster_is_held_out", f"{POSTERS[2]} | small.jpg | the same picture"),
        (a_broken_holdout_poster, "there_are_holdout_posters", "pocket_realm.png"),
        (an_undrawn_base_image, "every_base_image_drawn", "out of memory"),
        (an_undrawn_tuned_image, "every_tuned_image_drawn", "not in the table"),
        (a_blocked_base_image, "base_images_show_something", "black image"),
        (a_seed_of_another_prompt, "prompts_have_seeds_of_their_own", "sea | 1"),
        (a_white_tuned_image, "tuned_images_show_something", "all white"),
        (an_impossible_cosine, "cosines_are_possible", "1.5"),
        (a_title_in_no_font, "every_title_is_set", "Sea | no font has its letters"),
        (an_unmeasured_image, "every_image_is_measured", "no poster to compare with"),
        (a_copy, "few_images_are_copies", "the poster"),
        (misread_titles, "set_titles_are_read", "SFA"),
        (a_lost_champion, "served_checkpoint_is_sound", "c0ffee | its files are gone"),
        (a_rejected_champion, "served_checkpoint_is_sound", "c0ffee | the gate rejected it"),
    ],
)
def test_a_planted_fault_fails_its_check_and_is_named(
    world: World, plant: Callable[[World], None], name: str, named: str
) -> None:
    spec = NAMED[name]
    plant(world)
    evaluation = world.check(spec)[name]
    assert not evaluation.passed
    assert evaluation.severity.value == spec.metadata[checks.SEVERITY]
    assert any(named in row for row in offenders(evaluation)), offenders(evaluation)


# -- blocking --------------------------------------------------------------------------------------


def materialized(result: dg.ExecuteInProcessResult) -> set[str]:
    events = result.get_asset_materialization_events()
    return {event.asset_key.to_user_string() for event in events if event.asset_key}


@dg.asset(deps=["training_csv"])
def costly_step() -> None:
    """In the place of the training."""


def test_a_held_out_poster_stops_the_training_until_it_is_removed(world: World) -> None:
    a_held_out_copy(world)
    key = dg.AssetKey("training_csv")
    selection = dg.AssetSelection.assets("holdout_posters", key, "costly_step")
    result = world.run(selection, costly_step)
    assert not result.success
    assert materialized(result) == {"holdout_posters", "training_csv"}
    (Path(world.settings.holdout) / "another name.png").unlink()
    result = world.run(selection, costly_step)
    assert result.success
    assert materialized(result) == {"holdout_posters", "training_csv", "costly_step"}


def test_half_of_the_posters_gone_stops_the_training_until_a_person_says_that_it_is_meant(
    world: World, tmp_path: Path
) -> None:
    world.train()
    for path in sorted(world.landing.iterdir())[:3]:
        path.unlink()
    world.settings = world.settings.model_copy(
        update={"checks": CheckSettings(min_posters=3)}
    )  # else too few stop it
    world.ingest()
    selection = dg.AssetSelection.assets("training_csv", "costly_step")
    result = world.run(selection, costly_step)
    assert not result.success and materialized(result) == {"training_csv"}
    (failed,) = (e for e in result.get_asset_check_evaluations() if not e.passed)
    assert failed.check_name == "few_posters_lost"
    # Posters of another place are other posters.
    world.read_posters(tmp_path / "elsewhere")
    assert world.run(selection, costly_step).success
    world.read_posters(world.landing)
    assert not world.run(selection, costly_step).success
    world.settings = world.settings.model_copy(
        update={"checks": CheckSettings(min_posters=3, max_lost_share=1)}
    )
    assert world.run(selection, costly_step).success


def test_a_missing_holdout_folder_is_warned_of_and_stops_nothing(world: World) -> None:
    no_holdout_folder(world)
    result = world.run(dg.AssetSelection.assets("holdout_posters", "training_csv"))
    assert result.success
    failed = [e for e in result.get_asset_check_evaluations() if not e.passed]
    assert [e.check_name for e in failed] == ["there_are_holdout_posters"]
    assert "POSTERPIPE_HOLDOUT" in (failed[0].description or "")


def test_a_warning_stops_nothing(world: World) -> None:
    bad_files(world)
    result = world.run(dg.AssetSelection.assets("raw_posters", "resized_posters"))
    assert result.success
    assert materialized(result) == {"raw_posters", "resized_posters"}
    failed = {e.check_name for e in result.get_asset_check_evaluations() if not e.passed}
    assert failed == {"few_rejected_files"}


def test_what_follows_runs_when_only_some_checks_of_an_asset_are_selected(world: World) -> None:
    some = dg.AssetSelection.checks(NAMED["few_rejected_files"].key)
    assets = dg.AssetSelection.assets("raw_posters", "resized_posters").without_checks()
    result = world.run(assets | some)
    assert result.success
    assert materialized(result) == {"raw_posters", "resized_posters"}
    assert [e.check_name for e in result.get_asset_check_evaluations()] == ["few_rejected_files"]


# -- freshness -------------------------------------------------------------------------------------


def freshness(world: World) -> dg.AssetCheckEvaluation:
    """What the scheduled run says."""
    job = world.definitions().resolve_job_def("check_score_freshness")
    result = job.execute_in_process(instance=world.instance, raise_on_error=False)
    evaluations: Sequence[dg.AssetCheckEvaluation] = result.get_asset_check_evaluations()
    assert [e.check_name for e in evaluations] == ["scores_are_current"]
    return evaluations[0]


def test_scores_that_stay_behind_the_images_are_noticed_by_the_scheduled_check(
    world: World,
) -> None:
    assert freshness(world).passed
    world.change("tuned_generations", 1, generation_key="another image")
    assert freshness(world).passed, "a run may be at it"
    limits = world.settings.checks.model_copy(update={"max_scoring_delay_hours": 1e-9})
    world.settings = world.settings.model_copy(update={"checks": limits})
    behind = freshness(world)
    assert not behind.passed
    assert offenders(behind) == [
        "dreambooth | cat | 2 | has no score",
        "dreambooth | cat | 2 | the score of an image that is not current any more",
    ]
    world.score()
    assert freshness(world).passed
    world.change("tuned_generations", 1, generation_key="yet another image")
    assert not freshness(world).passed
    # After a change of the profile the base model's images wait for a checkpoint of theirs.
    world.store.add_results(CHECKPOINT, {"tuned_generations": {"base_model": "another"}})
    held_back = freshness(world)
    assert held_back.passed and "tuned from the base model another" in str(held_back.description)


def test_the_scheduled_check_waits_until_something_was_scored(instance: dg.DagsterInstance) -> None:
    schedule = score_freshness_schedule(load_settings("starter"))

    def tick() -> ScheduleExecutionData:
        now = dt.datetime.now(dt.UTC)
        context = dg.build_schedule_context(instance, scheduled_execution_time=now)
        return schedule.evaluate_tick(context)

    for name in ("base_generations", "tuned_generations", "clip_scores"):
        waiting = tick()
        assert not waiting.run_requests
        assert waiting.skip_message == f"nothing to check yet: {name} was never materialized"
        instance.report_runless_asset_event(dg.AssetMaterialization(name))
    (request,) = tick().run_requests or []
    assert request.tags[REASON_TAG] == "due, by its schedule"


def test_the_schedule_follows_its_setting_and_is_on() -> None:
    settings = load_settings("starter", checks={"freshness_cron": "30 6 * * 1"})
    schedule = score_freshness_schedule(settings)
    assert schedule.cron_schedule == "30 6 * * 1"
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING
