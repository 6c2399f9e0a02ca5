"""Losses that need no reference model: each pair's preference term, [B]. The NLL beside it is added in share.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from preference.losses.answers import EXP_MAX, Answers, smoothed


def orpo(x: Answers) -> Tensor:
    """Eq. 7 of ORPO: -lambda log sigmoid(log odds ratio).

    The temperature inside is that of Gorbatovski et al. 2025 (arXiv 2502.01237); 1 in ORPO's paper.
    """
    return -x.beta * F.logsigmoid(x.o.orpo_temperature * x.log_odds)


def simpo(x: Answers) -> Tensor:
    """Eq. 6 of SimPO: -log sigmoid(beta (mean chosen - mean rejected) - gamma)."""
    chosen_B, rejected_B = x.means
    return smoothed(x.beta * (chosen_B - rejected_B) - x.o.simpo_gamma - x.target, x.o.label_smoothing)


def alphapo(x: Answers) -> Tensor:
    """SimPO's loss with AlphaPO's reward (1 - p^-alpha) / alpha, p the geometric mean of the token probabilities."""
    alpha, (chosen_B, rejected_B) = x.o.alphapo_alpha, x.means
    if alpha:
        chosen_B = -torch.expm1((-alpha * chosen_B).clamp(max=EXP_MAX)) / alpha
        rejected_B = -torch.expm1((-alpha * rejected_B).clamp(max=EXP_MAX)) / alpha
    return smoothed(x.beta * (chosen_B - rejected_B) - x.o.simpo_gamma - x.target, x.o.label_smoothing)


def cpo(x: Answers) -> Tensor:
    """Eq. 3 of CPO: DPO with a uniform reference."""
    chosen_B, rejected_B = x.sums
    return smoothed(x.beta * (chosen_B - rejected_B) - x.target, x.o.label_smoothing)


def slic(x: Answers) -> Tensor:
    """SLiC-HF's rank calibration: max(0, beta - log p(chosen) + log p(rejected)); beta is the paper's delta."""
    chosen_B, rejected_B = x.sums
    return torch.relu(x.beta + x.target - chosen_B + rejected_B)


def rrhf(x: Answers) -> Tensor:
    """RRHF's ranking loss on log-probabilities per token: beta max(0, mean rejected - mean chosen)."""
    chosen_B, rejected_B = x.means
    return x.beta * torch.relu(rejected_B - chosen_B)


def simper(x: Answers) -> Tensor:
    """SimPER's difference of inverse perplexities: -exp(mean chosen) + exp(mean rejected)."""
    chosen_B, rejected_B = x.means
    return rejected_B.exp() - chosen_B.exp()


def sft(x: Answers) -> Tensor:
    """No preference term at all: the likelihood beside it is the loss."""
    return torch.zeros_like(x.logps.chosen_B)
