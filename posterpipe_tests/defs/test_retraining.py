"""The training schedule: real decisions over what a real instance has recorded."""

from __future__ import annotations

import datetime as dt
import errno
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest
from dagster import DagsterEventType, DagsterRunStatus
from dagster._core.events import DagsterEvent, StepFailureData
from dagster._utils.error import SerializableErrorInfo
from PIL import Image

from posterpipe.core.store import Store
from posterpipe.definitions import build_defs
from posterpipe.defs import training
from posterpipe.defs.arrivals import REASON_TAG
from posterpipe.defs.metadata import DATA_VERSION, HELD_OUT
from posterpipe.defs.resources import Deployment
from posterpipe.defs.retraining import STATE_TAG, TRAINING_SET, consider_training
from posterpipe.defs.staleness import CHECKPOINT, CODE_VERSION, INPUT_DATA_VERSION
from posterpipe.settings import SettingsError, load_settings
from posterpipe_tests.defs.harness import RUN_KEY, Daemon

CLASS_IMAGES = dg.AssetKey("class_images")
CHECK = "every_row_has_image_and_caption"


class Nights:
    """A deployment whose training sets and checkpoints are recorded by the test."""

    def __init__(
        self,
        folder: Path,
        instance: dg.DagsterInstance,
        *,
        automation: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.instance = instance
        self.settings = load_settings(
            "starter",
            store=folder / "store",
            automation={"min_new_posters": 2, "max_age_days": 7, **(automation or {})},
            **settings,
        )
        self.definitions = build_defs(self.settings)
        self.repository = self.definitions.get_repository_def()
        self.said = ""
        self.metadata: dict[str, str] = {}
        """Further metadata of the checkpoints that are made."""
        self.instance.report_runless_asset_event(
            dg.AssetMaterialization(CLASS_IMAGES, tags={DATA_VERSION: "none"})
        )

    def training_set(self, version: str, *rows: str) -> None:
        """The training set is made, with these lines of CSV."""
        folder = self.settings.store / "training_sets" / version
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "training.csv").write_text("\n".join(["file_name,caption", *rows, ""]))
        self.instance.report_runless_asset_event(
            dg.AssetMaterialization(TRAINING_SET, tags={DATA_VERSION: version})
        )

    def checkpoint(self, trained_on: str, **tags: str) -> None:
        """A checkpoint is made, by the code and settings of now."""
        spec = self.repository.assets_defs_by_key[CHECKPOINT].specs_by_key[CHECKPOINT]
        folder = self.settings.store / "checkpoints" / trained_on
        folder.mkdir(parents=True, exist_ok=True)
        self.instance.report_runless_asset_event(
            dg.AssetMaterialization(
                CHECKPOINT,
                metadata={"path": f"checkpoints/{trained_on}", **self.metadata},
                tags={
                    DATA_VERSION: f"checkpoint of {trained_on}",
                    CODE_VERSION: str(spec.code_version),
                    INPUT_DATA_VERSION + "training_csv": trained_on,
                    INPUT_DATA_VERSION + "class_images": "none",
                    **tags,
                },
            )
        )

    def check(self, passed: bool) -> None:
        """The blocking check of the training set is evaluated."""
        self.instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=TRAINING_SET,
                check_name=CHECK,
                passed=passed,
                metadata={},
                description="2 rows without image",
            )
        )

    def context(self) -> dg.ScheduleEvaluationContext:
        return dg.build_schedule_context(
            self.instance,
            repository_def=self.repository,
            resources={"deployment": Deployment(self.settings)},
        )

    def tick(self, *, days: float = 0) -> dg.RunRequest | None:
        """One evaluation of the schedule, so many days from now; `said` has its reason."""
        if days:
            now = dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
            found = consider_training(self.context(), Deployment(self.settings), now)
            if isinstance(found, dg.SkipReason):
                self.said = str(found.skip_message)
                return None
            self.said = found.tags[REASON_TAG]
            return found
        schedule = self.definitions.resolve_schedule_def("training")
        context = self.context()
        data = schedule.evaluate_tick(context)
        requests: Sequence[dg.RunRequest] = data.run_requests or []
        self.said = requests[0].tags[REASON_TAG] if requests else str(data.skip_message)
        return requests[0] if requests else None

    def started(self, request: dg.RunRequest, status: DagsterRunStatus) -> str:
        """The requested run, as the daemon creates it, in a status; its id."""
        job = self.definitions.resolve_job_def("retrain")
        run = self.instance.create_run_for_job(
            job, tags={**request.tags, RUN_KEY: str(request.run_key)}, status=status
        )
        return run.run_id

    def ended(self, run_id: str, *, canceled: bool = False) -> None:
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        if canceled:
            self.instance.report_run_canceled(run)
        else:
            self.instance.report_run_failed(run)


@pytest.fixture
def nights(tmp_path: Path, instance: dg.DagsterInstance) -> Nights:
    """Trained on the training set a, of two posters."""
    nights = Nights(tmp_path, instance)
    nights.training_set("a", "train/1.png,one", "train/2.png,two")
    nights.checkpoint("a")
    assert nights.tick() is None
    assert nights.said == "the checkpoint was trained on this training set (a)"
    return nights


def test_what_a_person_reported_as_made_starts_no_training_and_holds_none_off(
    nights: Nights,
) -> None:
    for key in (CHECKPOINT, TRAINING_SET):
        nights.instance.report_runless_asset_event(dg.AssetMaterialization(key))
        assert nights.tick() is None
        assert nights.said == "the checkpoint was trained on this training set (a)"


def test_nothing_is_trained_before_there_is_a_training_set(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    nights = Nights(tmp_path, instance)
    assert nights.tick() is None
    assert nights.said == "there is no training set yet"
    nights.training_set("a", "train/1.png,one")
    request = nights.tick()
    assert request is not None
    assert nights.said == "the checkpoint does not hold: never materialized"


def test_enough_changes_start_a_training_and_fewer_say_what_they_wait_for(nights: Nights) -> None:
    nights.training_set("b", "train/1.png,one", "train/2.png,zwei")
    assert nights.tick() is None
    assert "1 with another caption, the first 0.0 days ago; waiting for 2 changes" in nights.said
    nights.training_set("c", "train/1.png,one", "train/2.png,zwei", "train/3.png,three")
    request = nights.tick()
    assert request is not None
    assert "1 new, 1 with another caption" in nights.said
    job = nights.definitions.resolve_job_def("retrain")
    assert set(request.asset_selection or []) == job.asset_layer.executable_asset_keys
    assert CHECKPOINT in set(request.asset_selection or [])
    nights.checkpoint("c")
    assert nights.tick() is None


def test_other_held_out_posters_train_again_only_what_they_could_have_stopped(
    nights: Nights,
) -> None:
    store = Store(nights.settings.store)
    store.write_table("holdout_posters", pd.DataFrame({"poster_id": ["one"]}))
    assert nights.tick() is None, "without early stopping they decide no weight"
    nights.metadata[HELD_OUT] = store.table_version("holdout_posters") or ""
    nights.checkpoint("a")
    assert nights.tick() is None
    store.write_table("holdout_posters", pd.DataFrame({"poster_id": ["one", "two"]}))
    assert nights.tick() is not None
    assert "the held-out posters, which decide when its training stops, changed" in nights.said
    store.write_table("holdout_posters", pd.DataFrame({"poster_id": ["one"]}))
    assert nights.tick() is None


def test_a_training_set_as_it_was_needs_no_training(nights: Nights) -> None:
    nights.training_set("b", "train/3.png,three")
    assert nights.tick() is not None
    nights.training_set("a", "train/1.png,one", "train/2.png,two")
    assert nights.tick() is None


def test_an_old_change_is_trained_on_however_small(nights: Nights) -> None:
    nights.training_set("b", "train/1.png,one", "train/2.png,zwei")
    assert nights.tick(days=6.9) is None
    assert "1 with another caption, the first 6.9 days ago" in nights.said
    assert nights.tick(days=7.1) is not None
    assert "the first 7.1 days ago (after 7 days" in nights.said


def test_a_lost_or_outdated_checkpoint_is_trained_again(nights: Nights) -> None:
    os.rmdir(nights.settings.store / "checkpoints" / "a")
    assert nights.tick() is not None
    assert "is gone" in nights.said
    nights.checkpoint("a")
    assert nights.tick() is None
    nights.checkpoint("a", **{CODE_VERSION: "of last year"})
    assert nights.tick() is not None
    assert nights.said == "the checkpoint does not hold: its code or settings changed"


def test_other_class_images_are_a_reason_to_train(nights: Nights) -> None:
    nights.instance.report_runless_asset_event(
        dg.AssetMaterialization(CLASS_IMAGES, tags={DATA_VERSION: "twenty posters"})
    )
    assert nights.tick() is not None
    assert nights.said == "the checkpoint does not hold: class_images changed"


def test_a_failed_blocking_check_holds_the_training_back(nights: Nights) -> None:
    nights.training_set("b", "train/3.png,three")
    nights.check(passed=False)
    assert nights.tick() is None
    assert (
        f"a blocking check has not passed: {CHECK} of training_csv (2 rows without image)"
        in nights.said
    )
    nights.check(passed=True)
    assert nights.tick() is not None


def test_a_failed_blocking_check_further_up_holds_the_training_back(nights: Nights) -> None:
    nights.training_set("b", "train/3.png,three")
    posters = dg.AssetKey("raw_posters")
    for passed in (False, True):
        nights.instance.report_runless_asset_event(dg.AssetMaterialization(posters))
        nights.instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=posters,
                check_name="enough_usable_posters",
                passed=passed,
                metadata={},
                description="4 of 5",
            )
        )
        assert (nights.tick() is not None) == passed
        assert passed or "enough_usable_posters of raw_posters (4 of 5)" in nights.said


def test_a_check_that_was_not_evaluated_is_left_to_the_run(nights: Nights) -> None:
    nights.training_set("b", "train/3.png,three")
    nights.check(passed=False)
    assert nights.tick() is None
    job = nights.definitions.resolve_implicit_global_asset_job_def()
    checks = job.get_subset(
        asset_selection=set(), asset_check_selection={dg.AssetCheckKey(TRAINING_SET, CHECK)}
    )
    run = nights.instance.create_run_for_job(checks, status=DagsterRunStatus.STARTED)
    assert run.run_id
    request = nights.tick()
    assert request is not None and TRAINING_SET in set(request.asset_selection or [])


def write_posters(landing: Path, count: int) -> None:
    """Unlike posters, each with a caption beside it."""
    landing.mkdir()
    for number in range(count):
        pixels = random.Random(number).randbytes(80 * 120 * 3)
        Image.frombytes("RGB", (80, 120), pixels).save(landing / f"{number}.png")
        (landing / f"{number}.txt").write_text(f"poster number {number}")


def test_the_run_begins_at_the_posters_so_that_what_was_deleted_is_not_trained_on(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    landing = tmp_path / "landing"
    write_posters(landing, 6)
    nights = Nights(
        tmp_path,
        instance,
        landing=landing,
        holdout=tmp_path / "none",
        captions=tmp_path / "none.csv",
        images={"width": 32, "height": 48},
        checks={"min_posters": 5},
    )
    daemon = Daemon(nights.definitions, instance)
    store = Store(nights.settings.store)
    before_training = (
        dg.AssetSelection.assets(TRAINING_SET).upstream().resolve(nights.repository.asset_graph)
    )

    def begin(request: dg.RunRequest) -> bool:
        """What a night's run does before it trains."""
        first = before_training & set(request.asset_selection or [])
        return daemon.run(*(key.to_user_string() for key in first))

    assert daemon.run(*(key.to_user_string() for key in before_training))
    (landing / "0.png").unlink()
    request = nights.tick()
    assert request is not None and len(store.read_table("training_csv")) == 6
    assert begin(request)
    assert len(store.read_table("training_csv")) == 5
    # One too few: the run stops before the training, and the next night says so.
    (landing / "1.png").unlink()
    request = nights.tick()
    assert request is not None and not begin(request)
    assert len(store.read_table("training_csv")) == 5
    assert nights.tick() is None
    assert "enough_usable_posters of raw_posters" in nights.said
    # Nor when a person materializes the checkpoint alone, from the training set of before.
    trained: list[object] = []
    monkeypatch.setattr(training, "_train", lambda *given: trained.append(given))
    assert not daemon.run("dreambooth_checkpoint") and trained == []
    (run,) = instance.get_runs(limit=1)
    (failure,) = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    told = failure.get_dagster_event().step_failure_data.error_display_string
    assert "1 poster of the training set not there any more: 1.png" in told
    for path in landing.iterdir():
        path.unlink()
    assert nights.tick() is None
    assert f"but no posters in {landing}: put some in" in nights.said


def test_a_folder_that_cannot_be_listed_holds_the_training_back(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    landing = tmp_path / "landing"
    for name in ("2024/a.png", "b.png"):
        (landing / name).parent.mkdir(exist_ok=True, parents=True)
        (landing / name).write_bytes(b"a poster")
    nights = Nights(tmp_path, instance, landing=landing)
    nights.training_set("a", "train/1.png,one")
    assert nights.tick() is not None
    scandir = os.scandir

    def stale(folder: str) -> Any:
        if folder.endswith("2024"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), folder)
        return scandir(folder)

    monkeypatch.setattr("posterpipe.core.posters.listing.os.scandir", stale)
    assert nights.tick() is None
    assert f"but 2024 in {landing}: this folder cannot be listed (Stale file" in nights.said
    assert "make it readable" in nights.said
    monkeypatch.undo()
    assert nights.tick() is not None


def test_a_holdout_folder_that_is_not_mounted_holds_the_training_back(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    nights = Nights(tmp_path, instance, holdout=tmp_path / "not mounted")
    nights.training_set("a", "train/1.png,one")
    assert nights.tick() is not None
    held = pd.DataFrame({"poster_id": ["one"], "status": ["ok"]})
    Store(nights.settings.store).write_table("holdout_posters", held)
    assert nights.tick() is None
    assert (
        f"but no posters in {tmp_path / 'not mounted'}, which held 1 poster before" in nights.said
    )


def test_there_is_one_training_at_a_time(nights: Nights) -> None:
    nights.training_set("b", "train/3.png,three")
    request = nights.tick()
    assert request is not None
    run_id = nights.started(request, DagsterRunStatus.STARTING)
    assert nights.tick() is None
    assert f"the run {run_id[:8]} is training" in nights.said


def test_a_failed_training_is_tried_once_more_until_something_changes(nights: Nights) -> None:
    nights.training_set("b", "train/3.png,three")
    keys = []
    for _ in range(2):
        request = nights.tick()
        assert request is not None
        keys.append(request.run_key)
        nights.ended(nights.started(request, DagsterRunStatus.STARTED))
    assert len(set(keys)) == 2
    assert nights.tick() is None
    assert "it failed 2 times" in nights.said
    nights.training_set("c", "train/3.png,drei")
    assert nights.tick() is not None


def test_a_training_for_which_there_was_no_room_is_tried_another_night(nights: Nights) -> None:
    nights.training_set("b", "train/3.png,three")
    no_room = SerializableErrorInfo(
        f"the save of step 100: cannot be written ({os.strerror(errno.ENOSPC)})",
        [],
        "TrainingError",
    )
    for _ in range(3):
        request = nights.tick()
        assert request is not None
        run_id = nights.started(request, DagsterRunStatus.STARTED)
        failure = StepFailureData(error=no_room, user_failure_data=None)
        nights.instance.report_dagster_event(
            DagsterEvent(
                DagsterEventType.STEP_FAILURE.value,
                job_name="retrain",
                step_key=CHECKPOINT.path[-1],
                event_specific_data=failure,
            ),
            run_id,
        )
        nights.ended(run_id)


def test_captions_that_were_mended_are_trained_on_though_the_training_set_stays_the_same(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    landing, captions = tmp_path / "landing", tmp_path / "captions.csv"
    write_posters(landing, 5)
    nights = Nights(
        tmp_path,
        instance,
        landing=landing,
        holdout=tmp_path / "none",
        captions=captions,
        images={"width": 32, "height": 48},
    )
    daemon = Daemon(nights.definitions, instance)
    key = dg.AssetSelection.assets(TRAINING_SET).upstream()
    before_training = key.resolve(nights.repository.asset_graph)
    names = [key.to_user_string() for key in before_training]
    assert daemon.run(*names)
    before = Store(nights.settings.store).table_version("training_csv")
    captions.write_text('file_name,caption\n0.png,"a stray quote\n')
    for _ in range(2):
        request = nights.tick()
        assert request is not None
        daemon.enqueue(names, request.tags)
        assert daemon.work() == [False]
    assert nights.tick() is None
    assert "it failed 2 times" in nights.said
    captions.unlink()
    assert daemon.run("human_captions")
    assert Store(nights.settings.store).table_version("training_csv") == before
    assert nights.tick() is not None


def test_a_training_that_failed_is_not_started_again_because_posters_were_read_again(
    nights: Nights,
) -> None:
    nights.training_set("b", "train/3.png,three")
    for _ in range(2):
        request = nights.tick()
        assert request is not None
        run_id = nights.started(request, DagsterRunStatus.STARTED)
        began = dg.DagsterEvent("STEP_START", "retrain", step_key="dreambooth_checkpoint")
        nights.instance.report_dagster_event(began, run_id)
        nights.ended(run_id)
    nights.instance.report_runless_asset_event(dg.AssetMaterialization("raw_posters"))
    assert nights.tick() is None
    assert "it failed 2 times" in nights.said


def test_a_canceled_training_is_not_started_again_by_itself(nights: Nights) -> None:
    nights.training_set("b", "train/3.png,three")
    request = nights.tick()
    assert request is not None
    assert STATE_TAG in request.tags
    nights.ended(nights.started(request, DagsterRunStatus.STARTED), canceled=True)
    assert nights.tick() is None
    assert "was canceled" in nights.said


def test_the_schedule_is_on_and_follows_the_settings(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    weekly = {"training_cron": "30 4 * * 1", "training_timezone": "Europe/Berlin"}
    nights = Nights(tmp_path, instance, automation=weekly)
    schedule = nights.definitions.resolve_schedule_def("training")
    assert schedule.cron_schedule == "30 4 * * 1"
    assert schedule.execution_timezone == "Europe/Berlin"
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING
    assert schedule.job_name == "retrain"
    assert build_defs(load_settings("starter")).resolve_schedule_def("training").cron_schedule == (
        "0 2 * * *"
    )


def test_a_wrong_cron_or_time_zone_names_the_setting(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    with pytest.raises(SettingsError, match=r"automation\.training_cron: 'daily at two'"):
        Nights(tmp_path, instance, automation={"training_cron": "daily at two"})
    with pytest.raises(SettingsError, match=r"automation\.training_timezone: .*'Mars/Olympus'"):
        Nights(tmp_path, instance, automation={"training_timezone": "Mars/Olympus"})
