"""Single answers and pairs in one set: where some rows have one answer, each pair becomes two such rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from preference.data.kept_rows import KeptRows
from preference.data.report import DataError, DataReport
from preference.data.row import Row


def in_two(row: Row) -> tuple[Row, Row]:
    """A pair as its good and its bad answer."""
    return replace(row, rejected="", label=True), replace(row, chosen=row.rejected, rejected="", label=False)


def single_answers(rows: Iterable[Row], report: DataReport) -> Iterator[Row]:
    """The rows with every pair taken apart into two, which the report counts as read."""
    for row in rows:
        if row.label is not None:
            yield row
            continue
        if row.dialogue is not None:
            report.drop("tool_calls", row.file, row.line, "a pair of whole conversations cannot be taken apart")
            continue
        report.read(row.file)
        report.notes["pairs_taken_apart"] += 1
        yield from in_two(row)


def alike(rows: KeptRows, report: DataReport, folder: Path | None = None) -> KeptRows:
    """The rows of a set as they are, or all of them as single answers if some are; `folder` keeps them (KeptRows).

    Raises DataError for one single answer alone; warns of a set without good or without bad ones.
    """
    labels = Counter(row.label for row in rows)
    if labels.keys() <= {None}:
        return rows
    if pairs := labels[None]:
        rows = KeptRows(single_answers(rows, report), folder)
    if len(rows) < 2:
        said = "loss=kto needs two rows at least, as it compares answers with those of others"
        raise DataError.at(rows[0].file, rows[0].line, "one_answer", said)
    for label, word in ((True, "bad"), (False, "good")):
        if not labels[label] + pairs:
            report.warn(f"all {len(rows)} single answers are {word}: loss=kto has nothing to hold against them")
    return rows
