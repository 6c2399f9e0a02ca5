"""The learning rate for each loss, kind of training and size of model, and ORPO's beta by size; each with its source.

What else a formula reads, and the beta of other losses, have their defaults with the loss (specs.py, objective.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from preference.losses.specs import LOSSES, parse_loss

SMALL = 5e8  # parameters below which a model bears, and needs, a higher rate


@dataclass(frozen=True)
class Beta:
    """A default of ORPO's weight, and where it comes from."""

    value: float
    source: str


# small model? -> the weight of ORPO's odds ratio
ORPO_BETAS = {
    True: Beta(1.0, "starter model: 0.1 leaves a fifth of the pairs undecided, 1 none (benchmarks/LOG.md)"),
    False: Beta(0.1, "ORPO's authors (arXiv 2403.07691): 0.05 to 0.1; TRL's default"),
}


def orpo_beta(parameters: float) -> Beta:
    """The default for a model of so many parameters."""
    return ORPO_BETAS[parameters < SMALL]


@dataclass(frozen=True)
class Recipe:
    """A default, and where it comes from."""

    learning_rate: float
    source: str


# family of losses -> (small model?, adapter?) -> recipe
RECIPES: dict[str, dict[tuple[bool, bool], Recipe]] = {
    # The likelihood of the chosen answers carries the loss: rates of supervised fine-tuning.
    "likelihood": {
        (True, True): Recipe(1e-3, "starter model: 2e-4 learned little in a pass, 1e-3 much (benchmarks/LOG.md)"),
        (False, True): Recipe(1e-4, "ten times ORPO's rate for all weights"),
        (True, False): Recipe(1e-4, "a tenth of the adapter's rate"),
        (False, False): Recipe(8e-6, "ORPO's authors (arXiv 2403.07691): 5e-6 to 8e-6"),
    },
    # The margin over a reference, or between log-probabilities: ten to a hundred times lower, or the text breaks.
    "preference": {
        (True, True): Recipe(1e-4, "starter model, dpo: 1e-3 breaks the text, 1e-4 does not (benchmarks/LOG.md)"),
        (False, True): Recipe(1e-5, "LoRA bears ten times DPO's rate for all weights (5e-6 to 1e-5 in use)"),
        (True, False): Recipe(5e-6, "ten times the rate for 7 B; 40 steps improve each loss tried (benchmarks/LOG.md)"),
        (False, False): Recipe(5e-7, "3e-7 to 1e-6: SimPO's README, Tulu 3 (arXiv 2411.15124)"),
    },
}


def family(loss: str) -> str:
    """Whether the chosen answers' likelihood carries a loss, or a sum of losses, by itself."""
    carried = {"orpo", "sft", "rrhf"}
    weights = {"likelihood": 0.0, "preference": 0.0}
    for name, weight in parse_loss(loss):
        weights["likelihood" if name in carried else "preference"] += weight
    return "likelihood" if weights["likelihood"] >= weights["preference"] else "preference"


def recipe(loss: str, *, adapter: bool, parameters: float) -> Recipe:
    """The default for a loss on a model of so many parameters, trained through an adapter or as a whole."""
    return RECIPES[family(loss)][parameters < SMALL, adapter]


def table() -> str:
    """All defaults as Markdown, for docs/training.md."""
    lines = ["| losses | model | weights | learning rate | source |", "|---|---|---|---|---|"]
    for name, recipes in RECIPES.items():
        losses = ", ".join(loss for loss in LOSSES if family(loss) == name)
        for (small, adapter), found in recipes.items():
            size, kind = "below 0.5 B" if small else "0.5 B and more", "LoRA" if adapter else "all"
            lines.append(f"| {losses} | {size} | {kind} | {found.learning_rate:g} | {found.source} |")
    return "\n".join(lines)
