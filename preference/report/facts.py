"""What a run is about to do, in numbers."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preference.arguments import Arguments
from preference.files import save_json
from preference.integrity import MANIFEST
from preference.launch.agreement import versions
from preference.models.hardware import detect, half_type, type_name
from preference.models.parameters import count_parameters


def run_facts(args: Arguments, trainer: Any, conversation: Any) -> dict[str, Any]:
    """What is about to be trained, in numbers.

    The first rank writes them to run.json, unless that describes a model that this run has yet to replace.
    """
    trainable, parameters = count_parameters(trainer.model)
    pairs = trainer.get_total_train_batch_size(trainer.args)
    facts = {
        "arguments": args.values(),
        "beta": args.beta,
        "learning_rate": trainer.args.learning_rate,
        "learning_rate_from": args.learning_rate(parameters).source,
        "base_model": base_name(trainer.model, args),
        "template": conversation.name,
        "hardware": str(detect(args.run.use_cpu)),
        "bf16": trainer.args.bf16,
        "precision": type_name(half_type(trainer.args)),
        "world_size": trainer.args.world_size,
        "pairs_per_step": pairs,
        "parameters": parameters,
        "trainable": trainable,
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(),
    }
    if trainer.is_world_process_zero() and not (Path(args.run.output_dir) / MANIFEST).exists():
        save_json(Path(args.run.output_dir) / "run.json", facts)
    return facts


def base_name(model: Any, args: Arguments) -> str:
    """What an adapter lies over, where there is one; else the model that was handed in."""
    return model.get_base_model().name_or_path if hasattr(model, "peft_config") else args.model.model_name_or_path


def headline(facts: Mapping[str, Any], train_set: Any) -> str:
    """The model and the training in a line each."""
    flags, millions = facts["arguments"], (facts["parameters"] / 1e6, facts["trainable"] / 1e6)
    lines = [
        "model: {}, {:,.1f} M parameters, {:,.2f} M of them trained".format(flags["model_name_or_path"], *millions)
    ]
    if flags["do_train"]:
        lines.append(
            f"training: {len(train_set)} pairs, {facts['pairs_per_step']} per optimizer step, loss={flags['loss']}, "
            f"engine={flags['engine']}"
        )
        lines.append(
            f"learning rate {facts['learning_rate']:g} ({facts['learning_rate_from']}), beta {facts['beta']:g}"
        )
    return "\n".join(lines)
