"""The families of open preference datasets: one registry, recognition by the keys of a file's first rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from preference.data.formats import (
    axolotl,
    hh,
    judged,
    labelled,
    llamafactory,
    ms_swift,
    orca,
    others,
    trl,
    ultrafeedback,
)
from preference.data.formats.base import Drop, Format, NotRecognised, Options, Pair, RowDict, shown_keys
from preference.data.formats.columns import COLUMNS, parse_columns
from preference.data.formats.dialogue_text import DIALOGUE_TEXT
from preference.data.formats.refused import REFUSED, carried_beyond_text
from preference.data.formats.triple import TRIPLE

__all__ = ["FORMATS", "Drop", "Format", "NotRecognised", "Options", "Pair", "Recognised", "checked", "get_format",
           "parse_columns", "read_row", "recognise"]  # fmt: skip

# The order is the order of recognition: a shape comes before the more general one that it would also match.
_ALL = (
    labelled.SHP, TRIPLE, ms_swift.MS_SWIFT, ms_swift.MS_SWIFT_V2, llamafactory.V1, llamafactory.SHAREGPT,
    others.AZURE, labelled.PKU, others.CVALUES, ultrafeedback.RAW, ultrafeedback.CLEANED, ultrafeedback.BINARIZED,
    judged.CAPYBARA, judged.ULTRAMIX, axolotl.CHAT_TEMPLATE, others.NECTAR, others.STACK_EXCHANGE,
    labelled.ARENA, labelled.ARENA_CONVERSATIONS, labelled.FIRST_OR_SECOND, others.ZHONGJING_RANKS,
    ultrafeedback.ARGILLA_STRINGS, llamafactory.RANKING, llamafactory.ALPACA, orca.ORCA_REJUDGED, orca.ORCA,
    hh.HH_PROMPT, hh.HH_CN, trl.TRL, axolotl.ICR, hh.HH, DIALOGUE_TEXT, trl.TRL_IMPLICIT_MESSAGES,
    trl.TRL_IMPLICIT_TEXT, COLUMNS,
)  # fmt: skip
FORMATS: dict[str, Format] = {format.name: format for format in _ALL}
_DETECTED = [format for format in _ALL if format.detected]
# {question, chosen, rejected} under different names for the question: a row may have two of them
_BY_QUESTION = (axolotl.CHAT_TEMPLATE, llamafactory.SHAREGPT, llamafactory.ALPACA, orca.ORCA, trl.TRL, axolotl.ICR)
_ADVICE = (
    "name the format with --format (in training --data_format), or the columns with "
    "--columns question=...,chosen=...,rejected=..."
)


class Recognised(NamedTuple):
    format: Format
    why: str
    others: str = ""  # what rows of other formats there are among the first ones


def get_format(name: str) -> Format:
    """The format called `name`. Raises ValueError that lists the names."""
    if name not in FORMATS:
        near = get_close_matches(name.lower(), FORMATS, n=1)
        meant = f", did you mean {near[0]}" if near else ""
        raise ValueError(f"unknown format {name!r}{meant}; there are: {', '.join(sorted(FORMATS))}")
    return FORMATS[name]


def checked(options: Options) -> Options:
    """`options` themselves. Raises ValueError if the format does not exist, or lacks its columns."""
    if options.format != "auto":
        get_format(options.format)
    if options.format == COLUMNS.name and not options.columns:
        raise ValueError("format=columns needs the columns: question=...,chosen=...,rejected=...")
    return options


def read_row(format: Format, row: RowDict, options: Options) -> Iterator[Pair | Drop]:
    """The pairs of one row. May raise Drop for the row as a whole."""
    beyond = carried_beyond_text(row)
    if beyond:
        raise Drop(*beyond)
    yield from format.pairs(row, options)


def recognise(rows: Sequence[RowDict], options: Options) -> Recognised:
    """Which format `rows` (the first of a file) are in. Raises NotRecognised, ValueError for an unknown name."""
    if checked(options).columns:
        return Recognised(COLUMNS, "columns named by the user")
    if options.format != "auto":
        return Recognised(get_format(options.format), "named by the user")
    votes: Counter[str] = Counter()
    for row in rows:
        if match := next((format for format in _DETECTED if format.matches(row)), None):
            if _asks_nothing(match, row):  # `instruction` may stand empty beside a question
                asking = (format for format in _BY_QUESTION if format.matches(row) and not _asks_nothing(format, row))
                match = next(asking, match)
            votes[match.name] += 1
    if votes:
        best = FORMATS[votes.most_common(1)[0][0]]
        _refuse_ambiguity(best, rows)
        if best.only_when_named:
            raise NotRecognised("ambiguous_format", f"looks like {best.name} ({best.what}): {best.only_when_named}")
        needs = ", ".join(best.present(next(filter(best.matches, rows))))
        of_the_first = f"of the first {len(rows)} rows"
        others = [f"{count} {of_the_first} look like {name}" for name, count in votes.items() if name != best.name]
        return Recognised(best, f"{votes[best.name]} {of_the_first} have {needs}", ", ".join(others))
    return _near_miss(rows)


def _asks_nothing(format: Format, row: RowDict) -> bool:
    return format in _BY_QUESTION and row[format.question_column(row)] == ""


def _refuse_ambiguity(best: Format, rows: Sequence[RowDict]) -> None:
    """Formats that would take the answers, or the question, from other columns of the same row: the user must say."""
    for row in filter(best.matches, rows):
        others = [other for other in _DETECTED if other is not best and other.matches(row)]
        rivals = {other: _columns(other.answers, row) for other in others if not other.answers & best.answers}
        mine = _columns(best.answers, row)
        if not rivals and best in _BY_QUESTION:
            rivals = {other: other.question_column(row) for other in others if _other_question(best, other, row)}
            mine = best.question_column(row)
        if rivals:
            names = ", ".join(f"{format.name} ({columns})" for format, columns in [(best, mine), *rivals.items()])
            advice = "say which with --format (in training --data_format)"
            raise NotRecognised("ambiguous_format", f"the rows could be read as {names}: {advice}")


def _columns(names: frozenset[str], row: RowDict) -> str:
    return " and ".join(sorted(names & row.keys()))


def _other_question(best: Format, other: Format, row: RowDict) -> bool:
    """Whether `other` takes another question for the same answers (alpaca's `input` is a part of its question)."""
    if other not in _BY_QUESTION or {best, other} == {llamafactory.ALPACA, axolotl.ICR}:
        return False
    try:
        questions = [str(pair.question).strip() for format in (best, other) for pair in format.pairs(row, Options())]
    except Drop:
        return False
    return all(questions) and questions[0] != questions[1]


def _near_miss(rows: Sequence[RowDict]) -> Recognised:
    refusals = Counter(refused.message for row in rows for refused in REFUSED if refused.matches(row))
    if refusals:
        raise NotRecognised("not_preference", f"no preference pairs: {refusals.most_common(1)[0][0]}")
    nearest: dict[str, list[str]] = {}
    best = 0.5  # at least half of the keys, or it is no near miss
    for format in _DETECTED:
        lacks = min((format.lacks(row) for row in rows), key=len)
        share = 1 - len(lacks) / len(format.needs)
        if lacks and share >= best:
            nearest = {format.name: lacks} if share > best else nearest | {format.name: lacks}
            best = share
    keys = f"its keys are {shown_keys(rows[0])}"
    if len(nearest) == 1:
        ((name, lacks),) = nearest.items()
        return Recognised(FORMATS[name], f"nearest to {name}, but without {', '.join(lacks)}; {keys}")
    near = "; ".join(f"{name} without {', '.join(lacks)}" for name, lacks in nearest.items())
    raise NotRecognised("unknown_format", f"no known format: {keys}{'; near to ' + near if near else ''}; {_ADVICE}")
