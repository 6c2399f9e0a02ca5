"""What is read back is what was written: files that carry a checksum, and folders whose manifest does.

Everything is written beside its place, flushed to the disk and then renamed, so that it is there whole or not at all.
Checksums are XXH3 (128 bits): they tell accidental damage from nothing with certainty for all practical purposes, at
memory speed (12 GB/s on one core, against 1.5 for SHA-256), so that everything can be checked before every use. They
are no protection against somebody who changes a file and its checksum with it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"
CHECKSUM = "checksum"  # the last entry of a sealed record: of the text of the others
BLOCK = 1 << 22


class Damaged(ValueError):
    """A file that is not what was written; str() says in what."""


# ---- files


def checksum(path: Path) -> str:
    """The XXH3 of a file's bytes, in hex."""
    digest, buffer = xxhash.xxh3_128(), bytearray(BLOCK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk before going on."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to instead of `path`; what is there at the end is flushed and gets the name `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_checked(path: Path, content: bytes) -> None:
    """Write bytes with their checksum behind them, for `read_checked`."""
    with written_whole(path) as part:
        part.write_bytes(content + xxhash.xxh3_128_digest(content))


def read_checked(path: Path) -> bytes:
    """What `write_checked` was given.

    Raises:
        Damaged: the file is not as it was written.
    """
    content = path.read_bytes()
    size = xxhash.xxh3_128().digest_size
    if len(content) < size or xxhash.xxh3_128_digest(content[:-size]) != content[-size:]:
        raise Damaged("its checksum does not fit its content")
    return content[:-size]


# ---- records


def seal(record: Mapping[str, Any]) -> str:
    """A JSON object as text, with its checksum as the last entry. Equal records give equal text."""
    body = json.dumps(record, indent=1, ensure_ascii=False)
    return (
        json.dumps({**record, CHECKSUM: xxhash.xxh3_128_hexdigest(body.encode())}, indent=1, ensure_ascii=False) + "\n"
    )


def unseal(content: bytes) -> dict[str, Any]:
    """The record of a sealed text; every byte of it counts, white space included.

    Raises:
        Damaged: the text is not as it was written.
    """
    try:
        record = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged("it is damaged: it is no longer JSON") from error
    if not isinstance(record, dict) or CHECKSUM not in record:
        raise Damaged("it is damaged, or was written by an earlier version: it has no checksum of its own")
    del record[CHECKSUM]
    if seal(record).encode() != content:
        raise Damaged("it is damaged: its checksum does not fit its content")
    return record


def write_sealed(path: Path, record: Mapping[str, Any]) -> None:
    with written_whole(path) as part:
        part.write_text(seal(record), encoding="utf-8", newline="\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """The record of a sealed file.

    Raises:
        FileNotFoundError: there is none.
        Damaged: it is not as it was written.
    """
    return unseal(path.read_bytes())


# ---- folders


def write_manifest(folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Flush the folder's files to the disk and write down what they are, with `facts` beside. Done last."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    files = {}
    for path in paths:
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "xxh3": checksum(path)}
        sync(path)
    for path in {path.parent for path in paths} - {folder}:
        sync(path)
    write_sealed(folder / MANIFEST, {**(facts or {}), "files": files})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None if there is none that can be relied on."""
    try:
        return read_sealed(folder / MANIFEST)
    except (OSError, Damaged):
        return None


def fault(folder: Path) -> str | None:
    """Why the folder is not what was written; None if it is. Reads every byte of it."""
    if not folder.is_dir():
        return "it is not there"
    try:
        manifest = read_sealed(folder / MANIFEST)
    except FileNotFoundError:
        return f"it is incomplete: no {MANIFEST}"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error}"
    except Damaged as damage:
        return f"{MANIFEST} cannot be relied on: {damage}"
    for name, expected in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes instead of {expected['size']}"
            if checksum(folder / name) != expected["xxh3"]:
                return f"{name} is damaged: its checksum differs from the manifest's"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None
