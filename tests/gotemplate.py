"""As much of Go's text/template as Modelfiles here are written in: if, else, range, variables, eq, not, and fields."""

from __future__ import annotations

import re
from typing import Any


def render(template: str, system: str, messages: list[dict[str, str]]) -> str:
    """What Ollama would send for this conversation."""
    tokens = re.split(r"\{\{ (.*?) \}\}", template)  # text, action, text, ...
    nodes, rest = _parse(list(enumerate(tokens)))
    assert not rest
    data = {"System": system, "Messages": messages}
    return _run(nodes, data, {"$": data})


def _parse(tokens: list[tuple[int, str]]) -> tuple[list, list]:
    """A block's nodes, and the tokens from its closing action on."""
    nodes: list = []
    while tokens:
        (i, text), tokens = tokens[0], tokens[1:]
        if i % 2 == 0:
            nodes.append(("text", text))
        elif text == "end" or text.startswith("else"):
            return nodes, [(i, text), *tokens]
        elif text.startswith(("if ", "range ")):
            word, _, condition = text.partition(" ")
            branches = []
            while True:
                body, tokens = _parse(tokens)
                branches.append((condition, body))
                (_, closing), tokens = tokens[0], tokens[1:]
                if closing == "end":
                    break
                condition = closing.removeprefix("else").strip().removeprefix("if ") or "true"
            nodes.append((word, branches))
        else:
            nodes.append(("do", text))
    return nodes, []


def _run(nodes: list, dot: Any, names: dict[str, Any]) -> str:
    out = ""
    for kind, what in nodes:
        if kind == "text":
            out += what
        elif kind == "do":
            assigned = re.fullmatch(r"(\$\w+) :?= (.*)", what)
            if assigned:
                names[assigned[1]] = _value(assigned[2], dot, names)
            else:
                out += _value(what, dot, names)
        elif kind == "if":
            body = next((body for condition, body in what if _value(condition, dot, names)), [])
            out += _run(body, dot, names)
        else:
            (condition, body), *_ = what
            index, item, items = re.fullmatch(r"(\$\w+), (\$\w+) := (.*)", condition).groups()
            for i, message in enumerate(_value(items, dot, names)):
                names |= {index: i, item: message}
                out += _run(body, message, names)
    return out


def _value(code: str, dot: Any, names: dict[str, Any]) -> Any:
    words = re.findall(r'\(.*\)|"[^"]*"|\S+', code)
    if words[0] == "eq":
        left, right = (_value(word, dot, names) for word in words[1:])
        return left == right
    if words[0] == "not":
        return not _value(words[1], dot, names)
    if words[0] == "len":
        return len(_value(words[1], dot, names))
    if words[0] == "slice":
        return _value(words[1], dot, names)[_value(words[2], dot, names) :]
    (word,) = words
    if word.startswith("("):
        return _value(word[1:-1], dot, names)
    if word[0] == '"' or word.isdigit():
        return word.strip('"') if word[0] == '"' else int(word)
    if word in ("true", "false"):
        return word == "true"
    if word.startswith("$."):
        return names["$"][word[2:]]
    return names[word] if word.startswith("$") else (dot["content"] if word == ".Content" else _field(word, dot))


def _field(word: str, dot: Any) -> Any:
    return dot["role"] if word == ".Role" else dot[word[1:]]
