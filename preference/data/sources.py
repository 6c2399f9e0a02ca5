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
from dataclasses import replace
from pathlib import Path
from typing import Any

from preference.data.json_records import BOM, Fault, Record, json_layout, json_lines, json_values
from preference.data.json_shapes import looks_like_table, rows_inside, table_rows
from preference.data.packed import HEAD, MEMBER, PACKED_SUFFIXES, Damaged, Position, members_of, open_bytes
from preference.data.report import DataError, DataReport
from preference.data.splits import Chosen, choose, name_of
from preference.data.table_records import (
    SEPARATOR_LINE,
    arrow_folder_records,
    csv_delimiter,
    csv_records,
    hub_records,
    is_arrow_folder,
    parquet_records,
    splits_of,
)
from preference.data.unreadable import refusal
from preference.data.written import is_own_file, is_own_folder
from preference.data.written_values import with_values

DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
HUB = "hub:"
_SIDE_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_HEADER = re.compile(rb'"?[\w .\-]{1,40}"?(?:[,;\t]"?[\w .\-]{1,40}"?)+\s*')


def find_sources(paths: Sequence[str | Path], purpose: str = "train", report: DataReport | None = None) -> list[str]:
    """Every source in `paths` that is read for a purpose (train, evaluate, convert), see `find`.

    What stands in a folder and is not read becomes a warning of the report.
    """
    found: list[str] = []
    for path in paths:
        chosen = find(str(path), purpose, report)
        found += chosen.read
        if report is not None and (chosen.left or chosen.evaluation):
            report.warn(said(str(path), replace(chosen, evaluation=[], left=chosen.evaluation + chosen.left)))
    return list(dict.fromkeys(found))


def find(path: str, purpose: str, report: DataReport | None = None) -> Chosen:
    """The sources of a path: a hub id or file itself, of folders (recursively, sorted) and archives those of a split.

    What a folder holds besides its data becomes a warning of the report, one for each thing that it is.

    Raises DataError for a path that does not exist, a folder without data files, splits that nothing tells apart.
    """
    if path.startswith(HUB):
        return Chosen([path])
    try:
        if Path(path).is_dir():
            folder = _Folder(Path(path))
            inside = folder.sources() or _members_in(Path(path))
            folder.say(report)
        elif Path(path).is_file():
            members = members_of(path)
            if members is None:
                return Chosen([path])
            inside = _data_members(path, members)
        elif Path(path).exists() or MEMBER in path:
            if MEMBER in path and Path(path.partition(MEMBER)[0]).is_file():
                return Chosen([path])
            raise DataError.at(path, 0, "unreadable_file", "neither a file nor a folder (a pipe?)")
        else:
            raise DataError.at(path, 0, "not_found", "no such file or folder")
    except OSError as error:
        raise DataError.at(error.filename or path, 0, "unreadable_file", error.strerror or "") from error
    if not inside:
        raise DataError.at(
            path, 0, "empty_folder", f"no {', '.join(DATA_SUFFIXES)} file (or .gz, .bz2, .xz, .zst) in it"
        )
    return choose(path, [(source, source[len(path) :].lstrip("!/")) for source in inside], purpose)


def said(path: str, chosen: Chosen) -> str:
    """What of a folder is read and what is not, for the user."""
    evaluates = f", of the split that evaluates {_names(chosen.evaluation)}" if chosen.evaluation else ""
    left = f"; not read: {_names(chosen.left)}" if chosen.left else ""
    return f"{path} has splits: read is {_names(chosen.read)}{evaluates}{left}"


def _names(paths: list[str]) -> str:
    shown = ", ".join(os.path.basename(path.rstrip("/")) for path in paths[:3])
    return shown + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _members_in(folder: Path) -> list[str]:
    """The data in the archives of a folder (that holds no other data)."""
    found = []
    for path in sorted(str(path) for path in folder.rglob("*") if path.is_file() and _is_archive_name(path.name)):
        members = members_of(path)
        found += [path] if members is None else _data_members(path, members)
    return found


def _data_members(path: str, members: list[str]) -> list[str]:
    hidden = (".", "__MACOSX")
    seen = [name for name in members if not any(part.startswith(hidden) for part in name.split("/"))]
    data = seen if len(seen) == 1 else [name for name in seen if _is_data_name(os.path.basename(name))]
    return [f"{path}{MEMBER}{name}" for name in data]


def _is_archive_name(name: str) -> bool:
    return _plain_name(name).endswith((".zip", ".tar", ".tgz"))


_OTHERS = "files that are not read, by their names no data"
_OWN = "files and folders that are not read, as a run, a report or a model left them there"
_NO_FILES = "entries that are not read, neither files nor folders (pipes, links to nothing)"
_HIDDEN = "hidden entries that are not read"


class _Folder:
    """The walk through a folder: its data, and what is passed over, by why it is."""

    def __init__(self, root: Path):
        self.root = root
        self.passed: dict[str, list[str]] = {}
        self.seen: set[str] = set()

    def say(self, report: DataReport | None) -> None:
        if report is None:
            return
        for why, names in self.passed.items():
            report.warn(f"{self.root}: {len(names)} {why}: {', '.join(names[:3])}" + ", ..." * (len(names) > 3))

    def sources(self, folder: Path | None = None) -> list[str]:
        """The sources below `folder` (the root); links are followed, but no folder is read twice."""
        folder = folder or self.root
        if (real := os.path.realpath(folder)) in self.seen:
            return []
        self.seen.add(real)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        names = {entry.name for entry in entries}
        if folder != self.root and is_own_folder(names):
            return self._pass(folder, _OWN)
        if is_arrow_folder(folder):
            return [str(folder)]
        splits = splits_of(folder)
        if splits is not None:
            if len(splits) > 1 and not all(name_of(split).kind for split in splits):
                choices = ", ".join(str(folder / split) for split in splits)
                raise DataError.at(str(folder), 0, "ambiguous_split", f"a saved DatasetDict: give one of {choices}")
            return [source for split in splits for source in self.sources(folder / split)]
        return [source for entry in entries for source in self._entry(entry, folder / entry.name, names)]

    def _entry(self, entry: os.DirEntry[str], path: Path, names: set[str]) -> list[str]:
        if entry.name.startswith((".", "__MACOSX")):
            return self._pass(path, _HIDDEN)
        if entry.is_dir():
            return self.sources(path)
        if not entry.is_file():
            return self._pass(path, _NO_FILES)
        if not _is_data_name(entry.name):
            return self._pass(path, _OTHERS)
        return self._pass(path, _OWN) if is_own_file(path, names) else [str(path)]

    def _pass(self, path: Path, why: str) -> list[str]:
        self.passed.setdefault(why, []).append(os.path.relpath(path, self.root))
        return []


def _is_data_name(name: str) -> bool:
    return os.path.basename(name) not in _SIDE_FILES and _plain_name(name).endswith(DATA_SUFFIXES)


def _plain_name(name: str) -> str:
    """The name in small letters, without the ending of a compression."""
    name = name.lower()
    return next((name.removesuffix(ending) for ending in PACKED_SUFFIXES if name.endswith(ending)), name)


def iter_records(
    source: str, position: Position | None = None, encoding: str | None = None
) -> Iterator[Record | Fault]:
    """The records of one source. What is wrong inside a file is yielded as a Fault in its place, never raised.

    `encoding`: of text that is not UTF-8.
    """
    line = 0
    try:
        for item in _records_of(source, position or Position(), encoding):
            line = item.line
            if isinstance(item, Record) and (value := with_values(item.value)) is not item.value:
                item = Record(line, value)
            yield item
    except (EOFError, zlib.error) as error:
        yield Fault(line + 1, "broken_gzip", f"the compressed stream is damaged: {error}")
    except Damaged as error:
        yield Fault(line + 1, "broken_archive", f"the packed data is damaged: {error}")
    except OSError as error:
        yield Fault(line + 1, "unreadable_file", error.strerror or str(error), whole=True)
    else:
        if not line:
            yield Fault(1, "empty_file", "there is no row in it", whole=True)


def _records_of(source: str, position: Position, encoding: str | None) -> Iterator[Record | Fault]:
    if source.startswith(HUB):
        return hub_records(source)
    if os.path.isdir(source):
        return arrow_folder_records(source)
    with open_bytes(source, encoding=encoding) as stream:
        head = _head(stream)
        if head.startswith(b"PAR1"):
            packed = MEMBER in source or not _begins_as_parquet(source)
            return parquet_records(source, stream=io.BytesIO(head + stream.read()) if packed else None)
    refused = refusal(head)
    return iter([refused]) if refused else _text_records(source, head, position, encoding)


def _begins_as_parquet(path: str) -> bool:
    with open(path, "rb") as raw:
        return raw.read(4) == b"PAR1"


def _head(stream: Any) -> bytes:
    head = b""
    try:
        while len(head) < HEAD and (piece := stream.read1(HEAD - len(head))):
            head += piece
    except (EOFError, zlib.error, Damaged):
        pass  # raised again, in its place, when the rows are read
    return head


def _text_records(source: str, head: bytes, position: Position, encoding: str | None) -> Iterator[Record | Fault]:
    with open_bytes(source, position, encoding) as stream:
        if _is_csv(source, head):
            yield from csv_records(stream, csv_delimiter(head))
            return
        if (start := rows_inside(head)) is not None:
            line = 1 + stream.read(start).count(b"\n")
            yield from json_values(stream, line, wrapped=True)
            return
        if looks_like_table(head):
            yield from table_rows(stream)
            return
        if head.startswith(BOM):
            stream.read(len(BOM))
        yield from json_values(stream) if json_layout(head) == "values" else json_lines(stream)


def _is_csv(source: str, head: bytes) -> bool:
    text = head.removeprefix(BOM).lstrip()
    if text.startswith((b"{", b"[", b'"{')) or not text:
        return False
    if _plain_name(source).endswith((".csv", ".tsv")) or SEPARATOR_LINE.match(text):
        return True
    lines = text.split(b"\n")
    return len(lines) > 1 and _HEADER.fullmatch(lines[0]) is not None and not any(line[:1] == b"{" for line in lines)
