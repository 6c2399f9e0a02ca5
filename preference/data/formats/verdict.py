"""What the text of a deciding column says of two answers: the first, the second, a tie, or nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from preference.data.formats.base import number
from preference.data.formats.names import key_of
from preference.data.formats.sides import Sides

# A column that names the better side may use any of these, whatever the marks of the two columns
_WORDS = ({"a", "left", "first", "one", "甲", "左", "一"}, {"b", "right", "second", "two", "乙", "右", "二"})
_TIES = frozenset(
    """tie tied ties draw equal equally same both both_bad both_good bothbad tie_bothbad neither none similar
    no_preference a_b indifferent unsure equal_quality 平局 平 一样 相同 相当 都好 都差 无 c""".split()
)
_TOKEN = re.compile(r"[a-z0-9]+|[^\W_a-z0-9]+")
_EVEN = {"tie", "tied", "draw", "both", "neither", "equal", "equally"}
_TIED = ("一样", "平局", "相同", "相当", "差不多", "都好", "都差", "都不")
# Words that may stand beside a side's mark; with any other the text is about something else, as a model's name is
_SAID = frozenset(
    """response answer model assistant output completion candidate option reply text system chatbot bot generation
    summary conversation side is are was better best preferred prefer prefers wins won winner the one more slightly much
    significantly strongly clearly marginally far good chosen than i choose choice selected""".split()
)
_LOUD = re.compile(r"^\[*\s*([ab12])\s*\]*\s*([<>=≻≺]+)\s*\[*\s*([ab12])\s*\]*$", re.IGNORECASE)


def place_of(value: Any, sides: Sides) -> int | str | None:
    """0 or 1: the better side, 'tie', or None where the text says neither."""
    if isinstance(value, (list, tuple)):
        return _agreed([place_of(item, sides) for item in value if not _discarded(item)])
    if isinstance(value, Mapping):
        return _of_mapping(value, sides)
    if not isinstance(value, str):
        return None
    if compared := _LOUD.match(value.strip()):
        return _compared(*compared.groups())
    key = key_of(value)
    names = [key_of(column) for column in sides.columns]
    if key in names:
        return names.index(key)
    tokens = set(_TOKEN.findall(key))
    if key in _TIES or tokens & _EVEN or any(word in key for word in _TIED):
        return "tie"
    for name in sorted(names, key=len, reverse=True):  # "response 2 is better", and nothing that is not about it
        tokens = tokens if name not in key else {name} | (tokens - set(name.split("_")))
    for places in ([{mark} for mark in sides.marks], [{name} for name in names], _WORDS):
        hits = [any(token in place or _starts(token, place) for token in tokens) for place in places]
        known = _SAID.union(*places, *({*name.split("_")} for name in names))
        if hits[0] != hits[1] and all(token in known or not token.isascii() for token in tokens):
            return hits.index(True)
    return None


def _starts(token: str, place: set[str]) -> bool:
    """Whether a Chinese text has one of the place's marks in it, as 第一个更好 has."""
    return not token.isascii() and any(mark in token for mark in place if not mark.isascii())


def _compared(first: str, sign: str, second: str) -> int | str | None:
    if "=" in sign or first.casefold() == second.casefold():
        return "tie"
    first_is_a = first.casefold() in ("a", "1")
    return int(first_is_a != (sign[0] in ">≻"))


def _agreed(places: list[int | str | None]) -> int | str | None:
    """What most annotators say; a tie where they are even."""
    if not places or None in places:
        return None
    votes = (places.count(0), places.count(1))
    return "tie" if votes[0] == votes[1] else int(votes[1] > votes[0])


def _discarded(item: Any) -> bool:
    return isinstance(item, Mapping) and str(item.get("status", "")).casefold() in ("discarded", "draft", "pending")


def _of_mapping(value: Mapping, sides: Sides) -> int | str | None:
    for key in ("value", "values", "label", "choice", "selected", "winner", "text", "preferred"):
        if value.get(key) is not None:
            return place_of(value[key], sides)
    won = [place_of(str(key), sides) for key, flag in value.items() if number(flag) == 1 or flag is True]
    return won[0] if len(won) == 1 else None
