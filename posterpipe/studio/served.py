"""Which models there are, and which one is served.

What belongs here: the base model, the champion and the other checkpoints as choices, and where the
decisions about them are read while the pipeline works. What does not: the rules of the decisions
(`core.champion.decisions`), loading a model (`painter`).
"""

from __future__ import annotations

import datetime as dt
import threading
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pandas as pd

from posterpipe.core.champion.decisions import (
    DECISION_COLUMNS,
    champion_of,
    read_decisions,
    verdicts,
)
from posterpipe.core.files import file_signature
from posterpipe.core.models import fingerprint, is_on_hub, known_fingerprint, locate
from posterpipe.core.provenance.checkpoints import RECORD_NAME
from posterpipe.core.store import CHECKPOINTS
from posterpipe.core.warehouse.database import Warehouse, WarehouseError
from posterpipe.settings import Settings

BUSY_SECONDS = 0.3
"""How long a page waits for the pipeline's database before it reads the published copy."""


@dataclass(frozen=True)
class Choice:
    """A model that can draw."""

    name: str
    """Fingerprint of the base model (its hub id until it is downloaded), or id of the
    checkpoint."""
    kind: str
    """base or tuned."""
    folder: Path
    """Of a checkpoint; the base model is looked for when it is loaded."""
    champion: bool = False
    verdict: str = ""
    """The gate's latest word on it: promote, hold, reject, or "" for none."""
    trained: str = ""
    """Date of its training, "" where it is not known."""

    @property
    def rejected(self) -> bool:
        """Whether the gate rejected it: it may be tried, and is never the default."""
        return self.verdict == "reject"

    @property
    def label(self) -> str:
        """How pages call it."""
        if self.kind == "base":
            return "Base model, the champion" if self.champion else "Base model"
        what = "Champion" if self.champion else "Checkpoint"
        trained = f", trained {self.trained}" if self.trained else ""
        told = {"reject": ", rejected by the gate", "hold": ", not promoted", "": ", not judged"}
        judged = "" if self.champion else told.get(self.verdict, "")
        return f"{what} {self.name[:8]}{trained}{judged}"


@dataclass(frozen=True)
class Served:
    """The models of one moment, the champion first."""

    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()
    """Sentences about what is not as it should be."""

    @property
    def champion(self) -> Choice:
        """What is served."""
        return self.choices[0]

    @property
    def base(self) -> Choice:
        """The base model."""
        return next(choice for choice in self.choices if choice.kind == "base")

    def named(self, name: str | None) -> Choice:
        """The choice of that name, or the champion where there is none any more."""
        return next((choice for choice in self.choices if choice.name == name), self.champion)

    def now(self, choice: Choice) -> Choice | None:
        """A choice of another moment as it is in this one; None where its model is gone."""
        if choice.kind == "base":
            return self.base  # its name changes when it is downloaded
        return next((each for each in self.choices if each.name == choice.name), None)


class Models:
    """Looks up which models there are; asks the database only when it changed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._checkpoints = settings.path(settings.store) / CHECKPOINTS
        self._lock = threading.Lock()
        self._signature: object = None
        self._decisions = pd.DataFrame(columns=list(DECISION_COLUMNS))

    def served(self) -> Served:
        """The models as of now. Raises ModelMissing where there is no base model either."""
        settings = self._settings
        base = Choice(_base_name(settings), "base", Path(settings.base_model.id))
        decisions = self._read()
        champion = champion_of(decisions, base.name)
        judged = verdicts(decisions)
        tuned = [
            Choice(
                record.parent.name, "tuned", record.parent, record.parent.name == champion,
                judged.get(record.parent.name, ""), _trained(record),
            )
            for record in sorted(self._checkpoints.glob(f"*/{RECORD_NAME}"))
            if not record.parent.name.startswith(".")
        ]  # fmt: skip
        # Dates as text sort as dates do.
        tuned.sort(key=lambda choice: choice.trained, reverse=True)
        notes = []
        if champion != base.name and not any(choice.champion for choice in tuned):
            notes.append(
                f"The champion {champion[:8]} is not in the store any more, so the base model "
                "draws; retrain, or choose another champion with posterpipe champion."
            )
            champion = base.name
        base = Choice(base.name, "base", base.folder, champion == base.name)
        ordered = [*(c for c in tuned if c.champion), base, *(c for c in tuned if not c.champion)]
        if base.champion:
            ordered.sort(key=lambda choice: not choice.champion)
        return Served(tuple(ordered), tuple(notes))

    def _read(self) -> pd.DataFrame:
        """The decisions: of the pipeline's database, or of its copy while that is locked."""
        private, public = self._settings.warehouse_path, self._settings.published_path
        signature = (
            file_signature(private),
            file_signature(Path(f"{private}.wal")),
            file_signature(public),
        )
        with self._lock:
            if signature == self._signature:
                return self._decisions
            for path, seconds in ((private, BUSY_SECONDS), (public, 5.0)):
                if not path.exists():
                    continue
                try:
                    self._decisions = read_decisions(Warehouse(path, busy_seconds=seconds))
                except (WarehouseError, duckdb.Error):
                    continue
                # Read from the copy because the other was locked: ask again next time.
                self._signature = signature if path == private or not private.exists() else None
                break
            return self._decisions


def _base_name(settings: Settings) -> str:
    """The fingerprint of the base model; its id while it is not downloaded, which is done when it
    draws. Raises ModelMissing where a directory is missing."""
    ref = settings.base_model
    if is_on_hub(ref, settings.root):
        return known_fingerprint(ref, settings.root) or ref.id
    return fingerprint(ref, settings.root)


def _trained(record: Path) -> str:
    """The record is the last file that a training writes."""
    moment = dt.datetime.fromtimestamp(record.stat().st_mtime, dt.UTC)
    return f"{moment:%Y-%m-%d %H:%M}"


def model_folder(choice: Choice, settings: Settings) -> Path:
    """Where the model's files lie, downloaded where the settings name a hub id. Raises
    ModelMissing."""
    if choice.kind == "base":
        return locate(settings.base_model, settings.root)
    return choice.folder
