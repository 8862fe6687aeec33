"""What must hold before the next step is worth its cost.

What belongs here: asset checks in Dagster's form: expected, actual, and the offenders by name. What
does not: tests of the reports, which dbt has (`dbt_like_reports`).
"""

import json

import dagster as dg

from posterpipe.defs.generation import BASE_VARIANTS, TUNED_VARIANTS
from posterpipe.defs.resources import Deployment, Table, rows, table_preview


@dg.asset_check(asset="raw_posters", blocking=True)
def enough_usable_posters(
    deployment: dg.ResourceParam[Deployment], raw_posters: Table
) -> dg.AssetCheckResult:
    """There are at least `checks.min_posters` usable posters."""
    needed = deployment.settings.checks.min_posters
    usable = int((raw_posters["status"] == "ok").sum())
    refused = raw_posters[raw_posters["status"] != "ok"]
    return dg.AssetCheckResult(
        passed=usable >= needed,
        description=f"{usable} usable posters; at least {needed} are needed",
        metadata={
            "expected": needed,
            "actual": usable,
            "refused": table_preview(refused, ["source_name", "status", "reason"]),
        },
    )


@dg.asset_check(asset="training_csv", blocking=True)
def every_row_has_image_and_caption(
    deployment: dg.ResourceParam[Deployment], training_csv: Table
) -> dg.AssetCheckResult:
    """Each row of training.csv names an image that is there, and has a caption."""
    folders = deployment.store_root / "training_sets"
    offenders = [
        f"{row.file_name}: {'no caption' if not str(row.caption).strip() else 'no image'}"
        for row in rows(training_csv)
        if not str(row.caption).strip()
        or not (folders / str(row.training_set) / str(row.file_name)).is_file()
    ]
    return dg.AssetCheckResult(
        passed=not offenders,
        description=f"{len(training_csv)} rows, {len(offenders)} without image or caption",
        metadata={"expected": 0, "actual": len(offenders), "offenders": offenders[:50]},
    )


@dg.asset_check(asset="base_generations", additional_ins={"prompt_suite": dg.AssetIn()})
def every_base_image_drawn(base_generations: Table, prompt_suite: Table) -> dg.AssetCheckResult:
    """Every (variant, prompt, seed) of the base variants is there and was drawn."""
    return _every_cell(base_generations, prompt_suite, BASE_VARIANTS)


@dg.asset_check(asset="tuned_generations", additional_ins={"prompt_suite": dg.AssetIn()})
def every_tuned_image_drawn(tuned_generations: Table, prompt_suite: Table) -> dg.AssetCheckResult:
    """Every (variant, prompt, seed) of the fine-tuned variants is there and was drawn."""
    return _every_cell(tuned_generations, prompt_suite, TUNED_VARIANTS)


def _every_cell(generations: Table, suite: Table, variants: tuple[str, ...]) -> dg.AssetCheckResult:
    expected = {
        (variant, row.prompt_id, seed)
        for row in rows(suite)
        for seed in json.loads(row.seeds)
        for variant in variants
    }
    drawn = generations[generations["status"] != "failed"]
    missing = sorted(
        expected - set(zip(drawn["variant"], drawn["prompt_id"], drawn["seed"], strict=True))
    )
    return dg.AssetCheckResult(
        passed=not missing,
        description=f"{len(expected) - len(missing)} of {len(expected)} images are there",
        metadata={
            "expected": len(expected),
            "actual": len(expected) - len(missing),
            "missing": [" ".join(map(str, cell)) for cell in missing[:50]],
        },
    )


@dg.asset_check(asset="clip_scores")
def cosines_are_possible(clip_scores: Table) -> dg.AssetCheckResult:
    """Every cosine is within -1 and 1, and exactly the images with status ok have one."""
    cosine = clip_scores["clip_cosine"]
    scored = clip_scores["status"] == "ok"
    wrong = clip_scores[(scored != cosine.notna()) | (cosine.abs() > 1)]
    return dg.AssetCheckResult(
        passed=wrong.empty,
        description=f"{len(wrong)} of {len(clip_scores)} scores are impossible",
        metadata={
            "lowest": float(cosine.min()) if cosine.notna().any() else None,
            "highest": float(cosine.max()) if cosine.notna().any() else None,
            "offenders": table_preview(wrong, ["variant", "prompt_id", "seed", "clip_cosine"]),
        },
    )
