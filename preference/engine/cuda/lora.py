"""A linear layer and its LoRA adapter as one step of autograd, in the fewest products that a GPU can do it with.

The arithmetic is that of engine/layers/lora.py. The adapter's scale is a factor of products that are made anyway, and
gradients of float32 adapters are summed and written in float32 by the products themselves.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from preference.engine.layers.gated import finish, product_step
from preference.engine.layers.linear import PLAIN, cast_once
from preference.engine.layers.lora import adapted_forward, joined


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, summed in float32."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if dtype == torch.float32 and a.device.type == "cuda" and writes_float32("mm"):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


@functools.cache
def writes_float32(product: str) -> bool:
    """Whether this torch's mm or bmm of 16 bits can write float32."""
    return "dtype" in getattr(torch.ops.aten, product).overloads()


def scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b in one product."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`: what `cast_adapters` made of it, unless it has changed since."""
    version, kept = getattr(weight, "packed_cast", (-1, weight))
    return kept if version == weight._version and kept.dtype == dtype else weight.detach().to(dtype)


def _weights(model: nn.Module) -> list[Tensor]:
    """A and B of all adapters. Those of layers that run as one step (siblings.py) stand one behind another."""
    groups: dict[int, list[LoraLinear]] = {}
    for layer in joined(model):
        groups.setdefault(id(getattr(layer, "packed_group", layer)), []).append(layer)
    parts = [[getattr(layer, name) for layer in group] for group in groups.values() for name in ("lora_A", "lora_B")]
    return [adapter.weight for part in parts for of_layer in part for adapter in of_layer.values()]


def cast_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all adapters of `model` at once, so that their layers find them cast: a launch instead of one for each."""
    weights = _weights(model)
    stale = [w for w in weights if type(w) in PLAIN and getattr(w, "packed_cast", (-1,))[0] != w._version]
    stale = [w for w in stale if w.dtype != dtype]
    if not stale:
        return
    flat = torch.empty(sum(w.numel() for w in stale), dtype=dtype, device=stale[0].device)
    parts = [part.view(w.shape) for part, w in zip(flat.split([w.numel() for w in stale]), stale, strict=True)]
    torch._foreach_copy_(parts, [w.detach() for w in stale])
    for weight, part in zip(stale, parts, strict=True):
        weight.packed_cast = (weight._version, part)


class Adapted(torch.autograd.Function):
    """x [..., I], frozen weight [O, I] and bias [O] or None, A [R, I], B [O, R] -> [..., O] in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, a, b, scale, dtype):
        x_NI = cast_once(x, dtype).reshape(-1, x.shape[-1])
        weight_OI, a_RI, b_OR = weight.detach().to(dtype), cast(a, dtype), cast(b, dtype)
        h_NR = scaled(x_NI, a_RI.t(), scale)
        y_NO = torch.mm(x_NI, weight_OI.t()) if bias is None else torch.addmm(bias.to(dtype), x_NI, weight_OI.t())
        y_NO.addmm_(h_NR, b_OR.t())
        ctx.step, ctx.dtype = product_step(x), dtype
        ctx.save_for_backward(x_NI if ctx.step is None else None, h_NR, weight_OI, a_RI, b_OR)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (x.dtype, a.dtype, b.dtype)
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        x_NI, h_NR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        x_dtype, a_dtype, b_dtype = ctx.dtypes
        grad_NO = grad.reshape(-1, grad.shape[-1]).to(ctx.dtype)
        g_NR = scaled(grad_NO, b_OR, ctx.scale)
        d_x = d_a = d_b = None
        if ctx.needs_input_grad[4]:
            d_b = wide_product(grad_NO.t(), h_NR, b_dtype)
        if ctx.needs_input_grad[3] and x_NI is not None:
            d_a, x_NI = wide_product(g_NR.t(), x_NI, a_dtype), None  # before as much is taken for its gradient
        if ctx.needs_input_grad[0]:
            d_x = torch.mm(grad_NO, weight_OI).addmm_(g_NR, a_RI).view(ctx.shape).to(x_dtype)
        if ctx.needs_input_grad[3] and d_a is None:  # the step that made x needs nothing more of its gradient then
            x_NI = finish(ctx.step, d_x).reshape(len(grad_NO), -1).to(ctx.dtype)
            d_a = wide_product(g_NR.t(), x_NI, a_dtype)
        return d_x, None, None, d_a, d_b, None, None


def join_adapters(model: nn.Module) -> int:
    """Let every LoRA layer over a plain linear one run as one step, where that is the same; returns how many."""
    layers = joined(model)
    for layer in layers:
        layer.packed_adapter = True
        layer.forward = types.MethodType(functools.partial(adapted_forward, Adapted), layer)
    return len(layers)
