"""Rows of tables as records: CSV, parquet, `datasets` folders (save_to_disk) and the dataset hub."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from preference.data.json_records import BOM, MAX_RECORD_BYTES, Fault, Record, read_lines, too_long
from preference.data.report import DataError
from preference.data.splits import choose, name_of
from preference.data.written_values import broken_list, value_of

BATCH_ROWS = 64
BOMB_BYTES, BOMB_RATIO = 4 << 20, 100  # a row group that unpacks to more, and so many times its size, is no text
BOMB_ROWS = 100_000
SEPARATOR_LINE = re.compile(rb'"?sep=([,;\t|])"?\s*(?:\r?\n|\Z)')
_STRAY_BYTE = re.compile("[\udc80-\udcff]")
# ------------------------------------------------------------------------------------------------------- CSV


class _LineFault(Exception):
    def __init__(self, fault: Fault):
        self.fault = fault


class _Lines:
    """Text lines for csv.reader that can be stepped back to the line behind the beginning of a broken record."""

    def __init__(self, stream: BinaryIO):
        self.source = read_lines(stream)
        self.again: list[tuple[int, str]] = []
        self.record: list[tuple[int, str]] = []  # the lines of the record that is being read

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self.again:
            entry = self.again.pop()
        else:
            line, raw = next(self.source)
            if isinstance(raw, Fault):
                raise _LineFault(raw)
            entry = line, (raw.removeprefix(BOM) if line == 1 else raw).decode("utf-8", "surrogateescape")
        self.record.append(entry)
        return entry[1]

    def step_back(self) -> None:
        self.again += reversed(self.record[1:])


def csv_delimiter(head: bytes) -> str:
    """What stands between the columns: what a first line `sep=;` says, which Excel reads, or else the most frequent."""
    if match := SEPARATOR_LINE.match(head.removeprefix(BOM)):
        return match[1].decode()
    first = head.split(b"\n", 1)[0]
    return max(",;\t", key=lambda char: first.count(char.encode()))


def csv_records(stream: BinaryIO, delimiter: str) -> Iterator[Record | Fault]:
    """Rows under a header line. A cell may hold newlines; a broken row costs its own lines only."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines = _Lines(stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        lines.record = []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except _LineFault as error:
            yield error.fault
            continue
        except csv.Error as error:
            line = lines.record[0][0] if lines.record else 1
            lines.step_back()
            yield Fault(line, "broken_csv", str(error))
            if header is None:
                return
            continue
        if not any(cells) or (header is None and _says_separator(lines.record[0][1])):
            continue
        line = lines.record[0][0]
        if header is None:
            header = [name.strip() for name in cells]
            if len(set(header)) < len(header):
                yield Fault(line, "broken_csv", "two columns have the same name", whole=True)
                return
            continue
        yield _csv_record(line, header, cells)


def _says_separator(line: str) -> bool:
    return SEPARATOR_LINE.match(line.encode("utf-8", "surrogateescape")) is not None


def _csv_record(line: int, header: list[str], cells: list[str]) -> Record | Fault:
    if len(cells) != len(header):
        return Fault(line, "broken_csv", f"{len(cells)} cells under {len(header)} columns")
    if any(not cell.isascii() and _STRAY_BYTE.search(cell) for cell in cells):
        return Fault(line, "invalid_utf8", "a byte that is not UTF-8")
    row = {name: value_of(name, cell) for name, cell in zip(header, cells, strict=True)}
    if broken := broken_list(row):
        return Fault(line, "broken_csv", f"the list of objects in column {broken[:40]!r} cannot be parsed")
    return Record(line, row)


# --------------------------------------------------------------------------------------- parquet, arrow folders


def parquet_records(path: str, stream: BinaryIO | None = None) -> Iterator[Record | Fault]:
    """The rows of a parquet file, numbered from 1; `stream`: its bytes, where the file is packed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(stream or path) as table:
            if bomb := _bomb(table.metadata):
                yield Fault(1, "unpacks_too_far", bomb, whole=True)
                return
            for batch in table.iter_batches(batch_size=BATCH_ROWS):
                yield from _numbered(batch, row)
                row += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last for the names of columns
        yield Fault(row + 1, "broken_parquet", _first_line(error))


def _bomb(metadata: Any) -> str:
    """What is wrong with a table that unpacks to far more than any text does; "" for any other."""
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        packed = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        unpacked, rows = group.total_byte_size, group.num_rows
        if unpacked > BOMB_BYTES and unpacked > BOMB_RATIO * packed:
            return f"{packed} bytes of it unpack to {unpacked}, which no text does"
        if rows > BOMB_ROWS and rows > 10 * unpacked:
            return f"{rows} rows in {unpacked} bytes: they cannot differ from each other"
    return ""


def arrow_folder_records(folder: str) -> Iterator[Record | Fault]:
    """The rows of a folder that `Dataset.save_to_disk` wrote, numbered from 1."""
    import pyarrow as pa

    row = 0
    try:
        state = json.loads((Path(folder) / "state.json").read_bytes())
        for file in [entry["filename"] for entry in state["_data_files"]]:
            with pa.memory_map(str(Path(folder) / file)) as source:
                for batch in pa.ipc.open_stream(source):
                    for start in range(0, batch.num_rows, BATCH_ROWS):
                        part = batch.slice(start, BATCH_ROWS)
                        yield from _numbered(part, row)
                        row += part.num_rows
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        yield Fault(row + 1, "broken_arrow", _first_line(error))


def _numbered(batch: Any, before: int) -> Iterator[Record | Fault]:
    if batch.nbytes > MAX_RECORD_BYTES and batch.num_rows > 1:  # one of them may be over the limit of a row
        for i in range(batch.num_rows):
            yield from _numbered(batch.slice(i, 1), before + i)
        return
    if batch.nbytes > MAX_RECORD_BYTES:
        yield too_long(MAX_RECORD_BYTES, before + 1)
        return
    try:
        for number, value in enumerate(batch.to_pylist(), before + 1):
            yield Record(number, value)
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield Record(before + i + 1, batch.slice(i, 1).to_pylist()[0])
            except UnicodeDecodeError:
                yield Fault(before + i + 1, "invalid_utf8", "text that is not UTF-8")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_arrow_folder(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def splits_of(folder: Path) -> list[str] | None:
    """The splits of a saved DatasetDict, or None if the folder is none."""
    try:
        splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [str(split) for split in splits]


# ------------------------------------------------------------------------------------------------------- the hub


def hub_records(source: str) -> Iterator[Record | Fault]:
    """The rows of `hub:owner/name[:config[:split]]`, streamed, numbered from 1. Raises DataError if it is not there."""
    name, config, split = [*source.removeprefix("hub:").split(":"), "", ""][:3]
    for number, value in enumerate(_hub_rows(source, name, config or None, split or None), 1):
        yield Record(number, value)


def _hub_rows(source: str, name: str, config: str | None, split: str | None) -> Iterable[dict[str, Any]]:
    from datasets import IterableDatasetDict, load_dataset

    try:
        loaded = load_dataset(name, config, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError.at(source, 0, "hub_error", f"{type(error).__name__}: {_first_line(error)}") from error
    if not isinstance(loaded, IterableDatasetDict):
        return loaded
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    names = [(str(split), str(split)) for split in loaded]
    training = [split for split, _ in names if name_of(split).kind]
    chosen = choose(source, names, "train").read if training else []
    if len(chosen) != 1:
        choices = ", ".join(f"hub:{name}:{config or ''}:{split}" for split in loaded)
        raise DataError.at(source, 0, "ambiguous_split", f"say which split: {choices}")
    return loaded[chosen[0]]
