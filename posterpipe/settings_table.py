"""The training settings in words: for Dagster's launchpad, and as the tables of docs/training.md.

What belongs here: turning a setting's field into text. What does not: the settings (`settings`),
the launchpad (`defs.training`).

`python -m posterpipe.settings_table` writes the tables into the guide, between its two marks; a
test fails where they are no longer those of the settings.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from posterpipe.settings import default_root
from posterpipe.training_settings import TrainingSettings

GUIDE = Path("docs/training.md")
MARKS = ("<!-- training settings: begin -->", "<!-- training settings: end -->")

_HEADINGS = {
    "seed": "How long, how fast",
    "method": "What is trained",
    "prior_preservation": "On what",
    "snr_gamma": "The loss",
    "optimizer": "Optimizer and precision",
    "holdout_every_steps": "Watching",
}
"""By the first setting below each."""

_BOUNDS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


def described(field: FieldInfo) -> str:
    """Meaning, unit, bounds, default and its source in one paragraph."""
    unit = f" Unit: {unit_of(field)}." if unit_of(field) else ""
    bounds = f" Must be {bounds_of(field)}." if bounds_of(field) else ""
    return (
        f"{field.description}.{unit}{bounds} Default: {default_of(field)} ({source_of(field)}), "
        "unless the profile says otherwise."
    )


def unit_of(field: FieldInfo) -> str:
    """What a number counts; "" for none."""
    return _extra(field, "unit")


def source_of(field: FieldInfo) -> str:
    """Where the default comes from."""
    return _extra(field, "source")


def default_of(field: FieldInfo) -> str:
    """The default as one would write it in TOML; `none` where there is none."""
    if field.default in (None, ()):
        return "none"
    return json.dumps(field.default)


def bounds_of(field: FieldInfo) -> str:
    """The bounds of a number in words, "" for none."""
    return ", ".join(
        f"{words} {_number(getattr(limit, bound))}"
        for limit in (*field.metadata, *_limits(field.annotation))
        for bound, words in _BOUNDS
        if getattr(limit, bound, None) is not None
    )


def _number(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def _limits(annotation: Any) -> Iterator[Any]:
    """Those of a number that may be none lie inside its type."""
    if get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            if get_origin(part) is Annotated:
                for extra in get_args(part)[1:]:
                    yield from getattr(extra, "metadata", [extra])


def values_of(annotation: Any) -> str:
    """What may be written, in words: the choices, or the kind of value."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values_of(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(values_of(a) for a in arguments if a is not type(None)) + " or none"
    if origin is tuple:
        return "list"
    return {bool: "true, false", int: "whole number", float: "number", str: "text"}[annotation]


def tables() -> str:
    """All training settings as Markdown, a table a group."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    for name, field in TrainingSettings.model_fields.items():
        if name in _HEADINGS:
            yield f"\n### {_HEADINGS[name]}\n"
            yield "| setting | default | values | what it does | default from |"
            yield "|---|---|---|---|---|"
        values = ", ".join(filter(None, (values_of(field.annotation), unit_of(field))))
        bounds = f"; {bounds_of(field)}" if bounds_of(field) else ""
        cells = (
            f"`{name}`",
            f"`{default_of(field)}`",
            values + bounds,
            str(field.description),
            source_of(field),
        )
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def guide_with_tables(guide: str) -> str:
    """The guide's text with the tables as they are now."""
    between = f"{MARKS[0]}\n{tables()}\n\n{MARKS[1]}"
    pattern = f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}"
    return re.sub(pattern, lambda _: between, guide, flags=re.S)


def _extra(field: FieldInfo, name: str) -> str:
    extra = field.json_schema_extra
    return str(extra[name]) if isinstance(extra, dict) and name in extra else ""


def main() -> None:
    path = default_root() / GUIDE
    path.write_text(guide_with_tables(path.read_text("utf-8")), "utf-8")
    print(path)


if __name__ == "__main__":
    main()
