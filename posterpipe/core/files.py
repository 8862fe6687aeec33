"""Files: the digest of one, what tells cheaply that it is another, writing and linking it.

What belongs here: what is known of a file from outside, writing that survives a power cut, what
killed writers left, second names, and seals. What does not: files by their content (`store`),
folders of models (`models`) and listings (`listing`).

A sealed file is never to be changed: its owner may not write to it, and its modification time is a
whole second, which the system hardly ever gives a file that is written. So one that somebody saved
over, perhaps through another link to it, is told without reading it (`unchanged`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

SECOND = 1_000_000_000
"""In nanoseconds."""

LEFT_SECONDS = 86_400.0
"""What a killed process has left is removed when it is older than this."""

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


def unchanged(path: Path | str, blob: str) -> bool:
    """Whether a file holds the bytes of that sha256 (hex).

    A sealed one is believed; any other is read, and sealed when it holds them, as blobs from before
    there were seals. False where it cannot be read.
    """
    try:
        if os.stat(path).st_mtime_ns % SECOND == 0:
            return True
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != blob:
                return False
    except OSError:
        return False
    with suppress(OSError):  # not ours: it is read again the next time
        mark_used(path, 0)
    return True


def mark_used(path: Path | str | int, fraction: int) -> None:
    """Marks a file as used now, with that many nanoseconds in its time: 0 for what is sealed.
    Raises OSError."""
    moment = time.time_ns() // SECOND * SECOND + fraction
    try:
        os.utime(path, ns=(moment, moment))
    except PermissionError:
        os.utime(path)  # whoever may write may say that it is now, only the owner when it was


def write_atomic(path: Path, data: bytes, *, sealed: bool = False) -> None:
    """Write a file so that others see all of it or nothing, even after a power cut.

    `sealed`: it is not to be changed (see above). Raises OSError, which names the file.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if sealed:
                # The owner's permission only: those who share the store by their group need theirs
                # to mark the file as used, and to link to it.
                mode = os.fstat(file.fileno()).st_mode
                os.fchmod(file.fileno(), stat.S_IMODE(mode) & ~stat.S_IWUSR)
                mark_used(file.fileno(), 0)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk is told without one
        raise
    fsync(path.parent)


def link_or_copy(source: Path | str, target: Path | str) -> bool:
    """Give a file a second name; a copy with its date and permissions where the file system has no
    such names. Whether it is a link; a copy may not be on the disk yet. Raises OSError."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        return False
    return True


def has_symbolic_links(folder: Path) -> bool:
    """Whether the file system of a folder does; exFAT and some shares have none. Raises OSError
    where nothing can be written there."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp") as tried:
        try:
            os.symlink("nowhere", Path(tried, "link"))
        except OSError as error:
            return error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
    return True


def remove_leftovers(folder: Path, pattern: str = ".*.tmp") -> None:
    """Remove the temporary folders that killed processes left: those older than a day."""
    for left in folder.glob(pattern):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def fsync(path: Path) -> None:
    """Make the bytes of a file that another one wrote, or the renames inside a folder, survive a
    power cut, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return  # what may be written need not be readable
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse; the rename itself is still atomic
    finally:
        os.close(handle)
