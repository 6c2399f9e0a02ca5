"""Reading and writing the small files of a run's folder, so that a crash or a resumed run leaves none half-written."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

NEXT = ".next"  # folder in output_dir: what a run says of itself while the result that it will replace lies there
LOGS = ("metrics.jsonl", "answers.jsonl", "data_report.json")  # written while a run has no model yet


def log_file(output_dir: str | Path, name: str) -> Path:
    """Where a run keeps one of its LOGS just now: in output_dir, or below NEXT until its model takes its place."""
    folder = Path(output_dir)
    return (folder / NEXT if (folder / NEXT).is_dir() else folder) / name


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a line that a crash has cut short is left out. No file: no records."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def save_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON so that a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


class JsonLines:
    """A JSON-lines file of one run: `begin` once the run knows where it starts, then `append`.

    Records appended before `begin` wait in memory: they belong to a run that may yet turn out to be a resumed one.
    """

    def __init__(self, output_dir: str | Path, name: str) -> None:
        self.output_dir, self.name = output_dir, name
        self.waiting: list[dict[str, Any]] | None = []
        self.failed = False  # the last write did not succeed: a cut line may be in the file

    @property
    def path(self) -> Path:
        return log_file(self.output_dir, self.name)

    def begin(self, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Throw away earlier records but those that `keep`, add the waiting ones; returns what the file then holds."""
        records = [*filter(keep, read_lines(self.path)), *(self.waiting or ())]
        self.waiting = None
        if not records:
            self.path.unlink(missing_ok=True)
            return []
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            partial.write_text("".join(map(_line, records)), encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            self._report(error)
        return records

    def append(self, record: Mapping[str, Any]) -> None:
        if self.waiting is not None:
            self.waiting.append(dict(record))
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("\n" if self.failed else "") + _line(record))
            self.failed = False
        except OSError as error:
            self._report(error)

    def _report(self, error: OSError) -> None:
        """Once for a full disk, and no more than that: training matters more than its log."""
        if not self.failed:
            logger.warning("%s cannot be written (%s): records are missing in it", self.path, error.strerror)
        self.failed = True


def _line(record: Mapping[str, Any]) -> str:
    """JSON has no word for nan and infinity: they become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n"


def evaluation_sets(metrics: Mapping[str, Any]) -> list[str]:
    """The prefixes of the evaluation sets that `metrics` are of: "eval", or "eval_NAME" of several sets."""
    suffix = "_loss"
    prefixes = [key[: -len(suffix)] for key in metrics if key.startswith("eval") and key.endswith(suffix)]
    return [prefix for prefix in prefixes if not prefix.endswith("_nll")]
