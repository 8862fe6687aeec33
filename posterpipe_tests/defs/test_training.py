"""The training assets: settings in the launchpad, class images, and a checkpoint made of both."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
import yaml
from PIL import Image

from posterpipe.core.dreambooth.launch import STOPPING_SECONDS
from posterpipe.core.store import Store
from posterpipe.core.training.training_set import build_training_set
from posterpipe.defs import training
from posterpipe.defs.ingest import holdout_posters
from posterpipe.defs.metadata import HELD_OUT
from posterpipe.defs.resources import TABLES, Deployment, StoreIOManager, Table, table_output
from posterpipe.defs.staleness import stale_assets
from posterpipe.defs.training import (
    class_images,
    dreambooth_checkpoint,
    launchpad_fields,
    training_settings,
)
from posterpipe.setting_words import described
from posterpipe.settings import SettingsError, default_root, load_settings
from posterpipe.training_settings import TrainingSettings
from posterpipe_tests.core.dreambooth.conftest import write_training_set
from posterpipe_tests.core.tiny_blip import build_tiny_blip
from posterpipe_tests.models import TINY_HEIGHT, TINY_WIDTH, build_tiny_stable_diffusion


def test_every_training_setting_is_in_the_launchpad_with_meaning_unit_default_and_source() -> None:
    fields = launchpad_fields()
    assert fields.keys() == TrainingSettings.model_fields.keys()
    for name, field in fields.items():
        assert field.description == described(TrainingSettings.model_fields[name])
        assert not field.is_required and not field.default_provided, name
    assert fields["max_train_steps"].description == (
        "how long to train. Unit: optimizer steps. Must be at least 1. Default: 1000 (the thesis), "
        "unless the profile says otherwise."
    )


def validated(config: dict[str, Any]) -> Any:
    job = dg.Definitions(
        assets=[class_images, dreambooth_checkpoint, dg.AssetSpec("training_csv")],
        resources={"deployment": None, TABLES: dg.mem_io_manager},
        jobs=[dg.define_asset_job("train", dg.AssetSelection.assets("dreambooth_checkpoint"))],
    ).resolve_job_def("train")
    return dg.validate_run_config(job, {"ops": {"dreambooth_checkpoint": {"config": config}}})


def test_a_run_may_be_launched_with_other_settings() -> None:
    validated({})
    validated(
        {
            "max_train_steps": 5,
            "learning_rate": 1e-5,
            "snr_gamma": None,
            "optimizer": "adamw_fused",
            "sample_prompts": ["a cat"],
            "prior_preservation": True,
        }
    )
    for wrong in ({"max_train_steps": "many"}, {"optimizer": "sgd"}, {"no_such": 1}):
        with pytest.raises(dg.DagsterInvalidConfigError):
            validated(wrong)


def test_what_a_run_leaves_out_is_as_the_profile_says() -> None:
    base = load_settings("starter").training
    changed = training_settings(base, {"max_train_steps": 5, "snr_gamma": 5.0})
    assert changed == base.model_copy(update={"max_train_steps": 5, "snr_gamma": 5.0})
    with pytest.raises(SettingsError, match=r"dreambooth_checkpoint: learning_rate: .*greater"):
        training_settings(base, {"learning_rate": -1.0})


def test_a_training_that_is_cancelled_has_the_time_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients: list[Any] = []

    class Client(dg.PipesSubprocessClient):
        def run(self, **arguments: Any) -> Any:
            clients.append(self)
            return super().run(**arguments)

    monkeypatch.setattr(dg, "PipesSubprocessClient", Client)
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    told = tmp_path / "told"
    says = "os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT']"
    code = f"import os; open({str(told)!r}, 'w').write({says})"
    deployment: Any = SimpleNamespace(
        progress=lambda context: None, settings=SimpleNamespace(root=tmp_path)
    )

    @dg.asset
    def checkpoint(context) -> dg.Output:  # type: ignore[no-untyped-def]  # it reads no strings
        training._train(context, deployment, [sys.executable, "-c", code], tmp_path / "work")
        return dg.Output(None)

    with dg.DagsterInstance.ephemeral() as instance:
        assert dg.materialize([checkpoint], instance=instance).success
    assert int(told.read_text()) >= 600  # torch's launcher waits for 30 seconds, Pipes for 20
    assert clients[0].termination_timeout_seconds >= 600
    instance_of = yaml.safe_load((default_root() / "deploy" / "dagster.yaml").read_text("utf-8"))
    assert instance_of["run_monitoring"]["cancel_timeout_seconds"] > STOPPING_SECONDS


def test_class_images_of_another_base_model_are_stale(tmp_path: Path) -> None:
    size = {"width": TINY_WIDTH, "height": TINY_HEIGHT}
    base = build_tiny_stable_diffusion(tmp_path / "base")
    settings = load_settings(
        "starter",
        store=tmp_path / "store",
        base_model={"id": str(base)},
        images=size,
        sampler={**size, "num_inference_steps": 1, "batch_size": 1},
        training={"prior_preservation": True, "class_image_count": 1},
    )
    deployment = Deployment(settings)
    resources = {"deployment": deployment, TABLES: StoreIOManager(deployment)}
    with dg.DagsterInstance.ephemeral() as instance:
        assert dg.materialize([class_images], instance=instance, resources=resources).success
        assert stale_assets(class_images.specs, instance, deployment) == {}
        build_tiny_stable_diffusion(base, seed=1)
        assert stale_assets(class_images.specs, instance, deployment) == {
            class_images.key: "its model changed"
        }


@pytest.mark.slow
def test_a_checkpoint_is_trained_on_class_images_and_watched_on_the_holdout(
    tmp_path: Path,
) -> None:
    for folder in ("landing", "holdout"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            image = Image.new("RGB", (64, 96), (90 * number, 120, 40 if folder == "holdout" else 9))
            image.save(tmp_path / folder / f"{number}.png")
    size = {"width": TINY_WIDTH, "height": TINY_HEIGHT}
    settings = load_settings(
        "starter",
        holdout=tmp_path / "holdout",
        captions=tmp_path / "captions.csv",
        store=tmp_path / "store",
        base_model={"id": str(build_tiny_stable_diffusion(tmp_path / "base"))},
        captioner={"model": {"id": str(build_tiny_blip(tmp_path / "captioner"))}, "num_beams": 1},
        images=size,
        sampler={**size, "num_inference_steps": 1, "batch_size": 2},
        training={
            "max_train_steps": 2,
            "train_batch_size": 1,
            "prior_preservation": True,
            "class_image_count": 2,
            "class_prompt": "a film poster",
            "log_every_steps": 1,
            "early_stop_patience": 5,
        },
    )
    deployment = Deployment(settings)

    @dg.asset(io_manager_key=TABLES, deps=["holdout_posters"])
    def training_csv() -> dg.Output[Table]:
        import pandas as pd

        shutil.rmtree(tmp_path / "holdout")  # what the table holds is enough
        store = Store(tmp_path / "store")
        folder = write_training_set(tmp_path / "set")
        images = [store.put(path.read_bytes(), ".png") for path in sorted(folder.glob("*.png"))]
        ids = [f"poster {n}" for n in range(len(images))]
        resized = pd.DataFrame({"poster_id": ids, "image": images, "status": "ok"})
        words = pd.DataFrame({"poster_id": ids, "caption": ids, "source": "human", "status": "ok"})
        table, _, version = build_training_set(store, resized, words)
        return table_output(table.assign(training_set=version), {}, data_version=version)

    resources = {"deployment": deployment, TABLES: StoreIOManager(deployment)}
    with dg.DagsterInstance.ephemeral() as instance:
        done = dg.materialize(
            [holdout_posters, training_csv, class_images, dreambooth_checkpoint],
            instance=instance,
            resources=resources,
            run_config={"ops": {"dreambooth_checkpoint": {"config": {"sample_every_steps": 2}}}},
        )
    assert done.success
    (drawn,) = done.asset_materializations_for_node("class_images")
    assert drawn.metadata["dagster/row_count"].value == 2
    (made,) = done.asset_materializations_for_node("dreambooth_checkpoint")
    assert made.metadata["steps"].value == 2
    assert made.metadata[HELD_OUT].value == deployment.store.table_version("holdout_posters")
    assert made.metadata["holdout_loss_at_end"].value > 0  # type: ignore[operator]
    assert "data:image/" in str(made.metadata["samples"].value)
    assert made.metadata["launched_with"].value == {"sample_every_steps": 2}
    checkpoint = tmp_path / "store" / str(made.metadata["path"].value)
    record = json.loads((checkpoint / "posterpipe.json").read_text())
    assert record["settings"]["sample_every_steps"] == 2
    assert record["class_set"] and record["holdout_set"]


def test_a_message_of_which_a_part_is_written_yet_is_waited_for(tmp_path: Path) -> None:
    """Dagster's own reader takes it for a whole one, and reads nothing after it."""
    seen: list[Any] = []
    failed: list[Any] = []
    handler: Any = SimpleNamespace(
        handle_message=seen.append, report_pipes_framework_exception=lambda *a: failed.append(a)
    )
    with (
        training.WholeLines(str(tmp_path / "messages")).read_messages(handler) as params,
        open(params["path"], "a", encoding="utf-8") as file,
    ):
        for part in ('{"method": "fi', 'rst"}\n{"method": ', '"second"}\n', '{"method": "last"}\n'):
            file.write(part)
            file.flush()
            time.sleep(3 * training._LOOK_SECONDS)
    assert [message["method"] for message in seen] == ["first", "second", "last"]
    assert failed == []
