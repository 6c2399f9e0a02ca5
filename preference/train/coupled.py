"""The first of two passes over a global batch, for losses that need to know all of it (losses/coupling.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor

from preference.losses import Objective, PairLogps, couple
from preference.losses.answers import weighted_sums

Sums = tuple[Tensor, Tensor]


def couple_step(
    objective: Objective, logps: Sequence[PairLogps], references: Sequence[Sums], rank: int
) -> list[dict[str, Tensor]]:
    """For each of this rank's micro-batches what its pairs have to know of the global batch. All ranks together.

    Args:
        logps, references: without gradient, one for each micro-batch of this rank.
    """
    sums_P4 = torch.cat(
        [
            torch.stack([*weighted_sums(objective, own), *frozen], dim=1)
            for own, frozen in zip(logps, references, strict=True)
        ]
    )
    kept_P = torch.cat([own.weight_B > 0 for own in logps])  # pairs of weight 0 are no part of the batch
    ranks = gather_object([sums_P4[kept_P].tolist()])
    before = sum(map(len, ranks[:rank]))
    all_M4 = torch.tensor([row for rows in ranks for row in rows], dtype=sums_P4.dtype, device=sums_P4.device)
    chosen_M, rejected_M, *reference = all_M4.unbind(1)
    mine = slice(before, before + len(ranks[rank]))
    sizes = [len(own.weight_B) for own in logps]
    parts: list[dict[str, Tensor]] = [{} for _ in sizes]
    for name, values_M2 in couple(objective, (chosen_M, rejected_M), tuple(reference)).items():
        own_P2 = sums_P4.new_zeros(len(sums_P4), 2)
        own_P2[kept_P] = values_M2[mine]
        for part, values_B2 in zip(parts, own_P2.split(sizes), strict=True):
            part[name] = values_B2
    return parts


def couple_set(objective: Objective, sums_N2: Tensor, reference_N2: Tensor) -> dict[str, Tensor]:
    """The same for an evaluation set, which is one batch: [N, 2] by loss, for all its rows."""
    return couple(objective, tuple(sums_N2.unbind(1)), tuple(reference_N2.unbind(1)))
