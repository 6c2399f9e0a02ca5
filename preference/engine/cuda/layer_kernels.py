"""Triton kernels that go through a layer's numbers once: gated products and norms, and their operators.

As in kernels.py, each has an implementation in torch's own operators besides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from preference.engine.cuda.kernels import runs_triton

FLAT_BLOCK = 1024  # numbers that a program of an element-wise kernel handles


@triton.jit
def _silu_mul(gate, up, out, count, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul_backward(gate, up, grad, both, count, AGAIN: tl.constexpr, SIZE: tl.constexpr):
    """Gradients of gate, then of up. AGAIN: the product itself takes the place of its gradient."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    slope = share * (1 + g * (1 - share))
    tl.store(both + at, (d * u * slope).to(both.dtype.element_ty), mask=inside)
    tl.store(both + count + at, (d * g * share).to(both.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(grad + at, (g * share * u).to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm(x, y, weight, total, normed, scales, width, epsilon, SIZE: tl.constexpr):
    """One program a row: the sum of x and y, and what a root-mean-square norm makes of it."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SIZE)
    inside = lanes < width
    at = row * width + lanes
    sum_xy = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    sum_xy += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    rounded = sum_xy.to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=inside)
    wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + epsilon)
    tl.store(scales + row, scale)
    w = tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, (wide * scale * w).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _norm_add_backward(grad, beside, x, weight, scales, out, width, SIZE: tl.constexpr):
    """One program a row: the gradient of a norm's input, with what reaches that input beside the norm."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SIZE)
    inside = lanes < width
    at = row * width + lanes
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    d *= tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scales + row)
    pull = tl.sum(d * value, 0) * scale * scale * scale / width
    other = tl.load(beside + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (other + d * scale - value * pull).to(out.dtype.element_ty), mask=inside)


def _along(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), FLAT_BLOCK),)


@torch.library.custom_op("preference::silu_mul", mutates_args=())
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in float32 and rounded once."""
    gate, up = gate.contiguous(), up.contiguous()
    if not runs_triton(gate):
        return F.silu(gate) * up
    out = torch.empty_like(gate)
    _silu_mul[_along(gate)](gate, up, out, gate.numel(), SIZE=FLAT_BLOCK, num_warps=4)
    return out


@silu_mul.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("preference::silu_mul_backward", mutates_args=())
def silu_mul_backward(gate: Tensor, up: Tensor, grad: Tensor) -> Tensor:
    """The gradients of `silu_mul` in gate and up, one behind the other: [2, ...]."""
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    if not runs_triton(gate):
        return torch.stack([torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate) * grad])
    both = gate.new_empty((2, *gate.shape))
    _silu_mul_backward[_along(gate)](gate, up, grad, both, gate.numel(), AGAIN=False, SIZE=FLAT_BLOCK, num_warps=4)
    return both


@torch.library.custom_op("preference::silu_mul_finish", mutates_args={"grad"})
def silu_mul_finish(gate: Tensor, up: Tensor, grad: Tensor) -> Tensor:
    """`silu_mul_backward`, after which `grad`, which is contiguous, holds the product silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    if not runs_triton(gate):
        both = torch.stack([torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate) * grad])
        grad.copy_(F.silu(gate) * up)
        return both
    both = gate.new_empty((2, *gate.shape))
    _silu_mul_backward[_along(gate)](gate, up, grad, both, gate.numel(), AGAIN=True, SIZE=FLAT_BLOCK, num_warps=4)
    return both


@silu_mul_backward.register_fake
@silu_mul_finish.register_fake
def _(gate: Tensor, up: Tensor, grad: Tensor) -> Tensor:
    return gate.new_empty((2, *gate.shape))


def warps(size: int) -> int:
    """Of a program for a whole row of that many numbers."""
    return 4 if size <= 2048 else 8 if size <= 8192 else 16


def _row(width: int) -> dict[str, int]:
    size = triton.next_power_of_2(width)
    return {"SIZE": size, "num_warps": warps(size)}


@torch.library.custom_op("preference::add_norm", mutates_args=())
def add_norm(x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + y, all [N, D]; its root-mean-square norm; and the scale of each row, [N, 1] in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if not runs_triton(x):
        total = x + y
        scale = torch.rsqrt(total.to(wide).square().mean(-1, keepdim=True) + epsilon)
        return total, (total.to(wide) * scale * weight.to(wide)).to(x.dtype), scale
    x, y = x.contiguous(), y.contiguous()
    total, normed, scale = torch.empty_like(x), torch.empty_like(x), x.new_empty((len(x), 1), dtype=wide)
    width = x.shape[1]
    _add_norm[(len(x),)](x, y, weight, total, normed, scale, width, epsilon, **_row(width))
    return total, normed, scale


@add_norm.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty((len(x), 1), dtype=wide)


@torch.library.custom_op("preference::norm_add_backward", mutates_args=())
def norm_add_backward(grad: Tensor, beside: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x [N, D], which a norm of that `scale` [N, 1] reads: through the norm, and `beside` it."""
    if not runs_triton(x):
        wide = scale.dtype
        d, value = grad.to(wide) * weight.to(wide), x.to(wide)
        pull = (d * value).mean(-1, keepdim=True) * scale**3
        return (beside.to(wide) + d * scale - value * pull).to(x.dtype)
    grad, beside, x = grad.contiguous(), beside.contiguous(), x.contiguous()
    out, width = torch.empty_like(x), x.shape[1]
    _norm_add_backward[(len(x),)](grad, beside, x, weight, scale, out, width, **_row(width))
    return out


@norm_add_backward.register_fake
def _(grad: Tensor, beside: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape)
