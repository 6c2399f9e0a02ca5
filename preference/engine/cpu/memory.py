"""Keep freed memory in the process on a CPU.

glibc gives every block above a few MB back to the system when it is freed, and the next one of that size comes page by
page through page faults, each page cleared anew. A training step frees and takes such blocks thousands of times; with
this a bf16 step takes 5 to 8% less CPU time; the process grows over a long run with or without it (benchmarks/LOG.md).
"""

from __future__ import annotations

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@functools.cache
def keep_freed_memory() -> bool:
    """Tell malloc so, for the rest of the process. Returns False where the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_MMAP_MAX, 0))
