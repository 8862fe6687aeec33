"""What a training run leaves to look at: its curves."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from posterpipe.core.dreambooth.reports import HoldoutLoss, Journal, StepReport, draw_curves


def report(step: int) -> StepReport:
    return StepReport(
        step=step, total=20, loss=1 / step, smoothed_loss=1 / step, holdout_loss=None, lr=2e-4,
        text_encoder_lr=None, grad_norm=1.0, steps_per_second=1.0, seconds_left=None,
        memory_gib=1.0,
    )  # fmt: skip


def test_no_curve_is_drawn_across_the_legend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: saved.append(figure))
    journal = Journal(reports=[report(10), report(20)], holdout=[HoldoutLoss(20, 0.5)])
    draw_curves(tmp_path / "loss.png", journal)
    (figure,) = saved
    *below, top = figure.axes
    assert all(axes.get_legend() is None for axes in below)
    legend = top.get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["loss", "loss, smoothed", "held-out loss", "learning rate"]
    assert legend.get_frame().get_alpha() == 1
