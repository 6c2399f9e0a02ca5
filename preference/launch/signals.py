"""SIGTERM, SIGINT and SIGUSR1 (Slurm's warning) are noted and acted on after the step; a second one ends the process.

What a run does about a signal is train/stopping.py's.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows has no SIGUSR1
EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: start it again and it resumes
ECHO = 2.0  # seconds in which another signal is taken for the same one: launchers forward what the group got anyway


class StoppedBySignal(Exception):
    """Training was stopped by a signal, on all ranks at the same step."""


class StopSignals:
    """Handlers for the whole process. Until they are installed a signal just ends it: there is nothing to save yet.

    Attributes:
        phase: "training", or "finishing", when what is left is soon done and is done.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.at = 0.0
        self.phase = "training"

    def install(self) -> StopSignals:
        for number in SIGNALS:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if self.received is None:
            self.received, self.at = name, time.monotonic()
            what = "stopping after this step, with a checkpoint" if self.phase == "training" else "nearly done"
            self._say(f"{name}: {what}; a second signal stops at once\n")
        elif time.monotonic() - self.at > ECHO:
            self._say(f"{name} again: stopping at once; the last checkpoint stands\n")
            os._exit(128 + number)

    @staticmethod
    def _say(text: str) -> None:
        os.write(2, text.encode())  # print is not safe in a handler: the signal may have come in the middle of one
