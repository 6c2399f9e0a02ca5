"""Which layers of a model get an adapter: those that are named, but for routers and what is excluded; and the experts
of a mixture where they are stacked in one tensor, which peft names by the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from preference.arguments import ModelArguments
from preference.models.folder import ModelError, first_line
from preference.models.weight_files import some

HALVES = ("gate_up_proj", ("gate_proj", "up_proj"))  # of the experts: one tensor, and what checkpoints have for it


@dataclass(frozen=True)
class Targets:
    """names: of target_modules, none where it is `everything`. excluded: with the routers, where it is. whole: layers
    that are trained whole.
    """

    names: list[str]
    everything: bool
    excluded: list[str]
    whole: list[str]


def listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def is_named(layer: str, names: Iterable[str]) -> bool:
    """Whether a layer goes by one of `names`: its whole name, or the end of it."""
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def find_targets(model: PreTrainedModel, args: ModelArguments) -> Targets:
    """
    Raises:
        ModelError: a name of target_modules, exclude_modules or modules_to_save that the model has not, that is tied to
            another, or that excludes nothing.
    """
    names = listed(args.target_modules)
    everything = names in (["all"], ["all-linear"])
    excluded, whole = (listed(text or "") for text in (args.exclude_modules, args.modules_to_save))
    names = [] if everything else names
    stacked = _stacked(model)
    for flag, given in (("target_modules", names), ("modules_to_save", whole)):
        _check_names(model, flag, given)
        _check_untied(model, flag, given)
    excluded = _whole_tensors(excluded, stacked)
    halves = HALVES[1] if HALVES[0] in excluded else ()
    _check_names(model, "exclude_modules", [name for name in excluded if name not in halves], stacked)
    for name in (name for name in excluded if name not in halves):
        found = [n for n, m in model.named_modules() if _could_be_adapted(n, m, names)]
        if not any(is_named(n, [name]) for n in [*found, *stacked, *(n.rpartition(".")[0] for n in stacked)]):
            raise ModelError(f"exclude_modules: no layer that target_modules={args.target_modules} names is {name}")
    spared = [*routers(model), *beside_the_language(model)] if everything else []
    return Targets(names, everything, [*excluded, *spared], whole)


def _whole_tensors(excluded: list[str], stacked: list[str]) -> list[str]:
    """exclude_modules with the name of a stacked tensor for those that its halves have in checkpoints."""
    tensor, halves = HALVES
    named = sorted(set(halves) & set(excluded))
    if not named or not any(is_named(name, [tensor]) for name in stacked):
        return excluded
    if len(named) < len(halves):
        raise ModelError(
            f"exclude_modules: {' and '.join(halves)} of the experts are one tensor, {tensor}, and {named[0]} alone "
            "cannot be left out: name both"
        )
    return [*excluded, tensor]


def _could_be_adapted(layer: str, module: nn.Module, names: list[str]) -> bool:
    return is_named(layer, names) if names else isinstance(module, (nn.Linear, Conv1D))


def _stacked(model: nn.Module) -> list[str]:
    """Names of the tensors that hold a layer of all experts."""
    counts = _expert_counts(model)
    return [name for name, weight in model.named_parameters() if weight.ndim == 3 and len(weight) in counts]


def _expert_counts(model: nn.Module) -> set[int]:
    config = model.config.get_text_config() if hasattr(model, "config") else None
    kinds = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return {getattr(config, kind) for kind in kinds if isinstance(getattr(config, kind, None), int)}


def beside_the_language(model: PreTrainedModel) -> list[str]:
    """Linear layers of a model for pictures or sounds too that no text goes through."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or model.config.get_text_config() is model.config:
        return []
    inside = {id(module) for module in decoder.modules()} | {id(head)}
    return [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and id(m) not in inside]


def settle_stacked(config: Any, model: PreTrainedModel, targets: Targets) -> None:
    """Have peft name the stacked experts that `config` (LoRA) is for, now, and take out of them what is excluded.

    Raises:
        ModelError: half of a tensor is asked for, or what stacked experts cannot have.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a peft that knows nothing of them
        return
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError as error:
        raise ModelError(f"target_modules: {first_line(error)}") from error
    kept, left = set(), []
    for wanted in config.target_parameters or ():
        found = [name for name, _ in model.named_parameters() if is_named(name, [wanted])]
        spared = [name for name in found if not _is_spared(name, targets)]
        kept |= {wanted} if found and spared == found else set(spared)
        left += spared
    if config.target_parameters is not None:
        config.target_parameters = kept or None
    for pattern in (config.rank_pattern, config.alpha_pattern):
        for key in [key for key in pattern if not any(re.fullmatch(key, name) for name in left)]:
            del pattern[key]
    if kept and (config.lora_dropout or config.use_dora):
        flag = "lora_dropout" if config.lora_dropout else "use_dora"
        raise ModelError(
            f"{flag}: the experts of this model are stacked ({some(left)}), and an adapter on them can have none: "
            f"{flag}={'0' if config.lora_dropout else 'false'}, or exclude_modules=experts"
        )


def _is_spared(parameter: str, targets: Targets) -> bool:
    router = targets.everything and {"gate", "router"} & set(parameter.split("."))
    return bool(router) or is_named(parameter, targets.excluded) or is_named(
        parameter.rpartition(".")[0], targets.excluded
    )  # fmt: skip


def left_out(adapted: Any, targets: Targets) -> list[str]:
    """Layers, and stacked experts, that target_modules names and that have no adapter: peft takes what goes by a name
    that stacked experts had before for those, and stacked experts of some architectures for no layers.
    """
    model = adapted.get_base_model()
    head = model.get_output_embeddings()
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and (targets.everything or is_named(name, targets.names))
    ]
    found += _stacked(model) if targets.everything else []
    inside = {"base_layer", "lora_A", "lora_B", "modules_to_save", "original_module"}  # of an adapter's layer
    return [name for name in found if not (inside & set(name.split(".")) or _is_spared(name, targets))]


def vocabulary_modules(lm: PreTrainedModel) -> list[str]:
    layers = {id(layer) for layer in (lm.get_input_embeddings(), lm.get_output_embeddings())}
    return [name for name, module in lm.named_modules() if id(module) in layers]


def is_tied(model: PreTrainedModel) -> bool:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)


def _check_names(model: PreTrainedModel, flag: str, names: list[str], stacked: Iterable[str] = ()) -> None:
    modules = dict(model.named_modules())
    if flag == "target_modules":  # what only holds layers is none itself
        modules = {name: module for name, module in modules.items() if module._parameters}
    missing = [name for name in names if not any(is_named(n, [name]) for n in [*modules, *stacked])]
    if missing:
        linear = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)}
        linear |= {name.rpartition(".")[2] for name in stacked}
        raise ModelError(
            f"{flag}: the model has no {', '.join(missing)}; its linear layers are {', '.join(sorted(linear))}"
        )


def _check_untied(model: PreTrainedModel, flag: str, names: list[str]) -> None:
    ends = [n for n in vocabulary_modules(model) if is_named(n, names)]
    if ends and is_tied(model):
        raise ModelError(
            f"{flag}: {', '.join(ends)} is tied, embedding and head are one tensor, and what is trained of one of them "
            "could not be merged and exported: leave it out"
        )


def routers(model: nn.Module) -> list[str]:
    """Layers of a mixture of experts that choose the experts: an adapter there changes which are trained at all."""
    counts = _expert_counts(model)
    found = []
    for name, module in model.named_modules():
        words = name.split(".")
        weight = module._parameters.get("weight")  # a router is a linear layer, or a module of its own with its weight
        linear = isinstance(module, nn.Linear)
        outputs = module.out_features if linear else len(weight) if weight is not None and weight.ndim == 2 else None
        if counts and (
            (outputs in counts and {"gate", "router"} & set(words))
            or (linear and words[-1] == "shared_expert_gate")
        ):  # fmt: skip
            found.append(name)
    return found
