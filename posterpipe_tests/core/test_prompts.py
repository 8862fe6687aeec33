"""Prompt suites: what is read, and what is refused with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from posterpipe.core.prompts import (
    Prompt,
    PromptSuiteError,
    estimate_tokens,
    load_suite,
    shared_seeds,
    suite_prompts,
    suite_table,
)
from posterpipe.settings import SamplerSettings
from posterpipe.starter.world import COLOURS, KINDS

SHIPPED = Path(__file__).parents[2] / "data" / "prompt_suites" / "animated_movies.yaml"

GOOD = """\
defaults:
  negative: busy, cluttered
prompts:
  - id: red-rocket
    prompt: a red rocket
      on blue
    score_text: a rocket
    title: Orbit
    seeds: [1, 2]
  - id: cat
    prompt: a cat
    score_text: "a cat: black"
    negative: ""
    seeds: [3]
"""


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "suite.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_suite_is_read_in_its_order(tmp_path: Path) -> None:
    assert load_suite(write(tmp_path, GOOD)) == [
        Prompt(
            "red-rocket", "a red rocket on blue", "a rocket", "busy, cluttered", "Orbit", (1, 2)
        ),
        Prompt("cat", "a cat", "a cat: black", "", "", (3,)),
    ]


def test_the_table_and_back(tmp_path: Path) -> None:
    prompts = load_suite(write(tmp_path, GOOD))
    table = suite_table(prompts)
    assert list(table.columns) == [
        "prompt_id", "prompt", "score_text", "negative", "title", "seeds",
    ]  # fmt: skip
    assert table.seeds[0] == "[1, 2]"
    assert suite_prompts(table) == prompts
    assert list(suite_table([]).columns) == list(table.columns)


def test_a_prompt_may_ask_for_a_delayed_negative(tmp_path: Path) -> None:
    text = GOOD.replace("  negative: busy, cluttered", "  negative: busy\n  negative_from: 0.4")
    text = text.replace('    negative: ""', "    negative: dogs\n    negative_from: 0.75")
    prompts = load_suite(write(tmp_path, text))
    assert [prompt.negative_from for prompt in prompts] == [0.4, 0.75]
    assert suite_prompts(suite_table(prompts)) == prompts
    some = [prompts[0], Prompt("cat", "a cat", "a cat: black", "", "", (3,))]
    assert suite_prompts(suite_table(some)) == some


@pytest.mark.parametrize(
    ("value", "what"),
    [("0", "above 0 and below 1"), ("1", "above 0"), ("soon", "'soon'"), ("true", "True")],
)
def test_a_delay_is_a_share_of_the_steps(tmp_path: Path, value: str, what: str) -> None:
    with pytest.raises(PromptSuiteError, match=what):
        load_suite(write(tmp_path, one(negative_from=value)))


@pytest.mark.parametrize(
    ("value", "steps", "remedy"),
    [
        ("0.99", 6, "write at most 0.83"),
        ("0.97", 25, "write at most 0.96"),
        ("0.5", 1, "there is one step: the negative prompt would never act; take it out"),
    ],
)
def test_a_delay_that_leaves_no_step_is_refused_by_file_and_line(
    tmp_path: Path, value: str, steps: int, remedy: str
) -> None:
    sampler = SamplerSettings(num_inference_steps=steps)
    suite = write(tmp_path, one(negative_from=value))
    with pytest.raises(PromptSuiteError) as refused:
        load_suite(suite, sampler=sampler)
    (line,) = str(refused.value).splitlines()
    number = 1 + suite.read_text().splitlines().index(f"  negative_from: {value}")
    assert line.startswith(f"{suite}:{number}: `negative_from` is {value}") and remedy in line
    assert "or raise POSTERPIPE_SAMPLER__NUM_INFERENCE_STEPS" in line
    more = SamplerSettings(num_inference_steps=100)
    assert load_suite(suite, sampler=more)[0].negative_from == float(value)


def test_a_delay_of_all_steps_but_the_last_is_the_longest(tmp_path: Path) -> None:
    suite = write(tmp_path, one(negative_from="0.96"))
    assert load_suite(suite, sampler=SamplerSettings(num_inference_steps=25))


def test_a_delay_without_a_negative_prompt_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(PromptSuiteError, match="delays a negative prompt, and there is none"):
        load_suite(write(tmp_path, one(negative='""', negative_from="0.4")))


def one(**changes: str | None) -> str:
    """A suite of one prompt; its fields are on lines 2 to 7, in this order."""
    fields = {"id": "a", "prompt": "p", "score_text": "s", "negative": "n", "title": "T"}
    values = {**fields, "seeds": "[1, 2]", **changes}
    lines = [f"{name}: {value}" for name, value in values.items() if value is not None]
    return "prompts:\n- " + "\n  ".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", 1, "the suite is empty; list its prompts"),
        ("# nothing but a comment\n", 1, "the suite is empty"),
        ("prompts: []\n", 1, "`prompts` must be a list; add at least one"),
        ("prompts: rocket\n", 1, "`prompts` must be a list"),
        ("- a\n- b\n", 1, "the suite must be `name: value` lines"),
        ("defaults: {prompt: x}\n" + one(), 1, "`defaults` has an unknown `prompt`"),
        ("prompts:\n- just words\n", 2, "a prompt must be `name: value` lines"),
        ("prompts:\n- id: 'a\n  b: c\n", 4, "not valid YAML: "),
        ("prompts:\n\t- id: a\n", 2, "not valid YAML: "),
        ("prompts: *nowhere\n", 1, "not valid YAML: found undefined alias"),
        ("a: 1\n---\nb: 2\n", 2, "not valid YAML: but found another document"),
        ("prompts: \x07\n", 1, "not valid YAML: "),
        (b"prompts:\n- id: caf\xe9\n", 2, "not UTF-8"),
        (one(negativ="x"), 8, "a prompt has an unknown `negativ`"),
        (one() + "  id: b\n", 8, "a prompt has `id` twice"),
        (one(score_text=None), 2, "a prompt lacks score_text; add"),
        (one(id="12"), 2, "`id` must be text, not 12; put it in quotes"),
        (one(id="a b"), 2, "the id 'a b' is no name"),
        (one(id="../a"), 2, "is no name"),
        (one(prompt=""), 3, "`prompt` must be text, not None"),
        (one(prompt="' '"), 3, "`prompt` is empty"),
        (one(score_text="[a]"), 4, "`score_text` must be text, not ['a']"),
        (one(title="2001-02-31"), 6, "`title` must be text"),
        (one(title="no"), 6, "`title` must be text, not False; put it in quotes"),
        (one(score_text="a film 'T'"), 4, "`score_text` quotes the title 'T'"),
        (one(prompt="word " * 76), 3, "`prompt` has 76 tokens and the models read 75; shorten"),
        (one(negative="1" * 80), 5, "`negative` must be text"),
        (one(seeds="7"), 7, "`seeds` must be a list"),
        (one(seeds="[]"), 7, "`seeds` must be a list"),
        (one(seeds="[1, x]"), 7, "the seed 'x' is no whole number"),
        (one(seeds="[1, 1.0]"), 7, "the seed 1.0 is no whole number"),
        (one(seeds="[true]"), 7, "the seed True is no whole number"),
        (one(seeds="[-1]"), 7, "the seed -1 is no whole number"),
        (one(seeds="[4294967296]"), 7, "the seed 4294967296 is no whole number"),
        (one(seeds="[5, 6, 5]"), 7, "`seeds` names a seed twice"),
        (one() + one(prompt="q")[9:], 8, "the id 'a' is that of line 2 too"),
        (one() + one(id="b")[9:], 9, "the prompt 'p' is that of line 3 too"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(
    tmp_path: Path, text: str | bytes, line: int, what: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(PromptSuiteError) as caught:
        load_suite(path)
    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"{path}:{line}: ") and what in first


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(PromptSuiteError) as caught:
        load_suite(write(tmp_path, one(id="1", seeds="[x]", prompt="''")))
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["2", "3", "7"]


def test_a_missing_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(PromptSuiteError, match=r"none\.yaml:1: .*POSTERPIPE_PROMPT_SUITE"):
        load_suite(tmp_path / "none.yaml")


def test_tokens_are_estimated_as_clip_splits_text() -> None:
    assert estimate_tokens("a red rocket, only one!") == 7
    assert estimate_tokens("it's 1969") == 6
    assert estimate_tokens("") == 0


def test_the_shipped_suite_asks_for_every_kind_and_colour() -> None:
    prompts = load_suite(SHIPPED)
    assert len(prompts) >= 24
    assert prompts[0].prompt == (
        "animated movie poster 'rocket' only one spaceship is prominently displayed in the center"
    )
    seeds = [seed for prompt in prompts for seed in prompt.seeds]
    assert len(set(seeds)) == len(seeds) == 4 * len(prompts)
    texts = " ".join(prompt.score_text for prompt in prompts)
    for names in KINDS.values():
        assert any(name in texts for name in names)
    assert all(colour in texts for colour in COLOURS)
    for prompt in prompts:
        assert prompt.title and prompt.negative
        assert prompt.title.lower() not in prompt.score_text.lower()


def test_seeds_that_several_prompts_use_are_allowed_and_named(tmp_path: Path) -> None:
    assert shared_seeds({p.prompt_id: p.seeds for p in load_suite(write(tmp_path, GOOD))}) == {}
    text = GOOD.replace("seeds: [3]", "seeds: [3, 2]")
    prompts = load_suite(write(tmp_path, text))
    assert shared_seeds({p.prompt_id: p.seeds for p in prompts}) == {2: ["red-rocket", "cat"]}
