"""Named templates: prompts and responses against renderings written out here, quirk by quirk, and against jinja."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from conversation import ALIASES, FAMILIES, TEMPLATES, Conversation, ConversationError, get_conv_template

ROOT = Path(__file__).parents[2]
RENDERINGS = ROOT.parent / "shared" / "templates" / "official_renderings.json"
GOLDEN = ROOT / "tests" / "templates" / "golden" / "templates.json"
HISTORY = [["Is tea wet?", "Yes."]]
QUESTION, REPLY = "And sand?", "No."

# What the official template makes of HISTORY, QUESTION (no system text), and what is learned of REPLY.
WITH_HISTORY = {
    "chatml": (
        "<|im_start|>user\nIs tea wet?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nAnd sand?<|im_end|>\n<|im_start|>assistant\n",
        "No.<|im_end|>",
    ),
    "qwen2": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nIs tea wet?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nAnd sand?<|im_end|>\n<|im_start|>assistant\n",
        "No.<|im_end|>",
    ),
    "llama2": ("<s>[INST] Is tea wet? [/INST] Yes. </s><s>[INST] And sand? [/INST]", " No. </s>"),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nIs tea wet?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd sand?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "No.<|eot_id|>",
    ),
    "mistral_v1": ("<s> [INST] Is tea wet? [/INST] Yes.</s> [INST] And sand? [/INST]", " No.</s>"),
    "mistral_v3": ("<s>[INST] Is tea wet?[/INST] Yes.</s>[INST] And sand?[/INST]", " No.</s>"),
    "mistral_nemo": ("<s>[INST]Is tea wet?[/INST]Yes.</s>[INST]And sand?[/INST]", "No.</s>"),
    "gemma": (
        "<bos><start_of_turn>user\nIs tea wet?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
        "<start_of_turn>user\nAnd sand?<end_of_turn>\n<start_of_turn>model\n",
        "No.<end_of_turn>",
    ),
    "gemma4": (
        "<bos><|turn>user\nIs tea wet?<turn|>\n<|turn>model\nYes.<turn|>\n"
        "<|turn>user\nAnd sand?<turn|>\n<|turn>model\n",
        "No.<turn|>",
    ),
    "phi3": (
        "<|user|>\nIs tea wet?<|end|>\n<|assistant|>\nYes.<|end|>\n<|user|>\nAnd sand?<|end|>\n<|assistant|>\n",
        "No.<|end|>",
    ),
    "phi4_mini": (
        "<|user|>Is tea wet?<|end|><|assistant|>Yes.<|end|><|user|>And sand?<|end|><|assistant|>",
        "No.<|end|>",
    ),
    "deepseek_v2": (
        "<｜begin▁of▁sentence｜>User: Is tea wet?\n\nAssistant: Yes.<｜end▁of▁sentence｜>User: And sand?\n\nAssistant:",
        " No.<｜end▁of▁sentence｜>",
    ),
    "deepseek_v3": (
        "<｜begin▁of▁sentence｜><｜User｜>Is tea wet?<｜Assistant｜>Yes.<｜end▁of▁sentence｜>"
        "<｜User｜>And sand?<｜Assistant｜>",
        "No.<｜end▁of▁sentence｜>",
    ),
    "chatglm3": (
        "[gMASK]sop<|user|>\n Is tea wet?<|assistant|>\n Yes.<|user|>\n And sand?<|assistant|>",
        "\n No.</s>",
    ),
    "glm4": (
        "[gMASK]<sop><|user|>\nIs tea wet?<|assistant|>\nYes.<|user|>\nAnd sand?<|assistant|>",
        "\nNo.<|user|>",
    ),
    "zephyr": (
        "<|user|>\nIs tea wet?</s>\n<|assistant|>\nYes.</s>\n<|user|>\nAnd sand?</s>\n<|assistant|>\n",
        "No.</s>",
    ),
    "olmo2": (
        "<|endoftext|><|user|>\nIs tea wet?\n<|assistant|>\nYes.<|endoftext|>\n<|user|>\nAnd sand?\n<|assistant|>\n",
        "No.<|endoftext|>",
    ),
    "command_r": (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Is tea wet?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Yes.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>And sand?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "No.<|END_OF_TURN_TOKEN|>",
    ),
    "exaone3_5": (
        "[|system|][|endofturn|]\n[|user|]Is tea wet?\n[|assistant|]Yes.[|endofturn|]\n"
        "[|user|]And sand?\n[|assistant|]",
        "No.[|endofturn|]",
    ),
    "baichuan2": ("<reserved_106>Is tea wet?<reserved_107>Yes.<reserved_106>And sand?<reserved_107>", "No.</s>"),
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Is tea wet? ASSISTANT: Yes.</s>"
        "USER: And sand? ASSISTANT:",
        " No.</s>",
    ),
}

# family -> (system text, what stands before the rest of the prompt or holds it)
SYSTEM = [
    ("qwen2", "", "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nAnd sand?"),
    ("qwen3", None, "<|im_start|>user\nAnd sand?"),
    ("minicpm3", "", "<|im_start|>user\nAnd sand?"),  # an empty system text writes no turn
    ("glm4", "", "[gMASK]<sop><|user|>\nAnd sand?"),
    ("chatglm3", "", "[gMASK]sop<|system|>\n <|user|>\n And sand?"),
    ("yi", "Be dry.", "Be dry.<|im_start|>user\nAnd sand?"),
    ("baichuan2", "Be dry.", "Be dry.<reserved_106>And sand?"),
    ("deepseek_v2", "", "<｜begin▁of▁sentence｜>\n\nUser: And sand?"),
    ("vicuna", "", " USER: And sand?"),
    ("llama2", " Be dry. ", "<s>[INST] <<SYS>>\n Be dry. \n<</SYS>>\n\nAnd sand? [/INST]"),
    ("llama3", " Be dry. ", "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe dry.<|eot_id|>"),
    (
        "llama3_1",  # a date that never changes, with or without a system text
        None,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|>",
    ),
    ("gemma3", " Be dry.", "<bos><start_of_turn>user\n Be dry.\n\nAnd sand?<end_of_turn>\n"),
    ("mistral_v1", "", "<s> [INST] \n\nAnd sand? [/INST]"),
    ("smollm2", None, "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_"),
]

THOUGHT = "<think>\nGrains.\n</think>\n\nNo."
# family -> the prompt's end behind HISTORY with THOUGHT as its reply, what is learned of THOUGHT, and of REPLY
REASONING = {
    "chatml": (THOUGHT + "<|im_end|>\n", "assistant\n", THOUGHT + "<|im_end|>", "No.<|im_end|>"),
    "qwen3": (
        "assistant\nNo.<|im_end|>\n",
        "assistant\n",
        THOUGHT + "<|im_end|>",
        "<think>\n\n</think>\n\nNo.<|im_end|>",
    ),
    "qwen3_nothink": (
        "assistant\nNo.<|im_end|>\n",
        "assistant\n<think>\n\n</think>\n\n",
        "No.<|im_end|>",
        "No.<|im_end|>",
    ),
    "qwen3_5": (
        "assistant\nNo.<|im_end|>\n",
        "assistant\n<think>\n",
        "Grains.\n</think>\n\nNo.<|im_end|>",
        "\n</think>\n\nNo.<|im_end|>",
    ),
    "qwen3_5_nothink": (
        "assistant\nNo.<|im_end|>\n",
        "assistant\n<think>\n\n</think>\n\n",
        "No.<|im_end|>",
        "No.<|im_end|>",
    ),
    "deepseek_r1_distill": (  # keeps the line ends behind </think>, as the official template does
        "<｜Assistant｜>\n\nNo.<｜end▁of▁sentence｜>",
        "<｜Assistant｜><think>\n",
        "\n\nNo.<｜end▁of▁sentence｜>",
        "No.<｜end▁of▁sentence｜>",
    ),
    "deepseek_r1_think": (
        "<｜Assistant｜>\n\nNo.<｜end▁of▁sentence｜>",
        "<｜Assistant｜><think>\n",
        "Grains.\n</think>\n\nNo.<｜end▁of▁sentence｜>",
        "\n</think>\n\nNo.<｜end▁of▁sentence｜>",
    ),
}


@pytest.mark.parametrize("name", WITH_HISTORY)
def test_history_and_response_as_the_official_template_writes_them(name: str) -> None:
    prompt, response = WITH_HISTORY[name]
    conv = get_conv_template(name)
    assert conv.get_prompt(QUESTION, HISTORY) == prompt
    assert conv.get_response(REPLY) == response
    assert response.endswith(conv.stop_str)


@pytest.mark.parametrize("name, system, start", SYSTEM)
def test_system_text(name: str, system: str | None, start: str) -> None:
    assert get_conv_template(name).get_prompt(QUESTION, [], system).startswith(start)


@pytest.mark.parametrize("name", ["mistral_v3", "mistral_nemo"])
def test_mistral_puts_the_system_text_into_the_last_question(name: str) -> None:
    prompt = get_conv_template(name).get_prompt(QUESTION, HISTORY, "Be dry.")
    assert prompt.endswith("Be dry.\n\nAnd sand?[/INST]")
    assert prompt.count("Be dry.") == 1


@pytest.mark.parametrize("name", REASONING)
def test_reasoning(name: str) -> None:
    past, end, learned, learned_plain = REASONING[name]
    conv = get_conv_template(name)
    prompt = conv.get_prompt(QUESTION, [["Is sand wet?", THOUGHT]])
    assert past in prompt
    assert prompt.endswith(end)
    assert conv.get_response(THOUGHT) == learned
    assert conv.get_response(REPLY) == learned_plain


def test_gemma_4_shows_no_thought_channel() -> None:
    conv = get_conv_template("gemma4")
    thought = "<|channel>thought\nGrains.\n<channel|> No. "
    assert "model\nNo.<turn|>\n" in conv.get_prompt(QUESTION, [["Is sand wet?", thought]])
    assert conv.get_response(thought) == "No.<turn|>"


@pytest.mark.parametrize(
    "name, user, reply",
    [
        ("chatml", " x\n", " y\n"),
        ("qwen3", " x\n", " y\n"),
        ("phi3", " x\n", " y\n"),
        ("llama4", " x\n", " y\n"),
        ("mistral_v1", " x\n", " y\n"),
        ("mistral_v3", " x\n", "y"),
        ("llama2", "x", "y"),
        ("llama3_1", "x", "y"),
        ("gemma3", "x", "y"),
        ("qwen3_5", "x", "y"),
        ("command_r", "x", "y"),
    ],
)
def test_outer_white_space_is_kept_or_stripped_as_the_family_does(name: str, user: str, reply: str) -> None:
    conv = get_conv_template(name)
    prompt = conv.get_prompt(" x\n", [[" x\n", " y\n"]])
    assert prompt.count(conv.user[0] + user + conv.user[1]) == 2
    assert conv.assistant + conv.seam + reply + conv.turn_end in prompt
    plain = conv.get_response("|").partition("|")
    assert conv.get_response(" y\n") == plain[0] + reply + plain[2]


def test_white_space_between_a_folded_system_text_and_the_question() -> None:
    """Llama 2 strips what stands between [INST] and [/INST], Gemma 3 the question alone."""
    assert get_conv_template("llama2").get_prompt("  x ", [], "S").endswith("\n\n  x [/INST]")
    assert "user\nS\n\nx<end_of_turn>" in get_conv_template("gemma3").get_prompt("  x ", [], "S")


@pytest.mark.parametrize("system", ["", "Be dry."])
@pytest.mark.parametrize("name", ["gemma", "alpaca"])
def test_a_refused_system_text_names_the_way_out(name: str, system: str) -> None:
    with pytest.raises(ConversationError, match="fold_system=true"):
        get_conv_template(name).get_prompt(QUESTION, [], system)


def test_fold_system_puts_the_system_text_before_the_first_question() -> None:
    conv = get_conv_template("gemma", fold_system=True)
    start = "<bos><start_of_turn>user\nBe dry.\n\nIs tea wet?<end_of_turn>\n"
    assert conv.get_prompt(QUESTION, HISTORY, "Be dry.").startswith(start)
    with pytest.raises(ConversationError, match="leave fold_system out"):
        get_conv_template("qwen2", fold_system=True)


def test_alpaca_is_single_turn() -> None:
    conv = get_conv_template("alpaca")
    assert conv.get_prompt("{x}").endswith("\n\n### Instruction:\n{x}\n\n### Response:")
    with pytest.raises(ConversationError, match="single-turn"):
        conv.get_prompt(QUESTION, HISTORY)


@pytest.mark.parametrize("history", [[["only a question"]], [["a", None]], ["ab"], [["a", "b", "c"]]])
def test_a_history_that_does_not_alternate_is_refused(history: list) -> None:
    with pytest.raises(ConversationError, match=r"history\[0\]"):
        get_conv_template("qwen").get_prompt(QUESTION, history)


def test_names() -> None:
    assert get_conv_template("qwen2.5") is TEMPLATES["qwen2_5"]
    assert get_conv_template("Llama-3.1") is TEMPLATES["llama3_1"]
    assert all(alias not in FAMILIES and name in FAMILIES for alias, name in ALIASES.items())
    # Yi-34B-Chat and SmolLM write plain ChatML, Yi-1.5 and SmolLM2 do not.
    assert get_conv_template("Yi-34b-chat") is get_conv_template("smollm") is TEMPLATES["chatml"]
    for name in "qwen mistral deepseek deepseek3 intern2 cohere".split():
        assert isinstance(TEMPLATES[name], Conversation)
    with pytest.raises(ConversationError, match="did you mean qwen3.*There are: auto, alpaca"):
        get_conv_template("qwen33")


def test_list_imports_nothing_heavy_and_names_every_family() -> None:
    code = "import sys, conversation as c; c.main(['--list']); print(*{'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *table, heavy = done.stdout.split("\n")[:-1]
    assert heavy == ""
    assert [line.split()[0] for line in table[1:]] == list(FAMILIES)


def test_the_docs_name_every_family_and_alias() -> None:
    words = re.findall(r"[a-z0-9_]+", (ROOT / "docs" / "templates.md").read_text("utf-8"))
    assert set(TEMPLATES) <= set(words)


def golden(conv: Conversation) -> list[str | None]:
    """What a family makes of white space, reasoning and empty text, wherever they may stand; None where it refuses."""
    past = [(" a ", " <think>\nb\n</think>\n\nc ")]
    prompts = [(" d ", past, " s "), (" d ", past, None), (" d ", [], ""), (" d ", [("", "")], None)]
    texts: list[str | None] = []
    for arguments in prompts:
        try:
            texts.append(conv.get_prompt(*arguments))
        except ConversationError:
            texts.append(None)
    return texts + [conv.get_response(reply) for reply in (" f\n", past[0][1], "<|channel>g<channel|> h ")]


@pytest.mark.parametrize("name", FAMILIES)
def test_golden_renderings(name: str) -> None:
    """The file was compared with the official templates. `python -m tests.test_conversation` writes it anew."""
    assert golden(FAMILIES[name]) == json.loads(GOLDEN.read_text("utf-8"))[name]


PIECES = [" ", "\n", "\t", "{", "}", "{{ x }}", "{% if x %}", "{0}", "%s", "\\n", "'", '"', "😀", "é", "中文", "\u3000"]
PIECES += ["<think>", "</think>", "<|im_end|>", "[INST]", "</s>", "<|channel>", "<channel|>", "\r\n", "\x85", "word"]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=5).map("".join)
conversations = st.tuples(st.none() | texts, st.lists(st.tuples(texts, texts), max_size=3), texts, texts)


def jinja_render(template: str, messages: list[dict], prompt: bool) -> str:
    (rendered,), _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt)
    return rendered


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(case=conversations)
def test_the_saved_jinja_renders_the_same(name: str, case: tuple) -> None:
    system, history, question, reply = case
    conv = FAMILIES[name]
    if conv.system_place == "refused":
        conv, system = (get_conv_template(name, fold_system=True), system) if system else (conv, None)
    history = [] if conv.single_turn else history
    messages = [{"role": "system", "content": system}] if system is not None else []
    for user, assistant in history:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    messages.append({"role": "user", "content": question})
    prompt = conv.get_prompt(question, history, system)
    assert jinja_render(conv.jinja(), messages, prompt=True) == prompt
    if reply or not conv.skip_empty:
        messages.append({"role": "assistant", "content": reply})
        whole = jinja_render(conv.jinja(), messages, prompt=False)
        assert whole.startswith(prompt + conv.get_response(reply))
        assert len(whole) <= len(prompt + conv.get_response(reply)) + len("\n")


@pytest.mark.parametrize("name", ["gemma", "alpaca", "mistral_v3", "chatml"])
def test_the_saved_jinja_refuses_what_training_never_saw(name: str) -> None:
    late_system = [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]
    with pytest.raises(Exception, match=name):
        jinja_render(FAMILIES[name].jinja(), late_system, prompt=True)


def official_cases() -> list:
    families = json.loads(RENDERINGS.read_text("utf-8")) if RENDERINGS.exists() else {}
    return [
        pytest.param(name, facts, case, id=f"{name}-{case['name']}")
        for name, facts in families.items()
        for case in facts["cases"]
    ] or [pytest.param("", {}, {}, marks=pytest.mark.skip(f"needs {RENDERINGS.name} of ../shared/templates"))]


@pytest.mark.parametrize("name, facts, case", official_cases())
def test_official_rendering(name: str, facts: dict, case: dict) -> None:
    conv = get_conv_template(name)
    if case["prompt"] is None:
        with pytest.raises(ConversationError):
            conv.get_prompt(case["question"], case["history"], case["system"])
        return
    assert conv.get_prompt(case["question"], case["history"], case["system"]) == case["prompt"]
    stop = facts["end_of_turn"].split(" ")[0]
    # Where the prompt is no prefix of the whole, the case's own prefix is an accident of where the two part.
    prefix = case["reply_prefix"] if case["prompt_is_prefix_of_full"] else facts["nominal_reply_prefix"]
    rendered = case["reply_rendered"]
    suffix = case["reply_suffix"]
    learned_suffix = suffix[: suffix.index(stop) + len(stop)] if stop in suffix else stop
    assert conv.stop_str == stop
    assert conv.get_response(case["reply"]) == prefix + rendered + learned_suffix


if __name__ == "__main__":
    renderings = {name: golden(conv) for name, conv in FAMILIES.items()}
    GOLDEN.write_text(json.dumps(renderings, ensure_ascii=False, indent=0) + "\n", "utf-8")
