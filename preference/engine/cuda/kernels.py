"""Triton kernels, and the operators that torch sees of them.

Each operator has an implementation in torch's own operators besides, which serves where Triton does not (cards older
than it knows) and says what the kernel computes.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from preference.engine import exp_rows as plain

BLOCK = 4096  # logits that a program of `_exp_rows` handles at once
FLAT_BLOCK = 1024  # numbers that a program of an element-wise kernel handles
ROTARY_HEADS = 16  # heads of a token that a program of `_rotate` handles at most
SUM_BLOCK = 512  # numbers of a key that a program of `_sum_uses` handles
TRITON_CAPABILITY = (7, 5)


@functools.cache
def _knows(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= TRITON_CAPABILITY


def _runs_triton(x: Tensor) -> bool:
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
def _sum_uses(parts, order, starts, out, width, SIZE: tl.constexpr):
    """One program a key and a part of its width: the rows of `parts` that are its uses, summed in float32."""
    key = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = lanes < width
    total = tl.zeros((SIZE,), tl.float32)
    for use in range(tl.load(starts + key), tl.load(starts + key + 1)):
        row = tl.load(order + use).to(tl.int64)
        total += tl.load(parts + row * width + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + key * width + lanes, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul(gate, up, out, count, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul_backward(gate, up, grad, d_gate, d_up, count, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    slope = share * (1 + g * (1 - share))
    tl.store(d_gate + at, (d * u * slope).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + at, (d * g * share).to(d_up.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    x,
    token_stride,
    head_stride,
    cos,
    sin,
    out,
    heads,
    half,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """One program a token and a block of heads. `half` numbers of a head are turned against the other half."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
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


@torch.library.custom_op("preference::exp_rows", mutates_args={"logits"})
def exp_rows(logits: Tensor, ids: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `engine.exp_rows.exp_rows`."""
    if not _runs_triton(logits):
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


@torch.library.custom_op("preference::sum_uses", mutates_args=())
def sum_uses(parts: Tensor, key_at: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Sums of the rows of `parts` [M, K, D] that belong to the same key, [N, K, D], in float32 and rounded once.

    Args:
        key_at: the key of each row, [M].
        order, starts: the rows of each key in turn, [M], and where each key's begin, [N + 1].
    """
    shape = (len(starts) - 1, *parts.shape[1:])
    parts = parts.contiguous()
    if not _runs_triton(parts):
        total = parts.new_zeros(shape, dtype=torch.promote_types(parts.dtype, torch.float32))
        return total.index_add_(0, key_at, parts.to(total.dtype)).to(parts.dtype)
    out = parts.new_empty(shape)
    width = out[0].numel()
    _sum_uses[(len(out), triton.cdiv(width, SUM_BLOCK))](parts, order, starts, out, width, SIZE=SUM_BLOCK, num_warps=4)
    return out


@sum_uses.register_fake
def _(parts: Tensor, key_at: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return parts.new_empty((len(starts) - 1, *parts.shape[1:]))


def _along(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), FLAT_BLOCK),)


@torch.library.custom_op("preference::silu_mul", mutates_args=())
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in float32 and rounded once."""
    gate, up = gate.contiguous(), up.contiguous()
    if not _runs_triton(gate):
        return F.silu(gate) * up
    out = torch.empty_like(gate)
    _silu_mul[_along(gate)](gate, up, out, gate.numel(), SIZE=FLAT_BLOCK, num_warps=4)
    return out


@silu_mul.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("preference::silu_mul_backward", mutates_args=())
def silu_mul_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `silu_mul` in gate and up."""
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    if not _runs_triton(gate):
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate) * grad
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _silu_mul_backward[_along(gate)](gate, up, grad, d_gate, d_up, gate.numel(), SIZE=FLAT_BLOCK, num_warps=4)
    return d_gate, d_up


@silu_mul_backward.register_fake
def _(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


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
def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """`turned` in one kernel: x [N, H, D], whose heads may lie anywhere, cos and sin [N, D] -> [N, H, D]."""
    if not _runs_triton(x):
        return turned(x, cos, sin, back).contiguous()
    x = x if x.stride(-1) == 1 else x.contiguous()
    tokens, heads, size = x.shape
    out = x.new_empty(x.shape)
    block = min(triton.next_power_of_2(heads), ROTARY_HEADS)
    _rotate[(tokens, triton.cdiv(heads, block))](
        x, x.stride(0), x.stride(1), cos.contiguous(), sin.contiguous(), out, heads, size // 2, BACK=back,
        HEADS=block, HALF=triton.next_power_of_2(size // 2), num_warps=4,
    )  # fmt: skip
    return out


@rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape)
