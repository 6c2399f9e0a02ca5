"""Which weights a run ends with: its last ones, the best checkpoint, or a mean of several.

Everything here follows from the log of evaluations and the checkpoints on the disk, both of which a resumed run has: so
it ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from preference.errors import PreferenceError
from preference.files import evaluation_sets
from preference.train.checkpoints import checkpoint_folders, checkpoint_step


class SelectionError(PreferenceError, ValueError):
    """A choice of weights that this run cannot make; the message says what to set."""


@dataclass(frozen=True)
class Selection:
    """What a run ends with.

    Attributes:
        metric: of the evaluations, with or without "eval_" in front.
        greater: whether more of it is better; None: unless it is a loss, or a figure of the rejected answers.
        best: take the best checkpoints by the metric rather than the last ones.
        average: over how many checkpoints the weights are averaged (0: one checkpoint, or no choice at all).
        patience: evaluations without a gain after which training stops; 0: never.
        threshold: what counts as a gain must be more than that.
    """

    metric: str = "loss"
    greater: bool | None = None
    best: bool = False
    average: int = 0
    patience: int = 0
    threshold: float = 0.0

    @property
    def name(self) -> str:
        return self.metric if self.metric.startswith("eval_") else f"eval_{self.metric}"

    @property
    def greater_is_better(self) -> bool:
        return not self.name.endswith(("loss", "rejected")) if self.greater is None else self.greater

    @property
    def needs_metric(self) -> bool:
        return self.best or self.patience > 0

    @property
    def keeps(self) -> int:
        """How many checkpoints it chooses among those that are there at the end."""
        return max(self.average, 1) if self.best or self.average else 0

    def check(self, metrics: Mapping[str, float]) -> None:
        """Raises SelectionError if evaluations, such as the one that gave `metrics`, have no such metric."""
        if not self.needs_metric or self.name in metrics:
            return
        heads = evaluation_sets(metrics)
        names = [n.removeprefix("eval_") for n in metrics if n.startswith(tuple(heads)) and not n.endswith(SPEED)]
        raise SelectionError(
            f"metric_for_best_model={self.metric}: evaluations of this run have {', '.join(sorted(names))}"
        )

    def values(self, log: Iterable[Mapping[str, Any]]) -> dict[int, float]:
        """The metric by step, times -1 where less is better."""
        sign = 1 if self.greater_is_better else -1
        return {entry["step"]: sign * entry[self.name] for entry in log if self.name in entry}

    def exhausted(self, log: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the last `patience` evaluations were none of them better than the best before, by the threshold."""
        best, without = -float("inf"), 0
        for _, value in sorted(self.values(log).items()):
            gained = value > best + self.threshold
            best, without = (value, 0) if gained else (best, without + 1)
        return 0 < self.patience <= without

    def steps(self, state: Any) -> list[int]:
        """The steps whose checkpoints it takes of those written so far, ascending. `state`: the Trainer's.

        A checkpoint that only an interruption has left does not count: an uninterrupted run has none.
        """
        if not self.keeps:
            return []
        every = max(int(state.save_steps), 1)
        written = set(range(every, state.global_step + 1, every))
        if state.global_step == state.max_steps:
            written.add(state.max_steps)
        if not self.best:
            return sorted(written)[-self.keeps :]
        values = self.values(state.log_history)
        ranked = sorted((step for step in written if step in values), key=lambda step: (-values[step], step))
        return sorted(ranked[: self.keeps])


SPEED = ("runtime", "per_second")


class Follow(TrainerCallback):
    """Ends training once its evaluations have not gained for a while; a resumed run finds out from its log.

    An evaluation that an interruption has left out is done before training resumes.
    """

    def __init__(self, trainer: Any, selection: Selection, say: Callable[[str], None]) -> None:
        self.trainer, self.selection, self.say = trainer, selection, say

    def _look(self, state: Any, control: Any) -> None:
        if self.selection.exhausted(state.log_history) and not control.should_training_stop:
            control.should_training_stop = True
            if state.is_world_process_zero:
                name, count = self.selection.name, self.selection.patience
                self.say(
                    f"stopping early at step {state.global_step}: {name} has not got better in {count} evaluations"
                )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = state.global_step > 0 and state.global_step % state.eval_steps == 0
        if due and state.global_step not in self.selection.values(state.log_history):
            self.trainer.evaluate()
        self._look(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.log_history and self.selection.name in state.log_history[-1]:  # of several sets, that one
            self._look(state, control)


def choose(trainer: Any, selection: Selection) -> dict[str, Any]:
    """Give the model the weights that the run ends with; returns what to say of them, {} where they are the last ones.

    Raises:
        SelectionError: a checkpoint that is to be taken is not there.
    """
    steps = selection.steps(trainer.state)
    if not selection.keeps:
        return {}
    if not steps:
        raise SelectionError(
            "no checkpoint was evaluated, so that there is none to choose: set save_steps and eval_steps so that both "
            f"come before step {trainer.state.global_step}"
        )
    output_dir = Path(trainer.args.output_dir)
    folders = {checkpoint_step(folder): folder for folder in checkpoint_folders(output_dir)}
    if missing := [str(step) for step in steps if step not in folders]:
        raise SelectionError(f"{output_dir} has no checkpoint of step {', '.join(missing)}: was it deleted?")
    load_mean(trainer, [folders[step] for step in steps])
    values = selection.values(trainer.state.log_history)
    sign = 1 if selection.greater_is_better else -1
    found = {str(step): sign * values[step] for step in steps if step in values} if selection.best else {}
    return {"weights_of_steps": steps} | ({"chosen_by": selection.name, "values": found} if selection.best else {})


@torch.no_grad()
def load_mean(trainer: Any, folders: Sequence[Path]) -> None:
    """Load the mean of the weights of these checkpoints, each as resuming loads it; one is loaded as it is."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    means: list[torch.Tensor] = []
    for count, folder in enumerate(folders, start=1):
        trainer._load_from_checkpoint(str(folder))
        if not means:
            means = [p.detach().to(torch.float64 if len(folders) > 1 else p.dtype, copy=True) for p in trained]
        else:
            for mean, p in zip(means, trained, strict=True):
                mean += (p.to(mean.dtype) - mean) / count
    for mean, p in zip(means, trained, strict=True):
        p.copy_(mean)


def said(chosen: Mapping[str, Any]) -> str:
    """The choice in a line."""
    steps = chosen["weights_of_steps"]
    which = f"step {steps[0]}" if len(steps) == 1 else f"steps {', '.join(map(str, steps))}, averaged"
    by = ", ".join(f"{value:.4f}" for value in chosen.get("values", {}).values())
    return f"the result has the weights of {which}" + (f": {chosen['chosen_by']} {by}" if by else "")
