"""Attention over the branches of a packed row on a CPU, as batched matrix products.

torch's flash kernel is slow here for short sequences, most of all its backward (in bfloat16 nine times slower than the
products that it consists of), and a call for each branch spends more on calls than on numbers. So neighbouring short
branches are one block: all their queries against all that any of them sees, under a mask that keeps them apart. A
longer branch is cut into blocks of queries that see no more keys than causality allows. Scores and softmax are in fp32
at least, as in flash attention. Query heads that share a key head are one product.

The probabilities are kept for the backward in 16 bits: computing them again takes a third of its time, as the products
of scores are in fp32. In fp32 they would be twice as large and save a sixth; there nothing quadratic is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

WHOLE = 256  # keys up to which neighbouring branches are one block
BLOCK = 128  # queries of a block of a longer branch


class _Plan:
    """The blocks of a packed row (engine/packing.py) with their masks.

    Args:
        layout: a packed batch; of it segments, position_offsets and branches are read.
        window, chunk: as in `preference.engine.attention.PackedMask`.
    """

    def __init__(self, layout: Mapping[str, Any], window: int | None, chunk: int | None) -> None:
        self.sizes, self.branches = layout["segments"], layout["branches"]
        self.position_offsets = layout["position_offsets"]
        self.starts = [0, *accumulate(self.sizes)]
        self.window, self.chunk = window, chunk
        self.blocks = list(self._blocks())
        self.biases: dict[Any, list[Tensor]] = {}

    def _blocks(self) -> Iterator[tuple[slice, tuple[slice, ...]]]:
        """(queries, keys) of each block, as slices of the row."""
        first = 0
        while first < len(self.branches):
            last = first + 1
            while last < len(self.branches) and self._keys(first, last + 1) <= WHOLE:
                last += 1
            start, stop = self.starts[self.branches[first][0]], self.starts[self.branches[last - 1][1]]
            step = stop - start if self._keys(first, last) <= WHOLE else BLOCK
            for at in range(start, stop, step):
                yield self._block(at, min(at + step, stop), self._seen(first, last))
            first = last

    def _seen(self, first: int, last: int) -> list[int]:
        """The segments that branches `first` to `last` - 1 see."""
        own = range(self.branches[first][0], self.branches[last - 1][1])
        return sorted({segment for *_, before in self.branches[first:last] for segment in before}.union(own))

    def _keys(self, first: int, last: int) -> int:
        return sum(self.sizes[segment] for segment in self._seen(first, last))

    def _block(self, start: int, stop: int, seen: Sequence[int]) -> tuple[slice, tuple[slice, ...]]:
        """Queries `start` to `stop` and, of the segments that they may see, the keys left by causality and window."""
        own = [segment for segment in seen if self.starts[segment] < stop and self.starts[segment + 1] > start]
        earliest = min(self.position_offsets[segment] + max(0, start - self.starts[segment]) for segment in own)
        oldest = 0 if self.window is None else earliest - self.window + 1
        keys: list[slice] = []
        for segment in seen:
            begin = self.starts[segment] + max(0, oldest - self.position_offsets[segment])
            end = min(self.starts[segment + 1], stop)
            if begin < end and keys and begin == keys[-1].stop:
                keys[-1] = slice(keys[-1].start, end)
            elif begin < end:
                keys.append(slice(begin, end))
        return slice(start, stop), tuple(keys)

    def _visible(self) -> Iterator[Tensor]:
        """bool [queries, keys] of each block: what the query's branch sees, no later and within the window or chunk."""
        sees = torch.zeros(len(self.branches), len(self.sizes), dtype=torch.bool)
        for number, _ in enumerate(self.branches):
            sees[number, self._seen(number, number + 1)] = True
        run_of = torch.cat([torch.full((size,), segment) for segment, size in enumerate(self.sizes)])
        position = torch.cat([torch.arange(b, b + n) for b, n in zip(self.position_offsets, self.sizes, strict=True)])
        lengths = [self.starts[last] - self.starts[first] for first, last, _ in self.branches]
        chain_of = torch.cat([torch.full((size,), number) for number, size in enumerate(lengths)])
        for rows, keys in self.blocks:
            key = torch.cat([torch.arange(part.start, part.stop) for part in keys])
            query = torch.arange(rows.start, rows.stop)[:, None]
            keep = sees[chain_of[rows]][:, run_of[key]] & (key <= query)
            at, key_at = position[rows, None], position[key]
            if self.window is not None:
                keep &= key_at > at - self.window
            if self.chunk is not None:
                keep &= key_at // self.chunk == at // self.chunk
            yield keep

    def each(self, groups: int, dtype: torch.dtype) -> Iterator[tuple[slice, tuple[slice, ...], Tensor]]:
        """(queries, keys, additive mask [groups * queries, keys]) of each block."""
        if (groups, dtype) not in self.biases:
            zeros = [
                torch.zeros(keep.shape, dtype=dtype).masked_fill_(~keep, float("-inf")) for keep in self._visible()
            ]
            self.biases[groups, dtype] = [zero.repeat(groups, 1) for zero in zeros]
        for (rows, keys), bias in zip(self.blocks, self.biases[groups, dtype], strict=True):
            yield rows, keys, bias


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
        kept = []
        with torch.autocast(query.device.type, enabled=False):  # it would take the scores to 16 bits
            q_wide, k_wide = query.to(wide), key.to(wide)
            for rows, keys, bias in plan.each(len(query) // heads, wide):
                probs = _probabilities(_grouped(q_wide[:, rows], heads), _take(k_wide, keys), bias, scale)
                if value.dtype != wide:
                    probs = probs.to(value.dtype)
                    kept.append(probs)
                part = torch.bmm(probs, _take(value, keys))
                out_NHD[rows] = part.view(len(query), -1, value.shape[2]).transpose(0, 1)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.plan, ctx.scale = plan, scale
        return out_NHD.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, *kept = ctx.saved_tensors
        heads, dtype, wide = len(key), query.dtype, torch.promote_types(query.dtype, torch.float32)
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        for i, (rows, keys, bias) in enumerate(ctx.plan.each(len(query) // heads, wide)):
            q, g = _grouped(query[:, rows], heads), _grouped(grad[:, rows], heads)
            k, v = _take(key, keys), _take(value, keys)
            probs = kept[i] if kept else _probabilities(q, k, bias, ctx.scale)
            _put(d_value, keys, torch.bmm(probs.transpose(1, 2), g))
            d_probs = torch.bmm(g, v.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_probs, probs, -1, dtype)  # 16 bits are widened inside
            d_query[:, rows] = torch.bmm(d_scores, k).view(len(query), -1, key.shape[2])
            _put(d_key, keys, torch.bmm(d_scores.transpose(1, 2), q))
        return d_query.mul_(ctx.scale), d_key.mul_(ctx.scale).to(dtype), d_value.to(dtype), None, None


def segment_attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
    """Attention of a packed row; `mask` is an `engine.attention.PackedMask`, shapes as in `SegmentAttention`."""
    plan = mask.once("plan", lambda: _Plan(mask.layout, mask.window, mask.chunk))
    return SegmentAttention.apply(query, key, value, plan, scale)
