"""The families of open preference datasets: one registry, recognition by the keys of a file's first rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from preference.data.formats import (
    axolotl,
    candidates,
    decide,
    hh,
    judged,
    labelled,
    llamafactory,
    ms_swift,
    named,
    orca,
    others,
    tools,
    trl,
    ultrafeedback,
    unpaired,
)
from preference.data.formats.base import (
    PAIR_NUMBERS,
    Ask,
    Drop,
    Format,
    NotRecognised,
    Options,
    Pair,
    RowDict,
    check_encoding,
    parse_labels,
    parse_names,
    shown_keys,
)
from preference.data.formats.beyond_text import carried_beyond_text, columns_beyond, placed_in_text
from preference.data.formats.columns import COLUMNS, parse_columns
from preference.data.formats.context import columns_beside, complete
from preference.data.formats.dialogue_text import DIALOGUE_TEXT
from preference.data.formats.refused import REFUSED, flag_columns, set_aside
from preference.data.formats.scores import gap_of_any, score_columns
from preference.data.formats.triple import TRIPLE
from preference.data.formats.whole import with_tools
from preference.data.formats.whole_rows import pairs_of, tools_beside

__all__ = ["FORMATS", "Ask", "Drop", "Format", "NotRecognised", "Options", "Pair", "Recognised", "check_encoding",
           "choose", "get_format", "parse_columns", "parse_labels", "parse_names", "read_row", "recognise"]  # fmt: skip

# The order is the order of recognition: a shape comes before the more general one that it would also match.
_ALL = (
    labelled.SHP, TRIPLE, tools.NOVA, tools.VERTEX, tools.PADDLE, tools.HALOS, tools.SUMMARIES, tools.LABEL_STUDIO,
    ms_swift.MS_SWIFT, ms_swift.MS_SWIFT_V2,
    llamafactory.V1, llamafactory.SHAREGPT,
    others.AZURE, labelled.PKU, others.CVALUES, ultrafeedback.RAW, ultrafeedback.CLEANED, ultrafeedback.BINARIZED,
    judged.CAPYBARA, judged.ULTRAMIX, axolotl.CHAT_TEMPLATE, others.NECTAR, others.STACK_EXCHANGE,
    labelled.ARENA, labelled.ARENA_CONVERSATIONS, labelled.FIRST_OR_SECOND, others.ZHONGJING_RANKS,
    ultrafeedback.ARGILLA_STRINGS, llamafactory.RANKING, llamafactory.ALPACA, orca.ORCA_REJUDGED, orca.ORCA,
    hh.HH_PROMPT, hh.HH_CN, trl.TRL, axolotl.ICR, hh.HH, DIALOGUE_TEXT, trl.TRL_IMPLICIT_MESSAGES,
    decide.DECIDED, candidates.CANDIDATES_RANKED, named.NAMED, trl.TRL_IMPLICIT_TEXT,
    unpaired.UNPAIRED, COLUMNS,
)  # fmt: skip
FORMATS: dict[str, Format] = {format.name: format for format in _ALL}
_DETECTED = [format for format in _ALL if format.detected]
_SHAPE = {"wrong_type", "missing_key", "wrong_label", "unknown_role"}  # reasons why another format may read the row
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
    if options.format != "auto" and FORMATS[options.format].single and not options.unpaired:
        raise ValueError(
            f"format={options.format} has one answer a row, which loss=kto (--unpaired) alone can train on"
        )
    if options.format == COLUMNS.name and not options.columns:
        raise ValueError("format=columns needs the columns: question=...,chosen=...,rejected=...")
    return options


def choose(**choices: Any) -> Options:
    """The options out of the user's words: columns, labels and ignore_columns may be text. Raises ValueError."""
    parsers: dict[str, Callable[[Any], Any]] = {
        "columns": parse_columns, "labels": parse_labels, "ignore_columns": parse_names
    }  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in choices.items() if value is not None}
    return checked(Options(**{name: parsers[name](value) if name in parsers else value
                              for name, value in given.items()}))  # fmt: skip


class _Plan(NamedTuple):
    """What rows with the same columns have in common, so that it is found once and not for every row."""

    checked: bool  # whether a column may say that the row is no pair
    beside: tuple[tuple[str, str], ...]
    scored: bool
    numbers: tuple[str, ...]


_PLANS: dict[tuple[str, tuple[str, ...]], _Plan] = {}
_MOST_PLANS = 4096  # rows whose columns are different in each are not worth remembering


def _plan(format: Format, columns: tuple[str, ...]) -> _Plan:
    if len(_PLANS) >= _MOST_PLANS:
        _PLANS.clear()
    plan = _PLANS[format.name, columns] = _Plan(
        bool(columns_beyond(columns) or flag_columns(columns)),
        columns_beside(columns, format.own),
        not format.scored and score_columns(columns) is not None,
        tuple(name for name in PAIR_NUMBERS if name in columns),
    )
    return plan


def read_row(format: Format, row: RowDict, options: Options) -> Iterator[Pair | Drop]:
    """The pairs of one row, with all that stands beside the question. May raise Drop for the row as a whole."""
    columns = tuple(row)
    plan = _PLANS.get((format.name, columns)) or _plan(format, columns)
    tools = None
    if plan.checked:
        beyond = carried_beyond_text(row)
        tools = tools_beside(row) if beyond and beyond[0] == "tool_calls" else None
        if set_apart := (beyond if tools is None else None) or set_aside(row, format):
            raise Drop(*set_apart)
    beside = [(column, kind) for column, kind in plan.beside if row[column]] if plan.beside else []
    if beside:
        read = columns_read(format, row, options)
        beside = [(column, kind) for column, kind in beside if column not in read]
    scored = plan.scored or (options.min_score_gap is not None and not format.scored)
    numbers = plan.numbers and {name: _number(name, row[name]) for name in plan.numbers if row[name] is not None}
    for pair in pairs_of(format, row, options, tools):
        if not isinstance(pair, Pair):
            yield pair
            continue
        if mark := placed_in_text(pair.question):
            yield Drop("images", f"{mark} stands in the question for what is no text")
            continue
        try:
            if beside:
                _complete(pair, row, beside)
            if tools:
                pair = with_tools(pair, tools)
            if scored:
                pair.extra = {**pair.extra, **gap_of_any(row, options)}
        except Drop as drop:
            yield drop
            continue
        if numbers:
            pair.extra = {**pair.extra, **numbers}
        yield pair


def _complete(pair: Pair, row: RowDict, beside: list[tuple[str, str]]) -> None:
    """What stands beside the question into the pair. Raises Drop where that is a whole conversation."""
    if pair.dialogue is None:
        complete(pair, row, beside)
    elif other := next((column for column, kind in beside if kind != "system"), None):  # a system text is in it
        raise Drop("unread_columns", f"{other} beside answers of several turns: --ignore_columns {other} drops it")


def _number(name: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or (name == "pair_weight" and value < 0):
        raise Drop("bad_number", f"{name} is {value!r}: a number{', 0 or more' * (name == 'pair_weight')} is needed")
    return float(value)


def recognise(rows: Sequence[RowDict], options: Options) -> Recognised:
    """Which format `rows` (the first of a file) are in. Raises NotRecognised, ValueError for an unknown name."""
    if checked(options).columns:
        return Recognised(COLUMNS, "columns named by the user")
    if options.format != "auto":
        return Recognised(get_format(options.format), "named by the user")
    votes: Counter[str] = Counter()
    for row in rows:
        if match := _best_match(row, options):
            votes[match.name] += 1
    if votes:
        best = FORMATS[votes.most_common(1)[0][0]]
        _refuse_ambiguity(best, rows)
        if best.only_when_named:
            raise NotRecognised("ambiguous_format", f"looks like {best.name} ({best.what}): {best.only_when_named}")
        row = next(filter(best.matches, rows))
        needs = ", ".join(best.present(row) or sorted(best.columns_read(row)))
        of_the_first = f"of the first {len(rows)} rows"
        others = [f"{count} {of_the_first} look like {name}" for name, count in votes.items() if name != best.name]
        return Recognised(best, f"{votes[best.name]} {of_the_first} have {needs}", ", ".join(others))
    return _near_miss(rows)


def _best_match(row: RowDict, options: Options) -> Format | None:
    """The first format whose columns the row has and in which it reads; else the first whose columns it has."""
    matching = (format for format in _DETECTED if (options.unpaired or not format.single) and format.matches(row))
    first = None
    for format in matching:
        if format.sure or format.only_when_named or reads(format, row, options):
            if _asks_nothing(format, row):  # `instruction` may stand empty beside a question
                asking = (other for other in _BY_QUESTION if other.matches(row) and not _asks_nothing(other, row))
                return next(asking, format)
            return format
        first = first or format
    return first


def reads(format: Format, row: RowDict, options: Options) -> bool:
    """Whether the row has the format's shape: its pairs are text, whatever else may be wrong with them."""
    try:
        found = list(format.pairs(row, options))
    except Drop as drop:
        found = [drop]
    asked = format is not DIALOGUE_TEXT  # whose question is taken out of its answers later
    return not any(pair.reason in _SHAPE if isinstance(pair, Drop) else not _is_text(pair, asked) for pair in found)


def _is_text(pair: Pair, asked: bool) -> bool:
    question = pair.question if pair.prompt is None else pair.prompt
    return (isinstance(question, str) or not asked) and isinstance(pair.chosen, str) and isinstance(pair.rejected, str)


def _asks_nothing(format: Format, row: RowDict) -> bool:
    return format in _BY_QUESTION and row[format.question_column(row)] == ""


def _refuse_ambiguity(best: Format, rows: Sequence[RowDict]) -> None:
    """Formats that would take the answers, or the question, from other columns of the same row: the user must say."""
    for row in filter(best.matches, rows if best.needs else ()):
        others = [other for other in _DETECTED if other is not best and other.needs and other.matches(row)]
        rivals = {other: _columns(other.answers, row) for other in others if not other.answers & best.answers}
        mine = _columns(best.answers, row)
        if not rivals and best in _BY_QUESTION:
            rivals = {other: other.question_column(row) for other in others if _other_question(best, other, row)}
            mine = best.question_column(row)
        if rivals:
            names = ", ".join(f"{format.name} ({columns})" for format, columns in [(best, mine), *rivals.items()])
            advice = "say which with --format (in training --data_format)"
            raise NotRecognised("ambiguous_format", f"the rows could be read as {names}: {advice}")


def columns_read(format: Format, row: RowDict, options: Options) -> frozenset[str]:
    """The columns of which the format's pairs are made."""
    return format.columns_read(row) | frozenset((options.columns or {}).values())


def _columns(names: frozenset[str], row: RowDict) -> str:
    return " and ".join(sorted(names & row.keys()))


def _other_question(best: Format, other: Format, row: RowDict) -> bool:
    """Whether `other` takes another question for the same answers."""
    if other not in _BY_QUESTION or other is axolotl.ICR:  # `input` goes behind the question
        return False
    try:
        pairs = [pair for format in (best, other) for pair in format.pairs(row, Options())]
        questions = [str(pair.question).strip() for pair in pairs if isinstance(pair, Pair)]
    except Drop:
        return False
    return len(questions) > 1 and all(questions) and questions[0] != questions[1]


def _near_miss(rows: Sequence[RowDict]) -> Recognised:
    refusals = Counter(refused.message for row in rows for refused in REFUSED if refused.matches(row))
    if refusals:
        raise NotRecognised("not_preference", f"no preference pairs: {refusals.most_common(1)[0][0]}")
    nearest: dict[str, list[str]] = {}
    best = 0.5  # at least half of the keys, or it is no near miss
    for format in filter(lambda format: format.needs, _DETECTED):
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
