"""What is known of a file from outside.

What belongs here: the digest of its bytes, and what tells cheaply that it is another one. What does
not: files by their content (`store`), folders of models (`models`) and listings (`listing`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

Signature = tuple[int, int, int]
"""Time of the last change in nanoseconds, size in bytes, inode."""


def sha256_of(path: Path | str) -> str:
    """sha256 (hex) of a file's bytes. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_signature(path: Path) -> Signature | None:
    """What changes when a file is written or replaced; None where there is none to be seen."""
    try:
        stats = path.stat()
    except OSError:
        return None
    return stats.st_mtime_ns, stats.st_size, stats.st_ino
