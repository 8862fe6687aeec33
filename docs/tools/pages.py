"""Fills the blocks of the guides that follow from the code: `python -m docs.tools.pages`.

What belongs here: the graph, the tables of assets and jobs, the list of settings. What does not:
blocks that others write: the training settings (`docs.tools.training_settings`), the figures of the
starter models (`posterpipe.starter.cards`) and of the benchmarks (`benchmarks`). What `make demo`
printed is copied into the README by hand.

A block stands between `<!-- name: begin -->` and `<!-- name: end -->`. With `--check` nothing is
written; the exit code says whether the pages are as the code is.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from posterpipe.setting_types import Group
from posterpipe.settings import ModelRef, Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
GROUPS = ("ingest", "dataset", "training", "generation", "scoring", "reports")
BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"), ("multiple_of", "multiple of"))


def graph() -> str:
    """The asset graph as Mermaid draws it, a box a group."""
    specs = _specs()
    lines = ["```mermaid", "flowchart LR"]
    for group in GROUPS:
        lines.append(f"  subgraph {group}")
        lines += [f"    {name}" for name in sorted(specs) if specs[name].group_name == group]
        lines.append("  end")
    for name in sorted(specs):
        inputs = sorted(dep.asset_key.to_user_string() for dep in specs[name].deps)
        lines += [f"  {source} --> {name}" for source in inputs]
    return "\n".join([*lines, "```"])


def assets() -> str:
    """A row an asset: its group, and the first sentence of its description."""
    specs = _specs()
    rows = ["| asset | group | what it is |", "|---|---|---|"]
    for group in GROUPS:
        for name in sorted(specs):
            if specs[name].group_name == group:
                said = _first_sentence(specs[name].description or "")
                rows.append(f"| `{name}` | {group} | {said} |")
    return "\n".join(rows)


def jobs() -> str:
    """What runs, and what starts runs: name and description."""
    from posterpipe.definitions import defs
    from posterpipe.defs.automation import JOBS

    rows = ["| | | |", "|---|---|---|"]
    for job in JOBS:
        said = "All of it, up to date." if job.name == "everything" else job.description or ""
        rows.append(f"| job | `{job.name}` | {_cell(said)} |")
    repository = defs.get_repository_def()
    kinds: list[tuple[str, list[Any]]] = [
        ("sensor", list(repository.sensor_defs)),
        ("schedule", list(repository.schedule_defs)),
    ]
    for kind, found in kinds:
        for each in sorted(found, key=lambda each: str(each.name)):
            rows.append(f"| {kind} | `{each.name}` | {_cell(each.description or '')} |")
    return "\n".join(rows)


def settings() -> str:
    """Every setting with its default, bounds and meaning, a table a group."""
    parts = ["### Top level", "", *_settings_table(Settings, "")]
    for name, kind in _groups():
        said = _first_sentence(kind.__doc__ or "")
        if name == "training":
            see = "All of them, with unit and source: [training](training.md#every-setting)."
            parts += ["", f"### {name}", "", f"{said} {see}"]
            continue
        parts += ["", f"### {name}", "", said, "", *_settings_table(kind, f"{name}.")]
    said = f"{_first_sentence(ModelRef.__doc__ or '')} {_model_settings()}"
    parts += ["", "### Models", "", said]
    # A model's id has no default in any group.
    return "\n".join([*parts, "", *_settings_table(ModelRef, "", required="none, it must be set")])


def _model_settings() -> str:
    """Which settings name a model, and which of them several."""
    named: list[str] = []
    lists: list[str] = []
    groups: dict[str, type[BaseModel]] = {
        "": Settings,
        **{f"{name}.": kind for name, kind in _groups()},
    }
    for prefix, group in groups.items():
        for name, field in group.model_fields.items():
            kind = field.annotation
            if kind is ModelRef or ModelRef in get_args(kind):
                (lists if get_origin(kind) is tuple else named).append(f"`{prefix}{name}`")
    return (
        f"{', '.join(named)} are written so, and each item of the list {', '.join(lists)}: see "
        "[naming a model](models.md#naming-and-pinning-a-model)."
    )


def _groups() -> Iterator[tuple[str, type[Group]]]:
    for name, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Group) and kind is not ModelRef:
            yield name, kind


def _settings_table(
    group: type[BaseModel], prefix: str, required: str = "of the profile"
) -> list[str]:
    rows = ["| setting | default | |", "|---|---|---|"]
    for name, field in group.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Group) and kind is not ModelRef:
            continue
        bounds = f" ({', '.join(_bounds(field))})" if _bounds(field) else ""
        default = required if field.is_required() else _default(field)
        rows.append(f"| `{prefix}{name}` | {default} | {_cell(field.description or '')}{bounds} |")
    return rows


def _bounds(field: FieldInfo) -> list[str]:
    kinds = [field.annotation, *get_args(field.annotation)]
    choices = [kind for kind in kinds if get_origin(kind) is Literal]
    said = [" or ".join(f"`{value}`" for value in get_args(choice)) for choice in choices]
    for limit in field.metadata:
        for bound, sign in BOUNDS:
            if (value := getattr(limit, bound, None)) is not None:
                said.append(f"{sign} {value:g}" if isinstance(value, int | float) else "")
    return said


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "the project's folder"
    value = field.default
    if value is None or value == () or value == "" or isinstance(value, SecretStr):
        return "none"
    if isinstance(value, Path):
        return f"`{value.as_posix()}`"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(f"`{each}`" for each in value)
    return f"`{value:,}`" if isinstance(value, int) else f"`{value}`"


def _specs() -> dict[str, Any]:
    from posterpipe.definitions import defs

    return {spec.key.to_user_string(): spec for spec in defs.resolve_all_asset_specs()}


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return _cell(re.split(r"(?<=[.:])\s(?=[A-Z])", paragraph)[0])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


BLOCKS: dict[str, Callable[[], str]] = {
    "graph": graph,
    "assets": assets,
    "jobs": jobs,
    "settings": settings,
}


def filled() -> Iterator[tuple[Path, str, str]]:
    """Each page that has blocks: where it is, its text, and its text as it should be."""
    # What the pages say is about the code, not about this machine's settings.
    for name in [name for name in os.environ if name.startswith("POSTERPIPE_")]:
        del os.environ[name]
    made: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text("utf-8")
        new = text
        for name, block in BLOCKS.items():
            begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
            before, begun, rest = new.partition(begin)
            _, ended, after = rest.partition(end)
            if begun and ended:
                if name not in made:
                    made[name] = block()
                new = f"{before}{begin}{made[name]}\n{end}{after}"
        yield page, text, new


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    behind = [(page, new) for page, text, new in filled() if new != text]
    for page, new in behind:
        name = page.relative_to(ROOT)
        if check:
            print(f"{name} is not as the code is: run python -m docs.tools.pages")
        else:
            page.write_text(new, "utf-8")
            print(f"{name} written")
    return int(check and bool(behind))


if __name__ == "__main__":
    sys.exit(main())
