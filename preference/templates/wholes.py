"""Conversations of several answers or with tools: what of their text is learned, found by rendering up to each turn.

    prompt, parts = parts_of(conv, messages, shared, tools)

Before each turn of the assistant stands what the template renders with a generation prompt, behind it what it renders
of the conversation up to there. Where the one does not go on from the other, to the character, it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from preference.templates.conversation import Conversation, ConversationError
from preference.templates.resolve import AutoConversation, render_messages

Messages = Sequence[Mapping[str, Any]]
Part = tuple[str, bool]  # text, and whether it is learned


def parts_of(
    conv: Conversation | AutoConversation, messages: Messages, shared: int, tools: Sequence[Any] = ()
) -> tuple[str, list[Part]]:
    """(prompt, parts): the rendering of the first `shared` messages, and of the others in parts, learned or not.

    An assistant's turn is learned with the stop text behind it; turns of the user and of tools are not, nor is what the
    template writes in front of a turn. Behind the last stop text nothing follows.

    Raises:
        ConversationError: the template cannot write the conversation, leaves tools out, or writes a turn otherwise once
            others follow it.
    """
    if isinstance(conv, Conversation):
        texts = _named(conv, messages, shared, tools)
    else:
        texts = _own(conv, messages, shared, tools)
    prompt = written = ""
    parts: list[Part] = []
    for before, through in texts:
        if not parts:
            prompt = written = before
        if not before.startswith(written) or not through.startswith(before):
            raise ConversationError("the template writes earlier turns in another way once others follow them")
        if len(before) > len(written):
            parts.append((before[len(written) :], False))
        parts.append((through[len(before) :], True))
        written = through
    return prompt, parts


def _own(conv: AutoConversation, messages: Messages, shared: int, tools: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """(text before, text up to the stop) of each learned turn of the assistant, by the tokenizer's own template."""
    _check_tools(conv, messages, tools)
    for i in range(shared, len(messages)):
        if messages[i]["role"] == "assistant":
            before = render_messages(conv.tokenizer, messages[:i], tools, prompt=True)
            through = render_messages(conv.tokenizer, messages[: i + 1], tools)
            end = through.rfind(conv.stop_str) + len(conv.stop_str)
            if end <= len(before):
                raise ConversationError(f"the template ends the assistant's turn {i + 1} without {conv.stop_str!r}")
            yield before, through[:end]


def _check_tools(conv: AutoConversation, messages: Messages, tools: Sequence[Any]) -> None:
    """Raises ConversationError where names of tools, or what they gave, do not stand in the rendering."""
    text = render_messages(conv.tokenizer, messages, tools)
    wanted = [tool["function"]["name"] for tool in tools]
    wanted += [call["function"]["name"] for message in messages for call in message.get("tool_calls", ())]
    results = [message["content"] for message in messages if message["role"] == "tool"]
    if missing := next((name for name in wanted if name not in text), None):
        raise ConversationError(f"the template leaves the tool {missing[:40]} out")
    if any(result.strip() not in text for result in results):
        raise ConversationError("the template leaves the result of a tool out, or changes it")


def _named(conv: Conversation, messages: Messages, shared: int, tools: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """The same by a template by name, which writes no tools."""
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    turns = messages[system is not None :]
    if tools or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns):
        raise ConversationError(
            f"template {conv.name} writes no tools: template_name=auto takes the model's own, if that does"
        )
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise ConversationError(f"template {conv.name} writes user and assistant in turn, and these do not take turns")
    history: list[tuple[str, str]] = []
    for i in range(0, len(turns), 2):
        question, reply = turns[i]["content"], turns[i + 1]["content"]
        if i + 1 + (system is not None) >= shared:
            before = conv.get_prompt(question, history=history, system=system or None)
            yield before, before + conv.get_response(reply)
        history.append((question, reply))
