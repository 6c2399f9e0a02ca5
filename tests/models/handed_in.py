"""Models as users hand them in, tiny: whole ones, and each kind of broken or quantised one, made in a moment."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from tiny import tiny_model, tiny_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 128}  # which 4-bit blocks of 64 divide


def make_plain(folder: Path, arch: str = "llama", seed: int = 0, **config: Any) -> Path:
    tiny_model(arch, seed=seed, **(SIZES if arch != "gpt2" else {}) | config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, **config: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    options = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config
    model = get_peft_model(model, LoraConfig(**options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def variant(folder: Path, plain: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """`plain` with other tensors, and other values in config.json."""
    shutil.copytree(plain, folder)
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((plain / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def make_all(out: Path) -> dict[str, Path]:
    """Every kind, by name."""
    plain = make_plain(out / "plain")
    weights = load_file(plain / "model.safetensors")
    linear = [name for name in weights if name.endswith("_proj.weight")]
    rest = {name: weight for name, weight in weights.items() if name not in linear}
    found = {"plain": plain, "adapter": make_adapter(out / "adapter", plain)}

    gone = ("lm_head.weight", "model.layers.1.mlp.down_proj.weight")
    found["missing"] = variant(out / "missing", plain, {n: w for n, w in weights.items() if n not in gone})
    found["more_layers"] = variant(out / "more_layers", plain, num_hidden_layers=3)
    found["fewer_layers"] = variant(out / "fewer_layers", plain, num_hidden_layers=1)
    found["value_head"] = variant(out / "value_head", plain, weights | {"v_head.summary.weight": torch.ones(1, 64)})
    found["other_shape"] = variant(out / "other_shape", plain, weights | {"lm_head.weight": torch.ones(500, 64)})
    found["cut_off"] = variant(out / "cut_off", plain)
    file = found["cut_off"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    found["lost_weights"] = variant(out / "lost_weights", plain)
    (found["lost_weights"] / "model.safetensors").unlink()

    packed: dict[str, torch.Tensor] = dict(rest)
    for name in linear:
        rows, columns = weights[name].shape
        stem = name.removesuffix(".weight")
        packed[f"{stem}.qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        packed[f"{stem}.scales"] = torch.ones(1, rows, dtype=torch.float16)
    gptq = {"bits": 4, "group_size": 128, "quant_method": "gptq", "desc_act": False, "sym": True}
    found["gptq"] = variant(out / "gptq", plain, packed, quantization_config=gptq)

    eighths: dict[str, torch.Tensor] = dict(rest)
    for name in linear:
        scale = weights[name].abs().max() / 448
        eighths[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        eighths[f"{name}_scale_inv"] = scale.reshape(1, 1)
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    found["fp8"] = variant(out / "fp8", plain, eighths, quantization_config=fp8)
    unscaled = {name: weight for name, weight in eighths.items() if not name.endswith("scale_inv")}
    found["fp8_unsaid"] = variant(out / "fp8_unsaid", plain, unscaled)

    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=four, device_map={"": "cpu"})
    model.save_pretrained(out / "bnb4")
    tiny_tokenizer().save_pretrained(out / "bnb4")
    found["bnb4"] = out / "bnb4"
    damaged = dict(rest)
    for name in linear:
        damaged[name] = torch.zeros(weights[name].numel() // 2, 1, dtype=torch.uint8)
        damaged[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(80, dtype=torch.uint8)
    stored = json.loads((out / "bnb4/config.json").read_text())["quantization_config"]
    found["bnb4_damaged"] = variant(out / "bnb4_damaged", plain, damaged, quantization_config=stored)

    eight = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    found["bnb8_whole"] = variant(out / "bnb8_whole", plain, quantization_config=eight)

    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(AutoModelForCausalLM.from_pretrained(plain), prompts).save_pretrained(out / "prompt_tuning")
    found["prompt_tuning"] = out / "prompt_tuning"
    found["adapter_lost"] = out / "adapter_lost"
    shutil.copytree(found["adapter"], found["adapter_lost"])
    (found["adapter_lost"] / "adapter_model.safetensors").unlink()
    t5 = T5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    bert = BertConfig(vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    for kind, model in (("encoder_decoder", T5ForConditionalGeneration(t5)), ("masked", BertForMaskedLM(bert))):
        model.save_pretrained(out / kind)
        tiny_tokenizer().save_pretrained(out / kind)
        found[kind] = out / kind
    found["own_head"] = variant(out / "own_head", plain, tie_word_embeddings=True)  # of which config.json knows nothing

    parts = load_file(found["adapter"] / "adapter_model.safetensors")
    changed = {
        "adapter_nan": {n: w * (math.nan if "q_proj.lora_B" in n else 1) for n, w in parts.items()},
        "adapter_of_8_bits": {n: (w * 10).to(torch.int8) for n, w in parts.items()},
        "adapter_of_other_size": {n: w.repeat(1, 2) if "lora_A" in n else w for n, w in parts.items()},
    }
    for kind, tensors in changed.items():
        found[kind] = variant_of_adapter(out / kind, found["adapter"], plain)
        save_file(tensors, found[kind] / "adapter_model.safetensors", metadata={"format": "pt"})
    found["adapter_in_weights"] = variant_of_adapter(
        out / "adapter_in_weights", found["adapter"], plain, init_lora_weights="pissa_niter_4"
    )
    found["adapter_beside_bin"] = variant_of_adapter(out / "adapter_beside_bin", found["adapter"], plain)
    shutil.copy(plain / "config.json", found["adapter_beside_bin"])
    torch.save(weights, found["adapter_beside_bin"] / "pytorch_model.bin")
    deeper = make_adapter(out / "deeper_adapter", make_plain(out / "deeper", num_hidden_layers=3))
    found["adapter_of_another"] = variant_of_adapter(out / "adapter_of_another", deeper, plain)
    found["adapter_over_adapter"] = variant_of_adapter(out / "adapter_over_adapter", found["adapter"], found["adapter"])
    found["model_and_adapter"] = variant(out / "model_and_adapter", plain)
    for file in found["adapter"].iterdir():
        shutil.copy(file, found["model_and_adapter"])
    return found


def variant_of_adapter(folder: Path, adapter: Path, base: Path, **values: Any) -> Path:
    """`adapter` that says it belongs to `base`, with other values in its config."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)} | values
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def dequantized(four_bit: Any) -> Any:
    """A plain model with the numbers that the weights of a model in 4 bits stand for."""
    plain = tiny_model("llama", **SIZES)
    for name, module in four_bit.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None:
            state = getattr(weight, "quant_state", None)
            values = weight.data if state is None else dequantize_4bit(weight.data, state)
            plain.get_submodule(name).weight.data = values.float()
    return plain


@torch.no_grad()
def expected_logits(kind: str, folders: dict[str, Path], ids: torch.Tensor) -> torch.Tensor:
    """What transformers and peft themselves compute with a kind that is used."""
    folder = folders[kind]
    if kind in ("adapter", "prompt_tuning"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders["plain"]), folder)
    elif kind == "fp8":
        model = AutoModelForCausalLM.from_pretrained(folders["plain"])
        stored = load_file(folder / "model.safetensors")
        for name, parameter in model.named_parameters():
            if f"{name}_scale_inv" in stored:
                parameter.data = stored[name].float() * stored[f"{name}_scale_inv"]
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model = dequantized(model) if kind == "bnb4" else model
    return model.eval()(ids).logits
