"""Which template a run uses: a named one, checked against the tokenizer, or the tokenizer's own, used just like one.

`template_name=auto` reads everything off renderings of the tokenizer's chat template: where the reply begins, what
stands around it, and which text ends it. The prompt of a template is not always a prefix of the whole conversation, so
nothing is sliced at its length. What cannot be found is refused, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from preference.templates.conversation import Conversation, ConversationError, checked_history
from preference.templates.families import FAMILIES, get_conv_template
from preference.templates.limits import ENDLESS, limited_work

# Words that no template writes and none changes.
_QUESTION, _REPLY, _PAST_QUESTION, _PAST_REPLY, _SYSTEM = (f"Qz{i}probe" for i in range(5))

# What a chat template raises that refuses a conversation, or was written for others (with tools, with images).
_REFUSALS = (TemplateError, TypeError)

# What named templates and the tokenizer's own are compared on: system, history, question, reply.
_PROBES = [
    (None, [], "How are you?", "Well."),
    ("Be brief.", [], "How are you?", "Well."),
    (None, [("Hi.", "Hello.")], "How are you?", "<think>\nEasy.\n</think>\n\nWell."),
    ("Be brief.", [("Hi.", "<think>\nEasy.\n</think>\n\nHello."), ("So?", "Yes.")], "How are you?", "Well."),
]


@dataclass(frozen=True)
class Affixes:
    """What a chat template writes around a reply, found by `_probe`."""

    head: str  # the rendering of the probe up to where prompt and whole conversation part
    opened: str  # what only the prompt has from there on: a think block, opened or closed
    before: str  # what only the whole conversation has between there and the reply
    after: str  # all that follows the reply at the end
    learned_end: str  # the part of it that is learned
    thinking: str  # whether the prompt leaves a think block "open", has one "closed", or has "none"


class AutoConversation:
    """The tokenizer's own chat template with the interface of Conversation."""

    name = "auto"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, fold_system: bool = False) -> None:
        if not tokenizer.chat_template:
            raise ConversationError("the tokenizer has no chat template: name one with template_name")
        self.tokenizer = tokenizer
        self.affixes = _probe(tokenizer)
        self.fold_system = fold_system
        self.keeps_system = _system_kept(tokenizer)
        if fold_system and self.keeps_system:
            raise ConversationError("the tokenizer's chat template writes system texts itself: leave fold_system out")

    @property
    def stop_str(self) -> str:
        """The end-of-turn text: generation stops here."""
        return self.affixes.learned_end.strip()

    def get_prompt(
        self, question: str, history: Iterable[Sequence[str]] | None = None, system: str | None = None
    ) -> str:
        """As Conversation.get_prompt; `system=None` is no system message, so the template's default if it has one."""
        pairs = checked_history(history)
        if self.fold_system and system is not None:
            turns = [*pairs, (question, "")]
            turns[0] = (f"{system}\n\n{turns[0][0]}", turns[0][1])
            pairs, question, system = turns[:-1], turns[-1][0], None
        way_out = "; fold_system=true puts the system text before the first question" if system is not None else ""
        try:
            prompt = _render(self.tokenizer, _messages(question, pairs, system), prompt=True)
        except _REFUSALS as error:
            reason = f"the tokenizer's chat template refuses this conversation: {error}{way_out}"
            raise ConversationError(reason) from error
        if system and not self.keeps_system:
            raise ConversationError(f"the tokenizer's chat template leaves the system text out{way_out}")
        return prompt

    def get_response(self, reply: str) -> str:
        """As Conversation.get_response. Raises ConversationError if the template hides where the reply is."""
        affixes = self.affixes
        if affixes.thinking == "closed":  # then reasoning has no place behind the prompt
            reply = reply.split("</think>")[-1].lstrip("\n") if "</think>" in reply else reply
        rendered = _render(self.tokenizer, _messages(_QUESTION, [], None, reply))
        if not rendered.startswith(affixes.head):  # the template writes the date, and the day is another by now
            affixes = _probe(self.tokenizer)
        if not (rendered.startswith(affixes.head) and rendered.endswith(affixes.after)):
            raise ConversationError(f"the tokenizer's chat template changes the turn around this reply: {reply[:80]!r}")
        body = rendered[len(affixes.head) : len(rendered) - len(affixes.after)]
        return _continue_prompt(affixes, body, reply) + affixes.learned_end

    def jinja(self) -> str:
        """The tokenizer's own chat template."""
        return self.tokenizer.get_chat_template()


def _continue_prompt(affixes: Affixes, body: str, reply: str) -> str:
    """`body`, the rendering behind affixes.head, as the continuation of a prompt that ends in affixes.opened."""
    if body.startswith(affixes.opened):
        return body[len(affixes.opened) :]
    if affixes.thinking != "open":
        return body  # the prompt closed an empty think block that the history does not show
    if "</think>" in reply:  # the template wrote the answer alone; the prompt asks for the reasoning first
        thought = reply.split("</think>")[0].rstrip("\n").split("<think>")[-1].strip("\n")
        return thought + "\n</think>\n\n" + body.removeprefix(affixes.before).lstrip("\n")
    return body if "</think>" in affixes.before else "\n</think>\n\n" + body.lstrip("\n")


def _messages(
    question: str, history: Iterable[Sequence[str]], system: str | None, reply: str | None = None
) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for user, assistant in history:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    messages.append({"role": "user", "content": question})
    return messages if reply is None else [*messages, {"role": "assistant", "content": reply}]


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] = (),
    prompt: bool = False,
) -> str:
    """Any messages by the tokenizer's own chat template. Raises ConversationError where it refuses them."""
    try:
        return _render(tokenizer, [dict(message) for message in messages], prompt, tools)
    except _REFUSALS as error:
        raise ConversationError(f"the tokenizer's chat template refuses this conversation: {error}") from error


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], prompt: bool = False, tools: Sequence[Any] = ()
) -> str:
    try:
        with limited_work():
            return tokenizer.apply_chat_template(
                messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
            )
    except ENDLESS as error:
        raise ConversationError(
            f"the tokenizer's chat template cannot be run ({type(error).__name__}: {error or 'too much memory'}): mend "
            "chat_template.jinja, or name a template of the model's family with template_name instead of auto"
        ) from error


def _system_kept(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return _SYSTEM in _render(tokenizer, _messages(_QUESTION, [], _SYSTEM), prompt=True)
    except _REFUSALS:
        return False


def _probe(tokenizer: PreTrainedTokenizerBase) -> Affixes:
    """Finds the affixes of a reply by rendering. Raises ConversationError, saying why, where they are not found."""

    def refuse(reason: str, error: Exception | None = None) -> None:
        advice = "name a template of the model's family with template_name instead of auto"
        raise ConversationError(f"the tokenizer's chat template cannot be used: {reason}; {advice}") from error

    past = [(_PAST_QUESTION, _PAST_REPLY)]
    try:
        prompt = _render(tokenizer, _messages(_QUESTION, [], None), prompt=True)
        full = _render(tokenizer, _messages(_QUESTION, [], None, _REPLY))
        later_prompt = _render(tokenizer, _messages(_QUESTION, past, None), prompt=True)
        later_full = _render(tokenizer, _messages(_QUESTION, past, None, _REPLY))
    except _REFUSALS as error:
        refuse(f"it refuses a plain question and reply ({error})", error)
    for text, words in ((prompt, [_QUESTION]), (full, [_REPLY]), (later_full, [_REPLY, _PAST_REPLY])):
        for word in words:
            if text.count(word) != 1:
                refuse(f"it writes a {'question' if word == _QUESTION else 'reply'} {text.count(word)} times, not once")
    until_reply, after = full.split(_REPLY)
    # The texts part at a whole mark: <think> and </think> share their first character.
    head = re.sub(r"<[^<>\s]*$", "", commonprefix([prompt, until_reply]))
    opened, before = prompt[len(head) :], until_reply[len(head) :]
    if not opened or before.startswith(opened):
        head, opened, before = prompt, "", until_reply[len(prompt) :]
    opening = prompt[prompt.find(_QUESTION) :]
    closed = "closed" if "</think>" in opening else "none"
    thinking = "open" if opening.rfind("<think>") > opening.rfind("</think>") else closed
    if opened and thinking != "open" and (before or len(re.findall(r"<[^<>]+>", opened)) % 2):
        refuse(f"the prompt ends in {opened!r} where the reply stands behind {before!r}")
    if not later_prompt.endswith(opened) or not later_full.endswith(before + _REPLY + after):
        refuse("a reply after a history is written in another way than the first")
    learned_end = _learned_end(tokenizer, prompt, after, later_full.split(_PAST_REPLY)[1])
    if not learned_end:
        refuse(f"nothing that ends a reply is found ({after!r} follows it, EOS is {tokenizer.eos_token})")
    return Affixes(head, opened, before, after, learned_end, thinking)


def _learned_end(tokenizer: PreTrainedTokenizerBase, prompt: str, after: str, after_past: str) -> str:
    """What follows a reply up to its stop token; "" if there is none.

    `after` stands behind the last reply, `after_past` behind one of the history. The stop token is the last control
    token that both have: Phi-3 writes <|end|> behind each and EOS behind the last, as padding. Where they share none
    (OLMo 3), the last reply has one of its own. Where nothing ends a reply, the model stops by opening the next turn
    (GLM-4) or at EOS. Some templates open a new reply behind every conversation: there it is the first token.
    """
    words = {token for token in [*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens] if token.strip()}
    control = re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or r"(?!)")
    found = [match.end() for match in control.finditer(after)]
    shared = [end for end in found if end <= len(commonprefix([after, after_past]))]
    again = commonprefix([after[::-1], prompt[::-1]])[::-1]
    if control.search(again):
        if not shared and found[0] > len(after) - len(again):
            return ""  # the only token behind the reply opens the next one
        shared = shared[:1]
    if found:
        return after[: shared[-1] if shared else found[0]]
    opens_next = control.match(after_past.lstrip())
    if not after.strip() and opens_next and opens_next[0] != tokenizer.bos_token:
        return opens_next[0]
    return "" if after.strip() else tokenizer.eos_token or ""


def auto_template(tokenizer: PreTrainedTokenizerBase, *, fold_system: bool = False) -> AutoConversation:
    """The tokenizer's own chat template as a Conversation. Raises ConversationError where that cannot be."""
    return AutoConversation(tokenizer, fold_system=fold_system)


def resolve_template(
    name: str, tokenizer: PreTrainedTokenizerBase, *, fold_system: bool = False
) -> tuple[Conversation | AutoConversation, list[str]]:
    """The template that a run with `template_name=name` uses, and warnings to print.

    "auto" is the tokenizer's own, or `qwen` where it has none. A named template whose control tokens are not single
    tokens of the tokenizer is refused (ConversationError); one that differs from the tokenizer's own warns.
    """
    warnings = []
    own = bool(tokenizer.chat_template)
    if name == "auto" and own:
        return auto_template(tokenizer, fold_system=fold_system), []
    if name == "auto":
        name = "qwen"
        warnings.append("the tokenizer has no chat template of its own: template qwen (ChatML) is used")
    conv = get_conv_template(name, fold_system=fold_system)
    missing = missing_tokens(conv, tokenizer)
    if missing:
        fitting = [family.name for family in FAMILIES.values() if not missing_tokens(family, tokenizer)]
        fits = f"It has no chat template of its own; templates that fit it: {', '.join(fitting) or 'none'}"
        advice = "Use template_name=auto" if own else fits
        verb = "is not a single token" if len(missing) == 1 else "are not single tokens"
        raise ConversationError(
            f"template {name} does not fit this tokenizer: {' '.join(missing)} {verb} of it, "
            f"so the model never saw such turns. {advice}"
        )
    if conv.reasoning == "hidden":
        warnings.append(
            f"template {name} opens a think block in the prompt and shows no reasoning in replies: the model learns to "
            "answer inside the block. template_name=deepseek_r1_think keeps the reasoning and closes the block"
        )
    difference = first_difference(conv, tokenizer) if own else None
    if difference:
        warnings.append(
            f"template {name} is not the tokenizer's own chat template, which template_name=auto uses. {difference} "
            "The model is trained and saved with the former; template_name=auto uses the tokenizer's own"
        )
    return conv, warnings


def missing_tokens(conv: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The control tokens of `conv` that are not single tokens of the tokenizer."""

    def single(token: str) -> bool:
        ids = tokenizer.encode(token, add_special_tokens=False)
        return len(ids) == 1 and ids[0] != tokenizer.unk_token_id

    return [token for token in dict.fromkeys(conv.tokens) if not single(token)]


def first_difference(conv: Conversation, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Where `conv` and the tokenizer's own chat template first render something else, in words; None if nowhere."""
    try:
        own = auto_template(tokenizer)
    except ConversationError as error:
        return f"They cannot be compared: {error}."
    for system, history, question, reply in _PROBES:
        for what, arguments in (("get_prompt", (question, history, system)), ("get_response", (reply,))):
            ours, theirs = (_attempt(getattr(template, what), arguments) for template in (conv, own))
            if ours != theirs:
                start = len(commonprefix([ours, theirs]))
                near = slice(max(0, start - 20), start + 60)
                part = "prompts" if what == "get_prompt" else "responses"
                where = f"with {'a' if system else 'no'} system text and {len(history)} past turns"
                return f"First difference, in {part} {where}: {ours[near]!r} here, {theirs[near]!r} there."
    return None


def _attempt(render, arguments: tuple) -> str:
    try:
        return render(*arguments)
    except ConversationError:
        return "(refused)"


def chat_template_to_save(conv: Conversation | AutoConversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """The jinja chat template to save with a model trained with `conv`.

    The tokenizer's own where the two agree, for it may know tools and images too; else the one `conv` writes.
    """
    if tokenizer.chat_template and (isinstance(conv, AutoConversation) or first_difference(conv, tokenizer) is None):
        return tokenizer.get_chat_template()
    return conv.jinja()


def stop_token_ids(conv: Conversation | AutoConversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids at which generation must stop: the end of the stop text, then the tokenizer's EOS where it is another."""
    stop = tokenizer.encode(conv.stop_str, add_special_tokens=False)[-1]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([stop, *eos]))


def stop_ids(config: GenerationConfig, template: Any, tokenizer: Any) -> list[int]:
    """Every id that ends an answer: those of the generation config, then the template's stop token and EOS."""
    ids = config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return list(dict.fromkeys([*ids, *stop_token_ids(template, tokenizer)]))
