"""--split-system: take a system prompt out of the question where a dataset has written it into it."""

from __future__ import annotations

import re

from preference.data.formats.base import Pair
from preference.data.formats.hh import is_transcript, turns_of_transcript
from preference.data.formats.messages import ROLES, Turn, context_of

_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\s*|\Z)", re.DOTALL)
_LLAMA2 = re.compile(r"\s*(?:<s>)?\s*\[INST\]\s*(?:<<SYS>>(.*?)<</SYS>>)?(.*?)\[/INST\]\s*", re.DOTALL)
_USER_LABEL = r"\s*(?:#+\s*)?(?:user|human|用户)\s*[:：]\s*"
_USER = re.compile(_USER_LABEL, re.IGNORECASE)
_LABEL = re.compile(
    rf"\s*(?:#+\s*)?(?:system(?: prompt| message)?|系统)\s*[:：]\s*(.+?)\n(?:\s*\n|(?={_USER_LABEL}))(.+)",
    re.DOTALL | re.IGNORECASE,
)
_PERSONA = re.compile(
    r"\s*((?:You are (?:an?|the) [^\n]{0,60}?(?:assistant|AI|chatbot|language model)\b"
    r"|你是一?[个名位款]?[^\n]{0,20}?(?:助手|助理|机器人))[^\n]*)\n\s*\n(.+)",
    re.DOTALL,
)
RENDERED = re.compile(r"<\|im_start\|>|\[INST\]|<\|start_header_id\|>|<start_of_turn>|(?:\A|\n\n)Human:")


def split_system(pair: Pair) -> bool:
    """Move what is found into system, history and question; False if nothing was. Raises Drop for irregular turns."""
    text = pair.prompt if isinstance(pair.prompt, str) else pair.question
    if not isinstance(text, str) or pair.system or pair.history:
        return False
    if text.lstrip().startswith("<|im_start|>"):
        return _set(pair, **context_of(_chatml_turns(text)))
    if is_transcript(text):
        turns = turns_of_transcript(text)
        return _set(pair, **context_of(turns[:-1] if turns[-1] == ("assistant", "") else turns))
    if (match := _LLAMA2.fullmatch(text)) and "[/INST]" not in match.group(2):  # one turn; several are left alone
        return _set(pair, system=match.group(1), question=match.group(2))
    if match := _LABEL.fullmatch(text) or _PERSONA.fullmatch(text):
        return _set(pair, system=match.group(1), question=_USER.sub("", match.group(2), count=1))
    return False


def _chatml_turns(text: str) -> list[Turn]:
    turns = [Turn(ROLES.get(role, "user"), said.strip()) for role, said in _CHATML.findall(text)]
    return turns[:-1] if turns and turns[-1] == ("assistant", "") else turns


def _set(pair: Pair, question: str, system: str | None = None, history: object = ()) -> bool:
    pair.question, pair.system, pair.history, pair.prompt = question, system, history, None
    return True
