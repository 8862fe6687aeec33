"""The painter in a process of its own.

What belongs here: starting that process, talking to it, and noticing that it died. What does not:
what it does (`painter`), and whose turn it is (`engine`).

Python runs one thread at a time: beside a model at work, or one that is being loaded, pages would
answer in jerks, and the model would draw in jerks beside pages. And a model that takes more memory
than there is takes its own process with it, not the studio.

The two talk over a connection that nobody else has: the standard input of the process.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from posterpipe.settings import Settings

if TYPE_CHECKING:
    from posterpipe.studio.engine import Order
    from posterpipe.studio.painter import Poster
    from posterpipe.studio.served import Choice

STOP_SECONDS = 5.0
"""How long the process may take to end by itself."""


class PainterDied(RuntimeError):
    """The process ended while it worked. The message is a sentence."""


class RemotePainter:
    """`Painter` in another process, which is started when it is needed and again when it died.

    Called by one thread at a time.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._loaded: set[str] = set()

    @property
    def pid(self) -> int | None:
        """Of the process, None where there is none."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def ready(self, choice: Choice) -> bool:
        """Whether the model is loaded."""
        return self.pid is not None and choice.name in self._loaded

    def prepare(self, choice: Choice) -> None:
        """Load a model. Raises what `Painter.prepare` raises, and PainterDied."""
        self._ask(("prepare", (choice,)), lambda step, steps: None)

    def paint(
        self, order: Order, choice: Choice, seed: int, on_step: Callable[[int, int], None]
    ) -> Poster:
        """One poster, as `Painter.paint`. Raises PainterDied as well."""
        poster: Poster = self._ask(("paint", (order, choice, seed)), on_step)
        return poster

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        if process is None or connection is None:
            return
        with contextlib.suppress(OSError):
            connection.send(("end", ()))
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _ask(self, request: tuple[str, Any], on_step: Callable[[int, int], None]) -> Any:
        try:
            connection = self._connected()
            connection.send(request)
            stopped: BaseException | None = None
            while True:
                what, value = connection.recv()
                if what == "step" and stopped is None:
                    try:
                        on_step(*value)
                    except BaseException as error:
                        # It is told to stop, and what it says until then is not for the next one.
                        stopped = error
                        connection.send(("stop", ()))
                elif what in ("done", "error"):
                    break
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise PainterDied(self._obituary()) from error
        if stopped is not None:
            raise stopped
        if what == "error":
            raise value
        poster, self._loaded = value
        return poster

    def _connected(self) -> Connection:
        """The connection to the process, which is started where there is none."""
        if self._connection is None or self.pid is None:
            self._loaded = set()
            self._connection, theirs = Pipe()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "posterpipe.studio.worker"],
                    stdin=theirs.fileno(),
                    start_new_session=True,  # Ctrl-C is for the studio, whose end it notices
                )
            self._connection.send(self._settings)
        return self._connection

    def _obituary(self) -> str:
        process, self._process = self._process, None
        code = None
        if process is not None:
            with contextlib.suppress(OSError):
                process.kill()
            code = process.wait()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        memory = " (where memory ran out, the system ends it so)" if code == -9 else ""
        return (
            f"The model's process ended with {how}{memory}; ask again, and a new one is started. "
            "The server's log tells more"
        )


class _Stopped(Exception):
    """The other side wants no more of this poster."""


def main() -> None:
    """The process: answers requests until its input ends."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is for the log
    # A copy that no process inherits: one that a library starts would hide this one's end.
    studio = Connection(os.dup(sys.stdin.fileno()))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    settings: Settings = studio.recv()
    requests: queue.Queue[Any] = queue.Queue()
    stop = threading.Event()

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while (request := studio.recv())[0] != "end":
                if request[0] == "stop":
                    stop.set()
                else:
                    requests.put(request)
        os._exit(0)  # nobody waits for what is being drawn

    threading.Thread(target=listen, daemon=True).start()

    from posterpipe.studio.painter import Painter

    painter = Painter(settings)

    def on_step(step: int, steps: int) -> None:
        studio.send(("step", (step, steps)))
        if stop.is_set():
            raise _Stopped

    while True:
        what, values = requests.get()
        stop.clear()
        try:
            poster = None
            if what == "prepare":
                (choice,) = values
                painter.prepare(choice)
            else:
                order, choice, seed = values
                poster = painter.paint(order, choice, seed, on_step)
            studio.send(("done", (poster, painter.loaded)))
        except _Stopped:
            studio.send(("done", (None, painter.loaded)))
        except Exception as error:
            studio.send(("error", portable(error)))


def portable(error: Exception) -> Exception:
    """An error that the other side can read: where the own one cannot travel, one of its words."""
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
