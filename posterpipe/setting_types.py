"""What groups of settings are made of.

What belongs here: their base class, and kinds of values that several have. What does not: settings
(`settings`, `training_settings`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator

Precision = Literal["fp32", "bf16", "fp16"]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


def no_bool_for_a_number(cls: type[BaseModel], value: Any, field: ValidationInfo) -> Any:
    """Raises ValueError for true or false where pydantic would take it for 1 or 0."""
    kind = cls.model_fields[str(field.field_name)].annotation
    if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
        raise ValueError("Input should not be true or false")
    return value


def none_by_its_word(cls: type[BaseModel], value: Any, field: ValidationInfo) -> Any:
    """None for the word `none` where a setting may be that and is no text: TOML and variables have
    nothing else for it."""
    kinds = get_args(cls.model_fields[str(field.field_name)].annotation)
    may_be_none = type(None) in kinds and not {str, SecretStr}.intersection(kinds)
    return None if value == "none" and may_be_none else value


class Group(BaseModel):
    """A group of settings: unknown names are refused, and true and false where a number is due;
    `none` is a value of those that may be none; values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    _no_bool_for_a_number = field_validator("*", mode="before")(no_bool_for_a_number)
    _none_by_its_word = field_validator("*", mode="before")(none_by_its_word)
