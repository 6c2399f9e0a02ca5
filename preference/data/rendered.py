"""Pairs whose texts a chat template has been applied to already: questions become turns, answers lose their stop texts.

A question that is a rendered prompt would be put into a second template, and an answer that ends in `<|im_end|>` would
learn to write it twice, once as characters. `TakeApart` undoes both, pair by pair.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from preference.data.formats.base import Drop, NotRecognised, Pair
from preference.data.formats.messages import ROLES, context_of, pair_of_dialogues
from preference.data.formats.notations import LEADING_REPLY_LABEL
from preference.data.formats.rendering import (
    LABEL,
    MAY_BE_STOP,
    Rendering,
    is_plain,
    looks_rendered,
    parse,
    without_stops,
)


@dataclass
class TakeApart:
    """Pairs without template text, as the user chose (None: split where the rows of a file agree).

    `rendered` says what the first rows of the file are: True for all rendered, False for none.
    """

    choice: str | None = None
    prompt_is_rendered: bool | None = None
    rendered: bool | None = None
    notes: Counter[str] | None = None

    def decide(self, first: Iterable[Pair]) -> None:
        """Take note of whether the first pairs of a file are rendered.

        Raises NotRecognised where a tenth of them or more differ from the others: then the user has to say.
        """
        found = [rendering_of(pair) for pair in first if pair.dialogue is None]
        rendered, share = [one for one in found if one], len(found) / 10
        self.rendered = len(rendered) > len(found) / 2
        if share <= min(len(rendered), len(found) - len(rendered)) > 0:
            raise NotRecognised(
                "choice_needed",
                f"{len(rendered)} of the first {len(found)} questions are rendered prompts ({rendered[0].name}), the "
                "others are not: say --rendered split (take those apart) or --rendered keep (leave the text as it is)",
            )

    def __call__(self, pair: Pair) -> Pair:
        """The pair itself, changed in place. Raises Drop for what cannot be taken apart or, if strict, for any."""
        if pair.dialogue is not None:
            return pair
        if self.choice != "keep":
            if _last(pair.chosen) in MAY_BE_STOP or _last(pair.rejected) in MAY_BE_STOP:
                self._strip_stops(pair)
            if self.prompt_is_rendered is None:
                self._split(pair)
        if pair.prompt is not None:
            self._decide_prompt(pair)
        return pair

    def _strip_stops(self, pair: Pair) -> None:
        for side in ("chosen", "rejected"):
            text = getattr(pair, side)
            if isinstance(text, str) and (bare := without_stops(text)) is not text:
                if self.choice == "strict":
                    raise Drop("template_text", f"{side} ends in {text.rstrip()[len(bare) :].strip()[:40]!r}")
                setattr(pair, side, bare)
                self._note(f"stop_text_off_{side}")

    def _split(self, pair: Pair) -> None:
        plain = is_plain(pair.chosen) and is_plain(pair.question if pair.prompt is None else pair.prompt)
        found = None if plain else rendering_of(pair)
        if plain and not self.rendered:
            return  # nearly all
        if self.choice is None and self.rendered is not None and (found is not None) != self.rendered:
            is_so = (
                "is rendered, as the first rows of the file are not"
                if found
                else "is not rendered, as the first rows are"
            )
            raise Drop("mixed_rendering", f"the question {is_so}: say --rendered split or --rendered keep")
        if found is None:
            return
        if self.choice == "strict":
            raise Drop("template_text", f"the question is a rendered prompt ({found.name})")
        apply(pair, found)
        self._note(f"taken_apart ({found.name})")

    def _decide_prompt(self, pair: Pair) -> None:
        """The string of a prompt column is a question, unless it is rendered, by the user's word or by its looks."""
        if self.prompt_is_rendered is None:
            as_it_stands = self.choice == "keep" or (isinstance(pair.prompt, str) and looks_rendered(pair.prompt))
        else:
            as_it_stands = self.prompt_is_rendered
        self._note("prompt_as_it_stands" if as_it_stands else "prompt_is_question")
        if not as_it_stands:
            pair.question, pair.prompt = pair.prompt, None

    def _note(self, name: str) -> None:
        if self.notes is not None:
            self.notes[name] += 1


def _last(text: Any) -> str:
    return text[-1:] if isinstance(text, str) else ""


def rendering_of(pair: Pair) -> Rendering | None:
    """The rendering that a pair's question is, or that both its answers hold whole."""
    chosen = parse(pair.chosen) if isinstance(pair.chosen, str) else None
    if chosen is not None and chosen.is_dialogue and isinstance(pair.rejected, str):
        rejected = parse(pair.rejected)
        if rejected is not None and rejected.is_dialogue:
            return chosen
    text = pair.prompt if isinstance(pair.prompt, str) else pair.question
    return parse(_with_opened_reply(pair, text)) if isinstance(text, str) else None


def _with_opened_reply(pair: Pair, text: str) -> str:
    """The prompt, behind it the label of the reply where both answers begin with one: "Human: Q", "Assistant: good"."""
    ours = _reply_label(pair.chosen)
    theirs = _reply_label(pair.rejected) if ours else None
    return f"{text.rstrip()}\n\n{ours[0].strip()}" if ours and theirs else text


def _reply_label(answer: Any) -> re.Match[str] | None:
    if not isinstance(answer, str):
        return None
    head = answer[:LABEL]
    return LEADING_REPLY_LABEL.match(answer) if ":" in head or "：" in head else None


def apply(pair: Pair, found: Rendering) -> None:
    """Put the turns of the rendering in the place of the pair's question. Raises Drop for irregular turns."""
    if found.is_dialogue:
        ours, theirs = parse(pair.chosen), parse(pair.rejected)
        if ours is None or theirs is None or not (ours.is_dialogue and theirs.is_dialogue):
            raise Drop(
                "irregular_turns", "the rendered prompt ends inside of the reply: --rendered keep uses it as it stands"
            )
        whole = pair_of_dialogues(_messages(ours), _messages(theirs))
        pair.question, pair.chosen, pair.rejected = whole.question, whole.chosen, whole.rejected
        context = {"system": whole.system, "history": whole.history}
    else:
        turns = found.turns[:-1] if found.opened else found.turns
        if any(turn.role == "tool" for turn in turns):
            raise Drop("tool_calls", f"a tool turn in a prompt rendered as {found.name}")
        if unknown := next((turn.role for turn in turns if turn.role not in ROLES.values()), None):
            raise Drop("unknown_role", f"a turn of {unknown[:40]!r} in a prompt rendered as {found.name}")
        context = context_of(turns)
        pair.question = context["question"]
        if found.opened:
            _strip_labels(pair)
    pair.prompt = None
    _join(pair, context)


def _messages(found: Rendering) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in found.turns]


def _strip_labels(pair: Pair) -> None:
    ours, theirs = _reply_label(pair.chosen), _reply_label(pair.rejected)
    if ours and theirs:
        pair.chosen, pair.rejected = pair.chosen[ours.end() :], pair.rejected[theirs.end() :]


def _join(pair: Pair, context: dict[str, Any]) -> None:
    """System and history of a rendering, with those that the row has in columns of their own."""
    system = context["system"]
    if pair.system and system and str(pair.system).strip() != system.strip():
        raise Drop("two_systems", "a system text in its column, and another one in the rendered prompt")
    pair.system = pair.system or system
    if context["history"]:
        if pair.history:
            raise Drop("two_histories", "a history in its column, and another one in the rendered prompt")
        pair.history = context["history"]
