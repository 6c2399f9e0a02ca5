"""What happened to every row of data: how many were read, kept and dropped, why, and where each fault is.

`DataReport` is filled by the readers (`triples.py`), then by the tokenizer's length filter, and ends as
`data_report.json` of a run or as the `--report` of data/convert.py. `rows_kept` is always `rows_read - sum(dropped)`: a
later stage that drops a row it was given just calls `drop`, and the numbers still add up.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preference.errors import PreferenceError

DETAIL_CHARS = 300  # a detail names the fault; it is no place for the row's text


class DataError(PreferenceError, ValueError):
    """Data that cannot be used. `str()` holds file, line and reason; the three are attributes as well."""

    def __init__(self, message: str, *, file: str = "", line: int = 0, reason: str = ""):
        super().__init__(printable(message))
        self.file, self.line, self.reason = file, line, reason

    @classmethod
    def at(cls, file: str, line: int, reason: str, detail: str = "") -> DataError:
        where = f"{file}:{line}" if line else file
        return cls(f"{where}: {reason}" + (f": {detail}" if detail else ""), file=file, line=line, reason=reason)


@dataclass
class DataReport:
    """Counts of rows by fate, with the place of every dropped row (at most `max_listed` places a reason).

    A file that is refused as a whole (empty, a Git-LFS pointer, no preference data) counts as one row, read and
    dropped. `notes` counts what is worth knowing and drops nothing (a space in front of one answer only, both unsafe).
    """

    max_listed: int = 10_000
    rows_read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    sections: dict[str, Any] = field(default_factory=dict)

    @property
    def rows_kept(self) -> int:
        return self.rows_read - self.dropped.total()

    def _file(self, file: str) -> dict[str, Any]:
        if file not in self.files:
            self.files[file] = {"format": "", "rows_read": 0, "dropped": Counter()}
        return self.files[file]

    def read(self, file: str, rows: int = 1) -> None:
        """Count `rows` rows of `file` as read. Each is kept unless `drop` is called for it."""
        self.rows_read += rows
        self._file(file)["rows_read"] += rows

    def recognised(self, file: str, name: str) -> None:
        self._file(file)["format"] = name

    def drop(self, reason: str, file: str, line: int, detail: str = "") -> None:
        """Drop one row that was counted by `read`, at any later time."""
        self.dropped[reason] += 1
        self._file(file)["dropped"][reason] += 1
        listed = self.examples.setdefault(reason, [])
        if len(listed) < self.max_listed:
            listed.append({"file": file, "line": line, "detail": printable(detail[:DETAIL_CHARS])})

    def unread(self, file: str, column: str, example: str) -> None:
        """A column of `file` that no pair was made of, with a value of it."""
        self._file(file).setdefault("unread", {}).setdefault(column, printable(example))

    def warn(self, message: str) -> None:
        if (message := printable(message)) not in self.warnings:
            self.warnings.append(message)

    def add_section(self, name: str, content: dict[str, Any]) -> None:
        """Put a named block of figures (token lengths, duplicates, ...) into the report."""
        self.sections[name] = content

    def to_dict(self, max_examples: int | None = None) -> dict[str, Any]:
        """A JSON-ready dict; `max_examples` cuts the list of places of each reason (the counts stay whole)."""
        files = {
            file: {
                "format": entry["format"],
                "rows_read": entry["rows_read"],
                "rows_kept": (kept := entry["rows_read"] - entry["dropped"].total()),
                "share": round(kept / self.rows_kept, 4) if self.rows_kept else 0.0,
                "dropped": dict(entry["dropped"]),
                **({"unread": dict(entry["unread"])} if "unread" in entry else {}),
            }
            for file, entry in self.files.items()
        }
        return {
            "rows_read": self.rows_read,
            "rows_kept": self.rows_kept,
            "dropped": dict(self.dropped.most_common()),
            "examples": {reason: places[:max_examples] for reason, places in self.examples.items()},
            "files": files,
            "notes": dict(self.notes),
            "warnings": list(self.warnings),
            **self.sections,
        }

    def save(self, path: str | Path) -> None:
        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")

    def summary(self) -> str:
        """A few lines to print: counts, every reason with its first place, warnings, the sections' figures."""
        lines = [f"rows: {self.rows_read} read, {self.rows_kept} kept, {self.dropped.total()} dropped"]
        if len(self.files) > 1:
            for file, entry in sorted(self.files.items()):
                kept = entry["rows_read"] - entry["dropped"].total()
                lines.append(f"  {file}: {kept} of {entry['rows_read']} kept" + _in_brackets(entry["format"]))
        for reason, count in self.dropped.most_common():
            first = self.examples[reason][0]
            place = f"{first['file']}:{first['line']}"
            lines.append(f"  dropped {count:>6} {reason}, first at {place} {first['detail'][:120]}".rstrip())
        lines += self.unread_lines()
        lines += [f"  note: {count} x {name}" for name, count in self.notes.most_common()]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        for name, content in self.sections.items():
            blocks = {key: value for key, value in content.items() if isinstance(value, dict) and value}
            lines.append(f"  {name}: {_one_line({key: content[key] for key in content if key not in blocks})}")
            lines += [f"    {key}: {_one_line(value)}" for key, value in blocks.items()]
        return printable("\n".join(lines))

    def unread_lines(self) -> list[str]:
        columns: dict[str, list[tuple[str, str]]] = {}
        for file, entry in self.files.items():
            for column, example in entry.get("unread", {}).items():
                columns.setdefault(column, []).append((file, example))
        return [
            f"  not read: column {column} ({places[0][1]}) of {places[0][0]}"
            + (f" and {len(places) - 1} more" if len(places) > 1 else "")
            for column, places in columns.items()
        ]


def printable(text: str) -> str:
    """`text` with lone surrogates escaped, which no UTF-8 output takes (they come from damaged data and file names)."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _one_line(content: dict[str, Any]) -> str:
    parts = []
    for key, value in content.items():
        if isinstance(value, dict):
            value = "{" + _one_line(value) + "}"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        elif isinstance(value, list):
            value = f"[{len(value)}]"
        parts.append(f"{key} {value}")
    return ", ".join(parts)
