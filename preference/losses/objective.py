"""A loss with its constants, and the counts of the global batch that it is taken over. No torch is needed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from preference.errors import PreferenceError
from preference.losses.specs import LOSSES, default_beta, default_nll_weight, parse_loss

NLL_SCOPES = ("sequence", "answer", "answer_per_pair")
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


class ObjectiveError(PreferenceError, ValueError):
    """Rows that an objective cannot be taken over."""


@dataclass(frozen=True)
class Objective:
    """A loss of `LOSSES`, or a weighted sum of some ("dpo:0.8,bco_pair:0.2"), with its constants.

    Attributes:
        loss: name in `LOSSES`, or names with weights.
        beta: strength of the preference term (ORPO's lambda, DPO's beta, IPO's tau); None: the loss' own default.
        nll_scope: tokens of the likelihood term. "sequence": prompt and answer, token mean (ORPO's authors, TRL);
            "answer": answer tokens, token mean (ms-swift); "answer_per_pair": mean per answer, then over pairs (the
            papers of ORPO and iterative RPO, LLaMA-Factory). None: sequence for orpo, answer_per_pair for rpo, else
            answer.
        nll_weight: weight of the chosen answers' NLL beside the preference term; None: the loss' own (1 for orpo,
            rpo, sft and kin, cpo_alpha for cpo and cpo_simpo, else 0).
        label_smoothing: the share of labels taken to be flipped, below 0.5.
        score_margin: dpo and kin: what a pair's `score_margin` column is multiplied by before it is taken off the
            margin (Amini et al. 2024, arXiv 2402.10571); 0: there is no such column.
        orpo_temperature: multiplies ORPO's log odds inside the sigmoid.
        simpo_gamma: SimPO's target margin, in units of the loss.
        cpo_alpha: weight of CPO's likelihood term.
        alphapo_alpha: AlphaPO's shape of the reward; 0 is SimPO.
        discopop_tau, dpop_lambda, length_penalty: constants of discopop, dpop and rdpo.
        ld_alpha: weight of tokens beyond the shorter answer's length (LD-DPO, arXiv 2409.06411, eq. 10); 1: as any.
        kto_desirable_weight, kto_undesirable_weight: KTO's lambdas, what good and bad answers weigh.
        f_divergence: the divergence behind DPO (Wang et al. 2023, arXiv 2309.16240); f_alpha is the alpha of
            alpha_divergence.

    Raises:
        ValueError: an unknown loss, scope or divergence, or a constant outside its range.
    """

    loss: str = "orpo"
    beta: float | None = None
    nll_scope: str | None = None
    label_smoothing: float = 0.0
    simpo_gamma: float = 1.0
    cpo_alpha: float = 1.0
    nll_weight: float | None = None
    score_margin: float = 0.0
    orpo_temperature: float = 1.0
    alphapo_alpha: float = 0.25
    discopop_tau: float = 0.05
    dpop_lambda: float = 50.0
    length_penalty: float = 0.01
    ld_alpha: float = 1.0
    kto_desirable_weight: float = 1.0
    kto_undesirable_weight: float = 1.0
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5

    def __post_init__(self) -> None:
        parse_loss(self.loss)
        self._fill_in()
        if self.nll_scope not in NLL_SCOPES:
            raise ValueError(f"unknown nll_scope {self.nll_scope!r}: {', '.join(NLL_SCOPES)}")
        if self.f_divergence not in F_DIVERGENCES:
            raise ValueError(f"unknown f_divergence {self.f_divergence!r}: {', '.join(F_DIVERGENCES)}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing lies in [0, 0.5); got {self.label_smoothing}")
        needs_beta = any(LOSSES[name].beta for name, _ in self.parts) and self.loss != "orpo"
        beta = 0.0 if self.beta is None else self.beta
        if not math.isfinite(beta) or beta < 0 or (beta == 0 and needs_beta):
            raise ValueError(f"beta is a positive number (0 is allowed for orpo: likelihood alone); got {self.beta}")
        for name in ("orpo_temperature", "discopop_tau", "kto_desirable_weight", "kto_undesirable_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is a positive number; got {getattr(self, name)}")
        for name in ("nll_weight", "cpo_alpha", "dpop_lambda", "length_penalty", "simpo_gamma"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is a number, 0 or more; got {getattr(self, name)}")
        if not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha lies in [0, 1]; got {self.ld_alpha}")

    def _fill_in(self) -> None:
        """The loss' own values for what was left open."""
        if self.beta is None:
            object.__setattr__(self, "beta", default_beta(self.loss))
        names = [name for name, _ in self.parts]
        if self.nll_scope is None:
            scope = "sequence" if "orpo" in names else "answer_per_pair" if names == ["rpo"] else "answer"
            object.__setattr__(self, "nll_scope", scope)
        if self.nll_weight is None:
            object.__setattr__(self, "nll_weight", default_nll_weight(self.loss, self.cpo_alpha))

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """The losses of the sum, each with its weight."""
        return parse_loss(self.loss)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model's log-probabilities."""
        return any(LOSSES[name].reference for name, _ in self.parts)

    @property
    def needs_batch(self) -> bool:
        """Whether a pair's loss depends on the other pairs of its global batch (losses/coupling.py)."""
        return any(LOSSES[name].batch for name, _ in self.parts)

    @property
    def needs_prompt(self) -> bool:
        """Whether the NLL counts the tokens of prompts; without, their log-probabilities need not be computed."""
        return self.nll_scope == "sequence"

    @property
    def reward(self) -> str:
        """What counts as a reward, times beta: "ratio", "mean" or "sum" (see `Spec`)."""
        return LOSSES[self.parts[0][0]].reward

    def check_single_answers(self) -> None:
        """Raises ObjectiveError unless the loss is one of single answers, each labelled good or bad."""
        if self.loss != "kto":
            raise ObjectiveError(f"loss={self.loss} compares two answers, and the rows have one each: loss=kto")
        for name, rest in (("nll_weight", 0.0), ("ld_alpha", 1.0)):
            if getattr(self, name) != rest:
                raise ObjectiveError(
                    f"{name}={getattr(self, name):g} is for pairs, and the rows have one answer each: {name}={rest:g}"
                )

    def nll_tokens(self, prompt_tokens: int, chosen_tokens: int) -> int:
        """Tokens that one pair adds to `Totals.nll_tokens`: a prompt of p tokens has p-1 predicted ones."""
        return chosen_tokens + (prompt_tokens - 1 if self.needs_prompt else 0)

    def weighing(self, *, beta: float, nll_weight: float | None) -> Objective:
        """The same objective with other weights of its two terms."""
        return replace(self, beta=beta, nll_weight=nll_weight)


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
