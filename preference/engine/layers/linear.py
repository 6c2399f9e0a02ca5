"""Linear layers that keep less for the backward, with less casting under autocast.

Autocast casts the input anew for every layer that reads it (query, key and value; gate and up) and keeps each copy for
the backward, and it keeps the cast weights until then too. Here layers that read the same tensor share its cast, and a
trained weight is cast again in the backward: the same products, the same numbers, less memory. An input that can be
made again (engine/layers/gated.py) is not kept.
"""

from __future__ import annotations

import types
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from preference.engine.layers.gated import make_again, product_step

PLAIN = (nn.Parameter, Tensor, FakeTensor)  # types of weights that are what they look like; a dry run's are fake


class _LastCast:
    """Remembers the last tensor that was cast: layers that read the same one run in turn."""

    def __init__(self) -> None:
        self._empty()

    def _empty(self) -> None:
        self.source: Any = lambda: None
        self.version, self.result = -1, torch.empty(0)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype:
            return x.detach()
        if self.source() is not x or self.version != x._version or self.result.dtype != dtype:
            self.source = weakref.ref(x, lambda gone: self._empty() if gone is self.source else None)
            self.version, self.result = x._version, x.detach().to(dtype)
        return self.result


cast_once = _LastCast()


class _Linear(torch.autograd.Function):
    """x [..., I], weight [O, I], bias [O] or None -> [..., O] in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        x_NI, weight_OI = cast_once(x, dtype).reshape(-1, x.shape[-1]), weight.to(dtype)
        y_NO = torch.mm(x_NI, weight_OI.t()) if bias is None else torch.addmm(bias.to(dtype), x_NI, weight_OI.t())
        ctx.step, ctx.dtype = product_step(x), dtype
        ctx.save_for_backward(x_NI if ctx.step is None else None, weight)
        ctx.shape, ctx.x_dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1]).to(ctx.dtype)
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = torch.mm(grad_NO, weight.to(ctx.dtype)).view(ctx.shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            x_NI = rows_again(ctx) if x_NI is None else x_NI
            d_weight = torch.mm(grad_NO.t(), x_NI).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = grad_NO.sum(0, dtype=ctx.bias_dtype)
        return d_x, d_weight, d_bias, None


def rows_again(ctx: Any) -> Tensor:
    """The input [N, I] of a layer that kept the step that makes it in its place, in the dtype of its products."""
    return make_again(ctx.step).to(ctx.dtype).reshape(-1, ctx.shape[-1])


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    autocast = torch.is_autocast_enabled(x.device.type)
    plain = torch.is_grad_enabled() and type(self.weight) in PLAIN
    if not plain or not (autocast or product_step(x)):
        return type(self).forward(self, x)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else self.weight.dtype
    return _Linear.apply(x, self.weight, self.bias, dtype)


def save_memory_in_linear_layers(model: PreTrainedModel) -> None:
    """Let the plain linear layers of `model` whose weights are trained run as above.

    The head is left out: it has a function of its own (engine/head.py).
    """
    for layer in model.modules():
        plain = type(layer) is nn.Linear and layer.weight.requires_grad and "forward" not in vars(layer)
        if plain and layer is not model.get_output_embeddings():
            layer.forward = types.MethodType(_forward, layer)
