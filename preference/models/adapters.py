"""Adapters: made anew, gone on with, or merged into what they were laid over."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from preference.arguments import FLAGS, Arguments, ModelArguments
from preference.models.beginnings import begin, doubled
from preference.models.folder import ModelError, first_line, reading
from preference.models.kinds import check_kind
from preference.models.patterns import check_patterns
from preference.models.sources import ADAPTER_CONFIG, adapter_config
from preference.models.targets import find_targets, is_tied, listed, settle_stacked, vocabulary_modules
from preference.models.weight_files import some, tensor_headers

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
    check_kind(folder, changes=trainable)
    _check_patterns(lm, folder)
    names = _tensor_names(folder)
    _grow_vocabulary(lm, folder)
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=name, is_trainable=trainable, **options)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name, is_trainable=trainable, **options)
    except ImportError as error:  # of a package that its kind is made with
        raise ModelError(f"the adapter {folder} cannot be loaded: {first_line(error)}") from error
    except Exception as error:  # shapes, modules, kinds, whatever its config holds
        reason = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), first_line(error))
        raise ModelError(
            f"the adapter {folder} does not fit its base {lm.config.name_or_path}: {reason.rstrip('.')}. If another "
            "model lies there now, name the right one"
        ) from error
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if broken := [n for n, weight in state.items() if weight.is_floating_point() and not weight.isfinite().all()]:
        raise ModelError(
            f"the adapter {folder}: {len(broken)} tensors hold NaN or infinity ({some(broken)}): it is damaged, or was "
            "saved by a run that diverged. Take an earlier checkpoint"
        )
    if names is not None:
        _refuse_misfit(lm, folder, {
            "have no place": sorted(n for n in names - state.keys() if not _of_vocabulary(lm, n)),
            "are missing": sorted(state.keys() - names),
        })  # fmt: skip
    return model


def _check_patterns(lm: PreTrainedModel, folder: str) -> None:
    names = [name for name, _ in lm.named_modules()]
    check_patterns(folder, adapter_config(folder) or {}, names)


def _refuse_misfit(lm: PreTrainedModel, folder: str, faults: dict[str, list[str]]) -> None:
    """Raises ModelError for tensors of an adapter that do not fit, by what is wrong with them."""
    said = [f"{len(found)} of its tensors {what} ({some(found)})" for what, found in faults.items() if found]
    if said:
        raise ModelError(
            f"the adapter {folder} does not fit its base {lm.config.name_or_path}: {'; '.join(said)}. If another model "
            "lies there now, name the right one"
        )


def check_on_paper(lm: PreTrainedModel, folder: str) -> None:
    """Whether the adapter of `folder` fits a model on the meta device, by the header of its file; gives the model as
    many rows as it was saved with.

    Raises:
        ModelError: it does not fit.
    """
    from peft import get_peft_model_state_dict

    check_kind(folder, changes=True)
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
    """Names in a local adapter's file; None for a hub's, or one that is no safetensors file.

    Raises:
        ModelError: it holds numbers of 8 bits, which nothing says how to scale.
    """
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        return None
    headers = tensor_headers(file)
    eighths = [f"{name} as {kind}" for name, (kind, _) in headers.items() if kind in ("I8", "U8") or kind[:2] == "F8"]
    if eighths:
        raise ModelError(f"{file} holds {some(eighths)}, and nothing says how that is scaled: get the adapter anew")
    return set(headers)


def _of_vocabulary(lm: PreTrainedModel, tensor: str) -> bool:
    return any(f".{name}." in f".{tensor}" for name in vocabulary_modules(lm))


def _grow_vocabulary(lm: PreTrainedModel, folder: str) -> None:
    """Give the base as many rows as the adapter was saved with: tokens that were added are in its own tensors."""
    file, config = Path(folder) / "adapter_model.safetensors", Path(folder) / ADAPTER_CONFIG
    if not file.is_file() or not config.is_file():
        return
    endings = tuple(f"{name}.weight" for name in vocabulary_modules(lm))
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
            asked, has = sorted(listed(asked)), sorted(has or ())
            if asked in (["all"], ["all-linear"]):
                continue
        if asked != has and not (not asked and has is None):
            raise ModelError(
                f"--{flag} {getattr(args.model, flag)} contradicts the adapter {adapter}, which has {field} {has}: "
                "training goes on with the adapter as it is. Drop the flag, or --new_adapter true merges it and starts "
                "a new one"
            )


def add_adapter(model: PreTrainedModel, args: ModelArguments, seed: int, new_ids: Iterable[int] = ()) -> Any:
    """Wrap `model` in a LoRA adapter whose weights are drawn from `seed` and held in float32.

    Args:
        new_ids: tokens whose rows of the embedding and of the output head are trained beside it.

    Raises:
        ModelError: a name of target_modules, exclude_modules or modules_to_save that the model has not, or that is
            tied to another.
    """
    from peft import LoraConfig, get_peft_model

    targets = find_targets(model, args)
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
        target_modules="all-linear" if targets.everything else targets.names,
        exclude_modules=targets.excluded or None,
        use_rslora=args.use_rslora,
        bias=args.lora_bias,
        modules_to_save=targets.whole or None,
        init_lora_weights=kind if kind in ("gaussian", "orthogonal") else True,
        trainable_token_indices=_rows_of_tokens(model, new_ids, targets.whole) if new_ids else None,
    )
    settle_stacked(config, model, targets)
    torch.manual_seed(seed)
    try:
        adapted = _train_in_float32(get_peft_model(model, config))
    except (ValueError, TypeError, NotImplementedError) as error:  # of layers that it has no adapter for
        raise ModelError(f"target_modules {args.target_modules} cannot be had: {first_line(error)}") from error
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
        try:
            return get_peft_model(model, config)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error).lower():
                raise
            raise ModelError(
                f"the adapter {folder} is of the kind {config.peft_type.value}, which is made from the weights, and a "
                "dry run loads none: start the run without dry_run"
            ) from error


def _rows_of_tokens(model: PreTrainedModel, ids: list[int], whole: list[str]) -> dict[str, list[int]] | None:
    """For peft: the rows of the embedding and of an output head of its own; of a tied one peft takes care."""
    ends = [name for name in vocabulary_modules(model) if not any(name.endswith(other) for other in whole)]
    names = ends[:1] if is_tied(model) else ends
    return {name.rpartition(".")[2]: ids for name in names} or None


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
    check_kind(folder, changes=True)
    adapted = load_stack(model, folder)
    try:
        return adapted.merge_and_unload(safe_merge=True)  # refuses weights that are not finite
    except (ValueError, NotImplementedError) as error:
        raise ModelError(f"the adapter {folder} cannot be merged: {first_line(error)}") from error
