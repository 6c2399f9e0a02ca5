"""What a kind of device adds to the engine, chosen here and nowhere else: a CPU, CUDA, and torch's own for others."""

from __future__ import annotations

from preference.engine.branches import padded
from preference.engine.exp_rows import exp_rows
from preference.engine.side import Side

OTHERS = Side(padded, exp_rows, 1024, lambda model: None, implementations=("auto", "sdpa"))


def side_of(device: str) -> Side:
    """The side of a kind of device, as `torch.device.type` names it. Triton is imported for CUDA alone."""
    if device == "cpu":
        from preference.engine.cpu.side import CPU

        return CPU
    if device == "cuda":
        from preference.engine.cuda.side import CUDA

        return CUDA
    return OTHERS
