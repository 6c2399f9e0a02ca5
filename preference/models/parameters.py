"""Counting the numbers in a model, also where its weights are quantised or dealt out among processes."""

from __future__ import annotations

import torch


def full_size(parameter: torch.nn.Parameter) -> int:
    """Numbers in a parameter; ZeRO-3 leaves an empty one in a model that it has dealt out."""
    return getattr(parameter, "ds_numel", parameter.numel())


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; 4-bit weights count as the numbers that they hold."""
    sizes = [
        (full_size(p) * (2 if p.__class__.__name__ == "Params4bit" else 1), p.requires_grad) for p in model.parameters()
    ]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)
