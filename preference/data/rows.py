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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from preference.data.formats import NotRecognised, Options, choose, read_row, recognise
from preference.data.formats.base import Drop, Format, Pair, RowDict
from preference.data.formats.messages import history_of, is_messages
from preference.data.formats.split_system import split_system
from preference.data.json_records import Fault, Record
from preference.data.kept_rows import KeptRows
from preference.data.packed import Position
from preference.data.rendered import TakeApart
from preference.data.report import DataError, DataReport
from preference.data.row import Row
from preference.data.sources import find_sources, iter_records
from preference.data.text_stats import TextStats, pair_key, prompt_key
from preference.data.unread import refusal, unread_columns

__all__ = ["DataError", "DataReport", "Row", "iter_rows", "load_rows"]

FIRST_ROWS = 64  # of a file, by which its format is recognised
NOTED = ("both_unsafe", "chosen_unsafe", "incomplete_candidates", "kept_without_scores")  # of Pair.extra, counted
ASK_ROWS = 1_000_000  # read at most to tell the user what hangs on a choice


def load_rows(
    paths: Sequence[str | Path],
    report: DataReport,
    *,
    data_check: str = "drop",
    section: str = "text",
    longest: int | None = None,
    keep_in: Path | None = None,
    **choices: Any,
) -> KeptRows:
    """All rows of `paths`: files, folders (recursively), hub ids.

    `choices` are the fields of `Options`, columns and the like as text too; figures over the rows go to `report` under
    `section`. Rows of more characters than `longest` are dropped at once as too_long. What is kept lies in `keep_in`, a
    folder, once it is much (see KeptRows).
    Raises DataError if no row is left, and see `iter_rows`.
    """
    options = choose(**choices)
    rows = KeptRows(
        iter_rows(paths, report, options, data_check=data_check, section=section, longest=longest), folder=keep_in
    )
    if not rows:
        raise DataError("no usable row in " + ", ".join(str(path) for path in paths) + "\n" + report.summary())
    return rows


def _characters(row: Row) -> int:
    """Those of the prompt and the longer answer."""
    prompt = len(row.question if row.prompt is None else row.prompt) + len(row.system or "")
    return prompt + sum(len(text) for turn in row.history for text in turn) + max(len(row.chosen), len(row.rejected))


def iter_rows(
    paths: Sequence[str | Path],
    report: DataReport,
    options: Options | None = None,
    *,
    data_check: str = "drop",
    section: str = "text",
    repeats: Repeats | None = None,
    longest: int | None = None,
    on_file: Callable[[str, Format, str], None] | None = None,
    on_record: Callable[[str, Position], None] | None = None,
) -> Iterator[Row]:
    """Rows one by one; memory does not grow with their text.

    Args:
        report: gets the counts, the faults, and at the end the figures of `TextStats` under `section`.
        data_check: 'drop' reports a faulty row and goes on, 'strict' raises DataError at the first.
        repeats: which rows to leave out as repeats of earlier ones.
        longest: characters of prompt and longer answer above which a row is dropped as too_long.
        on_file: called with source, format and why it was recognised. on_record: called for each record read.

    Raises DataError for what cannot be read at all; ValueError for a choice that does not exist.
    """
    if data_check not in ("drop", "strict"):
        raise ValueError(f"data_check must be drop or strict, not {data_check!r}")
    reading = _Reading(report, options or Options(), data_check == "strict")
    stats = TextStats()
    for source in find_sources(paths, report=report):
        for row in reading.rows_of(source, on_file, on_record):
            if longest is not None and (size := _characters(row)) > longest:
                report.drop("too_long", row.file, row.line, f"{size} characters cannot fit: more than {longest}")
                continue
            if repeats is not None and (reason := repeats.reason(row)):
                report.drop(reason, row.file, row.line)
                continue
            stats.add(row)
            yield row
    reading.warn_of_choices_without_effect()
    if stats.rows:
        report.add_section(section, stats.to_dict())


@dataclass
class _Reading:
    report: DataReport
    options: Options
    strict: bool
    formats: dict[str, Format] = field(default_factory=dict)  # of each source that was recognised
    take_apart: TakeApart = field(default_factory=TakeApart)  # of the source that is being read
    scored: set[str] = field(default_factory=set)  # sources with scores
    ignored: set[str] = field(default_factory=set)  # columns that the user wants ignored and that there are
    seen: dict[str, set[str]] = field(default_factory=dict)  # columns of each source that are accounted for

    def rows_of(self, source: str, on_file: Any, on_record: Any) -> Iterator[Row]:
        position = Position()
        records = self._records(source, position)
        format = None
        while (item := next(records, None)) is not None:
            if format is None and isinstance(item, Record):  # faults need no format, and a file may hold nothing else
                head = [item, *islice(records, FIRST_ROWS - 1)]
                format = self._recognise(source, head, on_file)
                if format is None:
                    return
                records = chain(head[1:], records)
            if on_record is not None:
                on_record(source, position)
            yield from self._rows_of_record(source, format, item)

    def _recognise(self, source: str, head: list[Record | Fault], on_file: Any) -> Format | None:
        first = [_without_nulls(item.value) for item in head if isinstance(item, Record)]
        try:
            format, why, others = recognise(first, self.options)
            format = self._bound(source, format, first)
            self._look_for_renderings(source, format, first)
        except NotRecognised as refusal:
            self.report.read(source)
            self.report.drop(refusal.reason, source, head[0].line, refusal.message)
            self.report.warn(f"{source} was refused: {refusal.message}")
            if self.strict:
                raise DataError.at(source, head[0].line, refusal.reason, refusal.message) from None
            return None
        self.report.recognised(source, format.name)
        if format.guess and not format.warnings and (guess := next(filter(None, map(format.guess, first)), "")):
            self.report.warn(f"{source}: {guess}")
        for warning in format.warnings:
            self.report.warn(f"{format.name}: {warning}")
        if others:
            self.report.warn(f"{source} mixes formats: it is read as {format.name}, but {others}")
        self.formats[source] = format
        if on_file is not None:
            on_file(source, format, why)
        return format

    def _look_for_renderings(self, source: str, format: Format, first: list[dict[str, Any]]) -> None:
        """Whether the first rows' questions are rendered prompts. Raises NotRecognised if some are and some not."""
        choices = self.options
        self.take_apart = TakeApart(choices.rendered, choices.prompt_is_rendered, notes=self.report.notes)
        if choices.rendered is None and choices.prompt_is_rendered is None:
            pairs = (pair for row in first for pair in self._pairs_of(format, row, source) if isinstance(pair, Pair))
            self.take_apart.decide(pairs)

    def _pairs_of(self, format: Format, row: RowDict, source: str) -> Iterator[Pair | Drop]:
        try:
            if not row.keys() <= self.seen[source]:
                self._check_new_columns(source, format, row)
            yield from read_row(format, row, self.options)
        except Drop as drop:
            yield drop

    def _bound(self, source: str, format: Format, first: Sequence[RowDict]) -> Format:
        """The format as the whole file shows it. Raises NotRecognised for what the user has to say first."""
        bound = format.bind(format, self._values(source), self.options) if format.bind else format
        unread = unread_columns(bound, first, self.options)
        if unread.long:
            row = next((row for row in first if row.keys() & unread.long.keys()), first[0])
            raise NotRecognised("unread_columns", refusal(bound, unread, row, self.options))
        for column, example in unread.short.items():
            self.report.unread(source, column, example)
        guesses = {guess for row in first if bound.guess and (guess := bound.guess(row))} if self.strict else ()
        if guesses:
            raise NotRecognised("guess", f"data_check=strict reads nothing that is guessed: {guesses.pop()}")
        self.seen[source] = {column for row in first for column, value in row.items() if value not in _NOTHING}
        self.seen[source] |= bound.own | {name for need in bound.needs for name in need.split("|")}
        return bound

    def _records(self, source: str, position: Position | None = None) -> Iterator[Record | Fault]:
        """The records of `source` without the columns that the user wants ignored."""
        records = iter_records(source, position, self.options.encoding)
        return map(self._without_ignored, records) if self.options.ignore_columns else records

    def _without_ignored(self, item: Record | Fault) -> Record | Fault:
        ignored = self.options.ignore_columns
        if isinstance(item, Fault):
            return item
        self.ignored |= ignored & item.value.keys()
        return Record(item.line, {name: value for name, value in item.value.items() if name not in ignored})

    def _values(self, source: str) -> Iterator[RowDict]:
        return (item.value for item in islice(self._records(source), ASK_ROWS) if isinstance(item, Record))

    def _check_new_columns(self, source: str, format: Format, row: RowDict) -> None:
        """Columns that the first rows had not, or had empty. Raises Drop where one is long text that is not read."""
        new = {column for column in row.keys() - self.seen[source] if row[column] not in _NOTHING}
        if not new:
            return
        unread = unread_columns(format, [_without_nulls(row)], self.options)
        if long := new & unread.long.keys():
            raise Drop("unread_columns", refusal(format, unread, row, self.options))
        for column in new & unread.short.keys():
            self.report.unread(source, column, unread.short[column])
        self.seen[source] |= new - long

    def _rows_of_record(self, source: str, format: Format | None, item: Record | Fault) -> Iterator[Row]:
        for outcome in self._outcomes(source, format, item):
            self.report.read(source)
            if isinstance(outcome, Row):
                yield outcome
                continue
            self.report.drop(outcome.reason, source, item.line, outcome.detail)
            if self.strict:
                raise DataError.at(source, item.line, outcome.reason, outcome.detail)

    def _outcomes(self, source: str, format: Format | None, item: Record | Fault) -> Iterator[Row | Drop]:
        if isinstance(item, Fault):
            yield Drop(item.reason, item.detail)
            return
        assert format is not None  # it is recognised before the first record is read
        row = item.value if format.needs else _without_nulls(item.value)
        for pair in self._pairs_of(format, row, source):
            if isinstance(pair, Drop):
                if pair.reason in ("score_gap", "no_score"):
                    self.scored.add(source)
                yield pair
                continue
            if "kept_without_scores" not in pair.extra:
                self.scored.add(source)
            yield self._checked(pair, source, item.line)

    def _checked(self, pair: Pair, source: str, line: int) -> Row | Drop:
        try:
            pair = self.take_apart(pair)
            if self.options.split_system and split_system(pair):
                self.report.notes["system_split_off"] += 1
            return check(pair, source, line, self.report)
        except Drop as drop:
            return drop

    def warn_of_choices_without_effect(self) -> None:
        """A gap is missed by each file that has no scores; the other choices only where no file knows them."""
        for column in sorted(self.options.ignore_columns - self.ignored):
            self.report.warn(f"ignore_columns (--ignore_columns) has no effect: no row has a column {column!r}")
        unused = [(choice, source) for source, format in self.formats.items() for choice in format.unused(self.options)]
        if self.options.min_score_gap is not None:
            unused += [("min_score_gap", source) for source in self.formats if source not in self.scored]
        for choice in dict(unused):
            sources = [source for other, source in unused if other == choice]
            if choice == "min_score_gap" or len(sources) == len(self.formats):
                where = f"{sources[0]} ({self.formats[sources[0]].name})"
                more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
                self.report.warn(f"{choice} (--{choice.replace('_', '-')}) has no effect on {where}{more}")


_NOTHING: tuple[Any, ...] = (None, "", [], {})


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}


_NO_WIDTH = "".join(map(chr, (  # soft hyphen, joiners, marks of direction, fillers, a byte-order mark, variations
    0xAD, 0x34F, 0x61C, 0x180E, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0x3164,
    *range(0xFE00, 0xFE10), 0xFEFF,
)))  # fmt: skip
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def check(pair: Pair, file: str, line: int, report: DataReport) -> Row:
    """The pair as a Row. Raises Drop with the first thing that is wrong with it."""
    for name in ("question", "chosen", "rejected") if pair.prompt is None else ("prompt", "chosen", "rejected"):
        _check_text(name, getattr(pair, name))
    if pair.system is not None:
        _check_text("system", pair.system)
    chosen, rejected = pair.chosen.strip(), pair.rejected.strip()
    single = pair.label is not None
    question = pair.question.strip() if pair.prompt is None else ""
    if _is_empty(chosen) or (_is_empty(rejected) and not single):
        named = (("the answer is", chosen),) if single else (("chosen", chosen), ("rejected", rejected))
        sides = [name for name, text in named if _is_empty(text)]
        raise Drop("empty_answer", " and ".join(sides) + " empty")
    if _is_empty(question if pair.prompt is None else pair.prompt.strip()):
        raise Drop("empty_prompt")
    if chosen == rejected:
        raise Drop("identical_answers")
    history = _check_history(pair.history)
    system = (pair.system or "").strip() or None
    _take_notes(pair, report)
    judged = (pair.extra, pair.label, pair.dialogue)
    return Row(question, chosen, rejected, system, history, pair.prompt, file, line, *judged)


def _is_empty(text: str) -> bool:
    """Whether there is nothing to be seen in it: not a character, or such as have no width alone."""
    return not text or (text[0] in _NO_WIDTH and not text.strip(_NO_WIDTH + " \n\t"))


def _take_notes(pair: Pair, report: DataReport) -> None:
    if pair.label is not None:
        report.notes["good_answers" if pair.label else "bad_answers"] += 1
    elif pair.chosen[0].isspace() != pair.rejected[0].isspace():
        report.notes["leading_space_in_" + ("chosen" if pair.chosen[0].isspace() else "rejected") + "_only"] += 1
    elif pair.chosen[0].isspace() and pair.prompt is not None and not pair.prompt[-1].isspace():
        report.notes["space_between_prompt_and_answers_stripped"] += 1
    for name in NOTED if pair.extra else ():
        if pair.extra.get(name):
            report.notes[name] += 1


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise Drop("wrong_type", f"{name} must be a string, not {type(text).__name__}")
    if (not text.isascii() or "\0" in text) and (match := _NO_TEXT.search(text)):
        if match.group() == "\0":
            raise Drop("nul_byte", f"a NUL character in {name}")
        raise Drop("invalid_unicode", f"half of a surrogate pair (\\u{ord(match.group()):04x}) in {name}")


def _check_history(history: Any) -> tuple[tuple[str, str], ...]:
    if history is None or history in ("", (), []):
        return ()
    if is_messages(history):
        history = history_of(history)
    if not isinstance(history, (list, tuple)):
        raise Drop("wrong_type", f"history must be a list of [user, assistant] pairs, not {type(history).__name__}")
    turns = []
    for turn in history:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise Drop("wrong_type", "history must be a list of [user, assistant] pairs")
        for text in turn:
            _check_text("history", text)
        if any(_is_empty(text.strip()) for text in turn):
            raise Drop("empty_turn", "an empty turn in history")
        turns.append((turn[0].strip(), turn[1].strip()))
    return tuple(turns)


class Repeats:
    """Which rows to leave out as repeats: exact duplicates after normalisation, and rows past a limit a prompt."""

    def __init__(self, dedup: bool, max_per_prompt: int):
        self.dedup, self.max_per_prompt = dedup, max_per_prompt
        self.seen: set[int] = set()
        self.per_prompt: Counter[int] = Counter()

    def reason(self, row: Row) -> str | None:
        if self.dedup:
            key = pair_key(row)
            if key in self.seen:
                return "duplicate"
            self.seen.add(key)
        if self.max_per_prompt:
            key = prompt_key(row)
            if self.per_prompt[key] >= self.max_per_prompt:
                return "over_max_per_prompt"
            self.per_prompt[key] += 1
        return None
