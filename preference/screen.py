"""Text for a terminal or a page: what comes from data, file names, templates and models acts on neither."""

from __future__ import annotations

import logging
import re
import sys
import textwrap

from rich.cells import cell_len

BIDI = "\u202a-\u202e\u2066-\u2069"  # embeddings, overrides and isolates of UAX 9: they turn the text around them
ACTING = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff{BIDI}]")  # but for tab and newline


def shown(text: str) -> str:
    """`text` with every character that could act on a terminal replaced by one that shows it.

    An escape sequence in a question could retitle the window, move the cursor over what was said, or clear it; a bidi
    control reverses what follows. Newline and tab stay, and so does everything that is only seen.
    """
    return ACTING.sub(_picture, text)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)  # the Unicode picture of a control character
    return "\u2421" if code == 0x7F else f"\\u{code:04x}"


def show_everything() -> None:
    """What the encoding of a terminal has no character for is shown as an escape, and ends nothing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class Shown(logging.Filter):
    """Lets log records through as `shown` leaves them."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(record.getMessage()), None
        return True


def clean_logging() -> None:
    """Every handler that writes to a terminal, and the one that Python falls back on, writes what `shown` leaves."""
    # On every CPU it says that it looked for a kernel in a package that is not needed here
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    handlers = [logging.lastResort, *logging.getLogger().handlers]
    handlers += logging.getLogger("transformers").handlers
    for handler in filter(None, handlers):
        if not any(isinstance(f, Shown) for f in handler.filters):
            handler.addFilter(Shown())


def padded_left(text: str, columns: int) -> str:
    """`text` at the right end of so many columns; a Chinese character takes two."""
    return " " * (columns - cell_len(text)) + text


def wrapped(text: str, columns: int) -> list[str]:
    """A paragraph in lines of at most so many columns."""
    if cell_len(text) == len(text):
        return textwrap.wrap(text, columns, break_on_hyphens=False) or [""]
    lines, line = [], ""
    for character in text:  # scripts without spaces break anywhere
        if cell_len(line + character) > columns:
            lines.append(line)
            line = ""
        line += character
    return [*lines, line]


def duration(seconds: float) -> str:
    """1:05, 12:00, 3:04:05"""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
