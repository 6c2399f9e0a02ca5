"""How a program says what ended it: a box on a terminal, one sentence elsewhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich import box
from rich.console import RenderableType
from rich.panel import Panel
from rich.text import Text

from preference.screen import shown, wrapped
from preference.terminal.console import RAGGED, Screen, elided, wants_colours
from preference.terminal.language import tr

LINES = 3  # of a box, between its borders
TO_TYPE = re.compile(r"--[a-z][\w-]*(?:[ =][^\s,;]+)?|\b[a-z]+(?:_[a-z]+)*=[^\s,;)]+|\b(?:pip|sh|python) [^;,]+")


@dataclass(frozen=True)
class Failure:
    """What went wrong: the script, the kind of error, the sentence, and where, if that is known."""

    script: str
    kind: str
    sentence: str
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        return shown(f"{self.script}: {self.kind}: {self.sentence}" if self.kind else f"{self.script}: {self.sentence}")


def end_with(failure: Failure, log: Path | None, environ: Mapping[str, str]) -> NoReturn:
    """Say it on standard error and end the program; `log` is the file that holds more."""
    if not wants_colours(sys.stderr, environ):
        sys.exit(str(failure) if log is None else tr("error_logged", error=failure, path=log))
    console = Screen(file=sys.stderr, force_terminal=True, highlight=False, emoji=False, markup=False)
    console.print(*failure_box(failure, log, console.width))
    sys.exit(1)


def failure_box(failure: Failure, log: Path | None, width: int) -> list[RenderableType]:
    """A box of at most five lines; below one that is too small for the sentence it stands as it is.

    What, where and what to type are in the sentence: each of its parts gets a line if there is room, and what is typed
    a colour of its own.
    """
    text = " ".join(shown(failure.sentence).split())
    where = f"{failure.file}:{failure.line}" if failure.line else failure.file
    body = text.removeprefix(f"{where}: ") if where else text
    inner = width - 4
    parts = [line for part in re.split(r"(?<=;) ", body) for line in wrapped(part, inner)]
    lines = parts if len(parts) <= LINES else wrapped(body, inner)
    whole = []
    if len(lines) > LINES:
        short = elided(text, LINES * inner - (LINES - 1) * RAGGED).plain
        lines, whole = wrapped(short, inner)[:LINES], [Text(shown(failure.sentence))]
    content = Text("\n".join(lines))
    content.highlight_regex(TO_TYPE, "bold cyan")
    title = " · ".join(filter(None, (failure.script, failure.kind, shown(where))))
    panel = Panel(content, title=Text(title, "bold red"), title_align="left", border_style="red", box=box.ROUNDED,
                 subtitle=None if log is None else Text(shown(str(log)), "bold"), subtitle_align="left")  # fmt: skip
    return [panel, *whole]
