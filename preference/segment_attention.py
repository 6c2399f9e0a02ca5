"""Attention over the segments of a packed row on a CPU.

The forward is torch's flash kernel (SDPA), one call per branch. Its backward is slow for short sequences (in bfloat16
nine times slower than the products that it consists of), so the backward is written out here as batched matrix
products, by blocks of queries that see no more keys than causality and the window allow. Query heads that share a key
head are one product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # queries of one block of the backward


def _grouped(x_HnD: Tensor, key_heads: int) -> Tensor:
    """[H, n, D] -> [key heads, H / key heads * n, D]."""
    return x_HnD.reshape(key_heads, -1, x_HnD.shape[-1])


def _branches(segments: list[tuple[int, int, int]]) -> list[tuple[slice, slice | None, slice]]:
    """(queries, prefix or None, keys) of each branch, slices of the row; the chosen branch takes its prefix along."""
    found, start = [], 0
    for prefix, chosen, rejected in segments:
        first = slice(start, start + prefix + chosen)
        second = slice(first.stop, first.stop + rejected)
        found += [(first, None, first), (second, slice(start, start + prefix), second)]
        start = second.stop
    return found


def _keys(x_HND: Tensor, prefix: slice | None, own: slice) -> Tensor:
    if prefix is None:
        return x_HND[:, own]
    return torch.cat([x_HND[:, prefix], x_HND[:, own]], dim=1)


class SegmentAttention(torch.autograd.Function):
    """query [H, N, D], key and value [K, N, D] -> [H, N, D], stored as [N, H, D]. `mask` is a `PackedMask`."""

    @staticmethod
    def forward(ctx: Any, query, key, value, mask, scale):
        groups = query.shape[0] // key.shape[0]
        out_NHD = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
        for at, prefix, own in _branches(mask.layout["segments"]):
            q, k, v = query[:, at], _keys(key, prefix, own), _keys(value, prefix, own)
            if groups > 1:
                k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
            plain = prefix is None and not mask.narrows(k.shape[1])
            bias = None if plain else mask.bias(q.shape[1], k.shape[1], q)
            part = F.scaled_dot_product_attention(q[None], k[None], v[None], bias, is_causal=plain, scale=scale)
            out_NHD[at] = part[0].transpose(0, 1)
        out = out_NHD.transpose(0, 1)
        ctx.save_for_backward(query, key, value, out)
        ctx.mask, ctx.scale = mask, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        query, key, value, out = ctx.saved_tensors
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for at, prefix, own in _branches(ctx.mask.layout["segments"]):
            k, v = _keys(key, prefix, own), _keys(value, prefix, own)
            parts = query[:, at], k, v, out[:, at], grad[:, at]
            d_query[:, at], d_k, d_v = _branch_backward(*parts, ctx.mask, ctx.scale)
            for whole, d in ((d_key, d_k), (d_value, d_v)):
                if prefix is None:
                    whole[:, own] += d
                else:
                    cut = prefix.stop - prefix.start
                    whole[:, prefix] += d[:, :cut]
                    whole[:, own] += d[:, cut:]
        return d_query, d_key, d_value, None, None


def _branch_backward(q, k, v, out, grad, mask, scale):
    """Gradients of one branch: n queries at the end of m keys."""
    heads, (n, m), dtype = k.shape[0], (q.shape[1], k.shape[1]), q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    hidden = ~mask.visible(n, m, q.device)
    delta = (out.to(wide) * grad).sum(-1)
    d_q = torch.empty_like(q)
    d_k, d_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    k_wide = k.to(wide)
    for start in range(0, n, BLOCK):
        rows = slice(start, min(start + BLOCK, n))
        last = m - n + rows.stop
        first = 0 if mask.window is None else max(0, m - n + start - mask.window + 1)
        cols = slice(first, last)
        shape = (q.shape[0], -1, last - first)
        grouped_shape = (heads, -1, last - first)
        q_block, g_block = _grouped(q[:, rows], heads), _grouped(grad[:, rows], heads)
        scores = torch.bmm(q_block.to(wide), k_wide[:, cols].transpose(1, 2)).view(shape).mul_(scale)
        probs = torch.softmax(scores.masked_fill_(hidden[rows, cols], float("-inf")), -1)
        d_v[:, cols] += torch.bmm(probs.to(dtype).view(grouped_shape).transpose(1, 2), g_block)
        d_probs = torch.bmm(g_block, v[:, cols].transpose(1, 2)).view(shape)
        d_scores = probs.mul_(d_probs - delta[:, rows, None]).mul_(scale).to(dtype).view(grouped_shape)
        d_q[:, rows] = torch.bmm(d_scores, k[:, cols]).view(q.shape[0], -1, q.shape[-1])
        d_k[:, cols] += torch.bmm(d_scores.transpose(1, 2), q_block)
    return d_q, d_k, d_v
