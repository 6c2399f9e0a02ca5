"""Prepared data on disk: whoever comes first prepares it, everybody else waits for the folder and reads it.

There is no rank and no collective in this. Several processes (the ranks of a run, or two runs) may ask for the same key
at the same moment: one gets the lock and writes into a work folder, which appears under its final name by one rename,
whole or not at all. A lock ends with its process, so nobody waits for a dead one. Every byte is checked before it is
used; what is damaged is named, thrown away and prepared again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from preference.integrity import fault, write_manifest

logger = logging.getLogger(__name__)

LOCKS = ".locks"  # folder for them in a cache_dir: they stay, as a lock that is deleted is not safe
TELL_SECONDS = 30.0
Make = Callable[[Path], None]


def get_or_prepare(cache_dir: str | Path, key: str, make: Make) -> Path:
    """The folder of `key` under `cache_dir`, prepared by `make(work_folder)` if nobody has yet.

    Where `make` raises, nothing is left behind, and each waiting process tries for itself.
    """
    cache_dir = Path(cache_dir)
    final = cache_dir / key
    if final.is_dir() and fault(final) is None:
        return final
    with _locked(cache_dir / LOCKS / f"{key}.lock", final):
        reason = fault(final) if final.is_dir() else None
        if reason:
            logger.warning("%s is not what was prepared: %s. It is thrown away and prepared again", final, reason)
        if reason or not final.is_dir():
            _prepare(cache_dir, key, final, make)
    return final


def _prepare(cache_dir: Path, key: str, final: Path, make: Make) -> None:
    for left_over in [*cache_dir.glob(f"{key}.work-*"), final]:  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{key}.work-", dir=cache_dir))
    try:
        make(work)
        write_manifest(work)
        work.chmod(0o755)  # mkdtemp's folders are private, a cache is shared
        os.rename(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, final: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=TELL_SECONDS, poll_interval=0.1)
        except Timeout:
            logger.info("waiting for another process to prepare %s", final)
    try:
        yield
    finally:
        lock.release()
