"""What the engine asks of a kind of device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from preference.engine.masks import PackedMask, Scores

Attention = Callable[[Tensor, Tensor, Tensor, PackedMask, Scores], Tensor]
ExpRows = Callable[[Tensor, Tensor, float, float | None], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Side:
    """One kind of device.

    Attributes:
        attend: query [1, H, N, D], key and value [1, K, N, D] -> [1, N, H, D of the values].
        exp_rows: raw logits [C, V] become exponentials in place (engine/exp_rows.py).
        head_rows: rows of logits that are made at once.
        lighten: lets the layers of a model keep less, in the same numbers; it may be called while weights are on the
            meta device.
        begin: called before each packed forward of a model.
        implementations: what `attn_implementation` can be.
    """

    attend: Attention
    exp_rows: ExpRows
    head_rows: int
    lighten: Callable[[nn.Module], None]
    begin: Callable[[nn.Module], None] = lambda model: None
    implementations: tuple[str, ...] = ("auto",)
