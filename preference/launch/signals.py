"""SIGTERM, SIGINT and SIGUSR1 (Slurm's warning) end a run after its step, with a checkpoint; a second one at once.

The signal may reach one process only: before each optimizer step the ranks add up their flags, so that all of them
stop after the same step. An evaluation is broken off.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from transformers import TrainerCallback

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: start it again and it goes on
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


class StopTogether(TrainerCallback):
    """Acts on a signal that any rank has received: after the step, on all ranks."""

    def __init__(self, trainer: Any, signals: StopSignals) -> None:
        self.accelerator, self.signals = trainer.accelerator, signals
        self.stopping = False

    def _anyone(self) -> bool:
        flag = self.signals.received is not None
        if self.accelerator.num_processes == 1:
            return flag
        return self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum").item() > 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Here, as the watchdog has just waited for the device: another wait costs next to nothing.
        self.stopping = self.stopping or self._anyone()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.signals.phase == "training" and self._anyone():
            self.stopping = True
            raise StoppedBySignal


class Interruptible:
    """Mixin for `transformers.Trainer`: an evaluation during training that a signal breaks off ends in a checkpoint."""

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kw: Any
    ) -> None:
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kw)
        except StoppedBySignal:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.control.should_evaluate = False
            self.control.should_training_stop = True
