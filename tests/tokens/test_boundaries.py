"""Where prompt and answers meet, and that no text from data becomes a control token: properties over random text."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sentencepiece_like import KINDS, sentencepiece_like
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from conversation import get_conv_template
from preference.data.row import Row
from preference.tokens.encoding import ControlTokens, Encoder, free_sentinel
from preference.tokens.pairs import PairBatcher
from preference.tokens.rendering import Renderer
from tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "tokenizers"
STARTER = ROOT / "models" / "SmolLM2-135M-Instruct"

# (tokenizer, template). The tokenizers on disk are real ones; tests are skipped by name where they are missing.
CASES = [
    ("tiny", "qwen2"),
    *((kind, "chatml") for kind in KINDS),
    *((kind, "vicuna") for kind in KINDS),
    ("starter", "smollm2"),
    ("shared/llama2", "llama2"),
    ("shared/llama2", "vicuna"),
    ("shared/llama3", "llama3"),
    ("shared/phi3", "phi3"),
    ("shared/qwen2", "qwen2"),
]
# These put a space of their own behind a control token, which decoding shows. It is no text of ours.
SPACE_AFTER_CONTROL = {"always", "legacy", "shared/phi3"}


@functools.cache
def load(name: str):
    if name == "tiny":
        return tiny_tokenizer()
    if name in KINDS:
        return sentencepiece_like(name)
    folder = STARTER if name == "starter" else SHARED / name.removeprefix("shared/")
    if not folder.exists():
        pytest.skip(f"{folder} is missing")
    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def batcher(tokenizer: str, template: str) -> PairBatcher:
    return PairBatcher(Renderer(get_conv_template(template)), load(tokenizer), 10**6, 10**6, truncate=False)


def tokenized(name: str, template: str, *rows: Row) -> list[dict]:
    return batcher(name, template)(list(rows))[0].to_pylist()


def comparable(name: str, text: str) -> str:
    """The text without what this tokenizer does not preserve."""
    if name == "shared/qwen2":
        text = unicodedata.normalize("NFC", text)
    if name in SPACE_AFTER_CONTROL:
        text = re.sub("(" + "|".join(map(re.escape, load(name).get_added_vocab())) + ") ", r"\1", text)
    return text


def decoded(name: str, ids: list[int]) -> str:
    return load(name).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


each_case = pytest.mark.parametrize("name, template", CASES, ids=lambda value: value)
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

# U+2581 is how SentencePiece writes a space; it cannot be told from one afterwards.
words = st.text(st.characters(codec="utf-8", exclude_characters="▁"), min_size=1, max_size=40)
breaks = st.sampled_from(["\n", "\n\n", " ", "  ", "\t", "'s", " 1", "é", "e\u0301", "你好", "😀", "\u200b", "\ufdd0"])
plain = st.lists(words | breaks, min_size=1, max_size=6).map("".join).map(str.strip).filter(bool)
hostile = st.sampled_from(
    "<|im_end|> <|im_start|>system <|im_start|> </s> <s> <unk> [INST] [/INST] <|eot_id|> <|end|> <|user|> "
    "<|endoftext|> <|start_header_id|> <|begin_of_text|> <<|im_end|> <|im_end|>> <|im_<|im_end|>end|> <| |> "
    "\U000f0000 \ufdd0 \ufdd0\U00100000\ufdd0 \U00100001 <\ufdd0|im_end|>".split()
)
mixed = st.lists(words | breaks | hostile, min_size=1, max_size=6).map("".join).map(str.strip).filter(bool)


def harmless(name: str, template: str, *texts: str) -> bool:
    return not any(batcher(name, template).encoder.control.found_in(text) for text in texts)


def writable(name: str, *texts: str) -> bool:
    """Whether the tokenizer has all bytes of the texts: SmolLM2's lacks some, which leave no trace in its ids."""
    return all(name != "starter" or decoded(name, load(name).encode(f"x{text}")) == f"x{text}" for text in texts)


@each_case
@quick
@given(question=plain, chosen=plain, rejected=plain)
@example(question="Hi", chosen="Hello there", rejected="'s")
@example(question="Hi", chosen="\ufb01 x", rejected="\u0301a")
def test_ids_are_the_text(name, template, question, chosen, rejected):
    load(name)
    texts = question, chosen, rejected
    if chosen == rejected or not harmless(name, template, *texts) or not writable(name, *texts):
        return
    (pair,) = tokenized(name, template, Row(question, chosen, rejected))
    assert pair["prompt_ids"] == load(name)(pair["prompt"], add_special_tokens=False).input_ids
    for side in ("chosen", "rejected"):
        text = decoded(name, pair["prompt_ids"] + pair[f"{side}_ids"])
        assert comparable(name, text) == comparable(name, pair["prompt"] + pair[side])


@each_case
@quick
@given(question=plain, other=plain, chosen=plain, rejected=mixed, another=mixed)
def test_nothing_depends_on_the_other_answer(name, template, question, other, chosen, rejected, another):
    load(name)
    if chosen in (rejected, another):
        return
    first, second, third = tokenized(
        name, template, Row(question, chosen, rejected), Row(question, chosen, another), Row(other, chosen, rejected)
    )
    assert first["prompt_ids"] == second["prompt_ids"]
    assert first["chosen_ids"] == second["chosen_ids"] == third["chosen_ids"]
    (swapped,) = tokenized(name, template, Row(question, rejected, chosen))
    assert swapped["rejected_ids"] == first["chosen_ids"] and swapped["chosen_ids"] == first["rejected_ids"]


@each_case
@quick
@given(question=mixed, past=mixed, reply=mixed, system=mixed, chosen=mixed)
@example(question="<|im_end|>\n<|im_start|>system", past="</s>", reply="<s>", system="<|end|>", chosen="<|eot_id|>")
@example(question="\ufdd0<|im_end|>\ufdd1", past="x", reply="x", system="x", chosen="</s>\ufdd0\U00100000\ufdd0")
def test_data_never_becomes_a_control_token(name, template, question, past, reply, system, chosen):
    control_ids = {load(name).convert_tokens_to_ids(token) for token in batcher(name, template).encoder.control.texts}
    rows = [
        Row(question, chosen, "r", system, ((past, reply),)),
        Row("q", "c", "r", "s", (("p", "a"),)),
    ]
    if chosen == "r" or not writable(name, question, past, reply, system, chosen):
        return
    tested, clean = tokenized(name, template, *rows)
    for side in ("prompt", "chosen"):
        ids, clean_ids = tested[f"{side}_ids"], clean[f"{side}_ids"]
        assert [i for i in ids if i in control_ids] == [i for i in clean_ids if i in control_ids]
    text = decoded(name, tested["prompt_ids"] + tested["chosen_ids"])
    assert comparable(name, text) == comparable(name, tested["prompt"] + tested["chosen"])
    assert tested["prompt"] == get_conv_template(template).get_prompt(question, [(past, reply)], system)


@each_case
@quick
@given(question=plain, chosen=plain)
def test_renamed_tokenizer_gives_the_same_ids(name, template, question, chosen):
    """The way of rows with look-alikes, taken by rows without: it must change nothing."""
    encoder = batcher(name, template).encoder
    texts = Renderer(get_conv_template(template)).render(Row(question, chosen, ""))
    if not harmless(name, template, question, chosen):
        return
    sentinel = free_sentinel(texts.values())
    prompts = encoder.encode_prompts([texts["prompt"]])
    assert encoder.encode_prompts([texts["prompt"]], sentinel) == prompts
    behind = encoder.encode_answers([texts["chosen"]], prompts)
    assert encoder.encode_answers([texts["chosen"]], prompts, sentinel) == behind


# The merges of the small vocabularies cross words, so a seam of plain text is not where they would cut
@pytest.mark.parametrize("name, template", [case for case in CASES if case[0] not in KINDS or case[1] != "vicuna"])
@quick
@given(question=plain, chosen=st.text("abcdefgh é你,.", min_size=1).map(str.strip).filter(bool))
def test_ordinary_answers_are_as_in_the_official_rendering(name, template, question, chosen):
    """Prompt and answer encoded apart give the ids of the whole conversation encoded at once."""
    load(name)
    if not harmless(name, template, question):
        return
    (pair,) = tokenized(name, template, Row(question, chosen, chosen + "!"))
    whole = load(name)(pair["prompt"] + pair["chosen"], add_special_tokens=False).input_ids
    assert pair["prompt_ids"] + pair["chosen_ids"] == whole


@pytest.mark.parametrize("name", KINDS)
def test_no_space_is_put_before_an_answer(name):
    tokenizer = load(name)
    (ids,) = Encoder(tokenizer).encode_answers(["Rest"], [tokenizer("Answer:", add_special_tokens=False).input_ids])
    assert "▁" not in "".join(tokenizer.convert_ids_to_tokens(ids))
    (spaced,) = Encoder(tokenizer).encode_answers([" Rest"], [[5]])
    assert "".join(tokenizer.convert_ids_to_tokens(spaced)) == "▁Rest"


@pytest.mark.parametrize("name", KINDS)
def test_answers_behind_a_control_token_begin_as_the_whole_text_does(name):
    tokenizer = load(name)
    prompt = tokenizer("ask<|im_end|>", add_special_tokens=False).input_ids
    (ids,) = Encoder(tokenizer).encode_answers(["Rest"], [prompt])
    assert prompt + ids == tokenizer("ask<|im_end|>Rest", add_special_tokens=False).input_ids


@quick
@given(question=mixed, chosen=mixed)
def test_tokenizer_without_a_rust_backend(question, chosen):
    tokenizer = ByT5Tokenizer()
    encoder = Encoder(tokenizer, "Q: </s>")
    sentinel = free_sentinel([question, chosen])
    marked = [encoder.control.mark(text, sentinel) for text in (question, chosen)]
    (prompt,) = encoder.encode_prompts([f"Q: {marked[0]}</s>"], sentinel)
    (answer,) = encoder.encode_answers([f"{marked[1]}</s>"], [prompt], sentinel)
    special = set(tokenizer.all_special_ids)
    assert [i for i in prompt + answer if i in special] == [tokenizer.eos_token_id] * 2
    assert bytes(i - 3 for i in answer[:-1]).decode() == chosen


@pytest.mark.parametrize("name", KINDS)
def test_control_tokens_matched_behind_the_normalizer(name):
    """Some tokenizers normalize their control tokens, so that other characters can become one."""
    state = json.loads(load(name).backend_tokenizer.to_str())
    wide = {"type": "Replace", "pattern": {"String": "＜"}, "content": "<"}
    given = [] if state["normalizer"] is None else state["normalizer"]["normalizers"]
    state["normalizer"] = {"type": "Sequence", "normalizers": [wide, *given]}
    for token in state["added_tokens"]:
        token["normalized"] = True
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>")
    encoder = Encoder(tokenizer)
    assert encoder.control.found_in("a ＜/s>") == ["</s>"]
    texts = ["a <|im_end|> b </s>", "a<|im_end|>b</s>", "<s> x"]
    sentinel = free_sentinel(texts)
    if name == "legacy":  # a known fault of such tokenizers: they find control tokens behind a space alone
        assert encoder.encode_prompts(texts[:1], sentinel)[0][-1] == tokenizer.eos_token_id
    else:
        assert encoder.encode_prompts(texts, sentinel) == encoder.encode_prompts(texts)
    (ids,) = encoder.encode_prompts(["a ＜/s> b"], sentinel)
    assert tokenizer.eos_token_id not in ids


def test_an_answer_that_merges_with_one_anchor_is_encoded_behind_another():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a\n\nb\n\nc\n\n x7 77 xx"] * 9, trainer)
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    answers = ["\n\nb", "x7", "77", "! a", "b"]
    encoded = encoder.encode_answers(answers, [[1]] * len(answers))
    assert ["".join(map(tokenizer.id_to_token, ids)) for ids in encoded] == ["ĊĊb", "x7", "77", "!Ġa", "b"]


def test_reasoning_tags_and_white_space_are_content():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", "\n\n", "<|tool|>", "<b>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<reserved>"]})
    control = ControlTokens(tokenizer, "<b>\n\n<think></think>")
    assert set(control.texts) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool|>", "<reserved>", "<b>"}
    assert control.found_in("<think>a</think>\n\n<b>") == ["<b>"]


def test_overlapping_look_alikes_are_all_broken():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["aXb", "bXa"]})
    control = ControlTokens(tokenizer)
    marked = control.mark("aXbXaXb", "\ufdd0")
    assert not control.found_in(marked) and marked.replace("\ufdd0", "") == "aXbXaXb"
