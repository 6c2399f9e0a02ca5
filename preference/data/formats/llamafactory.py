"""LLaMA-Factory's shapes: sharegpt-ranking, alpaca-ranking, the ranking lists of 2023, and v1 messages.

sharegpt-ranking is also MedicalGPT's form since 2026 (answers as strings) and m-a-p/COIG-P; ranking lists are also
Zhongjing's RLHF data.
"""

from __future__ import annotations

from collections.abc import Iterator

from preference.data.formats.base import RANKED, Drop, Format, Options, Pair, RowDict, take
from preference.data.formats.messages import is_messages, pair_of_dialogues, pair_of_messages
from preference.data.formats.scores import pick
from preference.data.formats.trl import ANSWERS


def sharegpt(row: RowDict, options: Options) -> Iterator[Pair]:
    conversations, chosen, rejected = take(row, "conversations|conversation", "chosen", "rejected")
    yield pair_of_messages(conversations, chosen, rejected, row.get("system"))


def alpaca(row: RowDict, options: Options) -> Iterator[Pair]:
    """Some files carry `output`, which repeats one of the two answers: it is ignored."""
    instruction, chosen, rejected = take(row, "instruction", "chosen", "rejected")
    yield Pair(_with_input(instruction, row), chosen, rejected, row.get("system"), row.get("history"))


def ranking(row: RowDict, options: Options) -> Iterator[Pair | Drop]:
    """`output` (or `response`) lists the answers, best first; --min-score-gap counts places between them."""
    question, answers = take(row, "instruction|prompt|query", "output|response")
    if not isinstance(answers, (list, tuple)) or not all(isinstance(answer, str) for answer in answers):
        raise Drop("wrong_type", "the ranked answers must be a list of strings")
    question = _with_input(question, row)
    places = [(answer, -float(place)) for place, answer in enumerate(answers)]
    for picked in pick(places, options, str(question)):
        if isinstance(picked, Drop):
            yield picked
        else:
            yield Pair(question, picked[0], picked[1], row.get("system"), row.get("history"))


def v1(row: RowDict, options: Options) -> Iterator[Pair]:
    chosen, rejected = take(row, "chosen_messages|chosen_conversations", "rejected_messages|rejected_conversations")
    yield pair_of_dialogues(chosen, rejected, row.get("system"))


def _with_input(instruction: object, row: RowDict) -> object:
    extra = row.get("input")
    if extra is None or extra == "":
        return instruction
    if not isinstance(instruction, str) or not isinstance(extra, str):
        raise Drop("wrong_type", "instruction and input must be strings")
    return f"{instruction}\n{extra}" if extra.strip() else instruction


def _is_ranked_row(row: RowDict) -> bool:
    """LLaMA-Factory's columns around the list; without them it may as well hold references, all of them right."""
    return row.get("instruction") is not None and bool({"history", "system"} & row.keys()) and any(
        _is_ranking(row.get(key)) for key in ("output", "response")
    )  # fmt: skip


def _is_ranking(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) >= 2 and all(isinstance(item, str) for item in value)


SHAREGPT = Format(
    name="sharegpt",
    what="conversations + chosen + rejected (LLaMA-Factory, MedicalGPT, COIG-P)",
    needs=("conversations|conversation", "chosen", "rejected"),
    also=lambda row: row.get("conversations") is not None or is_messages(row["conversation"]),
    answers=ANSWERS,
    pairs=sharegpt,
)
ALPACA = Format(
    name="alpaca",
    what="instruction (+ input, history, system) + chosen + rejected",
    needs=("instruction", "chosen", "rejected"),
    answers=ANSWERS,
    ignores=frozenset({"output"}),
    pairs=alpaca,
)
RANKING = Format(
    name="ranking",
    what="a list of answers, best first (Zhongjing, LLaMA-Factory 2023)",
    needs=("instruction|prompt|query", "output|response"),
    also=_is_ranked_row,
    answers=frozenset({"output", "response"}),
    pairs=ranking,
    scored=True,
    uses=RANKED,
)
V1 = Format(
    name="llamafactory-v1",
    what="chosen_messages + rejected_messages (torchtune: chosen_conversations)",
    needs=("chosen_messages|chosen_conversations", "rejected_messages|rejected_conversations"),
    answers=frozenset({"chosen_messages", "rejected_messages", "chosen_conversations", "rejected_conversations"}),
    pairs=v1,
)
