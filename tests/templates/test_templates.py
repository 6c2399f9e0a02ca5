"""auto against tokenizer.apply_chat_template, named templates against a tokenizer, stop tokens, the preview."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conversation import FAMILIES, ConversationError, get_conv_template
from preference.serve import preview
from preference.templates.resolve import (
    auto_template,
    chat_template_to_save,
    first_difference,
    missing_tokens,
    resolve_template,
    stop_token_ids,
)
from tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "tokenizers"
STARTER = ROOT / "models" / "SmolLM2-135M-Instruct"

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURN = "{% for m in messages %}{% if m['role'] == 'assistant' %}"
ELSE = "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
OPEN = "{% if add_generation_prompt %}"
CLOSE = "{% endif %}"
ALL = "{{ m['content'] }}"
ANSWER = "{{ m['content'].split('</think>')[-1] }}"

# name -> (template, what is learned of "Well.", the stop text): the ways in which official templates differ
WRITTEN = {
    "separator": (PLAIN, "Well.<|im_end|>", "<|im_end|>"),
    "trimmed": (PLAIN.replace("m['content']", "m['content'] | trim"), "Well.<|im_end|>", "<|im_end|>"),
    "seam": (f"{TURN}A: {{{{ m['content'] }}}} <|im_end|>{ELSE}{OPEN}A:{CLOSE}", " Well. <|im_end|>", "<|im_end|>"),
    "eos behind the last turn": (
        PLAIN + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        "Well.<|im_end|>",
        "<|im_end|>",
    ),
    "empty block learned": (
        f"{TURN}A\n{{% if loop.last %}}<think>\n\n</think>\n\n{{% endif %}}{ALL}<|im_end|>{ELSE}{OPEN}A\n{CLOSE}",
        "<think>\n\n</think>\n\nWell.<|im_end|>",
        "<|im_end|>",
    ),
    "block opened by the prompt alone": (
        f"{TURN}A\n{ANSWER}<|im_end|>{ELSE}{OPEN}A\n<think>\n{CLOSE}",
        "\n</think>\n\nWell.<|im_end|>",
        "<|im_end|>",
    ),
    "block opened by the prompt, closed in the history": (
        f"{TURN}A<think></think>{ANSWER}<|im_end|>{ELSE}{OPEN}A<think>{CLOSE}",
        "</think>Well.<|im_end|>",
        "<|im_end|>",
    ),
    "marks that begin alike": (
        f"{TURN}A</think>{ANSWER}<|im_end|>{ELSE}{OPEN}A<think>{CLOSE}",
        "</think>Well.<|im_end|>",
        "<|im_end|>",
    ),
    "empty block in the prompt alone": (
        f"{TURN}A\n{ANSWER}<|im_end|>{ELSE}{OPEN}A\n<think>\n\n</think>\n\n{CLOSE}",
        "Well.<|im_end|>",
        "<|im_end|>",
    ),
    "no end, the next turn's token": (
        PLAIN.replace("<|im_end|>\n", ""),
        "Well.<|im_start|>",
        "<|im_start|>",
    ),
    "no end, EOS": (
        PLAIN.replace("<|im_end|>", "").replace("<|im_start|>", ""),
        "Well.<|im_end|>",
        "<|im_end|>",
    ),
    "another end in the history": (
        f"{TURN}A {ALL}{{{{ '<|endoftext|>' if loop.last else '<|im_end|>\n' }}}}{ELSE}{OPEN}A {CLOSE}",
        "Well.<|endoftext|>",
        "<|endoftext|>",
    ),
    "a reply is always opened": (
        PLAIN.replace(OPEN, "").replace(CLOSE, "{# so that this line end stays #}"),
        "Well.<|im_end|>",
        "<|im_end|>",
    ),
    "system text in the last question": (
        "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set messages = messages[1:] %}"
        "{% endif %}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}<|im_end|>{% else %}"
        "[Q] {% if loop.last and s is defined %}{{ s }}\n\n{% endif %}{{ m['content'] }}[/Q]{% endif %}{% endfor %}",
        " Well.<|im_end|>",
        "<|im_end|>",
    ),
}

# name -> (template, why it is refused)
UNUSABLE = {
    "no replies": (f"{TURN}{ELSE}", "reply 0 times"),
    "no questions": ("{{ messages[-1]['content'] }}<|im_end|>", "0 times"),
    "raises": ("{{ raise_exception('tools only') }}", "tools only"),
    "wants tools": ("{% for t in nothing %}{% endfor %}{{ nothing.x }}", "refuses a plain question"),
    "unknown thought mark": (f"{TURN}A\n{ANSWER}<|im_end|>{ELSE}{OPEN}A\n<musing>\n{CLOSE}", "<musing>"),
    "another header": (f"{TURN}A: {ANSWER}<|im_end|>{ELSE}{OPEN}B: {CLOSE}", "the reply stands behind 'A: '"),
    "text at the end": (f"{TURN}A: {ANSWER} over{ELSE}{OPEN}A: {CLOSE}", "nothing that ends a reply"),
    "no end, a reply is always opened": (
        f"{TURN}<|im_start|>A {ALL}{{{{ '' if loop.last else '<|im_end|>' }}}}{ELSE}<|im_start|>A ",
        "nothing that ends a reply",
    ),
}


def tokenizer_with(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def load(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.exists():
        pytest.skip(f"needs {folder.relative_to(ROOT.parent)}")
    return AutoTokenizer.from_pretrained(folder)


def apply(tokenizer: PreTrainedTokenizerBase, system: str | None, history: list, question: str) -> str:
    messages = [{"role": "system", "content": system}] if system is not None else []
    for user, assistant in history:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    messages.append({"role": "user", "content": question})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


PIECES = [" ", "\n", "{", "}", "{{ x }}", "{% if x %}", "\\n", "'", "😀", "中文", "<think>", "</think>", "<|im_end|>"]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=4).map("".join)
conversations = st.tuples(st.none() | texts, st.lists(st.tuples(texts, texts), max_size=3), texts, texts)
many = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize("name", WRITTEN)
def test_auto_finds_what_stands_around_a_reply(name: str) -> None:
    template, learned, stop = WRITTEN[name]
    auto = auto_template(tokenizer_with(template))
    assert auto.get_response("Well.") == learned
    assert auto.stop_str == stop


@pytest.mark.parametrize("name", WRITTEN)
@many
@given(case=conversations)
def test_auto_prompts_are_the_tokenizers(name: str, case: tuple) -> None:
    system, history, question, reply = case
    tokenizer = tokenizer_with(WRITTEN[name][0])
    auto = auto_template(tokenizer)
    assert auto.get_prompt(question, history, system) == apply(tokenizer, system, history, question)
    if "think>" not in reply:
        learned = WRITTEN[name][1]
        shown = reply.strip() if name == "trimmed" else reply.lstrip("\n") if learned.startswith("\n") else reply
        assert auto.get_response(reply) == learned.replace("Well.", shown)


def test_auto_keeps_reasoning_where_the_prompt_asks_for_it() -> None:
    thought = "<think>\nEasy.\n</think>\n\nWell."
    opened = auto_template(tokenizer_with(WRITTEN["block opened by the prompt alone"][0]))
    assert opened.get_response(thought) == "Easy.\n</think>\n\nWell.<|im_end|>"
    closed = auto_template(tokenizer_with(WRITTEN["empty block in the prompt alone"][0]))
    assert closed.get_response(thought) == "Well.<|im_end|>"
    plain = auto_template(tokenizer_with(PLAIN))
    assert plain.get_response(thought) == thought + "<|im_end|>"


@pytest.mark.parametrize("name", UNUSABLE)
def test_auto_refuses_with_the_reason(name: str) -> None:
    template, reason = UNUSABLE[name]
    with pytest.raises(ConversationError, match="cannot be used.*template_name instead of auto") as caught:
        auto_template(tokenizer_with(template))
    assert reason in str(caught.value)


@pytest.mark.parametrize("lost", ["{% if false %}", "{% if m['role'] == 'system' %}{{ raise_exception('no') }}"])
def test_auto_and_a_system_text_that_the_template_does_not_write(lost: str) -> None:
    keep = lost + "{% elif m['role'] != 'system' %}<|im_start|>"
    template = PLAIN.replace("<|im_start|>", keep, 1).replace("<|im_end|>\n", "<|im_end|>\n{% endif %}")
    tokenizer = tokenizer_with(template)
    with pytest.raises(ConversationError, match="fold_system=true"):
        auto_template(tokenizer).get_prompt("Hi.", [], "Be brief.")
    folded = auto_template(tokenizer, fold_system=True)
    first = "<|im_start|>user\nBe brief.\n\nHi.<|im_end|>\n"
    assert folded.get_prompt("Hi.", [], "Be brief.") == first + "<|im_start|>assistant\n"
    assert folded.get_prompt("So?", [("Hi.", "Oh.")], "Be brief.").startswith(first)
    with pytest.raises(ConversationError, match="leave fold_system out"):
        auto_template(tokenizer_with(PLAIN), fold_system=True)


@pytest.mark.parametrize("folder", [STARTER, SHARED / "qwen2", SHARED / "phi3"], ids=lambda folder: folder.name)
def test_auto_on_real_tokenizers(folder: Path) -> None:
    tokenizer = load(folder)
    auto = auto_template(tokenizer)

    @many
    @given(case=conversations)
    def compare(case: tuple) -> None:
        system, history, question, reply = case
        system = system if auto.keeps_system else None
        prompt = auto.get_prompt(question, history, system)
        assert prompt == apply(tokenizer, system, history, question)
        whole = apply(tokenizer, system, [*history, (question, reply)], "next")
        assert whole.startswith(prompt + auto.get_response(reply))

    compare()
    assert chat_template_to_save(auto, tokenizer) == tokenizer.chat_template


def test_the_starter_model_is_smollm2() -> None:
    tokenizer = load(STARTER)
    assert first_difference(get_conv_template("smollm2"), tokenizer) is None
    assert stop_token_ids(get_conv_template("smollm2"), tokenizer) == [tokenizer.eos_token_id]


# auto closes a think block that the prompt opens; a family that leaves it open is another template than auto's
READ_BACK = [name for name, conv in FAMILIES.items() if conv.system_place != "refused" and conv.reasoning != "hidden"]


@pytest.mark.parametrize("name", READ_BACK)
def test_auto_reads_a_saved_template_back(name: str) -> None:
    """A model saved with conv.jinja() and trained again with auto sees the same prompts and learns the same text."""
    conv = FAMILIES[name]
    tokenizer = tokenizer_with(conv.jinja())
    tokenizer.add_special_tokens({"additional_special_tokens": list(conv.tokens)})
    assert first_difference(conv, tokenizer) is None
    assert auto_template(tokenizer).stop_str == conv.stop_str
    assert resolve_template(name, tokenizer) == (conv, [])


def test_auto_without_a_template_is_qwen() -> None:
    conv, warnings = resolve_template("auto", tokenizer_with(None))
    assert conv is get_conv_template("qwen")
    assert "no chat template" in warnings[0]


def test_a_named_template_that_differs_warns_with_the_first_difference() -> None:
    tokenizer = tokenizer_with(PLAIN)
    assert resolve_template("chatml", tokenizer) == (get_conv_template("chatml"), [])
    conv, (warning,) = resolve_template("qwen", tokenizer)
    assert "You are a helpful assistant." in warning
    assert chat_template_to_save(conv, tokenizer) == conv.jinja()
    assert chat_template_to_save(get_conv_template("chatml"), tokenizer) == PLAIN


def test_a_template_of_another_family_is_refused() -> None:
    with pytest.raises(ConversationError, match="<start_of_turn>.*Use template_name=auto"):
        resolve_template("gemma3", tokenizer_with(PLAIN))
    with pytest.raises(ConversationError, match="templates that fit it:.*chatml"):
        resolve_template("gemma3", tokenizer_with(None))


def test_control_tokens_of_real_tokenizers() -> None:
    assert missing_tokens(get_conv_template("qwen"), load(SHARED / "qwen2")) == []
    assert missing_tokens(get_conv_template("qwen"), load(SHARED / "llama2"))
    assert missing_tokens(get_conv_template("llama2"), load(SHARED / "llama2")) == []


def test_generation_stops_at_the_stop_text_and_at_eos() -> None:
    tokenizer = tokenizer_with(None)
    assert stop_token_ids(get_conv_template("qwen"), tokenizer) == [tokenizer.eos_token_id]
    tokenizer.eos_token = "<|endoftext|>"
    assert stop_token_ids(get_conv_template("qwen"), tokenizer) == [2, 0]


def test_preview_shows_a_row(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer_with(PLAIN).save_pretrained(tmp_path / "model")
    rows = [{"question": f"q{i}?", "response_chosen": "yes", "response_rejected": "no"} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    common = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl")]
    assert preview.main(["--template", "chatml", *common, "--row", "2", "--ids"]) == 0
    out = capsys.readouterr().out
    assert "⟦<|im_start|>⟧user\nq1?⟦<|im_end|>⟧" in out
    assert "rows.jsonl:2" in out and "ids: 1 " in out and "what the tokenizer's own chat template renders" in out
    assert preview.main([*common, "--row", "3"]) == 1
    assert "usable rows 1 to 2" in capsys.readouterr().err


def test_preview_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    assert preview.main(["--model", str(tmp_path)]) == 1
    assert f"error: {tmp_path} has no tokenizer" in capsys.readouterr().err
    assert preview.main(["--model", str(tmp_path / "typo")]) == 1
    assert str(tmp_path / "typo") in capsys.readouterr().err


def test_a_block_that_is_left_open_is_warned_of() -> None:
    conv = FAMILIES["deepseek_r1_distill"]
    tokenizer = tokenizer_with(conv.jinja())
    tokenizer.add_special_tokens({"additional_special_tokens": list(conv.tokens)})
    _, warnings = resolve_template("deepseek_r1_distill", tokenizer)
    assert any("deepseek_r1_think" in warning for warning in warnings)
