"""The standard streams where they are not as they should be.

What belongs here: streams that were closed before the start, output that nobody takes any more, and
characters that an output cannot have. What does not: what is printed, and the progress of work
(`progress`).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


class OutputLost(OSError):
    """What was printed could not be written. The message says why."""


def open_closed_streams() -> None:
    """Gives standard streams that were closed (`>&-`) a place where all is dropped. Else the next
    file that is opened takes their number, and gets what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which is this one
            os.set_inheritable(null, True)
    sys.stdout = sys.stdout or _onto(1)
    sys.stderr = sys.stderr or _onto(2)


def _onto(number: int) -> TextIO:
    return open(number, "w", encoding="utf-8", errors="replace", closefd=False)


@contextmanager
def lost_output_is_told() -> Iterator[None]:
    """While inside, standard output that cannot be written is an OutputLost, also where only its
    last words are lost. Where a pipe's reader has gone, as `head` does, nothing is said."""
    try:
        yield
    except (OSError, SystemExit):
        try:
            sys.stdout.flush()  # fails once more where this was why
        except OSError as error:
            _drop(sys.stdout)  # or Python tries it again at the end
            if error.errno != errno.EPIPE:
                raise OutputLost(
                    f"What was printed could not be written ({error.strerror}); send it to where "
                    "there is room"
                ) from error
        raise


@contextmanager
def lost_output_is_dropped() -> Iterator[None]:
    """While inside, standard output and error can always be printed to: what nobody takes, since
    the terminal or the pipe's reader has gone or the disk is full, is dropped from then on."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Dropping(stream)) for stream in before)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


class _Dropping:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            _drop(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _drop(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _drop(stream: TextIO) -> None:
    """Whatever goes there from now on, what it still holds and what libraries write included."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
