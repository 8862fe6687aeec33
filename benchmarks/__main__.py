"""`python -m benchmarks [--only NAME] [--file]`: runs benchmarks and prints a table.

Nothing else is written, unless `--file` asks for it: then the figures take the place of this
machine's in `benchmarks/results`, in `docs/benchmarks.md` and in the README.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.rows import (
    RESULTS,
    Row,
    figure,
    has_requirement,
    is_met,
    machines,
    markdown,
    merge,
)
from benchmarks.training_runs import PEER_SCRIPT, peer_script

BENCHMARKS = (
    "load_code_location",
    "demo",
    "prepare_images",
    "caption",
    "add_one_poster",
    "train_unet",
    "train_unet_text_encoder",
    "train_sd21_gpu",
    "sample_suite",
    "sample_sd21_gpu",
    "clip_scoring",
    "score_into_5m",
    "leaderboard_5m",
)
REHEARSED = ("train_sd21_gpu", "sample_sd21_gpu", "clip_scoring")
"""Those with lines that only a GPU runs, and that can be tried without one."""
IN_PARTS = ("train_sd21_gpu", "sample_sd21_gpu")
"""Those that give their rows one by one, each of which is filed at once."""
AGAINST_THE_SCRIPT = ("train_unet", "train_unet_text_encoder")
"""Those that are measured against diffusers' script, which is no part of this project."""

README = Path(__file__).parents[1] / "README.md"
"""Has the rows of which something is required, and those of `PUBLISHED`."""
PUBLISHED = "train_sd21_gpu"
"""All of whose figures are in the README: nobody else has published any for this model."""
PAGE = README.parent / "docs" / "benchmarks.md"
"""Has all rows."""
MARKS = ("<!-- benchmarks: begin -->", "<!-- benchmarks: end -->")


def show(rows: list[Row]) -> None:
    table = Table("benchmark", "ours", "unit", "peer", "ratio", "required")
    for row in rows:
        required = row.required
        if is_met(row) is False:  # a run that failed requires nothing by itself
            required = f"[red]{required}: missed[/]" if required else "[red]missed[/]"
        peer = "" if row.peer is None else f"{row.peer:g}  {row.peer_name}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        ours = "" if row.ours is None else f"{row.ours:g}"
        table.add_row(row.name, ours, row.unit, peer, ratio, required)
    Console().print(table)


def update_pages() -> None:
    """Writes every machine's results between the marks of the pages."""
    results = {
        path.stem: [Row(**record) for record in json.loads(path.read_text(encoding="utf-8"))]
        for path in sorted(RESULTS.glob("*.json"))
    }
    _fill(PAGE, results)
    _fill(README, {name: [*filter(_in_readme, rows)] for name, rows in results.items()})


def _in_readme(row: Row) -> bool:
    return has_requirement(row) or row.name.startswith(PUBLISHED)


def _fill(page: Path, results: dict[str, list[Row]]) -> None:
    about = machines()
    tables = [
        f"`{name}`: {about[name]}\n\n{markdown(rows)}\n" for name, rows in results.items() if rows
    ]
    between = f"{MARKS[0]}\n{chr(10).join(tables)}{MARKS[1]}"
    pattern = f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}"
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(pattern, lambda _: between, text, flags=re.S), encoding="utf-8")


def file(rows: list[Row], *, in_parts: bool = False) -> None:
    """Writes the rows into this machine's results and into the pages, and says so."""
    path = merge(rows, in_parts=in_parts)
    update_pages()
    here = Path.cwd()
    written = [name.relative_to(here) if name.is_relative_to(here) else name
               for name in (path, PAGE, README)]  # fmt: skip
    print(f"written to {', '.join(map(str, written))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=BENCHMARKS, help="one benchmark; all when left out")
    parser.add_argument(
        "--file",
        action="store_true",
        help="write the figures into benchmarks/results and the pages, in place of this machine's",
    )
    parser.add_argument(
        "--peer-script",
        type=Path,
        help="diffusers' train_dreambooth.py, against which training is measured",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run a GPU's benchmark on a tiny model, to see that it works",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="exit with 1 where a figure misses what is required of it; a busy machine may do that",
    )
    parser.add_argument(
        "--part",
        action="append",
        help="with --only train_sd21_gpu: only runs with this in their names, such as unet.batch1 "
        "or with_compile; may be given several times",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        help="with --only train_sd21_gpu or sample_sd21_gpu: folder in which the model is left for "
        "the next command",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        choices=range(1, 10),
        metavar="N",
        help="with --only train_sd21_gpu: how often ours and the peer are measured in turn",
    )
    arguments = parser.parse_args()
    if arguments.peer_script:
        os.environ[PEER_SCRIPT] = str(arguments.peer_script.resolve(strict=True))
    only = arguments.only
    options = {name: getattr(arguments, name) for name in ("part", "keep", "rounds")}
    options = {name: value for name, value in options.items() if value is not None}
    if options and (only not in IN_PARTS or (only != IN_PARTS[0] and options.keys() != {"keep"})):
        parser.error(
            f"--part and --rounds need --only {IN_PARTS[0]}, and --keep needs --only with one of "
            f"{', '.join(IN_PARTS)}"
        )
    names = (only,) if only else BENCHMARKS
    needing = [name for name in names if name in AGAINST_THE_SCRIPT]
    if arguments.file and needing and not peer_script():
        parser.error(
            f"--file needs --peer-script for {' and '.join(needing)}: without the other side there "
            "is nothing to file; or choose another one with --only"
        )
    if arguments.rehearse and arguments.file:
        parser.error("--rehearse gives figures that mean nothing: leave out --file")
    if arguments.rehearse:
        if only not in REHEARSED:
            parser.error(f"--rehearse needs --only with one of {', '.join(REHEARSED)}")
        show(list(importlib.import_module(f"benchmarks.{only}").run(rehearse=True, **options)))
        return
    rows: list[Row] = []
    for name in names:
        measured = importlib.import_module(f"benchmarks.{name}").run(**options)
        if name in IN_PARTS:
            for row in measured:
                print(f"{row.name}: {figure(row.ours, row.unit)} {row.required}", flush=True)
                rows.append(row)
                if arguments.file:
                    file([row], in_parts=True)
        else:
            rows += measured
            if arguments.file:
                file(measured)
    show(rows)
    if not arguments.file:
        print("nothing is filed: --file writes these figures into benchmarks/results and the pages")
    missed = [row.name for row in rows if is_met(row) is False]
    if missed:
        print(f"missed what is required: {', '.join(missed)}")
        if arguments.strict:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
