"""The settings in words, for Dagster's launchpad and the tables of the guide.

What belongs here: turning a setting's field into text. What does not: the settings (`settings`),
the launchpad (`defs.training`) and the tables (`docs.tools.training_settings`).
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

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


def _extra(field: FieldInfo, name: str) -> str:
    extra = field.json_schema_extra
    return str(extra[name]) if isinstance(extra, dict) and name in extra else ""
