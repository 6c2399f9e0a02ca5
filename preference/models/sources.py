"""What a model's name leads to: a base, and an adapter over it where the name is an adapter's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.peft_utils import find_adapter_config_file

from preference.errors import PreferenceError
from preference.models.folder import LARGEST_RANK, MOST_LAYERS
from preference.models.names import public_name
from preference.models.starter import ROOT, ModelNotFound, resolve_model
from preference.models.weight_files import READ

ADAPTER_CONFIG = "adapter_config.json"
MERGED = "merged_base"  # folder in output_dir: what a new adapter was laid over, where that was merged for it
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


class SourceError(PreferenceError, RuntimeError):
    """A name whose model, or whose adapter's base, is not where it should be."""


@dataclass(frozen=True)
class ModelSource:
    """What from_pretrained takes: of the base, and of the adapter if there is one."""

    base: str
    adapter: str | None = None
    fetched: bool = True  # False: from a hub came what a dry run needs alone, and no weights

    @property
    def name(self) -> str:
        return self.adapter or self.base

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer comes from: an adapter may have been saved with its own."""
        if self.adapter and any((Path(self.adapter) / file).is_file() for file in TOKENIZER_FILES):
            return self.adapter
        return self.base


def adapter_config(name: str, cache_dir: str | None = None) -> dict[str, Any] | None:
    """adapter_config.json of `name` (a folder or a hub id); None where it is no adapter.

    Raises:
        SourceError: it cannot be read, lies without its weights, or beside those of a whole model.
    """
    folder = Path(name)
    file = folder / ADAPTER_CONFIG if folder.is_dir() else find_adapter_config_file(name, cache_dir=cache_dir)
    if file is None or not Path(file).is_file():
        return None
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise SourceError(f"{file} does not hold a JSON object")
    if not isinstance(config.get("base_model_name_or_path") or "", str):
        raise SourceError(f"{file} names no base model: base_model_name_or_path must be a text")
    ranks = config.get("rank_pattern")
    for rank in (config.get("r"), *(ranks.values() if isinstance(ranks, dict) else ())):
        if isinstance(rank, (int, float)) and rank > LARGEST_RANK:
            raise SourceError(f"{file} has rank {rank}, and no adapter has more than {LARGEST_RANK}: get it anew")
    if (layers := _replicated(config.get("layer_replication"))) > MOST_LAYERS:
        raise SourceError(
            f"{file}: its layer_replication makes {layers:,} layers, and no model has more than {MOST_LAYERS:,}: "
            "get it anew"
        )
    if folder.is_dir():
        if not any((folder / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
            raise SourceError(f"{name} holds {ADAPTER_CONFIG} but no adapter_model.safetensors: its weights are lost")
        if any((folder / weights).is_file() for weights in READ) and (folder / "config.json").is_file():
            raise SourceError(
                f"{name} holds a whole model and an adapter: name both, --model_name_or_path for the model and "
                "--adapter_name_or_path for the adapter, from folders of their own"
            )
    return config


def _replicated(ranges: Any) -> int:
    """Layers that an adapter makes of its base's: [[0, 4], [2, 5]] are 7."""
    pairs = [pair for pair in ranges if isinstance(pair, list) and len(pair) == 2] if isinstance(ranges, list) else []
    return sum(end - start for start, end in pairs if type(start) is type(end) is int and end > start)


def written_base(adapter: str, config: dict[str, Any]) -> str | None:
    """The base of an adapter as it was written down; of its own name alone, as the run that is beside it knows it.

    An adapter's config has the last part alone of a path outside the project; run.json, which stays here, has it whole.
    """
    written = config.get("base_model_name_or_path")
    if not written:
        return None
    folder = Path(adapter)
    places = (folder, folder.parent) if folder.name.startswith("checkpoint-") or folder.name == "frozen" else (folder,)
    for place in places:
        if Path(written).name == MERGED and (place / MERGED).is_dir():  # it goes where its run's folder goes
            return str(place / MERGED)
        try:
            run = json.loads((place / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        arguments = run.get("arguments", {}) if isinstance(run, dict) else None
        if not isinstance(arguments, dict):
            continue
        for known in (run.get("base_model"), arguments.get("model_name_or_path")):
            if isinstance(known, str) and public_name(known) == written:
                return known
    return written


def resolve_base(
    adapter: str,
    base: str | None,
    use_modelscope: bool = False,
    cache_dir: str | None = None,
    flag: str = "--base_model",
) -> str:
    """What from_pretrained takes for the base of an adapter: as its config names it, or below the project's folder.

    Raises:
        SourceError: nobody wrote it down, it is not where the config says, or is an adapter itself.
    """
    if not base:
        raise SourceError(f"{adapter} is an adapter that does not say whose: name its model with {flag}")
    below_project = ROOT / base
    if not os.path.isabs(base) and not Path(base).is_dir() and below_project.is_dir():
        return str(below_project)
    try:
        found = resolve_model(base, use_modelscope=use_modelscope, cache_dir=cache_dir)
    except ModelNotFound as error:
        raise SourceError(f"the base of {adapter}: {error}\nIf it lies elsewhere, name it with {flag}") from None
    if Path(found).is_dir() and adapter_config(found) is not None:
        raise SourceError(f"the base of {adapter} is {base}, an adapter itself: merge that first, with export_model.py")
    return found


def find_model(
    name: str,
    adapter: str | None = None,
    *,
    base_given: bool = False,
    use_modelscope: bool = False,
    cache_dir: str | None = None,
    weights: bool = True,
    warn: Callable[[str], None] = lambda text: None,
) -> ModelSource:
    """What `name` leads to, and `adapter`, which is laid over it.

    Args:
        base_given: whether the user named a model besides the adapter; else the adapter's own base is taken.

    Raises:
        ModelNotFound, SourceError, StarterModelError: the message says what was tried.
    """

    def resolve(what: str) -> str:
        return resolve_model(what, use_modelscope=use_modelscope, cache_dir=cache_dir, weights=weights)

    if adapter is None:
        found = resolve(name)
        config = adapter_config(found, cache_dir)
        if config is None:
            return ModelSource(found, fetched=weights or not use_modelscope or Path(name).expanduser().exists())
        base = resolve_base(found, written_base(found, config), use_modelscope, cache_dir,
                            "--model_name_or_path BASE --adapter_name_or_path ADAPTER")  # fmt: skip
        return ModelSource(base, found)
    found = resolve(adapter)
    config = adapter_config(found, cache_dir)
    if config is None:
        raise SourceError(f"adapter_name_or_path {adapter} is no adapter: it has no {ADAPTER_CONFIG}")
    said = written_base(found, config)
    if not base_given:
        return ModelSource(resolve_base(found, said, use_modelscope, cache_dir, "--model_name_or_path"), found)
    base = resolve_base(found, name, use_modelscope, cache_dir, "--model_name_or_path")
    if said and Path(said).name != Path(name).name:
        warn(f"the adapter {adapter} says that it belongs to {said}, and is laid over {name}")
    return ModelSource(base, found)
