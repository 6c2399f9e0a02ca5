"""What a CUDA card computes, in torch's operators on the CPU: for tests of the code around its kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from preference.engine.cuda import attention


def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale, window_size, enable_gqa=False):
    """What torch documents of its varlen kernel: causal from the bottom right, a window, keys of several queries."""
    assert is_causal and window_size[1] == 0 and (enable_gqa or query.shape[1] == key.shape[1])
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    query, key, value = (x.to(wide) for x in (query, key, value))
    outputs = []
    for a, b, c, d in zip(cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:], strict=True):
        assert b - a <= max_q and d - c <= max_k
        q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
        at = torch.arange(d - c)
        back = at[-(b - a) :, None] - at
        hidden = (back < 0) | (back > (window_size[0] if window_size[0] >= 0 else len(at)))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs).to(dtype), torch.zeros(()), torch.zeros(())


def varlen_backward(grad, query, key, value, out, logsumexp, *rest, window_size) -> tuple[Tensor, ...]:
    cu_q, cu_k, max_q, max_k, causal, _, scale = rest
    with torch.enable_grad():
        wide = torch.promote_types(query.dtype, torch.float32)
        inputs = [x.detach().to(wide).requires_grad_() for x in (query, key, value)]
        again = varlen(*inputs, cu_q, cu_k, max_q, max_k, causal, scale, window_size, True)[0]
    return tuple(x.to(query.dtype) for x in torch.autograd.grad(again, inputs, grad.to(wide)))


def use_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> list[str]:
    """Let tensors of the CPU pass for a card's; returns the list in which the kernels that are called are noted."""
    calls: list[str] = []
    monkeypatch.setattr(attention, "capability", lambda device: capability)
    monkeypatch.setattr(attention, "_varlen_ops", lambda: (varlen, varlen_backward))
    monkeypatch.setattr(attention, "_takes_groups", lambda: True)
    # FlexAttention has a reference in torch's operators that runs anywhere; on a CPU it asks for no gradients.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    for name, kernel in list(attention.WAYS.items()):

        def noted(*args: Any, name: str = name, kernel: Any = kernel) -> Tensor:
            calls.append(name)
            return kernel(*args)

        monkeypatch.setitem(attention.WAYS, name, noted)
    return calls
