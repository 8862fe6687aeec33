"""The tables of the training settings in docs/training.md.

What belongs here: the tables, and putting them between their two marks in the guide. What does not:
a setting's field in words (`posterpipe.setting_words`).

`python -m docs.tools.training_settings` writes them; a test fails where they are no longer those of
the settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from posterpipe.setting_words import bounds_of, default_of, source_of, unit_of, values_of
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


def main() -> None:
    path = default_root() / GUIDE
    path.write_text(guide_with_tables(path.read_text("utf-8")), "utf-8")
    print(path)


if __name__ == "__main__":
    main()
