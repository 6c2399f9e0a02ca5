"""Writing a model as one GGUF file (llama.cpp, Ollama, LM Studio), and reading it back.

Architectures are those whose every tensor and key are known to be read the same way by llama.cpp: Llama (Mistral is
written as one), Qwen2 and Qwen3, dense. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, GGUFWriter

from preference.serve.gguf_tokenizer import GGUFError, vocabulary, write_tokenizer

# transformers' model_type: GGUF's architecture, and whether query and key rows are reordered for interleaved rotation
ARCHITECTURES = {
    "llama": (MODEL_ARCH.LLAMA, True),
    "mistral": (MODEL_ARCH.LLAMA, True),
    "qwen2": (MODEL_ARCH.QWEN2, False),
    "qwen3": (MODEL_ARCH.QWEN3, False),
}
TYPES = {
    "q8_0": (GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "f16": (GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
}
# The parameters of rotary embeddings that GGUF has a place for, by type
_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "truncate"}
_ROPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}


def check_supported(config: Any) -> None:
    """Raises GGUFError, with the list of what can be written, if a model of this config cannot be."""
    if config.model_type not in ARCHITECTURES:
        raise GGUFError(
            f"a model of type {config.model_type} cannot be written as GGUF here; what can be: "
            f"{', '.join(ARCHITECTURES)}. llama.cpp's convert_hf_to_gguf.py reads the exported folder and knows more"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    sliding = kinds != {"full_attention"} or (config.model_type == "mistral" and config.sliding_window)
    rope = _rope(config)
    for refused, what in (
        (sliding, "sliding-window attention"),
        (getattr(config, "mlp_bias", False), "biases in the feed-forward layers"),
        (config.model_type == "qwen3" and config.attention_bias, "biases in Qwen3's attention"),
        (config.hidden_act != "silu", f"the activation {config.hidden_act}"),
        (rope.get("partial_rotary_factor", 1.0) != 1.0, "rotary embeddings of a part of each head"),
        (rope["rope_type"] not in _ROPE_KEYS, f"rotary embeddings of type {rope['rope_type']}"),
    ):
        if refused:
            raise GGUFError(f"{what} cannot be written for a model of type {config.model_type}")
    unknown = {key for key, value in rope.items() if value is not None} - _COMMON_KEYS - _ROPE_KEYS[rope["rope_type"]]
    if unknown:
        raise GGUFError(f"rotary embeddings with {', '.join(sorted(unknown))} cannot be written")


def _rope(config: Any) -> dict[str, Any]:
    """The rotary parameters with their type; older configs keep the base frequency beside them."""
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", getattr(config, "rope_theta", 10000.0))
    return rope


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def write_gguf(
    path: str | os.PathLike[str],
    model: Any,
    tokenizer: Any,
    *,
    quantization: str,
    stop_ids: list[int],
    writes_bos: bool,
    name: str,
    prompts: Sequence[str] = (),
) -> tuple[float, str]:
    """Write `model` (float32 weights, on the CPU) to `path` and read it back; it appears there whole or not at all.

    `quantization` is one of TYPES and concerns matrices; vectors stay float32, as llama.cpp wants them. `stop_ids` end
    an answer; `writes_bos` says whether the chat template writes a BOS; `prompts` are some that it writes. Returns the
    largest error found by `compare`, and what there is to say of how prompts are cut.

    Raises:
        GGUFError: the architecture, the rotary embedding or the tokenizer cannot be written.
    """
    check_supported(model.config)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    architecture, _ = ARCHITECTURES[model.config.model_type]
    writer = GGUFWriter(str(partial), gguf.MODEL_ARCH_NAMES[architecture])
    try:
        writer.add_name(name)
        writer.add_file_type(TYPES[quantization][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _write_hyperparameters(writer, model.config)
        vocab = vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], prompts)
        write_tokenizer(writer, tokenizer, vocab, stop_ids, writes_bos)
        for tensor_name, tensor in tensors(model):
            kind = _type_of(tensor, quantization)
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind) if kind == TYPES["q8_0"][0] else tensor.shape
            dtype = {GGMLQuantizationType.F16: np.float16, GGMLQuantizationType.F32: np.float32}.get(kind, np.uint8)
            size = math.prod(shape) * np.dtype(dtype).itemsize
            writer.add_tensor_info(tensor_name, shape, np.dtype(dtype), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, tensor in tensors(model):  # one at a time, so that memory stays flat
            writer.write_tensor_data(_quantized(tensor_name, tensor, _type_of(tensor, quantization)))
        writer.close()
        error = compare(partial, model)
        partial.replace(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return error, vocab.note


def _write_hyperparameters(writer: GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)


def tensors(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF name, float32 array) of each tensor as it is to be written; a tied output head is left out.

    Raises:
        GGUFError: a parameter that has no name in this architecture.
    """
    config = model.config
    architecture, reordered = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    rope = _rope(config)
    if rope["rope_type"] == "llama3":
        yield "rope_freqs.weight", _llama3_factors(rope, head_dim(config))
    for parameter, value in model.state_dict().items():
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise GGUFError(f"parameter {parameter} has no place in GGUF's architecture {architecture.name}")
        array = value.detach().to(torch.float32).cpu().numpy()
        if reordered and ".q_proj." in parameter:
            array = interleave(array, config.num_attention_heads)
        elif reordered and ".k_proj." in parameter:
            array = interleave(array, config.num_key_value_heads)
        yield name, array


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection, from transformers' order (the two halves of a head) to llama.cpp's (pairs)."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def _llama3_factors(rope: dict[str, Any], dim: int) -> np.ndarray:
    """By what llama.cpp divides each frequency: Llama 3.1's scaling, as transformers computes it."""
    frequency = rope["rope_theta"] ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    wavelength = 2 * math.pi / frequency
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _type_of(tensor: np.ndarray, quantization: str) -> GGMLQuantizationType:
    if tensor.ndim < 2:
        return GGMLQuantizationType.F32
    fits = quantization != "q8_0" or tensor.shape[-1] % gguf.GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0][0] == 0
    return TYPES[quantization][0] if fits else GGMLQuantizationType.F16


def _quantized(name: str, tensor: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    if not np.isfinite(tensor).all():
        raise GGUFError(f"tensor {name} holds numbers that are not finite")
    if kind == GGMLQuantizationType.F16 and np.abs(tensor).max(initial=0) > np.finfo(np.float16).max:
        raise GGUFError(f"tensor {name} holds numbers beyond the range of float16: choose q8_0")
    return gguf.quantize(tensor, kind)


def compare(path: str | os.PathLike[str], model: Any) -> float:
    """Read a GGUF file back and compare each tensor with the model's; the largest error, as a share of its limit.

    The limit is what the type allows: half a step of 1/127 of the largest of 32 numbers for q8_0, 2^-11 of each number
    for f16, nothing for f32 (and what rounding the scale itself adds).

    Raises:
        GGUFError: a tensor is missing, is too much, or is off by more than that.
    """
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    worst = 0.0
    for name, expected in tensors(model):
        if name not in found:
            raise GGUFError(f"{path}: tensor {name} is missing")
        tensor = found.pop(name)
        actual = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        share = float((np.abs(actual - expected) / _allowed(expected, tensor.tensor_type)).max(initial=0))
        if not share <= 1:
            raise GGUFError(
                f"{path}: tensor {name} is {share:.3g} times as far off as {tensor.tensor_type.name} allows"
            )
        worst = max(worst, share)
    if found:
        raise GGUFError(f"{path}: tensors that the model does not have: {', '.join(found)}")
    return worst


def _allowed(expected: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The largest error that rounding to `kind` can make, for each number."""
    tiny = 1e-30
    if kind == GGMLQuantizationType.Q8_0:
        blocks = np.abs(expected).reshape(*expected.shape[:-1], -1, 32).max(axis=-1)
        # half a step; the scale itself is float16: 2^-11 of it, or its smallest number where it is subnormal
        limit = blocks * (0.5 / 127 + 2.0**-11) * 1.001 + 127 * 2.0**-25
        return np.repeat(limit, 32, axis=-1) + tiny
    if kind == GGMLQuantizationType.F16:
        return np.abs(expected) * 2.0**-11 * 1.001 + 2.0**-25
    return np.full_like(expected, tiny)
