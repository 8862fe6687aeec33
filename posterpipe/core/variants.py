"""The variants of the thesis: what each prompt and seed is drawn with.

What belongs here: their names, and what people read in their place. What does not: how they are
drawn (`generations`), what is asked of them (`statistics`), and what the thesis calls them
(`thesis`).

They differ in the model (base or tuned) and in the negative prompt. dbt has them as well, in the
variable `variants` of `dbt_like_reports/dbt_project.yml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

VARIANTS = ("sd", "sd_negative", "dreambooth", "dreambooth_negative")
"""The base model and the tuned one, each without and with the suite's negative prompts."""

BASE_VARIANTS, TUNED_VARIANTS = VARIANTS[:2], VARIANTS[2:]

DELAYED_VARIANTS = ("sd_negative_delayed", "dreambooth_negative_delayed")
"""The same with the negative prompt delayed, for prompts of the suite that hold `negative_from`."""

OF_BASE, OF_TUNED = (*BASE_VARIANTS, DELAYED_VARIANTS[0]), (*TUNED_VARIANTS, DELAYED_VARIANTS[1])
"""All that either model draws."""

LABELS: Mapping[str, str] = {
    "sd": "Base",
    "sd_negative": "Base + negative",
    "sd_negative_delayed": "Base + late negative",
    "dreambooth": "Fine-tuned",
    "dreambooth_negative": "Fine-tuned + negative",
    "dreambooth_negative_delayed": "Fine-tuned + late negative",
}
"""What people read, in the order in which variants stand side by side."""


def is_tuned(variants: pd.Series) -> pd.Series:
    """Of a column of variants, which are of a tuned model."""
    return variants.str.startswith("dreambooth")
