"""What must hold before the next step is worth its cost.

What belongs here: asset checks in Dagster's form: which asset, blocking or not, what a check
protects and what to do when it fails. What does not: the numbers (`core.quality`), the limits
(settings `checks`), tests of the reports, which dbt has (`dbt_like_reports`).

The checks of one asset run in one step, since a step of its own costs each of them a process and
several seconds. A blocking check stops what follows in its run, and automation, which counts any
failure whatever its severity: so blocking checks fail only for what is worth a stop, and warnings
do not block.
"""

import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg

from posterpipe.core.variants import BASE_VARIANTS, DELAYED_VARIANTS, TUNED_VARIANTS
from posterpipe.defs.arrivals import REASON_TAG
from posterpipe.defs.automation import BY_HAND
from posterpipe.defs.resources import TABLE_VERSION, Deployment, Table, table_preview
from posterpipe.defs.retraining import TRAINING_SET
from posterpipe.defs.staleness import CHECKPOINT, used_version
from posterpipe.defs.timing import cron_of
from posterpipe.settings import Settings

if TYPE_CHECKING:
    from posterpipe.core.quality import Finding
    from posterpipe.core.store import Store

SEVERITY = "severity"
"""Metadata entry of a check: as what it fails."""

_VERSIONS = 200
"""Materializations looked at to see how long an image waits for its score."""

WARN, ERROR = dg.AssetCheckSeverity.WARN, dg.AssetCheckSeverity.ERROR


def _spec(
    asset: str,
    name: str,
    description: str,
    *,
    severity: dg.AssetCheckSeverity,
    blocking: bool = False,
    reads: tuple[str, ...] = (),
) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(
        name,
        asset=asset,
        description=description,
        blocking=blocking,
        additional_deps=reads,
        metadata={SEVERITY: severity.value},
    )


def _results(
    context: dg.AssetCheckExecutionContext,
    specs: list[dg.AssetCheckSpec],
    findings: Mapping[str, Callable[[], "Finding"]],
) -> Iterator[dg.AssetCheckResult]:
    """The results of the checks that this step is to run, each made when it is its turn."""
    for spec in specs:
        if spec.key not in context.selected_asset_check_keys:
            continue
        finding = findings[spec.name]()
        yield dg.AssetCheckResult(
            passed=finding.passed,
            check_name=spec.name,
            severity=dg.AssetCheckSeverity(spec.metadata[SEVERITY]),
            description=finding.description,
            metadata={
                "expected": finding.expected,
                "actual": finding.actual,
                "offenders": table_preview(finding.offenders),
                "offending": len(finding.offenders),
                **finding.numbers,
            },
        )


# -- posters and their images ----------------------------------------------------------------------

RAW_POSTERS = [
    _spec(
        "raw_posters",
        "enough_usable_posters",
        "A fine-tuning on fewer posters than `checks.min_posters` learns them by heart. When this "
        "fails, put more into the landing folder or mend those that were refused; nothing that "
        "follows runs until then.",
        severity=ERROR,
        blocking=True,
    ),
    _spec(
        "raw_posters",
        "few_rejected_files",
        "Tells a delivery that went wrong from single bad files, which never stop the others. When "
        "this warns, mend or remove the files as each reason says. Limit: "
        "`checks.max_rejected_share`.",
        severity=WARN,
    ),
    _spec(
        "raw_posters",
        "few_near_duplicates",
        "What is in the set twice is learned twice. Near-duplicates are flagged, not dropped: when "
        "this warns, look at the pairs and remove the worse poster of each. Limit: "
        "`checks.max_near_duplicate_share`.",
        severity=WARN,
    ),
]


@dg.multi_asset_check(specs=RAW_POSTERS, can_subset=True)
def raw_posters_checks(
    context: dg.AssetCheckExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    raw_posters: Table,
) -> Iterator[dg.AssetCheckResult]:
    """The checks of `raw_posters`."""
    from posterpipe.core import quality

    limits = deployment.settings.checks
    yield from _results(
        context,
        RAW_POSTERS,
        {
            "enough_usable_posters": lambda: quality.enough_posters(
                raw_posters, limits.min_posters
            ),
            "few_rejected_files": lambda: quality.rejected_share(
                raw_posters, limits.max_rejected_share
            ),
            "few_near_duplicates": lambda: quality.near_duplicates(
                raw_posters, limits.max_near_duplicate_share
            ),
        },
    )


HOLDOUT_POSTERS = [
    _spec(
        "holdout_posters",
        "there_are_holdout_posters",
        "Without posters that were never trained on, nothing tells learning from copying, and no "
        "leak into the training set is found. Training works all the same: when this warns, put "
        "some film posters into the holdout folder, or mend those that were refused.",
        severity=WARN,
    ),
]


@dg.multi_asset_check(specs=HOLDOUT_POSTERS, can_subset=True)
def holdout_posters_checks(
    context: dg.AssetCheckExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    holdout_posters: Table,
) -> Iterator[dg.AssetCheckResult]:
    """The check of `holdout_posters`."""
    from posterpipe.core import quality

    folder = deployment.settings.path(deployment.settings.holdout)
    yield from _results(
        context,
        HOLDOUT_POSTERS,
        {"there_are_holdout_posters": lambda: quality.some_held_out(holdout_posters, folder)},
    )


RESIZED_POSTERS = [
    _spec(
        "resized_posters",
        "training_images_show_something",
        "A black, white or one-coloured training image is a broken poster, and many of them are a "
        "broken decoder: neither is worth captioning or training on. When this fails, export the "
        "named posters again or remove them. Limit: `checks.max_blank_share`.",
        severity=ERROR,
        blocking=True,
        reads=("raw_posters",),
    ),
    _spec(
        "resized_posters",
        "few_images_failed",
        "Single posters of which no training image can be made stop nothing; many of them are a "
        "full disk, too little memory or lost files, and a training on the rest would be wasted. "
        "When this fails, do what the reasons say. Limit: `checks.max_failed_share`.",
        severity=ERROR,
        blocking=True,
        reads=("raw_posters",),
    ),
]


@dg.multi_asset_check(specs=RESIZED_POSTERS, can_subset=True)
def resized_posters_checks(
    context: dg.AssetCheckExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    resized_posters: Table,
    raw_posters: Table,
) -> Iterator[dg.AssetCheckResult]:
    """The checks of `resized_posters`; each image is measured once."""
    from posterpipe.core import quality

    def blank_images() -> "Finding":
        made = resized_posters.loc[resized_posters["status"] == "ok", "image"]
        return quality.blank_training_images(
            resized_posters,
            quality.source_names(raw_posters),
            quality.stored_statistics(deployment.store, made, deployment.progress(context)),
            deployment.settings.checks.max_blank_share,
        )

    yield from _results(
        context,
        RESIZED_POSTERS,
        {
            "training_images_show_something": blank_images,
            "few_images_failed": lambda: quality.failed_share(
                resized_posters,
                quality.source_names(raw_posters),
                deployment.settings.checks.max_failed_share,
                "training images",
            ),
        },
    )


# -- captions and the training set -----------------------------------------------------------------

POSTER_CAPTIONS = [
    _spec(
        "poster_captions",
        "captions_do_not_repeat",
        "BLIP is known to say a phrase over and over, and the same of several posters; such "
        "captions teach little. When this warns, write better ones for the named posters. Limits: "
        "`checks.max_repeated_share` (word pairs of one caption) and `checks.max_shared_captions`.",
        severity=WARN,
        reads=("raw_posters",),
    ),
    _spec(
        "poster_captions",
        "captions_are_diverse",
        "When nearly all posters have one caption, the captioner sees nothing, and a training "
        "would be wasted. When this fails, look at the captioner and the training images. Limit: "
        "`checks.min_distinct_captions`.",
        severity=ERROR,
        blocking=True,
        reads=("raw_posters",),
    ),
    _spec(
        "poster_captions",
        "few_captions_failed",
        "A poster without a caption is not trained on. Single ones stop nothing; many of them are "
        "a captioner that broke half-way, and a training on the rest would be wasted. When this "
        "fails, do what the reasons say, or write the captions yourself. Limit: "
        "`checks.max_failed_share`.",
        severity=ERROR,
        blocking=True,
        reads=("raw_posters",),
    ),
]


@dg.multi_asset_check(specs=POSTER_CAPTIONS, can_subset=True)
def poster_captions_checks(
    context: dg.AssetCheckExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    poster_captions: Table,
    raw_posters: Table,
) -> Iterator[dg.AssetCheckResult]:
    """The checks of `poster_captions`."""
    from posterpipe.core import quality

    limits = deployment.settings.checks
    names = quality.source_names(raw_posters)
    yield from _results(
        context,
        POSTER_CAPTIONS,
        {
            "captions_do_not_repeat": lambda: quality.repeated_captions(
                poster_captions,
                names,
                max_repeated_share=limits.max_repeated_share,
                max_shared=limits.max_shared_captions,
            ),
            "captions_are_diverse": lambda: quality.caption_diversity(
                poster_captions, names, limits.min_distinct_captions
            ),
            "few_captions_failed": lambda: quality.failed_share(
                poster_captions, names, limits.max_failed_share, "captions"
            ),
        },
    )


TRAINING_CSV = [
    _spec(
        "training_csv",
        "enough_training_rows",
        "Posters may be lost between landing folder and training set: images that cannot be made, "
        "captions that fail. When this fails, read the reasons in resized_posters and "
        "poster_captions. Limit: `checks.min_posters`.",
        severity=ERROR,
        blocking=True,
        reads=("raw_posters",),
    ),
    _spec(
        "training_csv",
        "few_posters_lost",
        "A disk that is not mounted or a delivery that broke off looks like posters that people "
        "removed, and a night would be spent on the rest. Compared with the set that was trained "
        "on last, where its posters came from the same place. When this fails, see whether all "
        "posters are there; if they were removed on purpose, raise the limit until the next "
        "training. Limit: `checks.max_lost_share`.",
        severity=ERROR,
        blocking=True,
    ),
    _spec(
        "training_csv",
        "every_row_has_image_and_caption",
        "The trainer stops at a row without its image or caption, which is better known before a "
        "GPU is taken. When this fails, someone changed the folder: materialize training_csv "
        "again.",
        severity=ERROR,
        blocking=True,
    ),
    _spec(
        "training_csv",
        "captions_fit_the_text_encoder",
        "Words beyond the text encoder's limit are cut, as every Stable Diffusion does: a GPU "
        "would be paid for learning images without what someone wrote about them. BLIP's captions "
        "are bounded when they are made, so it is people's captions or a long template. When this "
        "fails, shorten the named captions. Limit: `checks.max_long_captions`.",
        severity=ERROR,
        blocking=True,
    ),
    _spec(
        "training_csv",
        "no_poster_is_held_out",
        "Scores on the holdout posters say how well a model does with what it has never seen; a "
        "poster in both sets makes them worthless, and only a new training mends it. Compared by "
        "bytes and by perceptual hash. When this fails, remove the poster from one of the folders. "
        "Limit: `checks.holdout_distance`.",
        severity=ERROR,
        blocking=True,
        reads=("raw_posters", "holdout_posters"),
    ),
]


@dg.multi_asset_check(specs=TRAINING_CSV, can_subset=True)
def training_csv_checks(
    context: dg.AssetCheckExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    training_csv: Table,
    raw_posters: Table,
    holdout_posters: Table,
) -> Iterator[dg.AssetCheckResult]:
    """The checks of `training_csv`."""
    from posterpipe.core import quality

    settings = deployment.settings
    limits = settings.checks

    def long_captions() -> "Finding":
        from posterpipe.core.models import locate
        from posterpipe.core.sampler import text_limit

        count_tokens, max_tokens = text_limit(locate(settings.base_model, settings.root))
        return quality.long_captions(
            training_csv, count_tokens, max_tokens, limits.max_long_captions
        )

    yield from _results(
        context,
        TRAINING_CSV,
        {
            "enough_training_rows": lambda: quality.enough_rows(
                training_csv, raw_posters, limits.min_posters
            ),
            "few_posters_lost": lambda: quality.shrinkage(
                training_csv, _trained_on(context.instance, deployment), limits.max_lost_share
            ),
            "every_row_has_image_and_caption": lambda: quality.incomplete_rows(
                training_csv, deployment.store_root / "training_sets"
            ),
            "captions_fit_the_text_encoder": long_captions,
            "no_poster_is_held_out": lambda: quality.holdout_overlap(
                training_csv, raw_posters, holdout_posters, limits.holdout_distance
            ),
        },
    )


def _trained_on(instance: dg.DagsterInstance, deployment: Deployment) -> Mapping[str, str] | None:
    """The training set of the latest checkpoint, captions by file name; None where it is not there
    any more, and where its posters came from another place than those of now."""
    from posterpipe.core.retraining import captions_in

    records = instance.fetch_materializations(CHECKPOINT, limit=1).records
    made = records[0].asset_materialization if records else None
    version = used_version(made, TRAINING_SET) if made else None
    then = _landing_before(instance, records[0].storage_id) if records else None
    now = _landing_before(instance)
    if not version or (then and now and then != now):
        return None
    return captions_in(deployment.store_root / "training_sets" / version)


def _landing_before(instance: dg.DagsterInstance, storage_id: int | None = None) -> str | None:
    """Where the posters lay that were read last before an event of the log; None if not on
    record."""
    posters = dg.AssetRecordsFilter(dg.AssetKey("raw_posters"), before_storage_id=storage_id)
    for record in instance.fetch_materializations(posters, limit=1).records:
        made = record.asset_materialization
        folder = made.metadata.get("folder") if made else None
        return str(folder.value) if folder else None
    return None


# -- generations -----------------------------------------------------------------------------------

_DRAWN = (
    "Variants are compared pair by pair, so each must have drawn every prompt with every seed. "
    "When this fails, mend what the reasons name and materialize the asset again: only the missing "
    "images are drawn."
)
_SHOWING = (
    "Black images and images of one colour come from overflowing numbers or a ruined model. Single "
    "ones are blocked and get no score; when this warns, look at the training curve and at "
    "`sampler.precision`. Limit: `checks.max_blocked_share`."
)

BASE_GENERATIONS = [
    _spec(
        "base_generations",
        "every_base_image_drawn",
        _DRAWN,
        severity=ERROR,
        reads=("prompt_suite",),
    ),
    _spec("base_generations", "base_images_show_something", _SHOWING, severity=WARN),
    _spec(
        "base_generations",
        "prompts_have_seeds_of_their_own",
        "Intervals, tests and the gate take the prompts of the suite for independent. Images of "
        "two prompts from the same noise are not, and the numbers look surer than they are. When "
        "this warns, give the named prompts other seeds.",
        severity=WARN,
        reads=("prompt_suite",),
    ),
]

TUNED_GENERATIONS = [
    _spec(
        "tuned_generations",
        "every_tuned_image_drawn",
        _DRAWN,
        severity=ERROR,
        reads=("prompt_suite",),
    ),
    _spec("tuned_generations", "tuned_images_show_something", _SHOWING, severity=WARN),
]


@dg.multi_asset_check(specs=BASE_GENERATIONS, can_subset=True)
def base_generations_checks(
    context: dg.AssetCheckExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    base_generations: Table,
    prompt_suite: Table,
) -> Iterator[dg.AssetCheckResult]:
    """The checks of `base_generations`."""
    from posterpipe.core import quality

    yield from _results(
        context,
        BASE_GENERATIONS,
        {
            "every_base_image_drawn": lambda: quality.missing_images(
                base_generations, prompt_suite, BASE_VARIANTS, DELAYED_VARIANTS[:1]
            ),
            "base_images_show_something": lambda: _blank_generations(
                context, deployment, base_generations
            ),
            "prompts_have_seeds_of_their_own": lambda: quality.prompts_sharing_seeds(prompt_suite),
        },
    )


@dg.multi_asset_check(specs=TUNED_GENERATIONS, can_subset=True)
def tuned_generations_checks(
    context: dg.AssetCheckExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    tuned_generations: Table,
    prompt_suite: Table,
) -> Iterator[dg.AssetCheckResult]:
    """The checks of `tuned_generations`."""
    from posterpipe.core import quality

    yield from _results(
        context,
        TUNED_GENERATIONS,
        {
            "every_tuned_image_drawn": lambda: quality.missing_images(
                tuned_generations, prompt_suite, TUNED_VARIANTS, DELAYED_VARIANTS[1:]
            ),
            "tuned_images_show_something": lambda: _blank_generations(
                context, deployment, tuned_generations
            ),
        },
    )


def _blank_generations(
    context: dg.AssetCheckExecutionContext, deployment: Deployment, generations: Any
) -> "Finding":
    from posterpipe.core import quality

    drawn = generations.loc[generations["status"] == "ok", "image"]
    return quality.blank_generations(
        generations,
        quality.stored_statistics(deployment.store, drawn, deployment.progress(context)),
        deployment.settings.checks.max_blocked_share,
    )


# -- scores ----------------------------------------------------------------------------------------

CLIP_SCORES = [
    _spec(
        "clip_scores",
        "cosines_are_possible",
        "A cosine lies within -1 and 1, and exactly the images with status ok have one. When this "
        "fails, the scorer is at fault, and no conclusion holds.",
        severity=ERROR,
    ),
    _spec(
        "clip_scores",
        "scores_are_current",
        "Every current image has its score, and no score is of a former image; how old they are is "
        "told beside. Dagster's freshness policies know times only, and old scores of unchanged "
        "images are right, so this compares, after each scoring and once a day. When it fails, "
        "materialize clip_scores. Limits: `checks.max_scoring_delay_hours` and "
        "`checks.max_score_age_days`.",
        severity=ERROR,
        reads=("base_generations", "tuned_generations"),
    ),
]


@dg.multi_asset_check(specs=CLIP_SCORES, can_subset=True)
def clip_scores_checks(
    context: dg.AssetCheckExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    clip_scores: Table,
    base_generations: Table,
    tuned_generations: Table,
) -> Iterator[dg.AssetCheckResult]:
    """The checks of `clip_scores`."""
    from posterpipe.core import quality
    from posterpipe.core.provenance import BaseModelsDiffer, base_and_tuned

    def freshness() -> "Finding":
        import pandas as pd

        limits = deployment.settings.checks
        held_back = ""
        try:
            generations = base_and_tuned(deployment.store, base_generations, tuned_generations)
        except BaseModelsDiffer as error:
            generations = pd.concat([base_generations, tuned_generations], ignore_index=True)
            held_back = str(error)
        return quality.score_freshness(
            clip_scores,
            generations,
            held_back=held_back,
            waiting_since=_in_tables_since(
                context.instance,
                deployment.store,
                set(quality.unscored(clip_scores, generations)["generation_key"].astype(str)),
            ),
            drawn_at=max(
                _materialized_at(context.instance, name)
                for name in ("base_generations", "tuned_generations")
            ),
            scored_at=_materialized_at(context.instance, "clip_scores"),
            now=dt.datetime.now(dt.UTC),
            max_delay_hours=limits.max_scoring_delay_hours,
            max_age_days=limits.max_score_age_days,
        )

    yield from _results(
        context,
        CLIP_SCORES,
        {
            "cosines_are_possible": lambda: quality.impossible_cosines(clip_scores),
            "scores_are_current": freshness,
        },
    )


# -- evidence --------------------------------------------------------------------------------------

TITLED_POSTERS = [
    _spec(
        "titled_posters",
        "every_title_is_set",
        "A title that no installed font can write, or that fits nowhere, leaves its poster without "
        "one. When this warns, do what each reason says; the other posters are lettered.",
        severity=WARN,
    ),
]

FIDELITY_SCORES = [
    _spec(
        "fidelity_scores",
        "every_image_is_measured",
        "A number that could not be measured makes the evidence incomplete, and the gate then "
        "holds a new checkpoint, however good. When this fails, mend what the reasons name and "
        "materialize the asset again: only what is missing is measured.",
        severity=ERROR,
    ),
    _spec(
        "fidelity_scores",
        "few_images_are_copies",
        "A model that has learned its posters by heart hands out other people's work. When this "
        "warns, look at the named images beside their nearest posters; the gate rejects the "
        "checkpoint. Limit: `gate.copy_limit`.",
        severity=WARN,
    ),
]

LEGIBILITY_SCORES = [
    _spec(
        "legibility_scores",
        "set_titles_are_read",
        "A title that an OCR cannot read is hard to read for people. When this warns, look at the "
        "named posters: the ground may be busy, or the letters small. Limit: "
        "`checks.min_titles_read`.",
        severity=WARN,
    ),
]

CHAMPION = [
    _spec(
        "champion",
        "served_checkpoint_is_sound",
        "What is served is there, and the gate did not reject it. When this fails, someone removed "
        "the checkpoint's files or wrote into the database: materialize the asset again, or go "
        "back with `posterpipe champion rollback`.",
        severity=ERROR,
    ),
]


@dg.multi_asset_check(specs=TITLED_POSTERS, can_subset=True)
def titled_posters_checks(
    context: dg.AssetCheckExecutionContext, titled_posters: Table
) -> Iterator[dg.AssetCheckResult]:
    """The checks of `titled_posters`."""
    from posterpipe.core import quality

    yield from _results(
        context,
        TITLED_POSTERS,
        {"every_title_is_set": lambda: quality.unset_titles(titled_posters)},
    )


@dg.multi_asset_check(specs=FIDELITY_SCORES, can_subset=True)
def fidelity_scores_checks(
    context: dg.AssetCheckExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    fidelity_scores: Table,
) -> Iterator[dg.AssetCheckResult]:
    """The checks of `fidelity_scores`."""
    from posterpipe.core import quality

    limit = deployment.settings.gate.copy_limit
    yield from _results(
        context,
        FIDELITY_SCORES,
        {
            "every_image_is_measured": lambda: quality.unmeasured_images(fidelity_scores),
            "few_images_are_copies": lambda: quality.copied_posters(fidelity_scores, limit),
        },
    )


@dg.multi_asset_check(specs=LEGIBILITY_SCORES, can_subset=True)
def legibility_scores_checks(
    context: dg.AssetCheckExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    legibility_scores: Table,
) -> Iterator[dg.AssetCheckResult]:
    """The checks of `legibility_scores`."""
    from posterpipe.core import quality

    limit = deployment.settings.checks.min_titles_read
    yield from _results(
        context,
        LEGIBILITY_SCORES,
        {"set_titles_are_read": lambda: quality.unread_titles(legibility_scores, limit)},
    )


@dg.multi_asset_check(specs=CHAMPION, can_subset=True)
def champion_checks(
    context: dg.AssetCheckExecutionContext,
    deployment: dg.ResourceParam[Deployment],
    champion: Table,
) -> Iterator[dg.AssetCheckResult]:
    """The checks of `champion`."""
    from posterpipe.core import quality
    from posterpipe.core.decisions import told_decisions, verdicts

    row = champion.iloc[0]
    folder = deployment.store_root / row["path"]
    there = row["kind"] == "base" or (folder / "model_index.json").is_file()
    verdict = verdicts(told_decisions(deployment.store_root)).get(row["checkpoint_id"], "")
    yield from _results(
        context,
        CHAMPION,
        {"served_checkpoint_is_sound": lambda: quality.rejected_champion(champion, verdict, there)},
    )


def _materialized_at(instance: dg.DagsterInstance, name: str) -> dt.datetime:
    """When an asset was last materialized; long ago where that is not on record."""
    record = instance.get_latest_materialization_event(dg.AssetKey(name))
    return dt.datetime.fromtimestamp(record.timestamp if record else 0, dt.UTC)


def _in_tables_since(
    instance: dg.DagsterInstance, store: "Store", keys: set[str]
) -> dict[str, dt.datetime]:
    """Since when the tables of generations hold these, as far as their versions are kept."""
    from posterpipe.core.store import TableMissing

    since: dict[str, dt.datetime] = {}
    for name in ("base_generations", "tuned_generations"):
        left, held = keys, {}
        records = instance.fetch_materializations(dg.AssetKey(name), limit=_VERSIONS).records
        for record in records if left else ():
            made = record.asset_materialization
            entry = made.metadata.get(TABLE_VERSION) if made else None
            if entry is None:
                break
            version = str(entry.value)
            try:
                if version not in held:
                    table = store.read_table(name, version)
                    held[version] = set(table["generation_key"].astype(str))
            except TableMissing:
                break
            left = left & held[version]
            if not left:
                break
            since |= dict.fromkeys(left, dt.datetime.fromtimestamp(record.timestamp, dt.UTC))
    return since


def score_freshness_schedule(settings: Settings) -> dg.ScheduleDefinition:
    """Runs `scores_are_current` on its own: stale scores would otherwise be noticed only by the run
    that replaces them."""
    key = dg.AssetCheckKey(dg.AssetKey("clip_scores"), "scores_are_current")
    job = dg.define_asset_job(
        "check_score_freshness",
        dg.AssetSelection.checks(key),
        description="Whether the scores are those of the current images, and how old they are.",
        tags=BY_HAND,
    )

    def score_freshness(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        for name in ("base_generations", "tuned_generations", "clip_scores"):
            if context.instance.get_latest_materialization_event(dg.AssetKey(name)) is None:
                return dg.SkipReason(f"nothing to check yet: {name} was never materialized")
        return dg.RunRequest(tags={REASON_TAG: "due, by its schedule"})

    decorated = dg.schedule(
        job=job,
        cron_schedule=settings.checks.freshness_cron,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Once a day: are the scores those of the current images?",
    )
    with cron_of("checks.freshness_cron", settings.checks.freshness_cron):
        return decorated(score_freshness)
