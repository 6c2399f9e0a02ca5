"""A packed batch's way to its device: all tensors in one pinned buffer and one copy that nobody waits for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes at which each tensor begins; any type can be read there


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`; other values stay as they are."""
    if device.type != "cuda":
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return {**batch, **_in_one_copy({k: v for k, v in batch.items() if isinstance(v, Tensor)}, device)}


def _in_one_copy(tensors: Mapping[str, Tensor], device: torch.device, pinned: bool = True) -> dict[str, Tensor]:
    places, end = {}, 0
    for name, tensor in tensors.items():
        places[name] = slice(end, end + tensor.nbytes)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    host = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
    for name, tensor in tensors.items():
        _as(host[places[name]], tensor).copy_(tensor)
    there = host.to(device, non_blocking=True)
    return {name: _as(there[places[name]], tensor) for name, tensor in tensors.items()}


def _as(part: Tensor, like: Tensor) -> Tensor:
    return part.view(like.dtype).view(like.shape)
