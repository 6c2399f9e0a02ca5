"""Two whole dialogues as text, as a chat template or plain labels write them, that share all but the last reply."""

from __future__ import annotations

from collections.abc import Iterator

from preference.data.formats.base import Format, Options, Pair, RowDict, take
from preference.data.formats.rendering import parse


def pairs(row: RowDict, options: Options) -> Iterator[Pair]:
    """The texts as they are: what reads the pair takes rendered dialogues apart (preference/data/rendered.py)."""
    chosen, rejected = take(row, "chosen", "rejected")
    yield Pair(None, chosen, rejected, row.get("system"))


def is_dialogue(text: object) -> bool:
    found = parse(text) if isinstance(text, str) else None
    return found is not None and found.is_dialogue


DIALOGUE_TEXT = Format(
    name="dialogue-text",
    what="{chosen, rejected}: two dialogues that a chat template or labels such as User: and Assistant: have written",
    needs=("chosen", "rejected"),
    also=lambda row: is_dialogue(row["chosen"]) and is_dialogue(row["rejected"]),
    answers=frozenset({"chosen", "rejected"}),
    pairs=pairs,
)
