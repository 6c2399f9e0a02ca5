"""Attention over the segments of a packed row on a CPU, as batched matrix products.

torch's flash kernel is slow here for short sequences, most of all its backward (in bfloat16 nine times slower than the
products that it consists of), and a call for each branch spends more on calls than on numbers. So a short pair is one
block: all its queries against all its keys, under a mask that keeps the branches apart. A longer pair is cut into
blocks of queries that see no more keys than causality allows. Scores and softmax are in fp32 at least, as in flash
attention; nothing quadratic is kept for the backward. Query heads that share a key head are one product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WHOLE_PAIR = 384  # tokens of a pair up to which it is one block
BLOCK = 256  # queries of a block of a longer one


@dataclass(frozen=True)
class Block:
    """Queries and the keys that they may see, as slices of the row; and how they lie in their pair.

    marks: for queries and for keys their (branch [n], position [n]); branch 0 is the prefix, which all see.
    """

    rows: slice
    keys: tuple[slice, ...]
    marks: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]

    def visible(self, window: int | None, chunk: int | None) -> Tensor:
        """bool [queries, keys]: earlier keys of the prefix or the own branch, within the window or chunk."""
        (own, at), (branch, key_at) = self.marks
        own, at = own[:, None], at[:, None]
        keep = ((branch == 0) | (branch == own)) & (key_at <= at)
        if window is not None:
            keep &= key_at > at - window
        if chunk is not None:
            keep &= key_at // chunk == at // chunk
        return keep


def _marks(parts: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """Branches and positions of runs of tokens, each (branch, first position, length)."""
    return (
        torch.cat([torch.full((n,), branch) for branch, _, n in parts]),
        torch.cat([torch.arange(first, first + n) for _, first, n in parts]),
    )


def blocks(segments: Sequence[tuple[int, int, int]], window: int | None = None) -> Iterator[Block]:
    """The blocks of a row of pairs, each (prefix, chosen branch, rejected branch) tokens.

    Keys that a window hides from all queries of a block are left out.
    """
    start = 0
    for prefix, chosen, rejected in segments:
        first, second = start + prefix, start + prefix + chosen
        stop = second + rejected
        if stop - start <= WHOLE_PAIR:
            marks = _marks([(0, 0, prefix), (1, prefix, chosen), (2, prefix, rejected)])
            yield Block(slice(start, stop), (slice(start, stop),), (marks, marks))
        else:
            for at in range(start, second, BLOCK):
                yield _long_block(slice(at, min(at + BLOCK, second)), (), start, window)
            for at in range(second, stop, BLOCK):
                yield _long_block(slice(at, min(at + BLOCK, stop)), (start, first), second, window)
        start = stop


def _long_block(rows: slice, prefix: tuple[int, ...], begin: int, window: int | None) -> Block:
    """Queries `rows` of what begins at `begin`; before it in the sequence stands `prefix`, elsewhere in the row."""
    before = prefix[1] - prefix[0] if prefix else 0
    at, end = before + rows.start - begin, before + rows.stop - begin
    seen = 0 if window is None else max(0, at - window + 1)
    own = slice(begin + max(seen - before, 0), rows.stop)
    keys = (slice(prefix[0] + seen, prefix[1]), own) if seen < before else (own,)
    return Block(rows, keys, (_marks([(0, at, end - at)]), _marks([(0, seen, end - seen)])))


class _Plan:
    """The blocks of a row with their masks, ready for `groups` query heads to a key head."""

    def __init__(self, segments: Sequence[tuple[int, int, int]], window: int | None, chunk: int | None) -> None:
        self.blocks = [(block, block.visible(window, chunk)) for block in blocks(segments, window)]
        self.biases: dict[Any, list[Tensor]] = {}

    def each(self, groups: int, dtype: torch.dtype) -> Iterator[tuple[slice, tuple[slice, ...], Tensor]]:
        """(queries, keys, additive mask [groups * queries, keys]) of each block."""
        if (groups, dtype) not in self.biases:
            zeros = [torch.zeros(keep.shape, dtype=dtype).masked_fill_(~keep, float("-inf")) for _, keep in self.blocks]
            self.biases[groups, dtype] = [zero.repeat(groups, 1) for zero in zeros]
        for (block, _), bias in zip(self.blocks, self.biases[groups, dtype], strict=True):
            yield block.rows, block.keys, bias


def _take(x_HND: Tensor, keys: tuple[slice, ...]) -> Tensor:
    parts = [x_HND[:, part] for part in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _put(total_HND: Tensor, keys: tuple[slice, ...], d: Tensor) -> None:
    for part, piece in zip(keys, d.split([part.stop - part.start for part in keys], dim=1), strict=True):
        total_HND[:, part] += piece


def _grouped(x_HnD: Tensor, key_heads: int) -> Tensor:
    """[H, n, D] -> [key heads, H / key heads * n, D]."""
    return x_HnD.reshape(key_heads, -1, x_HnD.shape[-1])


def _probabilities(q_wide: Tensor, k_wide: Tensor, bias: Tensor, scale: float) -> Tensor:
    scores = torch.baddbmm(bias.expand(len(k_wide), -1, -1), q_wide, k_wide.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1)


class SegmentAttention(torch.autograd.Function):
    """query [H, N, D], key and value [K, N, D] -> [H, N, D], stored as [N, H, D]. `plan` is a `_Plan`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: _Plan, scale: float) -> Tensor:
        heads, wide = len(key), torch.promote_types(query.dtype, torch.float32)
        out_NHD = query.new_empty(query.shape[1], len(query), value.shape[2])
        with torch.autocast(query.device.type, enabled=False):  # it would take the scores to 16 bits
            q_wide, k_wide = query.to(wide), key.to(wide)
            for rows, keys, bias in plan.each(len(query) // heads, wide):
                probs = _probabilities(_grouped(q_wide[:, rows], heads), _take(k_wide, keys), bias, scale)
                part = torch.bmm(probs.to(value.dtype), _take(value, keys))
                out_NHD[rows] = part.view(len(query), -1, value.shape[2]).transpose(0, 1)
        ctx.save_for_backward(query, key, value)
        ctx.plan, ctx.scale = plan, scale
        return out_NHD.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value = ctx.saved_tensors
        heads, dtype, wide = len(key), query.dtype, torch.promote_types(query.dtype, torch.float32)
        q_wide, k_wide = query.to(wide), key.to(wide)
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        for rows, keys, bias in ctx.plan.each(len(query) // heads, wide):
            q, g = _grouped(query[:, rows], heads), _grouped(grad[:, rows], heads)
            k, v = _take(key, keys), _take(value, keys)
            probs = _probabilities(_grouped(q_wide[:, rows], heads), _take(k_wide, keys), bias, ctx.scale)
            _put(d_value, keys, torch.bmm(probs.to(dtype).transpose(1, 2), g))
            d_probs = torch.bmm(g, v.transpose(1, 2)).to(wide)
            d_scores = torch._softmax_backward_data(d_probs, probs, -1, wide).to(dtype)
            d_query[:, rows] = torch.bmm(d_scores, k).view(len(query), -1, key.shape[2])
            _put(d_key, keys, torch.bmm(d_scores.transpose(1, 2), q))
        return d_query.mul_(ctx.scale), d_key.mul_(ctx.scale).to(dtype), d_value.to(dtype), None, None


def segment_attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
    """Attention of a packed row; `mask` is a `preference.attention.PackedMask`, shapes as in `SegmentAttention`."""
    plan = mask.once("plan", lambda: _Plan(mask.layout["segments"], mask.window, mask.chunk))
    return SegmentAttention.apply(query, key, value, plan, scale)
