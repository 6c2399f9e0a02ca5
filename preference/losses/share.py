"""A micro-batch's share of the loss of its global batch.

An optimizer step has one loss, a function of its global batch alone: token means run over all its tokens and pair
means over all its pairs. A micro-batch computes its share of it (`objective_share`), with the global counts in
`Totals`; shares and their gradients add up, so how a batch is cut into micro-batches, accumulation steps and ranks
cannot matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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


def _per_pair_metrics(x: Answers) -> dict[str, Tensor]:
    """The metrics of each pair, [B]. "preference" compares log-probabilities per token, "rewards" the loss' own."""
    means, rewards = x.means, x.rewards
    shown = means if x.o.reward == "mean" else (x.logps.chosen_B, x.logps.rejected_B)
    metrics = {
        "logps/chosen": shown[0],
        "logps/rejected": shown[1],
        "preference/accuracies": wins(*means),
        "preference/margins": means[0] - means[1],
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/accuracies": wins(*rewards),
        "rewards/margins": rewards[0] - rewards[1],
    }
    if "orpo" in dict(x.o.parts):
        log_odds_B = reference_free.log_odds(x)
        metrics |= {"log_odds_chosen": log_odds_B, "log_odds_ratio": F.logsigmoid(log_odds_B)}
    return metrics


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
    loss = logps.chosen_B.new_zeros(())
    for name, weight in objective.parts:
        pair_loss_B = FORMULAS[name](Answers(objective, logps, reference, coupled and coupled.get(name)))
        loss = loss + weight * (weight_B * pair_loss_B).sum() / totals.pairs
    if objective.nll_weight:
        loss = loss + objective.nll_weight * _nll_share(objective, logps, weight_B, totals)
    if logps.desirable_B is None:
        nll = _nll_share(objective, logps, logps.weight_B, totals).detach()  # shown whether or not it is learned
        sums = {"nll_loss": nll * totals.pairs}
        per_pair = _per_pair_metrics(Answers(objective, logps, reference))
    else:
        sums, per_pair = {}, _single_metrics(Answers(objective, logps, reference, coupled and coupled.get("kto")))
    sums |= {name: (logps.weight_B * value_B.detach()).sum() for name, value_B in per_pair.items()}
    return loss, {"loss": loss.detach() * totals.pairs} | sums
