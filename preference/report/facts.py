"""What a run is about to do, in numbers."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preference.arguments import Arguments
from preference.engine.batching import row_lengths
from preference.files import save_json
from preference.integrity import MANIFEST
from preference.launch.agreement import versions
from preference.models.hardware import detect, half_type, type_name
from preference.models.parameters import count_parameters
from preference.models.sources import ModelSource
from preference.plan.speed import SpeedMeter, peak_memory
from preference.screen import duration
from preference.terminal.console import Terminal
from preference.terminal.language import tr


def run_facts(args: Arguments, source: ModelSource, trainer: Any, conversation: Any) -> dict[str, Any]:
    """What is about to be trained, in numbers; `source` is what was handed in.

    The first rank writes them to run.json, unless that describes a model that this run has yet to replace.
    """
    trainable, parameters = count_parameters(trainer.model)
    pairs = trainer.get_total_train_batch_size(trainer.args)
    facts = {
        "arguments": args.values(),
        "beta": args.beta,
        "beta_from": args.beta_from,
        "learning_rate": trainer.args.learning_rate,
        "learning_rate_from": args.learning_rate(parameters).source,
        "base_model": base_name(trainer.model, source, args),
        "adapter": whole_path(source.adapter),
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


def base_name(model: Any, source: ModelSource, args: Arguments) -> str:
    """What an adapter lies over, the one that is trained or the one that was handed in; else the model's name."""
    if hasattr(model, "peft_config"):
        return model.get_base_model().name_or_path
    return whole_path(source.base) if source.adapter else args.model.model_name_or_path


def whole_path(name: Any) -> Any:
    """A folder from wherever it is read; another name, or none, as it is."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


@dataclass(frozen=True)
class Plan:
    """A training before its first step.

    Attributes:
        single: rows of one answer, rather than pairs.
        tokens: of all steps together, each prompt once; None where nobody counts them.
        seconds: what they take at least, at the peak that was measured. held, limit: bytes of memory.
    """

    pairs: int
    steps: int
    tokens: float
    seconds: float | None
    peak: float | None
    held: float | None
    limit: int
    single: bool = False


def plan_of(args: Arguments, trainer: Any, meter: SpeedMeter, train_set: Any) -> Plan:
    batch = trainer.get_total_train_batch_size(trainer.args)
    steps = args.run.max_steps
    if steps <= 0:
        steps = math.ceil(math.ceil(len(train_set) / batch) * args.run.num_train_epochs)
    tokens = float(row_lengths(train_set).sum() - len(train_set)) / len(train_set) * steps * batch
    seconds = None
    if meter.flops_per_token and meter.peak:
        seconds = tokens * meter.flops_per_token / (meter.peak * trainer.args.world_size)
    held, hardware = peak_memory(trainer.args.device), detect(args.run.use_cpu)
    single = "desirable" in train_set.column_names
    return Plan(len(train_set), steps, tokens, seconds, meter.peak, held, hardware.memory, single)


def show_plan(facts: Mapping[str, Any], plan: Plan | None, terminal: Terminal) -> None:
    """The model, and what is about to be done with it; `plan` is None where nothing is trained."""
    flags = facts["arguments"]
    name, parameters, trained = flags["model_name_or_path"], facts["parameters"] / 1e6, facts["trainable"] / 1e6
    key = "parameters_scored" if plan is None else "parameters"
    model = tr(key, name=name, all=parameters, trained=trained)
    terminal.rows(tr("model"), [terminal.cut(model, 1) if terminal.coloured else model])
    if plan is None:
        return
    batch, kind = facts["pairs_per_step"], tr("of_singles" if plan.single else "of_pairs")
    rate = tr(
        "rate",
        rate=facts["learning_rate"],
        source=facts["learning_rate_from"],
        beta=facts["beta"],
        beta_source=facts["beta_from"],
    )
    terminal.rows(tr("training"), [
        tr("training_of", pairs=plan.pairs, kind=kind, batch=batch, loss=flags["loss"], engine=flags["engine"]),
        terminal.cut(rate, 1) if terminal.coloured else rate,
    ])  # fmt: skip
    words = [tr("plan_steps", steps=plan.steps, batch=batch, kind=kind, tokens=plan.tokens)]
    if plan.seconds is not None and plan.peak is not None:
        words.append(tr("plan_time", time=duration(plan.seconds), peak=plan.peak / 1e12))
    if plan.held is not None and plan.limit:
        words.append(tr("plan_memory", held=plan.held, limit=plan.limit / 2**30))
    terminal.rows(tr("plan"), ["; ".join(words)])
