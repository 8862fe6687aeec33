"""DAGSTER_HOME: this machine's `dagster.yaml` in it, unless a person wrote another one.

What belongs here: putting `deploy/dagster.yaml` there, making the history that it names, and seeing
whether the UI's address is free. What does not: what the file says. `python -m posterpipe.home` is
what `make dev` runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import sys
from pathlib import Path

from posterpipe.addresses import try_address
from posterpipe.core.files import write_atomic
from posterpipe.settings import default_root

_MARK = "# Written by posterpipe and renewed by it until something here is changed: {}\n"
"""The first line of what is written, with the digest of what follows."""


_DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")
"""Of the history that `deploy/dagster.yaml` asks for: Dagster's own SQLite files."""


class HomeError(Exception):
    """Dagster cannot use a folder as its home. The message names it and says what to do."""


def home_of(root: Path) -> Path:
    """DAGSTER_HOME (default: `.dagster` in the root). Raises HomeError."""
    home = Path(os.environ.get("DAGSTER_HOME") or root / ".dagster").resolve()
    # Dagster writes the path into a URL as it is: history would come to lie elsewhere, or nowhere.
    if re.search("[?]|%[0-9a-fA-F]{2}", str(home)):
        raise HomeError(
            f"{home}: Dagster cannot keep its history in a path with ? or with % and two digits; "
            "set DAGSTER_HOME to a folder without these, or move the checkout"
        )
    return home


def prepare_home(root: Path) -> Path:
    """The home with a dagster.yaml in it, to which DAGSTER_HOME is set. Raises HomeError.

    One that is there and is not as posterpipe wrote it stays, and a line on stderr says so.
    """
    home = home_of(root)
    home.mkdir(parents=True, exist_ok=True)
    os.environ["DAGSTER_HOME"] = str(home)
    source, target = root / "deploy" / "dagster.yaml", home / "dagster.yaml"
    if not source.exists():
        return home
    config = source.read_bytes()
    present = target.read_bytes() if target.exists() else None
    if present is None or _is_ours(present):
        wanted = _marked(config)
        if present != wanted:
            write_atomic(target, wanted)
        _create_history(home)
    elif present != config:
        print(
            f"posterpipe: {target} is kept as it is, since it was changed or written by hand; what "
            f"posterpipe would put there is {source}",
            file=sys.stderr,
        )
    return home


def _create_history(home: Path) -> None:
    """Has Dagster make its databases where one is missing.

    Of two processes that did so at once, such as `make dev` beside `make demo` on a fresh clone,
    both would fail over the other's tables.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # not every file system has locks
            lock = stack.enter_context(open(home / ".lock", "a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        if all((home / name).exists() for name in _DATABASES):
            return
        from dagster import DagsterInstance

        with DagsterInstance.from_config(str(home)) as instance:
            _ = instance.run_storage, instance.event_log_storage, instance.schedule_storage


def require_free(host: str, port: str) -> None:
    """Raises HomeError where the UI cannot be served at an address.

    A webserver that finds it taken says so in one line among many, and the daemon that was started
    beside it comes in the way of the other one's.
    """
    try:
        try_address(host, int(port) if port.isdecimal() else 0)
    except OSError as error:
        raise HomeError(
            f"the UI cannot be served at {host}, port {port} ({error.strerror}); if `make dev` is "
            f"running already, it is at http://{host}:{port}, otherwise choose another one: "
            "`make dev PORT=3001`"
        ) from error


def _marked(config: bytes) -> bytes:
    return _MARK.format(hashlib.sha256(config).hexdigest()).encode() + config


def _is_ours(present: bytes) -> bool:
    first, _, rest = present.partition(b"\n")
    mark = re.fullmatch(_MARK.strip().format("([0-9a-f]{64})").encode(), first)
    return mark is not None and mark[1].decode() == hashlib.sha256(rest).hexdigest()


if __name__ == "__main__":
    try:
        prepare_home(default_root())
        if sys.argv[1:]:
            require_free(sys.argv[1], sys.argv[2])
    except HomeError as error:
        sys.exit(f"posterpipe: {error}")
