"""The variants have the same names wherever they have to be written out."""

from __future__ import annotations

import re

import yaml

from posterpipe.core import statistics, thesis
from posterpipe.core.variants import DELAYED_VARIANTS, LABELS, VARIANTS
from posterpipe.settings import default_root

DBT = default_root() / "dbt_like_reports"


def test_every_variant_has_a_label() -> None:
    assert set(LABELS) == {*VARIANTS, *DELAYED_VARIANTS}
    assert len(set(LABELS.values())) == len(LABELS)


def test_dbt_lists_them_in_the_order_in_which_they_stand_side_by_side() -> None:
    project = yaml.safe_load((DBT / "dbt_project.yml").read_text("utf-8"))
    assert project["vars"]["variants"] == list(LABELS)


def test_the_leaderboard_accepts_each_of_them() -> None:
    marts = yaml.safe_load((DBT / "models/marts/_marts.yml").read_text("utf-8"))
    accepted = [
        test["accepted_values"]["arguments"]["values"]
        for model in marts["models"]
        for column in model["columns"]
        for test in column.get("data_tests", ())
        if column["name"] == "variant" and "accepted_values" in test
    ]
    assert accepted and all(values == list(LABELS) for values in accepted)


def test_the_thesis_has_a_number_for_each_of_the_study() -> None:
    assert tuple(thesis.VARIANTS) == VARIANTS


def test_comparisons_are_those_of_variants_that_are_drawn() -> None:
    asked = {name for weights in statistics.CONTRASTS.values() for name in weights}
    assert asked == set(LABELS)
    sql = (DBT / "models/marts/paired_effects.sql").read_text("utf-8")
    listed = re.search(r"as listed \((.+?)\)", sql, re.S)
    assert listed is not None
    assert set(re.findall(r"\w+", listed[1])) == {"place", "comparison", "question", *LABELS}


def test_the_report_has_a_colour_for_each() -> None:
    styles = default_root() / "posterpipe/core/score_report/static/report.css"
    rules = re.findall(r"^(\..+?) \{ --v:", styles.read_text("utf-8"), re.M)
    assert set(LABELS) <= {name for rule in rules for name in re.findall(r"\.v-(\w+)", rule)}
