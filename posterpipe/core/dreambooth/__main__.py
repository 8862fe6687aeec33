"""`python -m posterpipe.core.dreambooth --config run.toml`: one training run by hand.

What belongs here: the command line and its progress in a terminal. What does not: training
(`train`), runs inside Dagster (`posterpipe.defs.training_worker`).
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.core.dreambooth.guards import launched, stop_with_parent
from posterpipe.core.dreambooth.launch import is_first_process, let_the_first_speak
from posterpipe.core.dreambooth.reports import StepReport
from posterpipe.core.openmp import wait_briefly
from posterpipe.core.progress import BarProgress
from posterpipe.core.streams import lost_output_is_dropped, open_closed_streams


def main() -> int:
    """Runs one training; returns the exit status. It goes on when nobody takes its output."""
    wait_briefly()
    open_closed_streams()
    with lost_output_is_dropped():
        return _run()


def _run() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m posterpipe.core.dreambooth",
        description="Fine-tune Stable Diffusion on a training set; a stopped run goes on.",
    )
    parser.add_argument("--config", type=Path, required=True, help="TOML file of a RunConfig")
    arguments = parser.parse_args()
    if launched():  # started by itself, it outlives the shell if it is asked to
        stop_with_parent()
    say = print if is_first_process() else _silent
    try:
        config = RunConfig.from_toml(arguments.config)
        say("loading the models ...", flush=True)
        from posterpipe.core.dreambooth.train import train

        with contextlib.ExitStack() as stack:
            result = train(config, _Reporter(stack), log=lambda line: say(line, flush=True))
    except TrainingError as error:
        let_the_first_speak()
        print(f"training: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "training: ended at once; start it again to go on from its last save", file=sys.stderr
        )
        return 128 + signal.SIGINT
    say(
        f"finished: {result.steps} steps ({result.ended_by}), smoothed loss "
        f"{result.final_loss:.4f}, checkpoint {result.checkpoint_id} in {result.output_dir}"
    )
    return 0


def _silent(*lines: object, flush: bool = False) -> None:
    """Says nothing, as `print` would say it."""


class _Reporter:
    """A bar in a terminal, one line a report elsewhere. The bar opens with the first report: only
    then is the step known from which a resumed run goes on."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._tick: Callable[..., None] | None = None
        self._step = 0

    def __call__(self, report: StepReport) -> None:
        if not sys.stdout.isatty():
            print(report, flush=True)
            return
        if self._tick is None:
            task = BarProgress().task("training", report.total, "steps", already=report.step)
            self._tick, self._step = self._stack.enter_context(task), report.step
        self._tick(report.step - self._step, **report.numbers())
        self._step = report.step


if __name__ == "__main__":
    sys.exit(main())
