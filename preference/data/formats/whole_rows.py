"""Rows whose pair is no question and two texts: read once more as two conversations (formats/whole.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from preference.data.formats.base import Drop, Format, Options, Pair, RowDict
from preference.data.formats.beyond_text import columns_beyond
from preference.data.formats.context import kind_of
from preference.data.formats.messages import is_message, is_messages
from preference.data.formats.named import answer_columns, question_of
from preference.data.formats.whole import RETRIED, messages_of, pair_of_wholes, parsed, tools_of

Tools = tuple[Any, ...]


def pairs_of(format: Format, row: RowDict, options: Options, tools: Tools | None) -> Iterator[Pair | Drop]:
    """The pairs of a row; as wholes where they are not plain."""
    try:
        yield from format.pairs(row, options)
    except Drop as drop:
        whole = _whole_of(row, tools or ()) if drop.reason in RETRIED else None
        if whole is None:
            raise
        yield whole


def tools_beside(row: RowDict) -> Tools | None:
    """The tool definitions in a column of their own; None where what stands there defines no tools."""
    columns = (column for column, reason in columns_beyond(tuple(row)) if reason == "tool_calls")
    try:
        return next((tools_of(value) for column in columns if (value := parsed(row[column]))), None)
    except Drop:
        return None


def _whole_of(row: RowDict, tools: Tools) -> Pair | None:
    """The row's two conversations as a pair; None where it has none. Raises Drop for what no template can write."""
    system = next((row[column] for column in row if kind_of(column) == "system" and row[column]), None)
    if is_messages(row.get("messages")) and row.get("rejected_messages"):  # ms-swift
        return pair_of_wholes(messages_of(row["messages"]), messages_of(row["rejected_messages"]), system, tools)
    if is_messages(row.get("messages")) and row.get("rejected_response") and not row.get("chosen_response"):
        chosen = messages_of(row["messages"])
        asked = max((i for i, turn in enumerate(chosen) if turn["role"] == "user"), default=-1) + 1
        return pair_of_wholes(chosen, [*chosen[:asked], *messages_of(row["rejected_response"])], system, tools)
    sides = answer_columns(tuple(row))
    if sides is None or not all(_is_turns(row[side]) for side in sides):
        return None
    asked_of = question_of(row, sides)
    if isinstance(asked_of, dict) and is_messages(asked_of.get("messages")):  # Azure
        tools = tools_of(asked_of["tools"]) if asked_of.get("tools") else tools
        asked_of = asked_of["messages"]
    if not is_messages(asked_of) and all(isinstance(row[side], str) for side in sides):
        return None  # texts, and no turns in them
    answers = [messages_of(row[side]) for side in sides]
    if all(answer[0]["role"] != "assistant" for answer in answers):
        return pair_of_wholes(answers[0], answers[1], system, tools)
    if not isinstance(asked_of, str) and not is_messages(asked_of):
        return None
    before = messages_of(asked_of, "user")
    return pair_of_wholes([*before, *answers[0]], [*before, *answers[1]], system, tools)


def _is_turns(value: Any) -> bool:
    return is_messages(value) or is_message(value) or isinstance(value, str)
