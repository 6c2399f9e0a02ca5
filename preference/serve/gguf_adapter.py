"""A LoRA adapter as a GGUF file of its own: llama-server -m BASE.gguf --lora ADAPTER.gguf.

llama.cpp adds alpha / rank * B A to a matrix, with one alpha for the whole file; what that cannot say is refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter
from safetensors.numpy import load_file

from preference.models.adapters import FROZEN
from preference.models.sources import ADAPTER_CONFIG
from preference.serve.gguf import interleave
from preference.serve.gguf_architectures import ARCHITECTURES, check_supported
from preference.serve.gguf_tokenizer import GGUFError

PREFIX = "base_model.model."


def write_gguf_adapter(path: Path, folder: str, config: Any) -> int:
    """Write the adapter in `folder`, over a base model of `config`, to `path`, in float32; returns its matrices.

    Raises:
        GGUFError: the adapter is no plain LoRA of matrices that llama.cpp knows.
    """
    check_supported(config)
    adapter = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    _check_plain(folder, adapter)
    rank = adapter["r"]
    alpha = adapter["lora_alpha"] * (math.sqrt(rank) if adapter.get("use_rslora") else 1.0)
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture.gguf, config.num_hidden_layers)
    writer = GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[architecture.gguf])
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        weights = load_file(Path(folder) / "adapter_model.safetensors")
        for key, array in weights.items():
            module, _, side = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
            name = names.get_name(module)
            if side not in ("lora_A", "lora_B") or name is None:
                raise GGUFError(f"{key} of the adapter has no place in a GGUF adapter: merge it (--gguf)")
            if side == "lora_B" and architecture.interleaved and module.endswith((".q_proj", ".k_proj")):
                heads = config.num_attention_heads if module.endswith(".q_proj") else config.num_key_value_heads
                array = interleave(array, heads)
            writer.add_tensor(f"{name}.weight.{side.lower()}", array.astype("float32"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return len(weights) // 2


def _check_plain(folder: str, adapter: dict[str, Any]) -> None:
    for refused, what in (
        (adapter.get("peft_type") != "LORA", f"an adapter of type {adapter.get('peft_type')}"),
        (adapter.get("use_dora"), "DoRA"),
        (adapter.get("rank_pattern") or adapter.get("alpha_pattern"), "ranks or alphas of single matrices"),
        (adapter.get("modules_to_save") or adapter.get("trainable_token_indices"), "weights that were trained whole"),
        (adapter.get("bias", "none") != "none", "biases"),
        ((Path(folder) / FROZEN / ADAPTER_CONFIG).is_file(), "an adapter over another one"),
    ):
        if refused:
            raise GGUFError(f"{what} cannot be written as a GGUF adapter: merge it into the model (--gguf)")
