"""JSON files that are not rows one behind the other: rows inside of one object, and tables as pandas writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from preference.data.formats.messages import is_message, is_messages
from preference.data.formats.names import HISTORIES, QUESTIONS, SYSTEMS, WEAK_QUESTIONS, key_of
from preference.data.json_records import BOM, Fault, Record, as_record

MAX_TABLE_BYTES = 256 << 20  # such a table is read as a whole, at about six times its size in memory
_ROWS = {
    "data",
    "train",
    "rows",
    "examples",
    "instances",
    "items",
    "records",
    "samples",
    "dataset",
    "pairs",
    "preferences",
}
_DECODER = json.JSONDecoder()
_GAP = re.compile(r"\s*")
_KEY = r'"(?:[^"\\]|\\.)*"'
# What pandas writes: columns of {index: value}, rows of {column: value} under their index, orient="split"; plain lists
_TABLE = re.compile(
    rf'\{{\s*(?:{_KEY}\s*:\s*\{{\s*"\d+"\s*:|"\d+"\s*:\s*\{{|"columns"\s*:\s*\[|{_KEY}\s*:\s*\[\s*")', re.DOTALL
)


def rows_inside(head: bytes) -> int | None:
    """Where the list begins, in bytes, whose objects are the rows of {"version": ..., "data": [{...}, ...]}.

    None where the file does not begin with such an object, or its list begins behind `head`; and where the object has
    a question or a system text of its own: then it is a row, and the list a part of it.
    """
    text = head.decode("utf-8", "surrogateescape")
    at = _skip_gap(text, 1 if text.startswith("\ufeff") else 0)
    if text[at : at + 1] != "{" or _has_a_second_object(text):
        return None
    if _is_a_row(text, at):
        return None
    at += 1
    try:
        while True:
            key, at = _DECODER.raw_decode(text, _skip_gap(text, at))
            at = _skip_gap(text, at)
            if text[at] != ":":
                return None
            at = _skip_gap(text, at + 1)
            if text[at] == "[" and str(key).lower() in _ROWS and _is_list_of_rows(text, at):
                return len(text[:at].encode("utf-8", "surrogateescape"))
            _, at = _DECODER.raw_decode(text, at)
            at = _skip_gap(text, at)
            if text[at] != ",":
                return None
            at += 1
    except (ValueError, IndexError, RecursionError):
        return None


def _is_a_row(text: str, at: int) -> bool:
    """Whether the object at `at`, if `text` holds all of it, asks something itself."""
    try:
        value, _ = _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return False  # longer than the head: no row is
    asking = QUESTIONS | WEAK_QUESTIONS | SYSTEMS | HISTORIES
    return any(key_of(key) in asking for key, inside in value.items() if isinstance(inside, str) or is_messages(inside))


def _skip_gap(text: str, at: int) -> int:
    match = _GAP.match(text, at)
    return match.end() if match else at


def _has_a_second_object(text: str) -> bool:
    """Whether the first line is an object of its own, as in JSON lines."""
    first, newline, rest = text.lstrip("\ufeff").lstrip().partition("\n")
    return bool(newline) and first.rstrip().endswith("}") and rest.lstrip()[:1] == "{"


def _is_list_of_rows(text: str, at: int) -> bool:
    at = _skip_gap(text, at + 1)
    if text[at : at + 1] != "{":
        return False
    try:
        return not is_message(_DECODER.raw_decode(text, at)[0])
    except ValueError:
        return True  # the first row is longer than the head


def looks_like_table(head: bytes) -> bool:
    """Whether one object may hold a whole table (rows of JSON lines whose first value is a list do so too)."""
    text = head.removeprefix(BOM).decode("utf-8", "replace").lstrip()
    if not _TABLE.match(text) or _has_a_second_object(text):
        return False
    try:
        _, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return not any(_is_object(line) for line in text.split("\n")[1:-1])
    return not text[end:].strip()


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def table_rows(stream: BinaryIO) -> Iterator[Record | Fault]:
    """The rows, numbered from 1, of a table that is one object; the object itself where it is no table."""
    raw = stream.read(MAX_TABLE_BYTES + 1)
    if len(raw) > MAX_TABLE_BYTES:
        detail = f"one object of more than {MAX_TABLE_BYTES >> 20} MiB: save it one row a line, with pandas "
        yield Fault(1, "line_too_long", detail + "df.to_json(FILE, orient='records', lines=True)", whole=True)
        return
    try:
        value = json.loads(raw.removeprefix(BOM).decode())
    except UnicodeDecodeError as error:
        yield Fault(1, "invalid_utf8", f"byte 0x{raw[error.start]:02x} is not UTF-8", whole=True)
        return
    except (ValueError, RecursionError) as error:
        yield Fault(1, "broken_json", str(error), whole=True)
        return
    rows = _rows_of_table(value)
    if rows is None:
        yield as_record(1, value)
        return
    for number, row in enumerate(rows, 1):
        yield as_record(number, row)


def _rows_of_table(value: Any) -> list[Any] | None:
    if not isinstance(value, dict) or not value:
        return None
    columns = value.get("columns")
    if isinstance(columns, list) and isinstance(value.get("data"), list):
        whole = all(isinstance(row, list) and len(row) == len(columns) for row in value["data"])
        return [dict(zip(columns, row, strict=True)) for row in value["data"]] if whole else None
    inside = list(value.values())
    if all(isinstance(column, dict) for column in inside):
        if all(str(key).isdigit() for key in value):
            return inside
        if inside[0] and all(column.keys() == inside[0].keys() for column in inside):
            return [{name: column[key] for name, column in value.items()} for key in inside[0]]
    if all(isinstance(column, list) for column in inside):
        length = len(inside[0])
        if len(inside) > 2 and length > 1 and all(len(column) == length for column in inside):
            return [dict(zip(value, row, strict=True)) for row in zip(*inside, strict=True)]
    return None
