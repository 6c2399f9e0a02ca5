"""The bytes of a file, unpacked and in UTF-8, whatever they are packed and written in.

Packed: gzip, bzip2, xz, zstd, and the members of zip and tar archives, which are named `archive.zip!/rows.jsonl`.
What a file is packed in is seen by its first bytes, never by its name.
"""

from __future__ import annotations

import bz2
import codecs
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from preference.data.json_records import BOM

HEAD = 1 << 16
MEMBER = "!/"  # between an archive and the name of its member
GZIP = b"\x1f\x8b"
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_TAR_MAGIC = slice(257, 262)
_STRAY = "preference.stray"


# What the libraries raise for data that is not what its first bytes say
_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, RuntimeError, KeyError)


def _stray(error: UnicodeError) -> tuple[str, int]:
    """One byte that is no UTF-8 in the place of what is no text."""
    return "\udc80", error.end if isinstance(error, UnicodeDecodeError) else 0


codecs.register_error(_STRAY, _stray)


class Damaged(Exception):
    """A compressed stream or an archive ends too early or is not what its first bytes say."""


class Position:
    """How far into the file that is being read we are, for a progress bar."""

    def __init__(self) -> None:
        self.raw: BinaryIO | None = None

    def bytes_read(self) -> int:
        return 0 if self.raw is None or self.raw.closed else self.raw.tell()


def open_bytes(source: str, position: Position | None = None, encoding: str | None = None) -> BinaryIO:
    """Open a file, or the member of an archive, for reading unpacked bytes.

    Args:
        encoding: what its text is written in, if it is not UTF-8; the bytes that are read are UTF-8. UTF-16 and UTF-8
            that say so by a byte-order mark need none.

    Raises Damaged, also while it is read.
    """
    path, _, member = source.partition(MEMBER)
    raw = open(path, "rb")  # noqa: SIM115  the caller closes it
    if position is not None:
        position.raw = raw
    stream = _unpacked(_member(raw, path, member) if member else raw)
    start = stream.peek(3)[:3]
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    if encoding is None or start == BOM or start == b"PAR":
        return stream
    return io.BufferedReader(_Recoded(stream, encoding), HEAD)


def members_of(path: str) -> list[str] | None:
    """The names of the files in an archive, sorted; None for any other file and for a damaged one. Raises OSError."""
    with open(path, "rb") as raw:
        is_zip = raw.peek(4)[:4] == b"PK\x03\x04"
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
                return None if "[Content_Types].xml" in names else sorted(names)  # a workbook or document of Office
        with open_bytes(path) as stream:
            if _head_of(stream)[_TAR_MAGIC] != b"ustar":
                return None
        with tarfile.open(path) as archive:
            return sorted(entry.name for entry in archive if entry.isfile())
    except (Damaged, *_ERRORS):
        return None  # told of when its rows are read


def _head_of(stream: BinaryIO) -> bytes:
    head = b""
    while len(head) < 512 and (piece := stream.read(512 - len(head))):
        head += piece
    return head


def _member(raw: io.BufferedReader, path: str, name: str) -> io.BufferedReader:
    try:
        if raw.peek(4)[:4] == b"PK\x03\x04":
            return io.BufferedReader(_Guarded(zipfile.ZipFile(raw).open(name), raw), HEAD)
        found = tarfile.open(fileobj=raw).extractfile(name)  # noqa: SIM115  it closes with its file
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        KeyError,
        RuntimeError,
    ) as error:
        raise Damaged(f"{name} of {path}: {error}") from error
    if found is None:
        raise Damaged(f"{name} of {path} is not a file")
    return io.BufferedReader(_Guarded(found, raw), HEAD)


def _unpacked(stream: Any) -> Any:
    """The stream itself, or what it holds, as often as that is packed again."""
    while (
        opener := next((make for magic, make in _OPENERS.items() if stream.peek(6).startswith(magic)), None)
    ) is not None:
        stream = io.BufferedReader(opener(stream), HEAD)
    return stream


def _zstd(stream: Any) -> io.RawIOBase:
    import pyarrow as pa

    return _Guarded(pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd"), stream)


class _Guarded(io.RawIOBase):
    """A stream of a library, whose errors become Damaged."""

    def __init__(self, inner: Any, below: Any):
        self._inner, self._below = inner, below

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inner.read(len(buffer))
        except (
            OSError,
            EOFError,
            zlib.error,
            lzma.LZMAError,
            zipfile.BadZipFile,
            tarfile.TarError,
            RuntimeError,
        ) as error:
            raise Damaged(str(error)) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        super().close()
        self._inner.close()
        self._below.close()


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


_OPENERS: dict[bytes, Callable[[Any], io.RawIOBase]] = {
    GZIP: _Gunzip,
    b"BZh": lambda stream: _Guarded(bz2.BZ2File(stream), stream),
    b"\xfd7zXZ\0": lambda stream: _Guarded(lzma.LZMAFile(stream), stream),  # noqa: SIM115
    b"\x28\xb5\x2f\xfd": _zstd,
}


class _Recoded(io.RawIOBase):
    """Text of another encoding as UTF-8. What is no text in it becomes a byte that is none in UTF-8 either."""

    def __init__(self, stream: io.BufferedReader, encoding: str):
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(errors=_STRAY)
        self._text = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text and not self._ended:
            raw = self._stream.read1(HEAD)
            self._ended = not raw
            self._text = self._decoder.decode(raw, final=self._ended).encode("utf-8", "surrogateescape")
        part, self._text = self._text[: len(buffer)], self._text[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        super().close()
        self._stream.close()
