"""The suite on which nothing was decided is what the guide says, and its figures stand there."""

from __future__ import annotations

import itertools
import json

from docs.tools import replication
from posterpipe.core.prompts import load_suite, shared_seeds
from posterpipe.starter.posters import HOLDOUT, RAW
from posterpipe.starter.world import KINDS


def test_the_second_suite_is_the_one_that_was_drawn_by_chance() -> None:
    assert replication.UNSEEN_SUITE.read_text("utf-8") == replication.suite_text()


def test_its_combinations_and_titles_are_in_no_poster_and_no_prompt_of_the_demo() -> None:
    demo, unseen = (load_suite(path) for path in (replication.DEMO_SUITE, replication.UNSEEN_SUITE))
    posters = [*RAW, *HOLDOUT]
    made = {f"{colour}-{kind}-on-{background}" for _, kind, colour, background, *_ in posters}
    names = [prompt.prompt_id for prompt in unseen]
    assert len(names) == replication.PROMPTS_A_KIND * len(KINDS)
    assert not {*names} & made and not {*names} & {prompt.prompt_id for prompt in demo}
    titles = {prompt.title for prompt in unseen}
    assert not titles & {title for title, *_ in posters}
    assert not titles & {prompt.title for prompt in demo}
    both = itertools.chain(demo, unseen)
    assert shared_seeds({prompt.prompt_id: prompt.seeds for prompt in both}) == {}


def test_the_guide_has_the_figures_that_were_filed() -> None:
    records = json.loads(replication.FIGURES.read_text("utf-8"))
    assert {record["suite"] for record in records} == {
        replication.DEMO_SUITE.stem,
        replication.UNSEEN_SUITE.stem,
    }
    assert replication.table(records) in replication.PAGE.read_text("utf-8")


def test_the_guide_to_the_gate_has_what_it_said_of_trainings_that_differ_by_chance() -> None:
    records = json.loads(replication.JUDGED.read_text("utf-8"))
    assert {record["training_seed"] for record in records} == {*replication.TRAINING_SEEDS[1:]}
    assert {record["check"] for record in records} == {*replication.COMPARED}
    assert replication.judged_table(records) in replication.JUDGED_PAGE.read_text("utf-8")
