"""Pairs that only a template can write as wholes: answers of several turns, tool calls and results, tool definitions.

Messages are brought into the form that chat templates read: role, content, and tool_calls of {type, function: {name,
arguments}}; the results have the role tool. Both conversations begin alike, up to where each goes on with another turn
of the assistant: from there on the assistant's turns are learned, and the user's and tools' are not.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

from preference.data.formats.base import Drop, Pair
from preference.data.formats.messages import ROLES, is_message, listed, text_of
from preference.data.row import Dialogue

CALLING = {"function_call", "tool_call", "tool_use"}  # a turn of the assistant that calls a tool
RESULTS = {"tool", "function", "ipython", "environment", "function_response", "observation", "tool_response",
           "tool_result"}  # fmt: skip
RETRIED = {"tool_calls", "different_prompts", "same_role_turns", "irregular_turns"}  # drops of the plain way of reading


def parsed(value: Any) -> Any:
    """JSON that stands in a text, as what it is; anything else as it stands."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def call_of(value: Any) -> dict[str, Any]:
    """A tool call as templates read it. Raises Drop for what names no function."""
    value = parsed(value)
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Drop("tool_calls", "a tool call that names no function")
    arguments = parsed(function.get("arguments", function.get("parameters", {})))
    called: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(value.get("id"), str):
        called["id"] = value["id"]
    return called


def message_of(message: Any) -> dict[str, Any]:
    """One message in the form that templates read. Raises Drop for roles and contents that no template knows."""
    if not is_message(message):
        raise Drop("wrong_type", f"a message must be an object with role and content, not {type(message).__name__}")
    role = str(next((message[key] for key in ("role", "from") if message.get(key) is not None), "")).lower()
    content = next((message[key] for key in ("content", "value", "text") if message.get(key) is not None), None)
    if role in CALLING:
        calls = parsed(content)
        return {"role": "assistant", "content": "",
                "tool_calls": [call_of(call) for call in (calls if isinstance(calls, list) else [calls])]}  # fmt: skip
    if role in RESULTS:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        named = {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
        return {"role": "tool", "content": text, **named}
    if role not in ROLES:
        raise Drop("unknown_role", f"a message whose role is {role[:40]!r}")
    calls = parsed(message.get("tool_calls")) or parsed(message.get("function_call"))
    turn: dict[str, Any] = {"role": ROLES[role], "content": "" if content is None else text_of(content).strip()}
    if calls:
        turn["tool_calls"] = [call_of(call) for call in (calls if isinstance(calls, list) else [calls])]
    elif not turn["content"]:
        raise Drop("empty_turn", f"an empty turn of the {turn['role']}")
    return turn


def messages_of(value: Any, role: str = "assistant") -> list[dict[str, Any]]:
    """A list of messages, one message, or a text, which is a turn of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value.strip()}]
    value = listed(value)
    if value == []:
        raise Drop("wrong_type", "a message list without messages")
    return [message_of(message) for message in (value if isinstance(value, (list, tuple)) else [value])]


def tools_of(value: Any) -> tuple[Any, ...]:
    """Tool definitions as templates read them: {type: function, function: {name, ...}}. Raises Drop for others."""
    found = parsed(value)
    found = [parsed(tool) for tool in (found if isinstance(found, list) else [found])]
    if not all(isinstance(tool, Mapping) and isinstance(tool.get("function", tool), Mapping) for tool in found):
        raise Drop("tool_calls", "tool definitions that are no JSON objects")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in found]
    if not all(isinstance(tool["function"].get("name"), str) for tool in tools):
        raise Drop("tool_calls", "a tool definition without a name")
    return tuple(tools)


def pair_of_wholes(chosen: list[dict], rejected: list[dict], system: Any = None, tools: tuple[Any, ...] = ()) -> Pair:
    """A pair of two conversations. Raises Drop unless both go on from the same beginning with the assistant's turns."""
    if isinstance(system, str) and system.strip() and chosen[:1] and chosen[0]["role"] != "system":
        first = {"role": "system", "content": system.strip()}
        chosen, rejected = [first, *chosen], [first, *rejected]
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
                  min(len(chosen), len(rejected)))  # fmt: skip
    behind = [side[shared]["role"] if shared < len(side) else "end" for side in (chosen, rejected)]
    if behind != ["assistant", "assistant"]:
        if behind == ["end", "end"]:
            raise Drop("identical_answers")
        where = f"the dialogues part at turn {shared + 1} of {len(chosen)} and {len(rejected)}"
        raise Drop("different_prompts", f"{where}, where the assistant does not go on in both")
    asked = [turn["content"] for turn in chosen[:shared] if turn["role"] == "user"]
    if not asked:
        raise Drop("empty_prompt", "no user turn before the answers part")
    for side in (chosen, rejected):
        if side[-1]["role"] != "assistant":
            raise Drop("irregular_turns", f"the answer ends in a {side[-1]['role']} turn")
        _check_order(side, shared)
    said = chosen[0]["content"] if chosen[0]["role"] == "system" else None
    texts = ["\n\n".join(map(shown, side[shared:])) for side in (chosen, rejected)]
    pair = Pair(asked[-1], texts[0], texts[1], said)
    pair.dialogue = Dialogue(tuple(chosen), tuple(rejected), tools, shared)
    return pair


def _check_order(turns: list[dict], shared: int) -> None:
    """Raises Drop unless the user begins, nobody but tools speaks twice in a row, and results follow calls."""
    if turns[shared - 1]["role"] not in ("user", "tool"):
        raise Drop("irregular_turns", "the last turn before the answer is not the user's")
    turns = turns[turns[0]["role"] == "system" :]
    if turns[0]["role"] != "user":
        raise Drop("irregular_turns", "the dialogue does not begin with the user")
    for before, turn in itertools.pairwise(turns):
        if turn["role"] == "system":
            raise Drop("irregular_turns", "a system turn in the middle of the dialogue")
        if turn["role"] == before["role"] != "tool":
            raise Drop("same_role_turns", f"two {turn['role']} turns in a row")
        if turn["role"] == "tool" and before["role"] != "tool" and not before.get("tool_calls"):
            raise Drop("tool_calls", "a tool's result behind a turn that calls no tool")


def with_tools(pair: Pair, tools: tuple[Any, ...]) -> Pair:
    """The pair with the tools that its row defines."""
    if pair.label is not None:
        raise Drop("tool_calls", "tools beside a single answer: they are read of pairs alone")
    if pair.dialogue is not None:
        pair.dialogue = Dialogue(pair.dialogue.chosen, pair.dialogue.rejected, tools, pair.dialogue.shared)
        return pair
    asked = pair.question if pair.prompt is None else pair.prompt
    texts = (asked, pair.chosen, pair.rejected, *(text for turn in pair.history or () for text in turn))
    if not all(isinstance(text, str) for text in texts):
        raise Drop("tool_calls", "tools beside a pair that is not text")
    before = [turn for user, reply in pair.history or ()
              for turn in (*messages_of(user, "user"), *messages_of(reply))]  # fmt: skip
    before += messages_of(asked, "user")
    sides = ([*before, *messages_of(answer)] for answer in (pair.chosen, pair.rejected))
    return pair_of_wholes(next(sides), next(sides), pair.system, tools)


def shown(turn: Mapping[str, Any]) -> str:
    """What a turn says, for the figures of the data report."""
    calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else ""
    return "\n".join(filter(None, (turn["content"], calls)))
