"""Digests of model folders, so that what was derived from a model is not used with another.

What belongs here: the digest of a folder of the starter models. What does not: the fingerprint by
which the pipeline knows any model (`core.models`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def folder_digest(folder: Path) -> str:
    """sha256 over the names and bytes of a folder's files, in name order."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
