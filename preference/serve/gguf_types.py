"""The types of a GGUF file's tensors, and rounding to them with llama.cpp's own functions.

Which tensor gets which type is llama.cpp's choice for each file type (llama_tensor_get_type_impl and
tensor_type_fallback of src/llama-quant.cpp, without an importance matrix), so that a file is what llama-quantize makes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Q

from preference.serve.gguf_architectures import experts_of
from preference.serve.gguf_tokenizer import GGUFError

TYPES = {  # the type of most matrices, and the name of the whole
    "q4_0": (Q.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q4_k_m": (Q.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q5_k_m": (Q.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q6_k": (Q.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q8_0": (Q.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "f16": (Q.F16, LlamaFileType.MOSTLY_F16),
}
SMALLER = {Q.Q4_K: Q.Q5_0, Q.Q5_K: Q.Q5_1, Q.Q6_K: Q.Q8_0}  # for rows that blocks of 256 do not fill
BY_GGUF = {Q.Q8_0, Q.F16, Q.F32}  # what gguf-py rounds to as llama.cpp does
# The largest error of a number, as a share of the largest of its block: half a step, and what rounding the scales adds
SHARES = {Q.Q4_0: 0.14, Q.Q5_0: 0.07, Q.Q5_1: 0.07, Q.Q4_K: 0.2, Q.Q5_K: 0.1, Q.Q6_K: 0.06}


def type_of(name: str, shape: tuple[int, ...], quantization: str, config: Any) -> Q:
    """The type of a tensor of `shape` [..., columns] in a file of `quantization`."""
    if len(shape) < 2 or name.endswith(("_norm.weight", "ffn_gate_inp.weight")) or not name.endswith("weight"):
        return Q.F32
    wanted = TYPES[quantization][0]
    if quantization == "f16":
        return wanted
    wanted = _mixed(name, shape[-1], quantization, wanted, config)
    if _fits(shape[-1], wanted):
        return wanted
    wanted = SMALLER.get(wanted, wanted)
    return wanted if _fits(shape[-1], wanted) else Q.F16


def _fits(columns: int, kind: Q) -> bool:
    return columns % GGML_QUANT_SIZES[kind][0] == 0


def _mixed(name: str, columns: int, quantization: str, kind: Q, config: Any) -> Q:
    """The output, values and some down projections have more bits than the rest; layers are counted from 0."""
    output = name == "output.weight" or (name == "token_embd.weight" and config.tie_word_embeddings)
    if output:
        return Q.Q8_0 if kind == Q.Q8_0 or not _fits(columns, kind) else Q.Q6_K
    mixture, of_eight = quantization in ("q4_k_m", "q5_k_m"), experts_of(config) == 8
    if "attn_v." in name or "attn_qkv." in name:
        if of_eight:
            return Q.Q8_0
        if mixture and more_bits(name, config.num_hidden_layers):
            return Q.Q6_K
        seventy = config.num_hidden_layers == 80 and config.model_type in ("llama", "qwen2")
        grouped = config.num_key_value_heads < config.num_attention_heads or config.model_type == "qwen2"
        return Q.Q5_K if kind == Q.Q4_K and seventy and grouped else kind
    if "attn_k." in name and of_eight:
        return Q.Q8_0
    if "attn_output." in name and of_eight and quantization == "q4_k_m":
        return Q.Q5_K
    if "ffn_down" in name and mixture and more_bits(name, config.num_hidden_layers):
        return Q.Q6_K
    return kind


def more_bits(name: str, layers: int) -> bool:
    """The first and last eighth of the layers and every third between."""
    layer, eighth = int(name.split(".")[1]), layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or math.fmod(layer - eighth, 3) == 2


def check_quantizer(quantization: str) -> None:
    """Raises GGUFError where the type needs llama.cpp's functions and they are not there."""
    if TYPES[quantization][0] not in BY_GGUF:
        _ggml()


def rounded(array: np.ndarray, kind: Q) -> np.ndarray:
    """`array` (float32) as the bytes of `kind`; float types as numbers."""
    if kind in BY_GGUF:
        return gguf.quantize(array, kind)
    source = np.ascontiguousarray(array, dtype=np.float32)
    out = np.empty(gguf.quant_shape_to_byte_shape(source.shape, kind), dtype=np.uint8)
    pointers = source.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p)
    rows = source.size // source.shape[-1]
    written = _ggml()(int(kind), *pointers, 0, rows, source.shape[-1], None)
    if written != out.nbytes:
        raise GGUFError(f"llama.cpp wrote {written} bytes of {kind.name} instead of {out.nbytes}")
    return out


@lru_cache(maxsize=1)
def _ggml() -> Callable[..., int]:
    """ggml_quantize_chunk(type, source, destination, first, rows, columns, importance) of llama.cpp in xllamacpp."""
    found = importlib.util.find_spec("xllamacpp.xllamacpp")
    if found is None or found.origin is None:
        raise GGUFError(
            "types of 4 to 6 bits are rounded by llama.cpp's functions, which are not installed: pip install xllamacpp"
        )
    try:
        function = ctypes.CDLL(found.origin).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise GGUFError(f"llama.cpp's functions cannot be used from xllamacpp ({error}): pip install -U it") from error
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function


def allowed(expected: np.ndarray, kind: Q) -> np.ndarray:
    """The largest error that rounding to `kind` can make, for each number."""
    tiny = 1e-30
    if kind == Q.F16:
        return np.abs(expected) * 2.0**-11 * 1.001 + 2.0**-25
    if kind == Q.F32:
        return np.full_like(expected, tiny)
    size = GGML_QUANT_SIZES[kind][0]
    blocks = np.abs(expected).reshape(*expected.shape[:-1], -1, size).max(axis=-1)
    if kind == Q.Q8_0:
        # half a step; the scale itself is float16: 2^-11 of it, or its smallest number where it is subnormal
        limit = blocks * (0.5 / 127 + 2.0**-11) * 1.001 + 127 * 2.0**-25
    else:
        limit = blocks * SHARES[kind] + 2.0**-20
    return np.repeat(limit, size, axis=-1) + tiny
