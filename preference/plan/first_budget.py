"""The tokens that a micro-batch starts with on a GPU, and whether activations are checkpointed, by an estimate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from preference.arguments import Arguments
from preference.engine.batching import Cut, row_lengths, shared_prefix
from preference.losses import Objective
from preference.models.hardware import Hardware, half_type
from preference.models.sources import ModelSource
from preference.plan.dry_run import Setup
from preference.plan.estimate import Estimator, changed
from preference.train.budget import GIB, MOST, ROOM, Budget, CudaMeter
from preference.train.setup import checkpointing_options

REPEATED = 8  # times the longest pair, for what a token costs


@dataclass(frozen=True)
class FirstBudget:
    """Where a run's micro-batches start; `budget` is None where they go by pairs."""

    budget: Budget | None = None
    checkpointing: bool = False
    note: str = ""


def is_automatic(args: Arguments, hardware: Hardware) -> bool:
    """Whether the tokens of a micro-batch are found by the run: on CUDA, where nobody named a number of them, and each
    process has the whole model.
    """
    run, named = args.run, "max_tokens_per_micro_batch" in args.given
    packed = args.objective.engine == "packed"
    return hardware.device == "cuda" and packed and run.do_train and run.strategy == "ddp" and not named


def fitting_tokens(estimator: Estimator, lengths: np.ndarray, room: float, world: int) -> tuple[int, int]:
    """(tokens of a micro-batch that fit into `room` bytes, 0 for not even the longest pair; tokens of that pair)."""
    cut = Cut(1, share_prompt=estimator.share_prompt, common=estimator.common)
    longest = lengths[[int(cut.cost(lengths).argmax())]]
    many = longest.repeat(REPEATED, axis=0)
    few_tokens, many_tokens = (estimator.tokens(pairs) for pairs in (longest, many))
    few, more = (estimator.memory(estimator.trace(p, True), True, "ddp", world).peak for p in (longest, many))
    if few > ROOM * room:
        return 0, few_tokens
    each = max(more - few, 1.0) / (many_tokens - few_tokens)
    return min(MOST, few_tokens + int((ROOM * room - few) / each)), few_tokens


def first_budget(args: Arguments, setup: Setup, world: int, room: float) -> FirstBudget:
    """Of a run for which it is automatic.

    Args:
        setup: of the run as it would be without checkpointing, if nobody named it.
        room: bytes that each process can have.
    """
    chosen = args.run.gradient_checkpointing
    ways = [chosen] if chosen or "gradient_checkpointing" in args.given else [False, True]
    try:
        return _first_that_fits(
            ways,
            lambda way: setup.estimator(changed(args, {"gradient_checkpointing": way})),
            setup.lengths,
            room,
            world,
        )
    except Exception as error:  # whatever a model's own code raises at weights without values
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return FirstBudget(note=f"note: micro-batches go by pairs, as the step was not followed on paper: {reason}")


def fit_to_memory(
    args: Arguments, source: ModelSource, hardware: Hardware, objective: Objective, training: Any, train_set: Any,
    say: Callable[[str], None],
) -> tuple[Arguments, Budget | None]:  # fmt: skip
    """The run's arguments, with gradient checkpointing where it takes that, and its budget, the same on all ranks.
    `training` (TrainingArguments) is changed alike.
    """
    if not is_automatic(args, hardware):
        return args, None
    room = min(gather_object([CudaMeter().room()]))
    lengths, common = row_lengths(train_set), shared_prefix(train_set)
    setup = Setup(source.base, hardware, objective, half_type(training), lengths, None, common, source.adapter)
    first = first_budget(args, setup, training.world_size, room)
    say(first.note)
    if first.checkpointing and not args.run.gradient_checkpointing:
        args = changed(args, {"gradient_checkpointing": True})
        for name, value in checkpointing_options().items():
            setattr(training, name, value)
    return args, first.budget


def _first_that_fits(
    ways: list[bool], estimator_of: Callable[[bool], Estimator], lengths: np.ndarray, room: float, world: int
) -> FirstBudget:
    """The first way in which the longest pair fits, else the last, which the run may try."""
    tokens = 0
    for way in ways:
        if not tokens:
            chosen, estimator = way, estimator_of(way)
            tokens, least = fitting_tokens(estimator, lengths, room, world)
    budget = Budget(max(tokens, least), least, float(sum(estimator.optimizer_sizes())))
    return FirstBudget(budget, chosen, _note(budget, chosen and len(ways) > 1, room))


def _note(budget: Budget, switched_on: bool, room: float) -> str:
    text = (
        f"micro-batches start with up to {budget.tokens:,} tokens, by an estimate for {room / GIB:.1f} GiB at hand; "
        "the first steps measure it (max_tokens_per_micro_batch=N sets it)"
    )
    if switched_on:
        text += "; the longest pair would not fit without gradient checkpointing, which is on"
    return text
