"""Texts that a chat template has written, taken apart into turns; and answers without the stop texts they end in."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from preference.data.formats.messages import Turn
from preference.data.formats.notations import (
    BEGINS,
    CLOSES,
    FIRST_LABEL,
    HEAD_LETTERS,
    HEADS,
    LAST_LABEL,
    NOTATIONS,
    OPENS,
    REPLY_LABEL,
    STOP_LETTERS,
    STOPS,
    TAIL_LETTERS,
    TAILS,
    Notation,
    labelled_marks,
)

EDGE = 160  # characters at either end of a text by which nearly every text is told to be no rendering
LABEL = 40  # within which the label of a dialogue in plain words ends
_ALPACA_INTRODUCTION = "Below is an instruction"
_VICUNA_INTRODUCTION = "A chat between a curious"
_LLAMA3_DATES = re.compile(r"\s*Cutting Knowledge Date:[^\n]*\n(?:Today Date:[^\n]*\n?)?\s*")
_SYSTEM_INSIDE = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>(.*)", re.DOTALL)
_NEMO_LABELS = re.compile(r"<extra_id_2>[^\n]*\n?")
_CONTROL_AT_AN_END = re.compile(r"\s*(?:<[|｜]?[A-Za-z_]\w*[|｜]>|\[/?[A-Z_]{3,}\])")
_CONTROL_BEHIND = re.compile(r"(?:<[|｜]?[A-Za-z_]\w*[|｜]>|\[/[A-Z_]{3,}\])\w*:?\s*\Z")


_SPACE = frozenset(map(chr, filter(lambda c: chr(c).isspace(), range(0x3001))))
_MAY_BEGIN, _MAY_END = (_SPACE.union(letters, {""}) for letters in (HEAD_LETTERS, TAIL_LETTERS))
MAY_BE_STOP = _SPACE.union(STOP_LETTERS, {""})  # the last character of answers that may end in a stop text


class Rendering(NamedTuple):
    """What a template wrote: its notation's name, and the turns. An opened reply is a last assistant turn of ""."""

    name: str
    turns: list[Turn]

    @property
    def opened(self) -> bool:
        return self.turns[-1] == ("assistant", "")

    @property
    def is_dialogue(self) -> bool:
        return self.turns[-1].role == "assistant" and not self.opened


def is_plain(text: Any) -> bool:
    """Whether two characters and the lack of a label tell that a text is no rendering, as for nearly all."""
    if type(text) is not str or text[:1] in _MAY_BEGIN or text[-1:] in _MAY_END:
        return False
    label = text[:LABEL]
    return ":" not in label and "：" not in label


def parse(text: str) -> Rendering | None:
    """The turns of a text that a known template has written; None for any other text. Linear in its length."""
    if is_plain(text):
        return None
    head, tail = text[:EDGE].lstrip(), text[-EDGE:].rstrip()
    begins = head[:1] in HEAD_LETTERS and head.startswith(HEADS)
    ends = tail[-1:] in TAIL_LETTERS
    if not (begins or ends or ":" in head[:LABEL] or "：" in head[:LABEL]):
        return None
    tail = _without_opens(tail)
    if begins or (ends and tail.endswith(TAILS)):
        body = _without(text.strip(), BEGINS, front=True)
        for notation in NOTATIONS:
            if turns := _turns(notation, body):
                return Rendering(notation.name, turns)
    return _parse_labels(text, tail)


def looks_rendered(text: str) -> bool:
    """Whether a text begins or ends in what only a template writes, known to us or not."""
    head, tail = text[:EDGE], text[-EDGE:]
    return bool(_CONTROL_AT_AN_END.match(head) or _CONTROL_BEHIND.search(tail))


def without_stops(text: str) -> str:
    """An answer without the stop texts that it ends in."""
    last = text[-1:]
    if last not in STOP_LETTERS and not last.isspace():
        return text  # nearly all
    if not text[-EDGE:].rstrip().endswith(STOPS):
        return text
    return _without(text.rstrip(), STOPS)


def _without(text: str, marks: tuple[str, ...], front: bool = False) -> str:
    """`text` without the marks at its end (or front), however many, and the white space between them."""
    start, end = 0, len(text)
    while True:
        while start < end and text[start if front else end - 1].isspace():
            start, end = (start + 1, end) if front else (start, end - 1)
        if front:
            mark = next((mark for mark in marks if text.startswith(mark, start, end)), None)
        else:
            mark = next((mark for mark in marks if text.endswith(mark, start, end)), None)
        if mark is None:
            return text[start:end]
        start, end = (start + len(mark), end) if front else (start, end - len(mark))


def _without_opens(tail: str) -> str:
    return next((tail[: -len(opens)].rstrip() for opens in OPENS if tail.endswith(opens)), tail)


def _turns(notation: Notation, body: str) -> list[Turn]:
    """The turns of `body`, [] where it is not in this notation."""
    marks = list(notation.roles(body))
    if not marks or (marks[0][1] not in ("user", "system") and not notation.preamble):
        return []
    ends = [match.start() for match, _ in marks[1:]] + [len(body)]
    turns = [Turn(role, _piece(body[match.end() : end])) for (match, role), end in zip(marks, ends, strict=True)]
    if turns[-1].role == "assistant" and turns[-1].text in OPENS:
        turns[-1] = Turn("assistant", "")
    before = _without(body[: marks[0][0].start()].strip(), BEGINS)
    if before and not (notation.preamble and turns[-1] == ("assistant", "") and turns[0].role == "user"):
        return []
    if not any(turn.role == "user" for turn in turns):
        return []
    if turns[0].role in ("user", "system") and notation.name.startswith("### "):
        return _alpaca(before, turns)
    return _with_system(before, turns)


def _piece(text: str) -> str:
    if text.startswith("<extra_id_2>"):
        text = _NEMO_LABELS.sub("", text, count=1)
    return _without(_NEMO_LABELS.sub("", text, count=1).strip() if "<extra_id_2>" in text else text.strip(), CLOSES)


def _with_system(before: str, turns: list[Turn]) -> list[Turn]:
    """Turns with the system text that stands in front of them, or inside of the first question."""
    if turns[0].role == "system" and (dates := _LLAMA3_DATES.match(turns[0].text + "\n")):
        turns[0] = Turn("system", turns[0].text[dates.end() :])
    elif turns[0].role == "user" and (inside := _SYSTEM_INSIDE.fullmatch(turns[0].text)):
        turns = [Turn("system", inside[1].strip()), Turn("user", inside[2].strip()), *turns[1:]]
    if before and not before.startswith(_VICUNA_INTRODUCTION):
        turns = [Turn("system", before), *turns]
    return turns[1:] if turns[0] == ("system", "") else turns


def _alpaca(before: str, turns: list[Turn]) -> list[Turn]:
    """The input of an Alpaca prompt is a part of the question."""
    joined: list[Turn] = []
    for turn in turns:
        if turn.role == "input" and joined:
            joined[-1] = Turn(joined[-1].role, f"{joined[-1].text}\n{turn.text}".strip())
        else:
            joined.append(turn)
    return joined if before.startswith(_ALPACA_INTRODUCTION) or not before else [Turn("system", before), *joined]


def _parse_labels(text: str, tail: str) -> Rendering | None:
    """A dialogue in plain words: "Human: ...", "### User: ...", "USER: ... ASSISTANT:", or such words in Chinese.

    It begins with a word for the user (behind a token that only a template writes, a system text may stand first, and
    in front of Vicuna's words in capitals), and ends with one for the assistant or, a whole dialogue, has one inside.
    """
    body = _without(text, BEGINS, front=True) if text[:EDGE].lstrip().startswith(BEGINS) else text
    first = FIRST_LABEL.match(body)
    last = LAST_LABEL.search(tail) if tail.endswith((":", "：", "**")) else None
    if first is None and (last is None or (body is text and last[1] != "ASSISTANT")):
        return None
    last = last or REPLY_LABEL.search(body)
    if last is None:
        return None
    before = last.string[: last.start()]
    gap = "blank line" if before.endswith("\n\n") else ("line" if before.endswith("\n") else "space")
    if gap == "space" and last[1] != last[1].upper():
        return None
    user = first[1] if first else next((word for word in ("USER", "User", "Human") if f"{word}:" in body), "")
    if not user:
        return None
    turns = _turns(Notation("", labelled_marks(user, last[1], gap), preamble=first is None), body.strip())
    if not any(turn.role == "assistant" for turn in turns) or turns[0].role == "assistant":
        return None
    return Rendering(f"{user}: ... {last[1]}:", turns)
