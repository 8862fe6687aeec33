"""What `posterpipe backup` does: copies what cannot be made again at once, and says what it copied.

What belongs here: which places are copied, and what the command prints. What does not: how they are
copied (`core.housekeeping.backup`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

from posterpipe.core.housekeeping.backup import WHOLE, back_up
from posterpipe.core.posters.listing import Folder, open_place
from posterpipe.core.progress import BarProgress
from posterpipe.home import home_of
from posterpipe.settings import Settings, load_settings


def run_backup(folder: Path) -> int:
    """Copy the store, Dagster's home and what people put in; the exit code.

    Raises posterpipe's own errors for a wrong setting, a folder that is not empty, and files that
    cannot be copied.
    """
    settings = load_settings()
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    done = back_up(
        folder,
        root=settings.root,
        store=settings.path(settings.store),
        places=_places(settings),
        progress=BarProgress(console),
    )
    console.print(f"{done.files} files, {decimal(done.size)}, in {done.folder}; {WHOLE} was last.")
    for place in done.missing:
        print(f"posterpipe: {place} is not there, and so not in the backup", file=sys.stderr)
    if not isinstance(landing := open_place(settings.landing, settings.root), Folder):
        print(f"posterpipe: the posters in {landing.location} are not copied", file=sys.stderr)
    return 0


def _places(settings: Settings) -> list[Path]:
    """Dagster's home and what people put in, as far as it is on this machine."""
    home = home_of(settings.root)
    inputs = [settings.holdout, settings.captions, settings.prompt_suite]
    landing = open_place(settings.landing, settings.root)
    posters = [landing.path] if isinstance(landing, Folder) else []
    return [home, *posters, *(settings.path(place) for place in inputs)]
