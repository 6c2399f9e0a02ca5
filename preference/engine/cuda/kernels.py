"""Triton kernels of the head and of attention, and the operators that torch sees of them.

Each operator has an implementation in torch's own operators besides, which serves where Triton does not (cards older
than it knows) and says what the kernel computes.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from preference.engine import exp_rows as plain

BLOCK = 4096  # logits that a program of `_exp_rows` handles at once
ROTARY_HEADS = 16  # heads of a token that a program of `_rotate` handles at most
SUM_BLOCK = 512  # numbers of a key that a program of `_sum_uses` handles
TRITON_CAPABILITY = (7, 5)


@functools.cache
def _knows(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= TRITON_CAPABILITY


def runs_triton(x: Tensor) -> bool:
    """Whether the kernels, which compute in float32, are for this tensor and its device."""
    return x.dtype != torch.float64 and _knows(x.device)


@triton.jit
def _exp_rows(
    logits, row_stride, ids, logps, sums, slopes, columns, scale, cap, CAPPED: tl.constexpr, SIZE: tl.constexpr
):
    """One program a row: its maximum and sum in one pass (Milakov and Gimelshein 2018, arXiv 1805.02867), then E."""
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * row_stride
    lanes = tl.arange(0, SIZE)
    top = tl.full((SIZE,), float("-inf"), tl.float32)
    total = tl.zeros((SIZE,), tl.float32)
    for at in range(0, columns, SIZE):
        inside = at + lanes < columns
        x = tl.load(start + at + lanes, mask=inside, other=0.0).to(tl.float32) * scale
        if CAPPED:
            x = cap * (2 * tl.sigmoid(2 * x / cap) - 1)
        x = tl.where(inside, x, float("-inf"))
        higher = tl.maximum(top, x)
        # A lane that has seen nothing yet holds -inf, and -inf - -inf is no number.
        total = tl.where(higher == float("-inf"), 0.0, total * tl.exp(top - higher) + tl.exp(x - higher))
        top = higher
    most = tl.max(top, 0)
    sum_exp = tl.sum(total * tl.exp(top - most), 0)
    target = tl.load(start + tl.load(ids + row)).to(tl.float32) * scale
    slope = 1.0
    if CAPPED:
        bent = 2 * tl.sigmoid(2 * target / cap) - 1
        target = cap * bent
        slope = 1 - bent * bent
    tl.store(logps + row, target - most - tl.log(sum_exp))
    tl.store(sums + row, sum_exp)
    tl.store(slopes + row, slope)
    tl.debug_barrier()  # every thread has read the target before it is overwritten
    for at in range(0, columns, SIZE):
        inside = at + lanes < columns
        x = tl.load(start + at + lanes, mask=inside, other=0.0).to(tl.float32) * scale
        if CAPPED:
            curve = 2 * tl.sigmoid(2 * x / cap) - 1
            e = tl.exp(cap * curve - most) * (1 - curve * curve)
        else:
            e = tl.exp(x - most)
        tl.store(start + at + lanes, e.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _gather(first, second, rows, first_out, second_out, width, SIZE: tl.constexpr):
    """One program a row of the outputs and a part of its width, of one of the two tensors."""
    to = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = lanes < width
    row = tl.load(rows + to).to(tl.int64)
    if tl.program_id(2) == 0:
        x = tl.load(first + row * width + lanes, mask=inside, other=0.0)
        tl.store(first_out + to * width + lanes, x, mask=inside)
    else:
        x = tl.load(second + row * width + lanes, mask=inside, other=0.0)
        tl.store(second_out + to * width + lanes, x, mask=inside)


@triton.jit
def _add_up(parts, order, begin, end, out, key, width, lanes):
    inside = lanes < width
    total = tl.zeros(lanes.shape, tl.float32)
    for use in range(begin, end):
        row = tl.load(order + use).to(tl.int64)
        total += tl.load(parts + row * width + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + key * width + lanes, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_uses(first, second, order, starts, first_out, second_out, width, SIZE: tl.constexpr):
    """One program a key and a part of its width, of one of the two tensors: its uses, summed in float32."""
    key = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    begin, end = tl.load(starts + key), tl.load(starts + key + 1)
    if tl.program_id(2) == 0:
        _add_up(first, order, begin, end, first_out, key, width, lanes)
    else:
        _add_up(second, order, begin, end, second_out, key, width, lanes)


@triton.jit
def _turn(x, token_stride, head_stride, cos, sin, out, token, head, heads, half,
          BACK: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    lane = tl.arange(0, HALF)
    inside = (head[:, None] < heads) & (lane[None, :] < half)
    start = x + token * token_stride + head[:, None] * head_stride + lane[None, :]
    first = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(start + half, mask=inside, other=0.0).to(tl.float32)
    at = token * 2 * half + lane
    cos_first = tl.load(cos + at, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + at + half, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin + at, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + at + half, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    if BACK:
        out_first = first * cos_first + second * sin_second
        out_second = second * cos_second - first * sin_first
    else:
        out_first = first * cos_first - second * sin_first
        out_second = second * cos_second + first * sin_second
    to = out + (token * heads + head[:, None]) * 2 * half + lane[None, :]
    tl.store(to, out_first.to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, out_second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(query, query_token_stride, query_head_stride, key, key_token_stride, key_head_stride, cos, sin,
            query_out, key_out, query_heads, key_heads, query_blocks, half,
            BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """One program a token and a block of heads. `half` numbers of a head are turned against the other half."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.arange(0, HEADS)
    if block < query_blocks:
        _turn(query, query_token_stride, query_head_stride, cos, sin, query_out, token, block * HEADS + head,
              query_heads, half, BACK, HALF)  # fmt: skip
    else:
        _turn(key, key_token_stride, key_head_stride, cos, sin, key_out, token, (block - query_blocks) * HEADS + head,
              key_heads, half, BACK, HALF)  # fmt: skip


@torch.library.custom_op("preference::exp_rows", mutates_args={"logits"})
def exp_rows(logits: Tensor, ids: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `engine.exp_rows.exp_rows`."""
    if not runs_triton(logits):
        return plain.exp_rows(logits, ids, scale, cap)
    logps, sums, slopes = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3))
    _exp_rows[(len(logits),)](
        logits, logits.stride(0), ids, logps, sums, slopes, logits.shape[1], scale, cap or 1.0,
        CAPPED=cap is not None, SIZE=BLOCK, num_warps=8,
    )  # fmt: skip
    return logps, sums, slopes


@exp_rows.register_fake
def _(logits: Tensor, ids: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return tuple(logits.new_empty(len(logits), dtype=wide) for _ in range(3))


def _two(x: Tensor, size: int) -> tuple[int, int, int]:
    """Programs for rows of two tensors like x."""
    return size, triton.cdiv(x[0].numel(), SUM_BLOCK), 2


@torch.library.custom_op("preference::gather", mutates_args=())
def gather(key: Tensor, value: Tensor, key_at: Tensor) -> tuple[Tensor, Tensor]:
    """The rows `key_at` [M] of key and value, both [N, K, D]."""
    if not runs_triton(key):
        return key[key_at], value[key_at]
    key, value = key.contiguous(), value.contiguous()
    keys, values = (key.new_empty((len(key_at), *key.shape[1:])) for _ in range(2))
    width = key[0].numel()
    _gather[_two(key, len(key_at))](key, value, key_at, keys, values, width, SIZE=SUM_BLOCK, num_warps=4)
    return keys, values


@gather.register_fake
def _(key: Tensor, value: Tensor, key_at: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty((len(key_at), *x.shape[1:])) for x in (key, value))


@torch.library.custom_op("preference::sum_uses", mutates_args=())
def sum_uses(d_keys: Tensor, d_values: Tensor, key_at: Tensor, order: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the rows that belong to the same key, of both [M, K, D] -> [N, K, D], in float32 and rounded once.

    Args:
        key_at: the key of each row, [M].
        order, starts: the rows of each key in turn, [M], and where each key's begin, [N + 1].
    """
    shape = (len(starts) - 1, *d_keys.shape[1:])
    if not runs_triton(d_keys):
        zeros = d_keys.new_zeros(shape, dtype=torch.promote_types(d_keys.dtype, torch.float32))
        return tuple(zeros.index_add(0, key_at, x.to(zeros.dtype)).to(x.dtype) for x in (d_keys, d_values))
    d_keys, d_values = d_keys.contiguous(), d_values.contiguous()
    key, value = d_keys.new_empty(shape), d_keys.new_empty(shape)
    width = d_keys[0].numel()
    grid = _two(d_keys, len(key))
    _sum_uses[grid](d_keys, d_values, order, starts, key, value, width, SIZE=SUM_BLOCK, num_warps=4)
    return key, value


@sum_uses.register_fake
def _(d_keys: Tensor, d_values: Tensor, key_at: Tensor, order: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty((len(starts) - 1, *x.shape[1:])) for x in (d_keys, d_values))


def turned(x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor, back: bool) -> Tensor:
    """Halves of each head turned against each other; `back`: the gradient's way."""
    wide = torch.promote_types(x_NHD.dtype, torch.float32)
    x, cos, sin = x_NHD.to(wide), cos_ND.to(wide)[:, None], sin_ND.to(wide)[:, None]
    if back:
        first, second = (x * sin).chunk(2, -1)
        return (x * cos + torch.cat([second, -first], -1)).to(x_NHD.dtype)
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x_NHD.dtype)


@torch.library.custom_op("preference::rotate", mutates_args=())
def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """`turned` for both: query [N, H, D], key [N, K, D], whose heads may lie anywhere; cos and sin [N, D]."""
    if not runs_triton(query):
        return turned(query, cos, sin, back).contiguous(), turned(key, cos, sin, back).contiguous()
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    tokens, heads, size = query.shape
    outs = query.new_empty(query.shape), key.new_empty(key.shape)
    block = min(triton.next_power_of_2(heads), ROTARY_HEADS)
    blocks = [triton.cdiv(x.shape[1], block) for x in (query, key)]
    _rotate[(tokens, sum(blocks))](
        query, query.stride(0), query.stride(1), key, key.stride(0), key.stride(1), cos.contiguous(), sin.contiguous(),
        *outs, heads, key.shape[1], blocks[0], size // 2, BACK=back, HEADS=block,
        HALF=triton.next_power_of_2(size // 2), num_warps=4,
    )  # fmt: skip
    return outs


@rotate.register_fake
def _(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)
