"""Files of rows, whatever their extension says: JSON lines or arrays, plain or gzip.

`iter_records(source)` yields `Record` and `Fault`; it never raises for what is wrong inside a file.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from preference.data_report import DataError
from preference.json_records import BOM, Fault, Record, json_layout, json_lines, json_values

DATA_SUFFIXES = (".jsonl", ".json", ".ndjson")
HEAD = 1 << 16


def find_files(paths: Sequence[str | Path]) -> list[str]:
    """Every data file of `paths`: files as given, folders recursively in sorted order.

    Raises DataError for a path that does not exist and for a folder without any data file.
    """
    found: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            inside = sorted(str(file) for file in Path(path).rglob("*") if _is_data_file(file, Path(path)))
            if not inside:
                raise DataError.at(str(path), 0, "empty_folder", f"no {', '.join(DATA_SUFFIXES)} file (or .gz) in it")
            found += inside
        elif Path(path).exists():
            found.append(str(path))
        else:
            raise DataError.at(str(path), 0, "not_found", "no such file or folder")
    return found


def _is_data_file(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return not hidden and file.is_file() and file.name.lower().removesuffix(".gz").endswith(DATA_SUFFIXES)


def iter_records(path: str) -> Iterator[Record | Fault]:
    """The records of one file. Faults inside it are yielded in their place."""
    empty = True
    line = 0
    try:
        for item in _records_of(path):
            empty, line = False, item.line
            yield item
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        empty = False
        yield Fault(line + 1, "broken_gzip", f"the compressed stream is damaged: {error}")
    except OSError as error:
        empty = False
        yield Fault(line, "unreadable_file", error.strerror or str(error), whole=True)
    if empty:
        yield Fault(1, "empty_file", "there is no row in it", whole=True)


def _records_of(path: str) -> Iterator[Record | Fault]:
    with open_bytes(path) as stream:
        head = stream.read(HEAD)
    refusal = _refused_by_head(head)
    if refusal:
        yield refusal
        return
    with open_bytes(path) as stream:
        if head.startswith(BOM):
            stream.read(len(BOM))
        yield from json_values(stream) if json_layout(head) == "values" else json_lines(stream)


def _refused_by_head(head: bytes) -> Fault | None:
    if head.startswith(b"version https://git-lfs"):
        detail = "a Git-LFS pointer, not the data: fetch the file itself with `git lfs pull`"
        return Fault(1, "git_lfs_pointer", detail, whole=True)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Fault(1, "invalid_utf8", "the file is UTF-16: save it as UTF-8", whole=True)
    return None


def open_bytes(path: str) -> BinaryIO:
    """Open for reading bytes, through gzip where the first two bytes say so."""
    raw = open(path, "rb")
    magic = raw.peek(2)[:2]
    return io.BufferedReader(gzip.GzipFile(fileobj=raw), CHUNK_GZ) if magic == b"\x1f\x8b" else raw


CHUNK_GZ = 1 << 17
