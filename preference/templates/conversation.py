"""How one family of models writes a conversation: text in, prompt and response text out.

Prompts hold every character that the official template writes, a BOS included, so they are tokenized with
add_special_tokens=False. Facts behind the families, and what becomes of reasoning: docs/templates.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from preference.errors import PreferenceError

ALTERNATE = "an optional system message, then user and assistant in turn"


class ConversationError(PreferenceError, ValueError):
    """A conversation that the template cannot write, or a template that cannot be used; str() says the way out."""


@dataclass(frozen=True)
class Conversation:
    """How one family of models writes a conversation. All fields are literal text unless said otherwise.

    A prompt is `begin`, the system turn, then for each pair of the history `user[0] question user[1] assistant seam
    reply turn_end`, and at last `user[0] question user[1] assistant opens`. What is learned is `seam reply reply_end`.
    """

    name: str
    models: str  # for --list: the models that were trained with it
    user: tuple[str, str]  # before and after a question
    assistant: str  # opens a reply, in the history and at the end of the prompt
    reply_end: str  # what the model must learn to write behind its reply; outer white space apart, the stop text
    turn_end: str  # what stands behind a reply in the history: mostly reply_end and a separator that is not learned
    tokens: tuple[str, ...]  # control tokens: a tokenizer that has not each of them as one token is not of this family
    system: tuple[str, str] = ("", "")  # before and after the system text
    system_place: str = "turn"  # "turn", in the "first" or the "last" question, or "refused"
    default_system: str | None = None  # written when there is no system message; None writes nothing
    begin: str = ""  # once, at the very start
    seam: str = ""  # between `assistant` and the reply; the model generates it, so it is learned
    opens: str = ""  # the prompt ends with it, the history does not show it
    reasoning: str = "text"  # what becomes of think blocks, see `_reply` and `_past`
    strip: str = ""  # letters: S(ystem), U(ser), R(eply) lose outer white space
    strip_folded: bool = False  # white space goes after the system text was put into the question, not before
    skip_empty: str = ""  # letters: turns that are not written at all when their text is empty
    alternates: bool = False  # the official template refuses roles that do not alternate
    single_turn: bool = False  # the official template has no place for a history

    @property
    def stop_str(self) -> str:
        """The end-of-turn text: generation stops here."""
        return self.reply_end.strip()

    def get_prompt(
        self, question: str, history: Iterable[Sequence[str]] | None = None, system: str | None = None
    ) -> str:
        """The text up to where the assistant begins, for `history` pairs (user, assistant), oldest first.

        `system=None` writes the family's default, "" an empty system turn as the official template renders it.
        Raises ConversationError where the official template refuses the conversation.
        """
        pairs = checked_history(history)
        if self.single_turn and pairs:
            raise ConversationError(f"template {self.name} is single-turn and cannot write a history of {len(pairs)}")
        if self.system_place == "refused" and system is not None:
            raise ConversationError(
                f"template {self.name} has no system turn: its models were trained without one. Leave the system text "
                "out, or pass fold_system=true to put it before the first question"
            )
        system = self.default_system if system is None else system
        if system is None or (not system and "S" in self.skip_empty):
            turn = ""
        else:
            turn = self.system[0] + self._clean("S", system) + self.system[1]
        folded = {"first": 0, "last": len(pairs)}.get(self.system_place)  # the question that the system text is part of
        text = self.begin + (turn if folded is None else "")
        for i, (past_question, past_reply) in enumerate(pairs):
            text += self._question(past_question, turn if i == folded else "") + self._past(past_reply)
        return text + self._question(question, turn if folded == len(pairs) else "") + self.assistant + self.opens

    def get_response(self, reply: str) -> str:
        """What the model must learn to write after the prompt: seam, the reply as the template prints it, stop text."""
        return self.seam + self._reply(reply) + self.reply_end

    def jinja(self) -> str:
        """This template as a jinja chat template, to be saved with the model: serving renders what was trained.

        With add_generation_prompt it renders `get_prompt`; without, a last assistant message renders `get_response`
        and the separator behind it.
        """
        return _jinja(self)

    def _clean(self, role: str, text: str) -> str:
        return text.strip() if role in self.strip else text

    def _question(self, text: str, system: str) -> str:
        if not text and "U" in self.skip_empty:
            return ""
        text = self._clean("U", system + text) if self.strip_folded else system + self._clean("U", text)
        return self.user[0] + text + self.user[1]

    def _past(self, reply: str) -> str:
        """A reply of the history. Every policy but "text" leaves its reasoning out."""
        if not reply and "R" in self.skip_empty:
            return ""
        reply = self._clean("R", reply)
        if self.reasoning == "channel":
            reply = _without_channels(reply)
        elif self.reasoning != "text" and "</think>" in reply:
            reply = reply.split("</think>")[-1]
            reply = reply if self.reasoning in ("hidden", "open-raw") else reply.lstrip("\n")
        return self.assistant + self.seam + reply + self.turn_end

    def _reply(self, reply: str) -> str:
        """A reply to learn. Policies: "text" is untouched; "channel" loses its thought channels; "block" always holds
        a think block, empty if the reply has none; "closed" holds none, as the prompt already closed it; "open" and
        "open-raw" close the block that the prompt opened; "hidden" does not, as the official template shows none."""
        reply = self._clean("R", reply)
        if self.reasoning == "text":
            return reply
        if self.reasoning == "channel":
            return _without_channels(reply)
        if self.reasoning == "hidden":
            return reply.split("</think>")[-1]
        thought, answer = "", reply
        if "</think>" in reply:
            thought = self._clean("R", reply.split("</think>")[0].rstrip("\n").split("<think>")[-1]).strip("\n")
            answer = reply.split("</think>")[-1]
        closed = thought + "\n</think>\n\n"
        before = {"block": "<think>\n" + closed, "closed": ""}.get(self.reasoning, closed)
        return before + answer.lstrip("\n")


def _without_channels(text: str) -> str:
    """Gemma 4 writes reasoning as `<|channel>thought ... <channel|>` and shows none of it."""
    return "".join(part.split("<|channel>")[0] for part in text.split("<channel|>")).strip()


def checked_history(history: Iterable[Sequence[str]] | None) -> list[tuple[str, str]]:
    """The history as pairs of text. Raises ConversationError for anything else, such as roles that do not alternate."""
    pairs = list(history or ())
    for i, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ConversationError(f"history[{i}] must be [user, assistant], two texts, so that roles alternate")
    return [(user, assistant) for user, assistant in pairs]


def _jinja(c: Conversation) -> str:
    """The body of Conversation.jinja: the same steps as get_prompt and get_response, for this family alone."""

    def text(*parts: str) -> str:  # a jinja literal
        return json.dumps("".join(parts), ensure_ascii=False)

    def trim(role: str, value: str) -> str:
        return f"({value}) | trim" if role in c.strip else value

    def fail(condition: str, reason: str) -> str:
        return "{%- if " + condition + " -%}{{- raise_exception(" + text(f"{c.name}: {reason}") + ") -}}{%- endif -%}"

    default = "none" if c.default_system is None else text(c.default_system)
    asked = "content" if c.strip_folded else trim("U", "content")
    if c.system_place in ("first", "last"):
        here = "loop.first" if c.system_place == "first" else "loop.index0 == (turns | length - 1) // 2 * 2"
        asked = f"(turn if {here} else '') + ({asked})"
    asked = trim("U", asked) if c.strip_folded else asked
    unless = {role: " and content" if role in c.skip_empty else "" for role in "SUR"}
    behind = c.turn_end.removeprefix(c.reply_end) if c.turn_end.startswith(c.reply_end) else ""
    parts = [
        "{%- set given = messages[0]['role'] == 'system' -%}",
        "{%- set turns = messages[1:] if given else messages -%}",
        "{%- set content = messages[0]['content'] if given else " + default + " -%}{%- set turn = '' -%}",
        "{%- if content is not none" + unless["S"] + " -%}",
        "{%- set turn = " + f"{text(c.system[0])} + ({trim('S', 'content')}) + {text(c.system[1])}",
        " -%}{%- endif -%}",
        fail("given", "no system message is supported") if c.system_place == "refused" else "",
        fail("turns | length > 2", "single-turn") if c.single_turn else "",
        "{{- " + text(c.begin) + (" + turn" if c.system_place == "turn" else "") + " -}}",
        "{%- for message in turns -%}{%- set content = message['content'] -%}",
        fail("(message['role'] == 'user') != (loop.index0 % 2 == 0)", ALTERNATE) if c.alternates else "",
        fail("message['role'] not in ['user', 'assistant']", ALTERNATE),
        "{%- if message['role'] == 'user'" + unless["U"] + " -%}",
        "{{- " + f"{text(c.user[0])} + ({asked}) + {text(c.user[1])}" + " -}}",
        "{%- elif message['role'] == 'assistant'" + unless["R"] + " -%}",
        "{%- set content = " + trim("R", "content") + " -%}" + _jinja_reasoning(c),
        "{%- if loop.last and not add_generation_prompt -%}",
        "{{- " + f"{text(c.assistant, c.opens, c.seam)} + reply + {text(c.reply_end, behind)}" + " -}}{%- else -%}",
        "{{- " + f"{text(c.assistant, c.seam)} + past + {text(c.turn_end)}" + " -}}{%- endif -%}{%- endif -%}",
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- " + text(c.assistant, c.opens) + " -}}{%- endif -%}",
    ]
    return "".join(parts)


def _jinja_reasoning(c: Conversation) -> str:
    """Sets `past` and `reply` from `content`: Conversation._past and ._reply in jinja."""
    if c.reasoning == "text":
        return "{%- set past = content -%}{%- set reply = content -%}"
    if c.reasoning == "channel":
        return (
            "{%- set kept = namespace(text='') -%}{%- for part in content.split('<channel|>') -%}"
            "{%- set kept.text = kept.text + part.split('<|channel>')[0] -%}{%- endfor -%}"
            "{%- set past = kept.text | trim -%}{%- set reply = past -%}"
        )
    clean = ".strip()" if "R" in c.strip else ".strip('\\n')"
    if c.reasoning == "hidden":
        return "{%- set past = content.split('</think>')[-1] -%}{%- set reply = past -%}"
    left = "" if c.reasoning == "open-raw" else ".lstrip('\\n')"
    before = {"block": r"'<think>\n' + thought + '\n</think>\n\n' + ", "closed": ""}
    return (
        "{%- set thought = '' -%}{%- set past = content -%}{%- if '</think>' in content -%}"
        "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1]" + clean + " -%}"
        "{%- set past = content.split('</think>')[-1]"
        + left
        + " -%}{%- endif -%}{%- set reply = "
        + before.get(c.reasoning, r"thought + '\n</think>\n\n' + ")
        + "past.lstrip('\\n') -%}"
    )
