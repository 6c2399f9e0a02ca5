"""axolotl: messages (a list or a string) + chosen + rejected, and `input` for the question (icr)."""

from __future__ import annotations

from collections.abc import Iterator

from preference.formats.base import Format, Options, Pair, RowDict, take
from preference.formats.trl import ANSWERS, pair_of_prompt


def chat_template(row: RowDict, options: Options) -> Iterator[Pair]:
    messages, chosen, rejected = take(row, "messages", "chosen", "rejected")
    pair = pair_of_prompt(messages, chosen, rejected, row.get("system"))
    pair.prompt = None
    yield pair


def icr(row: RowDict, options: Options) -> Iterator[Pair]:
    question, chosen, rejected = take(row, "input", "chosen", "rejected")
    yield Pair(question, chosen, rejected, row.get("system"), row.get("history"))


CHAT_TEMPLATE = Format(
    name="axolotl",
    what="messages + chosen + rejected (chat_template.default)",
    needs=("messages", "chosen", "rejected"),
    answers=ANSWERS,
    pairs=chat_template,
)
ICR = Format(
    name="axolotl-icr",
    what="input (+ system) + chosen + rejected",
    needs=("input", "chosen", "rejected"),
    answers=ANSWERS,
    pairs=icr,
)
