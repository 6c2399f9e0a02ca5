"""A short causal convolution over a packed row, each channel by itself, that keeps its input alone for the backward.

The row is laid out once more with every run behind the taps - 1 tokens that come before it (`Tree.tails`); then

    y_m = act(bias + sum over d of w_d x_m-d)

is a sum of shifted rows, taken in float32 over blocks that stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from preference.engine.states.tree import Tree, with_zeros

BLOCK = 2**18  # elements of a block: 1 MiB in float32

Activation = Callable[[Tensor], Tensor]


def _blocks(x_MC: Tensor, taps: int) -> Iterator[slice]:
    """Of the rows behind the first taps - 1."""
    size = max(1, BLOCK // x_MC.shape[1])
    for begin in range(taps - 1, len(x_MC), size):
        yield slice(begin, min(begin + size, len(x_MC)))


def _shifted(x: Tensor, taps: int) -> list[Tensor]:
    """The rows x_m-d, d from taps - 1 to 0, of a block that is given with the taps - 1 rows before it."""
    return [x[tap : len(x) - taps + 1 + tap] for tap in range(taps)]


def _behind(x_MC: Tensor, rows: slice, taps: int, dtype: torch.dtype) -> Tensor:
    return x_MC[rows.start - taps + 1 : rows.stop].to(dtype)


def _sum(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`_shifted` times weight [taps, C], and bias [C]."""
    parts = _shifted(x, len(weight))
    y = parts[-1] * weight[-1] if bias is None else torch.addcmul(bias, parts[-1], weight[-1])
    for part, w in zip(parts[:-1], weight, strict=False):
        y.addcmul_(part, w)
    return y


def _through(act: Activation, y: Tensor, grad: Tensor) -> Tensor:
    """The gradient of y from that of act(y)."""
    with torch.enable_grad():
        y = y.requires_grad_()
        return torch.autograd.grad(act(y), y, grad)[0]


class _Convolution(torch.autograd.Function):
    """x [N, C], weight [C, taps], bias [C] or None -> [N, C] in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, tree: Tree, act: Activation | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.tree, ctx.act, taps = tree, act, weight.shape[1]
        order, places = tree.tails(taps, x.device)
        x_MC, weight, bias = with_zeros(x).index_select(0, order), *_wide(x, weight, bias)
        y_MC = torch.empty_like(x_MC)
        for rows in _blocks(x_MC, taps):
            y = _sum(_behind(x_MC, rows, taps, weight.dtype), weight, bias)
            y_MC[rows] = y if act is None else act(y)
        return y_MC.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        weight, bias = _wide(x, *parameters)
        act, taps, dtype = ctx.act, len(weight), weight.dtype
        order, places = ctx.tree.tails(taps, x.device)
        x_MC = with_zeros(x).index_select(0, order)
        d_y_MC = torch.zeros_like(x_MC).index_copy_(0, places, grad)
        d_x_MC = torch.zeros_like(x_MC, dtype=dtype)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        for rows in _blocks(x_MC, taps):
            wide, d_y = _behind(x_MC, rows, taps, dtype), d_y_MC[rows].to(dtype)
            d_y = d_y if act is None else _through(act, _sum(wide, weight, bias), d_y)
            for part, w in zip(_shifted(d_x_MC[rows.start - taps + 1 : rows.stop], taps), weight, strict=True):
                part.addcmul_(d_y, w)
            if d_weight is not None:
                for part, d_w in zip(_shifted(wide, taps), d_weight, strict=True):
                    d_w += (part * d_y).sum(0)
            if d_bias is not None:
                d_bias += d_y.sum(0)
        d_x = x.new_empty(len(x) + 1, x.shape[1], dtype=dtype)
        torch.index_select(d_x_MC, 0, places, out=d_x[:-1])
        copies = ctx.tree.copies(taps, x.device)
        d_x.index_add_(0, order.index_select(0, copies), d_x_MC.index_select(0, copies))
        found = None if d_weight is None else d_weight.t(), d_bias
        whole = (d if d is None else d.to(p.dtype) for d, p in zip(found, parameters, strict=True))
        return d_x[:-1].to(x.dtype), *whole, None, None


def _wide(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight [taps, C] and bias in float32 at least; contiguous, or the operators below take an element at a time."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return weight.to(dtype).t().contiguous(), None if bias is None else bias.to(dtype)


def convolution(tree: Tree, x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation | None) -> Tensor:
    """The convolution of a packed row.

    Args:
        x: [1, N, C]; weight: [C, taps]; bias: [C]; act: works on each element.

    Returns:
        [1, N, C] in x's dtype.
    """
    return _Convolution.apply(x[0], weight, bias, tree, act)[None]
