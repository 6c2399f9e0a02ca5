"""Fake CUDA tensors in a torch that was built without CUDA: import this before torch.

The operators that a CUDA run would call are then seen with their shapes, forward and backward, on any machine: no
kernel runs, and no value is known. `paper_cuda.cpp` is compiled once, into the temporary folder (g++, a few seconds).
With a real CUDA device nothing is changed. It is for a process of its own, as torch takes a device for present that
is not.

Not seen: reads of values inside C++ operators, checks that only a kernel makes, the numerics of kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
CAPABILITY = (9, 0)  # of the card on paper, an H100


class PaperError(RuntimeError):
    """The device on paper could not be made."""


def _library(torch_folder: Path) -> Path:
    """The compiled source; made where it is not there yet."""
    key = hashlib.sha256(SOURCE.read_bytes() + str(torch_folder).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"paper_cuda_{os.getuid()}_{key}.so"
    if not path.exists():
        made = path.with_suffix(f".{os.getpid()}")
        include, lib = torch_folder / "include", torch_folder / "lib"
        command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", str(SOURCE), "-o", str(made), f"-I{include}"]
        command += [f"-I{include}/torch/csrc/api/include", f"-L{lib}", "-lc10", "-ltorch_cpu"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise PaperError("g++ is not here; install it (apt install g++): it compiles paper_cuda.cpp once") from None
        except subprocess.CalledProcessError as error:
            raise PaperError(f"g++ could not compile {SOURCE.name}: {error.stderr.strip()[-400:]}") from None
        made.replace(path)
    return path


def _open() -> None:
    folder = Path(importlib.util.find_spec("torch").origin).parent
    for name in ("libc10.so", "libtorch_cpu.so"):  # before torch loads them for itself alone
        ctypes.CDLL(str(folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(_library(folder)), mode=ctypes.RTLD_GLOBAL)

    import torch

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
    torch.cuda.get_device_capability = lambda *args: CAPABILITY
    # Operators with a CUDA kernel of their own that a build without CUDA would take apart.
    _LIBRARY.append(torch.library.Library("aten", "IMPL"))
    kernels = _LIBRARY[0]
    kernels.impl("silu_backward", lambda grad, x: torch.empty_like(x), "CUDA")
    kernels.impl("_fused_rms_norm", _fused_rms_norm, "CUDA")
    kernels.impl("mm.dtype", _product, "CUDA")
    kernels.impl("bmm.dtype", _product, "CUDA")


def _product(a, b, out_dtype):
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=out_dtype)


def _fused_rms_norm(x, shape, weight, eps):
    return x.new_empty(x.shape), x.new_empty((*x.shape[: -len(shape)], *[1] * len(shape)), dtype=_torch().float32)


def _torch():
    return sys.modules["torch"]


_LIBRARY: list = []
if "torch" in sys.modules:
    raise PaperError("paper_cuda is to be imported before torch")
if not (Path(importlib.util.find_spec("torch").origin).parent / "lib" / "libtorch_cuda.so").exists():
    _open()
