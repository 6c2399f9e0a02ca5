"""Small tokenizers in the manner of SentencePiece: a space before the first word, bytes for unknown characters.

Three kinds, as the models have them: "first" puts the space before the text (Llama 2 today), "always" before what
follows a control token too, "legacy" does the same in the normalizer (Llama 2 and Phi-3 as converted at first).
"""

from __future__ import annotations

import functools
import json

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tiny import CORPUS

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
KINDS = ("first", "always", "legacy")


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokens = [AddedToken(token, special=True, normalized=False) for token in SPECIALS]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator([f"{line} {line.lower()}" for line in CORPUS], trainer)
    return tokenizer.to_str()


def sentencepiece_like(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one of KINDS, with ChatML's control tokens and Llama's."""
    state = json.loads(_trained())
    vocab = state["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    state["model"]["byte_fallback"] = True
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if kind == "legacy":
        state["pre_tokenizer"] = None
        state["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
    else:
        state["pre_tokenizer"]["prepend_scheme"] = kind
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    state["decoder"] = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
