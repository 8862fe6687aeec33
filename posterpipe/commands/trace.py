"""What `posterpipe trace` does: shows where a score comes from.

What belongs here: which databases are asked, and how the answer is printed. What does not: finding
it (`core.trace`).
"""

from __future__ import annotations

from rich.console import Console

from posterpipe.core.store import Store
from posterpipe.core.trace import TREE_WIDTH, as_tree, trace
from posterpipe.core.warehouse.database import Warehouse
from posterpipe.settings import load_settings


def run_trace(generation_key: str, *, as_json: bool, posters: int) -> None:
    """Print the origin of a score as a tree, or all of it as JSON.

    `generation_key` or its beginning; `posters`: how many of the training set the tree lists.
    Raises NotTraceable where no score or more than one is meant.
    """
    settings = load_settings()
    # While the pipeline writes, the warehouse is locked, and the published copy answers.
    databases = [
        Warehouse(settings.warehouse_path, busy_seconds=5),
        Warehouse(settings.published_path),
    ]
    traced = trace(Store(settings.path(settings.store)), databases, generation_key)
    if as_json:
        print(traced.to_json())
    else:
        Console(highlight=False, width=TREE_WIDTH).print(as_tree(traced, shown_posters=posters))
