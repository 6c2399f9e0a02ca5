"""The tokenizer and the model of a run: precision, quantisation, adapter."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from preference.arguments import Arguments, ModelArguments
from preference.files import NEXT
from preference.models.adapters import add_adapter, check_continued, freeze_below, load_stack, merge
from preference.models.folder import read_tokenizer
from preference.models.hardware import Hardware
from preference.models.look import ModelError, load_weights
from preference.models.quantized import check_trainable
from preference.models.sources import MERGED, ModelSource
from preference.models.targets import beside_the_language, find_targets, left_out, routers
from preference.models.weight_files import some

Say = Callable[[str], None]


def load_tokenizer(source: str, args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token. Raises ModelError where there is none that can be read."""
    way_out = "--tokenizer_name_or_path names one"
    return read_tokenizer(source, way_out, cache_dir=args.cache_dir, trust_remote_code=args.trust_remote_code)


def weights_dtype(args: Arguments, hardware: Hardware, half: torch.dtype | None, merged: bool = False) -> torch.dtype:
    """float32 for trained weights (AdamW in pure bfloat16 at small learning rates rounds most updates away), and for
    those that an adapter was merged into.

    Weights that stay frozen under LoRA lose nothing in the type that a GPU computes in anyway (`half`).
    """
    if args.model.torch_dtype != "auto":
        return getattr(torch, args.model.torch_dtype)
    frozen = args.model.use_peft and args.run.do_train and not merged
    return half if half and frozen and hardware.device == "cuda" else torch.float32


def _quantization(args: Arguments, hardware: Hardware, half: torch.dtype | None, say: Say) -> Any:
    if not args.quantized:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "4-bit weights need bitsandbytes, which is not installed: pip install bitsandbytes, or qlora=false"
        )
    if hardware.device == "mps":
        raise ModelError(
            f"4-bit weights need an NVIDIA GPU or a CPU; this run is on {hardware.name}: qlora=false trains LoRA here"
        )
    if hardware.device == "cpu":
        say("warning: 4-bit weights are slow on a CPU, where each product unpacks them first; qlora=false is faster")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=half or torch.float32,
    )


def is_quantized(model: Any) -> bool:
    """Whether the weights are held in a quantised form, as no plain weight can be."""
    return getattr(model, "hf_quantizer", None) is not None and bool(getattr(model, "is_quantized", False))


def load_base(
    source: ModelSource,
    args: Arguments,
    hardware: Hardware,
    half: torch.dtype | None = None,
    say: Say = lambda text: None,
) -> PreTrainedModel:
    """The causal LM of `source.base` on its device, ready for an adapter or for full fine-tuning.

    Args:
        half: what products are computed in under autocast; None: no autocast.

    Raises:
        ModelError: it is not whole, or cannot be quantised here.
        QuantizationError: it is quantised and cannot be trained so.
    """
    quantization = _quantization(args, hardware, half, say)
    model = load_weights(
        source.base,
        dtype=weights_dtype(args, hardware, half, merged=merges(source, args)),
        quantization=quantization,
        # 4-bit weights are made on their device; the others are moved by the trainer, also under torchrun.
        device_map={"": torch.cuda.current_device() if hardware.device == "cuda" else "cpu"} if quantization else None,
        cache_dir=args.model.cache_dir,
        trust_remote_code=args.model.trust_remote_code,
    )
    if getattr(model.config, "auto_map", None) and not args.model.trust_remote_code:
        say(f"warning: {source.base} comes with code of its own, and is run with that of transformers, "
            f"{type(model).__name__}; trust_remote_code=true runs its own")  # fmt: skip
    if Path(source.base).is_dir():  # what an adapter writes down as its base, wherever it will be read from
        model.name_or_path = str(Path(source.base).resolve())
    if not is_quantized(model):
        return model
    if not args.run.do_train:
        return model
    check_trainable(source.base, model.hf_quantizer, args.model.use_peft)
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.run.gradient_checkpointing)


def merges(source: ModelSource, args: Arguments) -> bool:
    """Whether the adapter that was handed in becomes part of the weights before training."""
    return bool(source.adapter and args.run.do_train and (args.model.new_adapter or not args.model.use_peft))


def adapt(
    model: PreTrainedModel,
    source: ModelSource,
    args: Arguments,
    *,
    write: bool,
    say: Say,
    grow: Callable[[PreTrainedModel], Sequence[int]] = lambda model: (),
) -> Any:
    """The model as it is trained, or scored: with the adapter that was handed in, a new one, both, or none.

    Args:
        write: whether this process writes the files of the run. grow: gives a model the rows of the tokens that are
            added, and names those that are trained.

    Raises:
        ModelError: the adapter does not fit, or a flag says of it what it is not.
    """
    if not args.run.do_train:
        return load_stack(model, source.adapter) if source.adapter else model
    if source.adapter is None:
        new_ids = grow(model)
        if not args.model.use_peft:
            return model
        return _new_adapter(model, args, new_ids, say)
    if not args.model.new_adapter and args.model.use_peft:
        if args.model.add_tokens:
            raise ModelError(
                f"add_tokens gives an adapter rows that {source.adapter} has not, and training goes on with that as it "
                "is: --new_adapter true merges it and starts one that has them; or drop add_tokens"
            )
        check_continued(source.adapter, args)
        say(f"training resumes the adapter {source.adapter} over {source.base}, as it is")
        return load_stack(model, source.adapter, trainable=True)
    if is_quantized(model):
        if args.model.add_tokens:
            raise ModelError(
                f"add_tokens cannot be had over {source.adapter} while the weights below it are quantised: qlora=false "
                "merges it and starts a new adapter that has them; or drop add_tokens"
            )
        say(f"the adapter {source.adapter} stays as it is below a new one: its base is quantised")
        return freeze_below(model, source.adapter, args.model, args.run.seed)
    say(f"the adapter {source.adapter} is merged into {source.base}")
    merged = merge(model, source.adapter)
    new_ids = grow(merged)
    if not args.model.use_peft:
        return merged.requires_grad_(True)
    folder = Path(args.run.output_dir).resolve() / MERGED
    if write:
        if folder.exists() and (folder.parent / NEXT).exists():
            raise ModelError(f"{folder} belongs to the adapter that lies beside it: set another output_dir")
        merged.save_pretrained(folder)
    merged.name_or_path = str(folder)
    return _new_adapter(merged, args, new_ids, say)


def _new_adapter(model: PreTrainedModel, args: Arguments, new_ids: Sequence[int], say: Say) -> Any:
    targets = find_targets(model, args.model)
    if targets.everything and (found := routers(model)):
        say(f"no adapter on the {len(found)} layers that choose experts ({found[0]}, ...)")
    if targets.everything and (found := beside_the_language(model)):
        say(f"no adapter on the {len(found)} layers that no text goes through ({found[0]}, ...)")
    adapted = add_adapter(model, args.model, args.run.seed, new_ids)
    if found := left_out(adapted, targets):
        say(f"warning: target_modules={args.model.target_modules} names {len(found)} layers more that peft has no "
            f"adapter for where experts are stacked: {some(found)}")  # fmt: skip
    return adapted


@contextlib.contextmanager
def untuned(model: Any, scoring: bool) -> Iterator[bool]:
    """While open, a model that is only scored answers without its adapter; yields whether it has one.

    Args:
        scoring: whether nothing is trained; else what was handed in, adapter included, is the model before training.
    """
    if scoring and hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield True
    else:
        yield False
