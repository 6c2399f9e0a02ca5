"""The one look at a model that was handed in: its weights are all there, and all of them are used.

transformers fills tensors that a checkpoint lacks with random values, and leaves out what it has no place for; a log
line says so, and the program goes on. Here both end it, by name. Only what the architecture itself declares as tied, or
as not needed, passes. `load_weights` is the only way by which a causal LM is loaded, and `look_on_paper` does the same
on the meta device, where transformers reads names, shapes and types from the headers of the files and no weight.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from preference.errors import PreferenceError
from preference.models.folder import ANEW, ModelError, check_ids, first_line, read_config, reading
from preference.models.quantized import QuantizationError, Stored, as_stored
from preference.models.weight_files import READ, some, tensor_headers, weight_files

LARGER = 16  # times the bytes of its weight files: so many weights no packing brings into a byte
FREE_BUFFERS = 8 << 30  # bytes of masks and tables that a model computes, and its files need not hold
WHOLE_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load_weights(
    source: str,
    *,
    dtype: torch.dtype,
    quantization: Any = None,
    device_map: Any = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal LM of `source`, every tensor of which came from its checkpoint, quantised as the checkpoint says.

    Args:
        quantization: how to quantise weights that are whole (a config of transformers); None: as they are.

    Raises:
        ModelError: tensors are missing, left over or of other shapes, a file is damaged, or a package is not installed.
    """
    config = read_config(source, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    files = weight_files(Path(source)) if Path(source).is_dir() else []
    stored = _stored(source, config, quantization)
    if stored is None:
        _check_types(source, files)
    elif stored.method == "bitsandbytes" and quantization is None:
        _check_packed(source, files)
    check_causal(source, config)
    check_scale(source, config, files, trust_remote_code)
    wanted = quantization if stored is None else stored.loading
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            device_map=device_map,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, all of them by name
            **({} if wanted is None else {"quantization_config": wanted}),
        )
    except (torch.OutOfMemoryError, MemoryError, PreferenceError):
        raise
    except Exception as error:  # what the files hold decides which it is
        what = f", which is quantised with {stored.name}," if stored else ""
        reason = "its tensors are not laid out so" if "CONVERSION" in str(error) else first_line(error)
        way_out = "Take the model that is not quantised, or get the folder anew" if stored else "Get the folder anew"
        raise ModelError(f"{source}{what} cannot be loaded: {reason}. {way_out}") from error
    check_tensors(source, model, info)
    if stored is not None and stored.dense:
        model.to(dtype)  # dequantised while it was loaded: of one type, as other weights are
    check_finite(source, model)
    _say_untied(model)
    check_ids(model.generation_config, f"generation settings of {source}")
    _keep_unpacked(model)
    return model


def check_causal(source: str, config: Any) -> None:
    """Refuse a model that is no causal language model, before one is made of it: what answers must see the tokens
    before each alone.

    Raises:
        ModelError: with what it is.
    """
    known = type(config) in AutoModelForCausalLM._model_mapping or bool(getattr(config, "auto_map", None))
    masked = getattr(config.get_text_config(), "is_decoder", None) is False  # as BERT's kind is, which sees both sides
    if not known or masked or getattr(config, "is_encoder_decoder", False):
        names = ", ".join(getattr(config, "architectures", None) or ()) or "no architecture named"
        raise ModelError(
            f"{source} is no causal language model but of the type {config.model_type} ({names}), and only those are "
            "trained and answer here: take the language model alone, or another"
        )


def _say_untied(model: Any) -> None:
    """A checkpoint that has a head of its own, and says that it is tied, is saved as what it is."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if getattr(config, "tie_word_embeddings", False) and head is not None and head.weight is not embedding.weight:
            config.tie_word_embeddings = False


def check_scale(source: str, config: Any, files: list[Path], trust_remote_code: bool = False) -> None:
    """Refuse a config.json whose model is far larger than its weight files, before memory is asked for.

    Args:
        files: of a local model's weights; of a hub's none.

    Raises:
        ModelError: with the numbers.
    """
    held = sum(file.stat().st_size for file in files)
    if not held:
        return
    with reading(f"{source}: the model that its config.json describes", ANEW), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    values = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    if values > LARGER * held or buffers > LARGER * held + FREE_BUFFERS:
        raise ModelError(
            f"{source}: its config.json describes {values:,} weights and {buffers:,} bytes of tables, and its weight "
            f"files have {held:,} bytes: {ANEW}; model_name_or_path names it"
        )


def _stored(source: str, config: Any, asked: Any) -> Stored | None:
    try:
        return as_stored(source, config, asked)
    except QuantizationError as error:
        raise ModelError(str(error)) from None


def _keep_unpacked(model: nn.Module) -> None:
    """On a CPU, bitsandbytes lays 4-bit weights out anew at the first forward outside training, for a kernel that
    rounds to bfloat16 and has no gradient; a training step after an evaluation would go through it.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def check_tensors(source: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuse a model that is not, tensor for tensor, what its checkpoint holds.

    Args:
        info: what transformers says of the loading; what it declares as tied or ignorable is not in it.
    """
    missing, unexpected, other = (
        sorted(info.get(f"{kind}_keys", ())) for kind in ("missing", "unexpected", "mismatched")
    )
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = [name for name in missing if tied.get(name, name) == name or tied[name] in missing]
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors are missing ({some(missing)}) and would be random")
    if unexpected:
        faults.append(f"{len(unexpected)} tensors have no place in {type(model).__name__} ({some(unexpected)})")
    if other:
        shapes = [f"{name} is {list(found)}, not {list(wanted)}" for name, found, wanted in other]
        faults.append(f"{len(other)} tensors have another shape ({some(shapes)})")
    faults += [str(text) for text in info.get("error_msgs", ())]
    if faults:
        config = model.config.get_text_config()
        depth = getattr(config, "num_hidden_layers", "?")
        raise ModelError(
            f"{source}: its weights are not those that its config.json describes (model_type {config.model_type}, "
            f"{depth} layers): {'; '.join(faults)}. Get the folder anew, weights and config.json of one model; "
            "model_name_or_path names it"
        )


@torch.no_grad()
def check_finite(source: str, model: nn.Module) -> None:
    """Refuse weights that hold NaN or infinity: nothing can be learned from them or answered with them."""
    broken = []
    for name, p in model.named_parameters():
        if p.dtype in WHOLE_TYPES and p.numel() and not p.is_meta:
            least, most = torch.aminmax(p)
            if not (torch.isfinite(least) and torch.isfinite(most)):
                broken.append(name)
    if broken:
        raise ModelError(
            f"{source}: {len(broken)} tensors hold NaN or infinity ({some(broken)}): the model is damaged, or was "
            "saved by a run that diverged. Take an earlier checkpoint, or get it anew; model_name_or_path names it"
        )


def look_on_paper(
    source: str, *, cache_dir: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel | None:
    """The same look from the headers of the weight files alone: the model on the meta device, or None where they are on
    a hub still.

    Raises:
        ModelError: as `load_weights` would, but for what only the weights themselves show.
    """
    local = Path(source).is_dir()
    if not local and not _cached(source, cache_dir):
        return None
    config = read_config(source, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    stored = _stored(source, config, None)
    if local and stored is not None:
        files = weight_files(Path(source))
        if stored.method == "bitsandbytes":
            _check_packed(source, files)
    if stored is not None and not stored.dense:  # its layers are made where weights are
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return load_weights(
        source,
        dtype=torch.float32,
        device_map={"": "meta"},
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
    )


def _cached(source: str, cache_dir: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(source, name, cache_dir=cache_dir), str) for name in READ)


def _check_packed(source: str, files: list[Path]) -> None:
    """A local checkpoint whose config says that bitsandbytes has packed its weights holds what unpacks them."""
    names = [name for file in files if file.suffix == ".safetensors" for name in tensor_headers(file)]
    if names and not any(name.endswith(".SCB") or ".quant_state." in name for name in names):
        raise ModelError(
            f"{source}: config.json says that bitsandbytes has quantised its weights, and they are whole: take "
            "quantization_config out of config.json, and qlora=true quantises them; or get the folder anew"
        )


def _check_types(source: str, files: list[Path]) -> None:
    """A local checkpoint whose config names no quantisation holds no 8-bit weights, which would be read unscaled."""
    for file in (file for file in files if file.suffix == ".safetensors"):
        for name, (kind, _) in tensor_headers(file).items():
            if kind.startswith("F8") or (re.fullmatch(r"[IU]\d+", kind) and name.endswith(".weight")):
                raise ModelError(
                    f"{source}: {name} is held as {kind}, and config.json has no quantization_config that says how it "
                    "is scaled: get config.json of the same model, or take the model that is not quantised"
                )
