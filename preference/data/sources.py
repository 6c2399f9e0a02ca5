"""Where rows come from: files and folders of them, `save_to_disk` folders, hub ids; each opened by what it is.

`find_sources(paths)` lists the sources, `iter_records(source)` yields `Record` and `Fault`. The contents decide how a
file is read, its extension only whether it is one of a folder's data files.
"""

from __future__ import annotations

import io
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from preference.data.json_records import BOM, Fault, Record, json_layout, json_lines, json_values
from preference.data.report import DataError
from preference.data.table_records import (
    arrow_folder_records,
    csv_delimiter,
    csv_records,
    hub_records,
    is_arrow_folder,
    parquet_records,
    splits_of,
)
from preference.data.written_values import with_values

DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
HEAD = 1 << 16
GZIP = b"\x1f\x8b"
HUB = "hub:"
_SIDE_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_HEADER = re.compile(rb'"?[\w .\-]{1,40}"?(?:[,;\t]"?[\w .\-]{1,40}"?)+\s*')


def find_sources(paths: Sequence[str | Path]) -> list[str]:
    """Every source in `paths`: files and hub ids as given, folders recursively in sorted order.

    Raises DataError for a path that does not exist, a folder without data files, a saved DatasetDict of several splits.
    """
    found: list[str] = []
    for path in paths:
        if str(path).startswith(HUB):
            found.append(str(path))
        elif Path(path).is_dir():
            try:
                inside = _sources_in(Path(path), set())
            except OSError as error:
                raise DataError.at(error.filename or str(path), 0, "unreadable_file", error.strerror or "") from error
            if not inside:
                raise DataError.at(str(path), 0, "empty_folder", f"no {', '.join(DATA_SUFFIXES)} file (or .gz) in it")
            found += inside
        elif Path(path).is_file():
            found.append(str(path))
        elif Path(path).exists():
            raise DataError.at(str(path), 0, "unreadable_file", "neither a file nor a folder (a pipe?)")
        else:
            raise DataError.at(str(path), 0, "not_found", "no such file or folder")
    return list(dict.fromkeys(found))


def _sources_in(folder: Path, seen: set[str]) -> list[str]:
    """The sources below `folder`; links are followed, but no folder is read twice."""
    if (real := os.path.realpath(folder)) in seen:
        return []
    seen.add(real)
    if is_arrow_folder(folder):
        return [str(folder)]
    splits = splits_of(folder)
    if splits is not None:
        if len(splits) != 1:
            choices = ", ".join(str(folder / split) for split in splits)
            raise DataError.at(str(folder), 0, "ambiguous_split", f"a saved DatasetDict: give one of {choices}")
        return _sources_in(folder / splits[0], seen)
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith((".", "__MACOSX")):
            continue
        if entry.is_dir():
            found += _sources_in(folder / entry.name, seen)
        elif entry.is_file() and _is_data_name(entry.name):
            found.append(str(folder / entry.name))
    return found


def _is_data_name(name: str) -> bool:
    return name not in _SIDE_FILES and name.lower().removesuffix(".gz").endswith(DATA_SUFFIXES)


class Position:
    """How far into the file that is being read we are, for a progress bar."""

    def __init__(self) -> None:
        self.raw: BinaryIO | None = None

    def bytes_read(self) -> int:
        return 0 if self.raw is None or self.raw.closed else self.raw.tell()


def iter_records(source: str, position: Position | None = None) -> Iterator[Record | Fault]:
    """The records of one source. What is wrong inside a file is yielded as a Fault in its place, never raised."""
    line = 0
    try:
        for item in _records_of(source, position or Position()):
            line = item.line
            yield Record(line, with_values(item.value)) if isinstance(item, Record) else item
    except (EOFError, zlib.error) as error:
        yield Fault(line + 1, "broken_gzip", f"the compressed stream is damaged: {error}")
    except OSError as error:
        yield Fault(line + 1, "unreadable_file", error.strerror or str(error), whole=True)
    else:
        if not line:
            yield Fault(1, "empty_file", "there is no row in it", whole=True)


def _records_of(source: str, position: Position) -> Iterator[Record | Fault]:
    if source.startswith(HUB):
        return hub_records(source)
    if os.path.isdir(source):
        return arrow_folder_records(source)
    with open_bytes(source) as stream:
        head = _head(stream)
    if head.startswith(b"PAR1"):
        return parquet_records(source)
    refusal = _refused_by_head(head)
    return iter([refusal]) if refusal else _text_records(source, head, position)


def _head(stream: BinaryIO) -> bytes:
    head = b""
    try:
        while len(head) < HEAD and (piece := stream.read1(HEAD - len(head))):
            head += piece
    except (EOFError, zlib.error):
        pass  # raised again, in its place, when the rows are read
    return head


def _text_records(source: str, head: bytes, position: Position) -> Iterator[Record | Fault]:
    with open_bytes(source, position) as stream:
        if _is_csv(source, head):
            yield from csv_records(stream, csv_delimiter(head))
            return
        if head.startswith(BOM):
            stream.read(len(BOM))
        yield from json_values(stream) if json_layout(head) == "values" else json_lines(stream)


def _is_csv(source: str, head: bytes) -> bool:
    text = head.removeprefix(BOM).lstrip()
    if text.startswith((b"{", b"[")) or not text:
        return False
    if source.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        return True
    lines = text.split(b"\n")
    return len(lines) > 1 and _HEADER.fullmatch(lines[0]) is not None and not any(line[:1] == b"{" for line in lines)


def _refused_by_head(head: bytes) -> Fault | None:
    if head.startswith(b"version https://git-lfs"):
        detail = "a Git-LFS pointer, not the data: fetch the file itself with `git lfs pull`"
        return Fault(1, "git_lfs_pointer", detail, whole=True)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Fault(1, "invalid_utf8", "the file is UTF-16: save it as UTF-8", whole=True)
    for magic, name in ((b"PK\x03\x04", "zip"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2")):
        if head.startswith(magic):
            return Fault(1, "unknown_file", f"{name} data: unpack it first", whole=True)
    if head[257:262] == b"ustar":
        return Fault(1, "unknown_file", "a tar archive: unpack it first", whole=True)
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        detail = "Arrow data: give the folder that save_to_disk wrote, not a file of it"
        return Fault(1, "unknown_file", detail, whole=True)
    return None


def open_bytes(path: str, position: Position | None = None) -> BinaryIO:
    """Open for reading bytes, through gzip where the first two bytes say so."""
    raw = open(path, "rb")  # noqa: SIM115  the caller closes it
    if position is not None:
        position.raw = raw
    if raw.peek(2)[:2] != GZIP:
        return raw
    return io.BufferedReader(_Gunzip(raw), HEAD)


class _Gunzip(io.RawIOBase):
    """The text of a gzip file to the last byte that can be had. What is wrong with it is raised behind that byte.

    (gzip.GzipFile raises instead of giving what it has unpacked so far.)
    """

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self._member = zlib.decompressobj(wbits=31)
        self._packed = b""
        self._error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        text = b""
        while not text and self._error is None and not self._at_end():
            self._packed = self._packed or self._raw.read(HEAD)
            before = self._member.copy()
            try:
                if not self._packed:
                    raise EOFError("it ends in the middle")
                text = self._member.decompress(self._packed, len(buffer))
                self._packed = self._member.unconsumed_tail
            except EOFError as error:
                self._error = error
            except zlib.error as error:
                self._error = error
                text = self._in_front_of_fault(before, len(buffer))
        if not text and self._error is not None:
            raise self._error
        buffer[: len(text)] = text
        return len(text)

    def _in_front_of_fault(self, member: Any, limit: int) -> bytes:
        """What zlib had unpacked when it met the fault, and kept to itself."""
        text = b""
        try:
            for byte in self._packed:
                if len(text) < limit:
                    text += member.decompress(bytes([byte]), limit - len(text))
        except zlib.error:
            pass
        return text

    def _at_end(self) -> bool:
        """Whether the file ends here; steps on to the next member (and over zeros that pad the file) where not."""
        if not self._member.eof:
            return False
        self._packed = (self._member.unused_data or self._packed).lstrip(b"\0") or self._raw.read(HEAD).lstrip(b"\0")
        if self._packed:
            self._member = zlib.decompressobj(wbits=31)
        return not self._packed

    def close(self) -> None:
        super().close()
        self._raw.close()
