"""Root-mean-square norms that keep their input and a number per token for the backward, and nothing else.

Written in separate operations, as models have it, such a norm keeps four tensors of its input's size and takes some
twenty passes over them forward and backward. Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4: with D the width,

    r = (mean(x^2) + eps)^-1/2,  y = w x r        dx = r (w dy - x r mean(w dy x r)),  dw = sum of dy x r

Families such as Gemma and Qwen3.5 hold w - 1 in place of w.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from preference.engine.layers.linear import PLAIN


class _RMSNorm(torch.autograd.Function):
    """x [..., D] and weight [D], both float32 -> [..., D]; the weight counts with `offset` added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return (x * scale).mul_(weight + offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        d_weight = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        d_normed = grad * (weight + ctx.offset)
        mean = (d_normed * normed).mean(-1, keepdim=True)
        return d_normed.addcmul_(normed, mean, value=-1).mul_(scale), d_weight, None, None


def _epsilon(module: nn.Module) -> float | None:
    return next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)


def _offset(module: nn.Module) -> float | None:
    """The offset with which a module computes what `_RMSNorm` does, asked of its name and parts, then measured.

    None: it computes something else.
    """
    names = [name for name, _ in module.named_parameters()]
    if not type(module).__name__.endswith("RMSNorm") or names != ["weight"] or _epsilon(module) is None:
        return None
    weight = module.weight
    if (
        weight.dtype != torch.float32
        or weight.device.type not in ("cpu", "meta")
        or weight.ndim != 1
        or type(weight) is not nn.Parameter
    ):
        return None
    if weight.is_meta:  # a model without weights: its kind of norm is asked
        module = copy.deepcopy(module).to_empty(device="cpu")
        nn.init.constant_(module.weight, 0.5)
    x = torch.linspace(-1, 2, 3 * len(weight)).view(3, -1)
    with torch.no_grad():
        plain = module(x)
        for offset in (0.0, 1.0):
            if torch.allclose(plain, _RMSNorm.apply(x, module.weight, _epsilon(module), offset), rtol=1e-5, atol=1e-6):
                return offset
    return None


def _forward(offset: float, self: nn.Module, x: Tensor) -> Tensor:
    trained = torch.is_grad_enabled() and type(self.weight) in PLAIN
    if not trained or {x.dtype, self.weight.dtype} != {torch.float32}:
        return type(self).forward(self, x)
    return _RMSNorm.apply(x, self.weight, _epsilon(self), offset)


def save_memory_in_norms(model: nn.Module) -> int:
    """Let RMS norms in float32 run as above where a gradient is wanted; returns how many were found to be the same."""
    offsets = {m: _offset(m) for m in model.modules() if "forward" not in vars(m)}
    norms = {norm: offset for norm, offset in offsets.items() if offset is not None}
    for norm, offset in norms.items():
        norm.forward = types.MethodType(functools.partial(_forward, offset), norm)
    return len(norms)
