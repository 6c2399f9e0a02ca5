"""Words never end a run: a terminal that cannot show a character, a closed pipe, a full disk under a log file."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO

NAMES = {1: "stdout", 2: "stderr"}


class Lasting:
    """A standard stream that outlives what it is connected to.

    Once writing fails (the reader of a pipe has left, the terminal is gone, the disk is full) the stream is connected
    to nothing, which the other stream is told once. Everything else is the stream's own.
    """

    def __init__(self, stream: TextIO, number: int) -> None:
        self._stream, self._number = stream, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._kept():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._kept():
            self._stream.flush()

    @contextlib.contextmanager
    def _kept(self) -> Any:
        try:
            yield
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._number)  # what is still in the stream's buffer goes there too, also at exit
        os.close(nothing)
        with contextlib.suppress(OSError):
            name, reason = NAMES[self._number], error.strerror or str(error)
            os.write(3 - self._number, f"{name} is gone ({reason}): the run does without it\n".encode())


def outlive_streams() -> None:
    """Make stdout and stderr last, and show what their encoding has no character for as an escape."""
    for number, name in NAMES.items():
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, Lasting):
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        try:
            if stream.fileno() == number:  # not where a test or a notebook has put its own
                setattr(sys, name, Lasting(stream, number))
        except (OSError, ValueError):
            continue
