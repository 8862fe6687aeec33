"""What is wrong with posters, captions, images and scores: numbers, limits and names.

What belongs here: pure functions from tables to a `Finding`, and the statistics of an image. What
does not: the limits' values (`CheckSettings`), when a check runs and what it stops (`defs.checks`),
mending what was found.

A module for each thing that is looked at, and `finding` for what all of them return. A finding
names what is wrong by the names that people know: files of the landing folder, prompts and seeds.
"""

# ruff: noqa: F401  (the names that the package gives)
from __future__ import annotations

from posterpipe.core.quality.captions import (
    caption_diversity,
    distinct_n,
    ngrams,
    repeated_captions,
    repeated_share,
    words,
)
from posterpipe.core.quality.finding import Finding
from posterpipe.core.quality.generations import (
    impossible_cosines,
    missing_images,
    prompts_sharing_seeds,
    score_freshness,
    unscored,
)
from posterpipe.core.quality.images import (
    blank_generations,
    blank_reason,
    blank_training_images,
    image_statistics,
    stored_statistics,
)
from posterpipe.core.quality.posters import (
    enough_posters,
    failed_share,
    near_duplicates,
    rejected_share,
    some_held_out,
    source_names,
)
from posterpipe.core.quality.scores import (
    copied_posters,
    rejected_champion,
    unmeasured_images,
    unread_titles,
    unset_titles,
)
from posterpipe.core.quality.training_set import (
    enough_rows,
    holdout_overlap,
    incomplete_rows,
    long_captions,
    shrinkage,
)
