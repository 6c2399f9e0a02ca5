"""Every Triton kernel in Triton's interpreter, against the same in torch's operators: prints the errors as JSON.

A program of its own, as the interpreter must be chosen before Triton is imported: TRITON_INTERPRET=1 python this_file
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from preference.engine import exp_rows as plain
from preference.engine.cuda import kernels


def relative(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found.double() - want.double()).norm() / want.double().norm())


def rows(dtype: torch.dtype, scale: float, cap: float | None) -> float:
    logits, ids = (torch.randn(5, 9001) * 8).to(dtype), torch.randint(0, 9001, (5,))
    want_in, found_in = logits.double(), logits.clone()
    want = plain.exp_rows(want_in, ids, scale, cap)
    found = kernels.exp_rows(found_in, ids, scale, cap)
    errors = [relative(a, b) for a, b in zip(found, want, strict=True)]
    rounding = 0.003 if dtype == torch.bfloat16 else 1e-5  # of E as it is written
    return max(*errors, 1e-5 * relative(found_in, want_in) / rounding)


def uses(dtype: torch.dtype) -> float:
    parts, key_at = torch.randn(40, 2, 24).to(dtype), torch.randint(0, 7, (40,))
    order, counts = key_at.argsort(stable=True), torch.bincount(key_at, minlength=8)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    want = torch.zeros(8, 2, 24, dtype=torch.float64).index_add_(0, key_at, parts.double())
    return relative(kernels.sum_uses(parts, key_at, order, starts), want)


def gated(dtype: torch.dtype) -> float:
    gate, up, grad = ((torch.randn(3, 700) * 3).to(dtype) for _ in range(3))
    exact = [x.double().requires_grad_() for x in (gate, up)]
    want = torch.nn.functional.silu(exact[0]) * exact[1]
    wants = (want.detach(), *torch.autograd.grad(want, exact, grad.double()))
    found = (kernels.silu_mul(gate, up), *kernels.silu_mul_backward(gate, up, grad))
    return max(relative(a, b) for a, b in zip(found, wants, strict=True))


def rotated(dtype: torch.dtype, heads: int, size: int) -> float:
    x = torch.randn(heads, 5, size).to(dtype).transpose(0, 1)
    cos, sin = torch.randn(2, 5, size).to(dtype)
    exact = x.double().requires_grad_()
    want = kernels.turned(exact, cos.double(), sin.double(), False)
    grad = torch.randn(5, heads, size).to(dtype)
    pull = torch.autograd.grad(want, exact, grad.double())[0]
    pairs = ((kernels.rotate(x, cos, sin, False), want.detach()), (kernels.rotate(grad, cos, sin, True), pull))
    return max(relative(*pair) for pair in pairs)


def main() -> None:
    kernels._runs_triton = lambda x: True
    torch.manual_seed(0)
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype)[6:]
        errors[f"exp_rows {name}"] = rows(dtype, 1.0, None)
        errors[f"exp_rows capped {name}"] = rows(dtype, 1.25, 30.0)
        errors[f"sum_uses {name}"] = uses(dtype)
        errors[f"silu_mul {name}"] = gated(dtype)
        errors[f"rotate {name}"] = max(rotated(dtype, 3, 12), rotated(dtype, 20, 64))
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
