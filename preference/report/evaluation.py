"""What evaluation pairs say about a model beyond their means: confidence, length, sources, languages, worst pairs.

A pair is judged by the mean token log-probabilities of its answers, which is what ORPO and SimPO compare: the margin
is chosen minus rejected, and a pair is right if it is positive (a tie counts half). Means still leave a trace of
length (long answers hold more predictable tokens), so a second accuracy is taken after the margin's linear dependence
on the difference in length has been regressed out: what would be right among answers of equal length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preference.data.text_stats import script_of
from preference.engine.batching import learned_lengths
from preference.report.change import paired_changes
from preference.tokens.datasets import sets_of

RESAMPLES = 1000
WORST = 20
BEST = 5


def mean_margins(sums_N2: np.ndarray, lengths_N2: np.ndarray) -> np.ndarray:
    """[N]: mean log-probability of chosen minus that of rejected, from (chosen, rejected) sums and token counts."""
    means_N2 = np.asarray(sums_N2, dtype=np.float64) / lengths_N2
    return means_N2[:, 0] - means_N2[:, 1]


def right_pairs(margins_N: np.ndarray) -> float:
    """Pairs whose margin is above 0; a tie is half a pair."""
    return float((margins_N > 0).sum() + (margins_N == 0).sum() / 2)


def wilson(right: float, pairs: int, z: float = 1.96) -> tuple[float, float]:
    """95% confidence interval of a share of `pairs` (Wilson 1927), which stays inside [0, 1] and is honest when few."""
    share, z2 = right / pairs, z * z
    centre = (share + z2 / (2 * pairs)) / (1 + z2 / pairs)
    half = z / (1 + z2 / pairs) * math.sqrt(share * (1 - share) / pairs + z2 / (4 * pairs * pairs))
    return max(0.0, centre - half), min(1.0, centre + half)


def without_length(margins_N: np.ndarray, longer_N: np.ndarray) -> np.ndarray:
    """Margins less what a straight line in `longer_N` (chosen minus rejected tokens) explains; its constant stays."""
    centred = longer_N - longer_N.mean()
    spread = float((centred**2).sum())
    slope = float((centred * margins_N).sum()) / spread if spread > 0 else 0.0
    return margins_N - slope * longer_N


def _resampled(margins_N: np.ndarray, longer_N: np.ndarray, seed: int) -> dict[str, list[float]]:
    """95% bootstrap intervals of the mean margin and of the accuracy at equal length."""
    draws = np.random.default_rng(seed).integers(0, len(margins_N), (RESAMPLES, len(margins_N)))
    means = margins_N[draws].mean(1)
    controlled = [right_pairs(without_length(margins_N[d], longer_N[d])) / len(margins_N) for d in draws]
    ends = [2.5, 97.5]
    return {
        "margin": np.percentile(means, ends).tolist(),
        "length_controlled_accuracy": np.percentile(controlled, ends).tolist(),
    }


def summarise(margins_N: np.ndarray, longer_N: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Accuracy, margin and length-controlled accuracy of N pairs, with 95% intervals. JSON-ready."""
    margins_N, longer_N = np.asarray(margins_N, dtype=np.float64), np.asarray(longer_N, dtype=np.float64)
    pairs, right = len(margins_N), right_pairs(margins_N)
    return {
        "pairs": pairs,
        "accuracy": right / pairs,
        "margin": float(margins_N.mean()),
        "length_controlled_accuracy": right_pairs(without_length(margins_N, longer_N)) / pairs,
        "interval": {"accuracy": list(wilson(right, pairs)), **_resampled(margins_N, longer_N, seed)},
    }


def analyse(
    sums: Mapping[str, np.ndarray], lengths_N2: np.ndarray, groups: Mapping[str, Sequence[str]], seed: int = 0
) -> dict[str, Any]:
    """Figures of several models on the same N pairs, over all pairs and by group.

    Args:
        sums: for each model, by name, its (chosen, rejected) sums of log-probabilities [N, 2].
        lengths_N2: tokens of the chosen and the rejected answers.
        groups: ways to group the pairs: {"source": [N names], "script": [N names]}.

    Returns:
        {"all": {model: figures}, "source": {name: {model: figures}}, ...}; figures as `summarise` gives them. A way of
        grouping that puts all pairs into one group is left out.
    """
    longer_N = (lengths_N2[:, 0] - lengths_N2[:, 1]).astype(np.float64)
    margins = {model: mean_margins(values, lengths_N2) for model, values in sums.items()}

    def figures(where: np.ndarray) -> dict[str, Any]:
        return {model: summarise(margin_N[where], longer_N[where], seed) for model, margin_N in margins.items()}

    result: dict[str, Any] = {"all": figures(np.arange(len(longer_N)))}
    for way, names in groups.items():
        names = np.asarray(names)
        if len(set(names)) > 1:
            result[way] = {str(name): figures(np.flatnonzero(names == name)) for name in sorted(set(names))}
    return result


def table(analysis: Mapping[str, Any]) -> str:
    """The analysis for a terminal: a line for each group and model."""
    lines = [f"{'':<30}{'pairs':>6}  {'preference accuracy':<24}{'at equal length':<26}{'margin per token':>8}"]
    rows = [("all", analysis["all"])]
    rows += [(name, models) for way, found in analysis.items() if way != "all" for name, models in found.items()]
    for name, models in rows:
        for model, figures in models.items():
            label = f"{_shortened(name, 19)} {model}"
            ends = figures["interval"]
            accuracy = f"{figures['accuracy']:.1%} ({ends['accuracy'][0]:.0%} to {ends['accuracy'][1]:.0%})"
            low, high = ends["length_controlled_accuracy"]
            controlled = f"{figures['length_controlled_accuracy']:.1%} ({low:.0%} to {high:.0%})"
            lines.append(f"{label:<30}{figures['pairs']:>6}  {accuracy:<24}{controlled:<26}{figures['margin']:>+8.3f}")
    return "\n".join(lines)


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]


def worst_pairs(margins_N: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pairs in which the rejected answer wins by most, worst first, with their margin."""
    order = [int(i) for i in np.argsort(margins_N, kind="stable")[:WORST] if margins_N[i] < 0]
    keys = ("source", "question", "chosen", "rejected")
    return [{key: rows[i][key] for key in keys} | {"margin": float(margins_N[i])} for i in order]


def best_pairs(margins_N: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pairs in which the chosen answer wins by most, best first, with their margin."""
    order = [int(i) for i in np.argsort(-margins_N, kind="stable")[:BEST] if margins_N[i] > 0]
    keys = ("source", "question", "chosen", "rejected")
    return [{key: rows[i][key] for key in keys} | {"margin": float(margins_N[i])} for i in order]


def by_length(tokens_N: np.ndarray) -> list[str]:
    """Which third of the pairs each belongs to, by the tokens of its two answers."""
    low, high = np.quantile(tokens_N, [1 / 3, 2 / 3])
    names = [f"up to {low:.0f} tokens", f"up to {high:.0f} tokens", f"over {high:.0f} tokens"]
    return [names[int(tokens > low) + int(tokens > high)] for tokens in tokens_N]


class Evaluation:
    """Evaluates a trainer's model under several names (base, tuned) and keeps what each gave every pair.

    Args:
        eval_set: one set, several by name, or None: then there is nothing to evaluate, and every result is empty.
        questions: the question of each pair by its source, for grouping and for showing.

    Attributes:
        metrics: of each model; with several sets their names are eval_NAME_loss and so on.
        sums: [N, 2] of each model, the sets one after another.
    """

    def __init__(self, trainer: Any, eval_set: Any, questions: Mapping[str, str]) -> None:
        self.trainer, self.sets, self.questions = trainer, sets_of(eval_set), questions
        self.metrics: dict[str, dict[str, float]] = {}
        self.sums: dict[str, np.ndarray] = {}

    def run(self, who: str) -> None:
        if not self.sets:
            return
        self.metrics[who] = self.trainer.evaluate()
        # TRL's trainers keep no figures of single pairs, and single answers are no pairs
        of_pairs = all("desirable" not in rows.column_names for rows in self.sets.values())
        if hasattr(self.trainer, "scores") and of_pairs:
            scores = [self.trainer.scores[f"eval_{name}" if name else "eval"] for name in self.sets]
            self.sums[who] = np.concatenate(scores)

    def column(self, name: str) -> list[Any]:
        """A column of all sets, one after another."""
        return [value for rows in self.sets.values() for value in rows[name]]

    def lengths(self) -> np.ndarray:
        """[N, 2]: tokens of the chosen and rejected answers that are learned."""
        return np.concatenate([learned_lengths(rows) for rows in self.sets.values()])

    def analysis(self) -> dict[str, Any]:
        """`analyse` over all pairs, by set, source file, script and length; {} where single pairs have no figures."""
        if not self.sums:
            return {}
        places = self.column("source")
        groups = {
            "set": [name for name, rows in self.sets.items() for _ in range(len(rows))],
            "source": [place.rpartition(":")[0] for place in places],
            "script": [script_of(self.questions[place]) for place in places],
            "length": by_length(self.lengths().sum(axis=1)),
        }
        return analyse(self.sums, self.lengths(), groups)

    def changes(self) -> dict[str, dict[str, Any]]:
        """`paired_changes` from the base to the tuned model; {} where there are no figures of both."""
        if not {"base", "tuned"} <= self.sums.keys():
            return {}
        per_token = self.trainer.objective.reward == "mean"
        return paired_changes(self.sums["base"], self.sums["tuned"], self.lengths(), per_token)

    def worst(self, who: str) -> list[dict[str, Any]]:
        """`worst_pairs` of one of the models."""
        return worst_pairs(*self._judged(who)) if who in self.sums else []

    def best(self, who: str) -> list[dict[str, Any]]:
        """`best_pairs` of one of the models."""
        return best_pairs(*self._judged(who)) if who in self.sums else []

    def _judged(self, who: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Margins, and the rows that they are of."""
        rows = [row | {"question": self.questions[row["source"]]} for rows in self.sets.values() for row in rows]
        return mean_margins(self.sums[who], self.lengths()), rows
