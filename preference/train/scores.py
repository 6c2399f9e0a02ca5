"""Numbers that ranks add up on the device and read once: metrics, and what a model gives each pair of a set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preference.losses import PairLogps


class MetricSums:
    """Sums of metrics on the device; they reach the host, and other ranks, when they are read."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], Tensor] = {}  # by the names that came together
        self.steps = 0

    def add(self, values: Mapping[str, Tensor], scale: float) -> None:
        names, sums = tuple(values), torch.stack([value.float() for value in values.values()]).mul_(scale)
        self.sums[names] = self.sums[names].add_(sums) if names in self.sums else sums

    def read(self, accelerator: Any) -> dict[str, float]:
        """Means over steps of what all ranks added, under the names that they were added by; empties the sums."""
        if not self.sums:
            return {}
        names, sums = [name for group in self.sums for name in group], torch.cat(list(self.sums.values()))
        means: dict[str, float] = dict.fromkeys(names, 0.0)
        for name, value in zip(names, accelerator.reduce(sums, "sum").tolist(), strict=True):
            means[name] += value / max(self.steps, 1)
        self.sums, self.steps = {}, 0
        return means


class PairScores:
    """The summed log-probabilities of both answers of `pairs` pairs, each of which one rank sees."""

    def __init__(self, pairs: int, device: torch.device) -> None:
        self.sums_N2 = torch.zeros(pairs, 2, device=device)

    def add(self, rows_B: Tensor, logps: PairLogps, sums: tuple[Tensor, Tensor] | None = None) -> None:
        """`rows_B`: each pair's place in the set; pairs of weight 0 only fill up a batch. `sums` instead of logps'."""
        chosen_B, rejected_B = (logps.chosen_B, logps.rejected_B) if sums is None else sums
        values_B2 = torch.stack([chosen_B, rejected_B], dim=1).float()
        kept_B1 = (logps.weight_B > 0)[:, None]  # not as an index: its size would have to be known on the host
        self.sums_N2.index_add_(0, rows_B, torch.where(kept_B1, values_B2, 0.0))

    def reduced(self, accelerator: Any) -> Tensor:
        """[N, 2] (chosen, rejected) on the device, on every rank."""
        return accelerator.reduce(self.sums_N2, "sum")

    def read(self, accelerator: Any) -> np.ndarray:
        """[N, 2] float32 (chosen, rejected), on every rank."""
        return self.reduced(accelerator).cpu().numpy()
