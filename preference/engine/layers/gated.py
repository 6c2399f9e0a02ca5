"""Gated feed-forward layers that keep two tensors of their inner width for the backward instead of four.

A layer down(act(gate(x)) * up(x)), as Llama, Qwen, Mistral and most others have it (Shazeer 2020, arXiv 2002.05202,
section 2), keeps gate, act(gate), up and their product. Here gate and up are kept, and the other two are made from
them again in the backward: the same numbers, a third less memory for a layer's activations. It takes both sides: the
step that makes the product, and the down projection (linear.py, lora.py), which keeps a reference to that
step in place of its input.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class GatedProduct:
    """act(gate) * up and its gradients, all of one shape, in torch's operators."""

    @staticmethod
    def make(gate: Tensor, up: Tensor, act: nn.Module) -> Tensor:
        return act(gate) * up

    @staticmethod
    def gradients(gate: Tensor, up: Tensor, act: nn.Module, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _gradients(gate, up, act, grad)[:2]

    @staticmethod
    def finish(gate: Tensor, up: Tensor, act: nn.Module, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients; the product itself is left in the memory of `grad`."""
        d_gate, d_up, acted = _gradients(gate, up, act, grad)
        torch.mul(acted, up, out=grad)
        return d_gate, d_up


def _gradients(gate: Tensor, up: Tensor, act: nn.Module, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(d gate, d up, act(gate))."""
    with torch.enable_grad():
        gate = gate.detach().requires_grad_()
        acted = act(gate)
    (d_gate,) = torch.autograd.grad(acted, gate, grad * up)
    acted = acted.detach()
    return d_gate, acted * grad, acted


class _Gated(torch.autograd.Function):
    """gate and up, both [..., I] -> act(gate) * up; `act` works on each element."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: nn.Module, product: type[GatedProduct]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.product, ctx.inputs, ctx.found = act, product, None, None
        return product.make(gate, up, act)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.found is not None:
            found, ctx.found = ctx.found, None
            return *found, None, None
        (gate, up), ctx.inputs = _inputs(ctx), None
        return *ctx.product.gradients(gate, up, ctx.act, grad), None, None


def product_step(x: Tensor) -> Any:
    """The step that made `x`, if it was a `_Gated`: `make_again` gives x anew, so that x need not be kept."""
    return x.grad_fn if isinstance(x.grad_fn, _Gated._backward_cls) else None


def _inputs(step: Any) -> tuple[Tensor, Tensor]:
    """gate and up of a step whose backward is still to come; read once, as checkpointing allows no more."""
    step.inputs = step.inputs or step.saved_tensors
    return step.inputs


def make_again(step: Any) -> Tensor:
    """The output of a step that `product_step` gave, before that step's own backward."""
    gate, up = _inputs(step)
    with torch.no_grad():
        return step.product.make(gate, up, step.act)


def finish(step: Any, grad: Tensor) -> Tensor:
    """Do the backward of a step that `product_step` gave, and return its output, in the memory of `grad`.

    Args:
        grad: the whole gradient of its output, contiguous: nothing but the caller may read that output.
    """
    gate, up = _inputs(step)
    step.found, step.inputs = step.product.finish(gate, up, step.act, grad), None
    return grad


def _forward(self: nn.Module, x: Tensor, product: type[GatedProduct] = GatedProduct) -> Tensor:
    if not torch.is_grad_enabled():
        return type(self).forward(self, x)
    return self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x), self.act_fn, product))


class _Line(nn.Module):
    """A stand-in for a projection: slope * x + 1."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x + 1


def _is_gated(module: nn.Module) -> bool:
    """Whether a module computes what `_forward` does: asked of its parts, then measured with small projections."""
    if set(module._modules) != PARTS or module._parameters or "forward" in vars(module):
        return False
    probe = copy.copy(module)
    lines = {"gate_proj": _Line(2.0), "up_proj": _Line(-3.0), "down_proj": _Line(0.5)}
    probe._modules = dict(module._modules) | lines
    x = torch.linspace(-2, 2, 12).view(1, 3, 4)
    with torch.no_grad():
        try:
            return torch.equal(type(module).forward(probe, x), _forward(probe, x))
        except Exception:  # whatever a model's own code raises at parts that it was not written for
            return False


def save_memory_in_gated_layers(
    model: nn.Module, product: Callable[[nn.Module], type[GatedProduct]] = lambda act: GatedProduct
) -> int:
    """Let gated feed-forward layers run as above where a gradient is wanted; returns how many were found the same.

    Args:
        product: the device's way of computing the product for an activation.
    """
    layers = [m for m in model.modules() if _is_gated(m)]
    for layer in layers:
        layer.forward = types.MethodType(functools.partial(_forward, product=product(layer.act_fn)), layer)
    return len(layers)
