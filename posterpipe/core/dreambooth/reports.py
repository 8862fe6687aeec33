"""What a training run reports while it works, and the curves it leaves.

What belongs here: a step's report and its words, everything a run has seen so far, the result,
metrics.parquet, the curves. What does not: when reports are made (`train`), bars and logs
(`progress`, the Dagster layer).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from posterpipe.core.progress import duration

METRICS_NAME = "metrics.parquet"
PICTURE_NAME = "loss.png"

# The smoothed loss forgets half of what it knew in about 35 steps: long enough to see through the
# noise of random timesteps, short enough to see a trend within a run of hundreds of steps.
_REMEMBERED_EACH_STEP = 0.98


@dataclass(frozen=True)
class StepReport:
    """Where a run stands after `step` of `total` optimizer steps.

    loss: mean over the steps since the report before, without those that overflowed in fp16, which
    its scaler leaves out; None where all did. smoothed_loss: moving average over about 50 steps,
    None before the first that counts. holdout_loss: as last measured, None before. lr,
    text_encoder_lr: learning rates in this step; None for a text encoder that is not trained.
    grad_norm: of this step's gradients before they are clipped; None where they overflowed and
    fp16's scaler left the step out. seconds_left: at the mean speed of this process's steps after
    its first, which is slower; None before there are any. memory_gib: peak of the accelerator's
    memory, of the process's on CPU. skipped_steps: how many of the steps so far fp16's scaler left
    out because gradients overflowed.
    """

    step: int
    total: int
    loss: float | None
    smoothed_loss: float | None
    holdout_loss: float | None
    lr: float
    text_encoder_lr: float | None
    grad_norm: float | None
    steps_per_second: float
    seconds_left: float | None
    memory_gib: float
    skipped_steps: int = 0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StepReport:
        """A report as it was written; earlier versions wrote norms that are no number as such."""
        return cls(**{**values, "grad_norm": finite(values["grad_norm"])})

    def numbers(self) -> dict[str, float | str]:
        """What is shown beside a bar, which counts steps and time itself."""
        numbers: dict[str, float | str] = {}
        if self.smoothed_loss is not None:
            numbers["loss"] = self.smoothed_loss
        if self.holdout_loss is not None:
            numbers["held-out"] = self.holdout_loss
        text_rate = "off" if self.text_encoder_lr is None else self.text_encoder_lr
        numbers |= {"lr": self.lr, "text lr": text_rate, "GiB": self.memory_gib}
        return {**numbers, "skipped": self.skipped_steps} if self.skipped_steps else numbers

    def __str__(self) -> str:
        speed = (
            f"{self.steps_per_second:.2f} steps/s"
            if self.steps_per_second >= 0.1
            else f"{duration(1 / max(self.steps_per_second, 1e-9))} a step"
        )
        holdout = "" if self.holdout_loss is None else f", held-out {self.holdout_loss:.4f}"
        text = "" if self.text_encoder_lr is None else f" (text {self.text_encoder_lr:.2e})"
        left = ""
        if self.seconds_left is not None and self.step < self.total:
            left = f", about {duration(self.seconds_left)} left"
        skipped = f", {self.skipped_steps} steps left out" if self.skipped_steps else ""
        loss, smoothed = (
            "no number" if value is None else f"{value:.4f}"
            for value in (self.loss, self.smoothed_loss)
        )
        return (
            f"step {self.step} of {self.total}: loss {loss}, smoothed "
            f"{smoothed}{holdout}, learning rate {self.lr:.2e}{text}, {speed}{left}, "
            f"{self.memory_gib:.1f} GiB{skipped}"
        )


def finite(value: float | None) -> float | None:
    """The value, or None for what JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class HoldoutLoss:
    """Mean squared error on the held-out posters after `step` optimizer steps."""

    step: int
    loss: float


@dataclass(frozen=True)
class TrainResult:
    """A finished run. `steps`: after how many the weights are as they are; `ended_by`: why there
    are no more (max_train_steps, early_stop or time_limit); `resumed_from`: the step of the save it
    went on from, 0 for none; `seconds`: time spent on optimizer steps, over all its processes."""

    output_dir: Path
    checkpoint_id: str
    steps: int
    final_loss: float
    seconds: float
    resumed_from: int
    ended_by: str
    reports: tuple[StepReport, ...]
    holdout: tuple[HoldoutLoss, ...]

    @property
    def metrics(self) -> Path:
        """One row a report, see `write_metrics`."""
        return self.output_dir / METRICS_NAME


@dataclass
class SmoothedLoss:
    """A moving average that starts unbiased (as Adam's moments do)."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, loss: float | None, steps: float) -> float | None:
        """Takes the mean loss of `steps` steps in, None for 0; returns the average, None where no
        step was taken in yet."""
        if loss is None:
            return self.total / self.weight if self.weight else None
        keep = _REMEMBERED_EACH_STEP**steps
        self.total = keep * self.total + (1 - keep) * loss
        self.weight = keep * self.weight + (1 - keep)
        return self.total / self.weight


@dataclass
class Journal:
    """Everything a run has seen so far; it goes into each save.

    `seconds` of training, over all processes; `loss_sum` since the last report, over `loss_steps`
    whose loss is a number, both means over the processes; `ended_by`: why no more steps are made,
    "" while there are.
    """

    seconds: float = 0.0
    reports: list[StepReport] = field(default_factory=list)
    holdout: list[HoldoutLoss] = field(default_factory=list)
    smoothed: SmoothedLoss = field(default_factory=SmoothedLoss)
    loss_sum: float = 0.0
    loss_steps: float = 0
    ended_by: str = ""

    @property
    def mean_loss(self) -> float | None:
        """Of the steps since the last report; None where the loss of none is a number."""
        return self.loss_sum / self.loss_steps if self.loss_steps else None

    def forget_holdout(self) -> None:
        """Drops every held-out loss; the others stay."""
        self.holdout.clear()
        self.reports = [replace(report, holdout_loss=None) for report in self.reports]

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Journal:
        """A journal as it was when it was saved."""
        return cls(
            seconds=values["seconds"],
            reports=[StepReport.from_json(row) for row in values["reports"]],
            holdout=[HoldoutLoss(**row) for row in values["holdout"] if math.isfinite(row["loss"])],
            smoothed=SmoothedLoss(**values["smoothed"]),
            loss_sum=values["loss_sum"],
            loss_steps=values["loss_steps"],
            ended_by=values["ended_by"],
        )


def write_metrics(path: Path, journal: Journal) -> None:
    """Writes one row a report or measurement, by step, as Parquet.

    Columns: step, loss, smoothed_loss, holdout_loss, lr, text_encoder_lr, grad_norm,
    steps_per_second, memory_gib, skipped_steps; what was not measured at a step is null.
    """
    import pyarrow
    import pyarrow.parquet

    names = ("loss", "smoothed_loss", "holdout_loss", "lr", "text_encoder_lr", "grad_norm",
             "steps_per_second", "memory_gib")  # fmt: skip
    rows: dict[int, dict[str, Any]] = {}
    for report in journal.reports:
        # Its held-out loss may be older than the report; the measurements below tell when.
        rows[report.step] = {**asdict(report), "holdout_loss": None}
    for measured in journal.holdout:
        rows.setdefault(measured.step, {})["holdout_loss"] = measured.loss
    schema = pyarrow.schema(
        [
            ("step", pyarrow.int64()),
            *((name, pyarrow.float64()) for name in names),
            ("skipped_steps", pyarrow.int64()),
        ]
    )
    table = [
        {"step": step} | {name: rows[step].get(name) for name in schema.names[1:]}
        for step in sorted(rows)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table, schema=schema), path)


def draw_curves(path: Path, journal: Journal) -> None:
    """Draws the loss, its moving average, the held-out loss and the learning rate as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    loss = figure.subplots()
    steps = [r.step for r in journal.reports]
    losses = [math.nan if r.loss is None else r.loss for r in journal.reports]
    loss.plot(steps, losses, color="#9db4d3", lw=1, label="loss")
    smoothed = [math.nan if r.smoothed_loss is None else r.smoothed_loss for r in journal.reports]
    loss.plot(steps, smoothed, color="#1f4e8c", lw=2, label="loss, smoothed")
    if journal.holdout:
        loss.plot(
            [h.step for h in journal.holdout],
            [h.loss for h in journal.holdout],
            color="#2f8f6b",
            lw=2,
            marker="o",
            ms=4,
            label="held-out loss",
        )
    loss.set_xlabel("optimizer step")
    loss.set_ylabel("mean squared error")
    loss.set_ylim(bottom=0)
    loss.grid(alpha=0.25)
    rate = loss.twinx()
    rates = [r.lr for r in journal.reports]
    rate.plot(steps, rates, color="#c8793a", lw=1, ls="--", label="learning rate")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    lines = [*loss.get_lines(), *rate.get_lines()]
    # Of the axes on top: the rate would be drawn across a legend of the others.
    names = [str(line.get_label()) for line in lines]
    rate.legend(lines, names, loc="upper right", framealpha=1)
    for axes in (loss, rate):
        axes.spines["top"].set_visible(False)
    figure.savefig(path)
