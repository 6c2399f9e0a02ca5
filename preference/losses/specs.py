"""Every loss by name: where it comes from, which constants it reads, and its default beta. No torch is needed."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """What is fixed about a loss.

    Attributes:
        source: paper and equation.
        beta: its default, as the source has it; 0 where the loss does not read beta.
        reference: it compares with a reference model's log-probabilities.
        reward: what counts as an answer's reward, times beta: "ratio" (log-ratio to the reference), "mean"
            (log-probability per token) or "sum" (of the answer).
        nll: default weight of the chosen answer's negative log-likelihood beside the formula.
        reads: constants of `Objective` that the formula reads, besides beta.
        batch: a pair's loss depends on the other pairs of its global batch (losses/coupling.py).
    """

    source: str
    beta: float = 0.1
    reference: bool = False
    reward: str = "ratio"
    nll: float = 0.0
    reads: tuple[str, ...] = ()
    batch: bool = False


def _dpo_kin(source: str, *reads: str, beta: float = 0.1, nll: float = 0.0, batch: bool = False) -> Spec:
    return Spec(source, beta, reference=True, nll=nll, reads=("ld_alpha", *reads), batch=batch)


# A score is a log-ratio, or what an f-divergence makes of it; these losses read scores.
_SCORED = ("f_divergence", "f_alpha")
_SMOOTH = ("label_smoothing", "score_margin")

LOSSES: dict[str, Spec] = {
    # ---- without a reference model
    "orpo": Spec(
        "Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7", reward="mean", nll=1.0, reads=("orpo_temperature",)
    ),
    "simpo": Spec("Meng et al. 2024, arXiv 2405.14734, eq. 6", 2.0, reward="mean", reads=("simpo_gamma", *_SMOOTH)),
    "alphapo": Spec(
        "Gupta et al. 2025, arXiv 2501.03884, the alpha reward in SimPO's loss", 2.0, reward="mean",
        reads=("simpo_gamma", "alphapo_alpha", *_SMOOTH),
    ),
    "cpo": Spec("Xu et al. 2024, arXiv 2401.08417, eq. 3 and 5", reward="sum", nll=1.0, reads=("cpo_alpha", *_SMOOTH)),
    "cpo_simpo": Spec(
        "SimPO's term with CPO's likelihood term (github.com/fe1ixxu/CPO_SIMPO)", 2.0, reward="mean", nll=1.0,
        reads=("simpo_gamma", "cpo_alpha", *_SMOOTH),
    ),
    "slic": Spec(
        "Zhao et al. 2023, arXiv 2305.10425, rank calibration with regularization", 1.0, reward="sum", nll=1.0,
        reads=("score_margin",),
    ),
    "rrhf": Spec("Yuan et al. 2023, arXiv 2304.05302, ranking loss with fine-tuning loss", 1.0, reward="mean", nll=1.0),
    "simper": Spec("Xiao et al. 2025, arXiv 2502.00883: no constant at all", 0.0, reward="mean"),
    "sft": Spec("likelihood of the chosen answers alone", 0.0, reward="mean", nll=1.0),
    # ---- against a reference model
    "dpo": _dpo_kin("Rafailov et al. 2023, arXiv 2305.18290, eq. 7", *_SMOOTH, *_SCORED),
    "rpo": _dpo_kin("Pang et al. 2024 (iterative RPO), arXiv 2404.19733, eq. 1", *_SMOOTH, *_SCORED, nll=1.0),
    "robust": _dpo_kin("Chowdhury et al. 2024, arXiv 2403.00409, eq. 14", *_SMOOTH, *_SCORED),
    "hinge": _dpo_kin("Zhao et al. 2023, arXiv 2305.10425, on DPO's margin", "score_margin", *_SCORED),
    "ipo": _dpo_kin("Azar et al. 2023, arXiv 2310.12036, eq. 17, per token", *_SCORED),
    "sigmoid_norm": _dpo_kin(
        "Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, length-normalised DPO", *_SMOOTH, *_SCORED, beta=5.0
    ),
    "exo_pair": _dpo_kin("Ji et al. 2024, arXiv 2402.00856, eq. 16", "label_smoothing", *_SCORED),
    "discopop": _dpo_kin("Lu et al. 2024, arXiv 2406.08414, eq. 5", "discopop_tau", *_SCORED, beta=0.05),
    "dpop": _dpo_kin("Pal et al. 2024, arXiv 2402.13228, eq. 3", "dpop_lambda", *_SMOOTH),
    "rdpo": _dpo_kin("Park et al. 2024, arXiv 2403.19159, length-regularised DPO", "length_penalty", *_SMOOTH),
    "chipo": _dpo_kin("Huang et al. 2024, arXiv 2407.13399, chi-squared link", *_SMOOTH),
    "nca_pair": _dpo_kin("Chen et al. 2024, arXiv 2402.05369, NCA for two answers", beta=0.01),
    "bco_pair": _dpo_kin("Jung et al. 2024, arXiv 2404.04656, on pairs, without its running shift"),
    "sppo_hard": _dpo_kin("Wu et al. 2024, arXiv 2405.00675, eq. 4.7 with hard labels"),
    "apo_zero": _dpo_kin("D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7"),
    "apo_down": _dpo_kin("D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8"),
    "kto": _dpo_kin(
        "Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7 and 8, on single answers and on pairs",
        "kto_desirable_weight", "kto_undesirable_weight", batch=True,
    ),
    "aot": _dpo_kin("Melnyk et al. 2024, arXiv 2406.05882, paired", "label_smoothing", batch=True),
    "aot_unpaired": _dpo_kin("Melnyk et al. 2024, arXiv 2406.05882, unpaired", "label_smoothing", batch=True),
}  # fmt: skip

SYNONYMS = {"sigmoid": "dpo", "irpo": "rpo", "kto_pair": "kto", "dpo_norm": "sigmoid_norm", "slic_hf": "slic"}


def parse_loss(text: str) -> tuple[tuple[str, float], ...]:
    """Losses and their weights: "dpo" is (("dpo", 1.0),), "dpo:0.8,bco_pair:0.2" has two.

    Raises:
        ValueError: a loss that does not exist, stands twice, or has a weight that is not positive.
    """
    parts = []
    for part in text.split(","):
        name, colon, weight = part.strip().partition(":")
        if name not in LOSSES:
            near = difflib.get_close_matches(name, LOSSES, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            meant = f"; {name} is called {SYNONYMS[name]} here" if name in SYNONYMS else meant
            raise ValueError(f"unknown loss {name!r}{meant}: {', '.join(LOSSES)}")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ValueError(f"loss={text}: the weight of {name} is a positive number, as in dpo:0.8,bco_pair:0.2")
        parts.append((name, value))
    if len({name for name, _ in parts}) < len(parts):
        raise ValueError(f"loss={text}: a loss stands twice; add its weights up")
    return tuple(parts)


def reads(text: str, constant: str) -> bool:
    """Whether the loss, or one of the losses of a sum, reads a constant of `Objective` besides beta."""
    return any(constant in LOSSES[name].reads for name, _ in parse_loss(text))


def default_beta(text: str) -> float:
    """The default of a loss, or of the losses of a sum where they have one in common.

    Raises:
        ValueError: the losses of a sum have different defaults, so that beta has to be chosen.
    """
    betas = {name: LOSSES[name].beta for name, _ in parse_loss(text) if LOSSES[name].beta}
    if len(set(betas.values())) > 1:
        listed = ", ".join(f"{name} {beta:g}" for name, beta in betas.items())
        raise ValueError(f"loss={text}: its losses have different defaults for beta ({listed}); say which it shall be")
    return next(iter(betas.values()), 0.0)


def has_beta(text: str) -> bool:
    """Whether a loss, or one of a sum, reads beta."""
    return any(LOSSES[name].beta for name, _ in parse_loss(text))


def default_nll_weight(text: str, cpo_alpha: float = 1.0) -> float:
    """The weight that the NLL of the chosen answers has in a loss or a sum of losses by itself."""
    alpha = {name: cpo_alpha if "cpo_alpha" in LOSSES[name].reads else 1.0 for name in LOSSES}
    return sum(weight * LOSSES[name].nll * alpha[name] for name, weight in parse_loss(text))
