"""What a pair has to know of the other pairs of its global batch, for losses that are no sum over pairs.

KTO compares with the batch's mean log-ratio, AOT with the reference's margin of equal rank. Both are known only when
the log-probabilities of the whole global batch are, so a step of these losses scores its batch twice: once without
gradient for `couple`, once to learn. Given its result, the loss is a sum over pairs again, exact in value and
gradient however the batch is cut: KTO's baseline has no gradient by definition, and the order of a batch is constant
around any point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from preference.losses.objective import Objective


def _kto(sums: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """z for the chosen answers from the rejected ones' mean log-ratio and the other way round, never below 0.

    Single answers stand among the chosen, each beside an answer to another prompt: the mean log-ratio of those is the
    paper's estimate of the KL divergence.
    """
    z_chosen, z_rejected = (
        (sums[i] - reference[i]).mean().clamp(min=0).expand(len(sums[i])) for i in (1, 0)
    )  # fmt: skip
    return z_chosen, z_rejected


def _of_equal_rank(values_M: Tensor, others_M: Tensor) -> Tensor:
    """For each of `values_M` the one of `others_M` that has its rank."""
    ranks_M = values_M.argsort(stable=True).argsort(stable=True)
    return others_M.sort().values[ranks_M]


def _aot(sums: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    partner_M = _of_equal_rank(sums[0] - sums[1], reference[0] - reference[1])
    return partner_M, partner_M


def _aot_unpaired(sums: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    chosen_M, rejected_M = sums[0] - reference[0], sums[1] - reference[1]
    return _of_equal_rank(chosen_M, rejected_M), _of_equal_rank(rejected_M, chosen_M)


COUPLINGS = {"kto": _kto, "aot": _aot, "aot_unpaired": _aot_unpaired}


def couple(objective: Objective, sums: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """What the losses of `objective` need to know of its global batch.

    Args:
        sums: the policy's (chosen, rejected) sums of log-probabilities of all M pairs of the batch, each [M]; with
            LD-DPO's weights where ld_alpha is set (`answers.weighted_sums`). reference: the reference model's.

    Returns:
        For each such loss [M, 2]; rows of it go to `objective_share` with their pairs.
    """
    sums = tuple(side.detach() for side in sums)
    return {
        name: torch.stack(COUPLINGS[name](sums, reference), dim=1) for name, _ in objective.parts if name in COUPLINGS
    }
