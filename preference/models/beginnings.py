"""Adapters that begin with a part of the weights: PiSSA and OLoRA, laid over the weights as they were handed in.

PiSSA (Meng et al. 2024, arXiv 2404.02948) and OLoRA (Buyukakyuz 2024, arXiv 2406.01775) take B0 A0 out of a weight W,
and train B A from there over what is left: W - s B0 A0 + s B A. Written as one adapter of twice the rank,

    W + s [B, -B0] [A; A0],

it is the same function with the same gradients of A and B, and lies over W itself: also over W in 4 bits, in every
checkpoint, and for whoever reads adapters. The second half stays as it is (train/held.py).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from preference.models.folder import ModelError


def doubled(rank: int, alpha: float, rslora: bool) -> tuple[int, float]:
    """Rank and alpha of an adapter of twice the rank that is scaled as one of `rank` with `alpha`."""
    return 2 * rank, alpha * (2**0.5 if rslora else 2)


@torch.no_grad()
def begin(model: Any, kind: str, name: str = "default") -> None:
    """Fill the adapter `name` of `model`, which has twice the rank that is trained.

    Raises:
        ModelError: a layer is too small for the rank, or is no linear layer.
    """
    layers = {}
    for where, layer in model.named_modules():
        stacked = hasattr(layer, "parameter_name") and name in getattr(layer, "lora_A", {})
        if stacked or name in getattr(layer, "lora_embedding_A", {}):
            raise ModelError(
                f"init_lora_weights={kind} begins in linear layers, and {where} is none: leave it out (exclude_modules)"
            )
        if name in getattr(layer, "lora_A", {}):
            layers[where] = layer
    sides = {where: min(m.lora_A[name].weight.shape[1], m.lora_B[name].weight.shape[0]) for where, m in layers.items()}
    least = min(sides, key=lambda where: sides[where])
    if sides[least] < layers[least].r[name] // 2:
        raise ModelError(
            f"init_lora_weights={kind} takes lora_rank directions out of each weight, and {least} has {sides[least]}: "
            f"lora_rank={sides[least]} or less, or init_lora_weights=default"
        )
    for layer in layers.values():
        _begin_layer(layer, kind, name)


def _begin_layer(layer: LoraLinear, kind: str, name: str) -> None:
    base, rank = layer.get_base_layer(), layer.r[name] // 2
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    stored, whole = base.weight, dequantize_module_weight(base).detach().float().clone()
    base.weight, layer.r[name] = nn.Parameter(whole, requires_grad=False), rank  # peft takes its part out of this copy
    try:
        layer.olora_init(name) if kind == "olora" else layer.pissa_init(name, kind)
    finally:
        base.weight, layer.r[name] = stored, 2 * rank
    first_a, first_b = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
    layer.lora_A[name].weight.data = torch.cat([first_a, first_a]).to(a)
    layer.lora_B[name].weight.data = torch.cat([first_b, -first_b], dim=1).to(b)
