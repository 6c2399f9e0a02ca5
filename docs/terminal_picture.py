#!/usr/bin/env python3
"""Make the picture of a run's terminal that the documentation shows.

    python docs/terminal_picture.py sh run_orpo.sh --output_dir outputs/picture

runs the command in a pseudo-terminal of 100 columns and writes what stood there in the end, in its colours, to
docs/terminal.svg. Where bars were overwritten, they are here.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 100
FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # rich names a font of another server
PIECES = re.compile(r"(\r|\n|\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07)")


def run(command: list[str], columns: int) -> tuple[int, str]:
    """(exit status, all that the command wrote) on a terminal of so many columns."""
    pid, master = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        for name in ("CI", "NO_COLOR"):
            os.environ.pop(name, None)
        os.execvp(command[0], command)
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    taken = bytearray()
    while True:
        try:
            piece = os.read(master, 1 << 16)
        except OSError:  # the command has ended
            break
        if not piece:
            break
        taken += piece
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), taken.decode("utf-8", "replace")


def final_lines(written: str) -> list[str]:
    """The lines that stood on the screen in the end, with their colours."""
    lines, at = [""], 0
    for piece in PIECES.split(written):
        if piece == "\n":
            at += 1
            lines += [""] * (at + 1 - len(lines))
        elif piece.startswith("\x1b[") and piece[-1] == "A":
            at -= int(piece[2:-1] or 1)
        elif piece.startswith("\x1b[") and piece[-1] == "K":
            lines[at] = ""
        elif piece != "\r" and not (piece.startswith("\x1b") and piece[-1] != "m"):
            lines[at] += piece
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the picture of a run's terminal.")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "terminal.svg", help="(%(default)s)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run")
    options = parser.parse_args()
    if not options.command:
        parser.error("say what to run: sh run_orpo.sh --output_dir outputs/picture")
    status, written = run(options.command, COLUMNS)
    if status:
        sys.exit(f"the command ended with {status}; there is no picture")
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in final_lines(written):
        console.print(Text.from_ansi(line), soft_wrap=False)
    drawn = console.export_svg(title=" ".join(options.command))
    options.to.write_text(FONT.sub("", drawn), encoding="utf-8")
    print(f"wrote {options.to}, {options.to.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
