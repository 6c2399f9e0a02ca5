"""Text to token ids, such that text from data never becomes a control token.

A string that comes from data may hold `<|im_end|>` or `</s>` as plain characters. A tokenizer cannot tell them from the
ones that the chat template writes, so the two are told apart before the template sees them:

1. `ControlTokens.mark` breaks each look-alike in a data string with a sentinel, a character that the row does not hold.
2. The template renders the marked strings. Every whole control token in the result is now the template's own.
3. `Encoder` renames those to private names, takes the sentinels out again, and encodes the text with a copy of the
   tokenizer whose control tokens bear the private names. There `<|im_end|>` is ten ordinary characters, in the context
   of their neighbours, and the template's own end of turn has its usual id.

Rows without a look-alike, nearly all, need none of this and go through the tokenizer as it is, in batches.

Tokenizers that put a space before the first word (SentencePiece and its heirs) would put one before every answer too,
since answers are encoded on their own. `Encoder.encode_answers` encodes them behind an anchor that is cut off again.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from preference.errors import PreferenceError

Ids = list[int]

# Tags that open and close a model's reasoning are content: data is meant to hold them.
_REASONING = re.compile(r"[<\[]/?[|｜]?(\w+:)?(think|thinking|thought|reasoning)[|｜]?[>\]]", re.IGNORECASE)
# Shapes that only control tokens have, for tokenizers that do not flag theirs as special.
_CONTROL_SHAPE = re.compile(r"<[|｜].+[|｜]>|</?s>|<(bos|eos|pad|unk)>|\[/?[A-Z_]+\d*\]|<(start|end)_of_turn>")
# Unicode noncharacters: valid in UTF-8, never in well-formed text; then private-use ones, for text that has them all.
_SENTINELS = [chr(c) for c in range(0xFDD0, 0xFDF0)] + [chr(c) for c in range(0xF0000, 0xFFFFE)]
_TEXT_ANCHORS = ("\n", "x", "7", "!")  # of four classes, so that one of them merges with nothing that may follow
_PROBES = ("a", "é", "7", "(", "中", "Hello, world", "\n- x")


class EncodingError(PreferenceError, ValueError):
    """A text cannot be encoded as asked."""


class ControlTokens:
    """The added tokens that text from data must never become: the special ones, and those that the template writes.

    `template_text` is what the template renders around harmless content. Reasoning tags (`<think>`) and white space
    (some tokenizers add "\\n\\n") are left out: in data they mean what they say. So are single characters, which cannot
    be broken; no model uses one.
    """

    def __init__(self, tokenizer: Any, template_text: str = "") -> None:
        named = set(tokenizer.all_special_tokens)
        added = tokenizer.added_tokens_decoder.values()
        self.texts = tuple(
            token.content
            for token in added
            if len(token.content) > 1
            and not token.content.isspace()
            and not _REASONING.fullmatch(token.content)
            and (
                token.special
                or token.content in named
                or token.content in template_text
                or _CONTROL_SHAPE.fullmatch(token.content)
            )
        )
        self.pattern = _any_of(self.texts)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        normalized = any(token.normalized for token in added if token.content in self.texts)
        self._normalizer = backend.normalizer if normalized and isinstance(backend, Tokenizer) else None
        self._starts = tuple({text[:2] for text in self.texts})  # `in` is many times faster than the pattern

    def found_in(self, text: str) -> list[str]:
        """The control tokens that `text` spells out, each once; [] for nearly every text."""
        if self._normalizer is not None:  # control tokens are matched behind it, so other characters may become one
            text = f"{text}\0{self._normalizer.normalize_str(text)}"
        if not any(start in text for start in self._starts):
            return []
        return list(dict.fromkeys(self.pattern.findall(text)))

    def mark(self, text: str, sentinel: str, except_for: frozenset[str] = frozenset()) -> str:
        """`text` with the sentinel behind the first character of each look-alike, so that none is left whole."""
        pattern = _any_of(set(self.texts) - except_for) if except_for else self.pattern
        while True:  # a second round where two look-alikes overlap
            marked = pattern.sub(lambda match: match[0][0] + sentinel + match[0][1:], text)
            if marked == text:
                return text
            text = marked


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first, as tokenizers do; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def free_sentinel(texts: Iterable[str]) -> str:
    """A character that none of `texts` holds."""
    used = set().union(*texts)
    for sentinel in _SENTINELS:
        if sentinel not in used:
            return sentinel
    raise EncodingError("a row holds every private-use character, so none is free to mark its control look-alikes")


class Encoder:
    """Encodes prompts and answers without special tokens added and without ever reading data as control text."""

    def __init__(self, tokenizer: Any, template_text: str = "") -> None:
        self.tokenizer = tokenizer
        self.control = ControlTokens(tokenizer, template_text)
        self._added_ids = frozenset(tokenizer.added_tokens_decoder)
        self._backend = _backend_of(tokenizer)
        self._renamed: dict[str, Callable[[Sequence[str]], list[Ids]]] = {}

    def encode_prompts(self, texts: Sequence[str], sentinel: str | None = None) -> list[Ids]:
        """Ids of each text as a whole. With a `sentinel`, the texts were rendered from strings marked with it."""
        return self._encode_batch(texts, sentinel)

    def encode_answers(self, texts: Sequence[str], prompts: Sequence[Ids], sentinel: str | None = None) -> list[Ids]:
        """Ids of each text as the continuation of its prompt: no space is put before it that the text does not have.

        Depends on the prompt in one thing only: whether that ends in an added token, behind which some tokenizers
        start afresh (and put a space of their own, as they do in the official rendering).
        """
        if self.anchor_after_text == self.anchor_after_token:
            return self._encode_behind(self.anchor_after_text, texts, sentinel)
        after_token = [bool(prompt) and prompt[-1] in self._added_ids for prompt in prompts]
        encoded: dict[int, Ids] = {}
        for kind, anchor in ((False, self.anchor_after_text), (True, self.anchor_after_token)):
            where = [i for i, is_token in enumerate(after_token) if is_token is kind]
            encoded.update(zip(where, self._encode_behind(anchor, [texts[i] for i in where], sentinel), strict=True))
        return [encoded[i] for i in range(len(texts))]

    @cached_property
    def anchor_after_text(self) -> str:
        """What answers are encoded behind where the prompt ends in plain text; "" where none is needed."""
        token = self._token_anchor
        wanted = self._behind_text(_PROBES, None)
        for anchor in ("", token):  # a token merges with nothing, so it is the safest anchor where it gives the same
            if self._encode_behind(anchor, _PROBES, None) == wanted:
                return anchor
        return _TEXT_ANCHORS[0]

    @cached_property
    def anchor_after_token(self) -> str:
        """What answers are encoded behind where the prompt ends in an added token; "" where none is needed."""
        token = self._token_anchor
        if self._encode_behind(token, _PROBES, None) == self._encode_behind("", _PROBES, None):
            return ""
        return token

    @cached_property
    def _token_anchor(self) -> str:
        """An added token that leaves the text behind it alone."""
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special and not (token.rstrip or token.lstrip or token.single_word or token.normalized):
                return token.content
        return ""

    def _encode_behind(self, anchor: str, texts: Sequence[str], sentinel: str | None) -> list[Ids]:
        if not anchor:
            return self._encode_batch(texts, sentinel)
        if anchor in _TEXT_ANCHORS:
            return self._behind_text(texts, sentinel)
        return [ids[1:] for ids in self._encode_batch([anchor + text for text in texts], sentinel)]

    def _behind_text(self, texts: Sequence[str], sentinel: str | None) -> list[Ids]:
        """Encodes behind a text anchor; where a text's first characters merge with it, behind another one."""
        encoded: dict[int, Ids] = {}
        for anchor in _TEXT_ANCHORS:
            (head,) = self._encode_batch([anchor], sentinel)
            where = [i for i in range(len(texts)) if i not in encoded]
            for i, ids in zip(where, self._encode_batch([anchor + texts[i] for i in where], sentinel), strict=True):
                if ids[: len(head)] == head:
                    encoded[i] = ids[len(head) :]
        missing = next((text for i, text in enumerate(texts) if i not in encoded), None)
        if missing is not None:
            raise EncodingError(f"the tokenizer merges the start of {missing[:40]!r} with whatever stands before it")
        return [encoded[i] for i in range(len(texts))]

    def _encode_batch(self, texts: Sequence[str], sentinel: str | None) -> list[Ids]:
        if sentinel is not None:
            renamed = self._renamed.get(sentinel) or self._marked_encoder(sentinel)
            if len(self._renamed) == 4:  # only data that is after trouble needs more than one
                self._renamed.clear()
            self._renamed[sentinel] = renamed
            return renamed(texts)
        if self._backend is None:
            return [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _marked_encoder(self, sentinel: str) -> Callable[[Sequence[str]], list[Ids]]:
        if self._backend is None:
            return lambda texts: [self._encode_pieces(text, sentinel) for text in texts]
        names = {text: f"{sentinel}{chr(0x100000 + i)}{sentinel}" for i, text in enumerate(self.control.texts)}
        backend = _renamed_backend(self._backend, names)

        def encode(texts: Sequence[str]) -> list[Ids]:
            named = [self.control.pattern.sub(lambda match: names[match[0]], text) for text in texts]
            # A name holds two sentinels, a mark is one: take out the marks alone
            name_or_mark = re.compile(f"({sentinel}[\U00100000-\U0010fffd]{sentinel})|{sentinel}")
            plain = [name_or_mark.sub(lambda match: match[1] or "", text) for text in named]
            return [encoding.ids for encoding in backend.encode_batch_fast(plain, add_special_tokens=False)]

        return encode

    def _encode_pieces(self, text: str, sentinel: str) -> Ids:
        """For tokenizers that are not Rust: the template's control tokens one by one, the rest as plain text."""
        ids: Ids = []
        end = 0
        for match in [*self.control.pattern.finditer(text), None]:
            piece = text[end : match.start() if match else len(text)].replace(sentinel, "")
            if piece:
                ids += self.tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True)
            if match:
                ids.append(self.tokenizer.convert_tokens_to_ids(match[0]))
                end = match.end()
        return ids


def _backend_of(tokenizer: Any) -> Tokenizer | None:
    """The Rust tokenizer behind a transformers tokenizer, None where there is none or it does not give the same ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    same = all(
        tokenizer.encode(probe, add_special_tokens=False) == backend.encode(probe, add_special_tokens=False).ids
        for probe in _PROBES
    )
    if not same:
        return None
    # transformers sets these three anew in each of its own calls, so nobody misses what is changed here
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return backend


def _renamed_backend(backend: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """A copy of `backend` in which each added token of `names` is spelled by its new name and nothing else makes it."""
    state = json.loads(backend.to_str())
    state.update(truncation=None, padding=None, post_processor=None)
    for token in state["added_tokens"]:
        if token["content"] in names:
            # Not normalized: where the normalizer puts spaces, control tokens would be found behind a space alone
            token.update(content=names[token["content"]], normalized=False)
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        merges = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
        model["merges"] = [m for m in merges if not ("".join(m) in names or m[0] in names or m[1] in names)]
    renamed = Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
    moved = [text for text, name in names.items() if renamed.token_to_id(name) != backend.token_to_id(text)]
    if moved:
        raise EncodingError(f"the tokenizer gives {moved[0]!r} another id when it is renamed")
    return renamed


def flatten(rows: Sequence[Ids]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids as one int32 array and its len(rows) + 1 offsets (many times faster than handing lists to Arrow)."""
    offsets: np.ndarray = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    flat = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32, count=int(offsets[-1]))
    return flat, offsets
