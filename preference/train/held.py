"""The half of an adapter that stays as it is: what PiSSA and OLoRA took out of the weights (models/beginnings.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

NAME = "default"  # of the adapter that is trained


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class HeldHalves(TrainerCallback):
    """Keeps the second half of every A (rows) and B (columns), to the bit, whatever the optimizer does.

    Args:
        model: with an adapter whose second half is to stay.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.held: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # parameter, where it stays, its values

    def _halves(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for name, parameter in self.model.named_parameters():
            words = name.split(".")
            if NAME not in words or not {"lora_A", "lora_B"} & set(words):
                continue
            stays = torch.zeros(parameter.shape, dtype=torch.bool, device=_local(parameter.data).device)
            half = parameter.shape[0 if "lora_A" in words else 1] // 2
            (stays[half:] if "lora_A" in words else stays[:, half:]).fill_(True)
            if isinstance(parameter, DTensor):
                stays = distribute_tensor(stays, parameter.device_mesh, parameter.placements).to_local()
            yield parameter, stays

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights are on their devices and dealt out, and a checkpoint is loaded."""
        self.held = [(p, stays, _local(p.data)[stays].clone()) for p, stays in self._halves()]

    def drop_gradients(self) -> None:
        """After a backward pass: what does not move counts in no norm."""
        for parameter, stays, _ in self.held:
            if parameter.grad is not None:
                _local(parameter.grad).masked_fill_(stays, 0)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weight decay and momentum do not ask for a gradient."""
        for parameter, stays, values in self.held:
            _local(parameter.data)[stays] = values
