"""The checkpoint that is served because of the evidence.

What belongs here: the gate as an asset. What does not: the evidence (`scoring`), the gate's rules
and how it decides (`core.champion.gate`, `core.champion.evidence`), and the log of decisions
(`core.champion.decisions`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import dagster as dg

from posterpipe.defs.metadata import (
    BASE_MODEL,
    CHALLENGER,
    CHAMPION,
    LAST_DECISION,
    columns,
    table_preview,
)
from posterpipe.defs.resources import TABLES, Deployment, Table, table_output

if TYPE_CHECKING:
    from posterpipe.core.champion.gate import Check


@dg.asset(
    group_name="scoring",
    kinds={"python", "duckdb"},
    owners=["team:ml"],
    code_version="6",
    io_manager_key=TABLES,
    pool="warehouse",
    metadata=columns(
        checkpoint_id="string: the checkpoint that is served",
        path="string: its directory, inside the store; empty for the base model",
        kind="string: base or tuned",
        pinned="bool: a person chose it",
        challenger="string: the checkpoint that was judged",
        decision="string: promote, hold or reject",
        reason="string: what decided",
        last_decision="string: decision_id of the latest decision about this base model, or empty",
    ),
)
def champion(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    base_generations: Table,
    tuned_generations: Table,
    champion_generations: Table,
    fidelity_scores: Table,
) -> dg.Output[Table]:
    """The checkpoint that is served: the one that the gate accepted last, or that a person pinned.

    A new checkpoint is promoted when it passes every check of the gate (`core.champion.gate.RULE`,
    in words on the page of the score report). Every decision is a row of `fct_promotion` with its
    numbers and reasons. `posterpipe champion` shows, pins and rolls back.
    """
    import pandas as pd

    from posterpipe.core.champion.decisions import champion_of, mirror_decisions, of_base, pinned
    from posterpipe.core.champion.evidence import judge, side_by_side
    from posterpipe.core.provenance.checkpoints import BaseModelsDiffer, require_base_model

    warehouse = deployment.warehouse
    identity = warehouse.prepare()
    base = str(base_generations["checkpoint_id"].iloc[0])
    before = str(champion_generations["checkpoint_id"].iloc[0])
    challenger = str(tuned_generations["checkpoint_id"].iloc[0])
    judged: Sequence[Check] = ()
    try:
        require_base_model(deployment.store, challenger, base)
    except BaseModelsDiffer as error:
        # No decision: one about this base model would let people pin the checkpoint for it.
        verdict, reason = "hold", str(error)
    else:
        decision = judge(
            warehouse,
            side_by_side(base_generations, tuned_generations, champion_generations),
            fidelity_scores,
            challenger=challenger,
            champion=before,
            base_model=base,
            settings=deployment.settings.gate,
            run_id=context.run.run_id,
        )
        verdict, reason, judged = decision.verdict, decision.reason, decision.checks
    decisions = of_base(mirror_decisions(warehouse), base)
    served = champion_of(decisions, base)
    tuned = served != base
    last = str(decisions["decision_id"].iloc[-1]) if len(decisions) else ""
    row = {
        "checkpoint_id": served,
        "path": f"checkpoints/{served}" if tuned else "",
        "kind": "tuned" if tuned else "base",
        "pinned": pinned(decisions, base) is not None,
        "challenger": challenger,
        "decision": verdict,
        "reason": reason,
        "last_decision": last,
    }
    checks = pd.DataFrame(
        [(c.name, c.outcome, c.value, c.low, c.high, c.limit, c.reason) for c in judged],
        columns=["check", "outcome", "value", "low", "high", "limit", "reason"],
    )
    log = ["decided_at", "checkpoint_id", "champion_before", "decision", "reason", "decided_by"]
    return table_output(
        pd.DataFrame([row]),
        {
            CHAMPION: served,
            CHALLENGER: challenger,
            BASE_MODEL: base,
            "decision": verdict,
            "reason": reason,
            "checks": table_preview(checks),
            "log": table_preview(decisions.iloc[::-1], log),
            LAST_DECISION: last,
        },
        warehouse=identity,
    )
