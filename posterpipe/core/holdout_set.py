"""The held-out posters as a training set that is never trained on.

What belongs here: bringing the holdout folder into the form in which the trainer reads sets. What
does not: the loss on it (`dreambooth.holdout`), scores against it (`metrics`).
"""

from __future__ import annotations

from pathlib import Path

from posterpipe.core.captioner import caption_posters
from posterpipe.core.captions import captions_by_poster, read_human_captions
from posterpipe.core.images import resize_posters
from posterpipe.core.landing import scan_holdout
from posterpipe.core.listing import HOLDOUT, open_place
from posterpipe.core.progress import Progress
from posterpipe.core.store import Store
from posterpipe.core.training_set import TrainingSetEmpty, build_training_set
from posterpipe.settings import Settings


def build_holdout_set(
    store: Store, settings: Settings, progress: Progress
) -> tuple[Path | None, str]:
    """The folder and version of the held-out posters, resized and captioned like those trained on;
    (None, "") where the folder `holdout` has none that can be used.

    Posters that were resized and captioned before are not again. Raises ModelMissing for the
    captioner.
    """
    place = open_place(settings.path(settings.holdout), role=HOLDOUT)
    posters = scan_holdout(place, settings.images, store, progress)
    if posters.empty:
        return None, ""
    written = read_human_captions(place, settings.path(settings.captions), store, progress)
    resized = resize_posters(store, posters, settings.images, progress)
    captions = caption_posters(
        store,
        resized,
        settings.captioner,
        settings.root,
        progress,
        human=captions_by_poster(posters, written),
    )
    try:
        _, folder, version = build_training_set(
            store,
            resized,
            captions,
            template=settings.captioner.template,
            trigger=settings.captioner.trigger,
        )
    except TrainingSetEmpty:
        return None, ""
    return folder, version
