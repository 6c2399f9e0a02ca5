"""Attention over a packed row on CUDA: which kernel takes a call, and torch's varlen kernel.

- varlen (`torch.nn.attention.varlen`): 16 bits, compute capability 8.0, heads of a multiple of 8 up to 256 numbers,
  plain scores. A query segment per branch, keys gathered, causal from the bottom right.
- flex (engine/cuda/flex.py): soft-capping, sinks, chunks, values narrower than keys, float32, older cards.
- sdpa (engine/branches.py): dropout of the weights, narrow heads, cards that Triton does not know.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from preference.engine.branches import padded
from preference.engine.cuda.flex import flex
from preference.engine.cuda.kernels import gather, sum_uses
from preference.engine.masks import EngineError, PackedMask, Scores

VARLEN_CAPABILITY, FLEX_CAPABILITY = (8, 0), (7, 5)


@functools.cache
def _varlen_ops() -> tuple[Any, ...]:
    """torch's varlen kernel, forward and backward; empty where this torch has none that takes a window and a scale."""
    try:
        import torch.nn.attention.varlen
    except ImportError:  # torch < 2.10
        return ()
    ops = torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn._varlen_attn_backward
    names = [{argument.name for argument in op.default._schema.arguments} for op in ops]
    return ops if all({"window_size", "scale"} <= known for known in names) else ()


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a card."""
    return torch.cuda.get_device_capability(device)


def takes_varlen(query: Tensor, value: Tensor, mask: PackedMask, scores: Scores) -> bool:
    size = query.shape[-1]
    return (
        scores.plain
        and query.dtype in (torch.bfloat16, torch.float16)
        and size == value.shape[-1]
        and size <= 256
        and size % 8 == 0
        and not (mask.chunk and mask.layout["longest"][1] > mask.chunk)
        and capability(query.device) >= VARLEN_CAPABILITY
        and bool(_varlen_ops())
    )


def takes_flex(query: Tensor, value: Tensor, scores: Scores) -> bool:
    return (
        scores.dropout == 0
        and min(query.shape[-1], value.shape[-1]) >= 16
        and query.dtype != torch.float64
        and capability(query.device) >= FLEX_CAPABILITY
    )


def way(query: Tensor, value: Tensor, mask: PackedMask, scores: Scores) -> str:
    """varlen, flex or sdpa: what was chosen for the model, or the first that takes this call.

    Raises:
        EngineError: the chosen one does not take it.
    """
    able = {
        "varlen": lambda: takes_varlen(query, value, mask, scores),
        "flex": lambda: takes_flex(query, value, scores),
        "sdpa": lambda: True,
    }
    if mask.implementation == "auto":
        return next(name for name, takes in able.items() if takes())
    if not able[mask.implementation]():
        raise EngineError(f"the {mask.implementation} kernel does not take this attention")
    return mask.implementation


def attend(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scores: Scores) -> Tensor:
    return WAYS[way(query, value, mask, scores)](query, key, value, mask, scores)


class GatheredVarlen(torch.autograd.Function):
    """query [N, H, D], key and value [N, K, D] -> [N, H, D]; `layout` has key_at [M], key_order [M], key_starts [N+1].

    The gathered keys and values are not kept but gathered again. A key that many branches see gets their gradients
    summed in float32 and rounded once.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Any, window: int, scale: float) -> Tensor:
        keys, values = gather(key, value, layout["key_at"])
        groups = {"enable_gqa": True} if _takes_groups() and len(query[0]) != len(key[0]) else {}
        ctx.repeats = 1 if _takes_groups() else query.shape[1] // key.shape[1]
        keys, values = (_repeat(x, ctx.repeats) for x in (keys, values))
        out, logsumexp, random = _varlen_ops()[0](
            query, keys, values, layout["cu_seqlens_q"], layout["cu_seqlens_k"], *layout["longest"], True, scale,
            window_size=[window, 0], **groups,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, out, logsumexp, random)
        ctx.layout, ctx.window, ctx.scale = layout, window, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, logsumexp, random = ctx.saved_tensors
        layout = ctx.layout
        keys, values = (_repeat(x, ctx.repeats) for x in gather(key, value, layout["key_at"]))
        d_query, d_keys, d_values = _varlen_ops()[1](
            grad.contiguous(), query, keys, values, out, logsumexp, layout["cu_seqlens_q"], layout["cu_seqlens_k"],
            *layout["longest"], True, random, ctx.scale, window_size=[ctx.window, 0],
        )  # fmt: skip
        if ctx.repeats > 1:
            d_keys, d_values = (x.unflatten(1, (-1, ctx.repeats)).sum(2) for x in (d_keys, d_values))
        uses = layout["key_at"], layout["key_order"], layout["key_starts"]
        return d_query, *sum_uses(d_keys, d_values, *uses), None, None, None


@functools.cache
def _takes_groups() -> bool:
    return "enable_gqa" in {argument.name for argument in _varlen_ops()[0].default._schema.arguments}


def _repeat(x_MKD: Tensor, times: int) -> Tensor:
    return x_MKD if times == 1 else x_MKD.repeat_interleave(times, 1)


def varlen(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scores: Scores) -> Tensor:
    """All [1, heads, N, D] -> [1, N, H, D]."""
    window = -1 if mask.window is None else mask.window - 1
    rows = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return GatheredVarlen.apply(*rows, mask.layout, window, scores.scale).unsqueeze(0)


WAYS = {"varlen": varlen, "flex": flex, "sdpa": padded}
