"""An Ollama Modelfile whose TEMPLATE renders conversations as the model was trained on them.

Ollama's templates are Go's text/template over .System and .Messages. They can place text, not change it: trimming white
space and taking reasoning out of past replies cannot be written, and `missing_parts` says where that matters. BOS is
left out where the GGUF file says that the runtime adds it. https://docs.ollama.com/modelfile
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from preference.templates.conversation import Conversation, ConversationError
from preference.templates.families import FAMILIES, fold_system_text
from preference.templates.resolve import first_difference, missing_tokens


def family_of(template: Any, tokenizer: Any) -> Conversation | None:
    """`template` as a Conversation: itself, or the family that renders as the tokenizer's own chat template does."""
    if isinstance(template, Conversation):
        return template
    for family in FAMILIES.values():
        if missing_tokens(family, tokenizer):
            continue
        folded = [fold_system_text(family)] if family.system_place == "refused" else []
        for conv in [family, *folded]:
            if first_difference(conv, tokenizer) is None:
                return conv
    return None


def writes_bos(template: Any, tokenizer: Any) -> bool:
    """Whether prompts begin with a BOS, so that runtimes should add one.

    SmolLM2 calls <|im_start|>, which opens every turn, its BOS: that one is the template's and not to be added.
    """
    bos, question = tokenizer.bos_token, "Qz0"
    prompt = template.get_prompt(question)
    return bool(bos) and prompt.startswith(bos) and bos not in prompt[prompt.rfind(question) :]


def prompts_of(template: Any) -> list[str]:
    """One turn, one turn with a system text, two turns: as many of them as the template writes."""
    found = []
    for options in ({}, {"system": "Be brief."}, {"history": [["Hi.", "Hello."]]}):
        with contextlib.suppress(ConversationError):
            found.append(template.get_prompt("How are you?", **options))
    return found


def missing_parts(conv: Conversation) -> list[str]:
    """What `go_template` leaves out, in words for the reader of the Modelfile."""
    parts = []
    if conv.strip:
        parts.append("outer white space of messages is not trimmed; clients should send none")
    if conv.reasoning != "text":
        parts.append("reasoning in past replies is not taken out; clients should send them without")
    if conv.system_place == "refused":
        parts.append("system messages are left out, as these models were trained without any")
    return parts


def go_template(conv: Conversation, bos: str = "") -> str | None:
    """The TEMPLATE of a Modelfile, None where Go's templates cannot write this conversation.

    `bos` is the text that the runtime adds by itself at the very start, so that the template must not write it.
    """
    literals = [conv.begin, *conv.system, *conv.user, conv.assistant, conv.seam, conv.opens, conv.turn_end]
    if conv.single_turn or conv.reasoning == "channel" or any("{{" in text or '"""' in text for text in literals):
        return None
    begin, opening, later = conv.begin, conv.user[0], ""
    if bos and begin.startswith(bos):
        begin = begin.removeprefix(bos)
    elif bos and not begin and opening.startswith(bos):  # Llama 2 opens every pair with BOS; the first comes by itself
        opening, later = opening.removeprefix(bos), bos
    counted = bool(later) or conv.system_place == "first"  # then it matters whether a question came before
    return (
        ("{{ $asked := false }}" if counted else "")
        + begin
        + (_system(conv, ".System") if conv.system_place == "turn" else "")
        + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        + '{{ if eq .Role "user" }}'
        + _when("$asked", later)
        + opening
        + _folded_system(conv)
        + "{{ .Content }}"
        + conv.user[1]
        + _when("$last", conv.assistant + conv.opens)
        + ("{{ $asked = true }}" if counted else "")
        + '{{ else if eq .Role "assistant" }}'
        + conv.assistant
        + _when("$last", conv.opens)
        + conv.seam
        + "{{ .Content }}"
        + _when("not $last", conv.turn_end)
        + "{{ end }}{{ end }}"
    )


def _when(condition: str, text: str) -> str:
    return "{{ if " + condition + " }}" + text + "{{ end }}" if text else ""


def _system(conv: Conversation, name: str) -> str:
    """The system text, or the family's default where there is none. `name` is how it is reached from here."""
    before, after = conv.system
    default = "" if conv.default_system is None else "{{ else }}" + before + conv.default_system + after
    return "{{ if " + name + " }}" + before + "{{ " + name + " }}" + after + default + "{{ end }}"


def _folded_system(conv: Conversation) -> str:
    """The system text inside the first or the last question."""
    here = {"first": "not $asked", "last": "$last"}.get(conv.system_place)
    return _when(here, _system(conv, "$.System")) if here else ""


def modelfile(gguf_name: str, conv: Conversation | None, stops: Sequence[str], bos: str = "") -> str:
    """The whole Modelfile: `ollama create NAME -f Modelfile` in its folder.

    `conv` is None where no family renders as the model's template does. `stops` are the texts that end an answer.
    """
    template = go_template(conv, bos) if conv is not None else None
    lines = [f"FROM ./{gguf_name}"]
    if conv is None or template is None:
        lines += [
            "# The template that this model was trained with cannot be written in Ollama's template language, so there",
            "# is no TEMPLATE here: the GGUF file carries it, and Ollama uses it only if it knows it. Look at",
            "# `ollama show --template NAME` before trusting the answers; llama-server --jinja renders it as trained.",
        ]
    else:
        lines += [f"# Prompts as in training (template {conv.name})."]
        lines += [f"# Not expressible here: {part}." for part in missing_parts(conv)]
        lines += [f'TEMPLATE """{template}"""']
    quoted = [stop.replace("\\", "\\\\").replace('"', '\\"') for stop in stops]
    lines += [f'PARAMETER stop "{stop}"' for stop in quoted]
    return "\n".join(lines) + "\n"
