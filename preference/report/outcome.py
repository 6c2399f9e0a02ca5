"""The end of a run on the screen: one table before -> after, where it is saved, and what to type next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from preference.report.tables import compared, comparison, verdict_of
from preference.terminal.console import Terminal
from preference.terminal.language import tr


def show_outcome(
    before: Mapping[str, float],
    after: Mapping[str, float],
    changes: Mapping[str, Mapping[str, Any]],
    terminal: Terminal,
) -> None:
    """
    Args:
        before, after: metrics of the evaluations; either may be empty. changes: as `paired_changes` gives them.
    """
    if not terminal.coloured:
        terminal.say(f"\n{comparison(before, after, changes)}")
        return
    for title, rows in compared(before, after, changes):
        table = Table(box=None, pad_edge=False, header_style="bold underline")
        table.add_column(tr("metric") if title == "evaluation" else title)
        for head in ("before", "after", "change", "interval"):
            table.add_column(tr(head), justify="right", no_wrap=True)
        table.add_column("")
        for row in rows:
            style = "" if row.better is None or not row.significant else "green" if row.better else "red"
            cells = (row.before, row.after, row.change, row.interval, verdict_of(row))
            table.add_row(tr(row.label), *(Text(cell, style if n > 1 else "") for n, cell in enumerate(cells)))
        terminal.show(table)


def commands(output_dir: Path, report: Path | None, trained: bool) -> dict[str, str]:
    """What a user may type next, by the message that says what for."""
    python, folder = shlex.quote(_near(Path(sys.executable))), shlex.quote(str(output_dir))
    opener = {"darwin": "open", "win32": "start"}.get(sys.platform, "xdg-open")
    found = {"next_chat": f"{python} chat.py {folder}"} if trained else {}
    if report is not None:
        found["next_report"] = f"{opener} {shlex.quote(str(report))}"
    if trained:
        merged = shlex.quote(str(output_dir.with_name(f"{output_dir.name}-merged")))
        found["next_export"] = f"{python} export_model.py {folder} --output {merged}"
    return found


def _near(path: Path) -> str:
    """A path within the working folder from there."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def show_next(output_dir: Path, report: Path | None, terminal: Terminal, trained: bool) -> None:
    """
    Args:
        report: the page of the run, where one was written. trained: whether there is a model to talk to.
    """
    saved = tr("saved", folder=output_dir) if report is None else tr("saved_report", folder=output_dir, report=report)
    typed = commands(output_dir, report, trained)
    if not terminal.coloured:
        terminal.say(f"\n{saved}")
        for what, command in typed.items():
            terminal.say(f"  {tr(what)}: {command}")
        return
    terminal.say(saved, "bold")
    terminal.say(tr("next"), "bold cyan")
    for what, command in typed.items():
        terminal.typed(command, tr(what))
