"""The record of one benchmark figure, and where records are kept."""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """`ratio` is peer / ours for times (above 1: we are faster) or as `required` says in words.

    Where `required` says "at least" or "at most" and a number, that is asked of the ratio, or of
    `ours` in a row without one; other words are for people.
    """

    name: str
    unit: str
    ours: float
    peer: float | None = None
    peer_name: str = ""
    ratio: float | None = None
    required: str = ""


_LIMIT = re.compile(r"\bat (least|most) (\d[\d.,]*(?:e-?\d+)?)")


def is_met(row: Row) -> bool | None:
    """Whether a row meets what is required of it; None where no number is."""
    limit = _LIMIT.search(row.required)
    if limit is None:
        return None
    value = row.ours if row.ratio is None else row.ratio
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


def filed() -> list[dict]:
    """This machine's rows, as they were filed."""
    path = RESULTS / f"{machine()}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def merge(rows: list[Row], *, in_parts: bool = False) -> Path:
    """Writes the rows into this machine's file; rows of other benchmarks stay as they were.

    in_parts: so do rows of the same benchmark that have other names; each row takes the place of
    the one that had its name.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine()}.json"

    new = [asdict(row) for row in rows]

    def stays(row: dict) -> bool:
        of = (lambda name: name) if in_parts else (lambda name: name.split(".")[0])
        return of(row["name"]) not in {of(other["name"]) for other in new}

    everything = [row for row in filed() if stays(row)] + new
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def markdown(records: list[dict]) -> str:
    """The README's table."""
    lines = [
        "| benchmark | ours | peer | ratio | required |",
        "|---|---:|---:|---:|---|",
    ]
    for record in records:
        peer = "" if record["peer"] is None else f"{record['peer']:g} ({record['peer_name']})"
        ratio = "" if record["ratio"] is None else f"{record['ratio']:.2f}"
        lines.append(
            f"| `{record['name']}` | {record['ours']:g} {record['unit']} | {peer} | {ratio} "
            f"| {record['required']} |"
        )
    return "\n".join(lines)
