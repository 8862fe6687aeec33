"""What `posterpipe gc` does: lists garbage by kind and size, and removes it where that was asked.

What belongs here: what the command prints. What does not: what is garbage
(`core.housekeeping.garbage`).
"""

from __future__ import annotations

import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from posterpipe.core.housekeeping.garbage import (
    KINDS,
    Garbage,
    champions,
    find_garbage,
    remove_garbage,
)
from posterpipe.core.progress import BarProgress, duration
from posterpipe.core.store import Store
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.settings import load_settings

SHOWN = 3
"""Items of each kind that are listed unless all are."""


def run_gc(*, yes: bool, keep: int, grace_seconds: float, everything: bool) -> int:
    """Find garbage, print it, and with `yes` remove it; the exit code.

    `keep`: versions of each table that stay; `everything`: list every item. Raises posterpipe's own
    errors for a wrong setting or a store that cannot be used.
    """
    settings = load_settings()
    root = settings.path(settings.store)
    console = Console(highlight=False, markup=False, emoji=False)
    if not root.is_dir():
        console.print(f"{root}: there is no store yet, so nothing to tidy.", soft_wrap=True)
        return 0
    store = Store(root)
    warehouse = Warehouse(settings.warehouse_path, busy_seconds=60)
    garbage = find_garbage(
        store,
        keep_versions=keep,
        grace_seconds=grace_seconds,
        needed=champions(warehouse, keep),
    )
    _show(console, garbage, everything)
    if garbage.busy_since is not None:
        console.print("A step is working: what it may have used since it began is left alone.")
    if not garbage.items:
        console.print(
            f"Nothing to remove in {root}: it is named by one of the last {keep} versions of a "
            f"table, or was used within {duration(grace_seconds)}.",
            soft_wrap=True,
        )
        return 0
    if not yes:
        console.print(f"Nothing was removed. `posterpipe gc --yes` gives {_freed(garbage)} back.")
        return 0
    removal = remove_garbage(store, garbage, BarProgress(console))
    freed = decimal(sum(item.size for item in removal.removed))
    console.print(f"Removed {len(removal.removed)} items, {freed}.")
    if removal.in_use:
        console.print(f"Kept {len(removal.in_use)} items that were used meanwhile.")
    for problem in removal.problems:
        print(f"posterpipe: {problem}", file=sys.stderr)
    return 1 if removal.problems else 0


def _show(console: Console, garbage: Garbage, everything: bool) -> None:
    if not garbage.items:
        return
    table = Table("kind", "items", "size", "", box=SIMPLE_HEAD)
    table.columns[1].justify = table.columns[2].justify = "right"
    table.columns[-1].overflow = "fold"
    for kind in KINDS:
        items = sorted(garbage.of(kind), key=lambda item: (-item.size, item.name))
        if not items:
            continue
        shown = items if everything else items[:SHOWN]
        names = [f"{item.name}  {decimal(item.size)}" for item in shown]
        if len(items) > len(shown):
            names.append(f"… and {len(items) - len(shown)} more; --all lists them")
        size = decimal(sum(item.size for item in items))
        table.add_row(kind, str(len(items)), size, "\n".join(names))
    table.add_section()
    table.add_row("total", str(len(garbage.items)), _freed(garbage), "")
    console.print(table)


def _freed(garbage: Garbage) -> str:
    return decimal(garbage.size)
