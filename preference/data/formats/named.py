"""A question and two answers under any of the names of `names`: better_response, worse_response; 优选回答, 拒绝回答."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from preference.data.formats.base import Format, Options, Pair, RowDict, take
from preference.data.formats.messages import is_message, is_messages
from preference.data.formats.names import (
    CONTEXTS,
    HISTORIES,
    INPUTS,
    QUESTIONS,
    SYSTEMS,
    WEAK_QUESTIONS,
    canonical,
    key_of,
    sides_in,
)
from preference.data.formats.trl import pair_of_prompt

_ASKED = ("full_text", "text", "content", "question", "prompt")


@lru_cache(maxsize=1024)
def question_columns(columns: tuple[str, ...], answers: tuple[str, ...]) -> tuple[str, ...]:
    """The columns that may hold the question; those that are called so before those that seldom are."""
    named = {key: column for key, column in canonical(columns).items() if column not in answers}
    strong = [column for key, column in named.items() if key in QUESTIONS]
    weak = [column for key, column in named.items() if key in WEAK_QUESTIONS and key not in SYSTEMS]
    rather = [column for column in weak if key_of(column) not in CONTEXTS | HISTORIES]
    inputs = [column for column in rather if key_of(column) in INPUTS]
    return tuple(strong or [column for column in rather if column not in inputs] or inputs or weak)


def question_of(row: RowDict, answers: tuple[str, ...]) -> Any:
    """The question itself; None where no column holds one."""
    found = question_column(row, answers)
    value = row[found[0]] if found else None
    if isinstance(value, dict) and not is_messages(value):
        return next((value[key] for key in _ASKED if isinstance(value.get(key), str)), value)
    return value


def question_column(row: RowDict, answers: tuple[str, ...]) -> tuple[str, ...]:
    """The column of `question_of`, if there is one."""
    return tuple(c for c in question_columns(tuple(row), answers) if row[c] not in (None, ""))[:1]


@lru_cache(maxsize=1024)
def answer_columns(columns: tuple[str, ...]) -> tuple[str, str] | None:
    return next(iter(sides_in(canonical(columns))), None)


def pairs(row: RowDict, options: Options) -> Iterator[Pair]:
    sides = answer_columns(tuple(row)) or ("chosen", "rejected")
    chosen, rejected = take(row, *sides)
    pair = pair_of_prompt(question_of(row, sides), chosen, rejected)
    pair.prompt = None
    yield pair


def matches(row: RowDict) -> bool:
    sides = answer_columns(tuple(row))
    if sides is None or not all(_is_answer(row[column]) for column in sides):
        return False
    dialogues = all(is_messages(row[column]) and len(row[column]) > 1 for column in sides)
    return dialogues or question_of(row, sides) is not None


def _is_answer(value: Any) -> bool:
    return isinstance(value, str) or is_message(value) or is_messages(value)


def read_by(row: RowDict) -> tuple[str, ...]:
    sides = answer_columns(tuple(row))
    return () if sides is None else (*sides, *question_column(row, sides))


NAMED = Format(
    name="named-sides",
    what="a question and two answers whose columns say which is better (preferred, other; 优选, 拒绝)",
    needs=(),
    also=matches,
    pairs=pairs,
    reads=read_by,
)
