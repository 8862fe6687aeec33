"""Fidelity: whether images are like the film posters they should be like, and not copies of them.

What belongs here: similarity to the holdout and to the training posters, the overfit gap, and copy
detection with its calibration. What does not: the encoders (`encoders`), how far images of one
prompt differ (`diversity`), what a checkpoint's numbers mean for it (`gate`).

As in DreamBooth's evaluation (Ruiz et al. 2023), similarity to a set of posters is the mean cosine
between the embeddings of an image and of each poster. A model that has learnt the style comes as
near to posters it has never seen (holdout) as to those it was trained on; the difference is the
overfit gap. How near is too near to one training poster is not guessed: posters of the holdout set
are no copies, and how near they come to the training posters is the yardstick. Whether it would
tell a copy is measured, too, on training posters that were altered a little: where holdout posters
are few, or lie far apart, it tells none.

A checkpoint is held against the posters that it was trained on, whatever lies in the folders by
now, and holdout posters are only those that none of the compared checkpoints was trained on
(`never_trained_on`): who has seen them would be praised for it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from posterpipe.core.images import UNREADABLE, hash_distance, perceptual_hash
from posterpipe.core.metrics.base import (
    Measurement,
    Metric,
    digest,
    encoder_metric,
    encoding_failures,
    image_files,
    score_rows,
)
from posterpipe.core.metrics.encoders import (
    Alteration,
    Embeddings,
    encoder_family,
    encoder_id,
    kept_embeddings,
)
from posterpipe.core.parallel import parallel_map
from posterpipe.core.progress import Progress
from posterpipe.core.statistics import student_quantile
from posterpipe.core.store import Store, compute_missing
from posterpipe.settings import EvidenceSettings, ModelRef, ScorerSettings

FIDELITY_VERSION = 1
"""Raised when the same embeddings would give other numbers."""

HASH_VERSION = 1

CONTROL_VERSION = 1
"""Raised when training posters are altered in another way."""

CONTROL_POSTERS = 64
"""Training posters that are altered at most, to see whether they are found."""

UNRELATED_BITS = 10
"""Perceptual hashes that differ in more of their 64 bits say that pictures are different ones
(Zauner 2010 finds 0.1 to 0.2 of the bits for altered copies); a calibration may only lower this."""

SAME_BITS = 2
"""Perceptual hashes that differ in no more say that it is one picture, whatever is known of other
posters: resizing and JPEG change up to 2, while posters of one layout that are no copies come as
near as 6."""

HASH_POSTERS = 12
"""Holdout posters, at least, that tell from how many bits on a hash is that of a copy. The nearest
of n posters is a yardstick that one new image of n + 1 passes by chance. Of the demo's 16 holdout
posters, subsets of 8 made copies of more than one image of 20 of a checkpoint that copies nothing
one time of 10, subsets of 12 one time of 400."""

SAME_COSINE = 1 - 1e-6
"""From here on, images are one picture in all that float32 tells."""

NO_HOLDOUT = (
    "there is no readable holdout poster that no compared checkpoint was trained on; put film "
    "posters that are in no training set into the folder `holdout`"
)
NO_TRAINING = (
    "which posters the checkpoint was trained on is not known, or none of them can be read any "
    "more; run the job `retrain`"
)
"""Why nothing could be compared, and what to do."""

_CUT = 0.02
"""Share of a poster's width and height that `altered` cuts off at each side."""

_QUALITY = 75
"""Of the JPEG that `altered` makes."""

_SHORTFALL = 1e-7
"""Keeps a cosine of 1 from an infinite place on the scale of calibration: float32 rounding."""


@dataclass(frozen=True)
class Posters:
    """A set of posters that images are compared with."""

    name: str
    """`holdout` or `training`."""
    files: Mapping[str, Path]
    """Content hash of each image, and where it lies."""

    @property
    def digest(self) -> str:
        """8 hex digits of which images they are."""
        return digest(self.files)


class SetSimilarity:
    """Mean cosine between an image and every poster of a set. Made once, called on batches.

    `posters`: embeddings of length 1, float32 (posters, dimension), at least one.
    """

    def __init__(self, posters: np.ndarray) -> None:
        # The mean of the cosines is the cosine-like product with the mean of the embeddings.
        self._mean = posters.mean(axis=0, dtype=np.float64)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float64 (batch,) in -1..1, of embeddings of length 1, float32 (batch, dimension)."""
        return np.clip(images @ self._mean, -1.0, 1.0)


class NearestPoster:
    """The poster that an image is nearest to. Made once, called on batches.

    `posters`: embeddings of length 1, float32 (posters, dimension), at least one.
    """

    def __init__(self, posters: np.ndarray) -> None:
        self._posters = np.asarray(posters, dtype=np.float64)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cosine with the nearest poster, float64 (batch,), and its index, int (batch,)."""
        similarities = np.clip(images @ self._posters.T, -1.0, 1.0)
        nearest = similarities.argmax(axis=1)
        return similarities[np.arange(len(images)), nearest], nearest


@dataclass(frozen=True)
class CopyCalibration:
    """How near posters that are no copies come to a training poster, and what is nearer than that.

    Similarities are brought to a scale without bounds, -log(1 - cosine), on which they are roughly
    normal, and the bound is that of a prediction interval: of posters that are no copies, a share
    of `alarm` at most lies above it. With fewer than three posters nothing can be said, and with
    few the bound lies so high that no copy reaches it: `sensitivity` says so.
    """

    similarities: tuple[float, ...]
    """Cosines of each holdout poster that is no copy with its nearest training poster."""
    alarm: float
    control: tuple[float, ...] = ()
    """Cosines of `altered` training posters with their nearest training poster."""

    @property
    def threshold(self) -> float:
        """The cosine from which an image counts as a copy; 1 is never exceeded, NaN: not known."""
        places = _open_scale(np.asarray(self.similarities, dtype=float))
        return math.nan if len(places) < 3 else float(1 - math.exp(-_bound(places, self.alarm)))

    @property
    def sensitivity(self) -> float:
        """Share of `control` that counts as copies; NaN where the threshold is not known."""
        if math.isnan(self.threshold) or not self.control:
            return math.nan
        return float(self.is_copy(np.asarray(self.control)).mean())

    def is_copy(self, similarities: np.ndarray) -> np.ndarray:
        """bool (batch,): above the threshold."""
        # What equals its poster in all float32 tells is one, however wide the holdout set spreads.
        same = np.asarray(similarities) >= SAME_COSINE
        threshold = self.threshold
        return same if math.isnan(threshold) else same | (np.asarray(similarities) > threshold)


def are_strangers(cosines: np.ndarray, alarm: float) -> np.ndarray:
    """Which posters are no copies themselves, by their `cosines` with the nearest training poster:
    bool (n,).

    One that was altered a little passes for no copy by its bytes and its hash, and alone would lift
    the bound beyond all copies of its kind. So the nearest poster is left out while it lies beyond
    the bound of the others, at `alarm` divided by their number: of sets without a copy, a share of
    `alarm` loses one.
    """
    order = np.argsort(cosines)
    places = _open_scale(cosines[order])
    count = int((cosines < SAME_COSINE).sum())
    while count > 3 and places[count - 1] > _bound(places[: count - 1], alarm / count):
        count -= 1
    strangers = np.zeros(len(cosines), dtype=bool)
    strangers[order[:count]] = True
    return strangers


def altered(image: Image.Image) -> Image.Image:
    """A copy that differs about as much as one does that comes out of the VAE: a fiftieth is cut
    off at each side, the rest brought back to size and compressed."""
    width, height = image.size
    across, down = max(1, round(_CUT * width)), max(1, round(_CUT * height))
    inside = image.convert("RGB").crop((across, down, width - across, height - down))
    buffer = io.BytesIO()
    inside.resize(image.size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=_QUALITY)
    return Image.open(buffer)


ALTERED = Alteration(f"altered.v{CONTROL_VERSION}", altered)


def _bound(places: np.ndarray, alarm: float) -> float:
    """Upper end of the one-sided prediction interval of one more place, Student's t."""
    n = len(places)
    spread = float(places.std(ddof=1)) * math.sqrt(1 + 1 / n)
    return float(places.mean()) + student_quantile(1 - alarm, n - 1) * spread


def _open_scale(cosines: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(1 - cosines, _SHORTFALL))


def hash_threshold(distances: Sequence[int]) -> int:
    """Bits up to which a perceptual hash counts as a copy's, given holdout-versus-training ones.

    As `suspicious_bits` with HASH_POSTERS or more; with fewer SAME_BITS, so that pictures that only
    share a layout do not count.
    """
    bits = suspicious_bits(distances)
    return bits if len(distances) >= HASH_POSTERS else min(bits, SAME_BITS)


def suspicious_bits(distances: Sequence[int]) -> int:
    """Bits up to which a perceptual hash may be that of a copy, given holdout-versus-training ones.

    One bit less than the nearest poster that is no copy, and never more than UNRELATED_BITS.
    """
    return min([UNRELATED_BITS, *(distance - 1 for distance in distances)])


@dataclass(frozen=True, kw_only=True)
class Fidelity(Measurement):
    """What comparing generations with posters gave. The similarities to the holdout posters and to
    the nearest training poster, by the first encoder, have the roles fidelity and copies."""

    nearest: pd.DataFrame
    """One row a generation that is ok and an encoder: generation_key, metric_id (of the
    similarity), nearest_poster (content hash of the training image), similarity,
    similarity_threshold, copy_sensitivity (`CopyCalibration.sensitivity`), hash_poster,
    hash_distance (bits), hash_threshold, copied (either says so), copied_by ("cosine" where the
    similarity says so, else "hash"; "" where it is not copied), copy_unsure (it is not copied, and
    its hash may be a copy's: too few holdout posters say, see `hash_threshold`).

    None of its columns is a part of metric_id, as the holdout posters are none: the warehouse keeps
    the latest row of a key, so that another calibration scores nothing anew."""
    calibrations: dict[str, CopyCalibration]
    """By encoder id."""
    lost: int
    """Training posters that cannot be read, so that copies of them are not seen."""
    nearest_id: str
    """metric_id of the similarity to the nearest training poster, by the first encoder."""


def evidence_encoders(evidence: EvidenceSettings, scorer: ModelRef) -> list[ScorerSettings]:
    """The encoders behind similarities between images: those configured, else the scorer's."""
    return [
        ScorerSettings(
            model=model,
            batch_size=evidence.batch_size,
            preprocessing=evidence.preprocessing,
            precision=evidence.precision,
        )
        for model in evidence.image_encoders or (scorer,)
    ]


def never_trained_on(
    store: Store,
    holdout: Posters,
    training: Iterable[Posters],
    progress: Progress,
    *,
    same_bits: int,
) -> Posters:
    """The holdout posters that are in none of these training sets: neither by content, nor with a
    perceptual hash that differs in up to `same_bits` (-1: by content only)."""
    sets = list(training)
    files = {**holdout.files}
    for posters in sets:
        files |= posters.files
    hashes = _hashes(store, files, progress)
    unseen = {
        key: file
        for key, file in holdout.files.items()
        if not any(_is_seen(key, posters, hashes, same_bits) for posters in sets)
    }
    return Posters(holdout.name, unseen)


def compare_with_posters(
    store: Store,
    generations: pd.DataFrame,
    training: Posters,
    holdout: Posters,
    encoders: Sequence[ScorerSettings],
    root: Path,
    progress: Progress,
    *,
    alarm: float,
) -> Fidelity:
    """Similarities, overfit gap, nearest training poster and copies, for every generation.

    `generations` as of `generations.COLUMNS`; `training`: what their models were trained on;
    `holdout`: what none was (`never_trained_on`). Posters in the form in which they were trained
    on, so that a shape is not mistaken for a style. Only embeddings and hashes that the store lacks
    are computed. A poster that cannot be read is left out of its set, which is another one then:
    ids of metrics name the posters that were compared. With no readable one in either set, every
    row has failed with the reason. Raises ModelMissing.
    """
    drawn = generations[generations["status"] == "ok"]
    control = dict(sorted(training.files.items())[:CONTROL_POSTERS])
    everything = {**image_files(store, drawn), **training.files, **holdout.files}
    hashes = _hashes(store, everything, progress)
    lost: set[str] = set()
    metrics: list[Metric] = []
    scores: list[pd.DataFrame] = []
    nearest: list[pd.DataFrame] = []
    calibrations: dict[str, CopyCalibration] = {}
    measures: list[dict[str, Metric]] = []
    for settings in encoders:
        embeddings = kept_embeddings(store, settings, root, everything, progress)
        again = kept_embeddings(store, settings, root, control, progress, alteration=ALTERED)
        measured = _ByEncoder(settings, root, embeddings, again, training, holdout, alarm)
        measures.append(measured.measures)
        for key, metric in measured.measures.items():
            metrics.append(metric)
            values, failures = measured.values(key, drawn)
            scores.append(score_rows(generations, metric.metric_id, values, failures))
        calibrations[measured.encoder] = measured.calibration
        nearest.append(measured.nearest(drawn, hashes))
        lost |= training.files.keys() - embeddings.vectors.keys()
    hash_metric = _hash_metric(digest(key for key in training.files if key in hashes))
    metrics.append(hash_metric)
    distances = _hash_distances(drawn, hashes, training)
    unreadable = {str(key): f"the image {UNREADABLE}" for key in drawn["generation_key"]}
    scores.append(score_rows(generations, hash_metric.metric_id, distances, unreadable))
    nearest_id = measures[0]["nearest"].metric_id
    return Fidelity(
        metrics=metrics,
        scores=pd.concat(scores, ignore_index=True),
        roles={measures[0]["holdout"].metric_id: "fidelity", nearest_id: "copies"},
        nearest=pd.concat(nearest, ignore_index=True),
        calibrations=calibrations,
        lost=len(lost),
        nearest_id=nearest_id,
    )


class _ByEncoder:
    """One encoder's numbers."""

    def __init__(
        self,
        settings: ScorerSettings,
        root: Path,
        embeddings: Embeddings,
        control: Embeddings,
        training: Posters,
        holdout: Posters,
        alarm: float,
    ) -> None:
        """`control`: embeddings of `altered` training posters."""
        self.embeddings = embeddings
        self.encoder = encoder_id(settings, root)
        self.training = training
        self.holdout = holdout
        self.seen = [key for key in training.files if key in embeddings.vectors]
        self.unseen = [key for key in holdout.files if key in embeddings.vectors]
        self.measures = _measures(settings, root, digest(self.seen), digest(self.unseen))
        self.calibration = CopyCalibration((), alarm)
        self.strangers = list(holdout.files)
        if self.seen and self.unseen:
            similarities, _ = self._nearest(embeddings.rows(self.unseen))
            told = are_strangers(similarities, alarm)
            copies = {key for key, is_told in zip(self.unseen, told, strict=True) if not is_told}
            self.strangers = [key for key in holdout.files if key not in copies]
            found = np.zeros(0)
            if control.vectors:
                found, _ = self._nearest(control.rows(list(control.vectors)))
            self.calibration = CopyCalibration(
                tuple(similarities[told].tolist()), alarm, tuple(found.tolist())
            )

    def values(self, metric: str, drawn: pd.DataFrame) -> tuple[dict[str, float], dict[str, str]]:
        """Values and reasons of failure by generation_key, of a key of `measures`."""
        if metric in ("holdout", "gap") and not self.unseen:
            return {}, {str(key): NO_HOLDOUT for key in drawn["generation_key"]}
        if metric != "holdout" and not self.seen:
            return {}, {str(key): NO_TRAINING for key in drawn["generation_key"]}
        ready, failures = self._ready(drawn)
        if ready.empty:
            return {}, failures
        images = self.embeddings.rows(ready["image"].astype(str).tolist())
        compute = {
            "holdout": lambda: self._similarity(self.unseen, images),
            "training": lambda: self._similarity(self.seen, images),
            "gap": lambda: (
                self._similarity(self.seen, images) - self._similarity(self.unseen, images)
            ),
            "nearest": lambda: self._nearest(images)[0],
        }
        keys = ready["generation_key"].astype(str)
        return dict(zip(keys, compute[metric]().tolist(), strict=True)), failures

    def nearest(self, drawn: pd.DataFrame, hashes: Mapping[str, str]) -> pd.DataFrame:
        """See `Fidelity.nearest`."""
        columns = ["generation_key", "metric_id", "nearest_poster", "similarity",
                   "similarity_threshold", "copy_sensitivity", "hash_poster", "hash_distance",
                   "hash_threshold", "copied", "copied_by", "copy_unsure"]  # fmt: skip
        ready, _ = self._ready(drawn)
        if ready.empty or not self.seen:
            return pd.DataFrame(columns=columns)
        similarities, indices = self._nearest(
            self.embeddings.rows(ready["image"].astype(str).tolist())
        )
        copied = self.calibration.is_copy(similarities)
        distances = _poster_distances(self.training, self.strangers, hashes)
        hash_bound, suspicious = hash_threshold(distances), suspicious_bits(distances)
        sensitivity = self.calibration.sensitivity
        metric_id = self.measures["nearest"].metric_id
        rows = []
        for row, similarity, index, near in zip(
            ready.itertuples(index=False), similarities, indices, copied, strict=True
        ):
            twin, bits = _nearest_hash(hashes.get(str(row.image)), self.training, hashes)
            same_hash = bits is not None and bits <= hash_bound
            copy = bool(near or same_hash)
            rows.append(
                (
                    str(row.generation_key), metric_id, self.seen[int(index)],
                    float(similarity), self.calibration.threshold, sensitivity, twin, bits,
                    hash_bound, copy, "cosine" if near else "hash" if same_hash else "",
                    not copy and bits is not None and bits <= suspicious,
                )
            )  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    def _ready(self, drawn: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
        known = drawn["image"].isin(self.embeddings.vectors.keys())
        return drawn[known], encoding_failures(drawn[~known], self.embeddings.unreadable)

    def _similarity(self, posters: Sequence[str], images: np.ndarray) -> np.ndarray:
        return SetSimilarity(self.embeddings.rows(posters))(images)

    def _nearest(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return NearestPoster(self.embeddings.rows(self.seen))(images)


def _measures(
    settings: ScorerSettings, root: Path, training: str, holdout: str
) -> dict[str, Metric]:
    """The metrics of one encoder; `training` and `holdout`: digests of the posters compared with.

    Rows of one id never change. Were those that cannot be read just now in the digest, numbers
    without them would stay when they are put back.
    """
    encoder = encoder_id(settings, root)
    kind = "DINO" if encoder_family(settings, root) == "DINO" else "CLIP-I"
    both = digest([training, holdout])
    told = {
        "holdout": (
            f"similarity.holdout.{holdout}",
            "holdout",
            "mean cosine with posters that were never trained on, -1 to 1",
        ),
        "training": (
            f"similarity.training.{training}",
            "training",
            "mean cosine with the posters trained on, -1 to 1",
        ),
        "gap": (
            f"overfit_gap.{both}",
            "overfit gap",
            "similarity to training posters less that to holdout posters, -2 to 2; the "
            "base model's is the zero",
        ),
        "nearest": (
            f"nearest.training.{training}",
            "nearest training poster",
            "cosine with the nearest poster trained on, -1 to 1",
        ),
    }
    return {
        key: encoder_metric(
            f"{start}.{encoder}.v{FIDELITY_VERSION}", f"{kind} {name}", settings, root,
            FIDELITY_VERSION, description,
        )
        for key, (start, name, description) in told.items()
    }  # fmt: skip


# --- perceptual hashes --------------------------------------------------------------------------


def _hash_metric(training: str) -> Metric:
    return Metric(
        metric_id=f"phash.training.{training}.v{HASH_VERSION}",
        name="perceptual hash distance",
        encoder="",
        revision="",
        preprocessing="32x32 grey",
        version=HASH_VERSION,
        description="bits of 64 in which the perceptual hash differs from the nearest training "
        "poster's; 0 is the same picture, about 32 an unrelated one",
    )


def _hashes(store: Store, files: Mapping[str, Path], progress: Progress) -> dict[str, str]:
    """Perceptual hashes by content hash; an image that cannot be read has none."""

    def one(key: str) -> tuple[str, str]:
        try:
            with Image.open(files[key]) as image:
                return key, perceptual_hash(image)
        except (OSError, SyntaxError, ValueError):
            return key, ""

    def compute(missing: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        with progress.task("Hashing images", len(missing), "images") as tick:
            for key, value in parallel_map(one, missing):
                tick()
                if value:
                    yield key, {"hash": value}

    kind = f"phash.v{HASH_VERSION}"
    rows = compute_missing(store, kind, list(files), compute, save_every=256)
    return {key: row["hash"] for key, row in rows.items()}


def _nearest_hash(
    own: str | None, posters: Posters, hashes: Mapping[str, str]
) -> tuple[str, int | None]:
    """The poster whose perceptual hash is nearest, and the bits between; "" and None without."""
    if own is None:
        return "", None
    known = [(hash_distance(own, hashes[key]), key) for key in posters.files if key in hashes]
    if not known:
        return "", None
    bits, key = min(known)
    return key, bits


def _is_seen(key: str, training: Posters, hashes: Mapping[str, str], same_bits: int) -> bool:
    """Whether a poster is a training poster too."""
    _, bits = _nearest_hash(hashes.get(key), training, hashes)
    return key in training.files or (bits is not None and bits <= same_bits)


def _poster_distances(
    training: Posters, others: Iterable[str], hashes: Mapping[str, str]
) -> list[int]:
    """Bits between each of the other posters and its nearest training poster."""
    found = [_nearest_hash(hashes.get(key), training, hashes)[1] for key in others]
    return [bits for bits in found if bits is not None]


def _hash_distances(
    drawn: pd.DataFrame, hashes: Mapping[str, str], training: Posters
) -> dict[str, float]:
    values: dict[str, float] = {}
    for row in drawn.itertuples(index=False):
        _, bits = _nearest_hash(hashes.get(str(row.image)), training, hashes)
        if bits is not None:
            values[str(row.generation_key)] = float(bits)
    return values
