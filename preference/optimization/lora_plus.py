"""LoRA+: B learns faster than A (Hayou et al. 2024, arXiv 2402.12354)."""

from __future__ import annotations

from typing import Any

from torch import nn


def raise_rate_of_b(optimizer: Any, model: nn.Module, ratio: float) -> None:
    """Split every group of the optimizer in two: the B of adapters learn with `ratio` times the rate of the others."""
    kinds = {"lora_B", "lora_embedding_B"}
    faster = {id(p) for name, p in model.named_parameters() if kinds & set(name.split("."))}
    for group in list(optimizer.param_groups):
        b = [p for p in group["params"] if id(p) in faster]
        if b:
            rest = {name: value for name, value in group.items() if name != "params"}
            group["params"] = [p for p in group["params"] if id(p) not in faster]
            optimizer.add_param_group({**rest, "params": b, "lr": group["lr"] * ratio})
