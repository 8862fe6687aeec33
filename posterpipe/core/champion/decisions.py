"""The log of decisions: which checkpoint is served, and who decided it.

What belongs here: the rows of fct_promotion, who is champion after all of them, what a person may
decide, and keeping the log in the warehouse and beside it. What does not: the rules by which a
checkpoint is promoted (`gate`), and measuring (`evidence`).

The first champion is the base model. People may pin a checkpoint, or roll back to an earlier
champion, step by step; the gate then goes on deciding, but what is served stays until the pin is
taken away.
"""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd

from posterpipe.core.champion.gate import GateDecision, Verdict
from posterpipe.core.files import write_atomic
from posterpipe.core.store import content_key, writing
from posterpipe.core.warehouse.database import Warehouse, WarehouseError
from posterpipe.core.warehouse.rows import insert, utc_now

GATE = "gate"
"""`decided_by` of decisions that no person took."""

DECISION_COLUMNS = (
    "decision_id", "decided_at", "checkpoint_id", "champion_before", "decision", "reason",
    "numbers", "decided_by", "run_id", "base_model",
)  # fmt: skip
"""Columns of fct_promotion. `base_model` is the one whose champion the decision is about: profiles
that share a store have champions of their own. Where it is not known (a decision of an older
posterpipe about a checkpoint that the warehouse does not know), the decision counts for each."""

MIRROR = "decisions.json"
"""File of the store that repeats fct_promotion, for those who cannot open the warehouse, and for a
warehouse that was lost, since nothing else knows what was decided."""

_NEEDED = ["decision_id", "decided_at", "checkpoint_id", "decision", "reason"]
"""What no decision lacks."""


class GateError(ValueError):
    """What a person requested of the gate cannot be done. The message says what can."""


def decision_row(
    decision: GateDecision,
    decisions: pd.DataFrame,
    base_model: str,
    *,
    decided_at: dt.datetime,
    run_id: str | None = None,
) -> pd.DataFrame:
    """The row of fct_promotion (DECISION_COLUMNS) of a decision of the gate; times in UTC.

    No row where the latest decision about this challenger is the same one, with the same numbers,
    against the same champion (`decisions`: all rows so far): a step that runs again decides nothing
    new.
    """
    evidence = decision.evidence
    numbers = {
        "checks": [asdict(check) for check in decision.checks],
        "expected": evidence.expected,
        "missing": evidence.missing,
        "missing_of_champion": evidence.missing_of_champion,
        "blocked": evidence.blocked,
        "blocked_of_champion": evidence.blocked_of_champion,
        "copies": evidence.copies,
        "compared": evidence.compared,
        "sensitivity": evidence.sensitivity,
        "lost": evidence.lost,
    }
    for name, effect in (("specific", evidence.specific), ("preference", evidence.preference)):
        if effect is not None:
            numbers[name] = asdict(effect)
    if evidence.unsure:
        numbers["unsure"] = evidence.unsure
    if evidence.clip_to_base is not None:
        numbers["missing_of_base"] = evidence.missing_of_base
    row = _row(
        checkpoint=evidence.challenger,
        before=evidence.champion,
        base_model=base_model,
        verdict=decision.verdict,
        reason=decision.reason,
        numbers=numbers,
        decided_by=GATE,
        decided_at=decided_at,
        run_id=run_id,
    )
    own = _ordered(decisions)
    own = own[(own["decided_by"] == GATE) & (own["checkpoint_id"] == evidence.challenger)]
    compared = ["champion_before", "decision", "numbers"]
    if len(own) and own.iloc[-1][compared].tolist() == row.iloc[0][compared].tolist():
        return row.iloc[:0]
    return row


def of_base(decisions: pd.DataFrame, base_model: str) -> pd.DataFrame:
    """The decisions about the champion of one base model, in their order."""
    base = decisions["base_model"]
    return _ordered(decisions[base.isna() | (base == base_model)])


def champion_of(decisions: pd.DataFrame, base_model: str) -> str:
    """The checkpoint that is served after all these decisions (rows of fct_promotion).

    The base model without any. A pinned one until the pin is taken away; then the checkpoint that
    the gate promoted last. A checkpoint that the gate rejected since is not served, nor one of
    another base model.
    """
    return _standings(decisions, base_model)[-1].served


def defender_of(decisions: pd.DataFrame, base_model: str, challenger: str) -> str:
    """The checkpoint that a challenger has to beat: what would be served without it.

    Decisions about the challenger itself do not count. So judging it again, also after it was
    promoted, asks the same question as the first time, and its promotion makes nothing stale.
    """
    return _standings(decisions, base_model, without=challenger)[-1].served


def pinned(decisions: pd.DataFrame, base_model: str) -> str | None:
    """The checkpoint that a person has pinned, or None."""
    return _standings(decisions, base_model)[-1].pinned


def pin(
    decisions: pd.DataFrame,
    checkpoint: str,
    base_model: str,
    *,
    who: str,
    why: str,
    decided_at: dt.datetime,
) -> pd.DataFrame:
    """The row that makes `checkpoint` the one that is served, until `unpin`.

    Only what has been champion, the base model or what the gate holds may be pinned. Raises
    GateError for a checkpoint that is rejected or not known, and without a name or reason.
    """
    _require_who_and_why(who, why)
    latest = verdicts(of_base(decisions, base_model))
    if latest.get(checkpoint) == "reject":
        raise GateError(
            f"the gate rejected the checkpoint {checkpoint}, and what is rejected is never served; "
            "pin another one, or change POSTERPIPE_GATE__* and materialize `champion` again"
        )
    if checkpoint != base_model and checkpoint not in latest:
        known = ", ".join([base_model, *(key for key, how in latest.items() if how != "reject")])
        raise GateError(
            f"the gate has not seen the checkpoint {checkpoint} of the base model {base_model}; "
            f"choose from {known}"
        )
    return _row(
        checkpoint=checkpoint,
        before=champion_of(decisions, base_model),
        base_model=base_model,
        verdict="promote",
        reason=why,
        numbers={"pinned": True},
        decided_by=who,
        decided_at=decided_at,
    )


def unpin(
    decisions: pd.DataFrame, base_model: str, *, who: str, why: str, decided_at: dt.datetime
) -> pd.DataFrame:
    """The row that gives the choice back to the gate. Raises GateError where nothing is pinned."""
    _require_who_and_why(who, why)
    now = _standings(decisions, base_model)[-1]
    if now.pinned is None:
        raise GateError("no checkpoint is pinned: the gate decides already")
    return _row(
        checkpoint=now.champion,
        before=now.pinned,
        base_model=base_model,
        verdict="promote",
        reason=why,
        numbers={"pinned": False},
        decided_by=who,
        decided_at=decided_at,
    )


def rollback(
    decisions: pd.DataFrame, base_model: str, *, who: str, why: str, decided_at: dt.datetime
) -> pd.DataFrame:
    """The row that pins the champion before this one; once more, the one before that.

    Never one that was rolled back from and neither promoted nor pinned since: of it, too, somebody
    complained. Raises GateError where none is left.
    """
    _require_who_and_why(who, why)
    standings = _standings(decisions, base_model)
    served = [standing.served for standing in standings]
    now, latest, left = served[-1], standings[-1].latest, standings[-1].left
    # The present one may have been champion before as well, when what came between was rejected.
    earlier = [
        name for name in served if name != now and latest.get(name) != "reject" and name not in left
    ]
    if not earlier:
        told = f"{now} is served, and there is none to go back to"
        if left:
            told += (
                f": {', '.join(sorted(left))} had been rolled back from; to serve one again, "
                "`posterpipe champion pin` it"
            )
        raise GateError(told)
    return _row(
        checkpoint=earlier[-1],
        before=now,
        base_model=base_model,
        verdict="promote",
        reason=why,
        numbers={"pinned": True, "rollback": True},
        decided_by=who,
        decided_at=decided_at,
    )


@dataclass(frozen=True)
class _Standing:
    """Where the decisions so far lead to."""

    promoted: tuple[str, ...]
    """By the gate, the base model first."""
    rejected: frozenset[str] = frozenset()
    """Not promoted since."""
    latest: Mapping[str, str] = field(default_factory=dict)
    """The gate's latest verdict by checkpoint."""
    pinned: str | None = None
    left: frozenset[str] = frozenset()
    """Rolled back from, and neither promoted nor pinned since."""

    @property
    def champion(self) -> str:
        """By the gate."""
        return next(name for name in reversed(self.promoted) if name not in self.rejected)

    @property
    def served(self) -> str:
        return self.pinned or self.champion

    def after_gate(self, checkpoint: str, verdict: str) -> _Standing:
        latest = {**self.latest, checkpoint: verdict}
        if verdict == "promote":
            rejected = self.rejected - {checkpoint}
            promoted = (*self.promoted, checkpoint)
            left = self.left - {checkpoint}
            return replace(self, latest=latest, promoted=promoted, rejected=rejected, left=left)
        if verdict == "reject":
            pinned = None if self.pinned == checkpoint else self.pinned
            rejected = self.rejected | {checkpoint}
            return replace(self, latest=latest, rejected=rejected, pinned=pinned)
        return replace(self, latest=latest)

    def after_person(self, checkpoint: str, *, pins: bool, goes_back: bool) -> _Standing:
        if pins and self.latest.get(checkpoint) == "reject":
            return self  # what is rejected is never served, however the row came here
        left = self.left
        if goes_back:
            left = left | {self.served}
        elif pins:
            left = left - {checkpoint}
        return replace(self, pinned=checkpoint if pins else None, left=left)


def _standings(
    decisions: pd.DataFrame, base_model: str, *, without: str | None = None
) -> list[_Standing]:
    """Before any decision about the champion of a base model, and after each; as if the checkpoint
    `without` did not exist: a pin of it takes away the previous one."""
    standings = [_Standing((base_model,))]
    for row in of_base(decisions, base_model).itertuples(index=False):
        now, checkpoint = standings[-1], str(row.checkpoint_id)
        if row.decided_by != GATE:
            numbers = json.loads(str(row.numbers))
            pins = numbers["pinned"] and checkpoint != without
            # Of an older posterpipe, a rollback is a pin like others.
            goes_back = numbers.get("rollback", False)
            now = now.after_person(checkpoint, pins=pins, goes_back=goes_back)
        elif checkpoint != without:
            now = now.after_gate(checkpoint, str(row.decision))
        standings.append(now)
    return standings


def verdicts(decisions: pd.DataFrame) -> dict[str, str]:
    """The gate's latest verdict (promote, hold, reject) by checkpoint."""
    own = _ordered(decisions)
    own = own[own["decided_by"] == GATE]
    return dict(zip(own["checkpoint_id"].astype(str), own["decision"].astype(str), strict=True))


def action(decision: str, decided_by: str, numbers: str) -> str:
    """What a row of fct_promotion did, by these columns of it: the gate's verdict (promote, hold,
    reject), or what a person did (pin, also by a rollback; unpin)."""
    if decided_by == GATE:
        return decision
    return "pin" if json.loads(numbers)["pinned"] else "unpin"


def _ordered(decisions: pd.DataFrame) -> pd.DataFrame:
    return decisions.sort_values("decided_at", kind="stable")


def _require_who_and_why(who: str, why: str) -> None:
    if not who.strip() or not why.strip():
        raise GateError("say who decides and why: both are kept in the log")
    try:
        (who + why).encode()
    except UnicodeEncodeError as error:  # as Python has bytes of an argument that are no UTF-8
        raise GateError(
            "who decides and why have bytes that are no text in UTF-8: write them in a terminal "
            "that is set to it"
        ) from error
    if who.strip().casefold() == GATE:
        raise GateError(f"`{who}` is how the log calls the gate itself; give a name with --who")


def _row(
    *,
    checkpoint: str,
    before: str,
    base_model: str,
    verdict: Verdict,
    reason: str,
    numbers: Mapping[str, Any],
    decided_by: str,
    decided_at: dt.datetime,
    run_id: str | None = None,
) -> pd.DataFrame:
    encoded = json.dumps(_finite(numbers), sort_keys=True)
    values = {
        "decision_id": content_key(checkpoint, before, verdict, encoded, decided_by, decided_at),
        "decided_at": decided_at,
        "checkpoint_id": checkpoint,
        "champion_before": before,
        "decision": verdict,
        "reason": reason,
        "numbers": encoded,
        "decided_by": decided_by,
        "run_id": run_id,
        "base_model": base_model,
    }
    return pd.DataFrame([values], columns=list(DECISION_COLUMNS))


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_decisions(warehouse: Warehouse) -> pd.DataFrame:
    """All decisions so far, rows of fct_promotion in their order; none before the first write.

    Those mirrored beside the warehouse are among them where it lacks them, since it was lost or put
    back; the next write puts them into it. Raises WarehouseBusy and WarehouseError.
    """
    mirrored = read_mirrored_decisions(warehouse.path.parent)
    if not warehouse.exists():
        return mirrored
    with warehouse.read() as connection:
        own = _decisions(connection)
    lacking = mirrored[~mirrored["decision_id"].isin(own["decision_id"])]
    if lacking.empty:
        return own
    everything = pd.concat([own, lacking]) if len(own) else lacking
    return everything.sort_values("decided_at", kind="stable", ignore_index=True)


def _decisions(connection: duckdb.DuckDBPyConnection) -> pd.DataFrame:
    rows = connection.execute("SELECT * FROM fct_promotion ORDER BY decided_at, rowid").df()
    # A file that an older posterpipe wrote or published lacks a column until the next write.
    return rows.reindex(columns=list(DECISION_COLUMNS))


def _put_back(connection: duckdb.DuckDBPyConnection, warehouse: Warehouse) -> None:
    """Adds the mirrored decisions that the warehouse lacks."""
    insert(connection, "fct_promotion", read_mirrored_decisions(warehouse.path.parent))


def write_decisions(
    warehouse: Warehouse, take: Callable[[pd.DataFrame, dt.datetime], pd.DataFrame]
) -> pd.DataFrame:
    """Adds the rows of fct_promotion that `take` makes of all decisions so far, and the time.

    Nobody else decides between the two, so who decides at the same time, a person or another run,
    knows of this decision. The time is later than that of any decision before, whatever the clock
    says. Decisions that a warehouse lacks which was lost or put back count as well, and are in it
    afterwards. Adds nothing where `take` raises. Returns all decisions, which are mirrored as well.
    """
    with warehouse.write() as connection:
        _put_back(connection, warehouse)
        before = _decisions(connection)
        now = utc_now()
        if len(before):
            latest = before["decided_at"].max().to_pydatetime()
            now = max(now, latest + dt.timedelta(microseconds=1))
        insert(connection, "fct_promotion", take(before, now))
    return mirror_decisions(warehouse)


def mirror_decisions(warehouse: Warehouse) -> pd.DataFrame:
    """Writes all decisions (DECISION_COLUMNS) beside the warehouse, where that file differs, and
    returns them.

    Sensors look up the champion while a step may be writing, when the warehouse cannot be opened.
    What one of the two lacks, it gets from the other: a crash between the two loses nothing, nor
    does a lost warehouse.

    Raises WarehouseBusy, WarehouseError, and StoreError where the file cannot be written.
    """
    # As a writer, so that of two who mirror them, the later one knows more.
    with warehouse.write() as connection:
        _put_back(connection, warehouse)
        decisions = _decisions(connection)
        if _known(read_mirrored_decisions(warehouse.path.parent)) != _known(decisions):
            text = decisions.to_json(orient="records", date_format="iso", date_unit="us", indent=1)
            mirror = warehouse.path.parent / MIRROR
            with writing(mirror):
                write_atomic(mirror, text.encode())
    return decisions


def _known(decisions: pd.DataFrame) -> list[list[str]]:
    return decisions[["decision_id", "base_model"]].fillna("").astype(str).to_numpy().tolist()


def read_mirrored_decisions(store_root: Path) -> pd.DataFrame:
    """The decisions (DECISION_COLUMNS) as they were mirrored last; opens no database. None before
    the first. Raises WarehouseError where the file is damaged: it may have held what nothing else
    does."""
    path = Path(store_root) / MIRROR
    try:
        rows = json.loads(path.read_text("utf-8"))
        if not isinstance(rows, list):
            raise ValueError("no list of decisions")
        decisions = pd.DataFrame(rows, columns=list(DECISION_COLUMNS))
        if decisions[_NEEDED].isna().to_numpy().any():
            raise ValueError("a decision that is not whole")
        times = pd.to_datetime(decisions["decided_at"], format="ISO8601")
        return decisions.assign(decided_at=times.dt.tz_localize(None))
    except FileNotFoundError:
        return pd.DataFrame(columns=list(DECISION_COLUMNS))
    except (OSError, ValueError) as error:
        raise WarehouseError(
            f"{path}: the decisions about the champion cannot be read ({error}); put the file back "
            "from a backup. Or, if the warehouse beside it was neither lost nor put back since, "
            "move it away: the warehouse holds the same decisions, and they are written again"
        ) from error
