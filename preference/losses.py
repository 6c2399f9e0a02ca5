"""Preference objectives: pure functions of summed log-probabilities and lengths.

An optimizer step has one loss, a function of its global batch alone: token means run over all its tokens and pair
means over all its pairs. A micro-batch computes its share of it (`objective_share`), with the global counts in
`Totals`; shares and their gradients add up, so how a batch is cut into micro-batches, accumulation steps and ranks
cannot matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NLL_SCOPES = ("sequence", "answer", "answer_per_pair")


@dataclass
class PairLogps:
    """What a model says about B pairs: sums of token log-probabilities (natural log), and how many tokens in each.

    All have shape [B]. `prompt_B` covers prompt tokens 1..p-1, each given those before it; it is zero where the batch
    was packed without them. `weight_B` is 1 for a pair of the batch and 0 for one that only evens out the ranks.
    """

    chosen_B: Tensor
    rejected_B: Tensor
    prompt_B: Tensor
    chosen_len_B: Tensor
    rejected_len_B: Tensor
    prompt_len_B: Tensor
    weight_B: Tensor


@dataclass(frozen=True)
class Objective:
    """A loss of `LOSSES` with its constants.

    Attributes:
        loss: name in `LOSSES`.
        beta: strength of the preference term (ORPO's lambda, DPO's beta, IPO's tau).
        nll_scope: ORPO's likelihood term. "sequence": prompt and answer tokens, token mean (the authors' code, TRL);
        "answer":
            answer tokens, token mean (ms-swift); "answer_per_pair": mean per answer, then over pairs (the paper,
            LLaMA-Factory).
        label_smoothing: dpo, robust, simpo, cpo: the share of labels taken to be flipped, below 0.5.
        simpo_gamma: SimPO's target margin, in units of the loss.
        cpo_alpha: weight of CPO's likelihood term.

    Raises:
        ValueError: an unknown loss or scope, or a constant outside its range.
    """

    loss: str = "orpo"
    beta: float = 0.1
    nll_scope: str = "sequence"
    label_smoothing: float = 0.0
    simpo_gamma: float = 1.0
    cpo_alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}: {', '.join(LOSSES)}")
        if self.nll_scope not in NLL_SCOPES:
            raise ValueError(f"unknown nll_scope {self.nll_scope!r}: {', '.join(NLL_SCOPES)}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing lies in [0, 0.5); got {self.label_smoothing}")
        if not math.isfinite(self.beta) or self.beta < 0 or (self.beta == 0 and self.loss != "orpo"):
            raise ValueError(f"beta is a positive number (0 is allowed for orpo: likelihood alone); got {self.beta}")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model's log-probabilities."""
        return self.loss in ("dpo", "robust", "ipo", "hinge")

    @property
    def needs_prompt(self) -> bool:
        """Whether the loss reads the log-probabilities of prompt tokens; without, they need not be computed."""
        return self.loss == "orpo" and self.nll_scope == "sequence"

    def nll_tokens(self, prompt_tokens: int, chosen_tokens: int) -> int:
        """Tokens that one pair adds to `Totals.nll_tokens`: a prompt of p tokens has p-1 predicted ones."""
        return chosen_tokens + (prompt_tokens - 1 if self.needs_prompt else 0)


@dataclass(frozen=True)
class Totals:
    """Counts over the global batch of one optimizer step: every micro-batch of every rank."""

    pairs: float
    nll_tokens: float

    @classmethod
    def of(cls, objective: Objective, lengths: Iterable[tuple[int, int]]) -> Totals:
        """Totals of a batch from its pairs' (prompt tokens, chosen tokens)."""
        tokens = [objective.nll_tokens(p, c) for p, c in lengths]
        return cls(len(tokens), sum(tokens))


@dataclass
class Terms:
    """One loss over B pairs: each one's preference term, what counts as a reward, the weight of the likelihood."""

    pair_loss_B: Tensor
    chosen_reward_B: Tensor
    rejected_reward_B: Tensor
    nll_weight: float = 0.0
    extra: dict[str, Tensor] | None = None


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, finite in value and gradient down to x = 0 exactly.

    The two branches meet at -log 2 (Maechler 2012, "Accurately computing log(1 - exp(-|a|))"). Each branch sees only
    inputs that it can take, as `where` would pass on the NaN gradient of the one not selected; inputs above -eps are
    read as -eps, which is the resolution of a log-probability near 0, and get no gradient.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)
    at_near = torch.where(near, x, -1.0)
    at_far = torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(at_near)), torch.log1p(-torch.exp(at_far)))


def _mean_logps(logps: PairLogps) -> tuple[Tensor, Tensor]:
    return logps.chosen_B / logps.chosen_len_B, logps.rejected_B / logps.rejected_len_B


def _smoothed(margin_B: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(margin_B) - smoothing * F.logsigmoid(-margin_B)


def orpo(o: Objective, logps: PairLogps, reference: None) -> Terms:
    """Hong et al. 2024 (arXiv 2403.07691), eq. 6 and 7: NLL(chosen) - beta * log sigmoid(log odds ratio)."""
    chosen_B, rejected_B = _mean_logps(logps)
    log_odds_B = (chosen_B - rejected_B) - (log1mexp(chosen_B) - log1mexp(rejected_B))
    ratio_B = F.logsigmoid(log_odds_B)
    extra = {"log_odds_ratio": ratio_B, "log_odds_chosen": log_odds_B}
    extra |= {"logps/chosen": chosen_B, "logps/rejected": rejected_B}
    return Terms(-o.beta * ratio_B, o.beta * chosen_B, o.beta * rejected_B, nll_weight=1.0, extra=extra)


def _log_ratios(logps: PairLogps, reference: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return logps.chosen_B - reference[0], logps.rejected_B - reference[1]


def dpo(o: Objective, logps: PairLogps, reference: tuple[Tensor, Tensor]) -> Terms:
    """Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; with label_smoothing Mitchell's conservative DPO."""
    chosen_B, rejected_B = _log_ratios(logps, reference)
    return Terms(_smoothed(o.beta * (chosen_B - rejected_B), o.label_smoothing), o.beta * chosen_B, o.beta * rejected_B)


def robust(o: Objective, logps: PairLogps, reference: tuple[Tensor, Tensor]) -> Terms:
    """Chowdhury et al. 2024 (arXiv 2403.00409), eq. 14: DPO made unbiased under flipped labels."""
    chosen_B, rejected_B = _log_ratios(logps, reference)
    margin_B, flip = o.beta * (chosen_B - rejected_B), o.label_smoothing
    loss_B = (flip * F.logsigmoid(-margin_B) - (1 - flip) * F.logsigmoid(margin_B)) / (1 - 2 * flip)
    return Terms(loss_B, o.beta * chosen_B, o.beta * rejected_B)


def hinge(o: Objective, logps: PairLogps, reference: tuple[Tensor, Tensor]) -> Terms:
    """Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425) on DPO's margin: max(0, 1 - beta * margin)."""
    chosen_B, rejected_B = _log_ratios(logps, reference)
    return Terms(torch.relu(1 - o.beta * (chosen_B - rejected_B)), o.beta * chosen_B, o.beta * rejected_B)


def ipo(o: Objective, logps: PairLogps, reference: tuple[Tensor, Tensor]) -> Terms:
    """Azar et al. 2023 (arXiv 2310.12036), eq. 17, on log-ratios per token as the authors ran it."""
    chosen_B, rejected_B = _log_ratios(logps, reference)
    margin_B = chosen_B / logps.chosen_len_B - rejected_B / logps.rejected_len_B
    return Terms((margin_B - 1 / (2 * o.beta)) ** 2, o.beta * chosen_B, o.beta * rejected_B)


def simpo(o: Objective, logps: PairLogps, reference: None) -> Terms:
    """Meng et al. 2024 (arXiv 2405.14734), eq. 6: -log sigmoid(beta * difference of token means - gamma)."""
    chosen_B, rejected_B = _mean_logps(logps)
    loss_B = _smoothed(o.beta * (chosen_B - rejected_B) - o.simpo_gamma, o.label_smoothing)
    extra = {"logps/chosen": chosen_B, "logps/rejected": rejected_B}
    return Terms(loss_B, o.beta * chosen_B, o.beta * rejected_B, extra=extra)


def cpo(o: Objective, logps: PairLogps, reference: None) -> Terms:
    """Xu et al. 2024 (arXiv 2401.08417), eq. 3 and 5: DPO with a uniform reference, plus the chosen answers' NLL."""
    margin_B = o.beta * (logps.chosen_B - logps.rejected_B)
    rewards = (o.beta * logps.chosen_B, o.beta * logps.rejected_B)
    return Terms(_smoothed(margin_B, o.label_smoothing), *rewards, nll_weight=o.cpo_alpha)


LOSSES: dict[str, Callable[..., Terms]] = {
    "orpo": orpo,
    "dpo": dpo,
    "robust": robust,
    "simpo": simpo,
    "ipo": ipo,
    "cpo": cpo,
    "hinge": hinge,
}


def _nll_share(o: Objective, logps: PairLogps, totals: Totals) -> Tensor:
    if o.loss == "orpo" and o.nll_scope == "answer_per_pair":
        return -(logps.weight_B * logps.chosen_B / logps.chosen_len_B).sum() / totals.pairs
    tokens_B = logps.chosen_B + logps.prompt_B if o.needs_prompt else logps.chosen_B
    return -(logps.weight_B * tokens_B).sum() / totals.nll_tokens


def objective_share(
    objective: Objective, logps: PairLogps, totals: Totals, reference: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the loss of its global batch.

    Args:
        logps: the policy's log-probabilities of the micro-batch, B pairs.
        totals: counts of the global batch.
        reference: (chosen, rejected) sums of the reference model, each [B], for losses that need them.

    Returns:
        The share, a scalar; the shares of all micro-batches of all ranks sum to the loss. And metrics under TRL's
        names, each a detached sum over the micro-batch's pairs: summed over a global batch and divided by its pairs
        it is the metric.

    Raises:
        ValueError: a loss that needs a reference got none, or the other way round.
    """
    if objective.needs_reference != (reference is not None):
        raise ValueError(f"loss={objective.loss} takes {'a' if objective.needs_reference else 'no'} reference")
    terms = LOSSES[objective.loss](objective, logps, reference)
    weight_B = logps.weight_B
    loss = (weight_B * terms.pair_loss_B).sum() / totals.pairs
    sums: dict[str, Tensor] = {}
    if terms.nll_weight:
        nll = _nll_share(objective, logps, totals)
        loss = loss + terms.nll_weight * nll
        sums["nll_loss"] = nll.detach() * totals.pairs
    per_pair = {
        "logps/chosen": logps.chosen_B,
        "logps/rejected": logps.rejected_B,
        "rewards/chosen": terms.chosen_reward_B,
        "rewards/rejected": terms.rejected_reward_B,
        "rewards/accuracies": (terms.chosen_reward_B > terms.rejected_reward_B).to(weight_B.dtype),
        "rewards/margins": terms.chosen_reward_B - terms.rejected_reward_B,
    } | (terms.extra or {})
    sums |= {name: (weight_B * value_B.detach()).sum() for name, value_B in per_pair.items()}
    return loss, {"loss": loss.detach() * totals.pairs} | sums
