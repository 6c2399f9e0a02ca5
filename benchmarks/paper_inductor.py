"""What Inductor would make of a decoder layer on an H100 that is not here: the kernels of its code, counted.

The layer is transformers' and PEFT's own, as `torch_compile` compiles it (engine/compiled.py). Its forward and backward
are traced over fake CUDA tensors as one graph, and Inductor writes the code for it under a description of the card; the
code is counted, not run: Triton kernels, calls of outside products, and operators that it does not look into (the
engine's attention). The real thing is two graphs around an attention outside of them, so that it may be a few kernels
more. Import paper_cuda before torch, and this after it; it is for a process of its own, as it tells torch of a card.
"""

from __future__ import annotations

import re
import sys
import types
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

H100 = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536, warp_size=32, total_memory=80 << 30, gcnArchName="",
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20,
    shared_memory_per_multiprocessor=233472, max_threads_per_block=1024,
)  # fmt: skip


class _Driver:
    """Triton's, of the card on paper."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def is_active(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: 0


def _describe_card() -> None:
    """Have Inductor find an H100."""
    import torch._inductor.config as config
    import torch._inductor.scheduler
    import torch.utils._triton as found
    import triton
    from torch._dynamo.device_interface import CudaInterface

    def properties(*_: Any) -> Any:
        return H100

    found.has_triton = lambda *_: True
    for name, module in list(sys.modules.items()):
        if name.startswith("torch._inductor") and hasattr(module, "has_triton"):
            vars(module)["has_triton"] = found.has_triton
    cuda = torch.cuda
    cuda.get_device_properties = cuda._get_device_properties = properties
    cuda.current_device, cuda.device_count = (lambda: 0), (lambda: 1)
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda._lazy_init = lambda: None
    torch.version.cuda = "12.8"
    CudaInterface.get_device_properties = staticmethod(properties)
    CudaInterface.get_compute_capability = staticmethod(lambda *_: 90)
    CudaInterface.is_available = staticmethod(lambda: True)
    CudaInterface.current_device = staticmethod(lambda: 0)
    triton.runtime.driver.set_active(_Driver())
    config.force_disable_caches, config.compile_threads = True, 1


def kernels_of(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any], mode: Any) -> Counter[str]:
    """Kernels of a layer's forward and backward by kind; its weights and the arguments are fake tensors of `mode`."""
    _describe_card()
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.func import functional_call
    from torch.fx.experimental.proxy_tensor import make_fx

    names, weights = zip(*layer.named_parameters(), strict=True)

    def step(x: Tensor, grad: Tensor, *weights: Tensor) -> Any:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            out = functional_call(layer, dict(zip(names, weights, strict=True)), (x,), arguments)
        wanted = [x, *(w for w in weights if w.requires_grad)]
        return (out, *torch.autograd.grad(out, wanted, grad))

    with mode:
        inputs = (hidden, torch.empty_like(hidden), *weights)
        traced = make_fx(step, decomposition_table=select_decomp_table(), tracing_mode="real")(*inputs)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    lowered = GraphLowering(traced)
    with V.set_graph_handler(lowered), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        lowered.run(*inputs)
        code = lowered.codegen()[0].value
    return Counter(
        Triton=len(re.findall(r"^\s+triton_\w+\.run\(", code, re.M)),
        products=len(re.findall(r"extern_kernels\.\w+\(", code)),
        others=len(re.findall(r"torch\.ops\.[\w.]+\(", code)),
    )
