"""Writing a model as one GGUF file (llama.cpp, Ollama, LM Studio), and reading it back.

Architectures are those whose every tensor and key are known to be read the same way by llama.cpp
(gguf_architectures.py). The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from preference.serve.gguf_architectures import (
    ARCHITECTURES,
    check_supported,
    head_dim,
    rope_of,
    window_of,
    write_hyperparameters,
)
from preference.serve.gguf_tokenizer import GGUFError, vocabulary, write_tokenizer
from preference.serve.gguf_types import TYPES, allowed, check_quantizer, rounded, type_of


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
    config = model.config
    check_quantizer(quantization)
    writer = GGUFWriter(str(partial), gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type].gguf])
    try:
        writer.add_name(name)
        writer.add_file_type(TYPES[quantization][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_hyperparameters(writer, config)
        vocab = vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], prompts)
        write_tokenizer(writer, tokenizer, vocab, stop_ids, writes_bos)
        for tensor_name, tensor in tensors(model):
            kind = type_of(tensor_name, tensor.shape, quantization, config)
            dtype = {GGMLQuantizationType.F16: np.float16, GGMLQuantizationType.F32: np.float32}.get(kind, np.uint8)
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind) if dtype == np.uint8 else tensor.shape
            size = math.prod(shape) * np.dtype(dtype).itemsize
            writer.add_tensor_info(tensor_name, shape, np.dtype(dtype), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, tensor in tensors(model):  # one at a time, so that memory stays flat
            kind = type_of(tensor_name, tensor.shape, quantization, config)
            writer.write_tensor_data(_quantized(tensor_name, tensor, kind))
        writer.close()
        error = compare(partial, model)
        partial.replace(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    window = window_of(config)
    note = f"its attention looks {window} tokens back, which llama.cpp cannot: its context ends there" if window else ""
    return error, "; ".join(filter(None, (vocab.note, note)))


def tensors(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF name, float32 array) of each tensor as it is to be written; a tied output head is left out.

    Raises:
        GGUFError: a parameter that has no name in this architecture.
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture.gguf, config.num_hidden_layers)
    rope = rope_of(config)
    if rope["rope_type"] == "llama3":
        yield "rope_freqs.weight", _llama3_factors(rope, head_dim(config))
    for parameter, value in model.state_dict().items():
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.detach().to(torch.float32).cpu().numpy()
        if ".mlp.experts." in parameter:
            yield from _experts(parameter, array)
            continue
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise GGUFError(f"parameter {parameter} has no place in GGUF's architecture {architecture.gguf.name}")
        if architecture.interleaved and ".q_proj." in parameter:
            array = interleave(array, config.num_attention_heads)
        elif architecture.interleaved and ".k_proj." in parameter:
            array = interleave(array, config.num_key_value_heads)
        yield name, array + np.float32(architecture.shift) if parameter.endswith("norm.weight") else array


def _experts(parameter: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Weights [E, rows, columns] of all experts of a layer; gate and up stand on each other in transformers."""
    layer, kind = parameter.split(".")[2], parameter.rpartition(".")[2]
    if kind == "down_proj":
        yield f"blk.{layer}.ffn_down_exps.weight", array
    elif kind == "gate_up_proj":
        half = array.shape[1] // 2
        yield f"blk.{layer}.ffn_gate_exps.weight", array[:, :half]
        yield f"blk.{layer}.ffn_up_exps.weight", array[:, half:]
    else:
        raise GGUFError(f"parameter {parameter} has no place in GGUF")


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


def _quantized(name: str, tensor: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    if not np.isfinite(tensor).all():
        raise GGUFError(f"tensor {name} holds numbers that are not finite")
    if kind == GGMLQuantizationType.F16 and np.abs(tensor).max(initial=0) > np.finfo(np.float16).max:
        raise GGUFError(f"tensor {name} holds numbers beyond the range of float16: choose q8_0")
    return rounded(tensor, kind)


class TensorReader(GGUFReader):
    """Passes over lists, which are the vocabulary: read one by one, 150,000 tokens take seconds, and no tensor does."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = struct.unpack_from("<IQ", self.data, orig_offs)
        start = end = orig_offs + struct.calcsize("<IQ")
        if kind == GGUFValueType.STRING:
            for _ in range(count):
                end += 8 + struct.unpack_from("<Q", self.data, end)[0]
        else:
            end += count * np.dtype(self.gguf_scalar_to_np[GGUFValueType(kind)]).itemsize
        return end - orig_offs, [self.data[start:end]], [], [GGUFValueType.ARRAY, GGUFValueType(kind)]


def compare(path: str | os.PathLike[str], model: Any) -> float:
    """Read a GGUF file back and compare each tensor with the model's; the largest error, as a share of its limit.

    The limit is what the type allows (gguf_types.allowed): half a step of 1/127 of the largest of 32 numbers for q8_0,
    2^-11 of each number for f16, nothing for f32.

    Raises:
        GGUFError: a tensor is missing, is too much, or is off by more than that.
    """
    found = {tensor.name: tensor for tensor in TensorReader(path).tensors}
    worst = 0.0
    for name, expected in tensors(model):
        if name not in found:
            raise GGUFError(f"{path}: tensor {name} is missing")
        tensor = found.pop(name)
        actual = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        share = float((np.abs(actual - expected) / allowed(expected, tensor.tensor_type)).max(initial=0))
        if not share <= 1:
            raise GGUFError(
                f"{path}: tensor {name} is {share:.3g} times as far off as {tensor.tensor_type.name} allows"
            )
        worst = max(worst, share)
    if found:
        raise GGUFError(f"{path}: tensors that the model does not have: {', '.join(found)}")
    return worst
