"""A transformers tokenizer as GGUF metadata: tokens, types, merges or scores, and how text is cut before merging.

llama.cpp cuts text by rules that it has compiled in, chosen by the name `tokenizer.ggml.pre`. A tokenizer that cuts in
another way would give other tokens there without a word, so it is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from preference.errors import PreferenceError


class GGUFError(PreferenceError, ValueError):
    """A model that cannot be written as GGUF; str() says what and why."""


# What GPT-4's rule and its heirs share; they differ in how many digits make a piece.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The rule (as `_cut` describes it) and llama.cpp's name for it.
PRE_TOKENIZERS = {
    ("split:" + _SPLIT % r"\p{N}", "bytes"): "qwen2",
    ("split:" + _SPLIT % r"\p{N}{1,3}", "bytes"): "llama-bpe",
    ("bytes:gpt2",): "gpt-2",
    ("digits", "bytes:gpt2"): "smollm",
}
_LONGEST_FIRST = -1000.0  # score of tokens that no merge makes: below all that are merged


@dataclass(frozen=True)
class Vocabulary:
    """What the GGUF tokenizer keys hold. `model` is "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE)."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    space_prefix: bool
    note: str = ""  # where llama.cpp will cut prompts in another way


def vocabulary(tokenizer: Any, rows: int, prompts: Sequence[str] = ()) -> Vocabulary:
    """The vocabulary of `tokenizer` for an embedding of `rows` rows; ids without a token are padded as unused.

    `prompts`, as the chat template writes them, are what a SentencePiece vocabulary has to cut as in training.

    Raises:
        GGUFError: it is no BPE tokenizer, or cuts text as none of PRE_TOKENIZERS does.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise GGUFError("the tokenizer has no tokenizer.json, from which the GGUF vocabulary is made")
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise GGUFError(f"the tokenizer is of type {model['type']}; what can be written is BPE")
    tokens = _tokens(model, state["added_tokens"], rows)
    merges = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model["merges"]]
    types = _types(tokens, state["added_tokens"], model.get("unk_token"), bytes_spelled=model["byte_fallback"])
    names = [token if token is not None else f"[PAD{i}]" for i, token in enumerate(tokens)]
    if model["byte_fallback"]:
        space = _space(tokenizer, state, prompts)
        return Vocabulary("llama", "default", names, types, [], _scores(tokens, merges), *space)
    pre = PRE_TOKENIZERS.get(_cut(state))
    if pre is None:
        raise GGUFError(
            "the tokenizer cuts text in a way that has no known name in llama.cpp, so its tokens would differ there: "
            f"{json.dumps(state['pre_tokenizer'], ensure_ascii=False)[:400]}"
        )
    return Vocabulary("gpt2", pre, names, types, [" ".join(merge) for merge in merges], [], False)


def _tokens(model: dict, added: list[dict], rows: int) -> list[str | None]:
    by_id = {i: token for token, i in model["vocab"].items()} | {token["id"]: token["content"] for token in added}
    if max(by_id) >= rows:
        raise GGUFError(f"the tokenizer has ids up to {max(by_id)}, the model only {rows} embedding rows")
    return [by_id.get(i) for i in range(rows)]


def _types(tokens: list[str | None], added: list[dict], unknown: str | None, bytes_spelled: bool) -> list[int]:
    special = {token["content"]: token["special"] for token in added}

    def type_of(token: str | None) -> TokenType:
        if token is None:
            return TokenType.UNUSED
        if bytes_spelled and token in ("<unk>", unknown):
            return TokenType.UNKNOWN
        if token in special:
            return TokenType.CONTROL if special[token] else TokenType.USER_DEFINED
        if bytes_spelled and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return TokenType.BYTE
        return TokenType.NORMAL

    return [int(type_of(token)) for token in tokens]


def _scores(tokens: list[str | None], merges: list[list[str]]) -> list[float]:
    """SentencePiece merges the pair whose result has the highest score: minus the rank of the merge that makes it."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    below = -float(len(merges))
    return [-float(rank[t]) if t in rank else below if t and len(t) == 1 else _LONGEST_FIRST + below for t in tokens]


def _space(tokenizer: Any, state: dict, prompts: Sequence[str]) -> tuple[bool, str]:
    """Whether a space is put before a text and behind every control token in it: llama.cpp does both or neither.

    Tokenizers know more ways, such as before the very first word alone, which is behind no control token as a rule. So
    the way is taken that cuts more of the prompts as the tokenizer does; the second value tells of the others.
    """
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    state = state | {"normalizer": space, "pre_tokenizer": None, "post_processor": None}
    words, control = Tokenizer.from_str(json.dumps(state)), [token["content"] for token in state["added_tokens"]]
    pattern = "|".join(re.escape(text) for text in sorted(control, key=len, reverse=True))

    def differs(prompt: str, prefix: str) -> bool:
        parts = [part for part in re.split(f"({pattern})", prompt) if part]
        texts = [part if part in control else prefix + part for part in parts]
        ids = [i for text in texts for i in words.encode(text, add_special_tokens=False).ids]
        return ids != tokenizer.encode(prompt, add_special_tokens=False)

    wrong, without = min((sum(differs(prompt, " " * put) for prompt in prompts), not put) for put in (True, False))
    note = (
        f"llama.cpp and Ollama will cut {wrong} of {len(prompts)} prompts (one turn, with a system text, two turns) "
        "not quite as in training: they put a space behind every control token or behind none"
    )
    return not without, note if wrong else ""


def _parts(step: dict | None, name: str) -> list[dict]:
    if step is None:
        return []
    return step[name] if step["type"] == "Sequence" else [step]


def _cut(state: dict) -> tuple[str, ...]:
    """How the tokenizer cuts text before merging, as a key of PRE_TOKENIZERS."""

    def describe(part: dict) -> str:
        if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            return "split:" + part["pattern"].get("Regex", "")
        if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            return "bytes:gpt2" if part["use_regex"] else "bytes"
        if part["type"] == "Digits" and part["individual_digits"]:
            return "digits"
        return json.dumps(part)

    return tuple(describe(part) for part in _parts(state["pre_tokenizer"], "pretokenizers"))


def write_tokenizer(
    writer: GGUFWriter, tokenizer: Any, vocab: Vocabulary, stop_ids: list[int], writes_bos: bool
) -> None:
    """The tokenizer's keys. BOS is put before a prompt exactly if the chat template writes one (`writes_bos`).

    `stop_ids`: the tokens that end an answer. EOS is the tokenizer's where it is one of them; another goes in as EOT.
    """
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    if vocab.merges:
        writer.add_token_merges(vocab.merges)
    if vocab.scores:
        writer.add_token_scores(vocab.scores)
        writer.add_add_space_prefix(vocab.space_prefix)
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id in stop_ids or not stop_ids else stop_ids[0]
    others = [token for token in stop_ids if token != eos]
    for value, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (eos, writer.add_eos_token_id),
        (others[0] if others else None, writer.add_eot_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
    ):
        if value is not None:
            add(value)
    writer.add_add_bos_token(writes_bos)
    writer.add_add_eos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
