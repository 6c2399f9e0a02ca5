"""Lists of messages, under all the names that datasets give their keys and roles."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from preference.data.formats.base import Drop, Pair

ROLES = {
    **dict.fromkeys(
        (
            "user",
            "human",
            "prompter",
            "customer",
            "patient",
            "client",
            "question",
            "用户",
            "患者",
            "病人",
            "客户",
            "人类",
            "问",
        ),
        "user",
    ),
    **dict.fromkeys(
        (
            "assistant",
            "gpt",
            "chatgpt",
            "bot",
            "model",
            "ai",
            "chatbot",
            "doctor",
            "physician",
            "agent",
            "助手",
            "医生",
            "大夫",
            "助理",
            "模型",
            "机器人",
            "客服",
            "答",
        ),
        "assistant",
    ),
    **dict.fromkeys(("system", "developer", "系统"), "system"),
}
TOOL_ROLES = {
    "tool", "function", "ipython", "environment", "function_call", "function_response", "observation", "tool_call",
    "tool_response", "tool_result",
}  # fmt: skip
TOOL_PARTS = {"tool_use", "tool_result", "tool_call", "function_call"}


class Turn(NamedTuple):
    role: str  # user | assistant | system
    text: str


def is_messages(value: Any) -> bool:
    """Whether `value` is a list of messages, or the columns of one ({"role": [...], "content": [...]})."""
    if isinstance(value, dict):
        return all(isinstance(column, list) for column in value.values()) and is_message(value)
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(is_message(item) for item in value)


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and bool({"role", "from"} & value.keys()) and bool(
        {"content", "value", "text", "tool_calls"} & value.keys()
    )  # fmt: skip


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or a list of text parts. Raises Drop for what is not text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise Drop("wrong_type", f"the content of a message must be text, not {type(content).__name__}")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise Drop("wrong_type", f"a part of a message must be text, not {type(part).__name__}")
        kind = str(part.get("type") or "text")
        if kind in TOOL_PARTS:
            raise Drop("tool_calls", f"a message part of type {kind}: a triple cannot carry tool calls")
        if kind != "text":
            raise Drop("images", f"a message part of type {kind[:30]!r}: a triple carries text alone")
        value = next((part[key] for key in ("text", "value", "content") if part.get(key) is not None), None)
        if not isinstance(value, str):
            raise Drop("wrong_type", "a text part of a message without text")
        texts.append(value)
    return "".join(texts)


def turn_of(message: Any) -> Turn:
    if not isinstance(message, dict):
        raise Drop("wrong_type", f"a message must be an object with role and content, not {type(message).__name__}")
    role = next((message[key] for key in ("role", "from") if message.get(key) is not None), None)
    calls = message.get("tool_calls") or message.get("function_call")
    if calls or (isinstance(role, str) and role.lower() in TOOL_ROLES):
        raise Drop("tool_calls", "a turn that calls a tool or holds its result: a triple cannot carry it")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Drop("unknown_role", f"a message whose role is {str(role)[:40]!r}")
    content = next((message[key] for key in ("content", "value", "text") if message.get(key) is not None), None)
    if content is None:
        raise Drop("missing_key", "a message without content")
    return Turn(ROLES[role.lower()], text_of(content))


def listed(messages: Any) -> Any:
    """Messages as a list where they are a table's columns instead; else as they are."""
    if not (isinstance(messages, dict) and is_messages(messages)):
        return messages
    if len({len(column) for column in messages.values()}) != 1:
        raise Drop("wrong_type", "the columns of a message list have different lengths")
    return [dict(zip(messages, row, strict=True)) for row in zip(*messages.values(), strict=True)]


def turns_of(messages: Any) -> list[Turn]:
    messages = listed(messages)
    if not isinstance(messages, (list, tuple)):
        raise Drop("wrong_type", f"messages must be a list, not {type(messages).__name__}")
    return [turn_of(message) for message in messages]


def context_of(turns: list[Turn]) -> dict[str, Any]:
    """{question, history, system} of the turns before the answer.

    Raises Drop unless they are: at most one leading system turn, then user and assistant in turn, the user's last.
    """
    system = None
    if turns and turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
    if not turns:
        raise Drop("empty_prompt", "no user turn before the answer")
    for before, after in itertools.pairwise(turns):
        if after.role == "system":
            raise Drop("irregular_turns", "a system turn in the middle of the dialogue")
        if before.role == after.role:
            raise Drop("same_role_turns", f"two {after.role} turns in a row")
    if turns[-1].role != "user":
        raise Drop("irregular_turns", "the last turn before the answer is not the user's")
    if turns[0].role != "user":
        raise Drop("irregular_turns", "the dialogue does not begin with the user")
    history = [(turns[i].text, turns[i + 1].text) for i in range(0, len(turns) - 1, 2)]
    return {"question": turns[-1].text, "history": history, "system": system}


def history_of(messages: Any) -> list[tuple[str, str]]:
    """[user, assistant] pairs out of a list of messages. Raises Drop unless they take turns, the assistant's last."""
    turns = turns_of(messages)
    if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise Drop("irregular_turns", "the history is not user and assistant in turn")
    return [(turns[i].text, turns[i + 1].text) for i in range(0, len(turns), 2)]


def reply_of(answer: Any, context: list[Turn] | None = None) -> str:
    """The text of an answer: a string, an assistant message, a list of one, or a dialogue that opens with `context`."""
    if isinstance(answer, str):
        return answer
    turns = [turn_of(answer)] if is_message(answer) and not is_messages(answer) else turns_of(answer)
    if not turns:
        raise Drop("empty_answer", "an empty list of messages")
    if turns[-1].role != "assistant":
        raise Drop("irregular_turns", f"the answer is a {turns[-1].role} turn")
    if len(turns) == 1 or (context is not None and same(turns[:-1], context)):
        return turns[-1].text
    if all(turn.role == "assistant" for turn in turns):
        raise Drop("same_role_turns", f"an answer of {len(turns)} assistant turns")
    raise Drop("different_prompts", "the answer's own dialogue differs from the prompt")


def plain_reply(answer: Any) -> Any:
    """The text of an answer that stands as a message, or a list of one or of one text; any other value as it is."""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, (list, tuple)) and len(answer) == 1 and isinstance(answer[0], str):
        return answer[0]
    return reply_of(answer) if is_messages(answer) or is_message(answer) else answer


def same(turns: list[Turn], others: list[Turn]) -> bool:
    """Equal but for outer white space; a leading system turn may be missing on one side."""
    if turns and others and (turns[0].role == "system") != (others[0].role == "system"):
        turns, others = [[t for t in side if t.role != "system"] for side in (turns, others)]
    return [(t.role, t.text.strip()) for t in turns] == [(t.role, t.text.strip()) for t in others]


def pair_of_dialogues(chosen: Any, rejected: Any, system: Any = None, extra: dict[str, Any] | None = None) -> Pair:
    """Two dialogues that share all but the last turn. Raises Drop('different_prompts') where they part earlier."""
    ours, theirs = turns_of(chosen), turns_of(rejected)
    for name, turns in (("chosen", ours), ("rejected", theirs)):
        if not turns:
            raise Drop("empty_answer", f"{name} is an empty list of messages")
        if turns[-1].role != "assistant":
            raise Drop("irregular_turns", f"{name} ends in a {turns[-1].role} turn")
    if not same(ours[:-1], theirs[:-1]):
        parts = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False), 1) if not same([a], [b])), 0)
        raise Drop("different_prompts", f"the dialogues part at turn {parts} of {len(ours)} and {len(theirs)}")
    return pair_of_context(ours[:-1], ours[-1].text, theirs[-1].text, system, extra)


def pair_of_context(turns: list[Turn], chosen: str, rejected: str, system: Any = None, extra: Any = None) -> Pair:
    context = context_of(turns)
    context["system"] = context["system"] or system
    return Pair(chosen=chosen, rejected=rejected, extra=extra or {}, **context)


def pair_of_messages(messages: Any, chosen: Any, rejected: Any, system: Any = None, extra: Any = None) -> Pair:
    """A list of messages up to the user's last, and two answers in any form."""
    turns = turns_of(messages)
    return pair_of_context(turns, reply_of(chosen, turns), reply_of(rejected, turns), system, extra)
