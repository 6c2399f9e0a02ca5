"""Rows that were read and are wanted again: in memory while they are few, in a nameless file on the disk from then on.

A run has to know all of its rows before it can split, sample and tokenize them. Each takes 8 bytes of memory here.
"""

from __future__ import annotations

import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import overload

from preference.data.row import Row

IN_MEMORY = 32 << 20  # bytes of rows, before they go to the disk
_AT_ONCE = 1 << 18  # bytes that are read of the file in one go: rows are mostly wanted in their order
_fields = attrgetter(*Row.__slots__)  # in the order in which a row is made


class KeptRows(Sequence[Row]):
    """A sequence of rows that holds their text in a file, which the system removes with the process.

    Args:
        rows: what to keep; more may follow with `append`.
        folder: where the file lies once there is one; None: the system's folder for temporary files.

    Slices and `take` share the file. Reading raises OSError where the disk fails, adding where it is full.
    """

    def __init__(self, rows: Iterable[Row] = (), folder: Path | None = None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        place = None if folder is None else str(folder)
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, buffering=_AT_ONCE, dir=place)  # noqa: SIM115
        self._starts = array("Q", [0])  # of each row in the file, and the file's end
        self._places: Sequence[int] | None = None  # which rows of the file these are; None: all
        for row in rows:
            self.append(row)

    def append(self, row: Row) -> None:
        assert self._places is None, "a selection of rows takes no more"
        self._file.seek(self._starts[-1])
        record = pickle.dumps(_fields(row), pickle.HIGHEST_PROTOCOL)
        self._file.write(record)
        self._starts.append(self._starts[-1] + len(record))

    def take(self, places: Iterable[int]) -> KeptRows:
        """The rows at `places`, in that order."""
        taken = object.__new__(KeptRows)
        taken._file, taken._starts = self._file, self._starts
        own = self._places
        taken._places = array("Q", places if own is None else (own[place] for place in places))
        return taken

    def __len__(self) -> int:
        return len(self._starts) - 1 if self._places is None else len(self._places)

    def __iter__(self) -> Iterator[Row]:
        return map(self._read, range(len(self)) if self._places is None else self._places)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> KeptRows: ...
    def __getitem__(self, index: int | slice) -> Row | KeptRows:
        places = range(len(self))[index]
        if isinstance(places, range):
            return self.take(places)
        return self._read(places if self._places is None else self._places[places])

    def _read(self, place: int) -> Row:
        start, end = self._starts[place], self._starts[place + 1]
        self._file.seek(start)
        return Row(*pickle.loads(self._file.read(end - start)))  # our own bytes, in a file that nobody else can open
