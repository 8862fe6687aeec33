"""Noticing what arrives from outside: posters, captions by people, prompts.

What belongs here: the sensor that requests the assets without inputs. What does not: deciding
whether something is due (`core.posters.arrivals`), what follows below (`automation`, `retraining`).
"""

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import dagster as dg
from dagster import DagsterRunStatus

from posterpipe.core.retries import ATTEMPTS, clock, pause_after
from posterpipe.defs.metadata import SOURCE_DIGEST, SOURCE_PORTABLE, UNREAD
from posterpipe.defs.resources import Deployment
from posterpipe.defs.retries import passing_failure, passing_obstacle
from posterpipe.defs.staleness import made_or_wiped, materializations
from posterpipe.settings import Settings

if TYPE_CHECKING:
    from posterpipe.core.posters.arrivals import LastRead, Memory, Source
    from posterpipe.core.posters.listing import Entry

ROOTS = ("raw_posters", "holdout_posters", "human_captions", "prompt_suite")
"""Assets that read the outside world: only running them tells whether it changed."""

TRAINED_FROM = ("raw_posters", "holdout_posters", "human_captions")
"""Those of them that decide what is trained on."""

ROOT_TAG = "posterpipe/arrived"
"""Tag of the runs that the sensor requests: for which asset."""

STATE_TAG = "posterpipe/arrived_state"
"""The same: from which source, after which materialization or wipe."""

DIGEST_TAG = "posterpipe/arrived_digest"
"""The same: digest of the source when it was requested."""

PORTABLE_TAG = "posterpipe/arrived_portable"
"""The same without what another host may see otherwise (SOURCE_PORTABLE)."""

REASON_TAG = "posterpipe/reason"
"""Tag of requested runs: why, in words."""

ANSWER_SECONDS = 40.0
"""How long the folder or bucket of posters may take: Dagster gives a look a minute."""

_TRIES = 20
"""Materializations looked at to see how long files could not be read: a day takes nine."""

UNFINISHED = [
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
    DagsterRunStatus.SUSPENDED,
]


def sensors(settings: Settings) -> tuple[dg.SensorDefinition, ...]:
    """The sensors of this module, as often as the settings say."""

    @dg.sensor(
        name="arrivals",
        target=dg.AssetSelection.assets(*ROOTS),
        minimum_interval_seconds=settings.automation.sensor_interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Looks at the posters, at those held out, at captions by people (text files "
        "beside them, and the CSV) and at the prompt suite, and requests the asset whose source "
        "changed. Waits for files that are still being written. Says in its skip reason what it "
        "saw.",
    )
    def arrivals(
        context: dg.SensorEvaluationContext, deployment: dg.ResourceParam[Deployment]
    ) -> dg.SensorResult:
        return look(context, deployment)

    return (arrivals,)


def look(context: dg.SensorEvaluationContext, deployment: Deployment) -> dg.SensorResult:
    """One look at everything outside: what to request, or why nothing.

    The cursor holds the digests that were seen. A run key holds the digest of the source, what was
    made from it last, and how often that failed.
    """
    from posterpipe.core.posters.arrivals import Memory, decide

    now = time.time()
    settings = deployment.settings.automation
    memories = _memories(context.cursor)
    listing = _Listing(deployment, now)
    requests = []
    reasons = []
    seen = {}
    for name in ROOTS:
        root = _Root(name, context.instance)
        source = listing.source(name)
        if isinstance(source, Exception):
            context.log.error(f"{name}: not looked at", exc_info=source)
            reasons.append(f"{name}: {_unforeseen(source)}")
            continue
        last = root.last_read()
        new = name == "raw_posters" and last.at > 0 and source.digest not in last.digests
        change = listing.change() if new and not source.problem else ""
        memory = memories.get(name, Memory())
        decision = decide(source, last, memory, settings, now, change)
        seen[name] = asdict(decision.memory)
        reason = decision.reason
        if decision.due:
            request, obstacle = root.request(source, reason, now)
            if request:
                context.log.info(f"{name}: {reason}")
                requests.append(request)
                continue
            reason += f", but {obstacle}"
        reasons.append(f"{name}: {reason}")
    return dg.SensorResult(
        run_requests=requests,
        skip_reason=None if requests else "; ".join(reasons),
        cursor=json.dumps(seen),
    )


def reading_problem(deployment: Deployment) -> str:
    """Why what a training is made from cannot be read now, or not all of it, and what to do; ""
    when it can."""
    listing = _Listing(deployment, time.time())
    for name in TRAINED_FROM:
        source = listing.source(name)
        if isinstance(source, Exception):
            return _unforeseen(source)
        if found := source.problem or source.gap:
            return found
    return ""


def _unforeseen(error: Exception) -> str:
    said = str(error).strip() or "no more is known"
    return f"could not be looked at ({type(error).__name__}: {said}); see the log of this look"


def _memories(cursor: str | None) -> dict[str, "Memory"]:
    from posterpipe.core.posters.arrivals import Memory

    try:
        return {name: Memory(**memory) for name, memory in json.loads(cursor or "{}").items()}
    except (ValueError, TypeError, AttributeError):
        return {}  # of another version; it only tells how long was waited


class _Listing:
    """What lies outside at one moment."""

    def __init__(self, deployment: Deployment, now: float) -> None:
        from posterpipe.core.posters.listing import Bucket, PlaceMissing, entries_within, open_place

        self._deployment = deployment
        self._now = now
        place = open_place(deployment.settings.landing, deployment.settings.root)
        self._location = place.location
        self._whole = isinstance(place, Bucket)
        self._problem = ""
        self._error: Exception | None = None
        self._entries: list[Entry] = []
        try:
            self._entries = entries_within(place, ANSWER_SECONDS)
        except PlaceMissing as error:
            self._problem = str(error)
        except Exception as error:
            self._error = error

    def source(self, name: str) -> "Source | Exception":
        """The source of a root asset, or what nobody foresaw: it must not hide the others."""
        try:
            return self._source(name)
        except Exception as error:
            return error

    def _source(self, name: str) -> "Source":
        from posterpipe.core.posters.arrivals import (
            Source,
            captions_source,
            file_source,
            holdout_source,
            posters_source,
        )

        settings = self._deployment.settings
        automation, now = settings.automation, self._now
        try:
            if name == "prompt_suite":
                return file_source(settings.path(settings.prompt_suite), automation, now)
            if name == "holdout_posters":
                folder = settings.path(settings.holdout)
                return holdout_source(folder, self._deployment.store, automation, now)
            if self._error:
                raise self._error
            if self._problem:
                return Source("", "", problem=self._problem)
            outside = (self._deployment.store, self._location, automation, now)
            if name == "human_captions":
                csv_path = settings.path(settings.captions)
                return captions_source(self._entries, csv_path, *outside, whole=self._whole)
            return posters_source(self._entries, *outside, whole=self._whole)
        except OSError as error:
            problem = f"{error.filename}: cannot be read ({error.strerror}); make it readable"
            return Source("", "", problem=problem)

    def change(self) -> str:
        """What is new about the posters, in words."""
        from posterpipe.core.posters.arrivals import describe_change
        from posterpipe.core.store import TableMissing

        try:
            table = self._deployment.store.read_table("raw_posters")
        except TableMissing:
            return ""
        known = dict(zip(table["source_name"], table["size_bytes"], strict=True))
        return describe_change(self._entries, known)


def _unread(made: dg.AssetMaterialization | None) -> int:
    entry = made.metadata.get(UNREAD) if made else None
    return int(str(entry.value)) if entry else 0


class _Root:
    """What the instance knows of a root asset."""

    def __init__(self, name: str, instance: dg.DagsterInstance) -> None:
        self._name = name
        self._instance = instance
        records = materializations(instance, dg.AssetKey(name), 1)
        self._made = records[0] if records else None

    def last_read(self) -> "LastRead":
        """From which source it was made last.

        Two digests count: the one that the step recorded, and, where the step saw the same, the
        one under which its run was requested. They differ where the step sees other inode numbers
        than the sensor, as containers do, and by the first alone it would then be requested for
        ever. They also differ where the source changed before the step read it: then it was not
        made from what was requested.
        """
        from posterpipe.core.posters.arrivals import LastRead

        if self._made is None:
            return LastRead()
        made = self._made.asset_materialization
        run = self._instance.get_run_by_id(self._made.run_id)
        recorded = made.metadata.get(SOURCE_DIGEST) if made else None
        portable = made.metadata.get(SOURCE_PORTABLE) if made else None
        unread = _unread(made)
        digests = [recorded and recorded.value]
        if run and portable and portable.value == run.tags.get(PORTABLE_TAG):
            digests.append(run.tags.get(DIGEST_TAG))
        return LastRead(
            frozenset(str(digest) for digest in digests if digest),
            self._made.timestamp,
            unread,
            self._unread_since() if unread else 0.0,
        )

    def _unread_since(self) -> float:
        """When it was first made, of the latest times in a row, from the source of the last time
        with files that could not be read."""
        records = materializations(self._instance, dg.AssetKey(self._name), _TRIES)
        since, source = 0.0, None
        for record in records:
            made = record.asset_materialization
            digest = made.metadata.get(SOURCE_DIGEST) if made else None
            source = source or digest
            if digest != source or not _unread(made):
                break
            since = record.timestamp
        return since

    def _seen_otherwise(self, source: "Source", now: float) -> str:
        """Why to wait with a source that runs read, and of which they saw something else than this
        look, the same each time; "" where that is not so, or where it is time to look again.

        As where they have other rights in a folder than the sensor, or another mount. The digests
        will never agree, so each look would request a run.
        """
        records = materializations(self._instance, dg.AssetKey(self._name), _TRIES)
        read_at: list[float] = []
        saw = None
        for record in records:
            made = record.asset_materialization
            run = self._instance.get_run_by_id(record.run_id)
            digest = made.metadata.get(SOURCE_DIGEST) if made else None
            saw = saw or digest
            if digest != saw or run is None or run.tags.get(DIGEST_TAG) != source.digest:
                break
            read_at.append(record.timestamp)
        if len(read_at) < 2:
            return ""
        again = read_at[0] + pause_after(read_at[0] - read_at[-1])
        if now >= again:
            return ""
        return (
            f"{len(read_at)} runs saw something else there than this look; let both have the same "
            f"rights and mounts. It is read again after {clock(again)}"
        )

    def request(
        self, source: "Source", reason: str, now: float
    ) -> tuple[dg.RunRequest | None, str]:
        """The run that reads the source, or what stands in its way. `now`: seconds since 1970."""
        under_way = dg.RunsFilter(tags={ROOT_TAG: self._name}, statuses=UNFINISHED)
        if self._instance.get_runs(under_way, limit=1):
            return None, "a run for it is under way"
        since = made_or_wiped(self._instance, dg.AssetKey(self._name), self._made)
        state = f"{self._name}-{source.digest[:16]}-{since}"
        tried = self._instance.get_runs(dg.RunsFilter(tags={STATE_TAG: state}))
        if any(run.status == DagsterRunStatus.CANCELED for run in tried):
            return None, "its run was canceled: materialize it, or change something"
        failed = [run.run_id for run in tried if run.status == DagsterRunStatus.FAILURE]
        passes = {run: why for run in failed if (why := passing_failure(self._instance, run))}
        stays = [run[:8] for run in failed if run not in passes]
        if len(stays) >= ATTEMPTS:
            runs = ", ".join(stays)
            return None, f"it failed {len(stays)} times (runs {runs}): mend it and materialize it"
        if obstacle := passing_obstacle(list(passes.values())):
            return None, obstacle
        if obstacle := self._seen_otherwise(source, now):
            return None, obstacle
        tags = {
            ROOT_TAG: self._name,
            STATE_TAG: state,
            DIGEST_TAG: source.digest,
            PORTABLE_TAG: source.portable,
            REASON_TAG: reason,
        }
        run_key = f"{state}-{len(failed)}"
        return dg.RunRequest(run_key, asset_selection=[dg.AssetKey(self._name)], tags=tags), ""
