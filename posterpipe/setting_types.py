"""What groups of settings are made of.

What belongs here: their base class, and kinds of values that several have. What does not: settings
(`settings`, `training_settings`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["fp32", "bf16", "fp16"]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Group(BaseModel):
    """A group of settings: unknown names are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)
