"""Norms with a gate that keep their two inputs for the backward, and nothing else.

Layers with a delta rule end in y = w x r act(z), with r = (mean(x^2) + eps)^-1/2 over each head (Qwen3-Next's
`RMSNormGated` and kin). Written in separate operations in float32, it keeps some eight tensors of its input's size.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from preference.engine.layers.linear import PLAIN

BLOCK = 2**18  # elements of rows that are handled at once, so that what is between stays in cache


def _blocks(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, BLOCK // x.shape[-1])
    width = x.shape[-1]
    return zip(*(part.reshape(-1, width).split(rows) for part in (x, *others)), strict=True)


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x r, r)."""
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return x * scale, scale


class _GatedNorm(torch.autograd.Function):
    """x and gate [..., D], weight [D] -> [..., D] in x's dtype, computed in the weight's or float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, act: nn.Module) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.eps, ctx.act = eps, act
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        wide = torch.promote_types(weight.dtype, torch.float32)
        for y, x_part, z in _blocks(out, x, gate):
            y.copy_(_normed(x_part.to(wide), eps)[0].mul_(weight).mul_(act(z.to(wide))))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        d_x, d_gate = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (x, gate))
        wide = torch.promote_types(weight.dtype, torch.float32)
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[2] else None
        for to_x, to_gate, x_part, z, d_y in _blocks(d_x, d_gate, x, gate, grad):
            normed, scale = _normed(x_part.to(wide), ctx.eps)
            d_y = d_y.to(wide)
            with torch.enable_grad():
                z = z.detach().to(wide).requires_grad_()
                acted = ctx.act(z)
            to_gate.copy_(torch.autograd.grad(acted, z, d_y * normed * weight)[0])
            d_y = d_y * acted.detach()
            if d_weight is not None:
                d_weight += (d_y * normed).sum(0)
            d_normed = d_y.mul_(weight)
            along = (d_normed * normed).mean(-1, keepdim=True)
            to_x.copy_(d_normed.addcmul_(normed, along, value=-1).mul_(scale))
        return d_x, d_gate, None if d_weight is None else d_weight.to(weight.dtype), None, None


def _act(module: nn.Module) -> nn.Module | None:
    """The activation with which a module computes what `_GatedNorm` does: asked of its parts, then measured."""
    names = [name for name, _ in module.named_parameters()]
    act, eps = getattr(module, "activation", None), getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNormGated") or names != ["weight"] or act not in ACT2FN or eps is None:
        return None
    if module.weight.ndim != 1 or module.weight.device.type not in ("cpu", "meta") or type(module.weight) not in PLAIN:
        return None
    twin, size = copy.copy(module), len(module.weight)  # of its kind, in float32: the weights may have no values yet
    twin._parameters = {"weight": nn.Parameter(torch.linspace(0.5, 1.5, size), requires_grad=False)}
    x = torch.linspace(-1, 2, 3 * size).view(3, size)
    with torch.no_grad():
        ours = _GatedNorm.apply(x, x.flip(0), twin.weight, eps, ACT2FN[act])
        return ACT2FN[act] if torch.allclose(twin(x, x.flip(0)), ours, rtol=1e-5, atol=1e-6) else None


def _forward(act: nn.Module, self: nn.Module, hidden_states: Tensor, gate: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or type(self.weight) not in PLAIN or hidden_states.shape != gate.shape:
        return type(self).forward(self, hidden_states, gate)
    return _GatedNorm.apply(hidden_states, gate, self.weight, self.variance_epsilon, act)


def save_memory_in_gated_norms(model: nn.Module) -> int:
    """Let the gated norms of `model` run as above where a gradient is wanted; returns how many there are."""
    acts = {m: _act(m) for m in model.modules() if "forward" not in vars(m)}
    norms = {norm: act for norm, act in acts.items() if act is not None}
    for norm, act in norms.items():
        norm.forward = types.MethodType(functools.partial(_forward, act), norm)
    return len(norms)
