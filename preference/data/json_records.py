"""JSON records with true line numbers, out of bytes that may be damaged: lines, arrays, concatenated objects.

Lines are split on the byte `\\n` alone: U+2028 and its kin are text. A fault costs its own record: a broken line leaves
the other lines, a broken element of an array leaves those before it and those after the next place where one begins.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

MAX_RECORD_BYTES = 16 << 20  # one row of text; the longest open preference rows are about a thousandth of this
CHUNK = 1 << 17  # bytes read at a time; the price of a fault grows with it, as json counts the lines before it
BOM = codecs.BOM_UTF8


class Record(NamedTuple):
    """One JSON object or table row, and the line where it begins (from 1; the row number in parquet and arrow)."""

    line: int
    value: dict[str, Any]


class Fault(NamedTuple):
    """One record that could not be read. `whole`: it stands for the whole file."""

    line: int
    reason: str
    detail: str
    whole: bool = False


class DuplicateKey(ValueError):
    """An object that gives one key two values: nothing says which is meant."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next((key for key, given in pairs if given != value[key]), None)
        if twice is not None:
            raise DuplicateKey(f"the key {twice[:40]!r} stands twice in one object, with different values")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def too_long(size: int, line: int) -> Fault:
    return Fault(line, "line_too_long", f"more than {size} bytes; the limit is {MAX_RECORD_BYTES} bytes a row")


def as_record(line: int, value: Any) -> Record | Fault:
    if type(value) is dict:  # nearly all
        return Record(line, value)
    if isinstance(value, str) and value.lstrip()[:1] == "{":  # JSON that was written into a string once more
        with contextlib.suppress(ValueError, RecursionError):
            value = _DECODER.decode(value)
    if isinstance(value, dict):
        return Record(line, value)
    return Fault(line, "not_an_object", f"a row must be a JSON object, this is {_json_type(value)}")


def _json_type(value: Any) -> str:
    names = {str: "a string", list: "an array", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


# ---------------------------------------------------------------------------------------------------- lines


def read_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | Fault]]:
    """Number the lines of `stream`. A line over the limit is skipped in pieces and becomes a Fault."""
    line = 0
    while raw := stream.readline(MAX_RECORD_BYTES + 1):
        line += 1
        if len(raw) > MAX_RECORD_BYTES and not raw.endswith(b"\n"):
            while piece := stream.readline(CHUNK):
                if piece.endswith(b"\n"):
                    break
            yield line, too_long(MAX_RECORD_BYTES, line)
        else:
            yield line, raw


def json_lines(stream: BinaryIO) -> Iterator[Record | Fault]:
    for line, raw in read_lines(stream):
        if isinstance(raw, Fault):
            yield raw
        elif (held := raw.strip()) and held != BOM:
            yield parse_line(line, raw)


def parse_line(line: int, raw: bytes) -> Record | Fault:
    """One line of JSON lines. A BOM in front and a carriage return behind are accepted."""
    if b"\0" in raw:
        return Fault(line, "nul_byte", f"a NUL byte at column {raw.index(0) + 1}")
    try:
        text = raw.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        return Fault(line, "invalid_utf8", f"byte 0x{raw[error.start]:02x} at column {error.start + 1} is not UTF-8")
    try:
        return as_record(line, _decoded(text))
    except json.JSONDecodeError as error:
        return Fault(line, "broken_json", f"{error.msg.removesuffix(' at')} at column {error.colno}")
    except RecursionError:
        return Fault(line, "broken_json", "nested too deeply")
    except DuplicateKey as error:
        return Fault(line, "duplicate_key", str(error))
    except ValueError as error:  # an integer of thousands of digits
        return Fault(line, "broken_json", str(error))


# A string, or a comma in front of a bracket that closes, which JavaScript allows and JSON does not
_STRING_OR_COMMA = re.compile(r'"(?:[^"\\]|\\.)*"|,(?=\s*[}\]])', re.DOTALL)


def _decoded(text: str) -> Any:
    """The value of a line; a comma behind it or behind its last element is forgiven."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError:
        if "," not in text:
            raise
        forgiven = without_commas(text.rstrip().removesuffix(","))
        if forgiven == text:
            raise
        try:
            return _DECODER.decode(forgiven)
        except json.JSONDecodeError:
            pass
        raise


def without_commas(text: str) -> str:
    """The text with a space for each comma that stands in front of a closing bracket; its length stays the same."""
    return _STRING_OR_COMMA.sub(lambda match: " " if match[0] == "," else match[0], text)


# ------------------------------------------------------------------------------- arrays, concatenated objects

_GAP = re.compile(r"[\s,\ufeff]*")
_ANOTHER_LIST = re.compile(r'("(?:[^"\\]|\\.)*")\s*:\s*\[\s*\{')
_FIRST_KEY = re.compile(r'\{\s*"((?:[^"\\]|\\.)*)"\s*:')
_STRAY_BYTE = re.compile("[\udc80-\udcff]")
_NEAR_END = 10  # an error this close to the end of the buffer may only mean that more is to come ("-Infinity" is 9)


class _Window:
    """A sliding window of text over a byte stream: `text[pos:]` is not consumed yet, `line` is the line of `pos`."""

    def __init__(self, stream: Any, line: int = 1):
        self.stream = stream
        self.decode = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape").decode
        self.text, self.pos, self.line = "", 0, line
        self.ended = False
        self.stray_bytes = False  # seen anywhere so far; elements are then checked one by one

    def more(self) -> bool:
        """Read at least as much again as is waiting (so that retries stay linear). False at the end of the stream."""
        if self.ended:
            return False
        raw = self.stream.read1(max(CHUNK, len(self.text) - self.pos))  # read() would lose what comes before a fault
        self.ended = not raw
        new = self.decode(raw, final=self.ended)
        self.stray_bytes = self.stray_bytes or (not new.isascii() and _STRAY_BYTE.search(new) is not None)
        self.text, self.pos = self.text[self.pos :] + new, 0
        return not self.ended

    def advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.pos, to)
        self.pos = to

    def skip_gap(self) -> bool:
        """Step over white space and commas. False when nothing is left."""
        while True:
            gap = _GAP.match(self.text, self.pos)  # may be empty, and so is always there
            self.advance(gap.end() if gap else self.pos)
            if self.pos < len(self.text):
                return True
            if not self.more() and self.pos == len(self.text):
                return False


def json_values(stream: BinaryIO, line: int = 1, wrapped: bool = False) -> Iterator[Record | Fault]:
    """The elements of a JSON array (of any layout), or of objects written one behind the other.

    `wrapped`: the array stands in an object, and the stream at its beginning, in this line; it ends where that closes.
    """
    window = _Window(stream, line)
    decode = _DECODER.raw_decode
    inside = False  # between [ and ]
    first_key: str | None = None
    last: Record | Fault | None = None
    while window.skip_gap():
        opener = window.text[window.pos]
        if opener == ("]" if inside else "["):
            inside = not inside
            window.advance(window.pos + 1)
            if wrapped and not inside:
                for match in _ANOTHER_LIST.finditer(window.text, window.pos):
                    yield Fault(
                        window.line, "other_list", f"the list under {match[1][:40]} beside the rows is not read"
                    )
                return
            continue
        line = window.line
        outcome = _next_value(window, decode)
        if isinstance(outcome, _Broken):
            last = Fault(line, outcome.reason, outcome.detail)
            _resynchronise(window, outcome.at, first_key)
        else:
            last = outcome if isinstance(outcome, Fault) else as_record(line, outcome)
            if isinstance(last, Record) and last.value:
                first_key = next(iter(last.value))
        yield last
    if inside and not isinstance(last, Fault):
        yield Fault(window.line, "broken_json", "the array is not closed: the file has been cut off")


class _Broken(NamedTuple):
    at: int  # where in the window the search for the next element begins
    reason: str
    detail: str


def _next_value(window: _Window, decode: Any) -> Any:
    """The value at the window's position, consumed; or `_Broken`, not consumed; or a Fault for bad bytes in it."""
    twice: DuplicateKey | None = None
    while True:
        start = window.pos
        try:
            value, end = decode(window.text, start)
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated string") or error.pos >= len(window.text) - _NEAR_END
            if cut and not window.ended:
                if len(window.text) - start > MAX_RECORD_BYTES:
                    return _Broken(len(window.text), "line_too_long", too_long(MAX_RECORD_BYTES, 0).detail)
                window.more()
                continue
            if _closes_behind_comma(window.text, error.pos) and (found := _forgiven(window)) is not None:
                value, end = found
                window.advance(end)
                return value
            line = window.line + window.text.count("\n", start, error.pos)
            reason = "nul_byte" if window.text[error.pos : error.pos + 1] == "\0" else "broken_json"
            return _Broken(max(error.pos, start + 1), reason, f"{error.msg.removesuffix(' at')} at line {line}")
        except RecursionError:
            newline = window.text.find("\n", start)
            return _Broken(newline if newline > 0 else len(window.text), "broken_json", "nested too deeply")
        except DuplicateKey as error:  # once more without looking for them, to find the value's end
            twice, decode = error, json.JSONDecoder().raw_decode
            continue
        except ValueError as error:  # an integer of thousands of digits
            return _Broken(start + 1, "broken_json", str(error))
        if not isinstance(value, dict) and end == len(window.text) and not window.ended:
            window.more()
            continue  # 12 may be the beginning of 123
        stray = _STRAY_BYTE.search(window.text, start, end) if window.stray_bytes else None
        line = window.line
        window.advance(end)
        if twice:
            return Fault(line, "duplicate_key", str(twice))
        if stray:
            return Fault(line, "invalid_utf8", f"byte 0x{ord(stray.group()) - 0xDC00:02x} is not UTF-8")
        return value


def _closes_behind_comma(text: str, at: int) -> bool:
    """Whether a bracket closes behind a comma, at `at` or, where newer versions of json point at the comma, next."""
    if text[at : at + 1] == ",":
        return text[at + 1 : at + 100].lstrip()[:1] in ("}", "]")
    return text[at : at + 1] in ("}", "]") and text[max(0, at - 100) : at].rstrip().endswith(",")


def _forgiven(window: _Window) -> tuple[Any, int] | None:
    """(value, its end) at the window's position if it can be read without the commas in front of closing brackets."""
    size = 4096
    while True:
        piece = without_commas(window.text[window.pos : window.pos + size])
        try:
            value, end = _DECODER.raw_decode(piece)
            return value, window.pos + end
        except json.JSONDecodeError as error:
            if not (error.msg.startswith("Unterminated string") or error.pos >= len(piece) - _NEAR_END):
                return None  # broken in another way
        except (ValueError, RecursionError):
            return None
        if window.pos + size < len(window.text):
            size *= 4
        elif len(window.text) - window.pos > MAX_RECORD_BYTES or not window.more():
            return None


def _resynchronise(window: _Window, at: int, first_key: str | None) -> None:
    """Move on from a broken element to the next place, at or behind `at`, that looks like the beginning of one."""
    if first_key is None and (match := _FIRST_KEY.match(window.text, window.pos)):
        first_key = match.group(1)
    line_start = window.text.rfind("\n", 0, window.pos) + 1
    indent = window.text[line_start : window.pos]
    choices = []
    if first_key is not None:
        choices.append(r'(?=\{\s*"' + re.escape(first_key) + r'"\s*:)')
    if not indent.strip() and (line_start or window.line == 1):
        choices.append(r"\n" + indent + r"(?=\{)")  # the next object at the same indentation, whatever its keys
        at = max(window.pos + 1, at - len(indent) - 1)
    beginning = re.compile("|".join(choices) or r"\n\s*(?=\{)")
    window.advance(min(at, len(window.text)))
    while True:
        if match := beginning.search(window.text, window.pos):
            window.advance(match.end())
            return
        keep = min(len(window.text) - window.pos, 4096)  # a beginning may straddle two reads
        window.advance(len(window.text) - keep)
        if not window.more():
            window.advance(len(window.text))
            return


# ---------------------------------------------------------------------------------------------- which of them


def json_layout(head: bytes) -> str:
    """'values' for an array or for objects spread over several lines, 'lines' otherwise; judged by the first bytes."""
    text = head.removeprefix(BOM).lstrip()
    if text.startswith(b"["):
        return "values"
    lines = text.split(b"\n")
    if not text.startswith(b"{"):
        return "lines"
    opening = lines[0].rstrip().decode(errors="replace")
    try:
        json.loads(opening)
    except json.JSONDecodeError as error:
        unfinished = error.pos >= len(opening) and not error.msg.startswith("Unterminated")
        another = error.msg == "Extra data" and opening[error.pos :].lstrip(", \t").startswith("{")
        one_a_line = any(line.startswith(b"{") and isinstance(parse_line(0, line), Record) for line in lines[1:-1])
        return "values" if (unfinished or another) and not one_a_line else "lines"
    except (RecursionError, ValueError):
        return "lines"
    return "lines"
