"""The Triton kernels without a card: in the interpreter against double precision, and compiled for three cards.

The interpreter takes things that the compiler refuses, and the compiler says nothing of what a kernel computes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: there is none for this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from preference.engine.cuda import kernels, layer_kernels  # noqa: E402

COUNTS = {"row_stride", "columns", "width", "count", "half", "query_heads", "key_heads", "query_blocks"}
IDS = {"ids", "order", "starts", "rows"}
FLOATS = {"logps", "sums", "slopes", "scales"}
KERNELS = {  # kernel -> values of what is fixed when it is compiled, and its warps
    "_exp_rows": [({"CAPPED": capped, "SIZE": kernels.BLOCK}, 8) for capped in (False, True)],
    "_gather": [({"SIZE": kernels.SUM_BLOCK}, 4)],
    "_sum_uses": [({"SIZE": kernels.SUM_BLOCK}, 4)],
    "_silu_mul": [({"SIZE": layer_kernels.FLAT_BLOCK}, 4)],
    "_silu_mul_backward": [({"SIZE": layer_kernels.FLAT_BLOCK, "AGAIN": again}, 4) for again in (False, True)],
    "_rotate": [({"BACK": back, "HEADS": kernels.ROTARY_HEADS, "HALF": 64}, 4) for back in (False, True)],
    "_add_norm": [({"SIZE": size}, layer_kernels.warps(size)) for size in (1024, 4096, 8192)],
    "_norm_add_backward": [({"SIZE": size}, layer_kernels.warps(size)) for size in (1024, 4096, 8192)],
}
CALLED = {"_turn", "_add_up"}  # by other kernels


def test_the_interpreter_gives_what_torch_gives(root: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(root / "tests/interpreted_kernels.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    errors = json.loads(run.stdout.splitlines()[-1])
    assert len(errors) == 12
    for name, error in errors.items():
        bound = 4e-3 if "bfloat16" in name and "exp_rows" not in name else 3e-5
        assert 0 <= error < bound, name


def signature(kernel: object, constants: dict[str, object], dtype: str) -> dict[str, str]:
    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in COUNTS or name.endswith("_stride"):
            return "i32"
        if name in IDS:
            return "*i64"
        return "fp32" if name in ("scale", "cap", "epsilon") else "*fp32" if name in FLOATS else f"*{dtype}"

    return {name: kind(name) for name in kernel.arg_names}


@pytest.mark.parametrize("card", [80, 89, 90])
def test_every_kernel_compiles_and_keeps_to_its_registers(card: int) -> None:
    """For A100, 4090 and H100: a binary comes out, and nothing is spilled to local memory."""
    there = vars(kernels) | vars(layer_kernels)
    assert set(KERNELS) | CALLED == {n for n, x in there.items() if isinstance(x, triton.runtime.JITFunction)}
    for name, variants in KERNELS.items():
        kernel = there[name]
        for constants, warps in variants:
            source = ASTSource(
                fn=kernel,
                signature=signature(kernel, constants, "bf16"),
                constexprs={(kernel.arg_names.index(key),): value for key, value in constants.items()},
            )
            made = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": warps})
            assert made.asm["cubin"], (name, constants)
            assert ".local" not in made.asm["ptx"], (name, constants)
