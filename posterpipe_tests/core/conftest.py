"""What tests of the core share.

What belongs here: fixtures and stand-ins that several of its files ask for. What does not: tables
and pictures to work on, which lie in modules beside the tests.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from posterpipe.core.store import Store
from posterpipe_tests.models import build_tiny_stable_diffusion


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_stable_diffusion(tmp_path_factory.mktemp("models") / "tiny")


class Disk:
    """What a power cut would leave, by what is synced and renamed in this process."""

    def __init__(self) -> None:
        self.renamed: list[Path] = []
        """Where to, in order."""
        self.half: list[Path] = []
        """What was given its name before all of it was on the disk, the names in folders too."""
        self.unnamed: dict[tuple[int, int], Path] = {}
        """What was given its name, and would not have it, by its folder."""
        self._synced: set[tuple[int, ...]] = set()

    def sync(self, file: int) -> None:
        """In the place of `os.fsync`."""
        stats = os.fstat(file)
        self._synced.add(_state(stats))
        self.unnamed.pop((stats.st_dev, stats.st_ino), None)

    def rename(self, source: Path, target: Path) -> None:
        """Right before a rename."""
        inside = source.rglob("*") if source.is_dir() and not source.is_symlink() else ()
        for path in (source, *inside):
            # A link is nothing but its name.
            if not path.is_symlink() and _state(path.stat()) not in self._synced:
                self.half.append(target / path.relative_to(source))
        self.renamed.append(target)
        stats = target.parent.stat()
        self.unnamed[stats.st_dev, stats.st_ino] = target


def _state(stats: os.stat_result) -> tuple[int, ...]:
    """Another one as soon as a file grows, or a folder gets another name. A file's time is no part
    of it: that of a sealed one is set when its bytes are on the disk."""
    named_at = stats.st_mtime_ns if stat.S_ISDIR(stats.st_mode) else 0
    return stats.st_dev, stats.st_ino, stats.st_size, named_at


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Nothing is synced really, see `posterpipe_tests.conftest`; but what would be is recorded."""
    disk = Disk()
    monkeypatch.setattr(os, "fsync", disk.sync)

    def recorded(rename: Any) -> Any:
        def renames(source: str | Path, target: str | Path, **options: Any) -> None:
            disk.rename(Path(source), Path(target))
            rename(source, target, **options)

        return renames

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, recorded(getattr(os, name)))
    return disk


def disk_is_full(*_: object) -> None:
    """In the place of what writes."""
    raise OSError(28, "No space left on device")
