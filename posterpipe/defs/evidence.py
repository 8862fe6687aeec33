"""Evidence that a sceptic believes, and the checkpoint that is served because of it.

What belongs here: titles set in type, the metrics beside CLIP-T, and the gate, as assets. What does
not: how anything is measured or decided (`core.evidence`, `core.metrics`, `core.gate`,
`core.typography`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import dagster as dg

from posterpipe.defs.resources import (
    BASE_MODEL,
    CHALLENGER,
    CHAMPION,
    FAILED_ITEMS,
    LAST_DECISION,
    MODEL_FINGERPRINT,
    TABLES,
    Deployment,
    Table,
    columns,
    counts,
    naming_the_asset,
    rows,
    table_output,
    table_preview,
    thumbnails,
)

if TYPE_CHECKING:
    from posterpipe.core.gate import Check

_GENERATION = columns(
    generation_key="string: the image and what it is scored against",
    variant="string: of the base model sd..., of a tuned one dreambooth...",
    checkpoint_id="string: the champion",
    status="string: ok, blocked (black or constant) or failed",
)


@dg.asset(
    group_name="generation",
    kinds={"python", "huggingface"},
    owners=["team:ml"],
    code_version="3",
    io_manager_key=TABLES,
    pool="gpu",
    metadata=_GENERATION,
)
def champion_generations(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    prompt_suite: Table,
    base_generations: Table,
    tuned_generations: Table,
) -> dg.Output[Table]:
    """What the newest checkpoint has to beat: the suite as the champion before it draws it.

    Drawn anew only when the suite or the sampler changed since; the base model's images are there
    already. Decisions about the newest checkpoint itself do not count here, so its promotion makes
    nothing of this stale; a pin or a rollback by a person does.
    """
    from posterpipe.core.decisions import (
        defender_of,
        read_decisions,
    )
    from posterpipe.core.generations import generate
    from posterpipe.core.prompts import suite_prompts
    from posterpipe.core.provenance import require_checkpoint
    from posterpipe.core.variants import DELAYED_VARIANTS, TUNED_VARIANTS

    base = str(base_generations["checkpoint_id"].iloc[0])
    challenger = str(tuned_generations["checkpoint_id"].iloc[0])
    # Of the warehouse, though this step waits while another writes: what is told beside it may be
    # behind, and the gate would refuse to compare with that champion.
    champion = defender_of(read_decisions(deployment.warehouse), base, challenger)
    if champion == base:
        table, failed = base_generations, 0  # whoever drew them tries them again
    else:
        folder = deployment.store_root / "checkpoints" / champion
        require_checkpoint(deployment.store, folder, checkpoint_id=champion)
        with naming_the_asset(context):
            table = generate(
                deployment.store,
                suite_prompts(prompt_suite),
                (*TUNED_VARIANTS, DELAYED_VARIANTS[1]),
                folder,
                champion,
                deployment.settings.sampler,
                deployment.progress(context),
                run_id=context.run.run_id,
            )
        failed = int((table["status"] == "failed").sum())
    return table_output(
        table,
        {
            CHAMPION: champion,
            CHALLENGER: challenger,
            BASE_MODEL: base,
            **counts(table, "status"),
            FAILED_ITEMS: failed,
        },
    )


@dg.asset(
    group_name="generation",
    kinds={"python", "pillow"},
    owners=["team:ml"],
    code_version="3",
    io_manager_key=TABLES,
    metadata=columns(
        generation_key="string: the image that was lettered",
        untitled_image="string: sha256 of the PNG without the title",
        title="string: what was set",
        image="string: sha256 of the titled PNG in the store",
        image_path="string: its path inside the store",
        style="string: type style",
        lines="string: JSON list",
        cap_height="int: pixels",
        contrast="float: the least of letters and ground, 1 to 21",
        scrim="bool: whether the ground had to be helped",
        covered="float: share of the main object below the letters, 0 to 1",
        status="string: ok, blocked or failed",
        reason="string: why it is not ok",
    ),
)
def titled_posters(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    base_generations: Table,
    tuned_generations: Table,
) -> dg.Output[Table]:
    """Generated posters with their titles set in type, which the model cannot draw.

    Models of this size draw shapes like letters and no words. The images of the first seeds of each
    prompt (setting `lettering.seeds`), never chosen ones. Scores are always taken of the images
    before this step, since CLIP reads.
    """
    import pandas as pd

    from posterpipe.core.metrics.base import unread_count
    from posterpipe.core.typography import set_titles

    generations = pd.concat([base_generations, tuned_generations], ignore_index=True)
    most = deployment.settings.lettering.seeds
    if most is not None:
        generations = generations.groupby(["variant", "prompt_id"], sort=False).head(most)
    titled = set_titles(
        deployment.store, generations, deployment.settings.lettering, deployment.progress(context)
    )
    done = titled[titled["status"] == "ok"]
    firsts = done.drop_duplicates("title")
    return table_output(
        titled,
        {
            "contact_sheet": thumbnails(
                [(deployment.store_root / row.image_path, row.title) for row in rows(firsts)]
            ),
            **counts(titled, "status"),
            FAILED_ITEMS: unread_count(generations, titled),
            "least_contrast": float(done["contrast"].min()) if len(done) else None,
            "with_scrim": int(done["scrim"].sum()),
            "not_set": table_preview(titled[titled["status"] != "ok"], ["title", "reason"]),
        },
    )


@dg.asset(
    group_name="scoring",
    kinds={"python", "huggingface", "duckdb"},
    owners=["team:ml"],
    code_version="5",
    io_manager_key=TABLES,
    pool="warehouse",
    deps=["clip_scores"],
    metadata=columns(
        generation_key="string: the image and what it is scored against",
        metric_id="string: encoder, preprocessing, posters compared with, version",
        metric="string: its name",
        role="string: what the gate reads it for",
        value="float: empty without a score",
        status="string: ok, blocked or failed",
        reason="string: why it is not ok",
        nearest_poster="string: sha256 of the nearest training image",
        copied="bool: whether it counts as a copy of it, by the first encoder or the hash",
        copy_threshold="float: cosine from which it does; empty with too few holdout posters",
        copy_sensitivity="float: share of altered training posters that it finds",
        lost_posters="int: posters that the checkpoint was trained on and that cannot be read",
    ),
)
def fidelity_scores(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    holdout_posters: Table,
    base_generations: Table,
    tuned_generations: Table,
    champion_generations: Table,
) -> dg.Output[Table]:
    """Whether images are like film posters the model never saw, not copies, and not all alike.

    CLIP-T with crop and pad; the same with the texts of the other prompts (the negative control),
    and what of it is the own prompt's alone; similarity to holdout and training posters and their
    difference (the overfit gap), the nearest training poster, diversity within a prompt, and
    PickScore where it is configured. An image is encoded once an encoder; new posters or metrics
    encode it no second time.

    A checkpoint is held against the posters that it was trained on, which may lie in the folder no
    more. Holdout posters that one of the compared checkpoints was trained on do not count.
    """
    import pandas as pd

    from posterpipe.core.evidence import held_out, measure, side_by_side, trained_on
    from posterpipe.core.metrics.base import unread_count
    from posterpipe.core.models import fingerprint, joint_fingerprint

    settings = deployment.settings
    store = deployment.store
    progress = deployment.progress(context)
    warehouse = deployment.warehouse.prepare()
    generations = side_by_side(base_generations, tuned_generations, champion_generations)
    base = str(base_generations["checkpoint_id"].iloc[0])
    holdout = held_out(store, holdout_posters, settings, progress)
    evidence = measure(
        store,
        deployment.warehouse,
        generations,
        trained_on(store, sorted({*generations["checkpoint_id"].astype(str)} - {base})),
        holdout,
        settings,
        progress,
        challenger=str(tuned_generations["checkpoint_id"].iloc[0]),
        run_id=context.run.run_id,
    )
    table = evidence.table
    means = table.groupby(["metric", "variant"], sort=False)["value"]
    summary = means.agg(images="size", mean="mean", deviation="std").reset_index()
    copied = evidence.nearest[evidence.nearest["copied"].astype(bool)]
    return table_output(
        table,
        {
            "by_variant": table_preview(summary),
            "copies": len(copied),
            "copied": table_preview(copied),
            "thresholds": table_preview(
                pd.DataFrame(
                    [
                        (
                            name,
                            one.threshold,
                            one.sensitivity,
                            len(one.similarities),
                            len(holdout.files) - len(one.similarities),
                        )
                        for name, one in evidence.calibrations.items()
                    ],
                    columns=[
                        "encoder",
                        "copy_from_cosine",
                        "altered_found",
                        "holdout_posters",
                        "left_out",
                    ],
                )
            ),
            **counts(table, "status"),
            FAILED_ITEMS: unread_count(generations, table),
            MODEL_FINGERPRINT: joint_fingerprint(
                fingerprint(ref, settings.root)
                for ref in (settings.scorer.model, *settings.evidence.models)
            ),
        },
        warehouse=warehouse,
    )


@dg.asset(
    group_name="scoring",
    kinds={"python", "duckdb"},
    owners=["team:ml"],
    code_version="3",
    io_manager_key=TABLES,
    pool="warehouse",
    deps=["clip_scores"],
    metadata=columns(
        generation_key="string: the image",
        lettering="string: drawn by the model, or set in type",
        title="string: what should be read",
        status="string: ok, blocked or failed; what is not ok was not read",
        read="string: what was read, line by line",
        distance="float: normalised edit distance, 0 (the title) to 1; empty where not read",
        exact="bool: whether the title was read exactly",
    ),
)
def legibility_scores(
    context: dg.AssetExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    base_generations: Table,
    tuned_generations: Table,
    titled_posters: Table,
) -> dg.Output[Table]:
    """Whether a real OCR reads the title, as the model drew it and as it was set in type.

    Both are read on the same images, those that are lettered. An image that was read before is not
    read again. One that is blocked is not read, and counts as one without its title.
    """
    import pandas as pd

    from posterpipe.core.evidence import record_readings, record_titles
    from posterpipe.core.metrics.base import record_scores, unread_count
    from posterpipe.core.metrics.legibility import measure_legibility, of_all_titles
    from posterpipe.core.typography import lettering_id

    warehouse = deployment.warehouse.prepare()
    generations = pd.concat([base_generations, tuned_generations], ignore_index=True)
    record_titles(
        deployment.warehouse, titled_posters, generations["generation_key"],
        run_id=context.run.run_id,
    )  # fmt: skip
    lettered = generations["generation_key"].isin(titled_posters["generation_key"])
    readings, unread = [], 0
    how = lettering_id(deployment.settings.lettering)
    for where, images, lettering in (
        ("drawn", generations[lettered], ""), ("set", titled_posters, how),
    ):  # fmt: skip
        metrics, scores, read = measure_legibility(
            deployment.store, images, where, deployment.progress(context), lettering=lettering
        )
        record_scores(
            deployment.warehouse, generations, metrics, scores, run_id=context.run.run_id,
            step=f"legibility_scores {where}",
        )  # fmt: skip
        record_readings(deployment.warehouse, read, where, run_id=context.run.run_id)
        readings.append(of_all_titles(images, read).assign(lettering=where))
        unread += unread_count(images, scores)
    table = pd.concat(readings, ignore_index=True)[
        ["generation_key", "lettering", "title", "status", "read", "distance", "exact"]
    ]
    shares = table.groupby("lettering")["exact"].mean()
    return table_output(
        table,
        {
            **{f"exact_{name}": float(share) for name, share in shares.items()},
            FAILED_ITEMS: unread,
            "misread": table_preview(
                table[(table["lettering"] == "set") & ~table["exact"].astype(bool)]
            ),
        },
        warehouse=warehouse,
    )


@dg.asset(
    group_name="scoring",
    kinds={"python", "duckdb"},
    owners=["team:ml"],
    code_version="5",
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

    A new checkpoint is promoted when it passes every check of the gate (`core.gate.RULE`, in words
    on the page of the score report). Every decision is a row of `fct_promotion` with its numbers
    and reasons. `posterpipe champion` shows, pins and rolls back.
    """
    import pandas as pd

    from posterpipe.core.decisions import champion_of, of_base, pinned, tell_decisions
    from posterpipe.core.evidence import judge, side_by_side
    from posterpipe.core.provenance import BaseModelsDiffer, require_base_model

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
    decisions = of_base(tell_decisions(warehouse), base)
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
