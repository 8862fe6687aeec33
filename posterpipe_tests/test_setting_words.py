"""The settings in words are those in code."""

from __future__ import annotations

import re

from docs.tools.training_settings import GUIDE, guide_with_tables, tables
from posterpipe.setting_words import described, source_of, unit_of
from posterpipe.settings import default_root
from posterpipe.training_settings import TrainingSettings

COUNTED = (int, float)


def test_the_tables_in_the_guide_are_those_of_the_settings() -> None:
    guide = (default_root() / GUIDE).read_text("utf-8")
    assert guide == guide_with_tables(guide), "run python -m docs.tools.training_settings"


def test_every_training_setting_has_a_row_with_all_cells_filled() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", tables(), re.M)
    assert [name for name, _ in rows] == list(TrainingSettings.model_fields)
    for name, cells in rows:
        assert all(cell.strip() for cell in cells.split(" | ")), name


def test_every_setting_tells_meaning_default_and_its_source() -> None:
    for name, field in TrainingSettings.model_fields.items():
        words = described(field)
        assert field.description and len(field.description) > 15, name
        assert source_of(field) and f"({source_of(field)})" in words, name
        assert f"Default: {'none' if field.default in (None, ()) else ''}" in words, name


def test_what_is_counted_has_a_unit() -> None:
    # Seeds are names, and these are pure numbers.
    without = {"seed", "sample_seed", "prior_loss_weight", "lora_alpha"}
    for name, field in TrainingSettings.model_fields.items():
        number = isinstance(field.default, COUNTED) and not isinstance(field.default, bool)
        if number and name not in without:
            assert unit_of(field), name


def test_bounds_are_told_also_of_what_may_be_none() -> None:
    fields = TrainingSettings.model_fields
    assert "Must be above 0, below 1." in described(fields["ema_decay"])
    assert "Must be at least 1." in described(fields["early_stop_patience"])
    assert "whole number or none, measurements; at least 1" in tables()
    assert "`fp32`, `bf16`, `fp16`" in tables()
