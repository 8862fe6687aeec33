"""What is wrong with the posters of the landing folder, and with what is made of each.

What belongs here: counts and shares of refused, repeated and failed posters. What does not: the
training images themselves (`images`), captions (`captions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from posterpipe.core.quality.finding import Finding, share_of
from posterpipe.core.store import cells


def enough_posters(posters: pd.DataFrame, min_posters: int) -> Finding:
    """Whether `raw_posters` has at least `min_posters` usable ones (status `ok`)."""
    usable = int((posters["status"] == "ok").sum())
    refused = posters[posters["status"] != "ok"]
    return Finding(
        passed=usable >= min_posters,
        summary=f"{usable} usable posters; at least {min_posters} are needed",
        remedy="put more into the landing folder, mend the refused ones, or lower "
        "checks.min_posters",
        expected=f"at least {min_posters}",
        actual=usable,
        offenders=refused[["source_name", "status", "reason"]],
    )


def rejected_share(posters: pd.DataFrame, max_share: float) -> Finding:
    """Which share of the files in `raw_posters` was rejected; duplicates are no fault."""
    rejected = posters[posters["status"] == "rejected"]
    share = share_of(len(rejected), len(posters))
    return Finding(
        passed=share <= max_share,
        summary=f"{len(rejected)} of {len(posters)} files rejected ({share:.1%}); at most "
        f"{max_share:.1%} are expected",
        remedy="mend or remove them as each reason says; if all of a delivery are named, ask who "
        "made it. The limit is checks.max_rejected_share",
        expected=f"at most {max_share:g}",
        actual=share,
        offenders=rejected[["source_name", "reason"]],
        numbers={"rejected": len(rejected)},
    )


def some_held_out(holdout: pd.DataFrame, folder: Path) -> Finding:
    """Whether `holdout_posters` has a usable one; `folder` is where they lie."""
    usable = int((holdout["status"] == "ok").sum())
    refused = holdout[holdout["status"] != "ok"]
    return Finding(
        passed=usable > 0,
        summary=f"{usable} usable holdout posters in {folder}",
        remedy="put film posters there that are not trained on, mend the refused ones, or set "
        "POSTERPIPE_HOLDOUT to another folder",
        expected="at least 1",
        actual=usable,
        offenders=refused[["source_name", "status", "reason"]],
    )


def near_duplicates(posters: pd.DataFrame, max_share: float) -> Finding:
    """Which share of the usable posters in `raw_posters` resembles an earlier one."""
    usable = posters[posters["status"] == "ok"]
    flagged = usable[usable["near_duplicate_of"] != ""]
    share = share_of(len(flagged), len(usable))
    return Finding(
        passed=share <= max_share,
        summary=f"{len(flagged)} of {len(usable)} posters resemble an earlier one ({share:.1%}); "
        f"at most {max_share:.1%} are expected",
        remedy="look at the pairs and remove the worse one of each, since what is there twice is "
        "learned twice. The limit is checks.max_near_duplicate_share",
        expected=f"at most {max_share:g}",
        actual=share,
        offenders=flagged[["source_name", "near_duplicate_of"]],
        numbers={"near_duplicates": len(flagged)},
    )


def source_names(posters: pd.DataFrame) -> dict[str, str]:
    """The file in the landing folder by poster_id; of duplicates the one that is used."""
    ordered = posters.sort_values("status", key=lambda status: status != "ok", kind="stable")
    names: dict[str, str] = {}
    for poster_id, name in cells(ordered, "poster_id", "source_name"):
        names.setdefault(str(poster_id), str(name))
    return names


def failed_share(
    table: pd.DataFrame, names: Mapping[str, str], max_share: float, what: str
) -> Finding:
    """Which share of the rows of `resized_posters` or `poster_captions` has failed.

    `what` they hold, in words; `names`: see `source_names`.
    """
    failed = [
        (names.get(str(poster_id), str(poster_id)), str(reason))
        for poster_id, status, reason in cells(table, "poster_id", "status", "reason")
        if status != "ok"
    ]
    share = share_of(len(failed), len(table))
    return Finding(
        passed=share <= max_share,
        summary=f"{len(failed)} of {len(table)} {what} could not be made ({share:.1%}); at most "
        f"{max_share:.1%} may fail",
        remedy="do what the reasons say and materialize the asset again; it is also tried again by "
        "itself, less and less often, for a week. The limit is checks.max_failed_share",
        expected=f"at most {max_share:g}",
        actual=share,
        offenders=pd.DataFrame(failed, columns=["source_name", "reason"]),
        numbers={"failed": len(failed)},
    )
