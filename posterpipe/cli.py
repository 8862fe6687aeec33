"""The console command `posterpipe`.

What belongs here: its subcommands and how errors are said. What does not: what they do (`demo`,
`doctor`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Posters in, a DreamBooth checkpoint, generated posters and CLIP scores out.",
)


@app.command()
def demo(
    timings: Annotated[
        Path | None, typer.Option(help="Write the wall time by stage into this file, as JSON.")
    ] = None,
) -> None:
    """Materialize the whole graph, then print the leaderboard. What is up to date is not redone."""
    from posterpipe.demo import run_demo

    raise typer.Exit(run_demo(timings))


@app.command()
def doctor() -> None:
    """Say what this machine has for posterpipe, and what to do where something is missing."""
    from posterpipe.doctor import run_doctor

    raise typer.Exit(run_doctor())


def main() -> None:
    """Run the command. Errors of posterpipe are one sentence and exit code 1."""
    try:
        app()
    except Exception as error:
        if not is_plain(error):
            raise
        print(f"posterpipe: {error}", file=sys.stderr)
        sys.exit(1)


def is_plain(error: BaseException) -> bool:
    """Whether an error's message is a sentence for people: posterpipe's own exceptions are."""
    return type(error).__module__.split(".")[0] == "posterpipe"


if __name__ == "__main__":
    main()
