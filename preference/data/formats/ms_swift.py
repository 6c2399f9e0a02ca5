"""ms-swift: messages that end in the chosen answer, and rejected_response or rejected_messages; v2: query, response."""

from __future__ import annotations

from collections.abc import Iterator

from preference.data.formats.base import Drop, Format, Options, Pair, RowDict, take
from preference.data.formats.messages import is_messages, pair_of_context, pair_of_dialogues, reply_of, turns_of

QUESTION = "query|prompt|question|instruction"


def messages(row: RowDict, options: Options) -> Iterator[Pair]:
    (chosen,) = take(row, "messages")
    if row.get("rejected_messages"):
        yield pair_of_dialogues(chosen, row["rejected_messages"], row.get("system"))
        return
    (rejected,) = take(row, "rejected_response")
    turns = turns_of(chosen)
    if not turns or turns[-1].role != "assistant":
        raise Drop("irregular_turns", "messages do not end in the assistant's (chosen) answer")
    if is_messages(rejected) and len(rejected) > 1:
        raise Drop("same_role_turns", "a rejected_response of several messages: a triple carries one answer")
    yield pair_of_context(turns[:-1], turns[-1].text, reply_of(rejected), row.get("system"))


def _has_chosen(row: RowDict) -> bool:
    """Whether the better answer has a column of its own, so that the messages are the question."""
    return any(row.get(name) is not None for name in ("chosen_response", "chosen", "chosen_messages"))


def query_response(row: RowDict, options: Options) -> Iterator[Pair]:
    question, chosen, rejected = take(row, QUESTION, "response|output", "rejected_response")
    yield Pair(question, chosen, rejected, row.get("system"), row.get("history"))


MS_SWIFT = Format(
    name="ms-swift",
    what="messages + rejected_response or rejected_messages",
    needs=("messages", "rejected_response|rejected_messages"),
    also=lambda row: not _has_chosen(row),
    answers=frozenset({"messages", "rejected_response", "rejected_messages"}),
    pairs=messages,
)
MS_SWIFT_V2 = Format(
    name="ms-swift-v2",
    what="query + response + rejected_response (+ system, history)",
    needs=(QUESTION, "response|output", "rejected_response"),
    answers=frozenset({"response", "output", "rejected_response"}),
    pairs=query_response,
)
