"""axolotl: messages (a list or a string) + chosen + rejected, and `input` for the question (icr)."""

from __future__ import annotations

from collections.abc import Iterator

from preference.data.formats.base import Format, Options, Pair, RowDict, take
from preference.data.formats.messages import is_messages, turns_of
from preference.data.formats.trl import ANSWERS, are_dialogues, pair_of_prompt


def chat_template(row: RowDict, options: Options) -> Iterator[Pair]:
    """Where the answers are whole dialogues, `messages` may be one that ends in an answer: that one does not count."""
    messages, chosen, rejected = take(row, "messages", "chosen", "rejected")
    if is_messages(messages) and are_dialogues(chosen, rejected):
        turns = turns_of(messages)
        messages = [turn._asdict() for turn in (turns[:-1] if turns[-1].role == "assistant" else turns)]
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
