"""The held-out posters as a training set that is never trained on.

What belongs here: captions of held-out posters, and bringing the table `holdout_posters` into the
form in which the trainer reads sets. What does not: reading the holdout folder (`landing`), the
loss on the set (`dreambooth.holdout`), scores against it (`metrics`).

The bytes, the captions and the images are those of the table, whatever lies in the holdout folder
by now. What is derived from it is named in tables of its own, so that `garbage` knows that it is
needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from posterpipe.core.captioner import caption_posters
from posterpipe.core.captions.people import captions_by_poster, read_human_captions
from posterpipe.core.images import resize_posters
from posterpipe.core.posters.listing import Entry, Place
from posterpipe.core.progress import Progress
from posterpipe.core.store import Store, cells
from posterpipe.core.training.training_set import TrainingSetEmpty, build_training_set
from posterpipe.settings import ImageSettings, Settings

IMAGES_TABLE = "holdout_images"
"""Table of the store that names the resized held-out posters; no asset."""

SET_TABLE = "holdout_set"
"""The same, of the set that a training measures its loss on."""


def with_captions(
    posters: pd.DataFrame,
    place: Place,
    entries: Sequence[Entry],
    store: Store,
    progress: Progress,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of held-out posters with a column `caption`: what the text file beside a poster
    says, "" without one; and the table of these files (`captions.people.read_human_captions`).

    `entries`: the listing of `place`. `captions.csv` does not count: it names files of the landing
    folder.
    """
    written = read_human_captions(place, None, store, progress, entries=entries)
    accepted = written[written["status"] == "ok"]
    captions = dict(cells(accepted, "source_name", "caption"))
    names = [str(name) for name in posters["source_name"].tolist()]
    return posters.assign(caption=[captions.get(name, "") for name in names]), written


def resized_holdout(
    store: Store, posters: pd.DataFrame, settings: ImageSettings, progress: Progress
) -> pd.DataFrame:
    """The table of `images.resize_posters` for the table `holdout_posters`."""
    resized = resize_posters(store, posters, settings, progress)
    store.write_table(IMAGES_TABLE, resized)
    return resized


def build_holdout_set(
    store: Store, posters: pd.DataFrame, settings: Settings, progress: Progress
) -> tuple[Path | None, str]:
    """The folder and version of the held-out posters, resized and captioned like those trained on;
    (None, "") where there are none that can be used.

    `posters`: the table `holdout_posters`. Those that were resized and captioned before are not
    again. Raises ModelMissing for the captioner.
    """
    if posters.empty:
        return None, ""
    resized = resized_holdout(store, posters, settings.images, progress)
    captions = caption_posters(
        store,
        resized,
        settings.captioner,
        settings.root,
        progress,
        human=captions_by_poster(posters, _by_people(posters)),
    )
    try:
        table, folder, version = build_training_set(
            store,
            resized,
            captions,
            template=settings.captioner.template,
            trigger=settings.captioner.trigger,
        )
    except TrainingSetEmpty:
        return None, ""
    store.write_table(SET_TABLE, table.assign(training_set=version))
    return folder, version


def _by_people(posters: pd.DataFrame) -> pd.DataFrame:
    """The captions of the table as `captions_by_poster` wants them."""
    if "caption" not in posters:  # a table that an older posterpipe made
        posters = posters.assign(caption="")
    return posters.loc[posters["caption"] != "", ["source_name", "caption"]].assign(status="ok")
