"""What `posterpipe rehash` does: reads posters and their sidecars again, and says what changed.

What belongs here: which places are read, and what the command prints. What does not: reading and
comparing (`core.posters.landing`, `core.captions`).
"""

from __future__ import annotations

from rich.console import Console

from posterpipe.core.captions.people import rehash_sidecars
from posterpipe.core.posters.landing import rehash
from posterpipe.core.posters.listing import HOLDOUT, Place, open_place
from posterpipe.core.posters.rereading import Rehash
from posterpipe.core.progress import BarProgress
from posterpipe.core.store import Store
from posterpipe.settings import load_settings


def run_rehash() -> int:
    """Read everything, print what changed; the exit code, 1 where a file cannot be read.

    That is posters and sidecars of the landing folder and, where there is one, of the holdout
    folder. Raises posterpipe's own errors for a wrong setting, a missing folder or a store that
    cannot be used.
    """
    settings = load_settings()
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    store = Store(settings.path(settings.store))
    places = [open_place(settings.landing, settings.root)]
    if settings.path(settings.holdout).exists():
        places.append(open_place(settings.path(settings.holdout), role=HOLDOUT))
    found = []
    for place in places:
        for read in (rehash, rehash_sidecars):
            found.append(read(place, store, BarProgress(console)))
            _tell(console, place, found[-1])
    console.print(f"{sum(each.same for each in found)} files are as they were read.")
    if any(each.changed or each.new for each in found):
        console.print(
            "The sensor `arrivals` takes this up while `make dev` runs; else materialize "
            "raw_posters, holdout_posters and human_captions, or run posterpipe demo."
        )
    return 1 if any(each.unreadable for each in found) else 0


def _tell(console: Console, place: Place, found: Rehash) -> None:
    for title, names in [
        ("changed while path, size and date stayed", found.changed),
        ("not read before", found.new),
        ("cannot be read", found.unreadable),
    ]:
        if names:
            console.print(f"{place.location}: {len(names)} {title}:")
            for name in names:
                console.print(f"  {name}")
