"""A linear layer and its LoRA adapter as one step of autograd.

PEFT computes x W^T, then casts x again, multiplies by A and B, scales, and adds: under autocast three casts of x for
query, key and value alone, and two passes over the output besides the products. Here x is cast once for all layers
that read it, the adapter's product is added while it is written (addmm), and the backward does the same:

    h = x A^T,  y = x W^T + s h B^T        g = s dy B,  dx = dy W + g A,  dA = g^T x,  dB = s dy^T h

The numbers are those of Hu et al. 2021 (arXiv 2106.09685), eq. 3, rounded once where PEFT rounds three times.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from preference.engine.layers.gated import product_step
from preference.engine.layers.linear import PLAIN, cast_once, rows_again


class _Adapted(torch.autograd.Function):
    """x [..., I], frozen weight [O, I] and bias [O] or None, A [R, I], B [O, R] -> [..., O] in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, a, b, scale, dtype):
        x_NI = cast_once(x, dtype).reshape(-1, x.shape[-1])
        weight_OI, a_RI, b_OR = (w.detach().to(dtype) for w in (weight, a, b))
        h_NR = torch.mm(x_NI, a_RI.t())
        y_NO = torch.mm(x_NI, weight_OI.t()) if bias is None else torch.addmm(bias.to(dtype), x_NI, weight_OI.t())
        y_NO.addmm_(h_NR, b_OR.t(), alpha=scale)
        ctx.step, ctx.dtype = product_step(x), dtype
        ctx.save_for_backward(x_NI if ctx.step is None else None, h_NR, weight_OI, a_RI, b_OR)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (x.dtype, a.dtype, b.dtype)
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        x_NI, h_NR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        x_dtype, a_dtype, b_dtype = ctx.dtypes
        grad_NO = grad.reshape(-1, grad.shape[-1]).to(ctx.dtype)
        g_NR = torch.mm(grad_NO, b_OR).mul_(ctx.scale)
        d_x = d_a = d_b = None
        if ctx.needs_input_grad[0]:
            d_x = torch.mm(grad_NO, weight_OI).addmm_(g_NR, a_RI).view(ctx.shape).to(x_dtype)
        if ctx.needs_input_grad[3]:
            x_NI = rows_again(ctx) if x_NI is None else x_NI
            d_a = torch.mm(g_NR.t(), x_NI).to(a_dtype)
        if ctx.needs_input_grad[4]:
            d_b = torch.mm(grad_NO.t(), h_NR).mul_(ctx.scale).to(b_dtype)
        return d_x, None, None, d_a, d_b, None, None


def plain_adapter(layer: LoraLinear) -> str | None:
    """The name of the one adapter that a layer applies as `_Adapted` computes it; None if it does anything else."""
    if layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant or layer.fan_in_fan_out:
        return None
    if layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0:
        return None
    weights = (layer.base_layer.weight, layer.lora_A[name].weight, layer.lora_B[name].weight)
    plain = all(type(w) in PLAIN for w in weights) and layer.lora_B[name].bias is None
    bias = layer.base_layer.bias
    frozen = not layer.base_layer.weight.requires_grad and (bias is None or not bias.requires_grad)
    return name if plain and frozen else None


def adapted_forward(
    step: type[torch.autograd.Function], self: LoraLinear, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """The forward of a LoRA layer that runs as `step` (`_Adapted`, or a device's own) where that is the same."""
    autocast = torch.is_autocast_enabled(x.device.type)
    base = self.base_layer
    if self.disable_adapters and not self.merged and not autocast:  # the weight may be held in another dtype than x
        bias = None if base.bias is None else base.bias.to(base.weight.dtype)
        return F.linear(x.to(base.weight.dtype), base.weight, bias).to(x.dtype)
    name = None if args or kwargs else plain_adapter(self)
    if name is None:
        return type(self).forward(self, x, *args, **kwargs)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else base.weight.dtype
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    out = step.apply(x, base.weight, base.bias, a, b, float(self.scaling[name]), dtype)
    return out if autocast else out.to(x.dtype)


def joined(model: nn.Module) -> list[LoraLinear]:
    return [m for m in model.modules() if type(m) is LoraLinear and type(m.base_layer) is nn.Linear]


def join_adapters(model: nn.Module) -> int:
    """Let every LoRA layer over a plain linear one run as one step, where that is the same. Returns how many there are.

    What a layer does is asked at each call: adapters that are merged, mixed, with dropout or a variant (DoRA) go PEFT's
    way.
    """
    layers = joined(model)
    for layer in layers:
        layer.forward = types.MethodType(functools.partial(adapted_forward, _Adapted), layer)
    return len(layers)


def hold_frozen(model: nn.Module, dtype: torch.dtype) -> int:
    """Keep frozen weights under adapters in autocast's dtype, which they are cast to in every forward anyway.

    Nothing but these products reads them, so every number stays the same to the bit; DoRA, which takes norms of them,
    keeps its own. Returns how many bytes it saves.
    """
    saved = 0
    for layer in joined(model):
        weight = layer.base_layer.weight
        if not weight.requires_grad and weight.dtype == torch.float32 and not layer.lora_variant:
            saved += weight.nbytes
            weight.data = weight.data.to(dtype)
            saved -= weight.nbytes
    return saved
