"""What `posterpipe rehash` does: reads every poster file again, and says what changed.

What belongs here: what the command prints. What does not: reading and comparing (`core.landing`).
"""

from __future__ import annotations

from rich.console import Console

from posterpipe.core.landing import rehash
from posterpipe.core.listing import open_place
from posterpipe.core.progress import BarProgress
from posterpipe.core.store import Store
from posterpipe.settings import load_settings


def run_rehash() -> int:
    """Read everything, print what changed; the exit code, 1 where a file cannot be read.

    Raises posterpipe's own errors for a wrong setting, a missing folder or a store that cannot be
    used.
    """
    settings = load_settings()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    place = open_place(settings.landing, settings.root)
    store = Store(settings.path(settings.store))
    found = rehash(place, store, BarProgress(console))
    for title, names in [
        ("changed while path, size and date stayed", found.changed),
        ("not read before", found.new),
        ("cannot be read", found.unreadable),
    ]:
        if names:
            console.print(f"{len(names)} {title}:")
            for name in names:
                console.print(f"  {name}")
    console.print(f"{found.same} files in {place.location} are as they were read.")
    if found.changed or found.new:
        console.print(
            "The sensor `arrivals` takes this up while `make dev` runs; else materialize "
            "raw_posters, or run posterpipe demo."
        )
    return 1 if found.unreadable else 0
