"""Lists of messages, histories and candidates that were written into a text, as JSON or as Python prints them."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from preference.data.formats.messages import is_message, is_messages

_LIST_COLUMNS = {"images", "videos", "audios", "tools"}
_LITERAL_LIMIT = 1 << 20
_FIRST, _LAST = frozenset("[{a \t\r\n\u3000\u00a0"), frozenset("]}) \t\r\n\u3000\u00a0")  # of a written list
# How Python begins a list of messages or of candidates; JSON that is an answer's own text has other quotes
_OBJECTS = re.compile(r"\s*\[\s*\{\s*'(?:role|content|from|value|text|answer|rank|model|response|annotations)'\s*:")
_PYTHON = re.compile(r"""(?:array\(\s*)?(?:\[\s*)?[\[{]\s*['"]""")
_ARRAY = re.compile(r"array\(\s*(\[.*\])\s*(?:,\s*dtype=object\s*)?\)", re.DOTALL)
# A Python string (or its beginning up to the text's end: nothing is scanned twice), or the place where numpy writes no
# comma between two objects of an array
_STRING_OR_SEAM = re.compile(r"""('(?:[^'\\]|\\.?)*+(?:'|\Z)|"(?:[^"\\]|\\.?)*+(?:"|\Z))|\}\s*\{""", re.DOTALL)


def with_values(row: dict[str, Any]) -> dict[str, Any]:
    """The row itself, or a copy in which texts that are written lists have become lists."""
    found = None
    for column, text in row.items():
        if isinstance(text, str) and text[:1] in _FIRST and text[-1:] in _LAST:
            value = value_of(column, text)
            if value is not text:
                found = (found or {}) | {column: value}
    return row | found if found else row


def value_of(column: str, text: str) -> Any:
    """A list of messages, a message or a history that was written into a text; any other text as it is."""
    stripped = text.strip()
    if stripped[:1] not in ("[", "{") or stripped[-1:] not in ("]", "}"):
        whole = _ARRAY.fullmatch(stripped) if stripped.startswith("array(") else None
        if whole is None:
            return text
        stripped = whole[1]
    value = _parsed(stripped)
    structured = is_messages(value) or is_message(value) or (isinstance(value, list) and _are_scored(value))
    return value if structured or _belongs_in(column, value) else text


def broken_list(row: Mapping[str, Any]) -> str | None:
    """The column that holds what Python wrote for a list of objects, and that could not be parsed."""
    return next((name for name, value in row.items() if isinstance(value, str) and _OBJECTS.match(value)), None)


def _belongs_in(column: str, value: Any) -> bool:
    """Whether the column is one of those that hold such a value; an alpaca `input` of "[3, 1, 2]" is text."""
    if column == "history":
        return isinstance(value, list) and all(isinstance(turn, list) for turn in value)
    if column == "input":
        return isinstance(value, dict) and "messages" in value
    return column in _LIST_COLUMNS and isinstance(value, (list, dict))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if len(text) > _LITERAL_LIMIT:
        return None
    with warnings.catch_warnings():
        for category in (DeprecationWarning, SyntaxWarning):  # what Python thinks of escapes in the data's text
            warnings.simplefilter("ignore", category)
        if not _PYTHON.match(text):
            return None
        try:
            return ast.literal_eval(text)  # tables written by pandas hold Python lists, or numpy's arrays of objects
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
        if not _OBJECTS.match(text):
            return None
        try:
            return ast.literal_eval(_STRING_OR_SEAM.sub(lambda match: match[1] or "}, {", text))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None


def _are_scored(value: list) -> bool:
    """The candidates of a ranked set: Nectar's answers, UltraFeedback's completions."""
    keys = ({"answer", "rank"}, {"response", "annotations"})
    return bool(value) and all(isinstance(item, dict) and any(key <= item.keys() for key in keys) for item in value)
