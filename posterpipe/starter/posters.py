"""The starter project's own posters: `python -m posterpipe.starter.posters [FOLDER]` draws them.

What belongs here: the list of posters, chosen by hand so that each looks well on its own, and
writing them as image files. What does not: how a poster is drawn (`render`) or laid out (`world`).

The 50 of `raw_posters` are what a first run trains on; the 16 of `holdout_posters` are never
trained on. No title, and no combination of kind and colours, occurs in both. The same versions of
Pillow and of the font packages give the same files byte for byte.
"""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from posterpipe.starter.render import render
from posterpipe.starter.world import Scene, poster_scene

Row = tuple[str, str, str, str, str, str, str, int, str]
"""Title, kind, object colour, background, halo colour, layout, ground, font, title position."""

RAW: tuple[Row, ...] = (
    ("Star Sailor", "rocket", "red", "teal", "cream", "rays", "hill", 0, "bottom"),
    ("Tangerine Orbit", "rocket", "orange", "black", "cream", "rings", "none", 1, "bottom"),
    ("Borrowed Comet", "rocket", "cream", "purple", "orange", "disc", "hill", 3, "bottom"),
    ("The Pepper Countdown", "rocket", "blue", "yellow", "cream", "rays", "waves", 2, "bottom"),
    ("Copper Liftoff", "rocket", "yellow", "blue", "pink", "disc", "none", 4, "top"),
    ("Marzipan Regatta", "sailboat", "red", "blue", "cream", "rings", "waves", 3, "bottom"),
    ("Thistle Lagoon", "sailboat", "cream", "teal", "orange", "rays", "waves", 1, "bottom"),
    ("Drowsy Mariner", "sailboat", "orange", "purple", "cream", "disc", "waves", 0, "top"),
    ("Plum Harbour", "sailboat", "purple", "cream", "orange", "disc", "waves", 2, "bottom"),
    ("Woollen Fathom", "whale", "blue", "orange", "cream", "rays", "waves", 0, "bottom"),
    ("Button Tide", "whale", "teal", "black", "yellow", "disc", "waves", 4, "bottom"),
    ("Humble Spout", "whale", "pink", "blue", "cream", "rings", "waves", 1, "bottom"),
    ("The Velvet Fathom", "whale", "black", "red", "cream", "disc", "waves", 3, "bottom"),
    ("Saffron Current", "whale", "yellow", "teal", "pink", "rays", "waves", 2, "top"),
    ("Crooked Keep", "castle", "purple", "yellow", "orange", "rays", "hill", 3, "bottom"),
    ("Biscuit Rampart", "castle", "orange", "teal", "cream", "disc", "flat", 1, "bottom"),
    ("Lantern Moat", "castle", "yellow", "black", "pink", "rings", "hill", 0, "bottom"),
    ("Juniper Turret", "castle", "cream", "green", "orange", "disc", "hill", 4, "top"),
    ("Whistle Grove", "tree", "green", "cream", "orange", "rings", "hill", 2, "bottom"),
    ("Pepper Timber", "tree", "teal", "orange", "yellow", "rays", "hill", 1, "bottom"),
    ("Willow Thicket", "tree", "black", "teal", "yellow", "disc", "flat", 3, "bottom"),
    ("Sunday Evergreen", "tree", "green", "red", "cream", "rays", "hill", 0, "bottom"),
    ("Feather Ascent", "balloon", "red", "cream", "teal", "disc", "hill", 4, "bottom"),
    ("Wander Zephyr", "balloon", "yellow", "purple", "teal", "rays", "hill", 0, "bottom"),
    ("Paper Updraft", "balloon", "pink", "teal", "cream", "rings", "none", 3, "bottom"),
    ("Mellow Drift", "balloon", "orange", "blue", "cream", "disc", "waves", 2, "top"),
    ("Tangerine Drizzle", "umbrella", "orange", "black", "teal", "disc", "none", 4, "bottom"),
    ("Sunday Puddle", "umbrella", "red", "pink", "cream", "rings", "hill", 1, "bottom"),
    ("Barley Shower", "umbrella", "blue", "yellow", "orange", "rays", "none", 2, "bottom"),
    ("Drowsy Parasol", "umbrella", "yellow", "red", "cream", "disc", "waves", 3, "bottom"),
    ("Thistle Toadstool", "mushroom", "red", "green", "cream", "rays", "hill", 0, "bottom"),
    ("Humble Morel", "mushroom", "purple", "teal", "yellow", "disc", "hill", 3, "bottom"),
    ("Plum Spore", "mushroom", "pink", "black", "cream", "rings", "flat", 2, "bottom"),
    ("The Ginger Forager", "mushroom", "orange", "purple", "teal", "disc", "hill", 1, "top"),
    ("Copper Automaton", "robot", "orange", "blue", "cream", "rays", "flat", 2, "bottom"),
    ("Tinsel Gearbox", "robot", "teal", "cream", "orange", "disc", "flat", 4, "bottom"),
    ("Sunday Rivet", "robot", "yellow", "black", "teal", "rings", "hill", 1, "bottom"),
    ("Biscuit Circuit", "robot", "red", "yellow", "teal", "disc", "hill", 0, "top"),
    ("Velvet Whisker", "cat", "black", "orange", "yellow", "disc", "hill", 3, "bottom"),
    ("Marzipan Paws", "cat", "pink", "green", "cream", "rings", "hill", 0, "bottom"),
    ("Crooked Tomcat", "cat", "orange", "teal", "cream", "rays", "flat", 2, "bottom"),
    ("Saffron Mouser", "cat", "yellow", "blue", "cream", "disc", "flat", 1, "bottom"),
    ("Ginger Detour", "car", "cream", "red", "yellow", "rays", "flat", 2, "bottom"),
    ("Barley Roadster", "car", "green", "yellow", "orange", "disc", "hill", 3, "bottom"),
    ("Juniper Mileage", "car", "red", "blue", "yellow", "rings", "hill", 4, "bottom"),
    ("Pocket Motor", "car", "teal", "pink", "cream", "disc", "flat", 0, "top"),
    ("Feather Chord", "guitar", "red", "purple", "cream", "rays", "none", 3, "bottom"),
    ("Whistle Ballad", "guitar", "yellow", "green", "cream", "rings", "hill", 0, "bottom"),
    ("Woollen Strummer", "guitar", "blue", "orange", "yellow", "disc", "waves", 1, "bottom"),
    ("Plum Serenade", "guitar", "purple", "cream", "yellow", "disc", "none", 4, "bottom"),
)

HOLDOUT: tuple[Row, ...] = (
    ("Mellow Orbit", "rocket", "teal", "red", "cream", "disc", "hill", 3, "bottom"),
    ("Nimble Comet", "rocket", "pink", "black", "teal", "rings", "none", 0, "bottom"),
    ("The Ginger Breeze", "sailboat", "green", "orange", "cream", "rays", "waves", 4, "bottom"),
    ("Lopsided Tide", "whale", "purple", "yellow", "teal", "disc", "waves", 1, "bottom"),
    ("Pocket Realm", "castle", "red", "cream", "teal", "rays", "hill", 3, "bottom"),
    ("Feather Rampart", "castle", "pink", "blue", "yellow", "disc", "flat", 2, "top"),
    ("The Nimble Pine", "tree", "cream", "blue", "orange", "rings", "hill", 1, "bottom"),
    ("Tinsel Altitude", "balloon", "purple", "orange", "cream", "rays", "none", 0, "bottom"),
    ("Button Rainfall", "umbrella", "teal", "purple", "yellow", "disc", "hill", 2, "bottom"),
    ("Lantern Fungus", "mushroom", "blue", "pink", "cream", "rays", "hill", 4, "bottom"),
    ("Pocket Dynamo", "robot", "green", "pink", "yellow", "disc", "flat", 1, "bottom"),
    ("Whistle Purr", "cat", "black", "cream", "pink", "disc", "hill", 0, "top"),
    ("Lopsided Whisker", "cat", "teal", "yellow", "orange", "rings", "flat", 4, "bottom"),
    ("Paper Gasket", "car", "orange", "green", "cream", "rays", "hill", 2, "bottom"),
    ("The Barley Fret", "guitar", "black", "yellow", "cream", "disc", "hill", 3, "bottom"),
    ("Button Serenade", "guitar", "teal", "orange", "cream", "rings", "none", 1, "bottom"),
)

_SIZES = ((600, 900), (640, 960), (720, 1080), (800, 1200))
"""Widths and heights in pixels: they vary, as those of collected posters do."""


def scenes(rows: Iterable[Row]) -> list[Scene]:
    """The posters' scenes, in the order of the rows."""
    return [
        poster_scene(
            kind=kind,
            object_colour=object_colour,
            background=background,
            accent=accent,
            title=title,
            title_position=position,
            size=0.62 + 0.02 * (number % 4),
            layout=layout,
            ground=ground,
            font=font,
            flip=kind in ("whale", "car", "guitar", "cat") and number % 2 == 1,
            detail=number,
        )
        for number, (
            title,
            kind,
            object_colour,
            background,
            accent,
            layout,
            ground,
            font,
            position,
        ) in enumerate(rows)
    ]


def write_posters(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Draw posters into `folder` (made if need be) and return the files; others are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, scene in enumerate(scenes(rows)):
        width, height = _SIZES[number % len(_SIZES)]
        image = render(scene, width, height, supersample=4)
        stem = (scene.title or scene.kind).lower().replace(" ", "_")
        # Three of five are PNG: a collected folder is mixed, and both readers get exercised.
        suffix = ".jpg" if number % 5 in (1, 3) else ".png"
        file = folder / (stem + suffix)
        _save(image, file)
        files.append(file)
    return files


def _save(image: Image.Image, file: Path) -> None:
    """Write an image under a temporary name, then rename it, so that no half file is ever seen."""
    partial = file.with_name(f".{file.name}.partial")
    if file.suffix == ".jpg":
        image.save(partial, "JPEG", quality=90, subsampling=0, optimize=True)
    else:
        image.save(partial, "PNG", optimize=True)
    os.replace(partial, file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the starter project's posters.")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("data"), help="data folder (default: data)"
    )
    folder = parser.parse_args().folder
    for rows, name in ((RAW, "raw_posters"), (HOLDOUT, "holdout_posters")):
        files = write_posters(rows, folder / name)
        total = sum(file.stat().st_size for file in files)
        print(f"{folder / name}: {len(files)} posters, {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
