"""A micro-batch's share of the loss of its global batch.

An optimizer step has one loss, a function of its global batch alone: token means run over all its tokens and pair
means over all its pairs. A micro-batch computes its share of it (`objective_share`), with the global counts in
`Totals`; shares and their gradients add up, so how a batch is cut into micro-batches, accumulation steps and ranks
cannot matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from preference.losses import reference_free, referenced
from preference.losses.answers import Answers, PairLogps, wins
from preference.losses.objective import Objective, Totals
from preference.losses.specs import LOSSES

FORMULAS: dict[str, Callable[[Answers], Tensor]] = {
    name: getattr(referenced if spec.reference else reference_free, "dpo" if name == "rpo" else name)
    for name, spec in LOSSES.items()
    if name != "cpo_simpo"
}
FORMULAS["cpo_simpo"] = reference_free.simpo


def _nll_share(o: Objective, logps: PairLogps, weight_B: Tensor, totals: Totals) -> Tensor:
    if o.nll_scope == "answer_per_pair":
        return -(weight_B * logps.chosen_B / logps.chosen_len_B).sum() / totals.pairs
    tokens_B = logps.chosen_B + logps.prompt_B if o.needs_prompt else logps.chosen_B
    return -(weight_B * tokens_B).sum() / totals.nll_tokens


def _pair_metrics(x: Answers) -> dict[str, Tensor]:
    """The metrics of each pair, [B]. "preference" compares log-probabilities per token, "rewards" the loss' own."""
    means, rewards = x.means, x.rewards
    shown = means if x.o.reward == "mean" else (x.logps.chosen_B, x.logps.rejected_B)
    chosen_2B, rejected_2B = (torch.stack(pair) for pair in zip(means, rewards, strict=True))
    (means_won_B, won_B), (means_ahead_B, ahead_B) = wins(chosen_2B, rejected_2B), chosen_2B - rejected_2B
    metrics = {
        "logps/chosen": shown[0],
        "logps/rejected": shown[1],
        "preference/accuracies": means_won_B,
        "preference/margins": means_ahead_B,
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/accuracies": won_B,
        "rewards/margins": ahead_B,
    }
    if "orpo" in dict(x.o.parts):
        metrics |= {"log_odds_chosen": x.log_odds, "log_odds_ratio": F.logsigmoid(x.log_odds)}
    return metrics


def _weighted(metrics: dict[str, Tensor], weight_B: Tensor) -> dict[str, Tensor]:
    """Their sums, all at once: on a GPU each operation costs a launch, however few numbers it has."""
    sums_M = (weight_B * torch.stack(list(metrics.values()))).sum(1)
    return dict(zip(metrics, sums_M.unbind(), strict=True))


def _single_metrics(x: Answers) -> dict[str, Tensor]:
    """The metrics of rows of one answer, [B]: sums over the good and over the bad ones, which `as_means` divides."""
    desirable_B = x.logps.desirable_B
    assert desirable_B is not None  # only such rows come here
    reward_B = x.rewards[0]
    return {
        "desirable": desirable_B,
        "logps/chosen": desirable_B * x.logps.chosen_B,
        "logps/rejected": (1 - desirable_B) * x.logps.chosen_B,
        "rewards/chosen": desirable_B * reward_B,
        "rewards/rejected": (1 - desirable_B) * reward_B,
        "kl": x.partners[:, 0],
    }


def as_means(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics over all rows as they are shown: those of single answers are means over the good or the bad ones.

    A side without rows has none; `rewards/margins` is the difference of the two means.
    """
    if "desirable" not in metrics:
        return metrics
    shares = {"chosen": metrics["desirable"], "rejected": 1 - metrics["desirable"]}
    shown = {}
    for name, value in metrics.items():
        share = shares.get(name.rpartition("/")[2])
        if share is None or share > 0:
            shown[name] = value if share is None else value / share
    if {"rewards/chosen", "rewards/rejected"} <= shown.keys():
        shown["rewards/margins"] = shown["rewards/chosen"] - shown["rewards/rejected"]
    return shown


def objective_share(
    objective: Objective,
    logps: PairLogps,
    totals: Totals,
    reference: tuple[Tensor, Tensor] | None = None,
    coupled: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the loss of its global batch.

    Args:
        logps: the policy's log-probabilities of the micro-batch, B pairs.
        totals: counts of the global batch.
        reference: (chosen, rejected) sums of the reference model, each [B], for losses that need them.
        coupled: these pairs' rows of what `couple` gave for the global batch, for losses that need it.

    Returns:
        The share, a scalar; the shares of all micro-batches of all ranks sum to the loss. And metrics, most under
        TRL's names, each a detached sum over the micro-batch's pairs: summed over a global batch and divided by its
        pairs it is the metric. `nll_loss` is the chosen answers' NLL, whether or not the objective has it. A pair's
        weight (`pair_weight_B`) is on its loss, not on its metrics. Metrics of single answers go through `as_means`.

    Raises:
        ValueError: a loss that needs a reference or a coupling got none, or the other way round.
    """
    if objective.needs_reference != (reference is not None):
        raise ValueError(f"loss={objective.loss} takes {'a' if objective.needs_reference else 'no'} reference")
    if objective.needs_batch != (coupled is not None):
        raise ValueError(f"loss={objective.loss} takes {'a' if objective.needs_batch else 'no'} coupling of its batch")
    if logps.desirable_B is not None:
        objective.check_single_answers()
    weight_B = logps.weight_B if logps.pair_weight_B is None else logps.weight_B * logps.pair_weight_B
    answers = Answers(objective, logps, reference)
    loss = logps.chosen_B.new_zeros(())
    for name, weight in objective.parts:
        x = Answers(objective, logps, reference, coupled[name]) if coupled and name in coupled else answers
        loss = loss + weight * (weight_B * FORMULAS[name](x)).sum() / totals.pairs
    nll = _nll_share(objective, logps, weight_B, totals) if objective.nll_weight else None
    if nll is not None:
        loss = loss + objective.nll_weight * nll
    sums = {"loss": loss.detach() * totals.pairs}
    with torch.no_grad():
        if logps.desirable_B is not None:
            of_kto = Answers(objective, logps, reference, coupled and coupled.get("kto"))
            return loss, sums | _weighted(_single_metrics(of_kto), logps.weight_B)
        if nll is None or logps.pair_weight_B is not None:  # shown whether or not it is learned
            nll = _nll_share(objective, logps, logps.weight_B, totals)
        return loss, sums | {"nll_loss": nll.detach() * totals.pairs} | _weighted(
            _pair_metrics(answers), logps.weight_B
        )
