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
from preference.engine.cuda import kernels, layer_kernels


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


def worst(found: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> float:
    return max(relative(a, b) for a, b in zip(found, want, strict=True))


def uses(dtype: torch.dtype) -> float:
    """Keys and values gathered, and their gradients summed again."""
    both, rows = torch.randn(2, 8, 2, 24).to(dtype).unbind(), torch.randint(0, 7, (40,))
    order, counts = rows.argsort(stable=True), torch.bincount(rows, minlength=8)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    gathered = kernels.gather(*both, rows)
    assert all(torch.equal(a, b[rows]) for a, b in zip(gathered, both, strict=True))
    parts = torch.randn(2, 40, 2, 24).to(dtype).unbind()
    zeros = torch.zeros(8, 2, 24, dtype=torch.float64)
    return worst(
        kernels.sum_uses(*parts, rows, order, starts), tuple(zeros.index_add(0, rows, x.double()) for x in parts)
    )


def gated(dtype: torch.dtype) -> float:
    gate, up, grad = ((torch.randn(3, 700) * 3).to(dtype) for _ in range(3))
    exact = [x.double().requires_grad_() for x in (gate, up)]
    want = torch.nn.functional.silu(exact[0]) * exact[1]
    wants = torch.autograd.grad(want, exact, grad.double())
    found = layer_kernels.silu_mul_backward(gate, up, grad)
    finished = layer_kernels.silu_mul_finish(gate, up, grad)
    assert torch.equal(found, finished) and torch.equal(grad, layer_kernels.silu_mul(gate, up))
    return worst((grad, *found), (want.detach(), *wants))


def normed(dtype: torch.dtype, width: int) -> float:
    x, y, grad, beside = torch.randn(4, 5, width).to(dtype)
    weight = torch.rand(width).to(dtype) + 0.5
    total, found, scale = layer_kernels.add_norm(x, y, weight, 1e-5)
    exact = total.double().requires_grad_()
    want = torch.nn.functional.rms_norm(exact, (width,), weight.double(), 1e-5)
    pull = torch.autograd.grad(want, exact, grad.double())[0] + beside.double()
    found_pull = layer_kernels.norm_add_backward(grad, beside, total, weight, scale)
    return worst((total, found, found_pull), (x.double() + y.double(), want.detach(), pull))


def rotated(dtype: torch.dtype, heads: int, key_heads: int, size: int) -> float:
    x, grads = ([torch.randn(h, 5, size).to(dtype).transpose(0, 1) for h in (heads, key_heads)] for _ in range(2))
    cos, sin = torch.randn(2, 5, size).to(dtype)
    exact = [part.double().requires_grad_() for part in x]
    want = [kernels.turned(part, cos.double(), sin.double(), False) for part in exact]
    pulls = torch.autograd.grad(want, exact, [grad.double() for grad in grads])
    found = (*kernels.rotate(*x, cos, sin, False), *kernels.rotate(*grads, cos, sin, True))
    return worst(found, (*(part.detach() for part in want), *pulls))


def main() -> None:
    kernels.runs_triton = layer_kernels.runs_triton = lambda x: True
    torch.manual_seed(0)
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype)[6:]
        errors[f"exp_rows {name}"] = rows(dtype, 1.0, None)
        errors[f"exp_rows capped {name}"] = rows(dtype, 1.25, 30.0)
        errors[f"sum_uses {name}"] = uses(dtype)
        errors[f"silu_mul {name}"] = gated(dtype)
        errors[f"rotate {name}"] = max(rotated(dtype, 3, 1, 12), rotated(dtype, 20, 4, 64))
        errors[f"add_norm {name}"] = max(normed(dtype, 96), normed(dtype, 500))
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
