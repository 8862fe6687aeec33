"""`prepare_images`: posters into training images, against the thesis's loop over a folder.

300 JPEG posters of 1400x2100 pixels become PNGs of 512x512. The loop is the thesis's: Pillow opens,
converts to RGB, resizes with LANCZOS and saves, one by one. Ours runs as the assets run it, with
the store: `prepare_images` from the usable posters of a scan to the table of training images,
`prepare_images.with_scan` from the landing folder, so that hashing, decoding every poster whole to
see that it is one, and copying it into the store are counted too. The loop does none of that.

Each side runs in a process of its own, on two cores, and they take turns. Equal work is checked on
every pair of images: no PSNR is below 40 dB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.rows import Row

POSTERS = 300
FEW = 30
"""A tenth of them, to see that the memory does not grow with their number."""
ROUNDS = 3
SIZE = (1400, 2100)
TRAINING_SIZE = (512, 512)
LEAST_PSNR = 40.0


def draw_posters(folder: Path, count: int) -> None:
    """Posters with the grain and the vignette of printed ones: flat colours would be too easy."""
    from posterpipe.core.parallel import parallel_map
    from posterpipe.starter.render import render
    from posterpipe.starter.world import sample_scene

    width, height = SIZE
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((height, width, 1), dtype=np.float32) * 2.5
    grain = noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + np.roll(noise, (1, 1), (0, 1))
    x, y = np.linspace(-1, 1, width), np.linspace(-1, 1, height)
    light = (1 - 0.12 * (x[None, :, None] ** 2 + y[:, None, None] ** 2)).astype(np.float32)

    def draw(number: int) -> None:
        own = np.random.default_rng(number)
        image = render(sample_scene(own, style="poster"), width, height, supersample=1)
        shift = (int(own.integers(height)), int(own.integers(width)))
        pixels = np.asarray(image, dtype=np.float32) * light + np.roll(grain, shift, (0, 1))
        poster = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        poster.save(folder / f"poster_{number:03}.jpg", quality=88)

    for _ in parallel_map(draw, range(count)):
        pass


def thesis(landing: Path, output: Path) -> Callable[[], list[Path]]:
    """The thesis's loop. It returns the images in the order of the posters' names."""
    output.mkdir()

    def run() -> list[Path]:
        made = []
        for number, name in enumerate(sorted(os.listdir(landing))):
            image = Image.open(landing / name).convert("RGB")
            image = image.resize(TRAINING_SIZE, Image.Resampling.LANCZOS)
            made.append(output / f"{number}.png")
            image.save(made[-1])
        return made

    return run


def ours(landing: Path, output: Path, *, with_scan: bool) -> Callable[[], list[Path]]:
    """What the assets run, up to their tables; the scan is done before unless it is counted."""
    from posterpipe.core.images import resize_posters
    from posterpipe.core.posters.landing import scan
    from posterpipe.core.posters.listing import Folder
    from posterpipe.core.store import Store
    from posterpipe.settings import ImageSettings

    width, height = TRAINING_SIZE
    settings = ImageSettings(width=width, height=height)
    store = Store(output)
    scanned = None if with_scan else scan(Folder(landing), settings, store)

    def run() -> list[Path]:
        posters = scan(Folder(landing), settings, store) if scanned is None else scanned
        store.write_table("raw_posters", posters)
        resized = resize_posters(store, posters, settings)
        store.write_table("resized_posters", resized)
        images = dict(zip(resized["poster_id"], resized["image"], strict=True))
        return [store.path(images[poster_id], ".png") for poster_id in posters["poster_id"]]

    return run


def _work(side: str, landing: Path, output: Path) -> None:
    """One run of one side; prints what it took as JSON."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    if side == "thesis":
        run = thesis(landing, output)
    else:
        run = ours(landing, output, with_scan=side == "with_scan")
    started = time.perf_counter()
    made = run()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_mb": _peak_mb(), "images": list(map(str, made))}))


def _peak_mb() -> float:
    """The most memory that this process has held, in MB."""
    try:
        # `getrusage` would count what the process held from which this one was forked.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _run(side: str, landing: Path, output: Path) -> dict:
    command = [sys.executable, "-m", "benchmarks.prepare_images", side, str(landing), str(output)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def psnr(ours: Path, theirs: Path) -> float:
    """Peak signal-to-noise ratio of two images in dB; 99 for equal ones."""
    a, b = (np.asarray(Image.open(path), dtype=np.float64) for path in (ours, theirs))
    error = float(np.mean((a - b) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def run(posters: int = POSTERS, few: int = FEW, rounds: int = ROUNDS) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        landing, small = folder / "landing", folder / "small"
        landing.mkdir()
        small.mkdir()
        draw_posters(landing, posters)
        for path in sorted(landing.iterdir())[:few]:
            (small / path.name).hardlink_to(path)
        found: dict[str, list[dict]] = {"thesis": [], "ours": [], "with_scan": []}
        for number in range(rounds):
            for side, results in found.items():
                results.append(_run(side, landing, folder / f"{side}_{number}"))
        few_peak = _run("with_scan", small, folder / "few")["peak_mb"]
        pairs = zip(found["ours"][0]["images"], found["thesis"][0]["images"], strict=True)
        quality = [psnr(Path(a), Path(b)) for a, b in pairs]
    if min(quality) < LEAST_PSNR:
        raise RuntimeError(
            f"prepare_images: a PSNR of {min(quality):.1f} dB is below {LEAST_PSNR}: the two sides "
            "do not do the same work, so their times say nothing"
        )
    seconds = {
        side: statistics.median(result["seconds"] for result in results)
        for side, results in found.items()
    }
    peak = {side: max(result["peak_mb"] for result in found[side]) for side in found}
    peer = "thesis's loop"
    return [
        Row(
            "prepare_images",
            "s",
            round(seconds["ours"], 2),
            round(seconds["thesis"], 2),
            peer,
            round(seconds["thesis"] / seconds["ours"], 2),
            "at least 5 times as fast on two cores",
        ),
        Row(
            "prepare_images.with_scan",
            "s",
            round(seconds["with_scan"], 2),
            round(seconds["thesis"], 2),
            peer,
            round(seconds["thesis"] / seconds["with_scan"], 2),
        ),
        Row(
            "prepare_images.psnr_lowest",
            "dB",
            round(min(quality), 1),
            required=f"at least {LEAST_PSNR:g} dB against the loop's images",
        ),
        Row(
            "prepare_images.peak_memory",
            "MB",
            round(max(peak["ours"], peak["with_scan"])),
            round(few_peak),
            f"the same with {few} posters",
            round(few_peak / peak["with_scan"], 2),
            "does not grow with the number of posters",
        ),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One side of the benchmark, for `run`.")
    parser.add_argument("side", choices=("thesis", "ours", "with_scan"))
    parser.add_argument("landing", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    _work(arguments.side, arguments.landing, arguments.output)
