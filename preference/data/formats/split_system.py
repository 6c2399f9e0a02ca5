"""--split-system: take a system prompt out of the question where a dataset has written it into it in plain words."""

from __future__ import annotations

import re

from preference.data.formats.base import Pair

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


def split_system(pair: Pair) -> bool:
    """Move what is found into system, history and question; False if nothing was."""
    text = pair.prompt if isinstance(pair.prompt, str) else pair.question
    if not isinstance(text, str) or pair.system or pair.history:
        return False
    if match := _LABEL.fullmatch(text) or _PERSONA.fullmatch(text):
        pair.system, pair.question, pair.prompt = match.group(1), _USER.sub("", match.group(2), count=1), None
        return True
    return False
