"""Families of one shape: CValues-Comparison, stack-exchange-paired, Nectar, Azure / OpenAI, Zhongjing's tool."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from preference.data.formats.base import RANKED, Drop, Format, Options, Pair, RowDict, number, take
from preference.data.formats.hh import is_transcript, turns_of_transcript
from preference.data.formats.messages import pair_of_context, pair_of_messages, plain_reply
from preference.data.formats.scores import pick


def cvalues(row: RowDict, options: Options) -> Iterator[Pair]:
    yield Pair(*take(row, "prompt", "pos_resp", "neg_resp"))


def stack_exchange(row: RowDict, options: Options) -> Iterator[Pair]:
    yield Pair(*take(row, "question", "response_j", "response_k"))


def nectar(row: RowDict, options: Options) -> Iterator[Pair | Drop]:
    """Rank 1 is best. The prompt may be a Human/Assistant transcript. --min-score-gap counts ranks."""
    prompt, answers = take(row, "prompt", "answers")
    if not isinstance(answers, (list, tuple)) or not all(isinstance(answer, dict) for answer in answers):
        raise Drop("wrong_type", "answers must be a list of objects with answer and rank")
    candidates = []
    for answer in answers:
        text, rank = take(answer, "answer", "rank")
        place = number(rank)
        if not isinstance(text, str) or place is None:
            raise Drop("wrong_type", "an answer must have a text and a rank")
        candidates.append((text, -place))
    for picked in pick(candidates, options, str(prompt)):
        yield picked if isinstance(picked, Drop) else _nectar_pair(prompt, picked[0], picked[1])


def _nectar_pair(prompt: Any, chosen: str, rejected: str) -> Pair:
    if not is_transcript(prompt):
        return Pair(prompt, chosen, rejected)
    turns = turns_of_transcript(prompt)
    if turns[-1] == ("assistant", ""):
        turns.pop()
    return pair_of_context(turns, chosen, rejected)


def azure(row: RowDict, options: Options) -> Iterator[Pair]:
    given, chosen, rejected = take(row, "input", "preferred_output", "non_preferred_output")
    if isinstance(given, str):
        yield Pair(given, plain_reply(chosen), plain_reply(rejected))
        return
    if not isinstance(given, dict):
        raise Drop("wrong_type", "input must be an object with messages, or a question")
    if given.get("tools"):
        raise Drop("tool_calls", "input has tools: a triple cannot carry them")
    (messages,) = take(given, "messages")
    yield pair_of_messages(messages, chosen, rejected, given.get("system"))


def zhongjing_ranks(row: RowDict, options: Options) -> Iterator[Pair | Drop]:
    question, first, second = take(row, "query", "rank1", "rank2")
    ranks = [first, second, *(row[key] for key in ("rank3", "rank4") if row.get(key))]
    history = row.get("history") or []
    if isinstance(history, str):
        try:
            history = ast.literal_eval(history)  # the tool writes a Python list into the cell
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise Drop("wrong_type", "history is not a list of pairs") from None
    for picked in pick([(text, -float(place)) for place, text in enumerate(ranks)], options, str(question)):
        yield picked if isinstance(picked, Drop) else Pair(question, picked[0], picked[1], history=history)


CVALUES = Format(
    name="cvalues",
    what="CValues-Comparison: pos_resp, neg_resp",
    needs=("prompt", "pos_resp", "neg_resp"),
    answers=frozenset({"pos_resp", "neg_resp"}),
    pairs=cvalues,
)
STACK_EXCHANGE = Format(
    name="stack-exchange",
    what="stack-exchange-paired: response_j is better than response_k",
    needs=("question", "response_j", "response_k"),
    answers=frozenset({"response_j", "response_k"}),
    pairs=stack_exchange,
)
NECTAR = Format(
    name="nectar",
    what="Nectar: answers with ranks, 1 is best",
    needs=("prompt", "answers"),
    also=lambda row: isinstance(row["answers"], (list, tuple)) and any(isinstance(a, dict) for a in row["answers"]),
    answers=frozenset({"answers"}),
    pairs=nectar,
    scored=True,
    uses=RANKED,
)
AZURE = Format(
    name="azure",
    what="Azure / OpenAI preference: input.messages, preferred_output, non_preferred_output",
    needs=("input", "preferred_output", "non_preferred_output"),
    answers=frozenset({"preferred_output", "non_preferred_output"}),
    pairs=azure,
)
ZHONGJING_RANKS = Format(
    name="zhongjing-ranks",
    what="results of Zhongjing's labelling tool: query, rank1 .. rank4",
    needs=("query", "rank1", "rank2"),
    answers=frozenset({"rank1", "rank2", "rank3", "rank4"}),
    pairs=zhongjing_ranks,
    scored=True,
    uses=RANKED,
    only_when_named="the published tool fills rank1 .. rank4 with the inverse of the order that the labeller gave, so "
    "most rows may be mis-ordered; if yours are right, naming the format zhongjing-ranks reads rank1 as the best",
)
