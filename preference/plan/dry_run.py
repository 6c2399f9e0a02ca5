"""What a run would do and need, as text: settings, data, model, steps, memory, time, and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from preference.arguments import STRATEGIES, Arguments
from preference.arguments.parsing import TRL_HAS
from preference.engine.batching import row_lengths, shared_prefix
from preference.engine.masks import EngineError
from preference.losses import Objective
from preference.models.hardware import Hardware, half_type, type_name
from preference.models.sources import ModelSource
from preference.plan.estimate import ENGINES, Estimator, Memory, Work, changed, memory_rate, plan_work
from preference.plan.speed import matmul_rate, peak_memory
from preference.plan.tracing import Trace, TraceError
from preference.screen import duration
from preference.train.budget import Budget

WORLDS = (1, 2, 4, 8)
GIB = 2**30
GROWTH = 1.6  # of a process on a CPU in 25 steps over its third, at most: freed memory leaves holes (benchmarks/LOG.md)


@dataclass
class Plan:
    """A run on paper."""

    args: Arguments
    estimator: Estimator
    work: Work
    trace: Trace
    pairs: int
    accumulation: int

    def memory(self, strategy: str = "ddp", world: int = 1) -> Memory:
        return self.estimator.memory(self.trace, self.work.micro_batches > 1, strategy, world)


@dataclass(frozen=True)
class Setup:
    """What does not change between the variants of a run that are looked at.

    lengths, common: tokens [n, 3] of the training pairs, and their `shared_prefix`. single: they are single answers.
    """

    source: str
    hardware: Hardware
    objective: Objective
    half: torch.dtype | None
    lengths: np.ndarray
    config: Any = None
    common: int = 0
    adapter: str | None = None
    single: bool = False

    def estimator(self, args: Arguments) -> Estimator:
        """
        Raises:
            EngineError: the run cannot be made.
        """
        return Estimator(
            self.source,
            args,
            self.hardware,
            self.objective,
            self.half,
            config=self.config,
            common=self.common,
            adapter=self.adapter,
        )

    def plan(self, args: Arguments, pairs: int, accumulation: int, estimator: Estimator | None = None) -> Plan:
        """
        Args:
            estimator: of a run that differs in the size of its micro-batches at most.

        Raises:
            EngineError, TraceError: the run cannot be made, or not be followed on paper.
        """
        estimator = estimator or self.estimator(args)
        work = plan_work(self.lengths, args, self.objective, pairs, accumulation, estimator.share_prompt, self.common)
        trace = estimator.trace(work.longest, work.micro_batches > 1)
        return Plan(args, estimator, work, trace, pairs, accumulation)

    @property
    def limit(self) -> float:
        return float(self.hardware.memory)

    @property
    def present(self) -> float:
        """Bytes that the process has taken before a model is loaded and that count towards the limit."""
        return (peak_memory(torch.device("cpu")) or 0.0) * GIB if self.hardware.device == "cpu" else 0.0


def configuration(args: Arguments) -> str:
    """Every flag with its value; those that the user gave are marked."""
    lines = ["configuration (* given by you, the others by default):"]
    for group in (args.model, args.data, args.objective, args.run):
        lines += [f"  {'*' if name in args.given else ' '} {name} = {value}" for name, value in vars(group).items()]
    return "\n".join(lines)


def length_table(lengths: np.ndarray, single: bool) -> str:
    """Quantiles of the tokens of n pairs, or single answers: lengths [n, 3] of prompt, chosen and rejected."""
    marks = {"least": 0, "median": 50, "90%": 90, "99%": 99, "most": 100}
    names = ("prompt", "answer", "mismatched answer") if single else ("prompt", "chosen", "rejected")
    columns = dict(zip(names, lengths.T, strict=True))
    columns["both, prompt once" if single else "pair, prompt once"] = lengths.sum(axis=1) - 1
    lines = [
        f"tokens of {len(lengths)} training {'answers' if single else 'pairs'}"
        + "".join(f"{name:>9}" for name in marks)
    ]
    width = len(lines[0]) - 9 * len(marks)
    for name, values in columns.items():
        found = "".join(f"{np.percentile(values, mark, method='nearest'):>9.0f}" for mark in marks.values())
        lines.append(f"{'  ' + name:<{width}}{found}")
    return "\n".join(lines)


def _engine_options(args: Arguments) -> Iterator[tuple[str, Arguments | str]]:
    """(engine, arguments of this run with it, or why it cannot be had)."""
    choice = args.objective
    for engine in ENGINES:
        if engine == "trl" and (choice.loss not in TRL_HAS or choice.nll_scope not in (None, "sequence")):
            yield engine, f"TRL has no loss={choice.loss} with nll_scope={choice.nll_scope}"
        else:
            yield engine, changed(args, {"engine": engine})


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _parts(memory: Memory) -> str:
    names = ("weights", "gradients", "optimizer", "activations", "head", "other", "peak")
    label = {"head": "head and loss", "other": "allocator, libraries", "peak": "at the peak"}
    return ", ".join(f"{label.get(name, name)} {_gib(getattr(memory, name))}" for name in names)


def _memory_table(plan: Plan) -> list[str]:
    rows = ["    strategy      " + "".join(f"{world:>4} device{'s' if world > 1 else ' '}" for world in WORLDS)]
    for strategy in STRATEGIES:
        cells = ["" if strategy != "ddp" and w == 1 else _gib(plan.memory(strategy, w).peak) for w in WORLDS]
        rows.append(f"    {strategy:<14}" + "".join(f"{cell:>12}" for cell in cells))
    return rows


def _describe_engine(setup: Setup, plan: Plan, rates: tuple[float, float]) -> list[str]:
    work, engine = plan.work, plan.args.objective.engine
    seconds = plan.estimator.seconds(plan.trace, work, *rates)
    return [
        f"engine={engine}: {work.tokens_per_step:,.0f} tokens per step and device in up to {work.micro_batches} "
        f"micro-batches, the longest of {len(work.longest)} pairs and "
        f"{plan.estimator.tokens(work.longest):,} tokens",
        f"  time per step {seconds:.2g} s, {work.steps} steps {duration(seconds * work.steps)} on one device "
        "(evaluation, communication and waiting for data not counted)",
        f"  GiB on one device: {_parts(plan.memory())}",
        "  GiB at the peak, on each device:",
        *_memory_table(plan),
    ]


def _levels(args: Arguments, hardware: Hardware) -> list[dict[str, Any]]:
    """Changes that save memory, the ones that cost least first, each on top of those before."""
    found: list[dict[str, Any]] = [{}]
    for wanted, change in (
        (args.objective.engine == "trl", {"engine": "packed"}),
        (not args.run.gradient_checkpointing, {"gradient_checkpointing": True}),
        (not args.model.use_peft, {"use_peft": True}),
        (hardware.device == "cuda" and not args.quantized, {"use_peft": True, "qlora": True}),
    ):
        if wanted:
            found.append(found[-1] | change)
    return found


def _halves(value: int) -> list[int]:
    return [max(1, value >> i) for i in range(1, value.bit_length())]


def _cuts(setup: Setup, plan: Plan, args: Arguments) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Smaller and smaller micro-batches of the same step: (changed flags, pairs, accumulation)."""
    budget = plan.args.objective.max_tokens_per_micro_batch
    if budget and args.objective.engine == "packed":
        longest = setup.lengths.sum(axis=1).max()
        for tokens in (n for n in _halves(budget) if n >= longest / 2):
            yield {"max_tokens_per_micro_batch": tokens}, plan.pairs, plan.accumulation
        return
    for pairs in _halves(plan.pairs):
        accumulation = math.ceil(plan.pairs * plan.accumulation / pairs)
        yield {"per_device_train_batch_size": pairs, "gradient_accumulation_steps": accumulation}, pairs, accumulation


def _fitting(setup: Setup, plan: Plan, strategy: str, world: int, room: float) -> tuple[dict[str, Any], float] | None:
    """The mildest change of flags with which a device needs no more than `room` bytes, and what it then needs."""
    for changes in _levels(plan.args, setup.hardware):
        args = changed(plan.args, changes)
        estimator = setup.estimator(args) if changes else plan.estimator
        cuts = list(_cuts(setup, plan, args))
        tries: list[tuple[dict[str, Any], int, int]] = [({}, plan.pairs, plan.accumulation)] * bool(changes) + cuts
        for at, (cut, pairs, accumulation) in enumerate([tries[-1], *tries] if tries else []):
            need = setup.plan(changed(args, cut), pairs, accumulation, estimator).memory(strategy, world).peak
            if need > room and at == 0:
                break  # not even in the smallest pieces
            if need <= room and at > 0:
                return changes | cut, need
    return None


def advice(setup: Setup, plan: Plan, strategy: str, world: int, present: float) -> list[str]:
    """Whether the run fits; if not, the mildest change of variables with which it does."""
    need, limit = plan.memory(strategy, world).peak + present, setup.limit
    if not limit:
        return [f"the run needs {_gib(need)} GiB; how much there is, is not known"]
    if need <= limit:
        lines = [f"it fits: {_gib(need)} GiB of {_gib(limit)} at the peak{_beside(present)}"]
        if setup.hardware.device == "cpu":
            lines.append(f"in a long run it may grow to {_gib(GROWTH * need)} GiB: memory that is freed leaves holes")
        return lines
    name = setup.hardware.name
    lines = [f"it does not fit: it needs {_gib(need)} GiB{_beside(present)}, and {name} has {_gib(limit)}"]
    if found := _fitting(setup, plan, strategy, world, limit - present):
        now = {"per_device_train_batch_size": plan.pairs, "gradient_accumulation_steps": plan.accumulation}
        words = [f"{name}={_word(value)} (now {_word(now.get(name, _value(plan.args, name)))})"
                 for name, value in found[0].items()]  # fmt: skip
        return [*lines, f"set {', '.join(words)}: then it needs {_gib(found[1] + present)} GiB"]
    for devices in (n for n in WORLDS if n > world and setup.hardware.device != "cpu"):
        for other in STRATEGIES:
            if (needs := plan.memory(other, devices).peak + present) <= limit:
                each = f"{_gib(needs)} GiB on each"
                return [*lines, f"set strategy={other} (now {strategy}) on {devices} devices: {each}"]
    return [*lines, "no setting of this model fits: take a smaller model, or shorter rows "
            f"(max_source_length is {plan.args.data.max_source_length}, "
            f"max_target_length {plan.args.data.max_target_length})"]  # fmt: skip


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _beside(present: float) -> str:
    return f", {_gib(present)} of them there before the model is loaded" if present else ""


def _value(args: Arguments, name: str) -> Any:
    return next(getattr(g, name) for g in (args.model, args.data, args.objective, args.run) if hasattr(g, name))


def dry_run(args: Arguments, setup: Setup, pairs: int, accumulation: int, world: int = 1) -> str:
    """All of it.

    Args:
        pairs, accumulation: pairs per micro-batch, and micro-batches per step, of one device.
        world: devices of this run.
    """
    present, hardware = setup.present, setup.hardware
    device = torch.device(hardware.device)
    rates = matmul_rate(device, setup.half or torch.float32), memory_rate(device)
    lines = [configuration(args), "", length_table(setup.lengths, setup.single), ""]
    mine: Plan | None = None
    for engine, option in _engine_options(args):
        if isinstance(option, str):
            lines += [f"engine={engine}: {option}", ""]
            continue
        try:
            plan = setup.plan(option, pairs, accumulation)
        except (EngineError, TraceError) as error:
            lines += [f"engine={engine}: no estimate ({error})", ""]
            continue
        if not any(line.startswith("model:") for line in lines):
            rate, why = args.learning_rate(plan.estimator.parameters), args.settle_beta(plan.estimator.parameters)
            lines += [
                f"model: {plan.estimator.parameters / 1e6:,.1f} M parameters, {plan.estimator.trainable / 1e6:,.2f} M "
                f"of them trained, learning rate {rate.learning_rate:g} ({rate.source})",
                f"beta {args.beta:g} ({why})",
                f"optimizer steps: {plan.work.steps} of {pairs * accumulation} pairs on one device "
                f"({pairs} per micro-batch x {accumulation}); on several, as many times more pairs a step",
                f"this device, measured: {rates[0] / 1e12:.3g} TFLOP/s in {type_name(setup.half)} "
                f"matrix products, {rates[1] / 1e9:.3g} GB/s of memory",
                "",
            ]
        lines += [*_describe_engine(setup, plan, rates), ""]
        mine = plan if engine == args.objective.engine else mine
    if mine is not None:
        lines += advice(setup, mine, args.run.strategy, world, present)
    lines.append(_how_far(hardware))
    return "\n".join(lines)


def _how_far(hardware: Hardware) -> str:
    if hardware.device == "cpu":
        return "(benchmarks/LOG.md says how far such estimates were off; those for several processes are arithmetic)"
    return "(estimates were compared with runs on CPUs only, benchmarks/LOG.md; leave some room on this device)"


def on_paper(
    args: Arguments,
    source: ModelSource,
    hardware: Hardware,
    objective: Objective,
    training: Any,
    train_set: Any,
    budget: Budget | None = None,
) -> str:
    """What the run would do, need and take; no weight is loaded.

    Args:
        budget: that the run would start with, where it finds the tokens of a micro-batch itself.
    """
    if budget is not None:
        args = changed(args, {"max_tokens_per_micro_batch": budget.tokens})
    lengths, common = row_lengths(train_set), shared_prefix(train_set)
    single = "desirable" in train_set.column_names
    half = half_type(training)
    setup = Setup(source.base, hardware, objective, half, lengths, common=common, adapter=source.adapter, single=single)
    cut = training.per_device_train_batch_size, training.gradient_accumulation_steps
    return dry_run(args, setup, *cut, training.world_size)
