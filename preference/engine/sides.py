"""What a kind of device adds to the engine, chosen here and nowhere else: a CPU, CUDA, and torch's own for others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from preference.engine.chains import padded
from preference.engine.exp_rows import exp_rows
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
        implementations: what `attn_implementation` can be.
    """

    attend: Attention
    exp_rows: ExpRows
    head_rows: int
    lighten: Callable[[nn.Module], None]
    implementations: tuple[str, ...] = ("auto",)


OTHERS = Side(padded, exp_rows, 1024, lambda model: None, ("auto", "sdpa"))


def side_of(device: str) -> Side:
    """The side of a kind of device, as `torch.device.type` names it. Triton is imported for CUDA alone."""
    if device == "cpu":
        from preference.engine.cpu.side import CPU

        return CPU
    if device == "cuda":
        from preference.engine.cuda.side import CUDA

        return CUDA
    return OTHERS
