"""Modelfiles: the template renders what was trained, in the language of Go's text/template."""

from __future__ import annotations

import types

import pytest
from gotemplate import render

from conversation import FAMILIES, ConversationError, fold_system_text, get_conv_template
from preference.serve.loading import load_template
from preference.serve.ollama import family_of, go_template, modelfile, prompts_of, writes_bos
from tiny import tiny_tokenizer

CONVERSATIONS = [
    (system, history)
    for system in (None, "Be {{ brief }}.")
    for history in ([], [("Hi.", "Hello.")], [("Hi.", "Hello."), ("So?", "Yes.")])
]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_modelfiles_render_what_was_trained(name: str) -> None:
    family = FAMILIES[name]
    folded = [fold_system_text(family)] if family.system_place == "refused" else []
    for conv in [family, *folded]:
        template = go_template(conv)
        if template is None:
            assert conv.single_turn or conv.reasoning == "channel"
            continue
        for system, history in CONVERSATIONS:
            try:
                expected = conv.get_prompt("How?", history=history, system=system)
            except ConversationError:
                continue  # this family knows no system turn
            assert render(template, system or "", messages(system, history)) == expected
            for bos in {"<s>", "<bos>", "<|begin_of_text|>"} & set(conv.tokens):
                if expected.startswith(bos):
                    without = go_template(conv, bos)
                    assert bos + render(without, system or "", messages(system, history)) == expected


def test_a_reply_that_is_begun_stays_open() -> None:
    conv = FAMILIES["qwen3_nothink"]
    begun = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Like"}]
    assert render(go_template(conv), "", begun) == conv.get_prompt("How?") + "Like"


def messages(system: str | None, history: list[tuple[str, str]]) -> list[dict[str, str]]:
    said = [{"role": "system", "content": system}] if system else []
    for user, assistant in history:
        said += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return [*said, {"role": "user", "content": "How?"}]


def test_a_modelfile_says_what_it_cannot_do() -> None:
    text = modelfile("m.gguf", FAMILIES["llama3"], ["<|eot_id|>", 'a"b'], "<|begin_of_text|>")
    assert text.startswith("FROM ./m.gguf\n") and 'PARAMETER stop "<|eot_id|>"\nPARAMETER stop "a\\"b"\n' in text
    assert "white space" in text and "<|begin_of_text|>" not in text
    unknown = modelfile("m.gguf", None, [])
    assert "TEMPLATE" in unknown and 'TEMPLATE """' not in unknown and "llama-server --jinja" in unknown


def test_the_family_of_a_tokenizers_own_template() -> None:
    tokenizer = tiny_tokenizer()
    for name in ("qwen2", "smollm2", "qwen3"):
        tokenizer.chat_template = FAMILIES[name].jinja()
        template, _ = load_template(find_source_of({}), tokenizer)
        assert template.name == "auto" and family_of(template, tokenizer).name == name
    tokenizer.chat_template = FAMILIES["qwen2"].jinja().replace("helpful", "silent")
    assert family_of(load_template(find_source_of({}), tokenizer)[0], tokenizer) is None
    assert family_of(FAMILIES["chatml"], tokenizer) is FAMILIES["chatml"]


def find_source_of(run: dict) -> object:
    return types.SimpleNamespace(run=run, arguments={})


def test_a_bos_that_opens_every_turn_is_none() -> None:
    def tokenizer(bos: str | None) -> object:
        return types.SimpleNamespace(bos_token=bos)

    assert not writes_bos(FAMILIES["smollm2"], tokenizer("<|im_start|>"))
    assert not writes_bos(FAMILIES["qwen2"], tokenizer(None))
    assert not writes_bos(FAMILIES["vicuna"], tokenizer("<s>"))
    assert writes_bos(FAMILIES["llama3"], tokenizer("<|begin_of_text|>"))
    assert writes_bos(FAMILIES["llama2"], tokenizer("<s>"))


@pytest.mark.parametrize("name, kinds", [("qwen2_5", 3), ("gemma", 2), ("alpaca", 1)])
def test_prompts_are_of_every_kind_that_a_template_writes(name: str, kinds: int) -> None:
    prompts = prompts_of(get_conv_template(name))
    assert len(prompts) == kinds and all("How are you?" in prompt for prompt in prompts)
    assert sum("Be brief." in prompt for prompt in prompts) == (kinds == 3)
    assert sum("Hello." in prompt for prompt in prompts) == (kinds > 1)
