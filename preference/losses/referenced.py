"""Losses that compare with a reference model: each pair's preference term, [B]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from preference.losses.answers import EXP_MAX, Answers, smoothed

EXO_EPSILON = 1e-3  # the share of the rejected answer in EXO's target where label_smoothing is 0, as in TRL


def _margin(x: Answers) -> Tensor:
    chosen_B, rejected_B = x.scores
    return x.beta * (chosen_B - rejected_B) - x.target


def dpo(x: Answers) -> Tensor:
    """Eq. 7 of DPO; with label_smoothing Mitchell's conservative DPO, with score_margin ODPO."""
    return smoothed(_margin(x), x.o.label_smoothing)


def robust(x: Answers) -> Tensor:
    """Eq. 14 of robust DPO: unbiased where a share label_smoothing of the labels is flipped."""
    flip, margin_B = x.o.label_smoothing, _margin(x)
    return (flip * F.logsigmoid(-margin_B) - (1 - flip) * F.logsigmoid(margin_B)) / (1 - 2 * flip)


def hinge(x: Answers) -> Tensor:
    """SLiC's hinge on DPO's margin: max(0, 1 - beta * margin)."""
    return torch.relu(1 - _margin(x))


def ipo(x: Answers) -> Tensor:
    """Eq. 17 of IPO, on log-ratios per token as the authors ran it."""
    chosen_B, rejected_B = x.mean_scores
    return (chosen_B - rejected_B - 1 / (2 * x.beta)) ** 2


def sigmoid_norm(x: Answers) -> Tensor:
    """Tulu 3's length-normalised DPO: log-ratios per token."""
    chosen_B, rejected_B = x.mean_scores
    return smoothed(x.beta * (chosen_B - rejected_B) - x.target, x.o.label_smoothing)


def exo_pair(x: Answers) -> Tensor:
    """Eq. 16 of EXO: KL(softmax of the rewards || (1 - eps, eps))."""
    chosen_B, rejected_B = x.scores
    margin_B = x.beta * (chosen_B - rejected_B)
    epsilon = torch.tensor(x.o.label_smoothing or EXO_EPSILON, dtype=margin_B.dtype, device=margin_B.device)
    won = torch.sigmoid(margin_B) * (F.logsigmoid(margin_B) - torch.log1p(-epsilon))
    return won + torch.sigmoid(-margin_B) * (F.logsigmoid(-margin_B) - torch.log(epsilon))


def discopop(x: Answers) -> Tensor:
    """Eq. 5 of DiscoPOP: log-ratio modulated loss, a blend of the logistic and the exponential loss."""
    chosen_B, rejected_B = x.scores
    margin_B = x.beta * (chosen_B - rejected_B)
    blend = margin_B / x.o.discopop_tau
    # exp(-m) sigmoid(m / tau) in one exponential: the factors alone overflow and vanish
    exponential = torch.exp((F.logsigmoid(blend) - margin_B).clamp(max=EXP_MAX))
    return -F.logsigmoid(margin_B) * torch.sigmoid(-blend) + exponential


def dpop(x: Answers) -> Tensor:
    """Eq. 3 of DPO-Positive: DPO's margin less lambda max(0, log-ratio that the chosen answer has lost)."""
    chosen_B, rejected_B = x.ratios
    margin_B = chosen_B - rejected_B - x.o.dpop_lambda * torch.relu(-chosen_B)
    return smoothed(x.beta * margin_B - x.target, x.o.label_smoothing)


def rdpo(x: Answers) -> Tensor:
    """Length-regularised DPO: the margin less alpha (chosen tokens - rejected tokens)."""
    chosen_B, rejected_B = x.ratios
    longer_B = x.logps.chosen_len_B - x.logps.rejected_len_B
    margin_B = x.beta * (chosen_B - rejected_B) - x.o.length_penalty * longer_B
    return smoothed(margin_B - x.target, x.o.label_smoothing)


def chipo(x: Answers) -> Tensor:
    """Chi-squared preference optimization: DPO with the link t + log t of the ratio t, clipped as in the paper."""
    chosen_B, rejected_B = (ratio_B + torch.exp(ratio_B.clamp(-88.0, 20.0)) for ratio_B in x.ratios)
    return smoothed(x.beta * (chosen_B - rejected_B) - x.target, x.o.label_smoothing)


def nca_pair(x: Answers) -> Tensor:
    """NCA for two answers: each answer's own log-ratio, absolute rather than relative."""
    chosen_B, rejected_B = (x.beta * ratio_B for ratio_B in x.ratios)
    return -F.logsigmoid(chosen_B) - 0.5 * F.logsigmoid(-chosen_B) - 0.5 * F.logsigmoid(-rejected_B)


def bco_pair(x: Answers) -> Tensor:
    """Binary classifier optimization on pairs, without its running shift of the rewards."""
    chosen_B, rejected_B = (x.beta * ratio_B for ratio_B in x.ratios)
    return -F.logsigmoid(chosen_B) - F.logsigmoid(-rejected_B)


def sppo_hard(x: Answers) -> Tensor:
    """Eq. 4.7 of SPPO where the chosen answer wins for certain."""
    chosen_B, rejected_B = x.ratios
    return (chosen_B - 0.5 / x.beta) ** 2 + (rejected_B + 0.5 / x.beta) ** 2


def apo_zero(x: Answers) -> Tensor:
    """Eq. 7 of APO: chosen up, rejected down; for chosen answers better than the model's own."""
    chosen_B, rejected_B = (x.beta * ratio_B for ratio_B in x.ratios)
    return torch.sigmoid(-chosen_B) + torch.sigmoid(rejected_B)


def apo_down(x: Answers) -> Tensor:
    """Eq. 8 of APO: both down, rejected more; for chosen answers worse than the model's own."""
    chosen_B, rejected_B = (x.beta * ratio_B for ratio_B in x.ratios)
    return torch.sigmoid(chosen_B) + torch.sigmoid(rejected_B - chosen_B)


def kto_answer(reward_B: Tensor, desirable: bool, baseline_B: Tensor) -> Tensor:
    """Eq. 7 of KTO for one answer: 1 - sigmoid(reward - z) of a desirable one, 1 - sigmoid(z - reward) of another.

    Args:
        reward_B: beta times the log-ratio; baseline_B: z, beta times the estimate of the KL divergence, 0 or more,
            without gradient. For rows that are labelled one by one as well as for pairs.
    """
    return torch.sigmoid(baseline_B - reward_B) if desirable else torch.sigmoid(reward_B - baseline_B)


def kto(x: Answers) -> Tensor:
    """KTO of single answers, or its mean over both answers of a pair; z as coupling.py has it."""
    chosen_B, rejected_B = (x.beta * ratio_B for ratio_B in x.ratios)
    for_chosen_B, for_rejected_B = x.beta * x.partners[:, 0], x.beta * x.partners[:, 1]
    good_B = x.o.kto_desirable_weight * kto_answer(chosen_B, True, for_chosen_B)
    if x.logps.desirable_B is not None:
        bad_B = x.o.kto_undesirable_weight * kto_answer(chosen_B, False, for_chosen_B)
        return torch.where(x.logps.desirable_B > 0, good_B, bad_B)
    return (good_B + x.o.kto_undesirable_weight * kto_answer(rejected_B, False, for_rejected_B)) / 2


def aot(x: Answers) -> Tensor:
    """AOT, paired: the policy's margin against the reference's margin of equal rank in the global batch."""
    chosen_B, rejected_B = x.sums
    return smoothed(x.beta * (chosen_B - rejected_B - x.partners[:, 0]), x.o.label_smoothing)


def aot_unpaired(x: Answers) -> Tensor:
    """AOT, unpaired: chosen log-ratios against rejected ones of equal rank in the global batch.

    Both meet a partner without gradient; the second term brings the rejected answers' gradient and no value.
    """
    chosen_B, rejected_B = x.ratios
    of_chosen = smoothed(x.beta * (chosen_B - x.partners[:, 0]), x.o.label_smoothing)
    of_rejected = smoothed(x.beta * (x.partners[:, 1] - rejected_B), x.o.label_smoothing)
    return of_chosen + of_rejected - of_rejected.detach()
