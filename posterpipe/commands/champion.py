"""What `posterpipe champion` does: shows which checkpoint is served, pins one, rolls back.

What belongs here: what the command prints and writes. What does not: the rules
(`core.champion.decisions`).
"""

from __future__ import annotations

import datetime as dt
import getpass
import os
from collections.abc import Callable

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from posterpipe.core.champion import decisions as log
from posterpipe.core.champion.decisions import GateError, read_decisions, write_decisions
from posterpipe.core.models import ModelMissing, known_fingerprint
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.settings import ModelRef, load_settings

SHOWN = 20
"""Decisions that are listed, the latest ones."""


def show() -> None:
    """Print the champion and the latest decisions."""
    warehouse, known, ref = _opened()
    base = known or ref.id
    decisions = read_decisions(warehouse)
    # A reason is a person's words: nothing in it is markup.
    console = Console(highlight=False, markup=False, emoji=False)
    served = log.champion_of(decisions, base)
    decisions = log.of_base(decisions, base)
    what = "the base model" if served == base else "a fine-tuned checkpoint"
    pinned = ", pinned" if log.pinned(decisions, base) else ""
    console.print(f"Served: {served} ({what}{pinned})")
    if decisions.empty:
        console.print("No checkpoint has been judged yet: materialize the asset `champion`.")
        return
    table = Table("when", "checkpoint", "decision", "by", "why", box=SIMPLE_HEAD)
    table.columns[-1].overflow = "fold"  # links are long, and ids that people copy
    for row in decisions.tail(SHOWN).itertuples(index=False):
        when = f"{row.decided_at:%Y-%m-%d %H:%M}"
        who = str(row.decided_by)
        done = log.action(str(row.decision), who, str(row.numbers))
        table.add_row(when, str(row.checkpoint_id)[:12], done, who, str(row.reason))
    console.print(table)


def pin(checkpoint: str, why: str, who: str | None) -> None:
    """Serve `checkpoint` (its id or the beginning of it) until it is unpinned."""

    def row(decisions: pd.DataFrame, base: str, who: str, now: dt.datetime) -> pd.DataFrame:
        known = {base, *log.of_base(decisions, base)["checkpoint_id"].astype(str)}
        matching = sorted(name for name in known if name.startswith(checkpoint))
        if len(matching) > 1:
            raise GateError(
                f"{checkpoint} begins several checkpoints: {', '.join(matching)}; write more of it"
            )
        chosen = matching[0] if matching else checkpoint
        return log.pin(decisions, chosen, base, who=who, why=why, decided_at=now)

    _decide(row, who)


def unpin(why: str, who: str | None) -> None:
    """Give the choice back to the gate."""
    _decide(lambda d, b, w, now: log.unpin(d, b, who=w, why=why, decided_at=now), who)


def rollback(why: str, who: str | None) -> None:
    """Serve the champion before the present one."""
    _decide(lambda d, b, w, now: log.rollback(d, b, who=w, why=why, decided_at=now), who)


def _decide(
    row: Callable[[pd.DataFrame, str, str, dt.datetime], pd.DataFrame], who: str | None
) -> None:
    warehouse, base, ref = _opened()
    if base is None:  # a decision names it, and that stays
        raise ModelMissing(
            f"The base model {ref.id} is not on this machine, so which one it is cannot be told: "
            f"decide where the pipeline runs, or run `hf download {ref.id}` first"
        )
    known, name = base, who or _user()
    decisions = write_decisions(warehouse, lambda before, now: row(before, known, name, now))
    served = log.champion_of(decisions, base)
    Console(highlight=False, soft_wrap=True).print(
        f"Served: {served}. Where the sensors run (make dev), reports follow within minutes; else "
        "materialize `champion_generations`, `fidelity_scores` and `champion`, or run "
        "`posterpipe demo`."
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # another error from Python 3.13 on
        raise GateError(
            f"the user id {os.getuid()} has no name on this machine, as in many containers: say "
            "who decides with --who"
        ) from None


def _opened() -> tuple[Warehouse, str | None, ModelRef]:
    """The warehouse, and the base model: its fingerprint, where that is known, and what it is."""
    settings = load_settings()
    base = known_fingerprint(settings.base_model, settings.root)
    return Warehouse(settings.warehouse_path), base, settings.base_model
