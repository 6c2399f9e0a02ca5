"""The product inside a gated feed-forward layer as one Triton kernel each way, for SiLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preference.engine.cuda.layer_kernels import silu_mul, silu_mul_backward, silu_mul_finish
from preference.engine.layers.gated import GatedProduct


class SiluProduct(GatedProduct):
    """silu(gate) * up."""

    @staticmethod
    def make(gate: Tensor, up: Tensor, act: nn.Module) -> Tensor:
        return silu_mul(gate, up)

    @staticmethod
    def gradients(gate: Tensor, up: Tensor, act: nn.Module, grad: Tensor) -> tuple[Tensor, Tensor]:
        return silu_mul_backward(gate, up, grad).unbind()

    @staticmethod
    def finish(gate: Tensor, up: Tensor, act: nn.Module, grad: Tensor) -> tuple[Tensor, Tensor]:
        return silu_mul_finish(gate, up, grad).unbind()


def product_for(act: nn.Module) -> type[GatedProduct]:
    """The way to compute act(gate) * up: measured, whatever the activation is called."""
    x = torch.linspace(-4, 4, 33)
    with torch.no_grad():
        return SiluProduct if torch.equal(act(x), F.silu(x)) else GatedProduct
