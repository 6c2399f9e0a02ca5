"""Putting a folder where another may lie: at every moment one of the two is there, whole."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from pathlib import Path

RENAME_EXCHANGE, AT_FDCWD = 2, -100  # of renameat2(2), Linux 3.15


def workspace(output: Path) -> Path:
    """A new folder beside `output` to build it in. What earlier exports of processes that are gone left is removed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for left in output.parent.glob(f".{output.name}.part-*"):
        owner = left.name.removeprefix(f".{output.name}.part-").partition("-")[0]
        if owner.isdecimal() and not _alive(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f".{output.name}.part-{os.getpid()}-", dir=output.parent))


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def move_into_place(folder: Path, output: Path) -> None:
    """Put `folder` where `output` is. What lay there goes only once the new one lies in its place."""
    if not output.exists():
        folder.rename(output)
    elif _exchange(folder, output):
        shutil.rmtree(folder)
    else:  # a file system without exchange: two renames, the first undone if the second fails
        old = folder.with_name(folder.name + ".old")
        output.rename(old)
        try:
            folder.rename(output)
        except OSError:
            old.rename(output)
            raise
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0
