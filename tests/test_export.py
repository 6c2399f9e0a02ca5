"""Exporting: the merged model answers as the adapted one, files are whole, GGUF and Modelfile say the same."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gotemplate import render
from peft import LoraModel, PeftModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from tuned import make_base, make_run, write_run_files

import export_model
from conversation import FAMILIES, ConversationError, fold_system_text, get_conv_template
from preference import merging
from preference.export_card import hub_id
from preference.gguf_export import compare, interleave, tensors, write_gguf
from preference.gguf_tokenizer import GGUFError, vocabulary
from preference.hardware import Hardware
from preference.loading import LoadingError, Source, find_source, load_template, load_tokenizer
from preference.merging import Probes, cast, load_merged, probes
from preference.ollama import family_of, go_template, modelfile, writes_bos
from preference.starter import STARTER_MODEL
from tiny import CORPUS, tiny_model, tiny_tokenizer

IDS = torch.arange(3, 63)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_base(tmp_path_factory.mktemp("models") / "base")
    (folder / "LICENSE").write_text("Apache")
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("outputs") / "run", base)


def export(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["export_model.py", *map(str, words)])
    export_model.main()


@torch.no_grad()
def logits(model: object) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def adapted(run: Path, base: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run).eval())


# ---- merging


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}])
def test_the_merged_model_answers_as_the_adapted_one(
    base: Path, tmp_path: Path, lora: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run", base, **lora)
    export(monkeypatch, folder, "--output", tmp_path / "out")
    expected = adapted(folder, base)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (found - expected).abs().max() < 1e-5
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1


def test_weights_are_merged_in_float32_and_then_rounded(
    run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(monkeypatch, run, "--output", tmp_path / "out", "--dtype", "bfloat16")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.dtype == torch.bfloat16
    exact = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run).merge_and_unload()
    for name, weight in exact.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight.bfloat16()), name
    expected, rounded = adapted(run, base).log_softmax(-1), logits(found.float()).log_softmax(-1)
    assert (expected.exp() * (expected - rounded)).sum(-1).mean() < 1e-3


def questions_of(source: Source) -> Probes:
    tokenizer = load_tokenizer(source)
    return probes(load_template(source, tokenizer)[0], tokenizer)


def test_what_merging_and_rounding_change_is_measured(run: Path) -> None:
    source = find_source(str(run))
    questions = questions_of(source)
    model, exact, merged = load_merged(source, questions)
    assert merged.computed_in == "float64" and 0 < merged.logits < 1e-5
    assert cast(model, torch.float32, questions, exact) is None
    rounding, computing = cast(model, torch.bfloat16, questions, exact)
    assert 1e-4 < rounding.logits < 0.5 and 1e-8 < rounding.kl < 1e-3
    assert 1e-4 < computing.logits < 0.5 and rounding.rms < 2 * computing.rms
    assert cast(model.float(), torch.bfloat16, questions, exact) is None  # it is rounded once


def test_float64_is_computed_in_throughout() -> None:
    model, questions = tiny_model(head_dim=10), [(list(range(3, 40)), 5)]
    first = [merging.logits_of(model, questions, dtype) for dtype in (torch.float64, torch.float32)]
    order = torch.randperm(32)
    for weight in model.parameters():  # the same model with its channels in another order, so that sums round otherwise
        for dim, size in enumerate(weight.shape):
            weight.data = weight.data.index_select(dim, order) if size == 32 else weight.data
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    second = [merging.logits_of(model, questions, dtype) for dtype in (torch.float64, torch.float32)]
    exact, rounded = ((one - two).abs().max() for one, two in zip(first, second, strict=True))
    assert exact < 1e-14 and rounded > 1e-8
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_float32_is_used_where_float64_cannot_be(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [(list(range(3, 40)), 5)]
    assert merging.exact_logits(tiny_model(), questions).dtype == torch.float64
    assert merging.exact_logits(tiny_model("mixtral"), questions).dtype == torch.float32
    assert "measured in float32 (Expected" in capsys.readouterr().out
    monkeypatch.setattr(merging, "detect", lambda **_: Hardware("cpu", "CPU", 500_000, False))
    assert merging.exact_logits(tiny_model(), questions).dtype == torch.float32
    assert "measured in float32 (too little memory)" in capsys.readouterr().out


@pytest.mark.parametrize("change", [0, 1 + 1e-5])
def test_a_merge_that_changes_answers_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch, change: float) -> None:
    merge = LoraModel.merge_and_unload

    def wrong(self: LoraModel, **options: object) -> object:
        if not change:
            return self.unload()
        model = merge(self, **options)
        model.model.layers[0].mlp.up_proj.weight.data *= change  # little enough for two float32 forwards to hide it
        return model

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    source = find_source(str(run))
    with pytest.raises(LoadingError, match="answers otherwise"):
        load_merged(source, questions_of(source))


def test_weights_that_a_type_cannot_hold_are_refused(run: Path) -> None:
    source = find_source(str(run))
    questions = questions_of(source)
    model, exact, _ = load_merged(source, questions)
    model.model.layers[0].input_layernorm.weight.data[0] = 1e5  # float16 ends at 65,504
    with pytest.raises(LoadingError, match="rounded to float16 answer otherwise .*--dtype float32"):
        cast(model, torch.float16, questions, exact)


def test_quantized_weights_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "gptq"}
    monkeypatch.setattr(merging, "load_tuned_model", lambda *_: model)
    with pytest.raises(LoadingError, match="unquantized"):
        load_merged(find_source(str(run)), [])


# ---- the folder


def test_the_folder_holds_all_that_serving_needs(
    run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(monkeypatch, run, "--output", out, "--max_shard_size", "50KB")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert (logits(AutoModelForCausalLM.from_pretrained(out)) - adapted(run, base)).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(out).chat_template == get_conv_template("qwen").jinja()
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 0]
    assert (out / "LICENSE").read_text() == "Apache"
    card = (out / "README.md").read_text()
    assert re.match(r"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- orpo\n---\n", card)
    assert "7 rows read, 5 kept" in card and "2 empty_answer" in card and "| train.jsonl | 5 | 3 |" in card
    assert "| data/more.jsonl | 2 | 2 |" in card
    assert "| eval_rewards/accuracies | 0.875 |" in card and "/home/someone" not in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_run_and_sampling_values_are_exported(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    tiny_model("qwen2", dtype=torch.bfloat16).save_pretrained(folder)
    write_run_files(folder, str(base), "chatml")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.6}))
    export(monkeypatch, folder, "--output", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.dtype == torch.bfloat16
    assert torch.equal(logits(found), logits(AutoModelForCausalLM.from_pretrained(folder)))
    assert found.generation_config.temperature == 0.6
    assert (tmp_path / "out" / "LICENSE").read_text() == "Apache"  # the base's, as the run's folder has none


def test_nothing_is_overwritten_unasked(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    for words, message in (((), "not empty"), (("--overwrite",), "holds no model")):
        with pytest.raises(SystemExit, match=message):
            export(monkeypatch, run, "--output", out, *words)
    assert [path.name for path in out.iterdir()] == ["letter.txt"]
    (out / "config.json").write_text("{}")
    (out / "model-00001-of-00002.safetensors").write_text("old")
    export(monkeypatch, run, "--output", out, "--overwrite")
    assert not (out / "letter.txt").exists() and not list(out.glob("model-*"))
    assert (out / "model.safetensors").is_file() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_read_is_never_replaced(run: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for output in (run, base, base.parent):
        with pytest.raises(SystemExit, match="which is read"):
            export(monkeypatch, run, "--output", output, "--overwrite")
    assert (base / "model.safetensors").is_file() and (run / "adapter_model.safetensors").is_file()


def test_a_failed_export_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LoadingError("no")

    monkeypatch.setattr(merging, "load_merged", fail)
    with pytest.raises(SystemExit, match="export_model.py: no"):
        export(monkeypatch, run, "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_base_models_in_the_card_are_hub_ids(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_id(STARTER_MODEL) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_id("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert [hub_id(name) for name in (None, str(base), "/data/models/x", "../x/y", "gpt2")] == [None] * 5
    monkeypatch.chdir(base.parents[1])
    assert hub_id(f"{base.parent.name}/base") is None  # a folder here, though it looks like an id


@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
def test_pushing_is_private_and_only_when_asked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: str
) -> None:
    calls = []

    class Api:
        def create_repo(self, name: str, **options: object) -> None:
            calls.append((name, options.get("private", options.get("visibility"))))

        def upload_folder(self, repo_id: str, folder_path: object, commit_message: str) -> None:
            calls.append((repo_id, Path(folder_path).name))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setitem(sys.modules, "modelscope", types.ModuleType("modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope.hub", types.ModuleType("modelscope.hub"))
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", types.SimpleNamespace(HubApi=Api))
    export(monkeypatch, run, "--output", tmp_path / "a")
    assert calls == []
    export(monkeypatch, run, "--output", tmp_path / "b", "--push_to_hub", "me/model", "--hub", hub)
    assert calls == [("me/model", True if hub == "huggingface" else "private"), ("me/model", "b")]


# ---- GGUF


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
    ("arch", "config"),
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
    ("arch", "config", "message"),
    [
        ("gpt2", {}, "llama, mistral, qwen2, qwen3"),
        ("gemma2", {}, "llama, mistral, qwen2, qwen3"),
        ("mistral", {"sliding_window": 64}, "sliding-window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, "sliding-window"),
        ("llama", {"mlp_bias": True}, "feed-forward"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
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


TEXTS = ["Name three fresh juices.</s>", "感冒 2024, naïve 🙂?", "see a doctor  if it lasts", "x\n\ty"]


def test_a_sentencepiece_tokenizer_survives(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
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


def test_a_byte_level_tokenizer_survives(tmp_path: Path) -> None:
    gguf_of(tiny_model(), tmp_path)
    found, expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"), tiny_tokenizer()
    for text in [*TEXTS, "<|im_start|>user\nHi.<|im_end|>\n"]:
        assert found.encode(text) == expected.encode(text)
    assert found.chat_template == get_conv_template("qwen").jinja()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pre"), [("qwen2", "qwen2"), ("llama3", "llama-bpe"), ("llama2", "default")])
def test_real_tokenizers_are_recognised(shared: Path, tmp_path: Path, name: str, pre: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    rows = max(tokenizer.get_vocab().values()) + 1
    vocab = vocabulary(tokenizer, rows)
    assert vocab.pre == pre and len(vocab.tokens) == len(vocab.types) == rows
    assert bool(vocab.scores) == (name == "llama2") != bool(vocab.merges)


# ---- Ollama

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


# ---- a real model


@pytest.mark.slow
def test_the_starter_model_is_exported_to_gguf(
    starter_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "smol"
    export(monkeypatch, starter_model, "--output", out, "--gguf", "q8_0", "--dtype", "bfloat16")
    said = capsys.readouterr().out
    assert "smol-q8_0.gguf: read back" in said and "Prompts as in training (template smollm2)" in said
    assert (out / "Modelfile").read_text().endswith('PARAMETER stop "<|im_end|>"\n')
    source = find_source(str(starter_model))
    tokenizer = load_tokenizer(source)
    questions = probes(load_template(source, tokenizer)[0], tokenizer)
    exact = AutoModelForCausalLM.from_pretrained(starter_model, dtype=torch.float32)
    found = AutoModelForCausalLM.from_pretrained(out, gguf_file="smol-q8_0.gguf", dtype=torch.float32)
    read_back, expected = merging.logits_of(found, questions), merging.logits_of(exact, questions)
    assert merging.difference(expected, read_back).kl < 5e-3
    with torch.no_grad():  # the rest is the format's own rounding, and nothing else
        for weight in exact.parameters():
            if weight.ndim == 2:
                q8 = gguf.GGMLQuantizationType.Q8_0
                weight.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), q8), q8)))
    assert (merging.logits_of(exact, questions) - read_back).abs().max() < 1e-3
    read = AutoTokenizer.from_pretrained(out, gguf_file="smol-q8_0.gguf")
    for text in [*TEXTS, tokenizer.decode(questions[0][0])]:
        assert read.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
