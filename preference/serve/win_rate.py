"""A win rate: the answers of two models judged in both orders, with ties, the judge's lean, and length taken out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from preference.report.evaluation import wilson
from preference.serve.generation import Turn
from preference.serve.judge import Judge, NoVerdict, conversation_text

RIDGE = 1e-3


def judge_all(
    judge: Judge, turns: Sequence[Turn], answers: Mapping[str, Sequence[str]], file: TextIO, progress: Any = None
) -> np.ndarray:
    """[N, 2] how much the second model of `answers` is favoured: 1 = better, 0 = worse; nan where there is no verdict.

    Column 0: its answer stands second; column 1: it stands first. Each judgement is written to `file` at once, as a
    line of JSON. Equal answers are a tie, and the judge is not asked.

    Raises:
        JudgeError: the judge cannot be asked.
    """
    (base, before), (tuned, after) = answers.items()
    scores_N2 = np.full((len(turns), 2), np.nan)
    for i, turn in enumerate(turns):
        texts = {base: before[i], tuned: after[i]}
        for order, (first, second) in enumerate(((base, tuned), (tuned, base))):
            judge.said = ""
            favour, why = 0.5, "the answers are equal"
            if texts[base] != texts[tuned]:
                try:
                    favour, why = judge.favours(turn, texts[first], texts[second]), ""
                except NoVerdict as error:
                    favour, why = math.nan, str(error)
            scores_N2[i, order] = favour if first == tuned else 1 - favour
            record = {"conversation": conversation_text(turn), "answers": texts, "first": first, "second": second,
                      "first_is_favoured": None if math.isnan(favour) else favour, "said": judge.said or why,
                      "judge": judge.name}  # fmt: skip
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
        if progress is not None:
            progress(judge.name, i + 1, len(turns))
    return scores_N2


def length_controlled(scores_N: np.ndarray, longer_N: np.ndarray) -> float:
    """The share that would be won with answers of equal length (AlpacaEval 2, arXiv 2404.04475).

    A logistic regression of the scores on tanh(difference in characters / its deviation), whose constant is kept. Both
    coefficients are held back by a little ridge, without which scores that length explains wholly would have none.
    """
    spread = float(longer_N.std()) or 1.0
    x_N2 = np.stack([np.ones(len(scores_N)), np.tanh(longer_N / spread)], axis=1)
    theta = np.zeros(2)
    for _ in range(50):
        p_N = 1 / (1 + np.exp(-x_N2 @ theta))
        gradient = x_N2.T @ (scores_N - p_N) / len(p_N) - RIDGE * theta
        hessian = (x_N2 * (p_N * (1 - p_N))[:, None]).T @ x_N2 / len(p_N) + RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        theta += step
        if abs(step).max() < 1e-9:
            break
    return float(1 / (1 + math.exp(-theta[0])))


def summary(scores_N2: np.ndarray, longer_N: np.ndarray) -> dict[str, Any]:
    """Figures of `judge_all`. `longer_N`: characters by which the second model's answer is longer.

    A question's score is the mean of both orders. Questions without a verdict are left out and counted.
    """
    readable = ~np.isnan(scores_N2).any(axis=1)
    scores_N2, longer_N = scores_N2[readable], np.asarray(longer_N, dtype=np.float64)[readable]
    left = {"questions": int(readable.sum()), "without_verdict": int((~readable).sum())}
    if not readable.any():
        return left
    scores_N = scores_N2.mean(axis=1)
    better_N2, worse_N2 = scores_N2 > 0.5, scores_N2 < 0.5
    decided = int((better_N2 | worse_N2).sum())
    first = int(worse_N2[:, 0].sum() + better_N2[:, 1].sum())  # the answer that stood first was favoured
    return left | {
        "won": int(better_N2.all(axis=1).sum()),
        "lost": int(worse_N2.all(axis=1).sum()),
        "tied": int((~better_N2.all(axis=1) & ~worse_N2.all(axis=1)).sum()),
        "win_rate": float(scores_N.mean()),
        "interval": list(wilson(float(scores_N.sum()), len(scores_N))),
        "length_controlled": length_controlled(scores_N, longer_N),
        "longer": float(longer_N.mean()),
        "first_favoured": first / decided if decided else None,
        "turned_by_order": float(((better_N2[:, 0] & worse_N2[:, 1]) | (worse_N2[:, 0] & better_N2[:, 1])).mean()),
    }


def table(figures: Mapping[str, Any], judge: str) -> str:
    """The figures for a terminal."""
    lines = [f"judged by {judge}: {figures['questions']} questions, each in both orders"]
    if figures["without_verdict"]:
        lines.append(f"left out, as the judge gave no verdict: {figures['without_verdict']}")
    if not figures["questions"]:
        return "\n".join(lines)
    low, high = figures["interval"]
    lines += [
        f"{'win rate, tuned against base':<44}{figures['win_rate']:>7.1%} ({low:.0%} to {high:.0%})",
        f"{'  at equal length':<44}{figures['length_controlled']:>7.1%}",
        f"{'won in both orders, tied, lost in both':<44}{figures['won']:>7}, {figures['tied']}, {figures['lost']}",
        f"{'tuned answers are longer by, in characters':<44}{figures['longer']:>+7.0f}",
    ]
    if figures["first_favoured"] is not None:
        lines.append(
            f"{'the judge favours what stands first':<44}{figures['first_favoured']:>7.1%} (50%: no position bias)"
        )
    lines.append(f"{'verdicts that turn with the order':<44}{figures['turned_by_order']:>7.1%}")
    return "\n".join(lines)
