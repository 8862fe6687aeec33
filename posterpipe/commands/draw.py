"""What `posterpipe draw` does: has any model answer the prompt suite, beside the pipeline.

What belongs here: which suite, base model and settings count, and what the command prints. What
does not: drawing, and the folder's content (`core.suite_folder`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from posterpipe.core.progress import BarProgress
from posterpipe.core.prompts import load_suite
from posterpipe.core.sampler import text_limit
from posterpipe.core.store import Store
from posterpipe.core.suite_folder import INDEX, SHEET, draw_into, find_model
from posterpipe.settings import ModelRef, load_settings


def run_draw(model: str, folder: Path, *, suite: Path | None, base: str | None) -> int:
    """Draw the suite with `model` into `folder` and say what came of it; the exit code, 1 where an
    image could not be drawn.

    `suite` and `base` take the place of the settings `prompt_suite` and `base_model`. Raises
    posterpipe's own errors for wrong settings, a missing model and a suite with mistakes.
    """
    settings = load_settings()
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    base_ref = ModelRef(id=_from_here(base)) if base else settings.base_model
    found = find_model(ModelRef(id=_from_here(model)), base_ref, settings.root)
    prompts = load_suite(
        suite or settings.path(settings.prompt_suite),
        limit=text_limit(found.base or found.folder),
        sampler=settings.sampler,
    )
    store = Store(settings.path(settings.store))
    try:
        index = draw_into(folder, store, prompts, found, settings.sampler, BarProgress(console))
    except OSError as error:
        where = error.filename or folder
        print(
            f"posterpipe: {where}: cannot be written ({error.strerror or error}); name another "
            "folder. What was drawn is kept: the same command goes on",
            file=sys.stderr,
        )
        return 1
    console.print(
        f"{len(index)} images of {len(prompts)} prompts by {found.folder}\n"
        f"look at {folder / SHEET}; every image is named in {folder / INDEX}"
    )
    missing = index[index["status"] != "ok"]
    for row in missing.itertuples():
        said = f"{row.prompt_id}, seed {row.seed}: {row.status}: {row.reason}"
        print(f"posterpipe: {said}", file=sys.stderr)
    return int((missing["status"] == "failed").any())


def _from_here(model: str) -> str:
    """A directory as it is typed starts where the command runs, not at the project's root."""
    folder = Path(model).expanduser()
    return str(folder.absolute()) if folder.is_dir() else model
