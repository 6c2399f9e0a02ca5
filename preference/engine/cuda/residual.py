"""Decoder layers whose residual additions and norms are one kernel each way, where the norms are frozen (LoRA).

A layer x + attention(norm(x)), then x + mlp(norm(x)), as Llama, Qwen, Mistral and most others have it: the first sum
and the second norm are one kernel, and each norm's backward adds what reaches its input beside it.
"""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import Tensor, nn

from preference.engine.cuda.layer_kernels import add_norm, norm_add_backward
from preference.engine.cuda.norm import epsilon, is_fused
from preference.engine.layers.linear import PLAIN

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class NormBeside(torch.autograd.Function):
    """x [..., D], weight [D] -> x, and its norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, scale = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return x, normed

    @staticmethod
    def backward(ctx: Any, d_x: Tensor, d_normed: Tensor) -> tuple[Tensor, None, None]:
        return _backward(ctx, d_x, d_normed), None, None


class AddNorm(torch.autograd.Function):
    """x and y [..., D], weight [D] -> x + y, and its norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total_ND, normed_ND, scale = add_norm(x.flatten(0, -2), y.flatten(0, -2), weight, eps)
        total = total_ND.view(x.shape)
        ctx.save_for_backward(total, weight, scale)
        return total, normed_ND.view(x.shape)

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, d_normed: Tensor) -> tuple[Tensor | None, ...]:
        d_x = _backward(ctx, d_total, d_normed)
        return d_x, d_x, None, None


def _backward(ctx: Any, beside: Tensor, d_normed: Tensor) -> Tensor:
    x, weight, scale = ctx.saved_tensors
    rows = (t.flatten(0, -2) for t in (d_normed, beside, x))
    return norm_add_backward(*rows, weight, scale.view(-1, 1)).view(x.shape)


def _takes(norm: nn.Module, x: Tensor) -> bool:
    """Whether a norm is a frozen one of the stream's own type, called by nobody else's leave."""
    weight, hooks = norm.weight, norm._forward_hooks or norm._forward_pre_hooks
    return type(weight) in PLAIN and not weight.requires_grad and weight.dtype == x.dtype and not hooks


def _forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    norms = self.input_layernorm, self.post_attention_layernorm
    if args or not all(_takes(norm, hidden_states) for norm in norms):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    hidden, normed = NormBeside.apply(hidden_states, norms[0].weight, epsilon(norms[0]))
    attended, _ = self.self_attn(hidden_states=normed, **kwargs)
    if attended.dtype != hidden.dtype:
        hidden = hidden + attended
        return hidden + self.mlp(norms[1](hidden))
    hidden, normed = AddNorm.apply(hidden, attended, norms[1].weight, epsilon(norms[1]))
    return hidden + self.mlp(normed)


class _Attention(nn.Module):
    """A stand-in for a layer's attention."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return 3 * hidden_states + 1, None


class _Feed(nn.Module):
    """A stand-in for a layer's feed-forward part."""

    def forward(self, x: Tensor) -> Tensor:
        return 1 - 2 * x


class _Norm(nn.Module):
    """A stand-in for a norm: a root-mean-square norm with a weight that it shows."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight, requires_grad=False), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _is_usual(layer: nn.Module) -> bool:
    """Whether a layer computes what `_forward` does: asked of its parts, then measured with stand-ins for them."""
    if set(layer._modules) != PARTS or layer._parameters or "forward" in vars(layer):
        return False
    if not all(is_fused(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm)):
        return False
    probe = copy.copy(layer)
    norms = [_Norm(torch.linspace(a, b, 4)) for a, b in ((0.5, 1.5), (2.0, 1.0))]
    probe._modules = dict(layer._modules) | dict(
        self_attn=_Attention(), mlp=_Feed(), input_layernorm=norms[0], post_attention_layernorm=norms[1]
    )
    x = torch.linspace(-2, 2, 12).view(1, 3, 4)
    with torch.no_grad():
        try:
            return torch.allclose(type(layer).forward(probe, x), _forward(probe, x), rtol=1e-5, atol=1e-6)
        except Exception:  # whatever a model's own code raises at parts that it was not written for
            return False


def fuse_residuals(model: nn.Module) -> int:
    """Let the decoder layers of `model` that are the usual ones run as above; returns how many there are."""
    layers = [m for m in model.modules() if _is_usual(m)]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)
