"""Loading what a run has left: the tuned model, the base that it came from, the tokenizer, template and stop tokens.

`find_source` says what a name is: a run's output folder, one of its checkpoints, a plain model folder or a hub id.
Nothing is loaded until asked for, and a moved base model can be named by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from preference.errors import PreferenceError
from preference.models.adapters import load_adapter, load_stack
from preference.models.folder import ModelError, read_config, read_generation_config, read_tokenizer, reading
from preference.models.hardware import Hardware
from preference.models.kinds import check_kind
from preference.models.look import load_weights
from preference.models.quantized import as_stored
from preference.models.sources import SourceError, adapter_config, written_base
from preference.models.sources import resolve_base as base_of
from preference.models.starter import resolve_model
from preference.templates.resolve import resolve_template

BEFORE = "before"  # the name of the adapter that a run was handed, beside the one that it made of it


class LoadingError(PreferenceError, RuntimeError):
    """A model that cannot be loaded as asked; str() says the way out."""


@dataclass(frozen=True)
class Source:
    """What a name given on the command line leads to.

    `name` and `base` are what from_pretrained takes. `base` is the model that an adapter belongs to, or that a full
    run started from; None where nobody wrote it down. `run` is the run's run.json, empty for other models.
    """

    name: str
    adapter: bool
    base: str | None
    run: Mapping[str, Any] = field(default_factory=dict)
    run_folder: Path | None = None  # the folder of run.json: the parent of a checkpoint
    trust_remote_code: bool = False

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The flags of the run."""
        return self.run.get("arguments", {})

    @property
    def adapter_before(self) -> str | None:
        """The adapter that the run was handed and has trained further; None where it was merged into the base."""
        merged = self.adapter and self.arguments.get("new_adapter")
        return None if merged else self.run.get("adapter")

    def file(self, name: str) -> Path | None:
        """A file of the model's folder, or of its run's folder if the model is a checkpoint without it."""
        for folder in (Path(self.name), self.run_folder):
            if folder is not None and (folder / name).is_file():
                return folder / name
        return None


def find_source(
    name: str, *, base: str | None = None, use_modelscope: bool = False, trust_remote_code: bool = False
) -> Source:
    """What `name` is. `base` overrides the base model that the run wrote down.

    Raises:
        ModelNotFound: nothing is called so.
        LoadingError: the adapter or run.json there cannot be read.
    """
    name = resolve_model(name, use_modelscope=use_modelscope)
    run_folder = _run_folder(Path(name))
    run = _read_json(run_folder / "run.json") if run_folder else {}
    try:
        config = adapter_config(name)
        if config is not None:
            check_kind(name, changes=False)
    except (SourceError, ModelError) as error:
        raise LoadingError(str(error)) from None
    if config is not None:
        base = base or written_base(name, config)
        if not base:
            raise LoadingError(f"{name} is an adapter that does not say whose: name its model with --base_model")
    handed_in = run.get("base_model") if run.get("adapter") else None  # what was tuned was an adapter over this
    base = base or handed_in or run.get("arguments", {}).get("model_name_or_path")
    if not config and Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise LoadingError(f"{name} holds neither config.json nor adapter_config.json: has the run ended?")
    return Source(name, config is not None, base, run, run_folder, trust_remote_code)


def _run_folder(folder: Path) -> Path | None:
    parents = (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,)
    return next((parent for parent in parents if (parent / "run.json").is_file()), None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadingError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("arguments", {}), dict):
        raise LoadingError(f"{path} is not what a run writes: it does not hold a JSON object with the run's arguments")
    return value


def resolve_base(source: Source, use_modelscope: bool = False) -> str:
    """What from_pretrained takes for the base model: as the run wrote it, or below the project's folder.

    Raises:
        LoadingError: nobody wrote it down, or it is not where the run says.
    """
    if source.base is None:
        raise LoadingError(f"{source.name} does not say which model it was tuned from: name it with --base_model")
    try:
        return base_of(source.name, source.base, use_modelscope)
    except SourceError as error:
        raise LoadingError(str(error)) from None


def pick_dtype(name: str, hardware: Hardware) -> torch.dtype:
    """The type to compute in: `name`, or for "auto" bfloat16 where the device multiplies it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if hardware.bf16 and hardware.device != "cpu" else torch.float32


def load_base_model(source: Source, dtype: torch.dtype, device: str, use_modelscope: bool = False) -> PreTrainedModel:
    """The model before tuning, for generation."""
    return _load(resolve_base(source, use_modelscope), source, dtype, device)


def load_untuned_model(source: Source, dtype: torch.dtype, device: str, use_modelscope: bool = False) -> Any:
    """The model that the run was handed: its base, with the adapter over it if there was one.

    Raises:
        LoadingError: it is not where the run says.
    """
    base = load_base_model(source, dtype, device, use_modelscope)
    adapter = source.adapter_before
    return _laid_over(base, adapter, torch_device=device).eval() if adapter else base


def add_adapter_before(model: Any, source: Source) -> None:
    """Give a tuned adapter's model the adapter that the run was handed, as BEFORE, not switched on.

    Raises:
        LoadingError: it is not where the run says, or does not fit.
    """
    assert source.adapter_before is not None
    _laid_over(model, source.adapter_before, name=BEFORE)


def _laid_over(model: Any, folder: str, **options: Any) -> Any:
    if not Path(folder).is_dir():
        raise LoadingError(f"the adapter that was tuned further is not at {folder} any more: put it there to compare")
    try:
        return load_adapter(model, folder, **options)
    except ModelError as error:
        raise LoadingError(str(error)) from error


def load_tuned_model(source: Source, dtype: torch.dtype, device: str, use_modelscope: bool = False) -> Any:
    """The tuned model for generation: a PeftModel over its base where the run trained an adapter.

    Raises:
        LoadingError: the adapter does not fit the base model.
    """
    if not source.adapter:
        return _load(source.name, source, dtype, device)
    base = load_base_model(source, dtype, device, use_modelscope)
    try:
        return load_stack(base, source.name, torch_device=device).eval()
    except ModelError as error:
        raise LoadingError(f"{error} with --base_model") from error


def _load(name: str, source: Source, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Whole, or not at all; weights that stay quantised are made on their device."""
    code = source.trust_remote_code
    try:
        stored = as_stored(name, read_config(name, trust_remote_code=code))
        there = {"": device} if stored is not None and not stored.dense else None
        model = load_weights(name, dtype=dtype, device_map=there, trust_remote_code=code)
    except PreferenceError as error:
        raise LoadingError(str(error)) from error
    return (model if there else model.to(device)).eval()


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with the model, with a pad token. Raises ModelError, LoadingError."""
    folder = source.file("tokenizer_config.json") or source.file("tokenizer.json")
    where = str(folder.parent) if folder else source.name
    if folder is None and source.adapter and Path(source.name).is_dir():
        where = resolve_base(source)
    way_out = "get the folder anew, or name another model"
    tokenizer = read_tokenizer(where, way_out, trust_remote_code=source.trust_remote_code)
    template = source.file("chat_template.jinja")
    if not tokenizer.chat_template and template:  # a checkpoint of a run: the run's own
        with reading(str(template), way_out):
            tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def load_template(source: Source, tokenizer: Any, name: str | None = None) -> tuple[Any, list[str]]:
    """The conversation template that the model was trained with, and warnings to print; `name` overrides it.

    It is the one that run.json names, which is what was saved as the chat template; without a run, the tokenizer's own.
    """
    name = name or str(source.run.get("template", "auto"))
    return resolve_template(name, tokenizer, fold_system=bool(source.arguments.get("fold_system")))


def generation_config(source: Source, model: Any) -> GenerationConfig:
    """The run's generation_config.json, or the model's own."""
    path = source.file("generation_config.json")
    return read_generation_config(path.parent) if path else model.generation_config
