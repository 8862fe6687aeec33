"""The process in which Dagster trains: `-m posterpipe.defs.training_worker --config run.toml`.

What belongs here: the far end of Dagster Pipes, which turns a run's reports into log lines and its
result into metadata. What does not: training (`posterpipe.core.dreambooth`), the asset that starts
this process, and any import of dagster itself.

A step's report travels as a custom message (the fields of `StepReport`), everything else as log
lines. It runs under `accelerate launch` (`dreambooth.launch.launch_command` builds the command);
with several processes, the first one talks to Dagster, and another one only of an error that is its
own. Started by hand it trains all the same.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dagster_pipes import PipesContext, open_dagster_pipes

from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.core.dreambooth.guards import stop_with_parent
from posterpipe.core.dreambooth.launch import is_first_process, let_the_first_speak
from posterpipe.core.dreambooth.reports import TrainResult


def main() -> None:
    """Trains with the config that the command line names, and reports to Dagster."""
    parser = argparse.ArgumentParser(description="Train for Dagster.")
    parser.add_argument("--config", type=Path, required=True, help="TOML file of a RunConfig")
    arguments = parser.parse_args()
    stop_with_parent()
    if not is_first_process():
        _train_silently(arguments.config)
        return
    with open_dagster_pipes() as pipes:
        try:
            result = _train(arguments.config, pipes)
        except TrainingError as error:
            pipes.log.error(str(error))
            raise
        pipes.report_asset_materialization(
            metadata=_metadata(result), data_version=result.checkpoint_id
        )


def _train_silently(config_file: Path) -> None:
    try:
        _train(config_file)
    except Exception as error:
        let_the_first_speak()
        with open_dagster_pipes() as pipes:
            pipes.log.error(f"training, process {os.environ['RANK']}: {error}")
            raise


def _train(config_file: Path, pipes: PipesContext | None = None) -> TrainResult:
    config = RunConfig.from_toml(config_file)
    if pipes is None:
        from posterpipe.core.dreambooth.train import train

        return train(config)
    pipes.log.info("training: loading the models")
    from posterpipe.core.dreambooth.train import train

    return train(
        config,
        lambda report: pipes.report_custom_message(asdict(report)),
        log=lambda line: pipes.log.info(f"training: {line}"),
    )


def _metadata(result: TrainResult) -> dict[str, Any]:
    last = result.reports[-1]
    # The weights may be those of an earlier step.
    speed = last.step / result.seconds if result.seconds else 0.0
    return {
        "checkpoint_id": {"raw_value": result.checkpoint_id, "type": "text"},
        "checkpoint": {"raw_value": str(result.output_dir), "type": "path"},
        "metrics": {"raw_value": str(result.metrics), "type": "path"},
        "steps": {"raw_value": result.steps, "type": "int"},
        "ended_by": {"raw_value": result.ended_by, "type": "text"},
        "resumed_from_step": {"raw_value": result.resumed_from, "type": "int"},
        "final_loss": {"raw_value": result.final_loss, "type": "float"},
        "steps_per_second": {"raw_value": speed, "type": "float"},
        "training_seconds": {"raw_value": result.seconds, "type": "float"},
        "peak_memory_gib": {"raw_value": last.memory_gib, "type": "float"},
    }


if __name__ == "__main__":
    main()
