"""The process in which Dagster trains: `-m posterpipe.defs.training_worker --config run.toml`.

What belongs here: the far end of Dagster Pipes, which passes on what a run reports. What does not:
training (`posterpipe.core.dreambooth`), the asset that starts this process and reads what came out
of it from the checkpoint's record, and any import of dagster itself.

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

from dagster_pipes import PipesContext, open_dagster_pipes

from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.core.dreambooth.guards import stop_with_parent
from posterpipe.core.dreambooth.launch import is_first_process, let_the_first_speak
from posterpipe.core.openmp import wait_briefly


def main() -> None:
    """Trains with the config that the command line names, and reports to Dagster."""
    wait_briefly()
    parser = argparse.ArgumentParser(description="Train for Dagster.")
    parser.add_argument("--config", type=Path, required=True, help="TOML file of a RunConfig")
    arguments = parser.parse_args()
    stop_with_parent()
    if not is_first_process():
        _train_silently(arguments.config)
        return
    with open_dagster_pipes() as pipes:
        try:
            _train(arguments.config, pipes)
        except TrainingError as error:
            pipes.log.error(str(error))
            raise


def _train_silently(config_file: Path) -> None:
    try:
        _train(config_file)
    except Exception as error:
        let_the_first_speak()
        with open_dagster_pipes() as pipes:
            pipes.log.error(f"training, process {os.environ['RANK']}: {error}")
            raise


def _train(config_file: Path, pipes: PipesContext | None = None) -> None:
    config = RunConfig.from_toml(config_file)
    if pipes is not None:
        pipes.log.info("training: loading the models")  # told before torch is, which takes a while
    from posterpipe.core.dreambooth.train import train

    if pipes is None:
        train(config)
        return
    train(
        config,
        lambda report: pipes.report_custom_message(asdict(report)),
        log=lambda line: pipes.log.info(f"training: {line}"),
    )


if __name__ == "__main__":
    main()
