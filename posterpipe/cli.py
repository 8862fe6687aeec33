"""The console command `posterpipe`.

What belongs here: its subcommands with their options, and how errors are said. What does not: what
they do (`commands`, `studio`).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from posterpipe.core.openmp import wait_briefly
from posterpipe.core.streams import (
    lost_output_is_told,
    open_closed_streams,
    print_all_characters,
)

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
    from posterpipe.commands.demo import run_demo

    raise typer.Exit(run_demo(timings))


@app.command()
def doctor() -> None:
    """Check this machine: hardware, packages, models, disk; and say what to do about it."""
    from posterpipe.commands.doctor import run_doctor

    raise typer.Exit(run_doctor())


@app.command()
def trace(
    generation_key: Annotated[
        str, typer.Argument(help="From the column generation_key of clip_scores; or its beginning.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
    posters: Annotated[
        int, typer.Option(min=0, help="How many posters of the training set the tree lists.")
    ] = 10,
) -> None:
    """Show where a score comes from: image, prompt, checkpoint, captions, posters, code, runs."""
    from posterpipe.commands.trace import run_trace

    run_trace(generation_key, as_json=as_json, posters=posters)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number of hours.")
    return value


@app.command()
def draw(
    model: Annotated[
        str,
        typer.Argument(
            help="A Stable Diffusion model: a directory of diffusers, one with LoRA weights of "
            "diffusers, or a hub id."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="Where the images go.")],
    suite: Annotated[
        Path | None, typer.Option(help="The prompts; those of the setting where it is left out.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The model of LoRA weights; base_model of the profile if left out."),
    ] = None,
) -> None:
    """Draw the prompt suite with any model into a folder, with the sampler's settings.

    Nothing of it is scored or becomes an asset.
    """
    from posterpipe.commands.draw import run_draw

    raise typer.Exit(run_draw(model, folder, suite=suite, base=base))


@app.command()
def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; else it is only listed.")] = False,
    keep: Annotated[
        int, typer.Option(min=1, help="Versions of each table that stay, the current one included.")
    ] = 3,
    grace_hours: Annotated[
        float,
        typer.Option(min=0, callback=_finite, help="What was used less long ago than this stays."),
    ] = 24.0,
    everything: Annotated[
        bool, typer.Option("--all", help="List every item, not the largest of each kind.")
    ] = False,
) -> None:
    """List what the store no longer needs; --yes removes it.

    Safe while the pipeline works. Scores and published files are never touched.
    """
    from posterpipe.commands.gc import run_gc

    raise typer.Exit(
        run_gc(yes=yes, keep=keep, grace_seconds=grace_hours * 3600, everything=everything)
    )


@app.command()
def rehash() -> None:
    """Read all posters and their captions again, and say which changed behind path, size and date.

    What changed is taken up by the next materialization of raw_posters, holdout_posters and
    human_captions; the sensor starts it.
    """
    from posterpipe.commands.rehash import run_rehash

    raise typer.Exit(run_rehash())


@app.command()
def backup(
    folder: Annotated[Path, typer.Argument(help="Where to: a new folder, or an empty one.")],
) -> None:
    """Copy what cannot be made again at once: posters, captions, the store, Dagster's history.

    Safe while the pipeline works.
    """
    from posterpipe.commands.backup import run_backup

    raise typer.Exit(run_backup(folder))


@app.command()
def studio(
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Where it listens.")] = 8501,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; anything but 127.0.0.1 opens the page to the network, "
            "without a login."
        ),
    ] = "127.0.0.1",
    public_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Name under which a proxy serves it, such as studio.example.org; may be repeated.",
        ),
    ] = None,
) -> None:
    """Serve the web page on which posters are made, captions mended and scores looked at."""
    from posterpipe.studio.serve import run_studio

    run_studio(host, port, public_host or ())


alerts = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Who is told when something fails."
)
app.add_typer(alerts, name="alerts")


@alerts.callback()
def _alerts() -> None:
    pass  # with a callback, a group of one command stays a group


@alerts.command()
def test() -> None:
    """Send a made-up message over each configured channel, and say which of them worked."""
    from posterpipe.commands.alerts import run_alerts_test

    raise typer.Exit(run_alerts_test())


champion = typer.Typer(
    no_args_is_help=False,
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Show which checkpoint is served, and why; pin one, or go back to the one before.",
)
app.add_typer(champion, name="champion")

Why = Annotated[str, typer.Option(help="The reason; kept in the log, which everybody sees.")]
Who = Annotated[str | None, typer.Option(help="Who decides; your login, where it is left out.")]


@champion.callback()
def _champion(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        show()


@champion.command()
def show() -> None:
    """Print the checkpoint that is served, and the latest decisions with their reasons."""
    from posterpipe.commands.champion import show as show_champion

    show_champion()


@champion.command()
def pin(
    checkpoint: Annotated[str, typer.Argument(help="Its id, or the beginning of it.")],
    why: Why,
    who: Who = None,
) -> None:
    """Serve a checkpoint until it is unpinned, whatever the gate decides meanwhile.

    What the gate rejected cannot be pinned.
    """
    from posterpipe.commands.champion import pin as pin_champion

    pin_champion(checkpoint, why, who)


@champion.command()
def unpin(why: Why, who: Who = None) -> None:
    """Give the choice back to the gate."""
    from posterpipe.commands.champion import unpin as unpin_champion

    unpin_champion(why, who)


@champion.command()
def rollback(why: Why, who: Who = None) -> None:
    """Go back to the champion before the present one, and pin it."""
    from posterpipe.commands.champion import rollback as roll_back

    roll_back(why, who)


def main() -> None:
    """Run the command. Errors of posterpipe are one sentence and exit code 1."""
    wait_briefly()
    open_closed_streams()
    print_all_characters()
    try:
        with lost_output_is_told():
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
