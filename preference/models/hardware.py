"""What this machine offers a run: device, precision, and how many pairs fit in a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

PAIRS_PER_STEP = 8  # default pairs of one device per optimizer step


@dataclass(frozen=True)
class Hardware:
    """A device (`cuda`, `mps` or `cpu`), its name, its memory in bytes, whether it computes in bfloat16, and whether
    it is one that runs take float16 on by themselves, for want of bfloat16.
    """

    device: str
    name: str
    memory: int
    bf16: bool
    fp16: bool = False

    def __str__(self) -> str:
        best = "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"
        return f"{self.name}, {self.memory / 2**30:.0f} GiB, {best}"

    def precision(self, bf16: bool | None, fp16: bool | None) -> dict[str, bool]:
        """TrainingArguments' bf16 and fp16 for what the user asks for; None: chosen by what the device has."""
        bf16 = (self.bf16 and not fp16) if bf16 is None else bf16
        return {"bf16": bf16, "fp16": (self.fp16 and not bf16) if fp16 is None else fp16}


def half_type(training: Any) -> torch.dtype | None:
    """What TrainingArguments have products computed in under autocast; None: in the weights' own type."""
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None


def type_name(dtype: torch.dtype | None) -> str:
    """Of a `half_type`, in words."""
    return str(dtype or torch.float32).removeprefix("torch.")


def detect(use_cpu: bool = False) -> Hardware:
    """The device that transformers' Trainer will use in this process."""
    if torch.cuda.is_available() and not use_cpu:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        # Emulated bfloat16 (before Ampere) is slower than float32, and float16 is what such GPUs are made for.
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware("cuda", properties.name, properties.total_memory, bf16, fp16=not bf16)
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
