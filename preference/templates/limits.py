"""Bounds for code that comes with a model: a chat template's sandbox limits what it may do, not how long.

`{% for i in range(99999) %}{% for j in range(99999) %}` would run for hours, and `{{ "x" * 10 ** 10 }}` fill the
memory.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SECONDS = 20.0  # a rendering takes milliseconds, a machine may stand still for a while
BYTES = 4 << 30  # beyond what the process holds already

# What a template's arithmetic, loops and recursion raise where they know no end.
ENDLESS = (OverflowError, ZeroDivisionError, RecursionError, MemoryError, TimeoutError)


@contextlib.contextmanager
def limited_work(seconds: float = SECONDS, size: int = BYTES) -> Iterator[None]:
    """End what runs within by TimeoutError after `seconds` and by MemoryError when it takes `size` more bytes.

    The time is bounded in a process's main thread, the memory where the system counts it (Linux).
    """
    with _bounded_memory(size), _bounded_time(seconds):
        yield


@contextlib.contextmanager
def _bounded_time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it is not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _bounded_memory(size: int) -> Iterator[None]:
    pages = Path("/proc/self/statm")
    if resource is None or not pages.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(pages.read_text().split()[0]) * resource.getpagesize() + size
    if soft != resource.RLIM_INFINITY:
        wanted = min(wanted, soft)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
