"""Attention over a packed row by torch's FlexAttention, for what the varlen kernel cannot compute.

The block mask is made once for each row and kind of layer. On CUDA the kernel is compiled once, for rows of any length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from preference.engine.masks import PackedMask, Scores


def _sight(mask: PackedMask, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention's mask function: which place of the row sees which."""
    sizes, begins, branches = (mask.layout[name] for name in ("segments", "position_offsets", "branches"))
    starts = [0, *accumulate(sizes)]
    sees = torch.zeros(len(branches), len(sizes), dtype=torch.bool)
    for number, (first, last, before) in enumerate(branches):
        sees[number, [*before, *range(first, last)]] = True
    lengths = [starts[last] - starts[first] for first, last, _ in branches]
    run_of = torch.repeat_interleave(torch.tensor(sizes))
    chain_of = torch.repeat_interleave(torch.tensor(lengths))
    position = torch.arange(starts[-1]) - torch.tensor(starts[:-1])[run_of] + torch.tensor(begins)[run_of]
    sees, run_of, chain_of, position = (x.to(device, non_blocking=True) for x in (sees, run_of, chain_of, position))

    def sight(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        visible = sees[chain_of[query], run_of[key]] & (key <= query)
        return visible & mask.keeps(position[query], position[key])

    return sight


def block_mask(mask: PackedMask, device: torch.device) -> BlockMask:
    tokens = sum(mask.layout["segments"])
    return create_block_mask(_sight(mask, device), None, None, tokens, tokens, device=device)


@functools.cache
def kernel(kind: str) -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True) if kind == "cuda" else flex_attention


def flex(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scores: Scores) -> Tensor:
    """All [1, heads, N, D] -> [1, N, H, D of the values]."""
    cap, sinks = scores.cap, scores.sinks

    def capped(score: Tensor, *place: Any) -> Tensor:
        return cap * torch.tanh(score / cap)

    options: dict[str, Any] = {"return_aux": AuxRequest(lse=True)} if sinks is not None else {}
    out = kernel(query.device.type)(
        query,
        key,
        value,
        score_mod=None if cap is None else capped,
        block_mask=mask.once("blocks", lambda: block_mask(mask, query.device)),
        scale=scores.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        **options,
    )
    if sinks is not None:  # a sink adds exp(sink) to the sum under the softmax
        out, aux = out
        out = (out * torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[:, None])[..., None]).to(out.dtype)
    return out.transpose(1, 2)
