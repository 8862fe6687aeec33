"""Does the demo's result come again? `python -m docs.tools.replication` asks, in about 25 minutes.

The settings of the starter profile were compared on the demo's own prompt suite, so its numbers
are somewhat favourable. Here the same chain answers a second suite as well, on which nothing was
decided, and both are asked of several trainings that differ in nothing but their seed. What the
gate says of such trainings, of which none is better than another but by chance, is kept too: by how
much they differ from prompt to prompt decides which margins a suite resolves.

What belongs here: how the second suite was drawn (`--suite` writes it), the runs, and the tables in
`docs/limits.md` and `docs/champion.md`. What does not: any statistics; the figures are those of
`paired_effects` and `gate_checks`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb

from posterpipe.core.prompts import load_suite
from posterpipe.core.statistics import student_quantile
from posterpipe.starter.posters import HOLDOUT, RAW
from posterpipe.starter.world import COLOURS, KINDS, TITLE_FIRST, TITLE_SECOND, partners

ROOT = Path(__file__).resolve().parents[2]
DEMO_SUITE = ROOT / "data" / "prompt_suites" / "animated_movies.yaml"
UNSEEN_SUITE = ROOT / "data" / "prompt_suites" / "unseen_combinations.yaml"
FIGURES = ROOT / "docs" / "figures" / "replication.json"
PAGE = ROOT / "docs" / "limits.md"
JUDGED = ROOT / "docs" / "figures" / "judged_by_the_gate.json"
JUDGED_PAGE = ROOT / "docs" / "champion.md"
MARKS = ("<!-- replication: begin -->", "<!-- replication: end -->")

TRAINING_SEEDS = (777, 1, 2)
"""The first is the demo's."""
PROMPTS_A_KIND = 4
SEEDS_A_PROMPT = 2
SUITE_SEED = 20261127

COMPARISON = "tuned without negative"
METRICS = {
    "CLIP-T crop": "CLIP-T",
    "CLIP-T specific": "own text less others",
    "CLIP-I holdout": "CLIP-I to the holdout",
}
"""What is asked, as `paired_effects` names it: the heading of its column."""

COMPARED = {
    "CLIP-T": "CLIP-T less the champion's; spread",
    "fidelity": "fidelity less the champion's; spread",
    "diversity": "share of the champion's diversity; spread of its log",
}
"""The checks of the gate that compare two models: the heading of their column."""

HEADER = """\
# Prompts on which nothing was decided, for asking whether the demo's result holds beyond its own
# suite: kinds and colours in combinations that no starter poster and no prompt of the demo has,
# drawn by chance before any image of them was seen. Written by `python -m docs.tools.replication
# --suite`; what came of it is told in docs/limits.md.

defaults:
  negative: busy, cluttered, many small objects

prompts:
"""

WORDINGS = (
    (
        "a minimalist film poster of {a_thing} titled '{title}', only one {kind} in the centre, "
        "{background} background",
        "a minimalist film poster of {a_thing}, only one {kind} in the centre, "
        "{background} background",
    ),
    (
        "minimalist movie poster '{title}', only one {thing} is prominently displayed in the "
        "centre, {background} background",
        "a minimalist movie poster, only one {thing} is prominently displayed in the centre, "
        "{background} background",
    ),
    (
        "minimalist animated movie poster of {a_thing} on {a_background} background, a single "
        "{kind} in the centre, with the title '{title}'",
        "a minimalist animated movie poster of {a_thing} on {a_background} background, a single "
        "{kind} in the centre",
    ),
)
"""Those of the demo's suite: the prompt, and the text it is scored with."""


def suite_text() -> str:
    """The second suite, always the same: PROMPTS_A_KIND prompts a kind, as YAML."""
    demo = load_suite(DEMO_SUITE)
    asked = {prompt.prompt_id for prompt in demo}
    taken = {(kind, colour, background) for _, kind, colour, background, *_ in (*RAW, *HOLDOUT)}
    titles = {title for title, *_ in (*RAW, *HOLDOUT)} | {prompt.title for prompt in demo}
    chance = random.Random(SUITE_SEED)
    wordings = itertools.cycle(WORDINGS)
    parts = [HEADER]
    for number, kind in enumerate(KINDS):
        free = [
            (colour, background)
            for colour in COLOURS
            for background in partners(colour)
            if (kind, colour, background) not in taken
            and f"{colour}-{kind}-on-{background}" not in asked
        ]
        invented = [
            title
            for title in map(" ".join, itertools.product(TITLE_FIRST, TITLE_SECOND[kind]))
            if title not in titles
        ]
        chosen = zip(
            chance.sample(free, PROMPTS_A_KIND),
            chance.sample(invented, PROMPTS_A_KIND),
            strict=True,
        )
        for place, ((colour, background), title) in enumerate(chosen):
            first = 10_000 + 1_000 * number + 100 * place
            parts.append(_prompt(kind, colour, background, title, next(wordings), first))
    return "\n".join(parts)


def _prompt(
    kind: str, colour: str, background: str, title: str, wording: tuple[str, str], first_seed: int
) -> str:
    name = KINDS[kind][1] if kind == "balloon" else kind
    words = {
        "kind": name,
        "thing": f"{colour} {name}",
        "a_thing": _with_article(f"{colour} {name}"),
        "background": background,
        "a_background": _with_article(background),
        "title": title,
    }
    prompt, score_text = (
        textwrap.fill(text.format(**words), 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
        for text in wording
    )
    seeds = ", ".join(str(first_seed + n) for n in range(1, SEEDS_A_PROMPT + 1))
    return (
        f"  - id: {colour}-{kind}-on-{background}\n"
        f"    prompt: >-\n{prompt}\n"
        f"    score_text: >-\n{score_text}\n"
        f"    title: {title}\n"
        f"    seeds: [{seeds}]\n"
    )


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def measure() -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """For each training and suite a record a metric, its paired effect, interval and finding; and
    of each training but the first what the gate says of it on the demo's suite, a record a check.

    One store serves all: nothing that is the same for two of them is computed twice.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        for seed, suite in itertools.product(TRAINING_SEEDS, (DEMO_SUITE, UNSEEN_SUITE)):
            environment = os.environ | {
                "POSTERPIPE_PROFILE": "starter",
                "POSTERPIPE_STORE": str(store),
                "DAGSTER_HOME": str(Path(folder) / "dagster"),
                "POSTERPIPE_PROMPT_SUITE": str(suite),
                "POSTERPIPE_TRAINING__SEED": str(seed),
            }
            print(f"== {suite.stem}, training seed {seed}", flush=True)
            command = [sys.executable, "-m", "posterpipe.cli", "demo"]
            subprocess.run(command, env=environment, cwd=ROOT, check=True)
            database = store / "public" / "scores.duckdb"
            retrained = suite == DEMO_SUITE and seed != TRAINING_SEEDS[0]
            yield (
                _effects(database, suite.stem, seed),
                _judged(database, seed) if retrained else [],
            )


def _effects(database: Path, suite: str, seed: int) -> list[dict[str, Any]]:
    with duckdb.connect(str(database), read_only=True) as connection:
        rows = connection.execute(
            "select metric, prompts, pairs, mean_difference, low_95, high_95, finding "
            "from paired_effects where comparison = ? and metric in ?",
            [COMPARISON, list(METRICS)],
        )
        names = [column[0] for column in rows.description or ()]
        return [
            {"suite": suite, "training_seed": seed, **dict(zip(names, row, strict=True))}
            for row in rows.fetchall()
        ]


def _judged(database: Path, seed: int) -> list[dict[str, Any]]:
    """The checks of the latest decision that compare two models; `spread` is the standard deviation
    over the prompts of what they compare."""
    with duckdb.connect(str(database), read_only=True) as connection:
        (latest,) = connection.execute(
            "select decision_id, checkpoint_id, champion_before, decision "
            "from gate_decisions where is_latest"
        ).fetchall()
        checks = connection.execute(
            "select check_name, outcome, value, low_95, high_95, limit_value "
            "from gate_checks where decision_id = ? and check_name in ? order by place",
            [latest[0], list(COMPARED)],
        ).fetchall()
    prompts = len(load_suite(DEMO_SUITE))
    found = []
    for name, outcome, value, low, high, limit in checks:
        ends = (math.log(low), math.log(high)) if name == "diversity" else (low, high)
        found.append(
            {
                "training_seed": seed, "checkpoint": latest[1], "champion": latest[2],
                "decision": latest[3], "check": name, "outcome": outcome,
                "value": round(value, 6), "low_95": round(low, 6), "high_95": round(high, 6),
                "limit": limit, "prompts": prompts,
                "spread": round(_spread(ends, prompts), 3),
            }
        )  # fmt: skip
    return found


def _spread(ends: tuple[float, float], prompts: int) -> float:
    """The standard deviation over prompts of what has a mean with that interval at 95 %."""
    return (ends[1] - ends[0]) / 2 / student_quantile(0.975, prompts - 1) * math.sqrt(prompts)


def judged_table(records: list[dict[str, Any]]) -> str:
    """A row a training; each cell is what the gate compares, its 95 % interval and the spread."""
    lines = [
        f"| training seed | {' | '.join(COMPARED.values())} | decision |",
        f"|---:|{'---:|' * len(COMPARED)}---|",
    ]
    cells = {(record["training_seed"], record["check"]): record for record in records}
    for seed in dict.fromkeys(record["training_seed"] for record in records):
        found = [cells[seed, name] for name in COMPARED]
        told = " | ".join(
            f"{r['value']:{sign}.3f} ({r['low_95']:{sign}.3f} to {r['high_95']:{sign}.3f}); "
            f"{r['spread']:.3f}"
            for r in found
            for sign in ("" if r["check"] == "diversity" else "+",)
        )
        lines.append(f"| {seed} | {told} | {found[0]['decision']} |")
    return "\n".join(lines)


def spreads() -> dict[str, float]:
    """By the check's name: the standard deviation over prompts between two trainings that differ in
    their seed alone, the mean of the filed ones."""
    records = json.loads(JUDGED.read_text("utf-8"))
    return {
        name: statistics.mean(r["spread"] for r in records if r["check"] == name)
        for name in COMPARED
    }


def table(records: list[dict[str, Any]]) -> str:
    """A row a suite and training; each cell is the difference and its 95 % interval."""
    lines = [
        f"| prompts | training seed | {' | '.join(METRICS.values())} |",
        f"|---|---:|{'---:|' * len(METRICS)}",
    ]
    cells = {(r["suite"], r["training_seed"], r["metric"]): r for r in records}
    for suite, seed in dict.fromkeys((r["suite"], r["training_seed"]) for r in records):
        found = [cells[suite, seed, metric] for metric in METRICS]
        told = " | ".join(
            f"{r['mean_difference']:+.3f} ({r['low_95']:+.3f} to {r['high_95']:+.3f})"
            for r in found
        )
        lines.append(f"| `{suite}`, {found[0]['prompts']} | {seed} | {told} |")
    return "\n".join(lines)


def update_pages() -> None:
    """Writes the tables of the filed figures between their marks in the pages."""
    _fill(PAGE, table(json.loads(FIGURES.read_text("utf-8"))))
    _fill(JUDGED_PAGE, judged_table(json.loads(JUDGED.read_text("utf-8"))))


def _fill(page: Path, text: str) -> None:
    before, begin, rest = page.read_text("utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", action="store_true", help="only write the second suite")
    if parser.parse_args().suite:
        UNSEEN_SUITE.write_text(suite_text(), "utf-8")
        print(f"written to {UNSEEN_SUITE.relative_to(ROOT)}")
        return
    FIGURES.parent.mkdir(exist_ok=True)
    records, judged = list[dict[str, Any]](), list[dict[str, Any]]()
    for found, said in measure():  # what is known is kept, whatever happens to the runs that follow
        records += found
        judged += said
        for file, known in ((FIGURES, records), (JUDGED, judged)):
            file.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
        update_pages()
        written = [str(path.relative_to(ROOT)) for path in (FIGURES, PAGE, JUDGED, JUDGED_PAGE)]
        print(f"written to {', '.join(written)}", flush=True)


if __name__ == "__main__":
    main()
