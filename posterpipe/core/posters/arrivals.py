"""Whether the outside world holds something that was not read yet.

What belongs here: digests of what root assets are made from, and the decision to read them now or
to wait. What does not: listing (`listing`), reading (`landing`, `captions`, `prompts`), and how a
sensor asks and requests (`defs.arrivals`).

The decision is level-triggered: it compares what is there with what was read last, so nothing is
lost when a look, a run or the memory of earlier looks is lost. Clocks and dates decide only how
long to wait, never what is new.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from posterpipe.core.captions.people import REHASHED_SIDECARS, SIDECAR_SUFFIX
from posterpipe.core.files import sha256_of
from posterpipe.core.posters.landing import landing_digest, poster_entries
from posterpipe.core.posters.listing import (
    HOLDOUT,
    UNLISTED,
    Entry,
    Folder,
    PlaceMissing,
    listing_digest,
    source_name,
)
from posterpipe.core.posters.rereading import rehashed
from posterpipe.core.retries import clock, pause_after
from posterpipe.core.store import Store, TableMissing, content_key
from posterpipe.settings import AutomationSettings

NAMED = 5
"""Files named in a sentence."""


@dataclass(frozen=True)
class Source:
    """What the outside holds now for one root asset."""

    digest: str
    """Equal as long as a table made from it would be."""
    seen: str
    """What is there, in words."""
    portable: str = ""
    """The same digest without what another host may see otherwise of the same files."""
    young: Sequence[str] = ()
    """Files that changed so lately that they may still be being written."""
    problem: str = ""
    """Why there is nothing to read, and what to do; "" when there is."""
    gap: str = ""
    """What of it cannot be seen now, and what to do; "" for nothing. The rest is read all the same,
    but not trained on."""


@dataclass(frozen=True)
class LastRead:
    """What is known of the last time that a root asset was made."""

    digests: frozenset[str] = frozenset()
    """Of the source then, as the run saw it, and as who requested it saw the same."""
    at: float = 0.0
    """Seconds since 1970; 0 when it was never made."""
    unread: int = 0
    """Files that could not be read."""
    unread_since: float = 0.0
    """When it was first made from that source with files that could not be read, in seconds since
    1970; 0 when that is not known."""


@dataclass(frozen=True)
class Memory:
    """What a look leaves for the next one."""

    digest: str = ""
    waiting_since: float = 0.0
    """Seconds since 1970; 0 when nothing is waited for."""


@dataclass(frozen=True)
class Decision:
    """Whether to make the asset now."""

    due: bool
    reason: str
    """In words, for people who look why nothing (or something) happens."""
    memory: Memory


def decide(
    source: Source,
    read: LastRead,
    memory: Memory,
    settings: AutomationSettings,
    now: float,
    change: str = "",
) -> Decision:
    """Whether a root asset is due.

    It is when its source is another one than the one that was read last, and stayed the same since
    the look before (`memory`), with no file that changed within `settle_seconds`. Changes that do
    not come to rest are waited for no longer than `patience_seconds`: they then are read as they
    are, and again when they went on. `now`: seconds since 1970. `change`: what is new, in words.
    """
    if source.problem:
        return Decision(False, source.problem, Memory())
    if source.digest in read.digests:
        rested = Memory(source.digest)
        if read.unread and now - read.at >= _until_again(read):
            reason = f"{read.unread} files could not be read at {clock(read.at)}; trying again"
            return Decision(True, reason, rested)
        return Decision(False, f"{source.seen}, unchanged since {clock(read.at)}", rested)
    what = f"{source.seen} ({change})" if change else source.seen
    since = memory.waiting_since or now
    waiting = ""
    if source.young:
        waiting = (
            f"waiting for {name_some(source.young)}, changed less than "
            f"{settings.settle_seconds:g} s ago"
        )
    elif source.digest != memory.digest:
        waiting = "waiting until the next look shows the same"
    if waiting and now - since < settings.patience_seconds:
        return Decision(False, f"{what}: {waiting}", Memory(source.digest, since))
    if waiting:
        what += f", still changing after {now - since:.0f} s"
    return Decision(True, what, Memory(source.digest))


def _until_again(read: LastRead) -> float:
    """Seconds to wait before files that could not be read are tried again: as long as they have
    been tried already, so that the pauses double, whatever number of looks and tries was lost."""
    return pause_after(read.at - read.unread_since if read.unread_since else 0.0)


def posters_source(
    entries: Sequence[Entry],
    store: Store,
    location: str,
    settings: AutomationSettings,
    now: float,
    *,
    whole: bool = False,
) -> Source:
    """The source of `raw_posters`. `whole`: files appear all at once, as objects in buckets do."""
    posters = poster_entries(entries)
    if not posters:
        return _without_posters(location)
    young = () if whole else _young(posters, settings, now)
    return Source(
        landing_digest(entries, store),
        f"{_count(len(posters), 'poster')} in {location}",
        landing_digest(entries, store, portable=True),
        young,
        gap=_gap(entries, location),
    )


def _gap(entries: Iterable[Entry], location: Path | str) -> str:
    unlisted = [entry for entry in entries if entry.problem.startswith(UNLISTED)]
    if not unlisted:
        return ""
    more = f", and {len(unlisted) - 1} more like it" if len(unlisted) > 1 else ""
    return (
        f"{source_name(unlisted[0])} in {location}: {unlisted[0].problem}, or move it out of "
        f"there{more}"
    )


def _without_posters(location: str) -> Source:
    return Source(
        "",
        "",
        problem=f"no posters in {location}: put some in, or set POSTERPIPE_LANDING to another "
        "folder",
    )


def holdout_entries(folder: Path) -> list[Entry]:
    """The listing of the holdout folder, which need not be there. Raises PlaceMissing where it is
    there and cannot be listed."""
    return Folder(folder, HOLDOUT).entries() if folder.exists() else []


def missing_holdout(folder: Path, entries: Sequence[Entry], store: Store) -> str:
    """Why held-out posters that are gone are not taken for removed, and what to do; "" where they
    are, and where there were none.

    `entries`: the listing of the folder. A folder that is not there, or that holds nothing at all,
    may not be mounted, or its setting be mistyped.
    """
    if entries:
        return ""
    try:
        table = store.read_table("holdout_posters")
    except TableMissing:
        return ""
    held = int((table["status"] == "ok").sum())
    if not held:
        return ""
    return (
        f"no posters in {folder}, which held {_count(held, 'poster')} before: mount it, or set "
        f"{HOLDOUT.setting} to where they lie; to hold none out any more, put a note into it, such "
        "as README.md"
    )


def holdout_source(folder: Path, store: Store, settings: AutomationSettings, now: float) -> Source:
    """The source of `holdout_posters`: a folder that may be empty or missing as long as no poster
    is held out (see `missing_holdout`)."""
    try:
        entries = holdout_entries(folder)
    except PlaceMissing as error:
        return Source("", "", problem=str(error))
    if missing := missing_holdout(folder, entries, store):
        return Source("", "", problem=missing)
    posters = poster_entries(entries)
    seen = f"{_count(len(posters), 'poster')} in {folder}" if posters else f"no posters in {folder}"
    young = _young([*posters, *_sidecars(entries)], settings, now)
    return Source(
        holdout_digest(entries, store),
        seen,
        holdout_digest(entries, store, portable=True),
        young,
        gap=_gap(entries, folder),
    )


def holdout_digest(entries: Sequence[Entry], store: Store, *, portable: bool = False) -> str:
    """Of everything that the table of held-out posters is made from: posters, and the text files
    beside them. `portable` as of `listing_digest`."""
    posters = landing_digest(entries, store, portable=portable)
    sidecars = _sidecars(entries)
    if not sidecars:
        return posters
    found = rehashed(store, REHASHED_SIDECARS)
    return content_key("holdout", posters, listing_digest(sidecars, portable=portable), found)


def _sidecars(entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.name.lower().endswith(SIDECAR_SUFFIX)]


def captions_source(
    entries: Sequence[Entry],
    csv_path: Path,
    store: Store,
    location: str,
    settings: AutomationSettings,
    now: float,
    *,
    whole: bool = False,
) -> Source:
    """The source of `human_captions`: text files beside posters, and the CSV, present or not.

    The names of the posters belong to it, since captions are given by name; not their bytes, and
    not the names as long as there are no captions. Where no poster is left, as where nothing is
    mounted, captions are not taken for removed. Raises OSError where the CSV cannot be read.
    """
    if not poster_entries(entries):
        return _without_posters(location)
    sidecars = _sidecars(entries)
    csv_digest = file_digest(csv_path)
    seen = _count(len(sidecars), "sidecar")
    seen += f" and {csv_path.name}" if csv_digest else f" and no {csv_path.name}"
    young = [] if whole else list(_young(sidecars, settings, now))
    if csv_digest and _is_young(csv_path.stat().st_mtime, settings, now):
        young.append(csv_path.name)
    return Source(
        captions_digest(entries, csv_digest, store),
        seen,
        captions_digest(entries, csv_digest, store, portable=True),
        young,
    )


def captions_digest(
    entries: Sequence[Entry], csv_digest: str, store: Store, *, portable: bool = False
) -> str:
    """Of everything that a table of captions by people is made from (see `captions_source`).

    `csv_digest`: sha256 of the CSV, "" where there is none. It changes as well with what
    `rehash_sidecars` found to have changed unnoticed. `portable` as of `listing_digest`.
    """
    sidecars = _sidecars(entries)
    names = []
    if sidecars or csv_digest:
        names = [source_name(entry) for entry in poster_entries(entries) if not entry.problem]
    found = rehashed(store, REHASHED_SIDECARS) if sidecars else ""
    return content_key(
        "captions",
        listing_digest(sidecars, portable=portable),
        csv_digest,
        names,
        *([found] if found else []),
    )


def file_source(path: Path, settings: AutomationSettings, now: float) -> Source:
    """The source of an asset that is made from one file, which has to be there.

    Raises OSError where it is there and cannot be read.
    """
    digest = file_digest(path)
    if not digest:
        return Source("", "", problem=f"{path} is not there: put it there")
    young = [path.name] if _is_young(path.stat().st_mtime, settings, now) else []
    return Source(digest, path.name, digest, young)


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes; "" where there is no such file. Raises OSError."""
    try:
        return sha256_of(path)
    except FileNotFoundError:
        return ""


def describe_change(entries: Iterable[Entry], known: Mapping[str, int]) -> str:
    """What is new in a listing against what was read: `known` gives sizes in bytes by name."""
    listed = {source_name(entry): entry.size for entry in poster_entries(entries)}
    came = [name for name in listed if name not in known]
    went = [name for name in known if name not in listed]
    resized = [name for name, size in listed.items() if known.get(name, size) != size]
    parts = [
        f"{len(names)} {word}: {name_some(names)}"
        for word, names in (("new", came), ("gone", went), ("changed", resized))
        if names
    ]
    return "; ".join(parts) or "something about them changed"


def name_some(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = len(names) - NAMED
    shown = ", ".join(names[:NAMED])
    return f"{shown} and {more} more" if more > 0 else shown


def _young(entries: Iterable[Entry], settings: AutomationSettings, now: float) -> tuple[str, ...]:
    return tuple(
        source_name(entry) for entry in entries if _is_young(entry.mtime_ns / 1e9, settings, now)
    )


def _is_young(changed_at: float, settings: AutomationSettings, now: float) -> bool:
    # Dates in the future come from other clocks, and tell nothing.
    return 0 <= now - changed_at < settings.settle_seconds


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
