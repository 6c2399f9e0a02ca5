r"""Anthropic HH-RLHF: two transcripts of "\n\nHuman: ...\n\nAssistant: ..." that share all but the last reply.

Also the Dahoas derivatives (prompt in the same notation beside the replies) and hh_rlhf_cn (context of {role, text}).
Turns are split at "\n\nHuman:" and "\n\nAssistant:" alone: a "Human:" that a model made up inside its reply is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from preference.data.formats.base import Drop, Format, Options, Pair, RowDict, take
from preference.data.formats.messages import Turn, pair_of_context, pair_of_messages

_MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_BEGINS = re.compile(r"\s*Human:")
_ROLES = {"Human": "user", "Assistant": "assistant"}
CARD_WARNING = (
    "the card of HH-RLHF says that its pairs are not meant for supervised training of dialogue agents: both replies "
    "may be harmful, and ORPO (like any loss with an NLL term) trains on chosen as a model answer; prefer loss=dpo, or "
    "look at the rows"
)


def is_transcript(text: Any) -> bool:
    return isinstance(text, str) and _BEGINS.match(text) is not None and "\n\nAssistant:" in text


def turns_of_transcript(text: str) -> list[Turn]:
    pieces = _MARK.split(text)
    if pieces[0].strip():
        raise Drop("irregular_turns", "the transcript does not begin with 'Human:'")
    return [Turn(_ROLES[role], said.strip()) for role, said in zip(pieces[1::2], pieces[2::2], strict=True)]


def transcripts(row: RowDict, options: Options) -> Iterator[Pair]:
    texts = take(row, "chosen", "rejected")
    for text in texts:
        if not isinstance(text, str):
            raise Drop("wrong_type", f"a transcript must be a string, not {type(text).__name__}")
    if texts[0].strip() == texts[1].strip():
        raise Drop("identical_answers")
    chosen, rejected = (turns_of_transcript(text) for text in texts)
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[-1].role != "assistant":
            raise Drop("irregular_turns", f"{name} ends in a Human turn")
    if len(chosen) != len(rejected):
        raise Drop("irregular_turns", f"{len(chosen)} turns in chosen, {len(rejected)} in rejected")
    if chosen[:-1] != rejected[:-1]:
        raise Drop("irregular_turns", "the two transcripts part before their last turn")
    yield pair_of_context(chosen[:-1], chosen[-1].text, rejected[-1].text)


def with_prompt(row: RowDict, options: Options) -> Iterator[Pair]:
    prompt, chosen, rejected = take(row, "prompt", "chosen", "rejected")
    for text in (prompt, chosen, rejected):
        if not isinstance(text, str):
            raise Drop("wrong_type", f"prompt and answers must be strings, not {type(text).__name__}")
    turns = turns_of_transcript(prompt)
    if turns and turns[-1] == ("assistant", ""):
        turns.pop()  # the opening of the reply
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if "\n\nHuman:" in text or "\n\nAssistant:" in text:
            raise Drop("irregular_turns", f"{name} goes on to further turns")
    yield pair_of_context(turns, chosen, rejected)


def chinese(row: RowDict, options: Options) -> Iterator[Pair]:
    yield pair_of_messages(*take(row, "context", "chosen", "rejected"))


ANSWERS = frozenset({"chosen", "rejected"})
HH = Format(
    name="hh",
    what="HH-RLHF transcripts",
    needs=("chosen", "rejected"),
    also=lambda row: is_transcript(row["chosen"]) or is_transcript(row["rejected"]),
    answers=ANSWERS,
    pairs=transcripts,
    warnings=(CARD_WARNING,),
)
HH_PROMPT = Format(
    name="hh-prompt",
    what="HH-RLHF with the prompt apart (Dahoas full-hh-rlhf, rm-static, static-hh)",
    needs=("prompt", "response", "chosen", "rejected"),
    ignores=frozenset({"response"}),
    also=lambda row: is_transcript(row["prompt"]),
    answers=ANSWERS,
    pairs=with_prompt,
    warnings=(CARD_WARNING,),
)
HH_CN = Format(
    name="hh-cn",
    what="hh_rlhf_cn: context and answers of {role, text}",
    needs=("context", "chosen", "rejected"),
    also=lambda row: isinstance(row["context"], list),
    answers=ANSWERS,
    pairs=chinese,
    warnings=(CARD_WARNING,),
)
