"""The CPU's side of the engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from preference.engine.branches import by_chain
from preference.engine.cpu import memory
from preference.engine.cpu.attention import segment_attention
from preference.engine.cpu.gated_norm import save_memory_in_gated_norms
from preference.engine.cpu.norm import save_memory_in_norms
from preference.engine.exp_rows import exp_rows
from preference.engine.layers.gated import save_memory_in_gated_layers
from preference.engine.layers.linear import save_memory_in_linear_layers
from preference.engine.layers.lora import join_adapters
from preference.engine.masks import PackedMask, Scores
from preference.engine.side import Side

HEAD_ROWS = 256
CACHE_ELEMENTS = 2**21  # logits that the element-wise steps handle at once: 8 MiB in fp32, so that they stay in cache


def attend(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scores: Scores) -> Tensor:
    if scores.plain:
        return segment_attention(query[0], key[0], value[0], mask, scores.scale).transpose(0, 1)[None]
    return by_chain(query, key, value, mask, scores)


def cached_exp_rows(logits_CV: Tensor, ids_C: Tensor, scale: float, cap: float | None) -> tuple[Tensor, ...]:
    """`exp_rows` over rows that stay in cache."""
    rows = max(1, CACHE_ELEMENTS // logits_CV.shape[1])
    parts = zip(logits_CV.split(rows), ids_C.split(rows), strict=True)
    return tuple(torch.cat(x) for x in zip(*(exp_rows(part, ids, scale, cap) for part, ids in parts), strict=True))


def lighten(model: nn.Module) -> None:
    memory.keep_freed_memory()
    if all(p.numel() for p in model.parameters()):  # not while ZeRO-3 has them dealt out
        save_memory_in_gated_layers(model)
        save_memory_in_linear_layers(model)
        save_memory_in_norms(model)
        save_memory_in_gated_norms(model)
        join_adapters(model)


CPU = Side(attend, cached_exp_rows, HEAD_ROWS, lighten)
