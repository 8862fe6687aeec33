"""The gate's log.

What belongs here: what stands on the page. What does not: markup and style (`gate.html.j2`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posterpipe.core.champion.gate import LEAST_SENSITIVITY, RULE
from posterpipe.core.score_report import charts
from posterpipe.core.score_report.data import Published, Row, number, text
from posterpipe.core.score_report.words import (
    DASH,
    DECIDED,
    anchor,
    change,
    count,
    interval,
    moment,
    rounded,
    short,
)


def gate_context(published: Published) -> dict[str, Any]:
    """For `gate.html.j2`: the gate's rule, and every decision with its checks, the latest first."""
    checks: dict[str, list[Row]] = {}
    for row in published.rows("gate_checks"):
        checks.setdefault(text(row["decision_id"]), []).append(row)
    rows = published.rows("gate_decisions")
    decisions = [_decision(row, checks.get(text(row["decision_id"]), [])) for row in rows][::-1]
    headline = "No checkpoint has been judged yet"
    if decisions:
        latest = decisions[0]
        headline = f"The latest decision: {latest['checkpoint']} was {latest['decision']}"
        if latest["by_person"]:
            headline = f"The latest decision is a person's: {latest['after']} is served"
    return {"headline": headline, "rule": RULE, "decisions": decisions}


def _decision(row: Row, checks: Sequence[Row]) -> dict[str, Any]:
    decision = text(row["decision"])
    return {
        "anchor": anchor(row),
        "decision": DECIDED.get(decision, decision) if not row["by_person"] else "by a person",
        "css": "person" if row["by_person"] else decision if decision in DECIDED else "",
        "by_person": bool(row["by_person"]),
        "checkpoint": short(row["checkpoint_id"]),
        "before": short(row["champion_before"]),
        "after": short(row["champion_after"]),
        "when": moment(row["decided_at"]),
        "who": text(row["decided_by"]) if row["by_person"] else "the gate",
        "reason": text(row["reason"]),
        "checks": [
            {
                "name": text(check["check_name"]),
                "outcome": text(check["outcome"]),
                "css": check["outcome"] if check["outcome"] in ("pass", "fail") else "open",
                "value": rounded(check["value"]),
                "interval": interval(check, "low_95", "high_95"),
                "limit": rounded(check["limit_value"]),
                "detectable": _detectable(check),
                "reason": text(check["reason"]),
            }
            for check in checks
        ],
        "beside": _beside_checks(row),
    }


def _detectable(check: Row) -> str:
    """In the form of `change`: a difference, or of diversity a ratio."""
    found = number(check["detectable"])
    if found is None:
        return DASH
    is_ratio = text(check["check_name"]).startswith("diversity")
    return change(found - 1, "ratio") if is_ratio else f"± {charts.plain(found)}"


def _beside_checks(row: Row) -> list[dict[str, Any]]:
    """What checks read beside their own number, where it was measured."""
    found = []
    if number(row["copy_sensitivity"]) is not None:
        found.append(
            {
                "name": "altered posters found",
                "value": rounded(row["copy_sensitivity"]),
                "interval": DASH,
                "limit": rounded(LEAST_SENSITIVITY),
                "reason": "copies: share of training posters, cut and compressed a bit, that would "
                "count as copies",
            }
        )
    if number(row["specific_difference"]) is not None:
        found.append(
            {
                "name": "CLIP-T specific",
                "value": charts.signed(row["specific_difference"]),
                "interval": interval(row, "specific_low_95", "specific_high_95", sign=True),
                "limit": DASH,
                "reason": "CLIP-T: own text less those of other prompts, challenger less champion, "
                f"{count(row, 'specific_prompts')} prompts",
            }
        )
    if number(row["preference_win_rate"]) is not None:
        found.append(
            {
                "name": "preferred by PickScore",
                "value": rounded(row["preference_win_rate"]),
                "interval": interval(row, "preference_win_low_95", "preference_win_high_95"),
                "limit": rounded(0.5),
                "reason": f"fidelity: share of {count(row, 'preference_prompts')} prompts; the "
                f"difference of PickScore is {charts.signed(row['preference_difference'])} "
                f"({interval(row, 'preference_low_95', 'preference_high_95', sign=True)})",
            }
        )
    return found
