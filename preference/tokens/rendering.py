"""One checked row -> the text of its prompt, chosen and rejected answer, as the chat template writes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from preference.templates.conversation import ConversationError
from preference.templates.wholes import Part, parts_of

if TYPE_CHECKING:
    from preference.data.row import Row

# Renderings of these differ in their first and last characters, so that what they share is the template's own.
_PROBE_QUESTIONS = ("Aa1", "9zQ")
_PROBE_SYSTEMS = (None, "S5x", "kY")
_PROBE_HISTORIES = ((), (("u3", "v"),), (("Pw", "8"), ("e", "0")))


def render(row: Row, conv: Any, prompt_is_rendered: bool = False) -> dict[str, str]:
    """{"prompt", "chosen", "rejected"} of a row; both answers end in the template's stop text.

    See `Renderer` for rows that bring their own prompt.
    """
    return Renderer(conv, prompt_is_rendered).render(row)


class Renderer:
    """Renders rows with one template.

    A row with a prompt of its own is used as it stands. It counts as rendered, so that its control tokens are meant, if
    `prompt_is_rendered` says so or if it begins and ends as this template's prompts do; then the answers get what the
    template puts around a reply. Otherwise the prompt is plain text, and the answers get the stop text alone.
    """

    def __init__(self, conv: Any, prompt_is_rendered: bool = False) -> None:
        self.conv = conv
        self.prompt_is_rendered = prompt_is_rendered
        prompts = list(_probe_prompts(conv))
        self.head = os.path.commonprefix(prompts)
        self.tail = os.path.commonprefix([prompt[::-1] for prompt in prompts])[::-1]
        # Everything the template may write around harmless content
        self.template_text = "\0".join([*prompts, conv.get_response("r2"), conv.stop_str])

    def consumed(self, tokens: frozenset[str]) -> frozenset[str]:
        """Those of the control tokens that the template itself takes out of replies (reasoning marks, for some)."""
        return frozenset(token for token in tokens if token not in self.conv.get_response(f"Aa{token}zZ"))

    def matches(self, prompt: str) -> bool:
        """Whether a ready prompt begins and ends as this template's prompts do."""
        return bool(self.tail) and prompt.startswith(self.head) and prompt.endswith(self.tail)

    def is_rendered(self, row: Row) -> bool:
        """Whether control tokens in the row's own prompt are meant as such (False for rows with a question)."""
        return row.prompt is not None and (self.prompt_is_rendered or self.matches(row.prompt))

    def render(self, row: Row) -> dict[str, str]:
        """The three texts; a single answer has no rejected one beside it."""
        texts = self._render(row)
        return texts if row.label is None else texts | {"rejected": ""}

    def parts(self, row: Row) -> dict[str, list[Part]]:
        """Of a row of whole conversations: the prompt, and the parts of both answers, learned or not.

        Raises ConversationError where the template cannot write them, and where text of the row spells a control token.
        """
        whole = row.dialogue
        assert whole is not None  # the caller has seen to it
        prompt, chosen = parts_of(self.conv, whole.chosen, whole.shared, whole.tools)
        other, rejected = parts_of(self.conv, whole.rejected, whole.shared, whole.tools)
        if prompt != other:
            raise ConversationError("the template writes the shared turns in two ways")
        return {"prompt": [(prompt, False)], "chosen": chosen, "rejected": rejected}

    def _render(self, row: Row) -> dict[str, str]:
        if row.prompt is None:
            prompt = self.conv.get_prompt(row.question, history=row.history, system=row.system)
            return {
                "prompt": prompt,
                "chosen": self.conv.get_response(row.chosen),
                "rejected": self.conv.get_response(row.rejected),
            }
        chosen, rejected = self.without_stop(row.chosen), self.without_stop(row.rejected)
        if self.is_rendered(row):
            answers = self.conv.get_response(chosen), self.conv.get_response(rejected)
        else:
            answers = chosen + self.conv.stop_str, rejected + self.conv.stop_str
        return {"prompt": row.prompt, "chosen": answers[0], "rejected": answers[1]}

    def without_stop(self, answer: str) -> str:
        """The answer of a {prompt, chosen, rejected} row without a stop text that it already ends in."""
        stop = self.conv.stop_str.strip()
        if stop and answer.rstrip().endswith(stop):
            return answer.rstrip().removesuffix(stop).rstrip()
        return answer


def _probe_prompts(conv: Any) -> Iterator[str]:
    for system in _PROBE_SYSTEMS:
        for history in _PROBE_HISTORIES:
            for question in _PROBE_QUESTIONS:
                try:
                    yield conv.get_prompt(question, history=history, system=system)
                except ConversationError:  # the template knows no system message, or no history
                    continue
