"""Every architecture that GGUF is written for, in llama.cpp itself: prompts, tokens and what comes next."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from exported import export
from gguf import GGMLQuantizationType as Q
from peft import PeftModel
from test_gguf import gguf_of
from test_llama_cpp import Llama, llama  # noqa: F401  a fixture
from transformers import AutoModelForCausalLM
from tuned import make_base, make_run

from conversation import get_conv_template
from preference.serve import gguf_types
from preference.serve.gguf_adapter import write_gguf_adapter
from preference.serve.gguf_tokenizer import GGUFError
from preference.serve.gguf_types import TYPES, rounded, type_of
from tiny import tiny_model, tiny_tokenizer

needs_llama = pytest.mark.skipif(not find_spec("xllamacpp"), reason="no llama.cpp: pip install -r requirements-dev.txt")
WIDE = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, head_dim=64)  # k-quants come in blocks of 256
HEADS = {"head_dim": 64, "query_pre_attn_scalar": 64}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {"num_local_experts": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True},
    ),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {**HEADS, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {**HEADS, "sliding_window": 8, "num_hidden_layers": 6}),
    "phi3": ("phi3", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "granite": (
        "granite",
        {"attention_multiplier": 0.1, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 0.5},
    ),
    "olmo2": ("olmo2", {}),
    "internlm3": ("internlm3", {}),
}  # fmt: skip
MESSAGES = [{"role": "user", "content": "Name a juice."}, {"role": "assistant", "content": "Apple 苹果."}]
MESSAGES += [{"role": "user", "content": "And another one, please?"}]


def model_of(name: str) -> Any:
    """Weights of the sizes that training leaves, none of them such that a mistake in it would not show."""
    arch, config = ARCHITECTURES[name]
    model = tiny_model(arch, **(WIDE | config))
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.3)
            elif "gemma" in name:  # its embeddings are multiplied by 16: the layers count for as much
                weight.mul_(12 if "layers" in parameter else 2)
            elif "lm_head" in parameter or ("embed" in parameter and model.config.tie_word_embeddings):
                weight.mul_(4)
            else:
                weight.mul_(3)
            in_16_bits(weight)
    return model


def in_16_bits(weight: torch.Tensor) -> None:
    """Exact in float16, so that a file of that type loses nothing."""
    weight.copy_(weight.half())


def is_text(tokenizer: Any, logps_V: torch.Tensor) -> bool:
    """Whether the likeliest tokens are whole characters and no stop: with others llama.cpp gives no probabilities."""
    return all(token > 2 and tokenizer.decode([token]).isascii() for token in logps_V.topk(2).indices.tolist())


def kl(expected_NV: torch.Tensor, found_NV: torch.Tensor) -> float:
    """Mean divergence in nats a token."""
    return float((expected_NV.exp() * (expected_NV - found_NV)).sum(-1).mean())


@needs_llama
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_llama_cpp_computes_what_the_model_does(name: str, tmp_path: Path, llama: Llama) -> None:  # noqa: F811
    model, tokenizer = model_of(name), tiny_tokenizer()
    tokenizer.chat_template = get_conv_template("qwen").jinja()
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(expected, add_special_tokens=False)
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    found = {}
    for quantization in ("f16", "q4_k_m"):
        (tmp_path / quantization).mkdir()
        call = llama(gguf_of(model, tmp_path / quantization, tokenizer, quantization))
        if quantization == "f16":
            prompt = call("apply-template", messages=MESSAGES)["prompt"]
            assert prompt == expected
            assert call("tokenize", content=prompt, add_special=True, parse_special=True)["tokens"] == ids
        places = [p for p in range(8, len(ids) + 1) if is_text(tokenizer, logps[p - 1])][-2:]
        rows = [next_logps(call, ids[:place]) for place in places]
        found[quantization] = kl(logps[[place - 1 for place in places]], torch.stack(rows))
    spread = float(logps[-1].std())
    assert spread > 0.5  # a distribution in which something would show
    assert found["f16"] < 1e-4 < found["q4_k_m"] < 0.3, found
    if find_spec("cyllama"):  # the same bytes, so the same divergence
        assert same_as_llama_cpps(tmp_path / "f16" / "m.gguf", tmp_path / "q4_k_m" / "m.gguf", "q4_k_m")


def same_as_llama_cpps(whole: Path, written: Path, quantization: str) -> bool:
    """Whether a file that the export has written holds what llama.cpp's own quantiser makes of that in 16 bits."""
    from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize

    params = LlamaModelQuantizeParams()
    params.ftype, params.nthread = {"q4_0": 2, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}[quantization], 1
    model_quantize(str(whole), str(whole.with_name("theirs.gguf")), params)
    ours, theirs = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        for file in (written, whole.with_name("theirs.gguf"))
    )
    return ours.keys() == theirs.keys() and all(
        ours[name].tensor_type == theirs[name].tensor_type and np.array_equal(ours[name].data, theirs[name].data)
        for name in ours
    )


@needs_llama
@pytest.mark.skipif(not find_spec("cyllama"), reason="no quantiser of llama.cpp: pip install -r requirements-dev.txt")
def test_every_type_is_what_llama_cpps_quantiser_makes(tmp_path: Path) -> None:
    """Of a model of more layers than one, some of which get more bits, and of rows that fill no blocks of 256."""
    for width, types in ((256, ("q4_0", "q4_k_m", "q5_k_m", "q6_k")), (288, ("q4_k_m",))):
        model = tiny_model(hidden_size=width, intermediate_size=width, num_hidden_layers=8)
        with torch.no_grad():
            for weight in model.parameters():
                in_16_bits(weight)
        whole = tmp_path / str(width)
        whole.mkdir()
        gguf_of(model, whole)
        for quantization in types:
            written = gguf_of(model, tmp_path, quantization=quantization)
            assert same_as_llama_cpps(whole / "m.gguf", written, quantization), (width, quantization)


def next_logps(call: Callable[..., Any], ids: list[int]) -> torch.Tensor:
    """[V] log-probabilities of what follows."""
    answer = call("completion", prompt=ids, n_predict=1, temperature=0, n_probs=512, cache_prompt=False)
    row = torch.full((512,), -torch.inf)
    for token in answer["completion_probabilities"][0]["top_logprobs"]:
        row[token["id"]] = token["logprob"]
    return row.log_softmax(-1)


@needs_llama
@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q5_0, Q.Q5_1, Q.Q4_K, Q.Q5_K, Q.Q6_K])
def test_rounding_is_llama_cpps_and_within_what_is_allowed(kind: Q) -> None:
    draw = np.random.default_rng(0)
    array = (draw.standard_normal((64, 512)) * np.exp(draw.standard_normal((64, 1)))).astype(np.float32)
    array[3], array[5, ::2], array[7] = 0, 0, np.abs(array[7])
    data = rounded(array, kind)
    error = np.abs(gguf.dequantize(data, kind) - array)
    assert (error <= gguf_types.allowed(array, kind)).all()
    bits = {Q.Q4_0: 0.11, Q.Q5_0: 0.05, Q.Q5_1: 0.05, Q.Q4_K: 0.08, Q.Q5_K: 0.04, Q.Q6_K: 0.02}
    assert np.sqrt(np.mean(error**2) / np.mean(array**2)) < bits[kind]
    if kind in (Q.Q4_0, Q.Q5_0, Q.Q5_1):  # gguf-py writes these to the bit, too
        assert (data == gguf.quantize(array, kind)).mean() > 0.999


class Config:
    """Of 16 layers."""

    model_type, num_hidden_layers, num_attention_heads, num_key_value_heads = "llama", 16, 8, 2
    tie_word_embeddings, num_local_experts = False, 0


def test_the_types_are_those_of_llama_cpps_quantiser() -> None:
    config = Config()

    def kinds(quantization: str, name: str, columns: int = 512) -> list[str]:
        layers = [f"blk.{i}.{name}.weight" if "blk" not in name and "_" in name else name for i in range(16)]
        return [type_of(layer, (64, columns), quantization, config).name for layer in layers]

    six = [i for i, kind in enumerate(kinds("q4_k_m", "attn_v")) if kind == "Q6_K"]
    assert six == [0, 1, 4, 7, 10, 13, 14, 15] == [i for i, k in enumerate(kinds("q4_k_m", "ffn_down")) if k == "Q6_K"]
    for quantization, most in (("q4_k_m", "Q4_K"), ("q5_k_m", "Q5_K"), ("q6_k", "Q6_K"), ("q4_0", "Q4_0")):
        assert {*kinds(quantization, "attn_q")} == {most}
        assert type_of("output.weight", (99, 512), quantization, config) == Q.Q6_K
        assert type_of("token_embd.weight", (99, 512), quantization, config).name == most
        assert type_of("output_norm.weight", (512,), quantization, config) == Q.F32
        assert type_of("blk.0.ffn_gate_inp.weight", (8, 512), quantization, config) == Q.F32
    assert {*kinds("q4_k_m", "attn_q", 96)} == {"Q5_0"} and {*kinds("q4_k_m", "attn_q", 90)} == {"F16"}
    assert {*kinds("q5_k_m", "attn_q", 96)} == {"Q5_1"} and {*kinds("q6_k", "attn_q", 96)} == {"Q8_0"}
    config.tie_word_embeddings, config.num_local_experts = True, 8
    assert type_of("token_embd.weight", (99, 512), "q4_k_m", config) == Q.Q6_K
    assert type_of("token_embd.weight", (99, 512), "q8_0", config) == Q.Q8_0
    assert {*kinds("q4_k_m", "attn_v")} == {*kinds("q4_k_m", "attn_k")} == {"Q8_0"}
    assert {*kinds("q4_k_m", "attn_output")} == {"Q5_K"} and {*kinds("q4_0", "attn_output")} == {"Q4_0"}


def test_without_llama_cpp_small_types_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gguf_types._ggml.cache_clear()
    monkeypatch.setattr(gguf_types.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GGUFError, match="pip install xllamacpp"):
        gguf_of(tiny_model(), tmp_path, quantization="q4_k_m")
    assert not list(tmp_path.iterdir())
    gguf_of(tiny_model(), tmp_path, quantization="q8_0")
    assert set(TYPES) == {"q4_0", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16"}


@pytest.mark.parametrize(
    "arch, config, message",
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar other than 8"),
        ("gemma2", {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, "every 2th"),
        ("gemma3_text", {"tie_word_embeddings": False, "num_hidden_layers": 6}, "output head"),
        ("smollm3", {"no_rope_layers": [0, 1]}, "left out in other layers"),
        ("internlm3", {"qkv_bias": True, "bias": True}, "biases"),
        ("phi3", {"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    arch: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(GGUFError, match=message):
        gguf_of(tiny_model(arch, **config), tmp_path)


def test_a_window_over_all_layers_ends_the_context(tmp_path: Path) -> None:
    model = tiny_model("mistral", sliding_window=64, max_position_embeddings=512)
    reader = gguf.GGUFReader(gguf_of(model, tmp_path))
    assert reader.fields["llama.context_length"].contents() == 64


@needs_llama
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_over_a_base_computes_as_it_does_here(
    rslora: bool,
    tmp_path: Path,
    llama: Llama,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = make_base(tmp_path / "base")
    run = make_run(tmp_path / "run", base, use_rslora=rslora)
    export(monkeypatch, run, "--output", tmp_path / "out", "--gguf_adapter", "--dtype", "float32")
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)
        file = gguf_of(plain, tmp_path)
        tuned = PeftModel.from_pretrained(plain, run).eval()
        ids = tiny_tokenizer().encode(
            "What should I do about a mild fever? Rest, drink water", add_special_tokens=False
        )
        logps = tuned(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        untuned = plain.eval()
    places = [p for p in range(4, len(ids) + 1) if is_text(tiny_tokenizer(), logps[p - 1])][-1:]
    assert places
    call = llama(file, tmp_path / "out" / "out-adapter.gguf")
    found = next_logps(call, ids[: places[0]])
    assert kl(logps[places[0] - 1][None], found[None]) < 1e-4
    with tuned.disable_adapter(), torch.no_grad():
        without = untuned(torch.tensor([ids])).logits[0, places[0] - 1].float().log_softmax(-1)
    assert kl(without[None], found[None]) > 1e-2  # the adapter is what makes the difference


def test_adapters_that_llama_cpp_has_no_words_for_are_refused(tmp_path: Path) -> None:
    config = tiny_model().config
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    for change, message in (
        ({"use_dora": True}, "DoRA"),
        ({"alpha_pattern": {"q_proj": 4}}, "single matrices"),
        ({"modules_to_save": ["lm_head"]}, "trained whole"),
        ({"peft_type": "IA3"}, "IA3"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(plain | change))
        with pytest.raises(GGUFError, match=message):
            write_gguf_adapter(tmp_path / "a.gguf", str(tmp_path), config)
