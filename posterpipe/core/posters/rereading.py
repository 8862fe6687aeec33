"""Files that changed although their size, date and inode (or ETag) stayed.

What belongs here: reading known files again, comparing, and forgetting what has changed. What does
not: which files those are (`landing.rehash` for posters, `captions.people` for their sidecars).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from posterpipe.core.parallel import parallel_map
from posterpipe.core.posters.listing import Entry, SourceChanged, source_name
from posterpipe.core.store import Store, content_key

CHANGED = "changed while it was read"


@dataclass
class Rehash:
    """What reading every file again showed."""

    same: int
    """Files whose bytes are those that are known."""
    changed: list[str]
    """Files whose bytes changed while path, size, date and inode (or ETag) stayed."""
    new: list[str]
    """Files that were never read, or were touched since: the next materialization reads them."""
    unreadable: list[str]
    """Each with the reason."""


def reread(
    files: Mapping[str, Entry],
    known: Mapping[str, str],
    read: Callable[[Entry], str],
    threads: int,
    tick: Callable[[], object],
) -> tuple[Rehash, dict[str, str]]:
    """Read files, by their keys, and compare each with what is known of it.

    `read` gives a text that is equal as long as the file is; it raises SourceChanged or OSError.
    `known`: that text as it was read before, "" or nothing where it was not. `tick` is called after
    each file. Returns what that showed, and the new texts of the files that changed, by their keys.
    """
    found = Rehash(0, [], [], [])
    changed = {}

    def again(key: str) -> tuple[str, str]:
        try:
            return read(files[key]), ""
        except SourceChanged:
            return "", CHANGED
        except OSError as error:
            return "", reason_of(error)

    texts = parallel_map(again, list(files), threads)
    for (key, entry), (text, problem) in zip(files.items(), texts, strict=True):
        name, before = source_name(entry), known.get(key, "")
        if problem:
            found.unreadable.append(f"{name}: {problem}")
        elif not before:
            found.new.append(name)
        elif before == text:
            found.same += 1
        else:
            found.changed.append(name)
            changed[key] = text
        tick()
    return found, changed


def forget_changed(
    store: Store,
    kind: str,
    known: Mapping[str, dict[str, Any]],
    changed: Mapping[str, str],
    mark: str,
) -> None:
    """Forget the rows of files that changed, and change `rehashed` of that mark.

    At once: a file that is forgotten and told nobody would be read at the next change of another
    one only; one that is told and not forgotten would not be read.
    """
    digest = content_key(rehashed(store, mark), changed)
    rows = {key: known[key] for key in changed}
    store.forget_results(kind, rows, note=(mark, {"digest": digest}))


def rehashed(store: Store, kind: str) -> str:
    """Digest of everything that `reread` of that kind ever found to have changed unnoticed; "" for
    nothing."""
    return str(store.results(kind, [kind]).get(kind, {}).get("digest", ""))


def reason_of(error: OSError) -> str:
    """In words, why a file could not be read."""
    return error.strerror or str(error) or type(error).__name__
