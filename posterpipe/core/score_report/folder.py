"""A folder that is replaced whole: readers see the old one or the new one, nothing in between.

What belongs here: the temporary folder, the swap, sweeping up after a kill. What does not: what is
written into the folder.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posterpipe.core.files import fsync, remove_leftovers

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# The file system or the kernel cannot exchange: the pair of renames is for these.
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, which takes its place when the block ends without an error.

    On an error `target` stays as it was, and a power cut leaves one of the two, whole. Where the
    system can exchange two folders (Linux), no moment is without `target`; elsewhere it is two
    renames, and the first is undone if the second fails. A link in the place of `target` is
    replaced, and what it led to is left alone.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, f".{target.name}.*.tmp")
    mark = uuid.uuid4().hex[:12]
    new = target.with_name(f".{target.name}.{mark}.tmp")
    new.mkdir()
    try:
        yield new
        _put_on_disk(new)
        _take_place(new, target, target.with_name(f".{target.name}.{mark}.old.tmp"))
        fsync(target.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _put_on_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir() or path.stat().st_nlink == 1:
            fsync(path)
    fsync(folder)


def _take_place(new: Path, target: Path, old: Path) -> None:
    if target.is_symlink() or target.is_file():
        target.unlink()
    if not target.exists():
        os.rename(new, target)
        return
    if _exchange(new, target):
        return
    os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Two paths change places in one step, `renameat2`; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = (os.fsencode(one), os.fsencode(other))
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), os.fspath(other))
