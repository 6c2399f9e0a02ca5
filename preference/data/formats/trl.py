"""TRL's standard types: {prompt, chosen, rejected} and {chosen, rejected}, plain text and message lists.

Also zhihu_rlhf_3k, Human-Like-DPO, FineMed-DPO, UltraMedical-Preference, UltraChat-style message lists, axolotl's
prompt_pairs (with a `system` column) and `chat_template.argilla`.
"""

from __future__ import annotations

from collections.abc import Iterator
from os.path import commonprefix
from typing import Any

from preference.data.formats.base import Drop, Format, Options, Pair, RowDict, take
from preference.data.formats.messages import is_messages, pair_of_dialogues, pair_of_messages, plain_reply

ANSWERS = frozenset({"chosen", "rejected"})


def explicit(row: RowDict, options: Options) -> Iterator[Pair]:
    prompt, chosen, rejected = take_question(row, "prompt", "chosen", "rejected")
    yield pair_of_prompt(prompt, chosen, rejected, row.get("system"), row.get("history"))


def take_question(row: RowDict, question: str, chosen: str, rejected: str) -> list[Any]:
    """The three columns; of whole dialogues, which hold the question, its own column may be null or empty."""
    answers = take(row, chosen, rejected) if row.get(question) in (None, "") else ()
    return [None, *answers] if answers and are_dialogues(*answers) else take(row, question, chosen, rejected)


def are_dialogues(chosen: Any, rejected: Any) -> bool:
    """Whether the answers are message lists that hold more than the answer."""
    if not is_messages(chosen) or not is_messages(rejected):
        return False
    return len(chosen if isinstance(chosen, (list, tuple)) else next(iter(chosen.values()))) > 1


def pair_of_prompt(prompt, chosen, rejected, system=None, history=None, extra=None) -> Pair:
    """A pair of any mixture of string prompt or message list with string answers or message lists."""
    if is_messages(prompt):
        return pair_of_messages(prompt, chosen, rejected, system, extra)
    if are_dialogues(chosen, rejected):
        return pair_of_dialogues(chosen, rejected, system, extra)  # a string prompt only repeats what they hold
    as_it_stands = isinstance(chosen, str) and isinstance(rejected, str) and not system and not history
    prompt_alone = prompt if as_it_stands else None
    return Pair(prompt, plain_reply(chosen), plain_reply(rejected), system, history, prompt_alone, extra or {})


def implicit_messages(row: RowDict, options: Options) -> Iterator[Pair]:
    chosen, rejected = take(row, "chosen", "rejected")
    yield pair_of_dialogues(chosen, rejected, row.get("system"))


def implicit_text(row: RowDict, options: Options) -> Iterator[Pair]:
    """The longest common beginning, cut back to the end of a word, is taken as the prompt."""
    chosen, rejected = take(row, "chosen", "rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise Drop("wrong_type", "chosen and rejected must both be strings")
    shared = len(commonprefix([chosen, rejected]))
    if shared == len(chosen) == len(rejected):
        raise Drop("identical_answers")
    while shared and _inside_word(chosen, shared) | _inside_word(rejected, shared):
        shared -= 1
    if not chosen[:shared].strip():
        raise Drop("no_common_prompt", "the two texts do not begin alike")
    yield Pair(chosen[:shared], chosen[shared:], rejected[shared:])


def _inside_word(text: str, at: int) -> bool:
    return 0 < at < len(text) and all(char.isascii() and char.isalnum() for char in text[at - 1 : at + 1])


TRL = Format(
    name="trl",
    what="{prompt, chosen, rejected}: text or message lists (TRL, FineMed, UltraMedical, zhihu_rlhf)",
    needs=("prompt", "chosen", "rejected"),
    answers=ANSWERS,
    pairs=explicit,
)
TRL_IMPLICIT_MESSAGES = Format(
    name="trl-implicit-messages",
    what="{chosen, rejected}: two message lists that share all but the last turn",
    needs=("chosen", "rejected"),
    also=lambda row: are_dialogues(row["chosen"], row["rejected"]),
    answers=ANSWERS,
    pairs=implicit_messages,
)
TRL_IMPLICIT_TEXT = Format(
    name="trl-implicit-text",
    what="{chosen, rejected}: two texts that begin alike",
    needs=("chosen", "rejected"),
    also=lambda row: isinstance(row["chosen"], str) and isinstance(row["rejected"], str),
    answers=ANSWERS,
    pairs=implicit_text,
    guess=lambda row: "there is no prompt column: the longest common beginning of both texts would be the question",
    warnings=(
        "there is no prompt column: the longest common beginning of both texts is taken as the question, which is a "
        "guess; look at a few rows, or name the columns with --columns",
    ),
)
