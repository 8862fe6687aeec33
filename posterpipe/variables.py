"""What is wrong with environment variables, in words.

What belongs here: which variables have the prefix of posterpipe and set nothing, and how the value
of one is written. What does not: the settings themselves, whose class is given (`settings`).
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

PREFIX = "POSTERPIPE_"

OTHER_VARIABLES = (
    "POSTERPIPE_WAREHOUSE",  # dbt_like_reports/profiles.yml
    "POSTERPIPE_PEER_SCRIPT",  # benchmarks
    "POSTERPIPE_REAL_SIZE_MODELS",  # posterpipe_tests/test_real_size.py
    "POSTERPIPE_TEST_BROWSER",  # posterpipe_tests/browser
)
"""Variables with this prefix that are no settings, and who reads them."""

# Kubernetes and Docker give such variables to all containers beside a service called posterpipe.
_OF_A_SERVICE = re.compile(r"POSTERPIPE_(SERVICE|PORT)(_.*)?")


def value_of(variable: str) -> str:
    """The value of a variable, whose name counts in small letters as well; "" where it is not set.

    As pydantic has it for the settings themselves: of several, the last one that is not empty.
    """
    values = [value for name, value in os.environ.items() if name.upper() == variable and value]
    return values[-1] if values else ""


def is_told(place: tuple[int | str, ...], unknown: Iterable[str]) -> bool:
    """Whether the value at pydantic's `place` came from a variable that is reported as unknown."""
    variable = _variable(place)
    return any(name == variable or name.startswith(f"{variable}__") for name in unknown)


def unknown_variables(settings: type[BaseModel]) -> dict[str, str]:
    """What is wrong with each variable that no setting has, by its name in capitals."""
    known = (*_variables(settings), *OTHER_VARIABLES)
    found = {}
    for name in sorted(os.environ):
        key = name.upper()
        if not key.startswith(PREFIX) or key in known or _OF_A_SERVICE.fullmatch(key):
            continue
        near = _nearest(key, known)
        remedy = f"did you mean {near}?" if near else "unset it; docs/settings.md lists all"
        found[key] = f"{name}: there is no such setting; {remedy}"
    return found


def _nearest(name: str, known: Sequence[str]) -> str:
    """The known variable that was probably meant; "" for none."""
    bare = {other.removeprefix(PREFIX): other for other in known}
    for near in difflib.get_close_matches(name.removeprefix(PREFIX), bare):
        # A group that is the same does not make a setting in it alike.
        ends = (text.rsplit("__", 1)[-1] for text in (name.removeprefix(PREFIX), near))
        if difflib.get_close_matches(next(ends), [next(ends)]):
            return bare[near]
    return ""


@cache
def _variables(settings: type[BaseModel]) -> Mapping[str, Any]:
    """The type of each setting and group by the variable that sets it."""

    def walk(group: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, field in group.model_fields.items():
            variable = f"{prefix}{name.upper()}"
            yield variable, field.annotation
            for part in (field.annotation, *get_args(field.annotation)):
                if _is_group(part):
                    yield from walk(part, f"{variable}__")
                elif get_origin(field.annotation) is tuple:
                    break  # its items have no variables of their own

    return dict(walk(settings, PREFIX))


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _variable(place: tuple[int | str, ...]) -> str:
    """The variable for what pydantic calls by its place; of a list as a whole."""
    names = itertools.takewhile(lambda part: isinstance(part, str), place)
    return PREFIX + "__".join(str(part).upper() for part in names)


def problem(settings: type[BaseModel], place: tuple[int | str, ...], message: str) -> str:
    """What is wrong with a value, and the form of the variable that gave it, where it has one.

    `place` as pydantic gives it; nothing where several settings do not go together.
    """
    told = ": ".join(filter(None, [".".join(str(part) for part in place), in_our_words(message)]))
    key = _variable(place)
    given = any(name.upper() == key and value for name, value in os.environ.items())
    kinds = _variables(settings)
    return f"{told}: {_form(key, kinds[key])}" if given and _example(kinds.get(key)) else told


def in_our_words(message: str) -> str:
    """A message of pydantic, without what it puts before that of a validator."""
    return message.removeprefix("Value error, ")


def malformed_variables(settings: type[BaseModel]) -> list[str]:
    """How each variable is written that has to be JSON and is not, in the order of their names."""
    kinds = _variables(settings)
    found = []
    for name, value in os.environ.items():
        if value and _example(kinds.get(name.upper())):
            try:
                json.loads(value)
            except ValueError:
                found.append(name.upper())
    return [_form(name, kinds[name]) for name in sorted(found)]


def ragged_paths(settings: type[BaseModel]) -> list[str]:
    """What is wrong with each path in a variable that has blanks or quotes around it: env files
    keep them, and a folder of that name would be made."""
    found = []
    for name, kind in sorted(_variables(settings).items()):
        value = value_of(name)
        bare = re.sub(r"""^(["'])(.*)\1$""", r"\2", value.strip()).strip()
        if Path in (kind, *get_args(kind)) and bare != value:
            found.append(f"{name} is {value!r}: blanks or quotes around a path; write {bare}")
    return found


def _form(variable: str, kind: Any) -> str:
    """How a variable is written whose setting is a list or a group."""
    example = json.dumps(_example(kind))
    one = next((part for part in (kind, *get_args(kind)) if _is_group(part)), None)
    alone = ""
    if one and get_origin(kind) is not tuple:
        alone = f", or set {variable}__{next(iter(one.model_fields)).upper()} and the like alone"
    return f"{variable} has to be JSON, such as {variable}='{example}'{alone}"


def _example(kind: Any) -> Any:
    """A value of a list or group of settings; None for anything simpler."""
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return [_example(item)] if _is_group(item) else ["one", "two"]
    if _is_group(kind):
        name, field = next(iter(kind.model_fields.items()))
        simple = isinstance(field.default, str | int | float)
        value = field.default if simple else _example(field.annotation) or "owner/name"
        return {name: value}
    return next((_example(part) for part in get_args(kind) if _is_group(part)), None)
