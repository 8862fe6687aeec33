"""What the gate said of the checkpoint that the report shows, and which one is served.

What belongs here: reading that from the marts, for the pages that speak of this checkpoint. What
does not: the whole log (`gate_page`), and the rules (`core.champion`).
"""

from __future__ import annotations

from dataclasses import dataclass

from posterpipe.core.score_report.data import BASELINE, TUNED, Published, Row, text
from posterpipe.core.score_report.words import DECIDED, anchor


@dataclass(frozen=True)
class Standing:
    """Where the checkpoint of the fine-tuned images stands."""

    checkpoint: str
    """checkpoint_id."""
    decision: Row | None
    """The gate's latest one about it, a row of `gate_decisions`; None where it was not judged."""
    served: str
    """checkpoint_id of what is served; "" where the base model is not known either."""
    pinned_by: str
    """Who pinned that; "" where the gate chose it."""

    @property
    def word(self) -> str:
        """promoted, held or rejected; "" where it was not judged."""
        return DECIDED.get(text(self.decision["decision"]), "") if self.decision else ""

    @property
    def css(self) -> str:
        return text(self.decision["decision"]) if self.decision and self.word else ""

    @property
    def href(self) -> str:
        """Of the decision on the gate's page, or that page."""
        return f"gate.html#{anchor(self.decision)}" if self.decision else "gate.html"


def standing_of(published: Published) -> Standing | None:
    """None without images of a fine-tuned model, and where no log was published."""
    shown = {text(row["variant"]): row for row in published.rows("leaderboard")}
    if TUNED not in shown or "gate_decisions" not in published.marts:
        return None
    checkpoint = text(shown[TUNED]["checkpoint_id"])
    base = text(shown[BASELINE]["checkpoint_id"]) if BASELINE in shown else ""
    # Each base model has a champion of its own; a row without one counts for all of them.
    rows = [
        row for row in published.rows("gate_decisions") if text(row["base_model"]) in ("", base)
    ]
    own = [row for row in rows if row["checkpoint_id"] == checkpoint and not row["by_person"]]
    people = [row for row in rows if row["by_person"]]
    served = text(rows[-1]["champion_after"]) if rows else base
    pinned = people and people[-1]["pins"] and people[-1]["checkpoint_id"] == served
    if pinned:  # which ends where the gate rejects it
        later = rows[rows.index(people[-1]) :]
        pinned = not any(
            row["decision"] == "reject" and row["checkpoint_id"] == served for row in later
        )
    return Standing(
        checkpoint=checkpoint,
        decision=own[-1] if own else None,
        served=served,
        pinned_by=text(people[-1]["decided_by"]) if pinned else "",
    )
