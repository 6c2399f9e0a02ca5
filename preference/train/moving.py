"""The exponential moving average of the weights that are trained: kept beside them, saved with every checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

FILE = "moving_average.pt"


class MovingAverage(TrainerCallback):
    """mean = d * mean + (1 - d) * weights after every optimizer step, in float32.

    d is the smaller of `decay` and (1 + step) / (10 + step), so that a short run does not end with its first weights.
    """

    def __init__(self, model: Any, decay: float) -> None:
        self.decay = decay
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.means: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.means:  # else a checkpoint had them
            self.means = {name: p.detach().to(torch.float32, copy=True) for name, p in self.trained.items()}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, p in self.trained.items():
            self.means[name].lerp_(p.float(), 1 - decay)

    def save(self, folder: Path) -> None:
        torch.save({name: mean.cpu() for name, mean in self.means.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        found = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        self.means = {name: found[name].to(p.device) for name, p in self.trained.items()}

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the averages instead of its weights."""
        for name, p in self.trained.items():
            p.copy_(self.means[name])
