"""How fast a run is: tokens and pairs a second, and the MFU, of the measured peak.

MFU (model FLOPs utilisation) is (floating-point operations of the model's weight matrices) / (time x ranks x peak),
where
- a matrix costs 2 operations per weight and token forward, 2 for the gradient of its input and, if it is trained, 2 for
  its own gradient; attention scores, norms, the optimizer and recomputation under gradient checkpointing are not
  counted, nor is the head where the loss does not read every token's prediction: the figure errs on the low side;
- the peak is the best rate of a large square matrix multiplication, in the dtype that the run computes in, measured on
  this device when training starts. It is not the maker's figure, and other work on the machine lowers it.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import nn

from preference.engine.forward import causal_lm
from preference.models.hardware import half_type


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Floating-point operations a second of a square matrix multiplication, the best of what fits in `seconds`."""
    size = 1024 if device.type == "cpu" else 8192

    def multiply() -> float:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        generator = torch.Generator(device).manual_seed(0)  # of its own: the run's random numbers stay as they are
        a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
        multiply()  # allocates, and picks a kernel
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < end:
            times.append(multiply())
    return 2 * size**3 / min(times)


def flops_per_token(model: Any, head: bool) -> float | None:
    """Floating-point operations of the weight matrices per token, forward and backward.

    Args:
        head: whether the output head runs on every token.

    Returns:
        None where the weights do not say it: experts that see some tokens only, quantized or sharded weights.
    """
    model = causal_lm(model)
    output = model.get_output_embeddings()
    lookups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = [p for p in model.parameters() if p.ndim > 1 and id(p) not in lookups and p is not output.weight]
    if any(p.ndim > 2 or not p.is_floating_point() or not p.numel() for p in weights):
        return None
    if head:
        weights.append(output.weight)
    return float(sum(p.numel() * (6 if p.requires_grad else 4) for p in weights))


def compute_dtype(args: Any, model: Any) -> torch.dtype:
    """What the matrices are multiplied in: autocast's dtype, or the weights'."""
    return half_type(args) or causal_lm(model).dtype


def peak_memory(device: torch.device) -> float | None:
    """GiB: the most that PyTorch has held on the GPU, or the process in main memory; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class SpeedMeter:
    """Speed between readings; what `skip` closes off (evaluations, checkpoints, sample answers) is not training.

    Args:
        pairs_per_step: of all ranks.
        tokens_per_count: tokens that one unit of the Trainer's operation count stands for; None: they are not counted.
        flops_per_token, peak: see the module; None: unknown.
    """

    def __init__(
        self,
        pairs_per_step: int,
        tokens_per_count: float | None,
        flops_per_token: float | None,
        peak: float | None,
        ranks: int = 1,
    ) -> None:
        self.pairs_per_step, self.tokens_per_count = pairs_per_step, tokens_per_count
        self.flops_per_token, self.peak, self.ranks = flops_per_token, peak, ranks
        self.seconds = 0.0  # of training, so far
        self.start(0, 0.0)

    def start(self, step: int, count: float, seconds: float = 0.0) -> None:
        """From here on; `seconds` of training went before (a resumed run)."""
        self.since = self.touched = time.perf_counter()
        self.step, self.count, self.skipped, self.seconds = step, count, 0.0, seconds

    def touch(self) -> None:
        """A training step has ended now."""
        self.touched = time.perf_counter()

    def skip(self) -> None:
        """What happened since the last `touch` or `skip` was no training."""
        now = time.perf_counter()
        self.skipped += now - self.touched
        self.touched = now

    def read(self, step: int, count: float) -> dict[str, float]:
        """Figures since the last reading: `step` steps are done, the Trainer's operation count stands at `count`."""
        now = time.perf_counter()
        seconds = max(now - self.since - self.skipped, 1e-9)
        figures = {"pairs_per_second": (step - self.step) * self.pairs_per_step / seconds}
        if self.tokens_per_count:
            tokens = (count - self.count) * self.tokens_per_count
            figures["tokens_per_second"] = tokens / seconds
            if self.flops_per_token and self.peak:
                figures["mfu"] = tokens * self.flops_per_token / (seconds * self.ranks * self.peak)
        self.start(step, count, self.seconds + seconds)
        return figures
