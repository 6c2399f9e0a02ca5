"""A signal that any rank has received ends a run after its step, with a checkpoint, on all ranks.

Before each optimizer step the ranks add up their flags, so that all of them stop after the same one. An evaluation is
broken off.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from preference.launch.signals import StoppedBySignal, StopSignals


class StopTogether(TrainerCallback):
    """Acts on a signal that any rank has received: after the step, on all ranks.

    Args:
        start: the step of the checkpoint that training resumes from; 0: of none.
    """

    def __init__(self, trainer: Any, signals: StopSignals, start: int = 0) -> None:
        self.accelerator, self.signals, self.start = trainer.accelerator, signals, start
        self.stopping = False

    def _anyone(self) -> bool:
        flag = self.signals.received is not None
        if self.accelerator.num_processes == 1:
            return flag
        return self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum").item() > 0

    def start_training(self) -> None:
        """Raises StoppedBySignal on all ranks if a signal came before."""
        if self._anyone():
            raise StoppedBySignal(self.start)
        self.signals.phase = "training"

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Here, as the watchdog has just waited for the device: another wait costs next to nothing.
        self.stopping = self.stopping or self._anyone()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.signals.phase != "finishing" and self._anyone():
            self.stopping = True
            raise StoppedBySignal(max(state.global_step, self.start))
