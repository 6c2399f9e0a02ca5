"""The triple itself: {question, response_chosen, response_rejected}, with or without system and history.

Also what MedicalGPT's reward data, ChiMed-DPO (Qilin-Med) and shibing624/medical are published as.
"""

from __future__ import annotations

from collections.abc import Iterator

from preference.data.formats.base import Format, Options, Pair, RowDict, take
from preference.data.formats.messages import plain_reply


def pairs(row: RowDict, options: Options) -> Iterator[Pair]:
    question, chosen, rejected = take(row, "question", "response_chosen", "response_rejected")
    yield Pair(question, plain_reply(chosen), plain_reply(rejected), row.get("system"), row.get("history"))


TRIPLE = Format(
    name="triple",
    what="the triple (MedicalGPT, ChiMed-DPO, shibing624/medical reward)",
    needs=("question", "response_chosen", "response_rejected"),
    answers=frozenset({"response_chosen", "response_rejected"}),
    own=frozenset({"system", "history"}),
    pairs=pairs,
)
