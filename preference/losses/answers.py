"""What a loss reads: the log-probabilities of B pairs, and the log-ratios and scores that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from preference.losses.objective import Objective

EXP_MAX = 80.0  # exp of anything larger overflows float32; the gradient ends there too


@dataclass
class PairLogps:
    """What a model says about B pairs: sums of token log-probabilities (natural log), and how many tokens in each.

    All have shape [B]. `prompt_B` covers prompt tokens 1..p-1, each given those before it; it is zero where the batch
    was packed without them. `weight_B` is 1 for a pair of the batch and 0 for one that only evens out the ranks. The
    tails are the sums over the tokens beyond the shorter answer's length, `pair_weight_B` and `score_margin_B` what
    the data's columns of these names hold; None where nobody asked for them.

    Rows of one answer each (KTO) lie in the same two: `chosen_B` is the row's own answer, good or bad as `desirable_B`
    says (1 or 0), and `rejected_B` an answer to another prompt, by which the KL divergence is estimated.
    """

    chosen_B: Tensor
    rejected_B: Tensor
    prompt_B: Tensor
    chosen_len_B: Tensor
    rejected_len_B: Tensor
    prompt_len_B: Tensor
    weight_B: Tensor
    chosen_tail_B: Tensor | None = None
    rejected_tail_B: Tensor | None = None
    pair_weight_B: Tensor | None = None
    score_margin_B: Tensor | None = None
    desirable_B: Tensor | None = None


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, finite in value and gradient down to x = 0 exactly.

    The two branches meet at -log 2 (Maechler 2012, "Accurately computing log(1 - exp(-|a|))"). Each branch sees only
    inputs that it can take, as `where` would pass on the NaN gradient of the one not selected; inputs above -eps are
    read as -eps, which is the resolution of a log-probability near 0, and get no gradient.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)
    at_near = x.masked_fill(~near, -1.0)
    at_far = x.masked_fill(near, -1.0)
    return torch.where(near, torch.log(-torch.expm1(at_near)), torch.log1p(-torch.exp(at_far)))


def wins(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """1 where chosen is ahead, half for a tie."""
    return ((chosen_B > rejected_B).to(chosen_B.dtype) + (chosen_B >= rejected_B).to(chosen_B.dtype)) / 2


def smoothed(margin_B: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid of the margin, where a share `smoothing` of the labels is taken to be flipped."""
    if not smoothing:
        return -F.logsigmoid(margin_B)
    return -(1 - smoothing) * F.logsigmoid(margin_B) - smoothing * F.logsigmoid(-margin_B)


def weighted_sums(o: Objective, logps: PairLogps) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) log-probabilities [B] with LD-DPO's weight on what lies beyond the shorter answer's length.

    Raises:
        ValueError: the sums over those tokens are not there.
    """
    if o.ld_alpha == 1:
        return logps.chosen_B, logps.rejected_B
    if logps.chosen_tail_B is None or logps.rejected_tail_B is None:
        raise ValueError(f"ld_alpha={o.ld_alpha:g} needs the log-probabilities beyond the shorter answer's length")
    less = 1 - o.ld_alpha
    return logps.chosen_B - less * logps.chosen_tail_B, logps.rejected_B - less * logps.rejected_tail_B


def _divergence_score(o: Objective, ratio_B: Tensor) -> Tensor:
    """f'(t) at t = exp(ratio), up to constants: Wang et al. 2023 (arXiv 2309.16240), table 1; reverse KL is DPO."""
    if o.f_divergence == "forward_kl":
        return 1 - torch.exp((-ratio_B).clamp(max=EXP_MAX))
    if o.f_divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio_B)
    if o.f_divergence == "alpha_divergence" and abs(o.f_alpha - 1) > 1e-6:  # at 1 it is reverse KL
        power = o.f_alpha - 1
        return torch.expm1((power * ratio_B).clamp(max=EXP_MAX)) / power
    return ratio_B


class Answers:
    """B pairs as the formulas read them; every property is a pair (chosen, rejected) of tensors [B].

    Args:
        reference: the reference model's sums of log-probabilities, for losses that compare with one.
        coupled: [B, 2] for losses that depend on the global batch (losses/coupling.py).
    """

    def __init__(
        self,
        o: Objective,
        logps: PairLogps,
        reference: tuple[Tensor, Tensor] | None = None,
        coupled: Tensor | None = None,
    ) -> None:
        self.o, self.logps, self.reference, self.coupled = o, logps, reference, coupled

    @property
    def beta(self) -> float:
        assert self.o.beta is not None  # an objective fills it in
        return self.o.beta

    @property
    def partners(self) -> Tensor:
        """[B, 2]: what the pairs have to know of their global batch."""
        assert self.coupled is not None  # objective_share has seen to it
        return self.coupled

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        return weighted_sums(self.o, self.logps)

    @cached_property
    def means(self) -> tuple[Tensor, Tensor]:
        """Log-probability per token."""
        return self.logps.chosen_B / self.logps.chosen_len_B, self.logps.rejected_B / self.logps.rejected_len_B

    @cached_property
    def log_odds(self) -> Tensor:
        """[B]: log of the odds ratio of chosen over rejected, from log-probabilities per token."""
        chosen_B, rejected_B = self.means
        of_chosen_B, of_rejected_B = log1mexp(torch.stack([chosen_B, rejected_B])).unbind()
        return (chosen_B - rejected_B) - (of_chosen_B - of_rejected_B)

    @cached_property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """log(policy / reference)."""
        assert self.reference is not None  # objective_share has seen to it
        chosen_B, rejected_B = self.sums
        return chosen_B - self.reference[0], rejected_B - self.reference[1]

    @property
    def scores(self) -> tuple[Tensor, Tensor]:
        """Log-ratios, or what another divergence than reverse KL makes of them."""
        chosen_B, rejected_B = self.ratios
        return _divergence_score(self.o, chosen_B), _divergence_score(self.o, rejected_B)

    @property
    def mean_scores(self) -> tuple[Tensor, Tensor]:
        """Scores per token."""
        chosen_B, rejected_B = self.scores
        return chosen_B / self.logps.chosen_len_B, rejected_B / self.logps.rejected_len_B

    @cached_property
    def rewards(self) -> tuple[Tensor, Tensor]:
        kinds = {"ratio": "ratios", "mean": "means", "sum": "sums"}
        chosen_B, rejected_B = getattr(self, kinds[self.o.reward])
        scale = self.beta or 1.0  # simper and sft read no beta
        return scale * chosen_B, scale * rejected_B

    @property
    def target(self) -> Tensor | float:
        """The margin that a pair's scores ask for, in units of the loss: 0 without them."""
        if not self.o.score_margin:
            return 0.0
        if self.logps.score_margin_B is None:
            raise ValueError(f"score_margin={self.o.score_margin:g} needs a column score_margin in the data")
        return self.o.score_margin * self.logps.score_margin_B
