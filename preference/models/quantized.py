"""What a checkpoint says of its quantisation: kept, or refused with the package that would read it; never dropped."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from preference.errors import PreferenceError

# method -> (its name, modules that read it, what pip installs)
PACKAGES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "gptq": ("GPTQ", ("optimum", "gptqmodel"), "optimum gptqmodel"),
    "awq": ("AWQ", ("gptqmodel",), "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", ("bitsandbytes",), "bitsandbytes"),
    "compressed-tensors": ("compressed-tensors", ("compressed_tensors",), "compressed-tensors"),
    "auto-round": ("AutoRound", ("auto_round",), "auto-round"),
    "torchao": ("torchao", ("torchao",), "torchao"),
    "aqlm": ("AQLM", ("aqlm",), "aqlm"),
    "hqq": ("HQQ", ("hqq",), "hqq"),
    "quanto": ("quanto", ("optimum.quanto",), "optimum-quanto"),
    "eetq": ("EETQ", ("kernels",), "kernels"),
    "vptq": ("VPTQ", ("vptq",), "vptq"),
    "higgs": ("HIGGS", ("flute", "fast_hadamard_transform"), "flute-kernel fast_hadamard_transform"),
    "fbgemm_fp8": ("FBGEMM's FP8", ("fbgemm_gpu",), "fbgemm-gpu"),
    "spqr": ("SpQR", ("spqr_quant",), "spqr_quant[gpu]"),
    "quark": ("Quark", ("quark",), "amd-quark"),
    "fp_quant": ("FP-Quant", ("fp_quant",), "fp_quant"),
    "fouroversix": ("Four Over Six", ("fouroversix",), "fouroversix"),
    "sinq": ("SINQ", ("sinq",), "sinq"),
    "bitnet": ("BitNet", (), ""),  # transformers has all that it needs
}
# Methods whose weights transformers turns into plain ones while it loads them, exactly but for the type's rounding. The
# quantised layers themselves would have no gradient, or need one kind of GPU.
DENSE = {"fp8": "FP8", "mxfp8": "MXFP8", "mxfp4": "MXFP4"}


class QuantizationError(PreferenceError, RuntimeError):
    """A quantised checkpoint that cannot be read here."""


@dataclass(frozen=True)
class Stored:
    """The quantisation of a checkpoint. loading: what from_pretrained is told besides; None: what the checkpoint says.
    dense: whether its weights become plain ones.
    """

    name: str
    method: str
    dense: bool = False
    loading: Any = None


def stored_quantization(config: Any) -> dict[str, Any] | None:
    """`quantization_config` of a model's config, as a dict."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(), "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def as_stored(source: str, config: Any, asked: Any = None) -> Stored | None:
    """How the checkpoint of `source` is quantised; None for whole weights.

    Args:
        asked: what the user wants whole weights to be quantised to.

    Raises:
        QuantizationError: a package is missing, the method is unknown, or another one was asked for.
    """
    found = stored_quantization(config)
    if found is None:
        return None
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    method = str(getattr(found.get("quant_method"), "value", found.get("quant_method")) or "")
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        method = "bitsandbytes"
    name, modules, packages = PACKAGES.get(method, (DENSE.get(method, method), (), ""))
    if method not in PACKAGES | DENSE or (method != "bitsandbytes" and method not in KNOWN):
        raise QuantizationError(
            f"{source} is quantised with {method or 'a method that it does not name'}, which is not read here: "
            "take the model that is not quantised"
        )
    missing = [module for module in modules if not _there(module)]
    if missing:
        raise QuantizationError(
            f"{source} is quantised with {name}, and the package that reads it is not installed: pip install "
            f"{packages}, or take the model that is not quantised"
        )
    if asked is not None and not (method == "bitsandbytes" and found.get("load_in_4bit")):
        raise QuantizationError(
            f"{source} is quantised with {name} already, so its weights cannot be quantised to 4 bits: drop "
            "qlora/load_in_4bit, which trains LoRA over them as they are, or take the model that is not quantised"
        )
    if method not in DENSE:
        return Stored(name, method)
    from transformers import FineGrainedFP8Config, Mxfp4Config

    loading = Mxfp4Config(dequantize=True) if method == "mxfp4" else FineGrainedFP8Config(dequantize=True)
    return Stored(name, method, dense=True, loading=loading)


def check_trainable(base: str, quantizer: Any, use_peft: bool) -> None:
    """Whether a run can train over the weights of `base`, which stay quantised.

    Args:
        quantizer: transformers' of the checkpoint.

    Raises:
        QuantizationError: they are to be trained themselves, or no adapter is trained over them.
    """
    if not use_peft:
        raise QuantizationError(f"the weights of {base} are quantised and cannot be trained themselves: use_peft=true")
    if not quantizer.is_trainable:
        raise QuantizationError(
            f"transformers trains no adapter over the weights of {base}, as they are quantised: take the model "
            "that is not quantised; qlora=true holds it in 4 bits"
        )


def quantizer_of(config: Any) -> Any:
    """transformers' quantizer of a checkpoint whose weights stay quantised."""
    from transformers.quantizers.auto import AutoHfQuantizer

    return AutoHfQuantizer.from_config(stored_quantization(config), pre_quantized=True)


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False
