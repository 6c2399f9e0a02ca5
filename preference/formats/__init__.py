"""The families of open preference datasets: one registry, recognition by the keys of a file's first rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from preference.formats import axolotl, hh, judged, labelled, llamafactory, ms_swift, orca, others, trl, ultrafeedback
from preference.formats.base import Drop, Format, Options, Pair, RowDict, shown_keys
from preference.formats.columns import COLUMNS, parse_columns
from preference.formats.refused import REFUSED, carried_beyond_text
from preference.formats.triple import TRIPLE

__all__ = ["FORMATS", "Drop", "Format", "NotRecognised", "Options", "Pair", "Recognised", "get_format", "parse_columns",
           "read_row", "recognise"]  # fmt: skip

# The order is the order of recognition: a shape comes before the more general one that it would also match.
_ALL = (
    labelled.SHP, TRIPLE, ms_swift.MS_SWIFT, ms_swift.MS_SWIFT_V2, llamafactory.V1, llamafactory.SHAREGPT,
    others.AZURE, labelled.PKU, others.CVALUES, ultrafeedback.RAW, ultrafeedback.CLEANED, ultrafeedback.BINARIZED,
    judged.CAPYBARA, judged.ULTRAMIX, axolotl.CHAT_TEMPLATE, others.NECTAR, others.STACK_EXCHANGE,
    labelled.ARENA, labelled.ARENA_CONVERSATIONS, labelled.FIRST_OR_SECOND, others.ZHONGJING_RANKS,
    ultrafeedback.ARGILLA_STRINGS, llamafactory.RANKING, llamafactory.ALPACA, orca.ORCA_REJUDGED, orca.ORCA,
    hh.HH_PROMPT, hh.HH_CN, trl.TRL, axolotl.ICR, hh.HH, trl.TRL_IMPLICIT_MESSAGES, trl.TRL_IMPLICIT_TEXT, COLUMNS,
)  # fmt: skip
FORMATS: dict[str, Format] = {format.name: format for format in _ALL}
_DETECTED = [format for format in _ALL if format.detected]
_ADVICE = (
    "name the format with --format (in training --data_format), or the columns with "
    "--columns question=...,chosen=...,rejected=..."
)


class Recognised(NamedTuple):
    format: Format
    why: str


class NotRecognised(Exception):
    """A file that no format may read: a reason word and what to tell the user."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason, self.message = reason, message


def get_format(name: str) -> Format:
    """The format called `name`. Raises ValueError that lists the names."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; there are: {', '.join(sorted(FORMATS))}")
    return FORMATS[name]


def read_row(format: Format, row: RowDict, options: Options) -> Iterator[Pair | Drop]:
    """The pairs of one row. May raise Drop for the row as a whole."""
    beyond = carried_beyond_text(row)
    if beyond:
        raise Drop(*beyond)
    yield from format.pairs(row, options)


def recognise(rows: Sequence[RowDict], options: Options) -> Recognised:
    """Which format `rows` (the first of a file) are in. Raises NotRecognised, ValueError for an unknown name."""
    if options.columns:
        return Recognised(COLUMNS, "columns named by the user")
    if options.format == COLUMNS.name:
        raise ValueError("format=columns needs the columns: question=...,chosen=...,rejected=...")
    if options.format != "auto":
        return Recognised(get_format(options.format), "named by the user")
    votes: Counter[str] = Counter()
    for row in rows:
        if match := next((format for format in _DETECTED if format.matches(row)), None):
            votes[match.name] += 1
    if votes:
        best = FORMATS[votes.most_common(1)[0][0]]
        _refuse_ambiguity(best, rows)
        if best.only_when_named:
            raise NotRecognised("ambiguous_format", f"looks like {best.name} ({best.what}): {best.only_when_named}")
        needs = ", ".join(best.needs)
        return Recognised(best, f"{votes[best.name]} of the first {len(rows)} rows have {needs}")
    return _near_miss(rows)


def _refuse_ambiguity(best: Format, rows: Sequence[RowDict]) -> None:
    """Two formats that would take their answers from different columns of the same row: the user must say which."""
    for row in rows:
        if not best.matches(row):
            continue
        rivals = [other for other in _DETECTED if not other.answers & best.answers and other.matches(row)]
        if rivals:
            names = ", ".join(f"{format.name} ({' and '.join(sorted(format.answers))})" for format in [best, *rivals])
            advice = "say which with --format (in training --data_format)"
            raise NotRecognised("ambiguous_format", f"the rows could be read as {names}: {advice}")


def _near_miss(rows: Sequence[RowDict]) -> Recognised:
    refusals = Counter(refused.message for row in rows for refused in REFUSED[:] if refused.matches(row))
    if refusals:
        raise NotRecognised("not_preference", f"not preference pairs: {refusals.most_common(1)[0][0]}")
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
