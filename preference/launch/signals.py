"""SIGTERM, SIGINT, SIGHUP and SIGUSR1 (Slurm's warning) are noted and acted on after the step; a second one ends all.

What a run does about a signal is train/stopping.py's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows has two of them
PHASES = {
    "evaluating": "stopping now; no step was trained, so there is no new checkpoint to resume from",
    "training": "stopping after this step, with a checkpoint",
    "finishing": "nearly done",
}
EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: start it again and it resumes
ECHO = 2.0  # seconds in which another signal is taken for the same one: launchers forward what the group got anyway


def outlives_terminal(number: int) -> bool:
    """Whether the signal is a hangup that nohup has had ignored. Others are handled whatever a parent ignored."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


class StoppedBySignal(Exception):
    """A run was stopped by a signal, on all ranks at the same step; `step` is 0 if none was trained."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped by a signal after step {step}")
        self.step = step


class StopSignals:
    """Handlers for the whole process. Until they are installed a signal just ends it: there is nothing to save yet.

    Args:
        silent: another process of this machine says it: Ctrl+C, and torchrun, signal all of them.

    Attributes:
        phase: "evaluating" before training, "training", or "finishing": what is left is soon done, and is done.
    """

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.received: str | None = None
        self.at = 0.0
        self.phase = "evaluating"

    def install(self) -> StopSignals:
        for number in SIGNALS:
            if not outlives_terminal(number):
                signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if self.received is None:
            self.received, self.at = name, time.monotonic()
            self._say(f"{name}: {PHASES[self.phase]}; a second signal stops at once\n")
        elif time.monotonic() - self.at > ECHO:
            self._say(f"{name} again: stopping at once; the last checkpoint stands\n")
            os._exit(128 + number)

    def _say(self, text: str) -> None:
        if self.silent:
            return
        with contextlib.suppress(OSError):  # a terminal that has hung up
            os.write(2, text.encode())  # print is not safe in a handler: the signal may have come in the middle of one
