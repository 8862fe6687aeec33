"""The standard streams where they are not as they should be.

What belongs here: streams that were closed before the start, output that nobody takes any more, and
characters that an output cannot have. What does not: what is printed, and the progress of work
(`progress`).
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


class OutputLost(Exception):
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


def print_all_characters() -> None:
    """Prints ? for characters that the encoding of standard output lacks; standard error writes
    their codes by itself."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _onto(number: int) -> TextIO:
    return open(number, "w", encoding="utf-8", errors="replace", closefd=False)


@contextmanager
def lost_output_is_told() -> Iterator[None]:
    """While inside, standard output that cannot be written is an OutputLost; a pipe's reader that
    has gone, as `head` does, is the end with exit code 1, and nothing is said."""
    with _standing_in(_Telling(sys.stdout), sys.stderr):
        yield


@contextmanager
def lost_output_is_dropped() -> Iterator[None]:
    """While inside, standard output and error can always be printed to: what nobody takes, since
    the terminal or the pipe's reader has gone or the disk is full, is dropped from then on."""
    with _standing_in(dropping(sys.stdout), dropping(sys.stderr)):
        yield


@contextmanager
def _standing_in(out: Any, err: Any) -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        try:
            out.flush()  # the last words may be still to be written
        finally:
            sys.stdout, sys.stderr = before


def dropping(stream: TextIO) -> TextIO:
    """The stream, such that what it cannot take is dropped from then on, without an error."""
    return cast(TextIO, _Dropping(stream))


class _Dropping:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        """Drops what the stream still holds, and all that goes there from now on."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Telling(_Dropping):
    _told: OutputLost | None = None

    def write(self, text: str) -> int:
        self._tell()
        return super().write(text)

    def flush(self) -> None:
        self._tell()
        super().flush()

    def _lost(self, error: OSError) -> None:
        super()._lost(error)  # or Python tries it again at the end
        if error.errno == errno.EPIPE:
            sys.exit(1)
        self._told = OutputLost(
            f"What was printed could not be written ({error.strerror}); send it to where there is "
            "room"
        )
        self._tell()

    def _tell(self) -> None:
        # Again, since the first time may have been a trial: click writes nothing to see how it is.
        if self._told:
            raise self._told
