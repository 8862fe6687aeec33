"""What a training run says while it works, and the curves it leaves.

What belongs here: a step's report and its words, the result, metrics.csv, the loss picture. What
does not: when reports are made (`train`), bars and logs (`progress`, the Dagster layer).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from posterpipe.core.progress import duration

METRICS_NAME = "metrics.csv"
PICTURE_NAME = "loss.png"
_METRICS = ("step", "loss", "smoothed_loss", "lr", "steps_per_second")

# The smoothed loss forgets half of what it knew in about 35 steps: long enough to see through the
# noise of random timesteps, short enough to see a trend within a run of hundreds of steps.
_REMEMBERED_EACH_STEP = 0.98


@dataclass(frozen=True)
class StepReport:
    """Where a run stands after `step` of `total` optimizer steps.

    loss: mean over the steps since the report before. smoothed_loss: moving average over about 50
    steps. lr: the U-Net's learning rate in this step. seconds_left: at this run's mean speed.
    memory_gib: peak of the accelerator's memory, of the process's on CPU.
    """

    step: int
    total: int
    loss: float
    smoothed_loss: float
    lr: float
    steps_per_second: float
    seconds_left: float
    memory_gib: float

    def __str__(self) -> str:
        speed = (
            f"{self.steps_per_second:.2f} steps/s"
            if self.steps_per_second >= 0.1
            else f"{duration(1 / max(self.steps_per_second, 1e-9))} a step"
        )
        left = f", about {duration(self.seconds_left)} left" if self.step < self.total else ""
        return (
            f"step {self.step} of {self.total}: loss {self.loss:.4f}, smoothed "
            f"{self.smoothed_loss:.4f}, learning rate {self.lr:.2e}, {speed}{left}, "
            f"{self.memory_gib:.1f} GiB"
        )


@dataclass(frozen=True)
class TrainResult:
    """A finished run. `resumed_from`: the step of the save it went on from, 0 for none;
    `seconds`: time spent on optimizer steps, over all its processes."""

    output_dir: Path
    checkpoint_id: str
    steps: int
    final_loss: float
    seconds: float
    resumed_from: int
    reports: tuple[StepReport, ...]

    @property
    def metrics_csv(self) -> Path:
        """step, loss, smoothed_loss, lr, steps_per_second: one row a report."""
        return self.output_dir / METRICS_NAME

    @property
    def loss_picture(self) -> Path:
        """The loss and the learning rate over the steps, a PNG."""
        return self.output_dir / PICTURE_NAME


@dataclass
class SmoothedLoss:
    """A moving average that starts unbiased (as Adam's moments do)."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, loss: float, steps: int) -> float:
        """Takes the mean loss of `steps` steps in; returns the average."""
        keep = _REMEMBERED_EACH_STEP**steps
        self.total = keep * self.total + (1 - keep) * loss
        self.weight = keep * self.weight + (1 - keep)
        return self.total / self.weight


def write_metrics(path: Path, reports: Sequence[StepReport]) -> None:
    """Writes step, loss, smoothed_loss, lr, steps_per_second as CSV with a heading."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _METRICS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(report) for report in reports)


def draw_loss(path: Path, reports: Sequence[StepReport]) -> None:
    """Draws the loss, its moving average and the learning rate over the steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    loss = figure.subplots()
    steps = [r.step for r in reports]
    loss.plot(steps, [r.loss for r in reports], color="#9db4d3", lw=1, label="loss")
    smoothed = [r.smoothed_loss for r in reports]
    loss.plot(steps, smoothed, color="#1f4e8c", lw=2, label="loss, smoothed")
    loss.set_xlabel("optimizer step")
    loss.set_ylabel("mean squared error")
    loss.set_ylim(bottom=0)
    loss.grid(alpha=0.25)
    rate = loss.twinx()
    rate.plot(steps, [r.lr for r in reports], color="#c8793a", lw=1, ls="--", label="learning rate")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    lines = [*loss.get_lines(), *rate.get_lines()]
    loss.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")
    for axes in (loss, rate):
        axes.spines["top"].set_visible(False)
    figure.savefig(path)
