"""Logits to exponentials, in place, with what a log-probability and its gradient need of each row."""

from __future__ import annotations

import torch
from torch import Tensor


def exp_rows(logits_CV: Tensor, ids_C: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Raw logits become E = exp(x - max x) times the softcap's slope, x = cap * tanh(scale * logits / cap), in place.

    Returns:
        The log-probabilities of the targets, the sums of exp(x - max x) and the slopes at the targets; each [C], fp32
        at least.
    """
    x = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    if scale != 1.0:
        x.mul_(scale)
    if cap is not None:
        x.div_(cap).tanh_()
        slope = 1 - x.square()
        x.mul_(cap)
    target, top = x.gather(1, ids_C[:, None])[:, 0], x.amax(1, keepdim=True)
    total = x.sub_(top).exp_().sum(1)
    target_slope = torch.ones_like(total)
    if cap is not None:
        x.mul_(slope)
        target_slope = slope.gather(1, ids_C[:, None])[:, 0]
    if x is not logits_CV:
        logits_CV.copy_(x)
    return target - top[:, 0] - total.log(), total, target_slope
