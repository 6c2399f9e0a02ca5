"""Adapters: made anew, gone on with, or merged into what they were laid over."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from preference.arguments import FLAGS, Arguments, ModelArguments
from preference.models.beginnings import begin, doubled
from preference.models.folder import ModelError, first_line, reading
from preference.models.look import _some, tensor_headers
from preference.models.patterns import check_patterns
from preference.models.sources import ADAPTER_CONFIG, adapter_config

FROZEN = "frozen"  # the name of an adapter that stays as it is under a new one, over weights that cannot be merged into
# flag -> field of peft's config, for flags that say what an adapter is
FIELDS = {
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
    "lora_bias": "bias",
    "modules_to_save": "modules_to_save",
    "target_modules": "target_modules",
    "init_lora_weights": None,  # of a new adapter alone
    "exclude_modules": None,
}


def load_adapter(model: Any, folder: str, *, trainable: bool = False, name: str = "default", **options: Any) -> Any:
    """The model with the adapter of `folder` (or a hub id) over it, whole: every tensor found its place.

    Args:
        model: a plain model, or one with adapters, which gets another.

    Raises:
        ModelError: the adapter does not fit.
    """
    from peft import PeftModel, get_peft_model_state_dict

    lm = model.get_base_model() if hasattr(model, "peft_config") else model
    if trainable:
        refuse_prompts(folder)
    _check_patterns(lm, folder)
    names = _tensor_names(folder)
    _grow_vocabulary(lm, folder)
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=name, is_trainable=trainable, **options)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name, is_trainable=trainable, **options)
    except Exception as error:  # shapes, modules, kinds, whatever its config holds
        raise ModelError(
            f"the adapter {folder} does not fit its base {lm.config.name_or_path}: {first_line(error)}. If another "
            "model lies there now, name the right one"
        ) from error
    if names is not None:
        has = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
        _refuse_misfit(lm, folder, {
            "have no place": sorted(n for n in names - has if not _of_vocabulary(lm, n)),
            "are missing": sorted(has - names),
        })  # fmt: skip
    return model


def _check_patterns(lm: PreTrainedModel, folder: str) -> None:
    names = [name for name, _ in lm.named_modules()]
    check_patterns(folder, adapter_config(folder) or {}, names)


def _refuse_misfit(lm: PreTrainedModel, folder: str, faults: dict[str, list[str]]) -> None:
    """Raises ModelError for tensors of an adapter that do not fit, by what is wrong with them."""
    said = [f"{len(found)} of its tensors {what} ({_some(found)})" for what, found in faults.items() if found]
    if said:
        raise ModelError(
            f"the adapter {folder} does not fit its base {lm.config.name_or_path}: {'; '.join(said)}. If another model "
            "lies there now, name the right one"
        )


def refuse_prompts(folder: str) -> None:
    """Raises ModelError for an adapter that is tokens before the prompt, and no change of weights."""
    from peft import PeftConfig

    with reading(f"the adapter {folder}", "get it anew"):
        config = PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise ModelError(
            f"the adapter {folder} is of the kind {kind}: tokens before the prompt, and no change of weights, so it is "
            "neither trained nor merged nor exported here. chat.py answers with it; to train, name its base"
        )


def check_on_paper(lm: PreTrainedModel, folder: str) -> None:
    """Whether the adapter of `folder` fits a model on the meta device, by the header of its file; gives the model as
    many rows as it was saved with.

    Raises:
        ModelError: it does not fit.
    """
    from peft import get_peft_model_state_dict

    refuse_prompts(folder)
    names = _tensor_names(folder)
    if names is None:
        return
    _grow_vocabulary(lm, folder)
    with reading(f"the adapter {folder}", "get it anew"), torch.device("meta"):
        model = adapter_on_paper(lm, folder)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: list(weight.shape) for name, weight in state.items()}
    found = {name: shape for name, (_, shape) in tensor_headers(Path(folder) / "adapter_model.safetensors").items()}
    other = [n for n in shapes.keys() & found.keys() if shapes[n] != found[n]]
    model.unload()
    _refuse_misfit(lm, folder, {
        "have no place": sorted(n for n in names - shapes.keys() if not _of_vocabulary(lm, n)),
        "are missing": sorted(shapes.keys() - names),
        "have another shape": [f"{n} is {found[n]}, not {shapes[n]}" for n in sorted(other)],
    })  # fmt: skip


def _tensor_names(folder: str) -> set[str] | None:
    """Names in a local adapter's file; None for a hub's, or one that is no safetensors file."""
    file = Path(folder) / "adapter_model.safetensors"
    return set(tensor_headers(file)) if file.is_file() else None


def _vocabulary_modules(lm: PreTrainedModel) -> list[str]:
    layers = {id(layer) for layer in (lm.get_input_embeddings(), lm.get_output_embeddings())}
    return [name for name, module in lm.named_modules() if id(module) in layers]


def _of_vocabulary(lm: PreTrainedModel, tensor: str) -> bool:
    return any(f".{name}." in f".{tensor}" for name in _vocabulary_modules(lm))


def _grow_vocabulary(lm: PreTrainedModel, folder: str) -> None:
    """Give the base as many rows as the adapter was saved with: tokens that were added are in its own tensors."""
    file, config = Path(folder) / "adapter_model.safetensors", Path(folder) / ADAPTER_CONFIG
    if not file.is_file() or not config.is_file():
        return
    endings = tuple(f"{name}.weight" for name in _vocabulary_modules(lm))
    rows = [shape[0] for name, (_, shape) in tensor_headers(file).items() if name.endswith(endings)]
    has = lm.get_input_embeddings().weight.shape[0]
    with reading(f"trainable_token_indices of {config}", "get the adapter anew"):
        indices = json.loads(config.read_text(encoding="utf-8")).get("trainable_token_indices") or []
        for ids in filter(None, indices.values() if isinstance(indices, dict) else [indices]):
            if max(ids) >= has + len(ids):  # tokens that were added stand right behind the others
                raise ValueError(f"token {max(ids)} lies beyond the {has} rows of the model and {len(ids)} new ones")
            rows.append(max(ids) + 1)
    if rows and max(rows) > has:
        lm.resize_token_embeddings(max(rows), mean_resizing=False)


def check_continued(adapter: str, args: Arguments) -> None:
    """Refuse flags that say of an adapter that is gone on with what it is not.

    Raises:
        ModelError: with the flag, its value and the adapter's.
    """
    config = json.loads((Path(adapter) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    for flag, field in FIELDS.items():
        if flag not in args.given and getattr(args.model, flag) == FLAGS[flag].default:  # run_orpo.sh hands over all
            continue
        if field is None:
            raise ModelError(
                f"--{flag} has no effect on the adapter {adapter}, which training goes on with as it is: drop the "
                "flag, or --new_adapter true merges it and starts a new one"
            )
        asked, has = getattr(args.model, flag), config.get(field)
        if field in ("target_modules", "modules_to_save") and not isinstance(has, str):
            asked, has = sorted(_listed(asked)), sorted(has or ())
            if asked in (["all"], ["all-linear"]):
                continue
        if asked != has and not (not asked and has is None):
            raise ModelError(
                f"--{flag} {getattr(args.model, flag)} contradicts the adapter {adapter}, which has {field} {has}: "
                "training goes on with the adapter as it is. Drop the flag, or --new_adapter true merges it and starts "
                "a new one"
            )


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def add_adapter(model: PreTrainedModel, args: ModelArguments, seed: int, new_ids: Iterable[int] = ()) -> Any:
    """Wrap `model` in a LoRA adapter whose weights are drawn from `seed` and held in float32.

    Args:
        new_ids: tokens whose rows of the embedding and of the output head are trained beside it.

    Raises:
        ModelError: a name of target_modules, exclude_modules or modules_to_save that the model has not, or that is
            tied to another.
    """
    from peft import LoraConfig, get_peft_model

    names = _listed(args.target_modules)
    everything = names in (["all"], ["all-linear"])
    excluded, whole = (_listed(text or "") for text in (args.exclude_modules, args.modules_to_save))
    for flag, given in (("target_modules", [] if everything else names), ("exclude_modules", excluded),
                        ("modules_to_save", whole)):  # fmt: skip
        _check_names(model, flag, given)
    _check_untied(model, "target_modules", [] if everything else names)
    _check_untied(model, "modules_to_save", whole)
    new_ids = list(new_ids)
    kind, rank, alpha = args.init_lora_weights, args.lora_rank, args.lora_alpha
    if args.begins_in_weights:
        rank, alpha = doubled(rank, alpha, args.use_rslora)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=args.lora_dropout,
        use_dora=args.use_dora,
        target_modules="all-linear" if everything else names,
        exclude_modules=[*excluded, *(routers(model) if everything else ())] or None,
        use_rslora=args.use_rslora,
        bias=args.lora_bias,
        modules_to_save=whole or None,
        init_lora_weights=kind if kind in ("gaussian", "orthogonal") else True,
        trainable_token_indices=_rows_of_tokens(model, new_ids, whole) if new_ids else None,
    )
    if everything:
        _leave_routers(config, model)
    torch.manual_seed(seed)
    adapted = _train_in_float32(get_peft_model(model, config))
    if args.begins_in_weights and not any(weight.is_meta for weight in adapted.parameters()):
        begin(adapted, kind)
    return adapted


def _train_in_float32(model: Any) -> Any:
    """peft holds A and B in float32 over weights in 16 bits, but whole layers and rows of tokens in the base's type."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def adapter_on_paper(model: PreTrainedModel, folder: str) -> Any:
    """An adapter of the kind that lies in `folder`, over a model of the meta device."""
    from peft import PeftConfig, get_peft_model

    _check_patterns(model, folder)
    with reading(f"the adapter {folder}", "get its folder anew"):
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        return get_peft_model(model, config)


def _rows_of_tokens(model: PreTrainedModel, ids: list[int], whole: list[str]) -> dict[str, list[int]] | None:
    """For peft: the rows of the embedding and of an output head of its own; of a tied one peft takes care."""
    ends = [name for name in _vocabulary_modules(model) if not any(name.endswith(other) for other in whole)]
    names = ends[:1] if is_tied(model) else ends
    return {name.rpartition(".")[2]: ids for name in names} or None


def is_tied(model: PreTrainedModel) -> bool:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)


def _check_names(model: PreTrainedModel, flag: str, names: list[str]) -> None:
    modules = dict(model.named_modules())
    missing = [name for name in names if not any(n == name or n.endswith(f".{name}") for n in modules)]
    if missing:
        linear = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)}
        raise ModelError(
            f"{flag}: the model has no {', '.join(missing)}; its linear layers are {', '.join(sorted(linear))}"
        )


def _check_untied(model: PreTrainedModel, flag: str, names: list[str]) -> None:
    ends = [n for n in _vocabulary_modules(model) if any(n == name or n.endswith(f".{name}") for name in names)]
    if ends and is_tied(model):
        raise ModelError(
            f"{flag}: {', '.join(ends)} is tied, embedding and head are one tensor, and what is trained of one of them "
            "could not be merged and exported: leave it out"
        )


def routers(model: nn.Module) -> list[str]:
    """Layers of a mixture of experts that choose the experts: an adapter there changes which are trained at all."""
    config = model.config.get_text_config() if hasattr(model, "config") else None
    kinds = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    counts = {getattr(config, kind) for kind in kinds if isinstance(getattr(config, kind, None), int)}
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


def _leave_routers(config: Any, model: PreTrainedModel) -> None:
    """Take the routers out of what "all-linear" is for peft where experts are stacked: weights that it names itself."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a peft that knows nothing of them
        return
    convert_peft_config_for_transformers(config, model, None)
    if config.target_parameters:
        config.target_parameters = {
            name for name in config.target_parameters if not {"gate", "router"} & set(name.split("."))
        }


def load_stack(model: PreTrainedModel, folder: str, *, trainable: bool = False, **options: Any) -> Any:
    """The model with the adapter of `folder` over it, and with the frozen one that lies in it, if it was trained so."""
    model = load_adapter(model, folder, trainable=trainable, **options)
    model = _train_in_float32(model) if trainable else model
    below = Path(folder) / FROZEN
    if (below / ADAPTER_CONFIG).is_file():
        model = load_adapter(model, str(below), name=FROZEN, **options)
        activate_both(model, trainable)
    base = model.get_base_model().name_or_path
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    return model


def freeze_below(model: PreTrainedModel, folder: str, args: ModelArguments, seed: int) -> Any:
    """A new adapter over the one of `folder`, which stays as it is; both are added to the weights."""
    new = add_adapter(model, args, seed)
    new = load_adapter(new, folder, name=FROZEN)
    activate_both(new, trainable=True)
    return new


def activate_both(model: Any, trainable: bool) -> None:
    """Switch a frozen adapter and the one over it on; the latter is trained, or neither is."""
    model.base_model.set_adapter(["default", FROZEN])
    for name, parameter in model.named_parameters():
        words = name.split(".")
        if FROZEN in words:
            parameter.requires_grad_(False)
        elif "default" in words:
            parameter.requires_grad_(trainable)


def merge(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """What `model` computes with the adapter of `folder`, as a plain model of its type.

    Raises:
        ModelError: the adapter does not fit, or is of a kind that is no change of weights.
    """
    refuse_prompts(folder)
    adapted = load_stack(model, folder)
    try:
        return adapted.merge_and_unload(safe_merge=True)  # refuses weights that are not finite
    except (ValueError, NotImplementedError) as error:
        raise ModelError(f"the adapter {folder} cannot be merged: {first_line(error)}") from error
