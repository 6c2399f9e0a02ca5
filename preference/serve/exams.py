"""Exams by likelihood: which option, or which option's letter, a model finds likeliest; with intervals, and paired.

Tokens and sums are those of lm-eval 0.4 (its loglikelihood requests on Hugging Face models): context and continuation
are encoded together, and what goes beyond the tokens of the context alone is scored, each token in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from preference.report.evaluation import wilson
from preference.serve.exam_files import LETTERS, Exam, Question

MEASURES = {
    "letter": "the likeliest letter after the question with all options (MMLU, C-Eval)",
    "option": "the option's text that is likeliest after the question alone",
    "option per character": "the same, each divided by its length in characters (lm-eval's acc_norm)",
}


def letter_context(question: Question) -> str:
    """As lm-eval's MMLU: the question, its options, "Answer:"."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=False)]
    return "\n".join([question.text, *lines, "Answer:"])


def text_context(question: Question) -> str:
    """As lm-eval's ARC: the question alone."""
    return f"Question: {question.text}\nAnswer:"


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """(context ids, continuation ids). Spaces that end the context belong to the continuation."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = tokenizer(context + continuation, add_special_tokens=False).input_ids
    start = tokenizer(context, add_special_tokens=False).input_ids
    return start, whole[len(start) :]


@torch.no_grad()
def continuation_logps(model: Any, context: list[int], continuations: Sequence[list[int]], limit: int) -> list[float]:
    """Summed log-probabilities of continuations of one context, right-padded in one batch.

    Args:
        limit: tokens that the model takes; what is longer loses its beginning, as in lm-eval.
    """
    rows = [(context + continuation)[-(limit + 1) :][:-1] for continuation in continuations]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    logits = model(input_ids=ids, attention_mask=mask).logits
    sums = []
    for row, continuation, logits_SV in zip(rows, continuations, logits, strict=True):
        at = slice(len(row) - len(continuation), len(row))
        logps = torch.log_softmax(logits_SV[at].float(), dim=-1)
        sums.append(float(logps.gather(1, torch.tensor(continuation, device=logps.device)[:, None]).sum()))
    return sums


def context_limit(model: Any) -> int:
    """Positions that the model was made for."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 2048) or 2048)


def picks(model: Any, tokenizer: Any, question: Question) -> dict[str, int]:
    """The option that each measure picks."""
    limit = context_limit(model)

    def sums(context: str, continuations: Sequence[str]) -> np.ndarray:
        pairs = [encode_pair(tokenizer, context, " " + text) for text in continuations]
        return np.array(continuation_logps(model, pairs[0][0], [continuation for _, continuation in pairs], limit))

    letters = sums(letter_context(question), LETTERS[: len(question.options)])
    options = sums(text_context(question), question.options)
    lengths = np.array([max(len(option), 1) for option in question.options])
    return {
        "letter": int(letters.argmax()),
        "option": int(options.argmax()),
        "option per character": int((options / lengths).argmax()),
    }


@dataclass(frozen=True)
class Score:
    """How many of N questions are right by one measure, for each model; right_N is a row of 0 and 1 for each."""

    exam: str
    measure: str
    right: dict[str, np.ndarray]

    def interval(self, model: str) -> tuple[float, float]:
        right_N = self.right[model]
        return wilson(int(right_N.sum()), len(right_N))

    def change(self) -> tuple[float, float, float, float] | None:
        """(difference, low, high, p) of the last model against the first on the same questions; None for one model.

        The interval is Wald's for paired shares, p McNemar's exact test.
        """
        if len(self.right) < 2:
            return None
        first, *_, last = self.right.values()
        gained, lost = int(((last == 1) & (first == 0)).sum()), int(((last == 0) & (first == 1)).sum())
        pairs, moved = len(first), gained + lost
        difference = (gained - lost) / pairs
        half = 1.96 * math.sqrt(max(moved - (gained - lost) ** 2 / pairs, 0.0)) / pairs
        tail = sum(math.comb(moved, k) for k in range(min(gained, lost) + 1)) / 2**moved
        return difference, difference - half, difference + half, min(1.0, 2 * tail)


def sit(exam: Exam, models: dict[str, tuple[Any, Any]], tokenizer: Any, progress: Any = None) -> list[Score]:
    """Every measure of an exam. `models`: for each name (model, what must be entered while it answers)."""
    found: dict[str, dict[str, list[int]]] = {measure: {} for measure in MEASURES}
    for name, (model, within) in models.items():
        with within():
            for i, question in enumerate(exam.questions):
                for measure, picked in picks(model, tokenizer, question).items():
                    found[measure].setdefault(name, []).append(int(picked == question.right))
                if progress is not None:
                    progress(name, i + 1, len(exam.questions))
    return [Score(exam.name, m, {name: np.array(row) for name, row in rows.items()}) for m, rows in found.items()]


def table(scores: Sequence[Score]) -> str:
    """The scores for a terminal, with 95% intervals and the paired change."""
    lines = [f"{'exam':<24}{'measure':<22}{'questions':>9}"]
    names = list(scores[0].right)
    lines[0] += "".join(f"  {name:<22}" for name in names) + ("  change (95%), p" if len(names) > 1 else "")
    for score in scores:
        cells = ""
        for name, right_N in score.right.items():
            low, high = score.interval(name)
            cells += f"  {f'{right_N.mean():.1%} ({low:.0%} to {high:.0%})':<22}"
        change = score.change()
        if change:
            cells += "  {:+.1f} pts ({:+.1f} to {:+.1f}), p {:.2g}".format(*(100 * x for x in change[:3]), change[3])
        lines.append(f"{score.exam[-23:]:<24}{score.measure:<22}{len(right_N):>9}{cells}")
    return "\n".join(lines)
