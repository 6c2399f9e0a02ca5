"""Log-probabilities of given tokens from hidden states, without a gradient-tracked [T, V] tensor of logits.

With E = exp(logits - max), s its row sums, y the targets and g the gradient of each target's log-probability:

    d hidden_t = g_t (W[y_t] - E_t W / s_t)        d W = sum over t of g_t (onehot(y_t) - E_t / s_t) hidden_t^T

E is computed once, in blocks of rows whose size is the device's (engine/sides.py), and both gradients are plain matrix
products with it: the factors g and 1/s are applied on the small side. For a frozen head the bracket of d hidden is
finished in the forward and E is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from preference.engine.sides import side_of

KEEP_BYTES = 2**30  # E up to this size is kept for the backward; a larger one is computed again in blocks of this size
HALVES_FROM = 512  # more rows of logits than that are at most half of all there are, or a small batch is all logits


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, out: Tensor) -> Tensor:
    if bias_V is None:
        return torch.mm(hidden_CD, weight_VD.t(), out=out)
    return torch.addmm(bias_V, hidden_CD, weight_VD.t(), out=out)


def _exp_block(
    out_RV: Tensor,
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    ids_R: Tensor,
    scale: float,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill a block of E; returns as `exp_rows`."""
    side = side_of(out_RV.device.type)
    found = []
    for start in range(0, len(ids_R), side.head_rows):
        part = slice(start, start + side.head_rows)
        _logits(hidden_RD[part], weight_VD, bias_V, out_RV[part])
        found.append(side.exp_rows(out_RV[part], ids_R[part], scale, cap))
    return _joined(found)


def _joined(blocks: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What each block of rows gave, one behind the other."""
    return blocks[0] if len(blocks) == 1 else tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


class _TokenLogps(torch.autograd.Function):
    """Inputs as `token_logps`; products run in `dtype`, whatever has size [T] and the sum of d W in fp32 at least."""

    @staticmethod
    def forward(ctx: Any, hidden_TD, weight_VD, bias_V, ids_T, scale, cap, dtype):
        ctx.settings = scale, cap, hidden_TD.dtype, weight_VD.dtype
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        hidden, weight = hidden_TD.to(dtype), weight_VD.to(dtype)
        bias = None if bias_V is None else bias_V.to(dtype)
        tokens, vocabulary = len(hidden), len(weight)
        ctx.frozen = not (need_weight or need_bias)
        ctx.rows = max(1, KEEP_BYTES // (vocabulary * dtype.itemsize))
        rows = min(side_of(hidden.device.type).head_rows, ctx.rows, max(HALVES_FROM, -(-tokens // 2)))
        keep = not ctx.frozen and tokens <= ctx.rows
        block = tokens if keep else min(tokens, rows)
        exp_RV = hidden.new_empty(block, vocabulary)
        pulls, found = [], []
        for start in range(0, tokens, block):
            part = slice(start, start + block)
            exp = exp_RV[: len(ids_T[part])]
            found.append(_exp_block(exp, hidden[part], weight, bias, ids_T[part], scale, cap))
            if ctx.frozen and need_hidden:
                pulls.append(torch.mm(exp, weight))
        logps, sums, slopes = _joined(found)
        if ctx.frozen and need_hidden:
            pull = torch.cat(pulls).to(sums.dtype).div_(sums[:, None])
            ctx.save_for_backward(weight[ids_T].to(sums.dtype).mul_(slopes[:, None]).sub_(pull).mul_(scale))
        elif not ctx.frozen:
            ctx.save_for_backward(hidden, weight, bias, ids_T, sums, slopes, exp_RV if keep else None)
        return logps

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor):
        scale, cap, hidden_dtype, weight_dtype = ctx.settings
        if ctx.frozen:
            (slope_TD,) = ctx.saved_tensors
            return (slope_TD * grad_T[:, None]).to(hidden_dtype), None, None, None, None, None, None
        hidden, weight, bias, ids_T, sums, slopes, kept = ctx.saved_tensors
        to_target, to_all = grad_T * slopes * scale, grad_T * scale / sums
        d_hidden = weight[ids_T].to(sums.dtype).mul_(to_target[:, None])
        d_weight = d_bias = None
        block = weight.new_empty(ctx.rows, len(weight)) if kept is None else None
        for start in range(0, len(ids_T), ctx.rows):
            part = slice(start, start + ctx.rows)
            exp = kept
            if kept is None:
                exp = block[: len(ids_T[part])]
                _exp_block(exp, hidden[part], weight, bias, ids_T[part], scale, cap)
            d_hidden[part].addcmul_(torch.mm(exp, weight).to(sums.dtype), to_all[part, None], value=-1)
            if ctx.needs_input_grad[1]:
                product = torch.mm(exp.t(), (hidden[part] * -to_all[part, None]).to(hidden.dtype)).to(sums.dtype)
                d_weight = product if d_weight is None else d_weight.add_(product)
            if ctx.needs_input_grad[2]:
                product = torch.mv(exp.t().to(sums.dtype), -to_all[part])
                d_bias = product if d_bias is None else d_bias.add_(product)
        if d_weight is not None:
            d_weight = d_weight.index_add_(0, ids_T, hidden * to_target[:, None]).to(weight_dtype)
        if d_bias is not None:
            d_bias = d_bias.index_add_(0, ids_T, to_target).to(weight_dtype)
        return d_hidden.to(hidden_dtype), d_weight, d_bias, None, None, None, None


def target_logps(logits_TV: Tensor, ids_T: Tensor, scale: float, cap: float | None) -> Tensor:
    """What `token_logps` computes, from logits that are there: for heads that are more than a weight."""
    logits = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits.gather(1, ids_T[:, None])[:, 0] - logits.logsumexp(1)


def token_logps(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    ids_T: Tensor,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """log softmax(cap * tanh(scale * (hidden W^T + bias) / cap)) at each target id, [T], fp32 at least.

    The matrix products run in the autocast dtype where autocast is on, else in the weight's; logits are rounded to
    it, as the model's own head would round them.
    """
    device = hidden_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    return _TokenLogps.apply(hidden_TD, weight_VD, bias_V, ids_T, scale, cap, dtype)
