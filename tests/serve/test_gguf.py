"""GGUF files compute and cut text as the model does; what cannot be written so is refused."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from exported import export, logits
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from tuned import make_base

from conversation import get_conv_template
from preference.serve import gguf as gguf_export
from preference.serve import merging
from preference.serve.gguf import TensorReader, compare, interleave, tensors, write_gguf
from preference.serve.gguf_tokenizer import GGUFError, vocabulary
from tiny import CORPUS, tiny_model, tiny_tokenizer


def gguf_of(
    model: object, folder: Path, tokenizer: object = None, quantization: str = "f16", **options: object
) -> Path:
    if tokenizer is None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = get_conv_template("qwen").jinja()
    options = {"stop_ids": [2], "writes_bos": False, "name": "tiny"} | options
    write_gguf(folder / "m.gguf", model, tokenizer, quantization=quantization, **options)
    return folder / "m.gguf"


@pytest.mark.parametrize("quantization", ["f16", "q8_0"])
@pytest.mark.parametrize(
    "arch, config",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),
    ],
)
def test_a_gguf_file_computes_the_same(arch: str, config: dict, quantization: str, tmp_path: Path) -> None:
    model = tiny_model(arch, **config)
    with torch.no_grad():  # biases begin as zeros, norms as ones: make a mistake in them visible
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.3)
    gguf_of(model, tmp_path, quantization=quantization)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    expected = logits(model)
    limit = {"f16": 0.005, "q8_0": 0.08}[quantization]
    assert (logits(found) - expected).abs().max() < limit * expected.std()


def test_the_gguf_metadata(tmp_path: Path) -> None:
    model = tiny_model(rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0})
    model.config.rope_parameters["original_max_position_embeddings"] = 512
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    reader = gguf.GGUFReader(gguf_of(model, tmp_path, tokenizer, stop_ids=[0, 2, 5]))
    value = {name: field.contents() for name, field in reader.fields.items()}
    vocab = tiny_tokenizer().get_vocab()
    assert value["general.architecture"] == "llama" and value["general.file_type"] == 1
    assert value["llama.rope.freq_base"] == 5e5 and value["llama.rope.dimension_count"] == 8
    assert (value["llama.rope.scaling.type"], value["llama.rope.scaling.factor"]) == ("yarn", 4.0)
    assert value["llama.rope.scaling.original_context_length"] == 512
    assert (value["llama.attention.head_count"], value["llama.attention.head_count_kv"]) == (4, 2)
    assert value["tokenizer.ggml.pre"] == "gpt-2" and value["tokenizer.chat_template"] == "{{ messages }}"
    assert value["tokenizer.ggml.eos_token_id"] == 2 and value["tokenizer.ggml.eot_token_id"] == 0
    assert value["tokenizer.ggml.padding_token_id"] == 0 and value["tokenizer.ggml.add_bos_token"] is False
    assert value["tokenizer.ggml.tokens"][: len(vocab)] == sorted(vocab, key=vocab.get)
    assert value["tokenizer.ggml.tokens"][len(vocab) :] == [f"[PAD{i}]" for i in range(len(vocab), 512)]
    types_of = value["tokenizer.ggml.token_type"]
    assert types_of[:4] == [3, 3, 3, 1] and types_of[len(vocab) :] == [5] * (512 - len(vocab))


def test_llama_3_scaling_is_written_as_transformers_computes_it() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    model = tiny_model(head_dim=64, rope_parameters=rope, max_position_embeddings=131072)
    name, factors = next(tensors(model))
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 5e5 ** -(np.arange(0, 64, 2) / 64)
    assert name == "rope_freqs.weight" and factors.max() == 8
    np.testing.assert_allclose(plain / factors, frequencies.numpy(), rtol=1e-5)


def test_query_rows_are_interleaved() -> None:
    rows = np.arange(16)[:, None] * np.ones((1, 3))
    assert interleave(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_reading_back_passes_over_the_vocabulary_and_over_nothing_else(tmp_path: Path) -> None:
    path = gguf_of(tiny_model(), tmp_path, sentencepiece_tokenizer_with_template())
    whole, quick = gguf.GGUFReader(path), TensorReader(path)
    assert {type(field.contents()) for field in whole.fields.values()} >= {list, str, int}
    lists = {name for name, field in whole.fields.items() if isinstance(field.contents(), list)}
    assert {"tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"} <= lists
    assert whole.fields.keys() == quick.fields.keys()
    for name in whole.fields.keys() - lists:
        assert quick.fields[name].contents() == whole.fields[name].contents(), name
    assert [tensor.name for tensor in quick.tensors] == [tensor.name for tensor in whole.tensors]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(quick.tensors, whole.tensors, strict=True))


def test_reading_back_finds_a_wrong_tensor(tmp_path: Path) -> None:
    model = tiny_model()
    path = gguf_of(model, tmp_path, quantization="q8_0")
    assert 0.5 < compare(path, model) <= 1
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.001
    with pytest.raises(GGUFError, match=r"blk\.1\.ffn_up\.weight is"):
        compare(path, model)
    with pytest.raises(GGUFError, match=r"output\.weight"):
        compare(path, tiny_model(tie_word_embeddings=True))


def test_a_gguf_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    with pytest.raises(GGUFError, match="range of float16: choose q8_0"):
        gguf_of(model, tmp_path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(GGUFError, match="not finite"):
        gguf_of(model, tmp_path, quantization="q8_0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arch, config, message",
    [
        ("gpt2", {}, "llama, mistral, mixtral"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, "sliding-window"),
        ("llama", {"mlp_bias": True}, "feed-forward"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "alpha": 2}}, "alpha"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 7.0}},
            "beta_fast",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(arch: str, config: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=message):
        gguf_of(tiny_model(arch, **config), tmp_path)


def test_refusals_come_before_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_base(tmp_path / "gpt2", "gpt2")
    monkeypatch.setattr(merging, "load_merged", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match="cannot be written as GGUF"):
        export(monkeypatch, folder, "--output", tmp_path / "out", "--gguf", "f16")


def test_an_unknown_way_of_cutting_text_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(GGUFError, match="no known name in llama.cpp"):
        vocabulary(tokenizer, 512)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert vocabulary(tokenizer, 512).pre == "smollm"
    with pytest.raises(GGUFError, match="embedding rows"):
        vocabulary(tokenizer, 100)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: words begin with U+2581, unknown characters are spelled in bytes, <s> is put in front."""
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    spelled = [AddedToken(f"<0x{i:02X}>", special=False) for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=specials + spelled, show_progress=False)
    backend.train_from_iterator(CORPUS * 3, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are ordinary tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sentencepiece_tokenizer_with_template() -> PreTrainedTokenizerFast:
    tokenizer = sentencepiece_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def test_a_space_goes_where_most_prompts_have_one() -> None:
    tokenizer = sentencepiece_tokenizer()
    for prompts, space, differ in (
        (["What? "], True, 0),
        (["<s>What? "], False, 0),
        (["What? </s>", "What? </s>Rest."], True, 1),
        (["<s>What? </s>Rest.", "What? </s>Rest."], False, 1),
    ):
        vocab = vocabulary(tokenizer, 512, prompts)
        assert vocab.space_prefix == space
        assert (f"cut {differ} of 2 prompts" in vocab.note) if differ else vocab.note == ""


TEXTS = ["Name three fresh juices.</s>", "感冒 2024, naïve 🙂?", "see a doctor  if it lasts", "x\n\ty"]


def test_a_sentencepiece_tokenizer_survives(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer_with_template()
    gguf_of(tiny_model(), tmp_path, tokenizer, writes_bos=True)
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        expected = tokenizer.encode(text, add_special_tokens=False)
        assert found.encode(text, add_special_tokens=False) == expected
    assert any(3 <= token < 259 for token in tokenizer.encode(TEXTS[1]))
    value = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert value["tokenizer.ggml.model"] == "llama" and value["tokenizer.ggml.add_space_prefix"] is True
    assert value["tokenizer.ggml.add_bos_token"] is True and value["tokenizer.ggml.bos_token_id"] == 1
    assert value["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6]


@pytest.mark.skipif(transformers.__version__.startswith("5.17."), reason="its GGUF reader wants a BOS token")
def test_a_byte_level_tokenizer_survives(tmp_path: Path) -> None:
    gguf_of(tiny_model(), tmp_path)
    found, expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"), tiny_tokenizer()
    for text in [*TEXTS, "<|im_start|>user\nHi.<|im_end|>\n"]:
        assert found.encode(text) == expected.encode(text)
    assert found.chat_template == get_conv_template("qwen").jinja()


def test_prompts_that_are_cut_otherwise_are_said(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = []

    def write(path: Path, *_: object, prompts: list[str], **__: object) -> tuple[float, str]:
        asked.append(prompts)
        path.touch()
        return 0.5, "two of them"

    monkeypatch.setattr(gguf_export, "write_gguf", write)
    export(monkeypatch, run, "--output", tmp_path / "out", "--gguf", "f16")
    assert "\nnote: two of them\n" in capsys.readouterr().out
    assert len(asked[0]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name, pre", [("qwen2", "qwen2"), ("llama3", "llama-bpe"), ("llama2", "default")])
def test_real_tokenizers_are_recognised(shared: Path, tmp_path: Path, name: str, pre: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    rows = max(tokenizer.get_vocab().values()) + 1
    vocab = vocabulary(tokenizer, rows)
    assert vocab.pre == pre and len(vocab.tokens) == len(vocab.types) == rows
    assert bool(vocab.scores) == (name == "llama2") != bool(vocab.merges)
