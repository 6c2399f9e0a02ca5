"""What an attention call over a packed row is told: which keys each query sees, and how scores become weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from preference.errors import PreferenceError


class EngineError(PreferenceError, ValueError):
    """A model, or one of its settings, that the packed engine cannot compute exactly. The message names engine=trl."""


@dataclass
class PackedMask:
    """Stands where a mask tensor would: the row's layout, and which of the visible keys a layer keeps.

    window: keys at most window-1 positions back. chunk: keys of the query's own chunk of that many positions.
    implementation: the way of computing it that was chosen for the model (engine/cuda/attention.py).
    """

    layout: Mapping[str, Any]
    window: int | None = None
    chunk: int | None = None
    implementation: str = "auto"
    _made: dict[Any, Any] = field(default_factory=dict)

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made at the first call: all layers of a kind share it."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def visible(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """bool [queries, keys] for the last `queries` positions of a causal sequence of `keys` tokens."""
        return self.once((queries, keys, device), lambda: self._visible(queries, keys, device))

    def _visible(self, queries: int, keys: int, device: torch.device) -> Tensor:
        key = torch.arange(keys, device=device)
        return self.keeps(key[keys - queries :, None], key)

    def keeps(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether a query keeps a key of its own branch, both given by their positions."""
        keep = key <= query
        if self.window is not None:
            keep = keep & (key > query - self.window)
        if self.chunk is not None:
            keep = keep & (key // self.chunk == query // self.chunk)
        return keep

    def narrows(self, keys: int) -> bool:
        """Whether the window or chunk hides anything from a causal sequence of `keys` tokens."""
        return keys > min(self.window or keys, self.chunk or keys)


@dataclass(frozen=True)
class Scores:
    """How products of queries and keys become weights.

    Attributes:
        scale: factor of the products. cap: soft-capping, cap * tanh(score / cap). sinks: a learned score [H] of a
            key that has no value. dropout: share of the weights that is dropped.
    """

    scale: float
    cap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether they are a scaled softmax and nothing else."""
        return self.dropout == 0 and self.cap is None and self.sinks is None


def repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [1, K, N, D] with as many heads as the queries have."""
    groups = query.shape[1] // key.shape[1]
    return (key, value) if groups == 1 else (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))
