"""Prepared data on disk: whoever comes first prepares it, everybody else waits for the file and reads it.

There is no rank and no collective in this. Several processes (the ranks of a run, or two runs) may ask for the same key
at the same moment: one gets the lock and writes into a work folder, which appears under its final name by one rename,
whole or not at all. The others poll. The holder counts its progress in the lock file; a lock whose count stands still,
or whose process is gone, is taken over. So nobody waits on a dead process, and no communication library times out.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

DONE = "outcome.json"  # written last into the work folder
STALL_SECONDS = 600.0  # a lock whose progress stands still for so long is taken over; one batch of rows takes seconds
POLL_SECONDS = 0.2
Make = Callable[[Path, Callable[[int], None]], None]


def get_or_prepare(cache_dir: str | Path, key: str, make: Make, *, stall_seconds: float = STALL_SECONDS) -> Path:
    """The folder of `key` under `cache_dir`, prepared by `make(work_folder, progress)` if nobody has yet.

    `make` writes its files into the work folder, the last one being `DONE`, and calls `progress(rows)` every few
    seconds. Where `make` raises, nothing is left behind, and each waiting process tries for itself.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    final, lock = cache_dir / key, _Lock(cache_dir / f"{key}.lock")
    while not (final / DONE).exists():
        if lock.acquire():
            try:
                if not (final / DONE).exists():
                    _prepare(cache_dir, key, final, make, lock.progress)
            finally:
                lock.release()
        else:
            _wait(final, lock, stall_seconds)
    return final


def _prepare(cache_dir: Path, key: str, final: Path, make: Make, progress: Callable[[int], None]) -> None:
    for left_over in [*cache_dir.glob(f"{key}.work-*"), final]:  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{key}.work-", dir=cache_dir))
    try:
        make(work, progress)
        if not (work / DONE).exists():
            raise RuntimeError(f"{make!r} did not write {DONE}")
        work.chmod(0o755)  # mkdtemp's folders are private, a cache is shared
        os.rename(work, final)
    except OSError:
        if not (final / DONE).exists():  # else the lock was taken over meanwhile and the other process was faster
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _wait(final: Path, lock: _Lock, stall_seconds: float) -> None:
    """Returns when the data is there, the lock is free, or the lock has been broken."""
    seen, since, told = lock.read(), time.monotonic(), time.monotonic()
    while not (final / DONE).exists():
        now = lock.read()
        if not now:
            return
        if now != seen:
            seen, since = now, time.monotonic()
        elif _holder_is_gone(now) or time.monotonic() - since > stall_seconds:
            logger.warning("taking over the preparation of %s: its process is gone or stands still (%s)", final, now)
            lock.steal(now)
            return
        if time.monotonic() - told > 30:
            logger.info("waiting for another process to prepare %s (%s)", final, now)
            told = time.monotonic()
        time.sleep(POLL_SECONDS)


def _holder_is_gone(content: str) -> bool:
    try:
        holder = json.loads(content)
    except json.JSONDecodeError:  # caught between creating the file and writing it
        return False
    if holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


class _Lock:
    """A file that exists while somebody prepares; it says who, and how far they are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token = uuid.uuid4().hex

    def _content(self, rows: int) -> str:
        return json.dumps({"token": self.token, "host": socket.gethostname(), "pid": os.getpid(), "rows": rows})

    def acquire(self) -> bool:
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                file.write(self._content(0))
        except FileExistsError:
            return False
        return True

    def read(self) -> str:
        """The lock's content, "" where there is no lock."""
        try:
            return self.path.read_text(encoding="utf-8") or "{"
        except FileNotFoundError:
            return ""

    def _is_ours(self) -> bool:
        return self.token in self.read()

    def progress(self, rows: int) -> None:
        if self._is_ours():  # else it was taken over, and the new holder's count must not be overwritten
            self.path.write_text(self._content(rows), encoding="utf-8")

    def release(self) -> None:
        if self._is_ours():
            self.path.unlink(missing_ok=True)

    def steal(self, content: str) -> None:
        """Remove a dead lock. Of several processes that try, one succeeds; a lock that changed meanwhile stays."""
        aside = self.path.with_suffix(f".stale-{self.token}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if aside.read_text(encoding="utf-8") != content and not self.path.exists():
            os.rename(aside, self.path)
        aside.unlink(missing_ok=True)
