"""Flags of the model and its adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass

from preference.arguments.unused import NO_ADAPTER, NO_TRAINING
from preference.flags.declaration import Unused, flag

# init_lora_weights of peft that there are not, and why
BEGINNINGS_REFUSED = {
    "loftq": "its adapter makes up for the rounding to 4 bits, and is wrong over the whole weights that chat and "
    "export lay it over: pissa with qlora=true starts from the 4-bit weights as they are",
    "eva": "it has to see activations over the data first, which no run here makes: pissa needs the weights alone",
    "corda": "it has to see activations over the data first, which no run here makes: pissa needs the weights alone",
    "lora_ga": "it has to see gradients over the data first, which no run here makes: pissa needs the weights alone",
}


def _check_beginning(text: str) -> None:
    """Raises ValueError for a way to begin that there is not, with the reason where peft has it."""
    if why := BEGINNINGS_REFUSED.get(text):
        raise ValueError(why)
    if not re.fullmatch("default|gaussian|orthogonal|pissa(_niter_[1-9][0-9]?)?|olora", text):
        raise ValueError("it is one of default, gaussian, orthogonal, pissa, pissa_niter_16, olora")


@dataclass
class ModelArguments:
    """the model"""

    model_name_or_path: str = flag(
        "models/SmolLM2-135M-Instruct",
        "a folder (of an adapter too), a hub id, or the starter model's folder (made on first use from a PyPI wheel)",
        peers=("model", "base_model", "model_name", "model_id", "model_path"),
    )
    adapter_name_or_path: str | None = flag(
        None,
        "an adapter over model_name_or_path (unset there: over the adapter's own base); training resumes it as it is",
        peers=("adapter_path", "resume_adapter", "adapters", "lora_path"),
    )
    peft_path: str | None = flag(None, "the same as adapter_name_or_path")
    new_adapter: bool = flag(
        False,
        "merge the adapter that was handed in and start a new one; over 4-bit weights it stays below it, frozen",
        topic="the adapter",
        unused=(NO_ADAPTER, NO_TRAINING),
        identity=True,
    )
    tokenizer_name_or_path: str | None = flag(
        None, "where the tokenizer comes from, if not from the model", peers=("tokenizer", "tokenizer_name")
    )
    cache_dir: str | None = flag(
        None, "folder for hub downloads and prepared datasets (default: the hub's own, ./cache)", local=True
    )
    trust_remote_code: bool = flag(
        False, "run Python code that comes with a model; leave it off unless you have read that code"
    )
    torch_dtype: str = flag(
        "auto",
        "how weights are held: auto = float32 where trained, bfloat16 where a GPU holds them frozen under LoRA",
        choices=("auto", "float32", "bfloat16"),
        unused=(Unused(lambda a: a.quantized, "4-bit weights have their own type"),),
        peers=("dtype",),
    )
    use_peft: bool = flag(
        True,
        "train a LoRA adapter; false trains all weights",
        topic="the adapter",
        identity=True,
        peers=("finetuning_type", "train_type", "tuner_type", "sft_type", "adapter", "use_lora"),
    )
    qlora: bool = flag(
        False,
        "LoRA over 4-bit frozen weights (needs bitsandbytes; slow on a CPU); same as load_in_4bit",
        topic="the adapter",
        peers=("quantization_bit", "quant_bits"),
    )
    load_in_4bit: bool = flag(False, "hold the frozen weights in 4 bits; same as qlora", topic="the adapter")
    target_modules: str = flag(
        "all",
        "layers that get an adapter: all (every linear layer but the head) or q_proj,v_proj,...",
        topic="the adapter",
        unused=(NO_ADAPTER,),
        identity=True,
        peers=("lora_target", "lora_target_modules", "lora_target_linear", "lora_modules"),
    )
    lora_rank: int = flag(
        16,
        "rank of the adapter: more learns more and costs more memory",
        topic="the adapter",
        least=1,
        most=1 << 16,
        unused=(NO_ADAPTER,),
        identity=True,
        peers=("lora_r", "rank", "peft_lora_r"),
    )
    lora_alpha: float = flag(
        32.0,
        "the adapter's output is scaled by lora_alpha / lora_rank",
        topic="the adapter",
        above=0,
        most=1e6,
        unused=(NO_ADAPTER,),
        identity=True,
        peers=("peft_lora_alpha",),
    )
    lora_dropout: float = flag(
        0.0,
        "dropout on the adapter's input; on a CPU it costs a third of the time",
        topic="the adapter",
        least=0,
        below=1,
        unused=(NO_ADAPTER,),
        identity=True,
    )
    use_rslora: bool = flag(
        False,
        "rank-stabilised LoRA: the adapter is scaled by lora_alpha / sqrt(lora_rank), for large ranks",
        topic="the adapter",
        unused=(NO_ADAPTER,),
        identity=True,
    )
    exclude_modules: str | None = flag(
        None,
        "layers that target_modules would give an adapter and shall have none; with target_modules=all the layers that "
        "choose experts have none anyway",
        topic="the adapter",
        unused=(NO_ADAPTER,),
        identity=True,
        peers=("exclude_lora_modules",),
    )
    modules_to_save: str | None = flag(
        None,
        "layers that are trained whole and saved with the adapter: embed_tokens,lm_head",
        topic="the adapter",
        unused=(NO_ADAPTER,),
        identity=True,
        peers=("additional_target", "lora_modules_to_save"),
    )
    lora_bias: str = flag(
        "none",
        "biases that are trained beside the adapter: none, lora_only (of the layers that have one), all",
        topic="the adapter",
        choices=("none", "lora_only", "all"),
        unused=(NO_ADAPTER,),
        identity=True,
    )
    init_lora_weights: str = flag(
        "default",
        "how an adapter begins, always adding nothing: default (Kaiming), gaussian, orthogonal; pissa or olora, in "
        "directions of the weights themselves (saved with twice the rank); pissa_niter_16 finds them faster",
        topic="the adapter",
        check=_check_beginning,
        unused=(NO_ADAPTER, NO_TRAINING),
        identity=True,
        peers=("pissa_init", "init_weights"),
    )
    loraplus_lr_ratio: float | None = flag(
        None,
        "LoRA+: the learning rate of B over that of A (16 in the paper)",
        topic="the adapter",
        above=0,
        most=1e6,
        unused=(NO_ADAPTER, NO_TRAINING),
        identity=True,
        peers=("lorap_lr_ratio",),
    )
    add_tokens: str | None = flag(
        None,
        "tokens that tokenizer and model get, a,b,c or a file with one a line: their rows begin as the mean of the "
        "others and are trained; also those that the tokenizer has and the model has no rows for",
        identity=True,
        unused=(NO_TRAINING,),
        peers=("new_special_tokens", "add_new_tokens"),
    )
    use_dora: bool = flag(
        False,
        "DoRA: also learn the weights' magnitudes; slower, sometimes better at small ranks",
        topic="the adapter",
        unused=(NO_ADAPTER,),
        identity=True,
        peers=("peft_use_dora", "lora_use_dora"),
    )

    @property
    def begins_in_weights(self) -> bool:
        """Whether a new adapter has a second half that stays (models/beginnings.py)."""
        return self.init_lora_weights.startswith(("pissa", "olora"))
