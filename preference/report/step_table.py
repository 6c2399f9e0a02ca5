"""The table that grows while a run trains: a row per logging step, best values marked; and the bar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from preference.screen import duration, padded_left
from preference.terminal.console import Terminal
from preference.terminal.language import tr

HEAD_EVERY = 20  # rows
FIRST = 10  # columns of the step
BEST = "*"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value < 1e5 else f"{value / 1e3:,.0f}k"


@dataclass(frozen=True)
class Column:
    """A metric of the log: its head, width, form, and which end of it is good (None: neither)."""

    name: str
    head: str
    width: int
    form: Callable[[float], str]
    better: bool | None = None


COLUMNS = (
    Column("loss", "loss", 8, "{:.4f}".format, False),
    Column("nll_loss", "NLL", 8, "{:.4f}".format, False),
    Column("preference/accuracies", "acc", 6, "{:.0%}".format, True),
    Column("rewards/margins", "margin", 9, "{:+.4f}".format),
    Column("grad_norm", "grad", 6, "{:.3g}".format),
    Column("learning_rate", "lr", 8, "{:.1e}".format),
    Column("tokens_per_second", "tok/s", 7, _count),
    Column("mfu", "MFU", 5, "{:.0%}".format),
    Column("memory_gib", "GiB", 6, "{:.1f}".format),
    Column("left", "left", 7, duration),
    Column("epoch", "epoch", 7, "{:.2f}".format),
    Column("pairs_per_second", "pairs/s", 9, "{:.2f}".format),
    Column("log_odds_chosen", "log odds", 10, "{:+.3f}".format),
    Column("logps/chosen", "chosen", 9, "{:.3f}".format),
    Column("logps/rejected", "rejected", 10, "{:.3f}".format),
)


class StepTable:
    """Rows as wide as the terminal has room for columns, the last of which go first."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.rows = 0
        self.best: dict[tuple[str, str], float] = {}

    @property
    def names(self) -> list[str]:
        return [column.name for column in COLUMNS]

    def columns(self) -> list[Column]:
        """Those that fit into a line; up to `left` they do in 80 columns."""
        shown, room = [], self.terminal.width - FIRST
        for column in COLUMNS:
            room -= column.width
            if room < 0:
                break
            shown.append(column)
        return shown

    def row(self, label: str, figures: Mapping[str, Any], held_out: str = "") -> None:
        """
        Args:
            held_out: the evaluation set that the figures are of; "": those of training.
        """
        columns = self.columns()
        if self.rows % HEAD_EVERY == 0:
            heads = "".join(padded_left(tr("left") if c.name == "left" else c.head, c.width) for c in columns)
            self.terminal.show(Text(padded_left(tr("step"), FIRST) + heads, "bold", no_wrap=True))
        self.rows += 1
        line = Text(padded_left(label, FIRST), "cyan" if held_out else "", no_wrap=True)
        for column in columns:
            line.append_text(self._cell(column, figures.get(column.name), held_out))
        self.terminal.show(line)

    def _cell(self, column: Column, value: float | None, held_out: str) -> Text:
        if value is None:
            return Text(" " * column.width)
        form, style = column.form(value), "cyan" if held_out else ""
        if column.better is not None:
            key, sign = (held_out, column.name), 1 if column.better else -1
            before = self.best.get(key)
            if before is None or sign * value > sign * before:
                self.best[key] = value
                if before is not None:
                    form, style = BEST + form, "bold green"
        return Text(f"{form:>{column.width}}", style)


def bar_line(terminal: Terminal, name: str, done: int, total: int, words: str) -> Text:
    """One line: how far it is, and what was last measured."""
    share = done / total if total else 1.0
    head = f"{name + ' ' if name else ''}{done}/{total} "
    tail = f" {share:.0%}  {words}"
    room = min(60, terminal.width - Text(head + tail).cell_len - 1)
    full, empty = ("━", "─") if terminal.writes("━─") else ("#", "-")
    filled = int(share * room)
    line = Text(no_wrap=True, overflow="crop", end="")
    line.append(head, "bold")
    line.append(full * filled, "green").append(empty * max(room - filled, 0), "dim")
    line.append(tail)
    line.truncate(terminal.width - 1)
    return line
