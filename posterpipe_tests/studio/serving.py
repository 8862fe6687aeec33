"""A studio served by its command, as its users start it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served(
    folder: Path, *options: str, env: Mapping[str, str] | None = None
) -> Iterator[tuple[int, int]]:
    """Port and process of a studio that answers; `env` is added to this process's own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log.txt"
    command = [sys.executable, "-m", "posterpipe.cli", "studio", "--port", str(port), *options]
    with log.open("wb") as out:
        server = subprocess.Popen(
            command,
            env={**os.environ, **(env or {}), "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=folder, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield port, server.pid
    finally:
        server.terminate()
        server.wait(30)
