"""Every column is read, known to be metadata, or said to be unread; unread text as long as a question is an error.

Whether a column is read is judged by what came out: its text stands somewhere in the pairs of its row, or the format
says that it takes the column. So no format has to list what it happens to repeat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from preference.data.formats import columns_read, read_row
from preference.data.formats.base import PAIR_NUMBERS, Drop, Format, Options, Pair, RowDict
from preference.data.formats.beyond_text import columns_beyond
from preference.data.formats.named import answer_columns
from preference.data.formats.names import CANDIDATES, QUESTIONS, is_metadata, key_of

LONG = 40  # characters at which any text is as long as a question; else half of the question's length is
WORDS = 3
MANY = 16  # values of a column, a quarter of them different at most, make it a category unless they are long
EXAMPLE = 60
# Sets with a text beside the pair that is no part of it: columns by which they are known, and what is left out
_KNOWN = ((frozenset({"text", "complexity", "quality"}), frozenset({"text"})),)  # FineMed-DPO's source documents


@dataclass
class Unread:
    """Columns that no pair was made of, with an example each: those that are long text, and the others."""

    long: dict[str, str] = field(default_factory=dict)
    short: dict[str, str] = field(default_factory=dict)


def unread_columns(format: Format, rows: Sequence[RowDict], options: Options) -> Unread:
    """What `rows` hold that is not read. Rows that give no pairs are passed over."""
    seen: dict[str, list[tuple[Any, str, int]]] = {}  # column: its value, the pairs' text, the question's length
    for row in rows:
        pairs = _pairs_of(format, row, options)
        if not pairs and format.guess and format.matches(row):  # what is guessed is not in it
            pairs = [Pair("", *(row[side] for side in sorted(format.answers)))]
        if not pairs:
            continue
        read = _taken(format, row, options)
        left = [column for column, value in row.items() if column not in read and value not in (None, "", [], {})]
        text = _squeezed("\n".join(_texts(pairs))) if left else ""
        asked = min(len(str(pair.question if pair.prompt is None else pair.prompt)) for pair in pairs)
        for column in left:
            seen.setdefault(column, []).append((row[column], text, asked))
    unread = Unread()
    for column, found in seen.items():
        lost = [(value, asked) for value, text, asked in found if not _inside(value, text)]
        if not lost:
            continue
        example = _example(lost[0][0])
        category = len(lost) >= MANY and 4 * len({repr(value) for value, _ in lost}) <= len(lost)
        long = sum(_is_long(value, 2 * LONG if category else asked) for value, asked in lost) * 4 >= len(lost)
        if format.guess and not is_metadata(column) and any(map(_is_text, (value for value, _ in lost))):
            long = True  # what is guessed may stand in it
        if long and (format.guess or not is_metadata(column)):
            unread.long[column] = example
        elif long or not is_metadata(column):
            unread.short[column] = example
    return unread


def _pairs_of(format: Format, row: RowDict, options: Options) -> list[Pair]:
    try:
        return [pair for pair in read_row(format, row, options) if isinstance(pair, Pair)]
    except Drop:
        return []


def _taken(format: Format, row: RowDict, options: Options) -> frozenset[str]:
    """The columns that are read, or left out for a known reason."""
    read = columns_read(format, row, options)
    sides = answer_columns(tuple(row))
    if sides and isinstance(row[sides[0]], (list, tuple)):  # a dialogue: the prompt beside it has to be in it
        read -= {column for column in read if key_of(column) in QUESTIONS}
    candidates = {column for column, value in row.items() if _is_candidates(column, value)} if sides else set()
    known = [left_out for signature, left_out in _KNOWN if signature <= row.keys()]
    handled = {column for column in format.own if column in row}
    handled |= {column for column, reason in columns_beyond(tuple(row)) if reason == "tool_calls"}
    return read.union(format.ignores, candidates - read, handled, PAIR_NUMBERS, *known)


def _is_candidates(column: str, value: Any) -> bool:
    """Whether the column is the answers out of which a pair was made: responses, all_generated_responses."""
    key = key_of(column)
    return key in CANDIDATES or (isinstance(value, (list, tuple)) and key.rsplit("_", 1)[-1] in CANDIDATES)


def _texts(pairs: list[Pair]) -> Iterator[str]:
    for pair in pairs:
        for value in (pair.system, pair.history, pair.question, pair.prompt, pair.chosen, pair.rejected):
            yield from _leaves(value)
        if pair.dialogue is not None:
            yield from _leaves(pair.dialogue.chosen)
            yield from _leaves(pair.dialogue.rejected)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ("role", "from", "type"):
                yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _inside(value: Any, text: str) -> bool:
    leaves = [_squeezed(leaf) for leaf in _leaves(value)]
    return bool(leaves) and all(leaf in text for leaf in leaves)


def _is_text(value: Any) -> bool:
    return any(leaf.strip() for leaf in _leaves(value))


def _is_long(value: Any, asked: int) -> bool:
    text = _squeezed(" ".join(_leaves(value)))
    words = (
        text.count(" ") + 1 + sum("\u3040" <= char <= "\u9fff" or "\uac00" <= char <= "\ud7af" for char in text) // 2
    )
    return words >= WORDS and len(text) >= min(LONG, asked / 2)


def _example(value: Any) -> str:
    text = _squeezed(value if isinstance(value, str) else repr(value))
    return text if len(text) <= EXAMPLE else text[: EXAMPLE - 3] + "..."


def refusal(format: Format, unread: Unread, row: RowDict, options: Options) -> str:
    """What to tell the user of a file with long unread text: the columns, and what to type."""
    names = ", ".join(f"{column} ({example!r})" for column, example in unread.long.items())
    first = next(iter(unread.long))
    sides = answer_columns(tuple(row))
    others = [column for column in (*unread.long, *unread.short) if column != first]
    ignore = ",".join(unread.long)
    if format.guess and sides:
        rest = f" --ignore_columns {','.join(others)}" if others else ""
        return (
            f"no column is known to be the question, and {names} would not be read: if {first} is the question, "
            f"--columns question={first},chosen={sides[0]},rejected={sides[1]}{rest}; if it is nothing, "
            f"--ignore_columns {ignore}"
        )
    question = next((c for c in columns_read(format, row, options) if sides and c not in sides), "QUESTION")
    named = f"question={question},chosen={sides[0]},rejected={sides[1]}" if sides else ""
    ways = [f"if the answers do not depend on it, --ignore_columns {ignore}"]
    if named:
        ways.append(f"if it stands in front of the question, --columns {named},context={first}")
        ways.append(f"if both answers go on from it, --columns {named},prefix={first}")
    return f"text as long as a question would not be read: {names}; {'; '.join(ways)}"
