"""What this machine offers a run: device, bfloat16, and how many pairs fit in a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PAIRS_PER_STEP = 8  # default pairs of one device per optimizer step


@dataclass(frozen=True)
class Hardware:
    """A device (`cuda`, `mps` or `cpu`), its name, its memory in bytes and whether it computes in bfloat16."""

    device: str
    name: str
    memory: int
    bf16: bool

    def __str__(self) -> str:
        return f"{self.name}, {self.memory / 2**30:.0f} GiB, {'bfloat16' if self.bf16 else 'float32'}"


def detect(use_cpu: bool = False) -> Hardware:
    """The device that transformers' Trainer will use in this process."""
    if torch.cuda.is_available() and not use_cpu:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        # Emulated bfloat16 (before Ampere) is slower than float32.
        return Hardware(
            "cuda", properties.name, properties.total_memory, torch.cuda.is_bf16_supported(including_emulation=False)
        )
    if torch.backends.mps.is_available() and not use_cpu:
        return Hardware("mps", "Apple GPU", torch.mps.recommended_max_memory(), False)
    return Hardware("cpu", f"CPU ({torch.get_num_threads()} threads)", _system_memory(), _cpu_has_bf16())


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices natively (AVX512-BF16, AMX); otherwise it is slower than float32."""
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check and check())


def _system_memory() -> int:
    import os

    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # no POSIX sysconf here
        return 0


def batch_plan(pairs: int, accumulation: int, hardware: Hardware) -> tuple[int, int]:
    """Pairs per micro-batch and micro-batches per step; zeros are filled in from the hardware.

    The default is `PAIRS_PER_STEP` pairs a step, cut into smaller micro-batches where memory is short. With the packed
    engine the cut changes memory and speed, never the gradient.
    """
    if pairs == 0:
        roomy = hardware.memory >= 40 * 2**30
        pairs = PAIRS_PER_STEP if roomy and hardware.device == "cuda" else 4 if hardware.memory >= 12 * 2**30 else 2
        if accumulation > 0:
            pairs = min(pairs, max(1, PAIRS_PER_STEP // accumulation))
    return pairs, accumulation or max(1, PAIRS_PER_STEP // pairs)


def same_step(pairs_per_step: int, pairs: int, processes: int) -> tuple[int, int]:
    """Pairs per micro-batch (at most `pairs`) and micro-batches per step that make `pairs_per_step` on `processes`.

    Raises:
        ValueError: they cannot be dealt out evenly.
    """
    share, rest = divmod(pairs_per_step, processes)
    if rest or not share:
        raise ValueError(f"{pairs_per_step} pairs per optimizer step cannot be dealt evenly to {processes} processes")
    pairs = next(n for n in range(min(pairs, share), 0, -1) if share % n == 0)
    return pairs, share // pairs
