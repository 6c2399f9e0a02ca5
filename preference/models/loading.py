"""The tokenizer and the model of a run: precision, adapter, 4-bit weights."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from preference.arguments import Arguments, ModelArguments
from preference.errors import PreferenceError
from preference.models.hardware import Hardware


class ModelError(PreferenceError, RuntimeError):
    """A model that cannot be loaded or trained as asked."""


def load_tokenizer(source: str, args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token; padding is masked by length, so any token serves."""
    tokenizer = AutoTokenizer.from_pretrained(
        source, cache_dir=args.cache_dir, trust_remote_code=args.trust_remote_code
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def weights_dtype(args: Arguments, hardware: Hardware, bf16: bool) -> torch.dtype:
    """float32 for trained weights (AdamW in pure bfloat16 at small learning rates rounds most updates away).

    Weights that stay frozen under LoRA lose nothing in bfloat16 on a GPU that computes in it anyway.
    """
    if args.model.torch_dtype != "auto":
        return getattr(torch, args.model.torch_dtype)
    frozen = args.model.use_peft and args.run.do_train
    return torch.bfloat16 if bf16 and frozen and hardware.device == "cuda" else torch.float32


def _quantization(args: Arguments, hardware: Hardware) -> Any:
    if not args.quantized:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "4-bit weights need bitsandbytes, which is not installed: pip install bitsandbytes, or qlora=false"
        )
    if hardware.device != "cuda":
        raise ModelError(
            f"4-bit training needs an NVIDIA GPU; this run is on {hardware.name}: qlora=false trains LoRA here"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if hardware.bf16 else torch.float32,
    )


def load_model(source: str, args: Arguments, hardware: Hardware, bf16: bool) -> PreTrainedModel:
    """The causal LM of `source` on its device, ready for an adapter or for full fine-tuning.

    Raises:
        ModelError: 4-bit weights were asked for where they cannot be had.
    """
    quantization = _quantization(args, hardware)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=weights_dtype(args, hardware, bf16),
        quantization_config=quantization,
        # 4-bit weights are made on their device; the others are moved by the trainer, also under torchrun.
        device_map={"": torch.cuda.current_device()} if quantization else None,
        cache_dir=args.model.cache_dir,
        trust_remote_code=args.model.trust_remote_code,
    )
    if quantization:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.run.gradient_checkpointing)
    return model


def add_adapter(model: PreTrainedModel, args: ModelArguments, seed: int) -> Any:
    """Wrap `model` in a LoRA adapter whose weights are drawn from `seed` and held in float32.

    Raises:
        ModelError: a name of target_modules that the model has not.
    """
    from peft import LoraConfig, get_peft_model

    everything = args.target_modules.strip() in ("all", "all-linear")
    names = [name.strip() for name in args.target_modules.split(",") if name.strip()]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_dora=args.use_dora,
        target_modules="all-linear" if everything else names,
    )
    if not everything:
        linear = {
            name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
        }
        missing = [
            name for name in names if not any(n == name or n.endswith(f".{name}") for n, _ in model.named_modules())
        ]
        if missing:
            raise ModelError(
                f"target_modules: the model has no {', '.join(missing)}; "
                f"its linear layers are {', '.join(sorted(linear))}"
            )
    torch.manual_seed(seed)
    return get_peft_model(model, config)


@contextlib.contextmanager
def untuned(model: Any) -> Iterator[bool]:
    """While open, a model that was loaded with its adapter answers without it; yields whether there is one."""
    loaded = bool(getattr(model, "_hf_peft_config_loaded", False))
    if loaded:
        model.disable_adapters()
    try:
        yield loaded
    finally:
        if loaded:
            model.enable_adapters()
