"""Answers as Markdown in a terminal, drawn while they are written; what a model says acts on no terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.table import Table

from preference.screen import shown


def drawing_console() -> Console | None:
    """The terminal where answers can be drawn; None for files, pipes, NO_COLOR and terminals without a cursor."""
    console = Console(highlight=False, soft_wrap=False)
    return console if console.is_terminal and not console.is_dumb_terminal and not console.no_color else None


def markdown(text: str) -> Markdown:
    """Links show their address instead of acting."""
    return Markdown(shown(text), hyperlinks=False)


def finished_blocks(text: str) -> int:
    """How many characters of a growing Markdown text are whole blocks: up to its last blank line outside of a fence."""
    end = place = 0
    fence = ""
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        if fence:
            fence = "" if stripped.startswith(fence) and not stripped.strip(fence[0]) else fence
        elif stripped.startswith(("```", "~~~")):
            fence = stripped[: len(stripped) - len(stripped.lstrip(stripped[0]))]
        elif not stripped and line.endswith("\n"):
            end = place + len(line)
        place += len(line)
    return end


class Growing:
    """A Markdown answer that grows: whole blocks are printed once, the last one is redrawn below them."""

    def __init__(self, console: Console) -> None:
        self.console, self.text, self.printed = console, "", 0
        self.live = Live(console=console, transient=True, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> Growing:
        self.live.start()
        return self

    def feed(self, piece: str) -> None:
        self.text += piece
        rest = self.text[self.printed :]
        if whole := finished_blocks(rest):
            self.live.update(markdown(""), refresh=True)
            self.console.print(markdown(rest[:whole]))
            self.printed += whole
        self.live.update(markdown(self.text[self.printed :]), refresh=True)

    def __exit__(self, *_: object) -> None:
        self.live.stop()
        if rest := self.text[self.printed :].strip():
            self.console.print(markdown(rest))


def columns(console: Console, answers: Sequence[tuple[str, str]]) -> None:
    """(heading, answer) of several speakers beside each other."""
    table = Table(*(shown(name) for name, _ in answers), expand=True, box=None, padding=(0, 1))
    table.add_row(*(markdown(text) for _, text in answers))
    console.print(table)
