"""Columns beside the question that belong in front of the answer: system texts, history, context, input, options.

Every format's pairs pass through `complete`, so that none of them has to know these columns, and none drops them.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from preference.data.formats.base import Drop, Pair, RowDict
from preference.data.formats.messages import is_messages
from preference.data.formats.names import CONTEXTS, HISTORIES, INPUTS, OPTIONS, SYSTEMS, key_of

_KINDS = (("system", SYSTEMS), ("history", HISTORIES), ("context", CONTEXTS), ("input", INPUTS), ("options", OPTIONS))


@lru_cache(maxsize=1024)
def columns_beside(columns: tuple[str, ...], read: frozenset[str]) -> tuple[tuple[str, str], ...]:
    """(column, kind) of those among `columns` that go in front of the answer and that the format does not read."""
    found = [(column, kind) for column in columns if column not in read and (kind := kind_of(column))]
    order = [kind for kind, _ in _KINDS]
    return tuple(sorted(found, key=lambda entry: order.index(entry[1])))


def kind_of(column: str) -> str | None:
    key = key_of(column)
    return next((kind for kind, names in _KINDS if key in names), None)


def complete(pair: Pair, row: RowDict, beside: Iterable[tuple[str, str]]) -> None:
    """Put into `pair` what the columns `beside` hold. Raises Drop for two system texts and for what is not text."""
    for column, kind in beside:
        value = row[column]
        if value is None or value == "" or value == [] or value == {}:
            continue
        if kind == "system":
            _system(pair, column, value)
        elif kind == "history" or is_messages(value):
            _history(pair, column, value)
        elif isinstance(pair.question, str) or isinstance(pair.prompt, str):
            _question(pair, kind, _text(value, column, kind))


def _system(pair: Pair, column: str, value: Any) -> None:
    text = value if isinstance(value, str) else _text(value, column, "system")
    if not text.strip():
        return
    if isinstance(pair.system, str) and pair.system.strip() and pair.system.strip() != text.strip():
        raise Drop("two_systems", f"{column} holds another system text than the dialogue")
    if pair.prompt is not None and not pair.system:
        pair.question, pair.prompt = pair.prompt, None  # what is used as it stands has no place for it
    pair.system = text


def _history(pair: Pair, column: str, value: Any) -> None:
    if isinstance(value, str):
        if value.strip() and value.strip() not in _said(pair):
            _question(pair, "context", value)
        return
    if pair.history and pair.history != value:
        if _leaves(value) <= _leaves(pair.history) | {str(pair.question).strip()}:
            return
        raise Drop("wrong_type", f"{column} holds another history than the dialogue")
    if pair.prompt is not None:
        pair.question, pair.prompt = pair.prompt, None
    pair.history = value


def _question(pair: Pair, kind: str, text: str) -> None:
    question = pair.question if pair.prompt is None else pair.prompt
    if not isinstance(question, str) or not text.strip() or text.strip() in question:
        return  # a row without a question is dropped as one
    in_front = kind == "context"
    joined = f"{text.strip()}\n\n{question}" if in_front else f"{question}\n{text}"
    pair.question, pair.prompt = joined, None


def _text(value: Any, column: str, kind: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and value and all(isinstance(item, (str, int, float)) for item in value.values()):
        return "\n".join(f"{name}. {item}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        items = [item.get("text") if isinstance(item, Mapping) else item for item in value]
        if all(isinstance(item, (str, int, float)) for item in items):
            if kind == "options" and len(items) <= len(string.ascii_uppercase):
                return "\n".join(f"{name}. {item}" for name, item in zip(string.ascii_uppercase, items, strict=False))
            return "\n\n".join(map(str, items))
    raise Drop("wrong_type", f"{column} must be text, not {type(value).__name__}")


def _said(pair: Pair) -> str:
    return "\n".join([str(pair.question or pair.prompt), *_leaves(pair.history)])


def _leaves(value: Any) -> set[str]:
    """The texts inside lists and messages."""
    if isinstance(value, str):
        return {value.strip()}
    if isinstance(value, Mapping):
        return set().union(*(_leaves(item) for key, item in value.items() if key not in ("role", "from", "type")))
    if isinstance(value, (list, tuple)):
        return set().union(*map(_leaves, value))
    return set()
