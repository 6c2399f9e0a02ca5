"""Rotary position embeddings as one kernel each way, for models whose own function turns halves of a head.

Su et al. 2021 (arXiv 2104.09864) in the layout of GPT-NeoX, as Llama, Qwen, Mistral, Gemma and most others have it:
(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin). transformers has no registry for it, but looks it up in the modeling
file at each call, so it is replaced there; tensors that are not on a card go to the function that was there before.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from preference.engine.cuda.kernels import rotate, turned

NAME = "apply_rotary_pos_emb"


class Rotated(torch.autograd.Function):
    """query [N, H, D], key [N, K, D], cos and sin [N, D] -> both, turned."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return rotate(query, key, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, d_query: Tensor, d_key: Tensor) -> tuple[Tensor | None, ...]:
        return *rotate(d_query, d_key, *ctx.saved_tensors, True), None, None


def _takes(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether x is [1, H, N, D] on a card and cos and sin are [1, N, D]."""
    shape = (1, x.shape[2], x.shape[3]) if x.ndim == 4 and x.shape[0] == 1 else None
    return x.device.type == "cuda" and x.shape[-1] % 2 == 0 and cos.shape == sin.shape == shape


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    rows = (x.squeeze(0).transpose(0, 1) for x in (q, k))
    turned_q, turned_k = Rotated.apply(*rows, cos.squeeze(0), sin.squeeze(0))
    return turned_q.transpose(0, 1).unsqueeze(0), turned_k.transpose(0, 1).unsqueeze(0)


def _switch(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or q.dtype != k.dtype or not (_takes(q, cos, sin) and _takes(k, cos, sin)):
            return plain(q, k, cos, sin, *args, **kwargs)
        return _rotated(q, k, cos, sin)

    vars(function)["plain"] = plain
    return function


def turns_halves(function: Callable[..., Any]) -> bool:
    """Whether a modeling file's function computes what `rotate` does: measured."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (4, 2))
    angles = torch.randn(1, 5, 4, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        found = function(q, k, cos, sin)
        want = [turned(x[0].transpose(0, 1), cos[0], sin[0], False).transpose(0, 1)[None] for x in (q, k)]
        return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, want, strict=True))
    except Exception:  # whatever a model's own code raises at arguments that it was not written for
        return False


def fuse_rotary(model: nn.Module) -> int:
    """Let the modeling files of `model` call the kernel where theirs is that; returns in how many it was found so."""
    found = 0
    for name in sorted({type(module).__module__ for module in model.modules()}):
        file = vars(sys.modules[name])
        function = file.get(NAME)
        if function is not None and not hasattr(function, "plain") and turns_halves(function):
            file[NAME] = _switch(function)
        found += hasattr(file.get(NAME), "plain")
    return found
