"""The record of one benchmark figure, and where records are kept."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """`ratio` is how many times as fast ours is as the peer (or as small); where `lower_is_better`,
    what ours takes of what the peer takes.

    Where `required` says "at least" or "at most" and a number, that is asked of the ratio, or of
    `ours` in a row without one; other words are for people. Without `ours`, `unit` says why there
    is no figure. A row that says there or in `required` that something failed counts as missed.
    """

    name: str
    unit: str
    ours: float | None
    peer: float | None = None
    peer_name: str = ""
    ratio: float | None = None
    required: str = ""
    lower_is_better: bool = False
    """Of the ratio."""


_FAILED = ("failed (", "the script failed: ")

_LIMIT = re.compile(r"\bat (least|most) (\d[\d.,]*(?:e-?\d+)?)")


def has_requirement(row: Row) -> bool:
    """Whether anything is required of a row, in words or by a number, or it failed."""
    return bool(row.required) or is_met(row) is False


def is_met(row: Row) -> bool | None:
    """Whether a row meets what is required of it; None where no number is."""
    if row.unit.startswith(_FAILED) or row.required.startswith(_FAILED):
        return False
    limit = _LIMIT.search(row.required)
    if limit is None:
        return None
    value = row.ours if row.ratio is None else row.ratio
    if value is None:
        return None
    wanted = float(limit[2].rstrip(".,").replace(",", ""))
    return value >= wanted if limit[1] == "least" else value <= wanted


def machine() -> str:
    """The kind of machine results are filed under: `cpu-x86_64-2`, or the GPU's name."""
    try:
        import torch

        if torch.cuda.is_available():
            return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    except ImportError:
        pass
    return f"cpu-{platform.machine()}-{os.cpu_count()}"


def describe_machine() -> str:
    """What figures were measured on, in a line: processor, memory, GPU, versions."""
    import bitsandbytes
    import diffusers
    import psutil
    import torch
    import transformers

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{cores} cores of {_processor()}, {psutil.virtual_memory().total / 2**30:.0f} GiB"]
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        parts.insert(0, f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    versions = [f"Python {platform.python_version()}"]
    versions += [
        f"{module.__name__} {module.__version__}"
        for module in (torch, diffusers, transformers, bitsandbytes)
    ]
    return f"{'; '.join(parts)}; {', '.join(versions)}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def filed() -> list[dict]:
    """This machine's rows, as they were filed."""
    path = RESULTS / f"{machine()}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def merge(rows: list[Row], *, in_parts: bool = False) -> Path:
    """Writes the rows into this machine's file; rows of other benchmarks stay as they were.

    in_parts: so do rows of the same benchmark that have other names; each row takes the place of
    the one that had its name. What is measured again keeps its place in the file.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine()}.json"
    everything = filed()
    if in_parts:
        for row in rows:
            everything = _with([row], everything, lambda name: name)
    else:
        for topic in dict.fromkeys(_topic(row.name) for row in rows):
            own = [row for row in rows if _topic(row.name) == topic]
            everything = _with(own, everything, _topic)
    _write(path, everything)
    _write(_machines_file(), {**machines(), machine(): describe_machine()})
    return path


def machines() -> dict[str, str]:
    """A line about each machine with results, by the name that they are filed under."""
    path = _machines_file()
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _machines_file() -> Path:
    return RESULTS.parent / "machines.json"


def _write(path: Path, values: object) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _topic(name: str) -> str:
    """The benchmark that a row is of."""
    return name.split(".")[0]


def _with(rows: list[Row], filed: list[dict], of: Callable[[str], str]) -> list[dict]:
    """What is filed, with these rows in the place of those that are `of` the same; where there are
    none, below their benchmark's last row, or at the end."""
    replaced = {of(row.name) for row in rows}
    topics = {_topic(row.name) for row in rows}
    places = [place for place, row in enumerate(filed) if of(row["name"]) in replaced]
    below = [place + 1 for place, row in enumerate(filed) if _topic(row["name"]) in topics]
    place = places[0] if places else below[-1] if below else len(filed)
    stay = [[row for row in part if of(row["name"]) not in replaced]
            for part in (filed[:place], filed[place:])]  # fmt: skip
    return [*stay[0], *map(asdict, rows), *stay[1]]


def figure(ours: float | None, unit: str) -> str:
    """A figure with its unit, or why there is none."""
    return unit if ours is None else f"{ours:g} {unit}"


def markdown(rows: list[Row]) -> str:
    """The table of the pages."""
    lines = [
        "| benchmark | ours | peer | ratio | required |",
        "|---|---:|---:|---:|---|",
    ]
    for row in rows:
        peer = "" if row.peer is None else f"{row.peer:g} ({row.peer_name})"
        better = "lower" if row.lower_is_better else "higher"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}, {better} is better"
        lines.append(
            f"| `{row.name}` | {figure(row.ours, row.unit)} | {peer} | {ratio} | {row.required} |"
        )
    return "\n".join(lines)
