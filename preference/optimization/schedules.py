"""The learning rate over a run: transformers' schedules, with a warm-up that starts above 0.

transformers' own warm-up gives the first step a learning rate of 0: a run of one step would train nothing, one of four
steps lose a quarter. Here its W steps are spread evenly between 0 and the peak, both left out: 1/(W+1), 2/(W+1), ...
for a linear one. Step W has the peak, as in transformers, and everything behind it is the same.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from preference.optimization.keywords import OptimizationError

NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")  # they change when an evaluation is done
NO_KEYWORDS = ("constant", "constant_with_warmup")
GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "self")  # by the run
LOOKED_AT = 1000  # steps of a schedule that is checked


def schedule_names() -> tuple[str, ...]:
    """The schedules of this version of transformers."""
    from transformers import SchedulerType

    return tuple(kind.value for kind in SchedulerType)


def warmup_length(warmup: float, steps: int) -> int:
    """Optimizer steps of the warm-up in a run of `steps`; below 1 `warmup` is a share of them, which never takes all.

    Raises:
        OptimizationError: it is longer than the run.
    """
    if warmup < 1:
        return min(math.ceil(steps * warmup), steps - 1)
    if warmup > steps:
        raise OptimizationError(
            f"warmup_steps={warmup:g} is longer than the run, which has {steps} optimizer steps and would never reach "
            "its learning rate: give fewer, or a share of them such as 0.1"
        )
    return int(warmup)


def make_schedule(name: str, optimizer: Any, warmup: float, steps: int, options: Mapping[str, Any], peak: float) -> Any:
    """The torch scheduler called `name` over `steps` optimizer steps, of which `warmup` (a share or a number, see
    `warmup_length`) are its warm-up; `peak` is the optimizer's learning rate.

    Raises:
        OptimizationError: `options`, the schedule's own keyword arguments, are not what it takes.
    """
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import get_scheduler

    _check_names(name, options)
    length = 0 if name in NO_WARMUP else warmup_length(warmup, steps)
    try:
        made = get_scheduler(name, _optimizer(peak), length, steps, dict(options))
        if not isinstance(made, LambdaLR):
            return get_scheduler(name, optimizer, length, steps, dict(options))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise OptimizationError(f"lr_scheduler_type={name}: {_one_line(error)}") from None
    return LambdaLR(optimizer, _above_zero(made.lr_lambdas[0], length))


def check_schedule(name: str, warmup: float, steps: int, options: Mapping[str, Any], peak: float) -> None:
    """Make the schedule on paper and look at its learning rates.

    Raises:
        OptimizationError: it cannot be had, or would train nothing.
    """
    made = make_schedule(name, _optimizer(peak), warmup, steps, options, peak)
    if not hasattr(made, "lr_lambdas"):
        return
    taken = warmup_length(warmup, steps) + options.get("num_stable_steps", 0) + options.get("num_decay_steps", 0)
    if name == "warmup_stable_decay" and taken > steps:
        raise OptimizationError(f"{name}: warm-up, stable and decay take {taken:g} steps, the run has {steps}")
    try:
        rates = [made.lr_lambdas[0](step) for step in range(0, steps, math.ceil(steps / LOOKED_AT))]
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise OptimizationError(f"lr_scheduler_type={name}: {_one_line(error)}") from None
    if any(isinstance(rate, complex) or not 0 <= rate <= 1 + 1e-6 for rate in rates) or not rates[0] > 0:
        raise OptimizationError(
            f"lr_scheduler_type={name} with {dict(options)} leaves the range from 0 to the peak learning rate {peak:g}"
        )


def _check_names(name: str, options: Mapping[str, Any]) -> None:
    parameters = _parameters(name)
    if option := next((o for o, value in options.items() if o in parameters and not _fits(value, parameters[o])), None):
        kind = "a word" if isinstance(parameters[option].default, str) else "a number, at least 0"
        raise OptimizationError(f"lr_scheduler_type={name} takes {option} as {kind}; got {options[option]!r}")
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in options]
    unknown = [option for option in options if option not in parameters]
    takes = ", ".join(parameters) or "none"
    if unknown:
        raise OptimizationError(f"lr_scheduler_type={name} has no {unknown[0]}; its lr_scheduler_kwargs: {takes}")
    if "min_lr_rate" in parameters and not {"min_lr", "min_lr_rate"} & options.keys():
        missing = ["min_lr_rate"]
    if name == "greedy" and "min_lr" not in options:  # transformers' own is 0.001, above most peaks
        missing = ["min_lr"]
    if missing:
        raise OptimizationError(
            f"lr_scheduler_type={name} needs lr_scheduler_kwargs with {missing[0]}, such as {missing[0]}="
            f"{'10' if 'steps' in missing[0] else '0.1' if 'rate' in missing[0] else '1e-7'}; there are {takes}"
        )


def _fits(value: Any, parameter: inspect.Parameter) -> bool:
    if isinstance(value, str) or isinstance(parameter.default, str):
        return isinstance(value, str) and isinstance(parameter.default, str)
    return isinstance(value, bool) or (math.isfinite(value) and value >= 0)


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    """The keyword arguments of a schedule that are the user's."""
    import torch
    from transformers import optimization

    if name in NO_KEYWORDS:
        return {}
    if name == "reduce_lr_on_plateau":
        made: Callable[..., Any] = torch.optim.lr_scheduler.ReduceLROnPlateau
    elif name == "greedy":
        made = optimization.GreedyLR
    else:
        made = optimization.TYPE_TO_SCHEDULER_FUNCTION[name]
    return {n: p for n, p in inspect.signature(made).parameters.items() if n not in GIVEN}


def _above_zero(factor: Callable[[float], float], warmup: int) -> Callable[[int], float]:
    """`factor` of the peak by step, its warm-up spread between 0 and the peak if it starts at 0."""
    if warmup == 0 or factor(0) > 0:
        return factor

    def spread(step: int) -> float:
        return factor(step) if step >= warmup else min(1.0, factor((step + 1) * warmup / (warmup + 1)))

    return spread


def _optimizer(peak: float) -> Any:
    """An optimizer of one number, to ask a schedule for its factors."""
    import torch

    return torch.optim.SGD([torch.zeros(1)], lr=peak)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
