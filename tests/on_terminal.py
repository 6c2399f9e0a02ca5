"""The program's terminal as a pseudo-terminal of this process, and what a person would see on it in the end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Iterator
from typing import Any

from preference.terminal import language
from preference.terminal.console import terminal

ESCAPE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b\][^\x07]*\x07")
XTERM = {"TERM": "xterm-256color"}


class Seen:
    """What came out of a pseudo-terminal: `raw` as it was written."""

    def __init__(self) -> None:
        self.raw = ""

    def lines(self) -> list[str]:
        """The lines on the screen, as long as none is moved up to but the last ones: bars are overwritten."""
        lines, at, column = [""], 0, 0
        for piece in re.split(r"(\r|\n|\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07)", self.raw):
            move = ESCAPE.fullmatch(piece)
            if piece == "\r":
                column = 0
            elif piece == "\n":
                at, column = at + 1, 0
                lines += [""] * (at + 1 - len(lines))
            elif move and move[2] == "A":
                at -= int(move[1] or 1)
            elif move and move[2] == "K":
                lines[at] = ""
            elif not move:
                lines[at] = lines[at][:column].ljust(column) + piece + lines[at][column + len(piece) :]
                column += len(piece)
        return [line.rstrip() for line in lines if line.strip()]


@contextlib.contextmanager
def on_terminal(columns: int, environ: dict[str, str] | None = None, encoding: str = "utf-8") -> Iterator[Seen]:
    """The program's terminal writes to a pseudo-terminal of so many columns for the time being."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    seen, taken = Seen(), bytearray()

    def read() -> None:
        while True:
            try:
                piece = os.read(master, 1 << 16)
            except OSError:
                return
            if not piece:
                return
            taken.extend(piece)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    stream: Any = os.fdopen(slave, "w", encoding=encoding, errors="backslashreplace")
    spoken = language.spoken()
    terminal.stream = stream
    terminal.begin(XTERM | (environ or {}))
    try:
        yield seen
    finally:
        terminal.stop_bar()
        stream.close()
        reader.join(5)
        os.close(master)
        terminal.stream = None
        terminal.begin({})
        language.speak(spoken)
        seen.raw = bytes(taken).decode(encoding, "replace")
