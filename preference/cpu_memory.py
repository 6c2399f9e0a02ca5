"""Keep freed memory in the process on a CPU, but not without end.

glibc gives every block above a few MB back to the system when it is freed, and the next one of that size comes page by
page through page faults, each page cleared anew. A training step frees and takes such blocks thousands of times; with
this a bf16 step took about 8% less CPU time, in one noisy run (benchmarks/LOG.md).

Kept blocks leave holes that blocks of other sizes do not fit in, so that a process whose batches differ in length grows
from step to step. `GiveBackHoles` bounds that.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
SLACK = 1.15  # how far a process may grow over what a step needs in a heap without holes


@functools.cache
def _libc() -> Any:
    """The C library; None where it is not glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if libc.mallopt and libc.malloc_trim else None
    except (OSError, AttributeError):
        return None


@functools.cache
def keep_freed_memory() -> bool:
    """Tell malloc so, for the rest of the process. Returns False where the C library is not glibc."""
    libc = _libc()
    return bool(libc and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and libc.mallopt(_M_MMAP_MAX, 0))


def resident() -> int:
    """Bytes of main memory that this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class GiveBackHoles(TrainerCallback):
    """After a step in whose course the process grew by more than `SLACK`, give the holes' pages back to the system.

    The step after that shows anew what a step needs: a longer batch raises it, holes do not.
    """

    def __init__(self) -> None:
        self.needed = 0
        self.fresh = True  # no step has left holes yet

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type != "cpu" or not keep_freed_memory():
            return
        now = resident()
        if self.fresh:
            self.needed, self.fresh = max(self.needed, now), False
        elif now > SLACK * self.needed:
            _libc().malloc_trim(0)
            self.fresh = True
