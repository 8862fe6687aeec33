"""All evidence about generations beside CLIP-T, and the gate's decision on it.

What belongs here: which sets of posters images are compared with, running every metric over a table
of generations, and reading from it what the gate needs. What does not: the metrics themselves
(`metrics`), the rules of the decision (`gate`), the log of decisions (`decisions`), assets
(`defs.scoring`, `defs.champion`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import pandas as pd

from posterpipe.core.champion.decisions import GateError, decision_row, defender_of, write_decisions
from posterpipe.core.champion.gate import GateDecision, decide
from posterpipe.core.champion.gate_evidence import MetricIds, gather
from posterpipe.core.metrics.base import SCORE_COLUMNS, Measurement, Metric, record_scores
from posterpipe.core.metrics.clip import clip_t_id, clip_t_metric, clip_t_scores
from posterpipe.core.metrics.diversity import measure_diversity
from posterpipe.core.metrics.fidelity import (
    CopyCalibration,
    Fidelity,
    Posters,
    compare_with_posters,
    evidence_encoders,
    never_trained_on,
)
from posterpipe.core.metrics.pickscore import (
    measure_pickscore,
    pickscore_metric,
    pickscore_settings,
)
from posterpipe.core.metrics.specificity import measure_specificity
from posterpipe.core.progress import Progress
from posterpipe.core.provenance.checkpoints import checkpoint_facts, images_trained_on
from posterpipe.core.store import Store
from posterpipe.core.training.holdout_set import resized_holdout
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.core.warehouse.rows import insert, utc_now
from posterpipe.settings import GateSettings, ScorerSettings, Settings

EVIDENCE_COLUMNS = (
    "generation_key", "variant", "prompt_id", "seed", "checkpoint_id", "metric_id", "metric",
    "role", "value", "status", "reason", "nearest_poster", "copied", "copied_by", "copied_poster",
    "copy_threshold", "copy_sensitivity", "lost_posters", "copy_unsure",
)  # fmt: skip
"""Columns of the table of evidence: one row a generation and metric.

- `role`: what it is read for, or "": clip, specific, fidelity, diversity, preference and copies by
  the gate, control and rank by the growth chart.

In rows with the role copies:

- `nearest_poster`: content hash of the training image with the highest similarity.
- `copied`: whether the similarity by the first image encoder, or the perceptual hash, is that of a
  copy; what other encoders say is in fct_nearest, for reports.
- `copied_by`: which of the two says so, "cosine" (also where both do) or "hash"; "" for no copy.
- `copied_poster`: content hash of the training image that it is a copy of, which by the hash may be
  another one than `nearest_poster`; "" for no copy.
- `copy_threshold`: cosine above which it is; NaN with too few holdout posters to know.
- `copy_sensitivity`: share of altered training posters that lie above it.
- `lost_posters`: how many posters that the checkpoint was trained on cannot be read, so that copies
  of them are not seen.
- `copy_unsure`: whether it does not count as a copy, but may be one by its perceptual hash: too few
  holdout posters say from which distance on it is one."""


@dataclass(frozen=True)
class MeasuredEvidence:
    """What all metrics gave for a table of generations."""

    metrics: list[Metric]
    table: pd.DataFrame
    """EVIDENCE_COLUMNS."""
    nearest: pd.DataFrame
    """See `fidelity.Fidelity.nearest`."""
    calibrations: dict[str, CopyCalibration]
    """Of the challenger's training posters, by encoder id."""

    @property
    def copies(self) -> pd.DataFrame:
        """The rows of `nearest` whose image counts as a copy."""
        return self.nearest[self.nearest["copied"].astype(bool)]

    def copy_thresholds(self, holdout_posters: int) -> pd.DataFrame:
        """From which cosine an image counts as a copy, by encoder, the share of altered training
        posters that this finds, and how many of so many holdout posters it rests on."""
        return pd.DataFrame(
            {
                "encoder": encoder,
                "copy_from_cosine": one.threshold,
                "altered_found": one.sensitivity,
                "holdout_posters": len(one.similarities),
                "left_out": holdout_posters - len(one.similarities),
            }
            for encoder, one in self.calibrations.items()
        )


def posters_of(store: Store, name: str, images: pd.DataFrame) -> Posters:
    """The set behind a table with the column `image` (blobs in the store): training.csv's, say."""
    usable = images[images["status"] == "ok"] if "status" in images else images
    blobs = sorted({str(blob) for blob in usable["image"] if blob})
    return Posters(name, {blob: store.path(blob, ".png") for blob in blobs})


def trained_on(store: Store, checkpoint_ids: Iterable[str]) -> dict[str, Posters]:
    """The posters that fine-tuned checkpoints were trained on, by checkpoint_id, whatever lies in
    the landing folder by now; an empty set where that was not written down."""
    names = list(checkpoint_ids)
    facts = checkpoint_facts(store, names)
    images = {name: images_trained_on(store, facts.get(name, {})) for name in names}
    return {
        name: posters_of(store, "training", pd.DataFrame({"image": blobs}))
        for name, blobs in images.items()
    }


def held_out(
    store: Store, holdout: pd.DataFrame, settings: Settings, progress: Progress
) -> Posters:
    """The posters of the table `holdout_posters`, resized like those trained on, each once. Their
    bytes are the store's, whatever lies in the holdout folder now."""
    return posters_of(store, "holdout", resized_holdout(store, holdout, settings.images, progress))


def side_by_side(base: pd.DataFrame, tuned: pd.DataFrame, champion: pd.DataFrame) -> pd.DataFrame:
    """The images that are compared (tables of generations), each once. Where the base model is the
    champion, the table `champion` is a copy of its own, perhaps of an earlier one, and is left out.
    """
    of_base = champion["checkpoint_id"].isin(base["checkpoint_id"])
    everything = pd.concat([base, tuned, champion[~of_base]], ignore_index=True)
    return everything.drop_duplicates("generation_key", ignore_index=True)


def measure(
    store: Store,
    warehouse: Warehouse,
    generations: pd.DataFrame,
    trained: Mapping[str, Posters],
    holdout: Posters,
    settings: Settings,
    progress: Progress,
    *,
    challenger: str,
    run_id: str,
) -> MeasuredEvidence:
    """Every metric but legibility for a table of generations (`generations.COLUMNS`), into the
    warehouse.

    CLIP-T with crop and with pad, the same against the other prompts (`specificity`), similarity to
    holdout and training posters with the overfit gap, nearest training poster and copies,
    diversity, and PickScore where it is configured. Images are encoded once an encoder, for all
    metrics.

    `trained`: what each fine-tuned checkpoint was trained on, by checkpoint_id. Its images are held
    against these, those of the base model against the challenger's, and all of them against the
    same holdout posters: those that none of the checkpoints was trained on. Raises ModelMissing and
    WarehouseBusy.
    """
    root, scorer = settings.root, settings.scorer
    encoders = evidence_encoders(settings.evidence, scorer.model)
    crop, pad = (
        scorer.model_copy(update={"preprocessing": preprocessing})
        for preprocessing in ("crop", "pad")
    )
    clip_t = [
        Measurement(
            [clip_t_metric(one, root)], clip_t_scores(store, generations, one, root, progress)
        )
        for one in (crop, pad)
    ]
    specificity = measure_specificity(store, generations, scorer, root, progress)
    compared = _compared(
        store, generations, trained, holdout, encoders, settings, progress, challenger=challenger
    )
    diversity = measure_diversity(store, generations, encoders, root, progress)
    preference = _preference(store, warehouse, generations, settings, progress)
    measurements = [*clip_t, specificity, *compared, diversity, *preference]
    scores = pd.concat([one.scores for one in measurements], ignore_index=True)
    nearest = pd.concat([one.nearest for one in compared], ignore_index=True)
    # Of posters that only earlier checkpoints were trained on: not for reports on images of now.
    others = [m for one in compared[1:] for m in one.metrics if m not in compared[0].metrics]
    known = dict.fromkeys(m for one in measurements for m in one.metrics)
    metrics = [metric for metric in known if metric not in others]
    record_scores(
        warehouse, generations, metrics, scores, run_id=run_id, step="fidelity_scores",
        others=others,
    )  # fmt: skip
    _record_nearest(warehouse, nearest, run_id=run_id)
    roles = {clip_t_id(scorer, root): "clip"}
    for one in measurements:
        roles |= one.roles
    # Sets that differ in lost posters only have one id: then the challenger's, the first, counts.
    lost = {one.nearest_id: one.lost for one in reversed(compared)}
    table = _evidence_table(generations, [*metrics, *others], scores, nearest, roles, lost)
    return MeasuredEvidence(metrics, table, nearest, compared[0].calibrations)


def _compared(
    store: Store,
    generations: pd.DataFrame,
    trained: Mapping[str, Posters],
    holdout: Posters,
    encoders: list[ScorerSettings],
    settings: Settings,
    progress: Progress,
    *,
    challenger: str,
) -> list[Fidelity]:
    """One comparison a training set, the challenger's first; see `measure`."""
    unseen = never_trained_on(
        store, holdout, trained.values(), progress, same_bits=settings.checks.holdout_distance
    )
    sets = {posters.digest: posters for posters in (trained[challenger], *trained.values())}
    against = generations["checkpoint_id"].map(
        lambda name: trained.get(str(name), trained[challenger]).digest
    )
    return [
        compare_with_posters(
            store, generations[against == which], posters, unseen, encoders, settings.root,
            progress, alarm=settings.evidence.copy_alarm,
        )
        for which, posters in sets.items()
    ]  # fmt: skip


def _evidence_table(
    generations: pd.DataFrame,
    metrics: list[Metric],
    scores: pd.DataFrame,
    nearest: pd.DataFrame,
    roles: Mapping[str, str],
    lost: Mapping[str, int],
) -> pd.DataFrame:
    places = generations[["generation_key", "variant", "prompt_id", "seed", "checkpoint_id"]]
    table = places.merge(scores, on="generation_key")
    table["metric"] = table["metric_id"].map({m.metric_id: m.name for m in metrics})
    table["role"] = table["metric_id"].map(dict(roles)).fillna("")
    # The first encoder is the one that the gate reads.
    first = nearest.drop_duplicates("generation_key").set_index("generation_key")
    copies = table["role"] == "copies"
    keys = table["generation_key"].where(copies)
    table["nearest_poster"] = keys.map(first["nearest_poster"]).astype(object).fillna("")
    table["copied"] = keys.map(first["copied"]).astype("boolean")
    table["copied_by"] = keys.map(first["copied_by"]).astype(object).fillna("")
    originals = first["nearest_poster"].where(first["copied_by"] != "hash", first["hash_poster"])
    originals = originals.where(first["copied"].astype(bool), "")
    table["copied_poster"] = keys.map(originals).astype(object).fillna("")
    table["copy_threshold"] = keys.map(first["similarity_threshold"]).astype(float)
    table["copy_sensitivity"] = keys.map(first["copy_sensitivity"]).astype(float)
    table["lost_posters"] = table["metric_id"].map(dict(lost)).astype("Int64")
    table["copy_unsure"] = keys.map(first["copy_unsure"]).astype("boolean")
    order = {metric.metric_id: place for place, metric in enumerate(metrics)}
    table = table.sort_values("metric_id", key=lambda ids: ids.map(order), kind="stable")
    return table[list(EVIDENCE_COLUMNS)].reset_index(drop=True)


def _record_nearest(warehouse: Warehouse, nearest: pd.DataFrame, *, run_id: str) -> None:
    """Adds the nearest training poster of each image, under the metric that measured it."""
    now = utc_now()
    rows = nearest.drop(columns=["copied_by", "copy_unsure"]).assign(measured_at=now, run_id=run_id)
    with warehouse.write() as connection:
        insert(connection, "fct_nearest", rows)


def _preference(
    store: Store,
    warehouse: Warehouse,
    generations: pd.DataFrame,
    settings: Settings,
    progress: Progress,
) -> list[Measurement]:
    """PickScore, where it is configured; 4 GB of weights are loaded only for images that have none
    yet."""
    encoder = pickscore_settings(settings.evidence)
    if encoder is None:
        return []
    metric = pickscore_metric(encoder, settings.evidence.pickscore_processor, settings.root)
    known = warehouse.scores(metric.metric_id, generations["generation_key"])
    new = generations[~generations["generation_key"].isin(known["generation_key"])]
    measured = measure_pickscore(store, new, settings.evidence, settings.root, progress)
    assert measured is not None, "it is configured"
    if known.empty:
        return [measured]
    old = known.assign(metric_id=metric.metric_id)[list(SCORE_COLUMNS)]
    return [replace(measured, scores=pd.concat([old, measured.scores], ignore_index=True))]


def judge(
    warehouse: Warehouse,
    generations: pd.DataFrame,
    evidence: pd.DataFrame,
    *,
    challenger: str,
    champion: str,
    base_model: str,
    settings: GateSettings,
    run_id: str,
) -> GateDecision:
    """The gate's decision about a challenger, written into the warehouse.

    `generations` (`generations.COLUMNS`) and `evidence` (EVIDENCE_COLUMNS) cover both checkpoints
    and the base model. The same decision as last time is no new row. Raises WarehouseBusy, and
    GateError where `champion` is not the one to beat any more: nothing is decided then.
    """
    # A table that an older posterpipe made lacks a column until it is made again.
    evidence = evidence.reindex(columns=list(EVIDENCE_COLUMNS))
    roles = evidence[evidence["role"] != ""].drop_duplicates("role")
    metric_of = dict(zip(roles["role"], roles["metric_id"], strict=True))
    own = evidence[(evidence["role"] == "copies") & (evidence["checkpoint_id"] == challenger)]
    compared = own[own["copied"].notna()]
    metrics = MetricIds(
        clip=metric_of["clip"],
        fidelity=metric_of["fidelity"],
        diversity=metric_of["diversity"],
        preference=metric_of.get("preference"),
        specific=metric_of.get("specific"),
        nearest=str(own["metric_id"].iloc[0]) if len(own) else None,
    )
    decision = decide(
        gather(
            generations,
            evidence,
            dict(zip(compared["generation_key"], compared["copied"].astype(bool), strict=True)),
            metrics,
            challenger=challenger,
            champion=champion,
            base=base_model,
            sensitivity=float(compared["copy_sensitivity"].astype(float).max()),
            lost=int(own["lost_posters"].fillna(0).max()) if len(own) else 0,
            unsure=int(compared["copy_unsure"].astype("boolean").sum()),
        ),
        settings,
    )

    def take(decisions: pd.DataFrame, now: dt.datetime) -> pd.DataFrame:
        defender = defender_of(decisions, base_model, challenger)
        if defender != champion:
            raise GateError(
                f"the checkpoint {challenger} was compared with {champion}, but the champion to "
                f"beat is {defender} by now, so nothing is decided: materialize "
                "`champion_generations`, `fidelity_scores` and `champion`"
            )
        return decision_row(decision, decisions, base_model, decided_at=now, run_id=run_id)

    write_decisions(warehouse, take)
    return decision
