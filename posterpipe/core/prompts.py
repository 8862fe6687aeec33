"""Prompt suites: what is asked of every model, and against which text the answer is scored.

What belongs here: reading a suite, refusing a wrong one with file and line, its table. What does
not: drawing (`sampler`) and scoring (`metrics`).

A suite is a YAML file:

    defaults:                       # optional; what a prompt may leave out (give no seeds here:
                                    # prompts that share them are not independent)
      negative: busy, cluttered
    prompts:
      - id: red-rocket              # letters, digits, - and _
        prompt: a minimalist film poster of a red rocket titled 'Plum Orbit'
        score_text: a minimalist film poster of a red rocket
        negative: busy, cluttered   # optional; what the `_negative` variants leave out
        title: Plum Orbit           # optional; what the poster should be called
        seeds: [101, 102, 103, 104] # one image per seed and variant; of this prompt alone
        negative_from: 0.4          # optional; adds the variants whose negative prompt acts only
                                    # after this share of the steps
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from posterpipe.settings import CLIP_TOKENS, SamplerSettings

MAX_TEXT_TOKENS = CLIP_TOKENS - 2
"""Of a text for CLIP; two tokens mark start and end."""

TextLimit = tuple[Callable[[str], int], int]
"""How a model counts the tokens of a text, and how many it reads; both without start and end."""

MAX_SEED = 2**32 - 1
"""The largest seed that the usual image viewers and tools accept."""

_TEXTS = ("id", "prompt", "score_text", "negative", "title")
_REQUIRED = ("id", "prompt", "score_text", "seeds")
_DEFAULTS = ("negative", "seeds", "negative_from")
_PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|[^\w\s]+|_", re.IGNORECASE)
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class PromptSuiteError(ValueError):
    """A suite is wrong. One line a problem: `file:line: what is wrong; what to do`."""


@dataclass(frozen=True)
class Prompt:
    """One question to the models."""

    prompt_id: str
    prompt: str
    """What the models are given."""
    score_text: str
    """What the images are compared with: natural language, without title and trigger words."""
    negative: str
    """What the `_negative` variants steer away from; "" for nothing."""
    title: str
    """What the poster should be called; "" for untitled."""
    seeds: tuple[int, ...]
    """0 to MAX_SEED; one image a seed and variant, the same noise in every variant."""
    negative_from: float | None = None
    """Share of the steps, above 0 and below 1 (see `too_late`), after which the negative prompt of
    the variants `_negative_delayed` begins to act; None: the prompt has no such variants."""


def estimate_tokens(text: str) -> int:
    """A lower bound of a text's length in CLIP tokens: its words, digits and runs of other signs.

    So CLIP's own tokenizer cuts a text first; rare words then become several tokens.
    """
    return len(_PIECES.findall(text))


def too_late(negative_from: float, sampler: SamplerSettings) -> str:
    """Why a negative prompt that acts after this share of the steps never acts, and what to do; ""
    where it does. Its image would be the one without, under the name of the one with."""
    latest, steps = sampler.latest_negative, sampler.num_inference_steps
    if negative_from <= latest:
        return ""
    begins = f"the last of {steps} steps begins after {latest:.4g} of them"
    # Rounded down, so that what is told to write is right.
    largest = math.floor(latest * 100) / 100
    remedy = f"write at most {largest:g}, or raise" if largest else "take it out, or raise"
    return (
        f"`negative_from` is {negative_from:g}, and {begins if steps > 1 else 'there is one step'}:"
        f" the negative prompt would never act; {remedy} "
        "POSTERPIPE_SAMPLER__NUM_INFERENCE_STEPS"
    )


def load_suite(
    path: Path,
    *,
    limit: TextLimit | None = None,
    sampler: SamplerSettings | None = None,
    data: bytes | None = None,
) -> list[Prompt]:
    """The prompts of a suite, in the order of the file.

    `limit`: that of the model that is to read them (`sampler.known_text_limit`); None: CLIP's, by
    `estimate_tokens`, which finds only what is too long for certain. `sampler`: refuses negative
    prompts that act too late for its steps; None: any share will do. `data`: what `read_suite` read
    of the file, where that was done before. Raises PromptSuiteError naming every problem by file
    and line.
    """
    path = Path(path)
    try:
        # As a text file is read, whatever ends its lines.
        file = io.BytesIO(read_suite(path) if data is None else data)
        text = io.TextIOWrapper(file, encoding="utf-8").read()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise PromptSuiteError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from error
    return _Reader(path, limit or (estimate_tokens, MAX_TEXT_TOKENS), sampler).read(text)


def read_suite(path: Path) -> bytes:
    """The bytes of a suite's file. Raises PromptSuiteError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise PromptSuiteError(
            f"{path}:1: the prompt suite cannot be read ({error.strerror}); "
            "write one there or set POSTERPIPE_PROMPT_SUITE to another file"
        ) from error


def suite_table(prompts: Sequence[Prompt]) -> pd.DataFrame:
    """One row a prompt: prompt_id, prompt, score_text, negative, title, seeds (JSON list), and
    negative_from (NaN for none) where a prompt has it."""
    columns = ["prompt_id", "prompt", "score_text", "negative", "title", "seeds"]
    rows = [
        (p.prompt_id, p.prompt, p.score_text, p.negative, p.title, json.dumps(list(p.seeds)))
        for p in prompts
    ]
    table = pd.DataFrame(rows, columns=columns)
    if any(p.negative_from is not None for p in prompts):
        table["negative_from"] = pd.Series([p.negative_from for p in prompts], dtype="float64")
    return table


def shared_seeds(seeds: Mapping[str, Sequence[int]]) -> dict[int, list[str]]:
    """The prompts (by id, from the seeds of each) that a seed serves, where they are several.

    The same noise under several prompts gives images that have more in common than those of other
    noise: a second random effect, crossed with the prompts. Intervals by a bootstrap over prompts
    take prompts for independent and leave it out, so that they become too narrow.
    """
    users: dict[int, list[str]] = {}
    for name, own in seeds.items():
        for seed in own:
            users.setdefault(int(seed), []).append(name)
    return {seed: names for seed, names in sorted(users.items()) if len(names) > 1}


def suite_prompts(table: pd.DataFrame) -> list[Prompt]:
    """The prompts of a `suite_table`."""
    return [
        Prompt(
            prompt_id=str(row.prompt_id),
            prompt=str(row.prompt),
            score_text=str(row.score_text),
            negative=str(row.negative),
            title=str(row.title),
            seeds=tuple(int(seed) for seed in json.loads(str(row.seeds))),
            negative_from=_share(getattr(row, "negative_from", None)),
        )
        for row in table.itertuples(index=False)
    ]


def _share(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


class _Reader:
    """Reads one file, gathers all its problems, and raises them together."""

    def __init__(self, path: Path, limit: TextLimit, sampler: SamplerSettings | None) -> None:
        self.path = path
        self.sampler = sampler
        self.count_tokens, self.max_tokens = limit
        self.problems: list[tuple[int, str]] = []

    def read(self, text: str) -> list[Prompt]:
        prompts = self._prompts(self._parse(text))
        self._raise()
        return prompts

    def _raise(self) -> None:
        if self.problems:
            lines = [f"{self.path}:{line}: {what}" for line, what in sorted(self.problems)]
            raise PromptSuiteError("\n".join(lines))

    def _problem(self, node: yaml.Node | None, what: str) -> None:
        self.problems.append((node.start_mark.line + 1 if node is not None else 1, what))

    def _parse(self, text: str) -> yaml.Node | None:
        try:
            # Nodes instead of values: they know their lines.
            return yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark is not None else 1
            what = f"not valid YAML: {error.problem or error.context}"
            self.problems.append((line, f"{what}; mend the line or the one before it"))
        except yaml.YAMLError as error:
            what = " ".join(str(error).split())
            self.problems.append((1, f"not valid YAML: {what}; remove what is no text"))
        self._raise()
        raise AssertionError  # _raise has something to raise here

    def _mapping(
        self, node: yaml.Node, what: str, allowed: Sequence[str]
    ) -> dict[str, yaml.Node] | None:
        if not isinstance(node, yaml.MappingNode):
            self._problem(node, f"{what} must be `name: value` lines; write them like that")
            return None
        entries: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = str(key_node.value)
            if key in entries:
                self._problem(key_node, f"{what} has `{key}` twice; remove one")
            elif key not in allowed:
                names = ", ".join(allowed)
                self._problem(key_node, f"{what} has an unknown `{key}`; it may have {names}")
            else:
                entries[key] = value
        return entries

    def _prompts(self, root: yaml.Node | None) -> list[Prompt]:
        if root is None:
            self._problem(None, "the suite is empty; list its prompts under `prompts:`")
            return []
        top = self._mapping(root, "the suite", ("defaults", "prompts"))
        if top is None:
            return []
        defaults: dict[str, yaml.Node] = {}
        if "defaults" in top:
            defaults = self._mapping(top["defaults"], "`defaults`", _DEFAULTS) or {}
        listed = top.get("prompts")
        if not isinstance(listed, yaml.SequenceNode) or not listed.value:
            self._problem(listed or root, "`prompts` must be a list; add at least one prompt")
            return []
        prompts = []
        for node in listed.value:
            before = len(self.problems)
            entries = self._mapping(node, "a prompt", (*_TEXTS, "seeds", "negative_from"))
            if entries is None:
                continue
            entries = {**defaults, **entries}
            prompt = self._prompt(node, entries)
            if len(self.problems) == before and prompt is not None:
                prompts.append((entries, prompt))
        self._unique(prompts)
        return [prompt for _, prompt in prompts]

    def _prompt(self, node: yaml.Node, entries: dict[str, yaml.Node]) -> Prompt | None:
        missing = [name for name in _REQUIRED if name not in entries]
        if missing:
            self._problem(node, f"a prompt lacks {', '.join(missing)}; add what is missing")
            return None
        texts = {name: self._text(name, entries.get(name)) for name in _TEXTS}
        seeds = self._seeds(entries["seeds"])
        negative_from = self._negative_from(entries.get("negative_from"))
        if negative_from is not None and not texts["negative"]:
            self._problem(
                entries["negative_from"],
                "`negative_from` delays a negative prompt, and there is none; write one in "
                "`negative`",
            )
        if not _ID.fullmatch(texts["id"] or "-"):
            self._problem(
                entries["id"],
                f"the id {texts['id']!r} is no name; use 1 to 64 letters, digits, - and _, "
                "beginning with a letter or digit",
            )
        for name in ("prompt", "score_text"):
            if not texts[name]:
                self._problem(entries[name], f"`{name}` is empty; write what the poster shows")
        for name in ("prompt", "score_text", "negative"):
            length = self.count_tokens(texts[name])
            if length > self.max_tokens:
                self._problem(
                    entries[name],
                    f"`{name}` has {length} tokens and the models read {self.max_tokens}; "
                    "shorten it",
                )
        title = texts["title"]
        if title and any(f"{q}{title}{q}" in texts["score_text"] for q in "'\""):
            self._problem(
                entries["score_text"],
                f"`score_text` quotes the title {title!r}, which no score should reward; "
                "take it out",
            )
        return Prompt(
            prompt_id=texts["id"],
            prompt=texts["prompt"],
            score_text=texts["score_text"],
            negative=texts["negative"],
            title=title,
            seeds=seeds,
            negative_from=negative_from,
        )

    def _negative_from(self, node: yaml.Node | None) -> float | None:
        if node is None:
            return None
        value = _value(node)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < 1:
            self._problem(
                node,
                f"`negative_from` is {value!r}; write the share of the steps before the negative "
                "prompt acts, above 0 and below 1",
            )
            return None
        if self.sampler is not None and (why := too_late(float(value), self.sampler)):
            self._problem(node, why)
        return float(value)

    def _text(self, name: str, node: yaml.Node | None) -> str:
        if node is None:
            return ""
        if node.tag != "tag:yaml.org,2002:str":
            self._problem(node, f"`{name}` must be text, not {_value(node)!r}; put it in quotes")
            return "x"  # passes the checks that follow: one problem is enough
        return " ".join(node.value.split())

    def _seeds(self, node: yaml.Node) -> tuple[int, ...]:
        values = _value(node)
        if not isinstance(values, list) or not values:
            self._problem(node, "`seeds` must be a list of numbers; write for example [101, 102]")
            return ()
        for value in values:
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not 0 <= value <= MAX_SEED:
                self._problem(
                    node, f"the seed {value!r} is no whole number from 0 to {MAX_SEED}; change it"
                )
                return ()
        if len(set(values)) < len(values):
            self._problem(node, "`seeds` names a seed twice; every image needs its own")
        return tuple(values)

    def _unique(self, prompts: list[tuple[dict[str, yaml.Node], Prompt]]) -> None:
        for name in ("id", "prompt"):
            first: dict[str, int] = {}
            for entries, prompt in prompts:
                value = prompt.prompt_id if name == "id" else prompt.prompt
                line = entries[name].start_mark.line + 1
                if value in first:
                    self._problem(
                        entries[name],
                        f"the {name} {value!r} is that of line {first[value]} too; "
                        "every prompt needs its own",
                    )
                first.setdefault(value, line)


def _value(node: yaml.Node) -> Any:
    """What a node holds; its text where that cannot be (an impossible date, say)."""
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, TypeError):
        return str(node.value)
    finally:
        loader.dispose()
