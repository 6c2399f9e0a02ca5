"""The families of chat templates as data: how each writes system, user and assistant turns.

To add one, add an entry to _TABLE and a case to tests/templates/test_conversation.py.
"""

from __future__ import annotations

import difflib
from dataclasses import replace

from preference.templates.conversation import Conversation, ConversationError

# -- families: builders for formats that several share, then the table


def _chatml(name: str, models: str, **changes) -> Conversation:
    """ChatML, the turn format of Qwen and many others."""
    system, user = ("<|im_start|>system\n", "<|im_end|>\n"), ("<|im_start|>user\n", "<|im_end|>\n")
    tokens = ("<|im_start|>", "<|im_end|>")
    base = Conversation(name, models, user, "<|im_start|>assistant\n", "<|im_end|>", "<|im_end|>\n", tokens, system)
    return replace(base, **changes)


def _headers(name: str, models: str, start: str, end: str, stop: str, preamble: str = "", **changes) -> Conversation:
    """Llama 3 and 4: the role between two header tokens. `preamble` opens the system turn."""
    system, user, assistant = (f"{start}{role}{end}\n\n" for role in ("system", "user", "assistant"))
    tokens = ("<|begin_of_text|>", start, end, stop)
    base = Conversation(name, models, (user, stop), assistant, stop, stop, tokens, (system + preamble, stop))
    return replace(base, begin="<|begin_of_text|>", **changes)


def _role_lines(name: str, models: str, eos: str, closes: str = "\n", **changes) -> Conversation:
    """Tulu's format: the role as plain text on a line of its own, EOS behind replies. `closes` ends the other turns."""
    system, user = ("<|system|>\n", closes), ("<|user|>\n", closes)
    return replace(Conversation(name, models, user, "<|assistant|>\n", eos, eos + "\n", (eos,), system), **changes)


def _inst(name: str, models: str, user: tuple[str, str], seam: str, **changes) -> Conversation:
    """Llama 2 and Mistral: questions between [INST] and [/INST], the system text inside one of them."""
    base = Conversation(name, models, user, "", "</s>", "</s>", ("<s>", "</s>"), ("", "\n\n"), "last", begin="<s>")
    return replace(base, seam=seam, alternates=True, **changes)


def _gemma(name: str, models: str, start: str, stop: str, **changes) -> Conversation:
    """Gemma: the assistant is called model, BOS is written, EOS is not the end of a turn."""
    tokens, user = ("<bos>", start, stop), (start + "user\n", stop + "\n")
    base = Conversation(name, models, user, start + "model\n", stop, stop + "\n", tokens, ("", "\n\n"), "first")
    return replace(replace(base, begin="<bos>", strip="UR", alternates=True), **changes)


def _deepseek(name: str, models: str, **changes) -> Conversation:
    """DeepSeek from V2.5 on. The bars are full-width, the gaps are U+2581."""
    bos, eos, user, assistant = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
    base = Conversation(name, models, (user, ""), assistant, eos, eos, (bos, eos, user, assistant), begin=bos)
    return replace(base, **changes)


def _tagged(
    name: str, models: str, first: str, asks: str, replies: str, gap: str, stop: str, end: str, **changes
) -> Conversation:
    """A tag per role, `gap` between the first two and their text, `end` behind turns; `stop` is the part learned."""
    tokens = (first, asks, replies, stop)
    base = Conversation(name, models, (asks + gap, end), replies, stop, end, tokens, (first + gap, end))
    return replace(base, **changes)


_LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_LLAMA3_1 = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"  # written whatever the day
_QWEN2_5 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_INST_TOKENS = ("<s>", "</s>", "[INST]", "[/INST]")
_TAGS = ("<|system|>", "<|user|>", "<|assistant|>")
_EXAONE = ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]")
_BAICHUAN = ("<reserved_106>", "<reserved_107>", "</s>")
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
_PHI4 = ("<|im_start|>", "<|im_sep|>", "<|im_end|>")
_TURN, _END = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"  # Command R
_ROLES = ("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")

_PHI4_ROLES = ("<|im_start|>system<|im_sep|>", "<|im_start|>user<|im_sep|>", "<|im_start|>assistant<|im_sep|>")
_COMMAND_R = (_TURN + _ROLES[0], _TURN + _ROLES[1], _TURN + _ROLES[2])

_TABLE = [
    _chatml("chatml", "generic ChatML: OpenHermes, MiniCPM4, many fine-tunes"),
    _chatml("qwen2", "Qwen1.5, Qwen2 Instruct", default_system="You are a helpful assistant."),
    _chatml("qwen2_5", "Qwen2.5, Qwen2.5-Coder Instruct", default_system=_QWEN2_5),
    _chatml("qwen3", "Qwen3 hybrid, thinking", reasoning="block"),
    _chatml("qwen3_nothink", "Qwen3 hybrid, not thinking", reasoning="closed", opens="<think>\n\n</think>\n\n"),
    _chatml("qwen3_5", "Qwen3.5 from 4B on, Qwen3.6, thinking", reasoning="open", opens="<think>\n", strip="SUR"),
    _chatml("qwen3_5_nothink", "Qwen3.5, Qwen3.6, not thinking", reasoning="closed",
            opens="<think>\n\n</think>\n\n", strip="SUR"),
    replace(
        _inst("llama2", "Llama 2 Chat", ("<s>[INST] ", " [/INST]"), " ", strip="UR", strip_folded=True),
        begin="",  # BOS opens every pair instead
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        system_place="first",
        reply_end=" </s>",
        turn_end=" </s>",
    ),
    _headers("llama3", "Llama 3 Instruct", *_LLAMA3, strip="SUR"),
    _headers("llama3_1", "Llama 3.1, 3.3 Instruct", *_LLAMA3, _LLAMA3_1, default_system="", strip="SUR"),
    _headers("llama4", "Llama 4 Scout, Maverick", "<|header_start|>", "<|header_end|>", "<|eot|>", strip="S"),
    _inst("mistral_v1", "Mistral 7B v0.1, v0.2, Mixtral 8x7B", (" [INST] ", " [/INST]"), " ", system_place="first"),
    _inst("mistral_v3", "Mistral 7B v0.3, Large 2407", ("[INST] ", "[/INST]"), " ", strip="R", tokens=_INST_TOKENS),
    _inst("mistral_nemo", "Mistral Nemo 2407", ("[INST]", "[/INST]"), "", tokens=_INST_TOKENS),
    _gemma("gemma", "Gemma 1, 2", "<start_of_turn>", "<end_of_turn>", system_place="refused"),
    _gemma("gemma3", "Gemma 3", "<start_of_turn>", "<end_of_turn>"),
    replace(
        _gemma("gemma4", "Gemma 4 E2B, E4B", "<|turn>", "<turn|>", alternates=False, strip="SUR", reasoning="channel"),
        system=("<|turn>system\n", "<turn|>\n"),
        system_place="turn",
    ),
    _tagged("phi3", "Phi-3 mini", *_TAGS, "\n", "<|end|>", "<|end|>\n", assistant="<|assistant|>\n"),
    _tagged("phi4", "Phi-4 14B", *_PHI4_ROLES,
            "", "<|im_end|>", "<|im_end|>", tokens=_PHI4),
    _tagged("phi4_mini", "Phi-4 mini", *_TAGS, "", "<|end|>", "<|end|>"),
    _deepseek("deepseek_v2", "DeepSeek LLM, V2, Coder-V2", system=("", "\n\n"), user=("User: ", "\n\n"),
              assistant="Assistant:", seam=" ", tokens=_DEEPSEEK),
    _deepseek("deepseek_v3", "DeepSeek V2.5, V3"),
    _deepseek("deepseek_r1_distill", "DeepSeek-R1-Distill", reasoning="hidden", opens="<think>\n"),
    # To train them with reasoning, which their own template deletes from every reply.
    _deepseek("deepseek_r1_think", "DeepSeek-R1-Distill, with reasoning", reasoning="open-raw", opens="<think>\n"),
    _tagged("chatglm3", "ChatGLM3-6B", *_TAGS, "\n ", "</s>", "", begin="[gMASK]sop", seam="\n "),
    # GLM-4 ends its turn by opening the user's, so <|user|> is what it must learn to write.
    _tagged("glm4", "GLM-4-9B-Chat", *_TAGS, "\n", "<|user|>", "", begin="[gMASK]<sop>", seam="\n", skip_empty="SUR"),
    _chatml("internlm2", "InternLM2, 2.5, 3", begin="<s>", tokens=("<s>", "<|im_start|>", "<|im_end|>")),
    _chatml("yi", "Yi-1.5 Chat", system=("", "")),
    _role_lines("zephyr", "Zephyr 7B beta, TinyLlama Chat", "</s>", closes="</s>\n"),
    _role_lines("olmo2", "OLMo 2 Instruct", "<|endoftext|>", begin="<|endoftext|>"),
    _role_lines("tulu3", "Llama-3.1-Tulu-3", "<|end_of_text|>"),
    _chatml("smollm2", "SmolLM2 Instruct", default_system=_SMOLLM2),
    _chatml("minicpm3", "MiniCPM3-4B", skip_empty="S"),
    _role_lines("falcon3", "Falcon3 Instruct", "<|endoftext|>"),
    _tagged("command_r", "Command R, R+ v01, Aya Expanse", *_COMMAND_R, "", _END, _END,
            begin="<BOS_TOKEN>", tokens=("<BOS_TOKEN>", _TURN, *_ROLES, _END), strip="UR", alternates=True),
    _tagged("exaone3_5", "EXAONE 3.5 Instruct", *_EXAONE[:3], "", _EXAONE[3], _EXAONE[3] + "\n",
            user=("[|user|]", "\n"), default_system=""),
    Conversation("baichuan2", "Baichuan2 Chat", (_BAICHUAN[0], ""), _BAICHUAN[1], "</s>", "", _BAICHUAN),
    Conversation("vicuna", "Vicuna v1.1 to v1.5", ("USER: ", " "), "ASSISTANT:", "</s>", "</s>", ("</s>",),
                 ("", " "), default_system=_VICUNA, seam=" "),
    Conversation("alpaca", "Stanford Alpaca, single-turn", ("### Instruction:\n", "\n\n"), "### Response:", "</s>",
                 "</s>", ("</s>",), ("", "\n\n"), "refused", begin=_ALPACA + "\n\n", single_turn=True, alternates=True),
]  # fmt: skip
FAMILIES: dict[str, Conversation] = {conv.name: conv for conv in _TABLE}

# Names that users of FastChat, MedicalGPT and LLaMA-Factory have in their scripts. A name here means the format that
# the models' own template writes, which is not always what those projects write under it (docs/templates.md).
ALIASES = {
    "qwen": "qwen2", "qwen1_5": "qwen2", "qwen_7b_chat": "qwen2", "qwen2_5_coder": "qwen2_5",
    "qwen3_6": "qwen3_5",
    "llama_2": "llama2", "llama_3": "llama3", "llama_3_1": "llama3_1", "llama3_3": "llama3_1", "llama_3_3": "llama3_1",
    "llama_4": "llama4",
    "mistral": "mistral_v3", "mixtral": "mistral_v1",
    "gemma2": "gemma", "gemma3n": "gemma3", "phi": "phi3", "phi_4": "phi4", "phi4_mini_instruct": "phi4_mini",
    "deepseek": "deepseek_v2", "deepseek_chat": "deepseek_v2", "deepseek2": "deepseek_v2",
    "deepseek3": "deepseek_v3", "deepseek_v2_5": "deepseek_v3",
    "deepseekr1": "deepseek_r1_distill", "deepseek_r1": "deepseek_r1_distill",
    "intern2": "internlm2", "internlm2_chat": "internlm2", "internlm3": "internlm2",
    "yi_34b_chat": "chatml", "yi1_5": "yi", "baichuan2_chat": "baichuan2", "glm_4": "glm4",
    "cohere": "command_r", "aya_expanse": "command_r", "cpm3": "minicpm3", "exaone": "exaone3_5",
    "olmo_2": "olmo2", "tulu": "tulu3", "smollm": "chatml", "tinyllama": "zephyr",
    "vicuna_v1_1": "vicuna", "vicuna_v1_5": "vicuna", "stanford_alpaca": "alpaca", "chatml_default": "chatml",
    "cpm4": "chatml", "openhermes_2_5_mistral_7b": "chatml",
}  # fmt: skip
TEMPLATES: dict[str, Conversation] = FAMILIES | {alias: FAMILIES[name] for alias, name in ALIASES.items()}


def get_conv_template(name: str, *, fold_system: bool = False) -> Conversation:
    """The template called `name`; case does not count, and "-" and "." stand for "_", so qwen2.5 is qwen2_5.

    `fold_system=True` is the way out for families whose models know no system turn: the system text is put before the
    first question, two newlines between. Raises ConversationError, with all names, for a name that is not there.
    """
    key = name.lower().replace("-", "_").replace(".", "_")
    if key not in TEMPLATES:
        near = difflib.get_close_matches(key, TEMPLATES, 3)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        names = ", ".join(["auto", *sorted(TEMPLATES)])
        raise ConversationError(f"no template is called {name!r}{hint}. There are: {names}")
    conv = TEMPLATES[key]
    return fold_system_text(conv) if fold_system else conv


def fold_system_text(conv: Conversation) -> Conversation:
    """`conv` with its system text in the first question. Raises ConversationError if it can write one by itself."""
    if conv.system_place != "refused":
        raise ConversationError(f"template {conv.name} writes a system text by itself: leave fold_system out")
    return replace(conv, system_place="first")
