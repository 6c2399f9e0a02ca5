"""A score for each of several answers to a question: by a judge, a reward model, rules or a person."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Protocol, TextIO

import torch

from preference.errors import PreferenceError
from preference.models.folder import read_config, read_tokenizer, reading
from preference.screen import shown
from preference.serve.generation import Turn
from preference.serve.judge import Judge, NoVerdict, compare
from preference.serve.models import note


class ScoringError(PreferenceError, RuntimeError):
    """A scorer that cannot be used; str() says why and what to do."""


class Scorer(Protocol):
    """`name` goes into the rows that are made. A scorer of scores that differ by chance is none: equal input, equal
    score."""

    name: str

    def scores(self, turn: Turn, answers: Sequence[str]) -> list[float | None]:
        """A score for each answer; None for one that is neither to be learned nor to be unlearned."""


class JudgeScorer:
    """The share of an answer's comparisons with all others that it wins, each in both orders: from 0 to 1."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.name = judge, f"judge:{judge.name}"

    def scores(self, turn: Turn, answers: Sequence[str]) -> list[float | None]:
        won = [0.0] * len(answers)
        for i, j in combinations(range(len(answers)), 2):
            try:
                share = compare(self.judge, turn, answers[i], answers[j])
            except NoVerdict as error:  # nor would there be one the next time
                note(str(error))
                return [None] * len(answers)
            won[i] += share
            won[j] += 1 - share
        return [share / max(len(answers) - 1, 1) for share in won]


class RewardScorer:
    """A reward model of transformers (one output) on the conversation as its own chat template writes it."""

    def __init__(self, name: str, device: str, dtype: torch.dtype, trust_remote_code: bool = False) -> None:
        from transformers import AutoModelForSequenceClassification

        way_out = "get the folder anew, or name another one with --reward"
        code = trust_remote_code
        self.tokenizer = read_tokenizer(name, way_out, trust_remote_code=code)
        config = read_config(name, trust_remote_code=code)
        with reading(f"the reward model {name}", way_out):
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name, config=config, dtype=dtype, trust_remote_code=code, output_loading_info=True
            )
        if missing := sorted(report["missing_keys"]):
            raise ScoringError(f"{name} is no reward model: it has no weights for {', '.join(missing[:3])}")
        if model.config.num_labels != 1:
            raise ScoringError(f"{name} has {model.config.num_labels} outputs; a reward model has one")
        if not self.tokenizer.chat_template:
            raise ScoringError(f"the reward model {name} has no chat template to write the conversation with")
        self.model, self.name = model.to(device).eval(), f"reward:{name}"

    @torch.no_grad()
    def scores(self, turn: Turn, answers: Sequence[str]) -> list[float | None]:
        return [self._reward(turn, answer) for answer in answers]

    def _reward(self, turn: Turn, answer: str) -> float | None:
        messages = [{"role": "system", "content": turn.system}] if turn.system else []
        for user, assistant in (*turn.history, (turn.question, answer)):
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(self.model.device)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit and ids.shape[1] > limit:
            note(f"an answer takes {ids.shape[1]} tokens with its question; {self.name} reads {limit}")
            return None
        return float(self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0].float())


class RulesScorer:
    """No model at all: answers that break no rule over those that do. `faults` are counted by the caller."""

    name = "rules"

    def scores(self, turn: Turn, answers: Sequence[str]) -> list[float | None]:
        return [0.0] * len(answers)


class Person:
    """Whoever sits at the terminal names the best and the worst answer; they get 1 and 0, the others nothing."""

    name = "person"
    HELP = "two numbers: the best and the worst; Enter: none of them; q: stop here, go on later"

    def __init__(self, read: Callable[[str], str] = input, out: TextIO | None = None) -> None:
        self.read, self.out = read, out or sys.stdout

    def scores(self, turn: Turn, answers: Sequence[str]) -> list[float | None]:
        """Raises KeyboardInterrupt where the person wants to stop."""
        self._say("\n".join(["", "=" * 60, *(f"{who}: {text}" for pair in turn.history for who, text in _both(pair))]))
        self._say(turn.question)
        for number, answer in enumerate(answers, 1):
            self._say(f"\n[{number}] {answer}")
        found: list[float | None] = [None] * len(answers)
        while True:
            try:
                words = self.read(f"\nbest and worst of 1 to {len(answers)}? ").split()
            except EOFError:
                raise KeyboardInterrupt from None
            if words == ["q"]:
                raise KeyboardInterrupt
            if not words:
                return found
            numbers = [int(word) for word in words if word.isdecimal() and 1 <= int(word) <= len(answers)]
            if len(words) == 2 and len({*numbers}) == 2:
                found[numbers[0] - 1], found[numbers[1] - 1] = 1.0, 0.0
                return found
            self._say(self.HELP)

    def _say(self, text: Any) -> None:
        print(shown(str(text)), file=self.out, flush=True)


def _both(pair: tuple[str, str]) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("user", pair[0]), ("assistant", pair[1])
