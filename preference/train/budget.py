"""How many tokens a micro-batch has on a GPU where nobody said: as many as the memory at hand has room for.

It starts from an estimate (plan/first_budget.py). Before each of the first steps the step's largest micro-batch is run
forward and backward once for trial, its memory measured and its gradients dropped; where it does not fit, the budget is
halved and the step cut anew. Then the budget stands, is written into every checkpoint and taken up by a resumed run.
How a batch is cut changes no number of it (losses/share.py); all ranks have the same budget.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from preference.engine.forward import pair_logps
from preference.engine.transfer import to_device
from preference.errors import PreferenceError
from preference.launch.process import say

MEASURED_STEPS = 3  # the second has the optimizer's states, which the first one's update makes
ROOM = 0.9  # of the memory at hand; the rest is for holes between blocks
MOST = 2**16  # tokens of a micro-batch: a GPU is busy long before
GIB = 2**30


class BudgetError(PreferenceError, RuntimeError):
    """The smallest micro-batch does not fit."""


class Meter(Protocol):
    """The memory of this rank's device, in bytes."""

    def now(self) -> float:
        """In use."""

    def peak(self) -> float:
        """Most in use at once since `reset`."""

    def reset(self) -> None: ...

    def room(self) -> float:
        """What this process can have in all."""

    def free(self) -> None:
        """Give back what is kept for later use."""


class CudaMeter:
    """Of torch's allocator on the current device."""

    def now(self) -> float:
        return torch.cuda.memory_allocated()

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated()

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def room(self) -> float:
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()

    def free(self) -> None:
        torch.cuda.empty_cache()


@dataclass
class Budget:
    """
    Attributes:
        tokens: most of a micro-batch. least: of the longest pair, which is not cut.
        coming: bytes of the optimizer's states, which are made in the first update.
        measured: steps that were measured.
    """

    tokens: int
    least: int
    coming: float = 0.0
    measured: int = 0

    @property
    def settled(self) -> bool:
        return self.measured >= MEASURED_STEPS

    def observe(self, tokens: int, held: float, peak: float, room: float) -> None:
        """A micro-batch of so many tokens needed `peak` bytes, `held` of them with or without it, of `room`."""
        each = max(peak - held, 1.0) / tokens
        fits = int(max(ROOM * room - held, 0.0) / each)
        self.tokens = max(self.least, min(fits, 2 * self.tokens, MOST))
        self.measured += 1

    def halve(self, tokens: int) -> None:
        """A micro-batch of so many tokens did not fit.

        Raises:
            BudgetError: nor will a smaller one, as no pair is cut.
        """
        if min(tokens, self.tokens) <= self.least:
            raise BudgetError(
                f"one pair of {self.least:,} tokens does not fit in the memory of this device: set "
                "gradient_checkpointing=true, use_peft=true or qlora=true, or take shorter rows (max_source_length, "
                "max_target_length)"
            )
        self.tokens = max(self.least, min(tokens, self.tokens) // 2)
        self.measured = 0

    def state(self) -> dict[str, int]:
        """For checkpoints."""
        return {"tokens": self.tokens, "measured": self.measured}

    def take_up(self, state: dict[str, int]) -> None:
        self.tokens, self.measured = state["tokens"], state["measured"]


@dataclass
class Trial:
    """Makes the first steps of a run fit.

    Attributes:
        run: runs a micro-batch forward and backward and keeps its gradients. drop: forgets them.
        most: the largest of a number on all ranks.
        updated: whether the optimizer has its states.
    """

    budget: Budget
    meter: Meter
    run: Callable[[dict[str, Any]], None]
    drop: Callable[[], None]
    most: Callable[[float], float]
    updated: Callable[[], bool]

    def fit(self, inputs: dict[str, Any], loader: Any) -> dict[str, Any]:
        """The step that `loader` gave, cut so that it fits; later steps are cut by what was measured.

        Raises:
            BudgetError: on all ranks; it cannot be made to fit.
        """
        budget = self.budget
        while True:
            tokens = max(batch["input_ids"].numel() for batch in inputs["micro_batches"])
            coming = 0.0 if self.updated() else budget.coming
            self.meter.reset()
            held = self._try(inputs["micro_batches"])
            peak = self.meter.peak() + coming
            room = self.meter.room()
            self.drop()
            too_much = held is None or peak > room
            if not self.most(float(too_much)):
                break
            self.meter.free()
            budget.halve(int(self.most(tokens)))
            inputs = recut(inputs, loader, budget.tokens)
        assert held is not None  # no rank has run out of memory
        budget.observe(tokens, held + coming, peak, room)
        budget.tokens = int(-self.most(-budget.tokens))
        plan = loader.batch_sampler
        plan.cut = plan.cut.of_tokens(budget.tokens)
        return inputs

    def _try(self, batches: list[dict[str, Any]]) -> float | None:
        """What is held beside the largest micro-batch, gradients included; None where that does not fit."""
        largest = max(batches, key=lambda batch: batch["input_ids"].numel())
        with _same_random_numbers():
            try:
                for _ in range(min(len(batches), 2)):  # the second finds the gradients of the first
                    self.run(largest)
            except torch.OutOfMemoryError:
                return None
        return self.meter.now()


@contextlib.contextmanager
def _same_random_numbers() -> Any:
    """What is drawn inside is drawn again after it: dropout is that of a run without trials."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield


def recut(inputs: dict[str, Any], loader: Any, tokens: int) -> dict[str, Any]:
    """This rank's step, cut into micro-batches of at most so many tokens."""
    real = zip(inputs["micro_batches"], inputs["source"], strict=True)
    rows = [row for batch, source in real if source for row in batch["rows"].tolist()]  # a filler has no source
    if not rows:
        return inputs
    step = loader.batch_sampler.recut(np.array(rows), inputs["totals"], tokens)
    return loader.collate_fn([loader.dataset[step]])


def fit_step(trainer: Any, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A first step of a PairTrainer in micro-batches that fit; its budget becomes what was measured, on all ranks."""
    budget, accelerator, device = trainer.budget, trainer.accelerator, trainer.args.device

    def run(batch: dict[str, Any]) -> None:
        with accelerator.no_sync(model):
            logps = pair_logps(model, to_device(batch, device))
            (logps.chosen_B + logps.rejected_B + logps.prompt_B).sum().backward()

    def most(value: float) -> float:
        return float(accelerator.gather(torch.tensor([value], device=device)).max())

    def updated() -> bool:
        return bool(trainer.optimizer.state)

    trial = Trial(budget, trainer.meter, run, functools.partial(model.zero_grad, set_to_none=True), most, updated)
    inputs = trial.fit(inputs, trainer.train_loader)
    trainer.checkpoints.run = {**trainer.checkpoints.run, "micro_batches": budget.state()}
    if budget.settled:
        room = trainer.meter.room() / GIB
        say(
            f"micro-batches have up to {budget.tokens:,} tokens, as {MEASURED_STEPS} steps in {room:.1f} GiB have shown"
        )
    return inputs
