"""CUDA's side of the engine. Triton is imported here and below, and nowhere else.

Which memory savers a GPU keeps is decided by the paper trace (benchmarks/paper_gpu.py, benchmarks/LOG.md).
"""

from __future__ import annotations

import torch
from torch import nn

from preference.engine.cuda.attention import attend
from preference.engine.cuda.gated import product_for
from preference.engine.cuda.kernels import exp_rows
from preference.engine.cuda.lora import cast_adapters, join_adapters
from preference.engine.cuda.norm import fuse_norms
from preference.engine.cuda.residual import fuse_residuals
from preference.engine.cuda.rotary import fuse_rotary
from preference.engine.cuda.siblings import join_siblings
from preference.engine.layers.gated import save_memory_in_gated_layers
from preference.engine.layers.linear import save_memory_in_linear_layers
from preference.engine.side import Side

HEAD_ROWS = 4096


def lighten(model: nn.Module) -> None:
    if all(p.numel() for p in model.parameters()):  # not while ZeRO-3 has them dealt out
        save_memory_in_gated_layers(model, product_for)
        save_memory_in_linear_layers(model)
        fuse_norms(model)
        fuse_residuals(model)
        fuse_rotary(model)
        join_adapters(model)
        join_siblings(model)


def begin(model: nn.Module) -> None:
    if torch.is_autocast_enabled("cuda"):
        cast_adapters(model, torch.get_autocast_dtype("cuda"))


CUDA = Side(attend, exp_rows, HEAD_ROWS, lighten, begin, ("auto", "varlen", "flex", "sdpa"))
