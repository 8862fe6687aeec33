"""What must hold before the next step is worth its cost.

What belongs here: asset checks in Dagster's form: which asset, blocking or not, what a check
protects and what to do when it fails. What does not: the numbers (`core.quality`), the limits
(settings `checks`), how old scores are (`freshness`), tests of the reports, which dbt has
(`dbt_like_reports`).

The checks of one asset run in one step, since a step of its own costs each of them a process and
several seconds. A blocking check stops what follows in its run, and automation, which counts any
failure whatever its severity: so blocking checks fail only for what is worth a stop, and warnings
do not block.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import dagster as dg

from posterpipe.core.variants import BASE_VARIANTS, DELAYED_VARIANTS, TUNED_VARIANTS
from posterpipe.defs.freshness import scores_are_current
from posterpipe.defs.metadata import table_preview
from posterpipe.defs.resources import Deployment, Table
from posterpipe.defs.retraining import captions_trained_on
from posterpipe.settings import CheckSettings, Settings

if TYPE_CHECKING:
    from posterpipe.core import quality
    from posterpipe.core.quality import Finding

SEVERITY = "severity"
"""Metadata entry of a check: as what it fails."""

WARN, ERROR = dg.AssetCheckSeverity.WARN, dg.AssetCheckSeverity.ERROR


@dataclass(frozen=True)
class Look:
    """What the checks of an asset look at."""

    context: dg.AssetCheckExecutionContext
    deployment: Deployment
    table: Table
    """Of the asset."""
    tables: Mapping[str, Table]
    """That, and those that its checks read beside it, by asset."""

    @property
    def settings(self) -> Settings:
        return self.deployment.settings

    @property
    def limits(self) -> CheckSettings:
        return self.settings.checks

    @property
    def poster_names(self) -> dict[str, str]:
        """Names of the posters' files by poster."""
        return quality.source_names(self.tables["raw_posters"])

    @property
    def statistics(self) -> dict[str, dict[str, Any]]:
        """Of the table's images, each measured once."""
        return quality.stored_statistics(
            self.deployment.store,
            self.table.loc[self.table["status"] == "ok", "image"],
            self.deployment.progress(self.context),
        )


@dataclass(frozen=True)
class Check:
    """A check of an asset."""

    name: str
    description: str
    """What it protects, and what to do when it fails."""
    finding: "Callable[[Look], Finding]"
    _: KW_ONLY
    severity: dg.AssetCheckSeverity
    blocking: bool = False
    reads: tuple[str, ...] = ()
    """Other assets whose tables it looks at."""

    def spec(self, asset: str) -> dg.AssetCheckSpec:
        """It as Dagster knows it."""
        return dg.AssetCheckSpec(
            self.name,
            asset=asset,
            description=self.description,
            blocking=self.blocking,
            additional_deps=self.reads,
            metadata={SEVERITY: self.severity.value},
        )

    def result(self, look: Look) -> dg.AssetCheckResult:
        """What it finds."""
        finding = self.finding(look)
        return dg.AssetCheckResult(
            passed=finding.passed,
            check_name=self.name,
            severity=self.severity,
            description=finding.description,
            metadata={
                "expected": finding.expected,
                "actual": finding.actual,
                "offenders": table_preview(finding.offenders),
                "offending": len(finding.offenders),
                **finding.numbers,
            },
        )


def checks_of(asset: str, *checks: Check) -> dg.AssetChecksDefinition:
    """The checks of an asset as one step, which runs those that were selected."""
    specs = [check.spec(asset) for check in checks]
    read = {asset, *(name for check in checks for name in check.reads)}

    @dg.multi_asset_check(
        name=f"{asset}_checks",
        description=f"The checks of `{asset}`.",
        specs=specs,
        ins={name: dg.AssetKey(name) for name in sorted(read)},
        can_subset=True,
    )
    def run(
        context: dg.AssetCheckExecutionContext,
        deployment: dg.ResourceParam[Deployment],
        **tables: Table,
    ) -> Iterator[dg.AssetCheckResult]:
        global quality  # pandas comes with it, which loading the definitions must not load
        from posterpipe.core import quality

        look = Look(context, deployment, tables[asset], tables)
        for check, spec in zip(checks, specs, strict=True):
            if spec.key in context.selected_asset_check_keys:
                yield check.result(look)

    return run


# -- posters and their images ----------------------------------------------------------------------

raw_posters_checks = checks_of(
    "raw_posters",
    Check(
        "enough_usable_posters",
        "A fine-tuning on fewer posters than `checks.min_posters` learns them by heart. When this "
        "fails, put more into the landing folder or mend those that were refused; nothing that "
        "follows runs until then.",
        lambda look: quality.enough_posters(look.table, look.limits.min_posters),
        severity=ERROR,
        blocking=True,
    ),
    Check(
        "few_rejected_files",
        "Tells a delivery that went wrong from single bad files, which never stop the others. When "
        "this warns, mend or remove the files as each reason says. Limit: "
        "`checks.max_rejected_share`.",
        lambda look: quality.rejected_share(look.table, look.limits.max_rejected_share),
        severity=WARN,
    ),
    Check(
        "few_near_duplicates",
        "What is in the set twice is learned twice. Near-duplicates are flagged, not dropped: when "
        "this warns, look at the pairs and remove the worse poster of each. Limit: "
        "`checks.max_near_duplicate_share`.",
        lambda look: quality.near_duplicates(look.table, look.limits.max_near_duplicate_share),
        severity=WARN,
    ),
)

holdout_posters_checks = checks_of(
    "holdout_posters",
    Check(
        "there_are_holdout_posters",
        "Without posters that were never trained on, nothing tells learning from copying, and no "
        "leak into the training set is found. Training works all the same: when this warns, put "
        "some film posters into the holdout folder, or mend those that were refused.",
        lambda look: quality.some_held_out(look.table, look.settings.path(look.settings.holdout)),
        severity=WARN,
    ),
)

resized_posters_checks = checks_of(
    "resized_posters",
    Check(
        "training_images_show_something",
        "A black, white or one-coloured training image is a broken poster, and many of them are a "
        "broken decoder: neither is worth captioning or training on. When this fails, export the "
        "named posters again or remove them. Limit: `checks.max_blank_share`.",
        lambda look: quality.blank_training_images(
            look.table, look.poster_names, look.statistics, look.limits.max_blank_share
        ),
        severity=ERROR,
        blocking=True,
        reads=("raw_posters",),
    ),
    Check(
        "few_images_failed",
        "Single posters of which no training image can be made stop nothing; many of them are a "
        "full disk, too little memory or lost files, and a training on the rest would be wasted. "
        "When this fails, do what the reasons say. Limit: `checks.max_failed_share`.",
        lambda look: quality.failed_share(
            look.table, look.poster_names, look.limits.max_failed_share, "training images"
        ),
        severity=ERROR,
        blocking=True,
        reads=("raw_posters",),
    ),
)

# -- captions and the training set -----------------------------------------------------------------

poster_captions_checks = checks_of(
    "poster_captions",
    Check(
        "captions_do_not_repeat",
        "BLIP is known to say a phrase over and over, and the same of several posters; such "
        "captions teach little. When this warns, write better ones for the named posters. Limits: "
        "`checks.max_repeated_share` (word pairs of one caption) and `checks.max_shared_captions`.",
        lambda look: quality.repeated_captions(
            look.table,
            look.poster_names,
            max_repeated_share=look.limits.max_repeated_share,
            max_shared=look.limits.max_shared_captions,
        ),
        severity=WARN,
        reads=("raw_posters",),
    ),
    Check(
        "captions_are_diverse",
        "When nearly all posters have one caption, the captioner sees nothing, and a training "
        "would be wasted. When this fails, look at the captioner and the training images. Limit: "
        "`checks.min_distinct_captions`.",
        lambda look: quality.caption_diversity(
            look.table, look.poster_names, look.limits.min_distinct_captions
        ),
        severity=ERROR,
        blocking=True,
        reads=("raw_posters",),
    ),
    Check(
        "few_captions_failed",
        "A poster without a caption is not trained on. Single ones stop nothing; many of them are "
        "a captioner that broke half-way, and a training on the rest would be wasted. When this "
        "fails, do what the reasons say, or write the captions yourself. Limit: "
        "`checks.max_failed_share`.",
        lambda look: quality.failed_share(
            look.table, look.poster_names, look.limits.max_failed_share, "captions"
        ),
        severity=ERROR,
        blocking=True,
        reads=("raw_posters",),
    ),
)


def _long_captions(look: Look) -> "Finding":
    from posterpipe.core.models import locate
    from posterpipe.core.sampler import text_limit

    count_tokens, max_tokens = text_limit(locate(look.settings.base_model, look.settings.root))
    return quality.long_captions(
        look.table, count_tokens, max_tokens, look.limits.max_long_captions
    )


training_csv_checks = checks_of(
    "training_csv",
    Check(
        "enough_training_rows",
        "Posters may be lost between landing folder and training set: images that cannot be made, "
        "captions that fail. When this fails, read the reasons in resized_posters and "
        "poster_captions. Limit: `checks.min_posters`.",
        lambda look: quality.enough_rows(
            look.table, look.tables["raw_posters"], look.limits.min_posters
        ),
        severity=ERROR,
        blocking=True,
        reads=("raw_posters",),
    ),
    Check(
        "few_posters_lost",
        "A disk that is not mounted or a delivery that broke off looks like posters that people "
        "removed, and a night would be spent on the rest. Compared with the set that was trained "
        "on last, where its posters came from the same place. When this fails, see whether all "
        "posters are there; if they were removed on purpose, raise the limit until the next "
        "training. Limit: `checks.max_lost_share`.",
        lambda look: quality.shrinkage(
            look.table,
            captions_trained_on(look.context.instance, look.deployment),
            look.limits.max_lost_share,
        ),
        severity=ERROR,
        blocking=True,
    ),
    Check(
        "every_row_has_image_and_caption",
        "The trainer stops at a row without its image or caption, which is better known before a "
        "GPU is taken. When this fails, someone changed the folder: materialize training_csv "
        "again.",
        lambda look: quality.incomplete_rows(
            look.table, look.deployment.store_root / "training_sets"
        ),
        severity=ERROR,
        blocking=True,
    ),
    Check(
        "captions_fit_the_text_encoder",
        "Words beyond the text encoder's limit are cut, as every Stable Diffusion does: a GPU "
        "would be paid for learning images without what someone wrote about them. BLIP's captions "
        "are bounded when they are made, so it is people's captions or a long template. When this "
        "fails, shorten the named captions. Limit: `checks.max_long_captions`.",
        _long_captions,
        severity=ERROR,
        blocking=True,
    ),
    Check(
        "no_poster_is_held_out",
        "Scores on the holdout posters say how well a model does with what it has never seen; a "
        "poster in both sets makes them worthless, and only a new training mends it. Compared by "
        "bytes and by perceptual hash. When this fails, remove the poster from one of the folders. "
        "Limit: `checks.holdout_distance`.",
        lambda look: quality.holdout_overlap(
            look.table,
            look.tables["raw_posters"],
            look.tables["holdout_posters"],
            look.limits.holdout_distance,
        ),
        severity=ERROR,
        blocking=True,
        reads=("raw_posters", "holdout_posters"),
    ),
)

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

base_generations_checks = checks_of(
    "base_generations",
    Check(
        "every_base_image_drawn",
        _DRAWN,
        lambda look: quality.missing_images(
            look.table, look.tables["prompt_suite"], BASE_VARIANTS, DELAYED_VARIANTS[:1]
        ),
        severity=ERROR,
        reads=("prompt_suite",),
    ),
    Check(
        "base_images_show_something",
        _SHOWING,
        lambda look: quality.blank_generations(
            look.table, look.statistics, look.limits.max_blocked_share
        ),
        severity=WARN,
    ),
    Check(
        "prompts_have_seeds_of_their_own",
        "Intervals, tests and the gate take the prompts of the suite for independent. Images of "
        "two prompts from the same noise are not, and the numbers look surer than they are. When "
        "this warns, give the named prompts other seeds.",
        lambda look: quality.prompts_sharing_seeds(look.tables["prompt_suite"]),
        severity=WARN,
        reads=("prompt_suite",),
    ),
)

tuned_generations_checks = checks_of(
    "tuned_generations",
    Check(
        "every_tuned_image_drawn",
        _DRAWN,
        lambda look: quality.missing_images(
            look.table, look.tables["prompt_suite"], TUNED_VARIANTS, DELAYED_VARIANTS[1:]
        ),
        severity=ERROR,
        reads=("prompt_suite",),
    ),
    Check(
        "tuned_images_show_something",
        _SHOWING,
        lambda look: quality.blank_generations(
            look.table, look.statistics, look.limits.max_blocked_share
        ),
        severity=WARN,
    ),
)

# -- scores ----------------------------------------------------------------------------------------

clip_scores_checks = checks_of(
    "clip_scores",
    Check(
        "cosines_are_possible",
        "A cosine lies within -1 and 1, and exactly the images with status ok have one. When this "
        "fails, the scorer is at fault, and no conclusion holds.",
        lambda look: quality.impossible_cosines(look.table),
        severity=ERROR,
    ),
    Check(
        "scores_are_current",
        "Every current image has its score, and no score is of a former image; how old they are is "
        "told beside. Dagster's freshness policies know times only, and old scores of unchanged "
        "images are right, so this compares, after each scoring and once a day. When it fails, "
        "materialize clip_scores. Limits: `checks.max_scoring_delay_hours` and "
        "`checks.max_score_age_days`.",
        lambda look: scores_are_current(
            look.context.instance,
            look.deployment,
            look.table,
            look.tables["base_generations"],
            look.tables["tuned_generations"],
        ),
        severity=ERROR,
        reads=("base_generations", "tuned_generations"),
    ),
)

# -- evidence --------------------------------------------------------------------------------------

titled_posters_checks = checks_of(
    "titled_posters",
    Check(
        "every_title_is_set",
        "A title that no installed font can write, or that fits nowhere, leaves its poster without "
        "one. When this warns, do what each reason says; the other posters are lettered.",
        lambda look: quality.unset_titles(look.table),
        severity=WARN,
    ),
)

fidelity_scores_checks = checks_of(
    "fidelity_scores",
    Check(
        "every_image_is_measured",
        "A number that could not be measured makes the evidence incomplete, and the gate then "
        "holds a new checkpoint, however good. When this fails, mend what the reasons name and "
        "materialize the asset again: only what is missing is measured.",
        lambda look: quality.unmeasured_images(look.table),
        severity=ERROR,
    ),
    Check(
        "few_images_are_copies",
        "A model that has learned its posters by heart hands out other people's work. When this "
        "warns, look at the named images beside their nearest posters; the gate rejects the "
        "checkpoint. Limit: `gate.copy_limit`.",
        lambda look: quality.copied_posters(look.table, look.settings.gate.copy_limit),
        severity=WARN,
    ),
)

legibility_scores_checks = checks_of(
    "legibility_scores",
    Check(
        "set_titles_are_read",
        "A title that an OCR cannot read is hard to read for people. When this warns, look at the "
        "named posters: the ground may be busy, or the letters small. Limit: "
        "`checks.min_titles_read`.",
        lambda look: quality.unread_titles(look.table, look.limits.min_titles_read),
        severity=WARN,
    ),
)


def _rejected_champion(look: Look) -> "Finding":
    from posterpipe.core.champion.decisions import read_mirrored_decisions, verdicts

    row = look.table.iloc[0]
    folder = look.deployment.store_root / row["path"]
    there = row["kind"] == "base" or (folder / "model_index.json").is_file()
    verdict = verdicts(read_mirrored_decisions(look.deployment.store_root)).get(
        row["checkpoint_id"], ""
    )
    return quality.rejected_champion(look.table, verdict, there)


champion_checks = checks_of(
    "champion",
    Check(
        "served_checkpoint_is_sound",
        "What is served is there, and the gate did not reject it. When this fails, someone removed "
        "the checkpoint's files or wrote into the database: materialize the asset again, or go "
        "back with `posterpipe champion rollback`.",
        _rejected_champion,
        severity=ERROR,
    ),
)
