"""The training process as Dagster starts it."""

import sys
from pathlib import Path
from typing import Any

import dagster as dg

from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.launch import launch_command
from posterpipe.settings import TrainingSettings
from posterpipe_tests.core.dreambooth.conftest import write_training_set
from posterpipe_tests.models import TINY_HEIGHT, TINY_WIDTH, build_tiny_stable_diffusion


def test_reports_result_and_errors_reach_dagster(tmp_path: Path) -> None:
    config = RunConfig(
        base_model=build_tiny_stable_diffusion(tmp_path / "base"),
        training_set=write_training_set(tmp_path / "set"),
        output_dir=tmp_path / "out",
        work_dir=tmp_path / "work",
        width=TINY_WIDTH,
        height=TINY_HEIGHT,
        training=TrainingSettings(max_train_steps=2, train_batch_size=2, log_every_steps=1),
    )
    missing = config.model_copy(
        update={"base_model": tmp_path / "nowhere", "output_dir": tmp_path / "other"}
    )
    steps: list[Any] = []

    @dg.asset
    def checkpoint(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        client = dg.PipesSubprocessClient(cwd=str(Path(__file__).parents[2]))
        file = config.to_toml(tmp_path / "work" / "run.toml")
        command = launch_command(file, module="posterpipe.defs.training_worker", cpu=True)
        done = client.run(command=command, context=context)
        steps.extend(done.get_custom_messages())
        return done.get_materialize_result()

    @dg.asset
    def failing(context: dg.AssetExecutionContext) -> None:
        client = dg.PipesSubprocessClient(cwd=str(Path(__file__).parents[2]))
        # Without the launcher: the module works by itself, too.
        file = missing.to_toml(tmp_path / "work" / "missing.toml")
        by_hand = [sys.executable, "-m", "posterpipe.defs.training_worker", "--config", str(file)]
        client.run(command=by_hand, context=context)

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([checkpoint], instance=instance)
        failed = dg.materialize([failing], instance=instance, raise_on_error=False)
        said = "\n".join(entry.user_message for entry in instance.all_logs(failed.run_id))

    assert [message["step"] for message in steps] == [1, 2]
    assert {"total", "loss", "smoothed_loss", "lr", "seconds_left"} <= steps[0].keys()
    (event,) = result.asset_materializations_for_node("checkpoint")
    assert event.metadata["steps"].value == 2
    assert (
        event.tags and event.tags["dagster/data_version"] == event.metadata["checkpoint_id"].value
    )
    assert (tmp_path / "out" / "model_index.json").exists()
    assert not failed.success
    assert "nowhere: there is no such directory" in said
