"""Preference pairs out of files: every row checked, every fault with a file, a line and a reason.

    report = DataReport()
    rows = load_rows(["data/train"], report)
    print(report.summary())

Reads what `preference/formats` knows, first of all the triple {question, response_chosen, response_rejected} (+ system,
history) and {prompt, chosen, rejected}. Outer white space of questions and answers is stripped here, alike on both
sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preference.data_report import DataError, DataReport
from preference.formats.base import Drop, Pair, take
from preference.json_records import Fault
from preference.readers import find_files, iter_records

__all__ = ["DataError", "DataReport", "Row", "iter_rows", "load_rows"]


@dataclass(frozen=True, slots=True)
class Row:
    """One checked preference pair. Texts are stripped, answers are not empty and differ."""

    question: str
    chosen: str
    rejected: str
    system: str | None = None  # None: the template's default
    history: tuple[tuple[str, str], ...] = ()  # (user, assistant) turns before the question
    prompt: str | None = None  # of a {prompt, chosen, rejected} row: stands in for question, verbatim
    file: str = ""
    line: int = 0
    extra: dict[str, Any] = field(default_factory=dict, compare=False)


def load_rows(paths: Sequence[str | Path], report: DataReport, *, data_check: str = "drop") -> list[Row]:
    """All rows of `paths` (files, or folders read recursively). Raises DataError if none is left, see `iter_rows`."""
    rows = list(iter_rows(paths, report, data_check=data_check))
    if not rows:
        raise DataError("no usable row in " + ", ".join(str(path) for path in paths) + "\n" + report.summary())
    return rows


def iter_rows(paths: Sequence[str | Path], report: DataReport, *, data_check: str = "drop") -> Iterator[Row]:
    """Rows one by one; faults go to `report`, or raise DataError at once with data_check='strict'."""
    if data_check not in ("drop", "strict"):
        raise ValueError(f"data_check must be drop or strict, not {data_check!r}")
    for file in find_files(paths):
        for item in iter_records(file):
            report.read(file)
            try:
                if isinstance(item, Fault):
                    raise Drop(item.reason, item.detail)
                row = check(_pair(item.value), file, item.line, report)
            except Drop as drop:
                report.drop(drop.reason, file, item.line, drop.detail)
                if data_check == "strict":
                    raise DataError.at(file, item.line, drop.reason, drop.detail) from None
                continue
            yield row


def _pair(row: dict[str, Any]) -> Pair:
    if "prompt" in row and "question" not in row:
        prompt, chosen, rejected = take(row, "prompt", "chosen", "rejected")
        return Pair(question="", chosen=chosen, rejected=rejected, prompt=prompt)
    question, chosen, rejected = take(row, "question", "response_chosen", "response_rejected")
    return Pair(question, chosen, rejected, row.get("system"), row.get("history") or ())


_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def check(pair: Pair, file: str, line: int, report: DataReport) -> Row:
    """The pair as a Row. Raises Drop with the first thing that is wrong with it."""
    for name in ("question", "chosen", "rejected") if pair.prompt is None else ("prompt", "chosen", "rejected"):
        _check_text(name, getattr(pair, name))
    if pair.system is not None:
        _check_text("system", pair.system)
    if (pair.chosen[:1].isspace()) != (pair.rejected[:1].isspace()):
        report.notes["leading_space_on_one_side"] += 1
    chosen, rejected, question = pair.chosen.strip(), pair.rejected.strip(), pair.question.strip()
    if not chosen or not rejected:
        sides = [name for name, text in (("chosen", chosen), ("rejected", rejected)) if not text]
        raise Drop("empty_answer", " and ".join(sides) + " empty")
    if not (question if pair.prompt is None else pair.prompt.strip()):
        raise Drop("empty_prompt")
    if chosen == rejected:
        raise Drop("identical_answers")
    system = (pair.system or "").strip() or None
    return Row(question, chosen, rejected, system, _check_history(pair.history), pair.prompt, file, line, pair.extra)


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise Drop("wrong_type", f"{name} must be a string, not {type(text).__name__}")
    if not text.isascii() or "\0" in text:
        if match := _NO_TEXT.search(text):
            if match.group() == "\0":
                raise Drop("nul_byte", f"a NUL character in {name}")
            raise Drop("invalid_unicode", f"half of a surrogate pair (\\u{ord(match.group()):04x}) in {name}")


def _check_history(history: Any) -> tuple[tuple[str, str], ...]:
    if history is None:
        return ()
    if not isinstance(history, (list, tuple)):
        raise Drop("wrong_type", f"history must be a list of [user, assistant] pairs, not {type(history).__name__}")
    turns = []
    for turn in history:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise Drop("wrong_type", "history must be a list of [user, assistant] pairs")
        for text in turn:
            _check_text("history", text)
        if not turn[0].strip() or not turn[1].strip():
            raise Drop("empty_turn", "an empty turn in history")
        turns.append((turn[0].strip(), turn[1].strip()))
    return tuple(turns)
