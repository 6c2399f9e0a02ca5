"""The one terminal of the program: what is printed, in which form, and the bar that stays below it.

A terminal gets colours, tables and a bar, drawn by rich. Everything else (a file, a pipe, CI, NO_COLOR, TERM=dumb) gets
plain lines, one fact each, that other programs may read. Both go through `shown`: text from data acts on neither.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console, ConsoleDimensions, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from preference.screen import shown
from preference.terminal import language

LABEL = 10  # columns of the labels at the left
RAGGED = 14  # columns that the end of a line loses to a word that does not fit
PLAIN_WIDTH = 10_000  # no line of plain output is broken


class Screen(Console):
    """rich's console as wide as the terminal that it writes to, which leaves the cursor alone: a run may be killed."""

    @property
    def size(self) -> ConsoleDimensions:
        return ConsoleDimensions(*_size(self.file))

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        raise AttributeError("the terminal has a size of its own")

    def show_cursor(self, show: bool = True) -> bool:
        return False


def _size(stream: Any) -> tuple[int, int]:
    try:
        columns, lines = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return 80, 24
    return columns or 80, lines or 24


def wants_colours(stream: Any, environ: Mapping[str, str]) -> bool:
    """Whether a stream is a terminal whose user has not asked for plain lines."""
    plain = environ.get("NO_COLOR") or environ.get("CI") or environ.get("TERM", "") in ("", "dumb", "unknown")
    try:
        return not plain and bool(stream.isatty())
    except (ValueError, AttributeError):  # closed, or none at all
        return False


class Terminal:
    """What a program has to say, on its way to standard output."""

    def __init__(self, stream: TextIO | None = None, environ: Mapping[str, str] | None = None) -> None:
        """
        Args:
            stream: sys.stdout as it is at any time where None.
            environ: without one there are plain lines.
        """
        self.stream = stream
        self.silent = False  # a process of several that leaves it to the first to speak
        self.bar: Live | None = None
        self._handlers: list[logging.StreamHandler] = []
        self.begin(environ or {})

    def begin(self, environ: Mapping[str, str], lang: str = "auto") -> None:
        """Settle how things are shown; `lang` is a language, or auto."""
        stream = self.stream or sys.stdout
        self.coloured = wants_colours(stream, environ)
        self.console: Console
        if self.coloured:
            colours = {name: environ[name] for name in ("TERM", "COLORTERM") if name in environ}
            self.console = Screen(force_terminal=True, _environ=colours, **self._options())
        else:
            self.console = Console(
                force_terminal=False, no_color=True, width=PLAIN_WIDTH, _environ={}, **self._options()
            )
        chosen = language.of_environment(environ) if lang == "auto" else lang
        language.speak(chosen if lang != "auto" or self.writes("中") else "en")

    def _options(self) -> dict[str, Any]:
        return {"file": self.stream, "highlight": False, "emoji": False, "markup": False}

    @property
    def width(self) -> int:
        return self.console.width if self.coloured else 80

    def writes(self, text: str) -> bool:
        """Whether the stream's encoding has every character of `text`."""
        encoding = getattr(self.stream or sys.stdout, "encoding", None) or "utf-8"
        try:
            text.encode(encoding)
        except (UnicodeError, LookupError):
            return False
        return True

    def say(self, text: str = "", style: str = "") -> None:
        """Lines as they are, above the bar where there is one."""
        if self.silent:
            return
        if self.coloured:
            style = style or ("yellow" if text.startswith(("warning:", "note:")) else "")
            self.console.print(Text(shown(text), style=style))
        else:
            print(shown(text), file=self.stream, flush=True)

    def show(self, *things: RenderableType) -> None:
        """Tables and texts as rich draws them; on a terminal alone."""
        assert self.coloured
        if not self.silent:
            self.console.print(*things)

    def typed(self, command: str, what: str) -> None:
        """A command to copy: never broken into lines of its own, and what it does behind it where there is room."""
        line = Text.assemble("  ", (shown(command), "bold green"))
        note = Text(f"   {what}", "dim")
        if line.cell_len + note.cell_len < self.width:
            line.append_text(note)
        if not self.silent:
            self.console.print(line, soft_wrap=True)

    def rows(self, label: str, texts: Sequence[str | Text], style: str = "") -> None:
        """A labelled block: a line a text. On a terminal the label stands once at the left, and long texts hang."""
        lines = [Text(shown(text)) if isinstance(text, str) else text for text in texts]
        if not self.coloured:
            for number, line in enumerate(lines):
                self.say(f"{label}: {line.plain}" if number == 0 else f"  {line.plain}")
            return
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(width=LABEL, no_wrap=True, style="bold cyan")
        grid.add_column(overflow="fold", style=style)
        for number, line in enumerate(lines):
            grid.add_row(label if number == 0 else "", line)
        self.show(grid)

    def remark(self, label: str, text: str) -> None:
        """Something worth knowing, below what it is about."""
        if self.coloured:
            self.rows(label, [Text(shown(text), "yellow")])
        else:
            self.say(f"{label}: {text}")

    def cut(self, text: str, lines: int, indent: int = LABEL + 1) -> Text:
        """`text` in so many lines of the terminal at most, its middle left out where it is longer."""
        room = self.width - indent - 1
        mark = " … " if self.writes("…") else " ~ "
        return elided(shown(text), lines * room - (lines - 1) * RAGGED, mark)

    # ---- the bar

    def draw_bar(self, line: RenderableType) -> None:
        """Show `line` below all else, or in the place of the one shown there; nothing where there is no terminal."""
        if not self.coloured or self.silent:
            return
        if self.bar is None:
            both = sys.stderr is not None and sys.stderr.isatty()
            ours = self.stream is None  # else it is a terminal beside the program's own
            self.bar = Live(
                line,
                console=self.console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=ours,
                redirect_stderr=ours and both,
            )
            self.bar.start(refresh=True)
            self._take_logging()
        else:
            self.bar.update(line, refresh=True)

    def stop_bar(self) -> None:
        """Take the bar away, whatever happened; harmless where there is none."""
        if self.bar is not None:
            bar, self.bar = self.bar, None
            bar.stop()
            for handler in self._handlers:
                handler.setStream(sys.stderr)
            self._handlers.clear()

    def _take_logging(self) -> None:
        """Handlers that write to standard error write above the bar."""
        loggers = [logging.getLogger(name) for name in (None, "transformers", "datasets", "huggingface_hub")]
        for handler in [handler for logger in loggers for handler in logger.handlers]:
            if type(handler) is logging.StreamHandler and handler.stream is getattr(sys.stderr, "rich_proxied_file", 0):
                handler.setStream(sys.stderr)
                self._handlers.append(handler)

    def title(self, text: str) -> None:
        """The title of the window, where there is one."""
        if self.coloured and not self.silent:
            self.console.set_window_title(shown(text).replace("\n", " "))


def elided(text: str, columns: int, mark: str = " … ") -> Text:
    """`text` in so many columns, without the middle of what is longer."""
    whole = Text(text)
    if whole.cell_len <= columns:
        return whole
    head, tail = Text(text), Text(text[-columns:])
    head.truncate(columns * 2 // 3 - 2, overflow="crop")
    while tail.cell_len > columns // 3 - 1:
        tail = tail[1:]
    return Text.assemble(head, (mark, "dim"), tail)


terminal = Terminal()
