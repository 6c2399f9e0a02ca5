"""One checked preference pair, or one answer that is labelled good or bad, as every stage after reading knows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Two conversations that a template writes as wholes, with what it is told of tools.

    Attributes:
        chosen, rejected: messages of {role, content, tool_calls}; the first `shared` of them are the same.
        tools: definitions of {type: "function", function: {name, ...}}.
    """

    chosen: tuple[dict[str, Any], ...]
    rejected: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    shared: int


@dataclass(frozen=True, slots=True)
class Row:
    """One checked preference pair. Texts are stripped, answers are not empty and differ.

    With a `label` it is a single answer, which stands in `chosen` whether it is good or bad; `rejected` is empty.
    """

    question: str
    chosen: str
    rejected: str
    system: str | None = None  # None: the template's default
    history: tuple[tuple[str, str], ...] = ()  # (user, assistant) turns before the question
    prompt: str | None = None  # a prompt that is rendered already: stands in for question, verbatim
    file: str = ""
    line: int = 0  # 1-based; the row number in a parquet or arrow table
    extra: dict[str, Any] = field(default_factory=dict, compare=False)  # scores and the like
    label: bool | None = None  # of a single answer: whether it is good
    dialogue: Dialogue | None = None  # stands in for all other texts, which then only say what is in it
