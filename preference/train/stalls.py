"""Says so when training waits long for its rows, and what the processes that prepare them are doing."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

STALL_SECONDS = 60.0  # packing a step takes milliseconds; a cold disk some seconds
STATES = {"R": "computing", "S": "waiting", "D": "waiting for the disk", "T": "stopped", "Z": "dead"}


def _state(pid: int) -> str:
    """What a process is doing, by Linux's word; elsewhere only that it is there."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "unknown"
    return STATES.get(letter, letter)


def data_workers() -> str:
    pids = [worker.pid for worker in multiprocessing.active_children() if worker.pid]
    if not pids:
        return "this process reads and packs them itself (dataloader_num_workers=0)"
    return "its data workers: " + ", ".join(f"process {pid} {_state(pid)}" for pid in pids)


@contextlib.contextmanager
def waiting_for_rows(step: int, rank: int) -> Iterator[None]:
    """While the rows of optimizer step `step` are fetched within, warn every `STALL_SECONDS` that they do not come."""
    came = threading.Event()

    def watch() -> None:
        waited = 0.0
        while not came.wait(STALL_SECONDS):
            waited += STALL_SECONDS
            logger.warning("rank %d has waited %g s for the rows of step %d; %s", rank, waited, step, data_workers())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        came.set()
        watcher.join()
